"""Batches for a detector: boxes follow their pixels, and nothing depends on ranks, workers or where an epoch begins."""

import json
import shutil
from collections.abc import Iterator
from multiprocessing import active_children
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from coco_files import COLORS, decoded, make_coco
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from data.box_augment import BoxAugment, Geometry, with_masks
from data.coco import CocoIndex, load_coco
from data.detection import DetectionBatches, DetectionData, DetectionTraining
from data.reader import BadImage
from data.sampling import DETECTION_STREAM, RankSampler, uniforms
from data.write_shards.coco import list_coco
from data.write_shards.write import write_shards
from repghost.dataset import DetectionBatch
from repghost.errors import UserError

EVERYTHING = BoxAugment(flip=0.5, scale=[0.5, 2.0], crop=[0.5, 1.0], min_visible=0.25)
NOTHING = BoxAugment(flip=0.0, scale=[1.0, 1.0], crop=[1.0, 1.0], min_visible=0.25)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """20 training images, 4 of them without objects, and 7 for validation."""
    folder = tmp_path_factory.mktemp("coco")
    write_shards(list_coco(make_coco(folder / "src")), folder / "out", images_per_shard=8, workers=1, quiet=True)
    return folder / "out"


@pytest.fixture(scope="module")
def index(root: Path) -> CocoIndex:
    return load_coco(root, ["train"], root)["train"]


# -- boxes follow their pixels -----------------------------------------------------------------------------------------

sides = st.integers(9, 61)
shares = st.floats(0, 1, exclude_max=True, width=32)


@st.composite
def objects(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """Three boxes with whole coordinates, float32 [3, 4], and their masks, uint8 [3, H, W]."""
    height, width = draw(sides), draw(sides)
    boxes, masks = [], torch.zeros(3, height, width, dtype=torch.uint8)
    for number in range(3):
        w, h = draw(st.integers(4, width)), draw(st.integers(4, height))
        left, top = draw(st.integers(0, width - w)), draw(st.integers(0, height - h))
        boxes.append([left, top, left + w, top + h])
        masks[number, top : top + h, left : left + w] = 1
    return torch.tensor(boxes, dtype=torch.float32), masks


@st.composite
def augments(draw: st.DrawFn) -> BoxAugment:
    scale = sorted(draw(st.tuples(st.floats(0.3, 3.0), st.floats(0.3, 3.0))))
    crop = sorted(draw(st.tuples(st.floats(0.2, 1.0), st.floats(0.2, 1.0))))
    plain = draw(st.sampled_from(["scale", "crop", "neither", "both"]))
    return BoxAugment(
        flip=draw(st.sampled_from([0.0, 0.5, 1.0])),
        scale=scale if plain in ("scale", "both") else [1.0, 1.0],
        crop=crop if plain in ("crop", "both") else [1.0, 1.0],
        min_visible=0.0,
    )


def drawn(box: Tensor, height: int, width: int, by: float = 0.0) -> Tensor:
    """bool [H, W]: the pixels whose centre is in a box that is larger by so many pixels on each side."""
    y, x = torch.arange(height)[:, None] + 0.5, torch.arange(width) + 0.5
    left, top, right, bottom = (box + torch.tensor([-by, -by, by, by])).tolist()
    return (x > left) & (x < right) & (y > top) & (y < bottom)


@settings(max_examples=300, deadline=None)
@given(objects(), augments(), st.lists(shares, min_size=8, max_size=8))
def test_boxes_follow_their_pixels(shown: tuple[Tensor, Tensor], augment: BoxAugment, draws: list[float]) -> None:
    """Each object is the only thing in a channel of the image, and so are its pixels known after the augmentation."""
    boxes, masks = shown
    height, width = masks.shape[1:]
    geometry = augment.geometry(np.array(draws, np.float32), height, width)
    image, moved = geometry.image(masks * 255), geometry.masks(masks)
    found, share = geometry.boxes(boxes)
    assert image.shape == moved.shape == (3, *geometry.window[2:])
    assert image.dtype == moved.dtype == torch.uint8 and ((share >= 0) & (share <= 1)).all()
    height, width = moved.shape[1:]
    limits = torch.tensor([width, height] * 2)
    assert ((found >= 0) & (found <= limits)).all()
    # Resizing blurs an edge over a pixel of the image or of the result, whichever is larger.
    blur = 0.01 + max(1, *(s / w for s, w in zip(geometry.size, geometry.window[2:], strict=True)))
    for box, mask, channel in zip(found, moved.bool(), image > 127, strict=True):
        assert not (mask & ~drawn(box, height, width, 1e-3)).any()
        assert not (drawn(box, height, width, -1e-3) & ~mask).any()
        assert not (channel & ~drawn(box, height, width, blur)).any()
        assert not (drawn(box, height, width, -blur) & ~channel).any()
    of_masks, left = with_masks(found, share, moved)
    assert (left == moved.flatten(1).any(dim=1)).all()
    assert (of_masks[share == 1] == found[share == 1]).all()
    assert ((of_masks - found)[left].abs() <= 1.001).all()


@settings(max_examples=100, deadline=None)
@given(objects(), st.lists(shares, min_size=8, max_size=8))
def test_the_share_that_is_left_is_that_of_the_pixels(shown: tuple[Tensor, Tensor], draws: list[float]) -> None:
    boxes, masks = shown
    geometry = BoxAugment(flip=0.5, scale=[1, 1], crop=[0.2, 1], min_visible=0).geometry(
        np.array(draws, np.float32), *masks.shape[1:]
    )
    _, share = geometry.boxes(boxes)
    torch.testing.assert_close(share, geometry.masks(masks).sum((1, 2)) / masks.sum((1, 2)), atol=1e-6, rtol=0)


def test_without_augmentation_all_stays_as_it_is(index: CocoIndex) -> None:
    geometry = NOTHING.geometry(np.full(64, 0.7, np.float32), 31, 50)
    image, boxes = torch.randint(256, (3, 31, 50), dtype=torch.uint8), torch.tensor([[1.5, 2.25, 40.125, 31.0]])
    assert (geometry.image(image) == image).all()
    found, share = geometry.boxes(boxes)
    assert (found == boxes).all() and share.tolist() == [1]


def test_a_flip_mirrors() -> None:
    geometry = Geometry((0, 0, 4, 5), (4, 5), (0, 0), flip=True)
    image = torch.arange(60, dtype=torch.uint8).reshape(3, 4, 5)
    assert (geometry.image(image) == image.flip(2)).all()
    assert geometry.boxes(torch.tensor([[0.5, 1, 2, 3]]))[0].tolist() == [[3, 1, 4.5, 3]]


def test_an_object_of_which_too_little_is_left_is_left_out() -> None:
    augment = BoxAugment(flip=0, scale=[1, 1], crop=[1, 1], min_visible=0.5)
    assert augment.visible(torch.tensor([0.0, 0.49, 0.5, 1.0])).tolist() == [2, 3]
    assert NOTHING.visible(torch.tensor([0.0, 0.2, 0.3])).tolist() == [2]
    hidden = BoxAugment(flip=0, scale=[1, 1], crop=[1, 1], min_visible=0)
    assert hidden.visible(torch.tensor([0.0, 1e-6])).tolist() == [1]


def test_draws_cover_their_ranges() -> None:
    """The corners of windows reach all sides, factors and shares their limits; half of the images are mirrored."""
    augment = BoxAugment(flip=0.5, scale=[0.5, 2.0], crop=[0.5, 1.0], min_visible=0)
    found = [augment.geometry(u, 40, 30) for u in uniforms(0, 0, 0, 2000, DETECTION_STREAM)]
    tops, _, heights, widths = np.array([g.window for g in found]).T
    assert heights.min() == 20 and heights.max() == 40 and widths.min() == 15 and widths.max() == 30
    assert tops.min() == 0 and (tops + heights).max() == 40
    factors = np.array([g.size[0] / g.window[2] for g in found])
    assert 0.5 <= factors.min() < 0.52 and 1.95 < factors.max() <= 2
    assert 0.45 < np.mean(factors < 1) < 0.55 and 0.45 < np.mean([g.flip for g in found]) < 0.55
    assert min(g.corner[0] for g in found) < 0 < max(g.corner[0] for g in found)


# -- batches -----------------------------------------------------------------------------------------------------------


def data_module(root: Path, **options: Any) -> DetectionTraining:
    values: dict[str, Any] = {
        "root": root, "cache": root, "workers": 0, "prefetch": 2, "eval_batch_size": 2, "masks": True,
        "skip_budget": 0.0, "batch_size": 4, "seed": 5, "empty_images": True, "augment": EVERYTHING,
    }  # fmt: skip
    data = DetectionTraining(**{**values, **options})
    data.setup("fit")
    return data


def training_batches(data: Any) -> list[DetectionBatch]:
    """Those that are left of the epoch; the workers end with it, as Lightning has them do."""
    found = list(data.train_dataloader())
    data.teardown("fit")
    return found


def in_trainer(data: Any, rank: int = 0, ranks: int = 1, accumulate: int = 1, steps: int = 0) -> Any:
    """The data module as a trainer has it that has done so many steps."""
    data.trainer = SimpleNamespace(
        world_size=ranks, num_nodes=1, global_rank=rank, accumulate_grad_batches=accumulate, global_step=steps,
        training=True, strategy=SimpleNamespace(root_device=torch.device("cpu")),
    )  # fmt: skip
    return data


def rows_of(batches: list[DetectionBatch]) -> dict[int, tuple[Any, ...]]:
    """By position, everything of a row, with the shape and type of each tensor."""

    def content(tensor: Tensor) -> tuple[tuple[int, ...], torch.dtype, bytes]:
        return tuple(tensor.shape), tensor.dtype, tensor.numpy().tobytes()

    return {
        position: (content(image), {name: content(tensor) for name, tensor in target.items()})
        for batch in batches
        for image, target, position in zip(batch.images, batch.targets, batch.positions.tolist(), strict=True)
    }


@pytest.fixture(scope="module")
def alone(root: Path) -> dict[int, tuple[Any, ...]]:
    """The first epoch of one process."""
    return rows_of(training_batches(in_trainer(data_module(root))))


@pytest.mark.parametrize(("ranks", "accumulate", "workers"), [(2, 1, 0), (4, 1, 0), (1, 2, 0), (1, 1, 2), (2, 2, 1)])
def test_rows_are_the_same_for_any_ranks_and_workers(
    ranks: int, accumulate: int, workers: int, root: Path, alone: dict[int, tuple[Any, ...]]
) -> None:
    found: dict[int, tuple[Any, ...]] = {}
    for rank in range(ranks):
        data = in_trainer(data_module(root, workers=workers), rank, ranks, accumulate)
        found |= rows_of(training_batches(data))
    assert found == alone and sorted(found) == list(range(20))


def test_workers_end_with_the_stage(root: Path) -> None:
    """And are not left to Python's garbage collector, under which torch waits 10 s for each of them."""
    data, before = in_trainer(data_module(root, workers=1)), set(active_children())
    loader = data.train_dataloader()
    assert len(list(loader)) == 5 and len(set(active_children()) - before) == 1
    held = vars(loader).copy()  # as Lightning keeps them after an error in a process
    data.teardown("fit")
    assert set(active_children()) <= before and held
    assert len(list(loader)) == 5, "it starts new ones"
    loader.close()


def test_epochs_and_seeds_differ(root: Path, alone: dict[int, tuple[Any, ...]]) -> None:
    assert rows_of(training_batches(in_trainer(data_module(root), steps=5))) != alone
    assert rows_of(training_batches(in_trainer(data_module(root, seed=6)))) != alone


@pytest.mark.parametrize("workers", [0, 1])
def test_an_epoch_that_is_resumed_goes_on_with_the_same_batches(workers: int, root: Path) -> None:
    data = data_module(root, workers=workers)
    whole = training_batches(in_trainer(data, steps=5))
    rest = training_batches(in_trainer(data_module(root, workers=workers), steps=7))
    assert len(whole) == 5 and rows_of(rest) == rows_of(whole[2:])
    data.load_state_dict(data_module(root).state_dict())
    with pytest.raises(UserError, match="the val images are not those that this run began with"):
        data.load_state_dict({**data.state_dict(), "val": "other"})


def test_batches_are_what_a_detector_takes(root: Path, index: CocoIndex) -> None:
    data = in_trainer(data_module(root))
    boxes = 0
    for batch in data.train_dataloader():
        for image, target in zip(batch.images, batch.targets, strict=True):
            count, (_, height, width) = len(target["boxes"]), image.shape
            assert image.dtype == torch.uint8 and target["boxes"].shape == (count, 4)
            assert target["boxes"].dtype == torch.float32 and target["labels"].dtype == torch.int64
            assert target["masks"].shape == (count, height, width) and target["masks"].dtype == torch.uint8
            assert ((target["labels"] >= 1) & (target["labels"] <= 3)).all()
            assert (target["boxes"][:, 2:] > target["boxes"][:, :2]).all() and target["masks"].flatten(1).any(1).all()
            boxes += count
        moved = data.on_after_batch_transfer(batch, 0)
        assert moved.images[0].dtype == torch.float32 and (moved.images[0] * 255 == batch.images[0]).all()
    assert 0 < boxes <= index.learned.sum()
    assert data.counts == (20, 7) and data.num_classes == 3 and data.steps_per_epoch == 5
    assert data.seconds_waited > 0


def test_what_is_stored_is_what_training_sees(root: Path, index: CocoIndex) -> None:
    """Without augmentation: COCO's boxes and masks, without crowd regions, on pixels of the category's colour."""
    annotations = index.annotations()
    by_image: dict[int, list[dict[str, Any]]] = {i["id"]: [] for i in annotations["images"]}
    for annotation in annotations["annotations"]:
        if not annotation["iscrowd"]:
            by_image[annotation["image_id"]].append(annotation)
    assert sum(a["iscrowd"] for a in annotations["annotations"]) > 0
    batches = DetectionBatches(index, np.arange(20), RankSampler(20, 1), NOTHING, seed=0, masks=True)
    for row, image_id in enumerate(index.image_ids.tolist()):
        image, target = batches.load(row, np.zeros(64, np.float32))
        expected = by_image[image_id]
        assert target["labels"].tolist() == [1 + [3, 7, 90].index(a["category_id"]) for a in expected]
        assert target["boxes"].tolist() == [[x, y, x + w, y + h] for x, y, w, h in (a["bbox"] for a in expected)]
        for mask, a in zip(target["masks"], expected, strict=True):
            assert (mask.numpy().astype(bool) == decoded(a, *image.shape[1:])).all()
        for a, mask in list(zip(expected, target["masks"], strict=True))[-1:]:  # others may be hidden by it
            color = torch.tensor(COLORS[a["category_id"]], dtype=torch.float32)
            assert (image[:, mask.bool()].float().mean(1) - color).abs().max() < 60


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_validation_shows_every_image_once(ranks: int, root: Path) -> None:
    rows: list[int] = []
    for rank in range(ranks):
        data = in_trainer(data_module(root), rank, ranks)
        index = data.index("val")
        batches = list(data.val_dataloader())
        assert len(batches) == len(data.val_dataloader()) == -(-7 // (2 * ranks))
        for batch in batches:
            for image, target, row in zip(batch.images, batch.targets, batch.positions.tolist(), strict=True):
                if row == -1:
                    assert not image.any() and len(target["boxes"]) == 0
                    continue
                rows.append(row)
                assert (image == data.stored_images("val", [row])[0]).all()
                assert image.shape[1:] == (index.samples[row]["height"], index.samples[row]["width"])
                mine = np.arange(*index.bounds[row : row + 2])
                assert target["boxes"].tolist() == index.boxes[mine][index.learned[mine]].tolist()
    assert sorted(rows) == list(range(7))


def test_evaluation_needs_no_training_images(root: Path, tmp_path: Path) -> None:
    for path in [*root.glob("val*"), root / "manifest.json"]:
        shutil.copy(path, tmp_path)
    data = DetectionData(root=tmp_path, cache=tmp_path, workers=0, prefetch=2, eval_batch_size=2)
    data.setup("validate")
    assert sum(int((batch.positions >= 0).sum()) for batch in in_trainer(data).val_dataloader()) == 7


def test_images_without_objects_are_kept_or_left_out(root: Path) -> None:
    data = in_trainer(data_module(root, empty_images=False, augment=NOTHING))
    assert data.counts == (16, 7) and data.steps_per_epoch == 4
    batches = training_batches(data)
    assert len(batches) == 4 and all(len(t["boxes"]) for batch in batches for t in batch.targets)
    with pytest.raises(UserError, match="batch_size=17 is larger than the 16 training images"):
        _ = data_module(root, empty_images=False, batch_size=17).steps_per_epoch


def test_masks_are_needed_where_they_are_wanted(tmp_path: Path) -> None:
    source = make_coco(tmp_path / "src", train=4, val=2)
    path = source / "annotations/instances_train2017.json"
    content = json.loads(path.read_text())
    del content["annotations"][0]["segmentation"]
    path.write_text(json.dumps(content))
    write_shards(list_coco(source), tmp_path / "out", workers=1, quiet=True)
    with pytest.raises(UserError, match=r"1 of the training objects have no segmentation \(image 10 has the first\)"):
        data_module(tmp_path / "out")
    data = in_trainer(data_module(tmp_path / "out", masks=False))
    assert all(target.keys() == {"boxes", "labels"} for batch in data.train_dataloader() for target in batch.targets)


@pytest.fixture
def damaged(root: Path, tmp_path: Path) -> Iterator[Path]:
    """The data set with a byte of one training and one validation image changed."""
    shutil.copytree(root, tmp_path / "damaged")
    for split in ("train", "val"):
        sample = load_coco(root, [split], root)[split].samples[0]
        with open(tmp_path / "damaged" / f"{split}-000000.tar", "r+b") as shard:
            shard.seek(sample["offset"] + sample["size"] // 2)
            shard.write(bytes([255 - shard.read(1)[0]]))
    yield tmp_path / "damaged"


def test_a_damaged_image_is_masked_within_the_budget(damaged: Path, caplog: pytest.LogCaptureFixture) -> None:
    batches = training_batches(in_trainer(data_module(damaged, skip_budget=0.05)))
    positions = [p for batch in batches for p in batch.positions.tolist()]
    assert positions.count(-1) == 1 and len(positions) == 20 and "skipped: train-000000.tar" in caplog.text
    with pytest.raises(BadImage, match=r"train-000000.tar: .*skip_budget allows 0"):
        training_batches(in_trainer(data_module(damaged)))
    with pytest.raises(BadImage, match=r"val-000000.tar: "):
        list(in_trainer(data_module(damaged, skip_budget=0.05)).val_dataloader())
