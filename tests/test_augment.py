"""Flip, colour jitter, normalization and random erasing against torchvision, PIL, timm and plain Python."""

import math
import random
from functools import lru_cache
from types import SimpleNamespace
from typing import Any

import hydra
import numpy as np
import pytest
import torch
import torchvision.transforms.functional as F
from omegaconf import OmegaConf
from PIL import Image
from scipy import stats
from skimage import data as photographs
from sklearn.datasets import load_sample_images
from timm.data.random_erasing import RandomErasing
from torch import Tensor
from torch._subclasses import FakeTensorMode

from data.augment import BRIGHTNESS, CONTRAST, ORDERS, SATURATION, Augment, flip, jitter
from data.datamodule import ImageNetTraining
from data.erase import Erase, normal_noise, normal_quantiles
from data.mix import Mix
from data.row_plan import RowPlan
from data.sampling import (
    ERASE,
    ERASE_LEFT,
    ERASE_NOISE,
    ERASE_SHAPE,
    ERASE_TOP,
    FLIP,
    JITTER,
    JITTER_ORDER,
    NUM_UNIFORMS,
    uniforms,
)
from repghost.dataset import Batch
from repghost.errors import UserError
from repghost.model import repghostnet

JITTER_04 = {"brightness": 0.4, "contrast": 0.4, "saturation": 0.4}
RAND_AUGMENT = {
    "operations": 2, "magnitude": 9, "magnitude_std": 0.5, "probability": 0.5, "fill": [124, 116, 104],
}  # fmt: skip
ERASING = {"probability": 0.2, "area": [0.02, 0.3333], "aspect": [0.3, 3.3333]}
FULL = {"flip": 0.5, "jitter": JITTER_04, "rand_augment": RAND_AUGMENT, "erase": ERASING}
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


def augment(**changes: Any) -> Augment:
    plain = {"flip": 0.0, "jitter": None, "rand_augment": None, "erase": None, "mean": MEAN, "std": STD}
    return Augment(**plain | changes)


@lru_cache
def crops() -> Tensor:
    """uint8 [6, 3, 144, 176] of photographs."""
    china, flower = load_sample_images().images
    images = [
        photographs.astronaut(),
        photographs.coffee(),
        photographs.chelsea(),
        photographs.rocket(),
        china,
        flower,
    ]
    return torch.from_numpy(np.stack([i[60:204, 100:276] for i in images])).permute(0, 3, 1, 2).contiguous()


def draws(count: int, seed: int = 0) -> Tensor:
    return torch.from_numpy(uniforms(seed, 0, 0, count))


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


PARTS = {
    BRIGHTNESS: F.adjust_brightness,
    CONTRAST: F.adjust_contrast,
    SATURATION: F.adjust_saturation,
}


def torchvision_jitter(image: Tensor, factors: Tensor, order: tuple[int, ...]) -> Tensor:
    """Of one image uint8 [3, H, W], through PIL."""
    picture = Image.fromarray(image.permute(1, 2, 0).numpy())
    for part in order:
        picture = PARTS[part](picture, factors[part].item())
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


@pytest.mark.parametrize("grouped", [True, False])
@pytest.mark.parametrize("order", range(6))
def test_jitter_equals_torchvision_on_pil(order: int, grouped: bool) -> None:
    images = crops().repeat(5, 1, 1, 1)
    factors = torch.rand(len(images), 3, generator=generator(order)) * 0.8 + 0.6
    factors[0], factors[1] = torch.tensor([0.0, 1.0, 0.0]), torch.tensor([1.9, 0.1, 2.5])
    ours = jitter(images, factors, torch.full((len(images),), order), grouped)
    theirs = torch.stack(
        [torchvision_jitter(image, row, ORDERS[order]) for image, row in zip(images, factors, strict=True)]
    )
    assert torch.equal(ours, theirs.float())


def test_jitter_reads_its_draws() -> None:
    """Factors are uniform in 1 - s .. 1 + s, and each sixth of the order's draw is one order."""
    images, rows = crops(), draws(6)
    rows[:, JITTER_ORDER] = (torch.arange(6) + 0.5) / 6
    strengths = torch.tensor([0.4, 0.2, 0.1])
    plain = augment(jitter={"brightness": 0.4, "contrast": 0.2, "saturation": 0.1}, mean=[0] * 3, std=[1 / 255] * 3)
    factors = 1 + strengths * (2 * rows[:, JITTER] - 1)
    expected = [torchvision_jitter(i, f, o) for i, f, o in zip(images, factors, ORDERS, strict=True)]
    difference = (plain.train(images, rows) - torch.stack(expected).float()).abs()
    assert difference.max() <= 1 and difference.mean() < 1e-3, "the factors may differ in their last bit"


@pytest.mark.parametrize("part", list(JITTER_04))
def test_each_strength_of_the_jitter_counts_and_zero_is_off(part: str) -> None:
    images, rows = crops(), draws(6)
    off = dict.fromkeys(JITTER_04, 0.0)
    assert torch.equal(augment(jitter=off).train(images, rows), augment().train(images, rows))
    assert not torch.equal(augment(jitter=off | {part: 0.4}).train(images, rows), augment().train(images, rows))


def test_flip() -> None:
    images, rows = crops(), draws(6)
    rows[:, FLIP] = torch.tensor([0.1, 0.49, 0.5, 0.9, 0.3, 0.7])
    expected = images.clone()
    expected[[0, 1, 4]] = images[[0, 1, 4]].flip(3)
    for grouped in (True, False):
        assert torch.equal(flip(images, rows[:, FLIP] < 0.5, grouped), expected)
    for plan in (None, augment().plan(rows)):
        result = augment(flip=0.5).train(images, rows, plan=plan)
        assert torch.equal(result, augment().evaluate(expected))


def test_normalize_equals_torchvision() -> None:
    images = crops()
    expected = F.normalize(images.float() / 255, MEAN, STD)
    torch.testing.assert_close(augment().evaluate(images), expected, rtol=0, atol=1e-6)
    assert torch.equal(augment().evaluate(images), augment().train(images, draws(6)))


def plain_box(row: Tensor, height: int, width: int) -> list[int]:
    """timm's RandomErasing for one sample in plain Python, from the row's draws."""
    values = row.double().tolist()
    if values[ERASE] >= 0.2:
        return [0, 0, 0, 0]
    shapes = values[ERASE_SHAPE]
    low, high = math.log(0.3), math.log(3.3333)
    for area, aspect in zip(shapes[::2], shapes[1::2], strict=True):
        target = (0.02 + (0.3333 - 0.02) * area) * (height * width)
        ratio = math.exp(low + (high - low) * aspect)
        h, w = round(math.sqrt(target * ratio)), round(math.sqrt(target / ratio))
        if h < height and w < width:
            top = math.floor(values[ERASE_TOP] * (height - h + 1))
            return [top, math.floor(values[ERASE_LEFT] * (width - w + 1)), h, w]
    return [0, 0, 0, 0]


@pytest.mark.parametrize("size", [(224, 224), (32, 32), (16, 200), (9, 300)])
def test_erase_boxes_equal_plain_python(size: tuple[int, int]) -> None:
    rows = draws(3000)
    boxes = Erase(**ERASING).boxes(rows, *size)
    assert boxes.tolist() == [plain_box(row, *size) for row in rows]
    top, left, h, w = boxes.unbind(1)
    assert (top + h <= size[0]).all() and (left + w <= size[1]).all()


def test_erased_part_resembles_timm() -> None:
    """Share of erased images and mean erased area of timm's RandomErasing, whose draws are its own."""
    random.seed(0)
    torch.manual_seed(0)
    images = torch.zeros(4000, 1, 48, 48)
    theirs = RandomErasing(0.2, 0.02, 0.3333, 0.3, 3.3333, mode="pixel", max_count=1, device="cpu")(images)
    area_theirs = (theirs != 0).double().mean((1, 2, 3))
    boxes = Erase(**ERASING).boxes(draws(40_000), 48, 48).double()
    area = boxes[:, 2] * boxes[:, 3] / 48**2
    assert abs((area > 0).double().mean() - 0.2) < 0.008
    assert abs((area_theirs > 0).double().mean() - 0.2) < 0.03
    assert abs(area[area > 0].mean() - area_theirs[area_theirs > 0].mean()) < 0.02


@pytest.mark.parametrize("planned", [False, True])
def test_erased_pixels_are_normal_noise_and_the_rest_is_untouched(planned: bool) -> None:
    images, rows = crops().repeat(8, 1, 1, 1), draws(48)
    before, augmenter = augment().evaluate(images), augment(erase=ERASING | {"probability": 0.9})
    after = augmenter.train(images, rows, augmenter.plan(rows) if planned else None)
    inside = torch.zeros(48, 1, 144, 176, dtype=torch.bool)
    assert augmenter.erase is not None
    for i, (top, left, h, w) in enumerate(augmenter.erase.boxes(rows, 144, 176).tolist()):
        inside[i, :, top : top + h, left : left + w] = True
    inside = inside.expand_as(after)
    assert torch.equal(after[~inside], before[~inside])
    noise = after[inside]
    assert len(noise) > 200_000 and (noise != before[inside]).float().mean() > 0.999
    assert abs(noise.mean()) < 0.01 and abs(noise.var() - 1) < 0.02
    different = 2**20 * (1 - math.exp(-len(noise) / 2**20))  # of so many draws among as many values
    assert abs(len(noise.unique()) / different - 1) < 0.02, "every pixel has its own noise"


def test_noise_depends_on_the_image_alone() -> None:
    """Not on the rest of its batch: so a run on other devices, or a teacher, sees the same."""
    images, rows = crops().repeat(4, 1, 1, 1), draws(24)
    augmenter = augment(erase=ERASING | {"probability": 1.0})
    whole = augmenter.train(images, rows)
    order = torch.arange(23, -1, -1)
    assert torch.equal(augmenter.train(images[order], rows[order])[order], whole)
    assert torch.equal(torch.cat([augmenter.train(images[i : i + 1], rows[i : i + 1]) for i in range(24)]), whole)
    assert torch.equal(augmenter.train(images, rows, augmenter.plan(rows)), whole)
    other = rows.clone()
    other[:, ERASE_NOISE] = rows[order, ERASE_NOISE]
    assert not torch.equal(augmenter.train(images, other), whole)


def test_noise_of_different_images_and_pixels_is_unrelated() -> None:
    keys = torch.arange(200) / 2**24  # neighbours among all that there are
    noise = normal_noise(keys.view(-1, 1), torch.arange(3000), normal_quantiles()).double()
    assert abs(noise.mean()) < 0.005 and abs(noise.var() - 1) < 0.01 and abs(noise.pow(4).mean() - 3) < 0.05
    between_images, between_pixels = torch.corrcoef(noise), torch.corrcoef(noise[:, :300].T)
    assert (between_images - torch.eye(200)).abs().max() < 0.1
    assert (between_pixels - torch.eye(300)).abs().max() < 0.4
    assert stats.kstest(noise.flatten().numpy()[:100_000], "norm").pvalue > 1e-5


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("colour", [{"jitter": JITTER_04}, {"rand_augment": RAND_AUGMENT}], ids=["jitter", "rand"])
def test_both_paths_give_the_same_bits(colour: dict[str, Any], channels_last: bool) -> None:
    images = crops().repeat(8, 1, 1, 1)[:, :, :48, :64]
    images = images.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    augmenter = augment(flip=0.5, **colour)
    one_by_one = augmenter.train(images, draws(48))
    planned = augmenter.train(images, draws(48), plan=augmenter.plan(draws(48)))
    assert torch.equal(one_by_one, planned)
    for result in (one_by_one, planned):
        assert result.dtype == torch.float32
        assert result.is_contiguous(memory_format=torch.channels_last) == channels_last


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("planned", [False, True])
@pytest.mark.parametrize("colour", [{"jitter": JITTER_04}, {"rand_augment": RAND_AUGMENT}], ids=["jitter", "rand"])
def test_no_host_synchronisation_on_a_gpu(colour: dict[str, Any], planned: bool, precision: str) -> None:
    """Fake tensors of a GPU have shapes but no values: reading one, or a shape that depends on one, raises."""
    augmenter = augment(flip=0.5, erase=ERASING, **colour)
    augmenter.match_step(torch.device("cuda"), precision, channels_last=True)
    plan = augmenter.plan(draws(64))
    with FakeTensorMode() as mode:
        images = torch.empty(64, 3, 32, 48, dtype=torch.uint8, device="cuda")
        rows = torch.empty(64, NUM_UNIFORMS, device="cuda")
        plan = RowPlan(mode.from_tensor(plan.order), plan.counts)
        assert augmenter._quantiles is not None
        augmenter._quantiles = mode.from_tensor(augmenter._quantiles)
        result = augmenter.train(images, rows, plan=plan if planned else None)
        assert result.shape == images.shape and result.device.type == "cuda"
        assert result.dtype == (torch.bfloat16 if precision == "bf16-mixed" else torch.float32)


@pytest.mark.parametrize(
    ("device", "precision", "channels_last"),
    [("cpu", "bf16-mixed", True), ("cuda", "16-mixed", True), ("cuda", "32-true", True), ("cuda", "bf16-mixed", False)],
)
def test_images_stay_float32_without_bf16_on_a_gpu(device: str, precision: str, channels_last: bool) -> None:
    images, rows, augmenter = crops(), draws(6), augment(**FULL)
    before = augmenter.train(images, rows, augmenter.plan(rows))
    augmenter.match_step(torch.device(device), precision, channels_last)
    after = augmenter.train(images, rows, augmenter.plan(rows))
    assert torch.equal(before, after) and before.dtype == after.dtype and before.stride() == after.stride()


def test_bf16_in_channels_last_is_what_autocast_makes_of_the_images() -> None:
    """The same logits, and the same gradients, bit for bit; a validation's images stay what they are."""
    images, rows = crops()[:, :, :64, :64].repeat(2, 1, 1, 1), draws(12)
    model = repghostnet(0.5, 10).to(memory_format=torch.channels_last)
    augmenter, gpu = augment(**FULL), torch.device("cuda")
    results = []
    for match in (False, True):
        if match:
            augmenter.match_step(gpu, "bf16-mixed", channels_last=True)
        batch = augmenter.train(images, rows, augmenter.plan(rows))
        assert batch.dtype == (torch.bfloat16 if match else torch.float32)
        assert batch.is_contiguous(memory_format=torch.channels_last) == match
        torch.manual_seed(0)  # of dropout
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(batch)
        model.zero_grad()
        logits.float().square().mean().backward()
        results.append([logits.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
    assert all(map(torch.equal, *results)) and len(results[0]) > 100
    assert augmenter.evaluate(images).dtype == torch.float32


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_data_module_plans_for_a_gpu(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    augmenter = augment(flip=0.5, rand_augment=RAND_AUGMENT)
    values = dict.fromkeys(ImageNetTraining.__dataclass_fields__) | {"root": ".", "augment": augmenter}
    data = ImageNetTraining(**values | {"batch_size": 6, "seed": 0, "mix": Mix(0, 0, 1, 0.5)})  # type: ignore[arg-type]
    strategy = SimpleNamespace(root_device=torch.device(device))
    state = {"training": True, "accumulate_grad_batches": 1, "current_epoch": 0, "global_rank": 0}
    data.trainer = SimpleNamespace(strategy=strategy, **state)  # type: ignore[assignment]
    images, rows = crops(), draws(6)
    expected = augmenter.train(images, rows)
    plans: list[RowPlan | None] = []

    def spy(images: Tensor, uniforms: Tensor, plan: RowPlan | None) -> Tensor:
        plans.append(plan)
        return Augment.train(augmenter, images, uniforms, plan)

    monkeypatch.setattr(augmenter, "train", spy)
    batch = data.on_before_batch_transfer(Batch(images, torch.zeros(6), torch.arange(6), rows), 0)
    assert torch.equal(data.on_after_batch_transfer(batch, 0).images, expected)
    assert [plan is not None for plan in plans] == [device == "cuda"]


@pytest.mark.gpu
def test_on_a_gpu_without_synchronisation() -> None:
    """Jitter has the CPU's bits; resampling may round otherwise, as a GPU fuses products and sums."""
    images, rows = crops(), draws(6)
    for colour, same in (({"jitter": JITTER_04}, 1.0), ({"rand_augment": RAND_AUGMENT}, 0.99)):
        augmenter = augment(flip=0.5, **colour)
        arguments = images.cuda(), rows.cuda(), None, augmenter.plan(rows.pin_memory())
        torch.cuda.set_sync_debug_mode("error")
        try:
            result = augmenter.train(*arguments)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert (result.cpu() == augmenter.train(images, rows)).double().mean() >= same


def test_built_from_a_configuration() -> None:
    node = OmegaConf.create({"_target_": "data.augment.Augment", "mean": MEAN, "std": STD} | FULL)
    images, rows = crops(), draws(6)
    result = hydra.utils.instantiate(node).train(images, rows)
    assert torch.equal(result, augment(**FULL).train(images, rows))
    with pytest.raises(Exception, match="hue"):
        hydra.utils.instantiate(OmegaConf.merge(node, {"jitter": {"hue": 0.1}}))


def test_compiles_to_one_graph() -> None:
    images, rows, augmenter = crops()[:, :, :64, :64], draws(6), augment(flip=0.5, jitter=JITTER_04)
    compiled = torch.compile(augmenter.train, fullgraph=True, backend="eager")
    assert torch.equal(compiled(images, rows), augmenter.train(images, rows))


def test_an_erasing_that_erases_nothing_or_everything() -> None:
    images, rows = crops(), draws(6)
    none, all_of_them = (augment(erase=ERASING | {"probability": p}) for p in (0.0, 1.0))
    assert torch.equal(none.train(images, rows, plan=none.plan(rows)), augment().evaluate(images))
    erased = all_of_them.train(images, rows, plan=all_of_them.plan(rows)) != augment().evaluate(images)
    assert erased.flatten(1).any(dim=1).all()


@pytest.mark.parametrize(
    "change",
    [
        {"flip": 0.9},
        {"jitter": None},
        {"rand_augment": None},
        {"erase": None},
        {"mean": [0.5, 0.456, 0.406]},
        {"std": [0.229, 0.224, 0.3]},
        {"erase": ERASING | {"probability": 0.9}},
        {"erase": ERASING | {"area": [0.2, 0.3333]}},
        {"erase": ERASING | {"area": [0.02, 0.1]}},
        {"erase": ERASING | {"aspect": [1.0, 3.3333]}},
        {"erase": ERASING | {"aspect": [0.3, 1.0]}},
    ],
    ids=str,
)
def test_every_value_changes_the_result(change: dict[str, Any]) -> None:
    images, rows = crops().repeat(4, 1, 1, 1)[:, :, :32, :32], draws(24)
    before = augment(**FULL).train(images, rows)
    assert not torch.equal(before, augment(**FULL | change).train(images, rows))


@pytest.mark.parametrize("name", ["jitter", "rand_augment", "erase"])
def test_unknown_and_missing_keys_are_errors(name: str) -> None:
    values = FULL[name]
    assert isinstance(values, dict)
    with pytest.raises(UserError, match=f"{name}: .*hue"):
        augment(**{name: values | {"hue": 0.1}})
    for key in values:
        with pytest.raises(UserError, match=f"{name}: .*{key}"):
            augment(**{name: {k: v for k, v in values.items() if k != key}})
    with pytest.raises(TypeError, match="hue"):
        augment(hue=0.1)


def test_batches_of_one_and_of_other_sizes() -> None:
    """Pieces of the CPU path do not show: a sample's result does not depend on its batch."""
    images, rows, augmenter = crops(), draws(6), augment(flip=0.5, jitter=JITTER_04)
    together = augmenter.train(images, rows)
    alone = [augmenter.train(images[i : i + 1], rows[i : i + 1]) for i in range(6)]
    assert torch.equal(together, torch.cat(alone))
