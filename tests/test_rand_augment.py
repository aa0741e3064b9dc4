"""RandAugment against timm's on PIL photographs, the distribution of its draws, its two paths."""

from collections.abc import Callable
from functools import lru_cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from skimage import data as photographs
from sklearn.datasets import load_sample_images
from timm.data import auto_augment as timm_ops
from torch import Tensor
from torch._subclasses import FakeTensorMode

from data.pil_ops import affine
from data.rand_augment import (
    AUTO_CONTRAST,
    FAMILIES,
    MAX_OPERATIONS,
    NONE,
    OPERATIONS,
    RandAugment,
    matrices,
)
from data.row_plan import RowPlan, enough, every_row
from data.sampling import NUM_UNIFORMS, RAND_AUGMENT, uniforms
from repghost.errors import UserError

FILL = (124, 116, 104)
POLICY = {"operations": 2, "magnitude": 9, "magnitude_std": 0.5, "probability": 0.5, "fill": FILL}
GEOMETRIC = ("Rotate", "ShearX", "ShearY", "TranslateXRel", "TranslateYRel")
FILTERS = {False: Image.Resampling.BILINEAR, True: Image.Resampling.BICUBIC}
UNEVEN = 8.37
LEVELS = (9.0, UNEVEN, 10.0, 4.9)  # from 2.5 on: below, Posterize keeps no bit, which PIL refuses


@lru_cache
def crops() -> Tensor:
    """uint8 [6, 3, 120, 144]: parts of photographs, one of them with a narrow range of values."""
    china, flower = load_sample_images().images
    images = [
        photographs.astronaut(),
        photographs.coffee(),
        photographs.chelsea(),
        photographs.rocket(),
        china,
    ]
    images.append(flower // 3 + 40)
    pixels = np.stack([image[60:180, 100:244] for image in images])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()


def timm_operation(name: str, image: Tensor, level: float, negative: bool, bicubic: bool) -> Tensor:
    """What timm makes of one image, uint8 [3, H, W]; the sign and interpolation it would draw are given."""
    level_to_argument = timm_ops.LEVEL_TO_ARG[name]
    arguments = level_to_argument(level, {}) if level_to_argument else ()
    if name in GEOMETRIC:
        arguments = (abs(arguments[0]) * (-1 if negative else 1),)
    options = {"fillcolor": FILL, "resample": FILTERS[bicubic]}
    picture = Image.fromarray(image.permute(1, 2, 0).numpy())
    return torch.from_numpy(np.array(timm_ops.NAME_TO_OP[name](picture, *arguments, **options))).permute(2, 0, 1)


def forced(images: Tensor, name: str, level: float, negative: bool, bicubic: bool) -> Tensor:
    count = len(images)
    return RandAugment(**POLICY).apply(
        images,
        torch.full((count,), OPERATIONS.index(name)),
        torch.full((count,), level, dtype=torch.float64),
        torch.full((count,), negative),
        torch.full((count,), bicubic),
        None,
    )


def difference(name: str, level: float, negative: bool, bicubic: bool) -> Tensor:
    images = crops()
    ours = forced(images, name, level, negative, bicubic)
    theirs = torch.stack([timm_operation(name, image, level, negative, bicubic) for image in images])
    assert not torch.equal(theirs, images) or level != 9.0, "the operation must do something"
    return (ours.int() - theirs.int()).abs().float()


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("name", [name for name in OPERATIONS if name not in GEOMETRIC])
def test_tables_and_blends_equal_timm(name: str, level: float) -> None:
    assert difference(name, level, negative=False, bicubic=False).max() == 0


@pytest.mark.parametrize("level", [9.0, UNEVEN])
@pytest.mark.parametrize("negative", [False, True])
@pytest.mark.parametrize("bicubic", [False, True])
@pytest.mark.parametrize("name", GEOMETRIC)
def test_affine_maps_match_timm(name: str, bicubic: bool, negative: bool, level: float) -> None:
    error = difference(name, level, negative, bicubic)
    assert (error <= 1).float().mean() >= 0.9999
    # float32 against PIL's double shows where an interpolated value is an integer: rare, unless the shares of
    # the taps are round numbers, as those of a translation by 0.405 of 120 pixels.
    assert (error > 0).float().mean() < (0.0001 if level == UNEVEN else 0.05)


def test_degenerate_histograms_equal_pil() -> None:
    """One value, two values, and a channel whose values all lie in few pixels."""
    images = torch.full((3, 3, 40, 40), 77, dtype=torch.uint8)
    images[1, :, :20] = 200
    images[2, 0, 0, :30] = torch.arange(30, dtype=torch.uint8)
    for name in ("AutoContrast", "Equalize"):
        ours = forced(images, name, 9.0, False, False)
        theirs = [timm_operation(name, image, 9.0, False, False) for image in images]
        assert torch.equal(ours, torch.stack(theirs)), name


def test_mean_of_a_large_image_is_exact() -> None:
    images = torch.full((1, 3, 500, 500), 250, dtype=torch.uint8)
    images[..., 250:, :] = 251  # sum of luma beyond 2^24, mean exactly at a half
    ours = forced(images, "Contrast", 1.0, False, False)
    assert torch.equal(ours[0], timm_operation("Contrast", images[0], 1.0, False, False))


@pytest.mark.parametrize("channels_last", [False, True])
def test_both_paths_give_the_same_bits(channels_last: bool) -> None:
    images = crops()[:4].repeat(8, 1, 1, 1)[:, :, :56, :72]
    if channels_last:
        images = images.to(memory_format=torch.channels_last)
    operation = torch.arange(32) % (NONE + 1)
    level = torch.linspace(6, 10, 32, dtype=torch.float64)
    negative, bicubic = torch.arange(32) % 7 < 3, torch.arange(32) % 5 < 2
    rest, policy = (operation, level, negative, bicubic), RandAugment(**POLICY)
    grouped = policy.apply(images, *rest, None)
    assert torch.equal(grouped[operation == NONE], images[operation == NONE])
    assert torch.equal(grouped, policy.apply(images, *rest, every_row(len(FAMILIES), 32, images.device).rows()))
    needed = [torch.isin(operation, torch.tensor(family)).nonzero().flatten().flip(0) for family in FAMILIES]
    assert torch.equal(grouped, policy.apply(images, *rest, needed))


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 2**20),
    st.integers(1, 40),
    st.integers(0, MAX_OPERATIONS),
    st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    st.sampled_from([0.5, 4.0]),
)
def test_planned_rows_give_the_same_bits(
    seed: int, count: int, operations: int, probability: float, deviation: float
) -> None:
    values = {"operations": operations, "probability": probability, "magnitude_std": deviation}
    policy = RandAugment(**POLICY | values)
    images = crops().repeat(7, 1, 1, 1)[:count, :, 20:44, 30:60]
    draws, before = torch.from_numpy(uniforms(seed, 0, 0, count)), images.clone()
    expected = policy(images, draws, None)
    assert torch.equal(expected, policy(images, draws, policy.plan(draws).rows()))
    assert torch.equal(images, before), "the caller's images are left alone"


def test_a_plan_names_all_rows_that_draw_an_operation_and_few_others() -> None:
    policy, shapes = RandAugment(**POLICY), set()
    for epoch in range(50):
        draws = torch.from_numpy(uniforms(4, epoch, 0, 256))
        plan = policy.plan(draws)
        shapes.add(plan.counts)
        for step in range(2):
            operation = policy.draw(draws, step)[0]
            for family, rows in zip(FAMILIES, plan.rows()[step * len(FAMILIES) :], strict=False):
                needed = torch.isin(operation, torch.tensor(family)).nonzero().flatten()
                assert set(needed.tolist()) == set(rows[: len(needed)].tolist()) and len(rows.unique()) == len(rows)
    assert len(shapes) == 1, "one shape, whatever is drawn"
    assert sum(shapes.pop()) < 0.3 * plan.order.numel(), "a quarter of the rows, on average"


def test_lists_are_long_enough_but_for_one_batch_in_a_billion() -> None:
    generator = np.random.default_rng(0)
    for rows, share in ((32, 1 / 30), (128, 1 / 6), (1024, 2 / 15)):
        assert generator.binomial(rows, share, 10**6).max() <= enough(rows, share) < rows
    # One row of 2: P(2 rows) = share^2.
    assert enough(2, 0.9e-9**0.5) == 1 and enough(2, 1.1e-9**0.5) == 2
    assert (enough(8, 0.0), enough(8, 1.0)) == (1, 8)


def test_more_rows_than_the_lists_hold() -> None:
    """All samples rotate: the lists have all rows, and the bits stay the same."""
    policy, images, draws = RandAugment(**POLICY), *overfull()
    plan = policy.plan(draws)
    assert plan.counts == (len(images),) * 2 * len(FAMILIES)
    assert torch.equal(policy(images, draws, plan.rows()), policy(images, draws, None))


def overfull() -> tuple[Tensor, Tensor]:
    """uint8 [60, 3, 32, 40] and draws by which all samples rotate, more than a list of the batch's size has."""
    images = crops().repeat(10, 1, 1, 1)[:, :, 20:52, 30:70]
    draws = torch.from_numpy(uniforms(3, 0, 0, len(images)))
    draws[:, RAND_AUGMENT.start], draws[:, RAND_AUGMENT.start + 1] = 3.5 / 15, 0.0
    return images, draws


def test_identity_matrix_is_the_identity_of_both_filters() -> None:
    images = crops()
    matrix = matrices(torch.full((6,), AUTO_CONTRAST), torch.ones(6).double(), torch.zeros(6).bool(), 120, 144)
    for bicubic in (False, True):
        assert torch.equal(affine(images, matrix, bicubic, FILL), images)


def test_no_host_synchronisation_with_a_plan() -> None:
    """Fake tensors of a GPU have shapes but no values: reading one, or a shape that depends on one, raises."""
    policy = RandAugment(**POLICY)
    plan = policy.plan(torch.from_numpy(uniforms(0, 0, 0, 64)))
    with FakeTensorMode() as mode:
        images = torch.empty(64, 3, 32, 48, dtype=torch.uint8, device="cuda")
        draws = torch.empty(64, NUM_UNIFORMS, device="cuda")
        order = mode.from_tensor(plan.order).to("cuda")
        augmented = policy(images, draws, RowPlan(order, plan.counts).rows())
        assert augmented.shape == images.shape and augmented.device.type == "cuda"


def test_compiles_to_one_graph_with_the_same_bits() -> None:
    """A second one, of larger shapes, for a batch with more rows than the lists hold."""
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., object]:
        graphs.append(graph)
        return graph.forward

    policy, (images, full) = RandAugment(**POLICY | {"operations": 1}), overfull()
    whole = torch.compile(lambda i, u, plan: policy(i, u, plan.rows()), fullgraph=True, dynamic=False, backend=backend)
    for seed in range(3):
        draws = torch.from_numpy(uniforms(seed, 0, 0, len(images)))
        assert torch.equal(whole(images, draws, policy.plan(draws)), policy(images, draws, None))
    assert len(graphs) == 1
    for draws in (full, full.roll(1, 0)):
        assert torch.equal(whole(images, draws, policy.plan(draws)), policy(images, draws, None))
    assert len(graphs) == 2


def test_distribution_of_the_draws() -> None:
    count = 60_000
    draws = torch.from_numpy(uniforms(1, 2, 0, count))
    for step in (0, 1):
        everything = RandAugment(**POLICY | {"probability": 1.0}).draw(draws, step)
        operation, level, negative, bicubic = everything
        shares = torch.bincount(operation, minlength=NONE + 1) / count
        assert len(shares) == NONE + 1 and shares[NONE] == 0
        assert torch.allclose(shares[:NONE], torch.tensor(1 / 15), atol=0.006)
        inside = level[level < 10]
        assert abs((level == 10).double().mean() - 0.02275) < 0.004, "the normal beyond two deviations is clipped"
        assert abs(level.median() - 9) < 0.02 and abs(inside.std() - 0.5) < 0.05
        assert abs((level < 8.5).double().mean() - 0.15866) < 0.008, "one deviation below the mean"
        assert abs(negative.double().mean() - 0.5) < 0.01 and abs(bicubic.double().mean() - 0.5) < 0.01
        applied = RandAugment(**POLICY).draw(draws, step)[0] != NONE
        assert abs(applied.double().mean() - 0.5) < 0.01
    first, second = (RandAugment(**POLICY).draw(draws, step)[0] for step in (0, 1))
    assert not torch.equal(first, second)
    assert ((first == second) & (first != NONE)).any(), "operations are drawn with replacement"


def test_extreme_draws_are_finite() -> None:
    draws = torch.stack([torch.zeros(NUM_UNIFORMS), torch.full((NUM_UNIFORMS,), 1 - 2.0**-24)])
    operation, level, *_ = RandAugment(**POLICY | {"probability": 1.0}).draw(draws, 1)
    assert operation.tolist() == [0, NONE - 1]
    assert level.tolist() == [pytest.approx(9 - 0.5 * 5.4, abs=0.1), 10.0]
    fixed = RandAugment(**POLICY | {"magnitude_std": 0.0}).draw(draws, 0)[1]
    assert fixed.tolist() == [9.0, 9.0]


@pytest.mark.parametrize(
    "change",
    [
        {"operations": 1},
        {"magnitude": 5},
        {"magnitude_std": 3.0},
        {"probability": 1.0},
        {"fill": (0, 255, 0)},
    ],
)
def test_every_value_changes_the_result(change: dict[str, object]) -> None:
    images = crops().repeat(8, 1, 1, 1)[:, :, :48, :48]
    draws = torch.from_numpy(uniforms(3, 0, 0, len(images)))
    before = RandAugment(**POLICY)(images, draws, None)
    assert not torch.equal(before, RandAugment(**POLICY | change)(images, draws, None))


def test_two_steps_read_their_own_columns() -> None:
    images = crops()
    draws = torch.from_numpy(uniforms(3, 0, 0, 6))
    draws[:, RAND_AUGMENT] = 0.999  # apply >= probability: nothing happens
    policy = RandAugment(**POLICY)
    assert torch.equal(policy(images, draws, None), images)
    for step, name in enumerate(("Invert", "Solarize")):
        first = RAND_AUGMENT.start + 5 * step
        draws[:, first] = (OPERATIONS.index(name) + 0.5) / 15
        draws[:, first + 1 : first + 3] = torch.tensor([0.49, 0.5])
    expected = forced(forced(images, "Invert", 9.0, False, False), "Solarize", 9.0, False, False)
    assert torch.equal(policy(images, draws, None), expected)


def test_more_operations_than_draws_is_an_error() -> None:
    with pytest.raises(UserError, match="operations is 3"):
        RandAugment(**POLICY | {"operations": 3})
