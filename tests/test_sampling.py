"""Who sees what: the four properties of pure-function sampling."""

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy import stats
from torchvision.transforms import RandomResizedCrop

from data.crops import RandomCrops, crop_windows, evaluation_sizes
from data.image_sizes import ImageSizes
from data.index import Index
from data.sampling import NUM_UNIFORMS, RankSampler, epoch_order, uniforms
from data.tars import SAMPLE

SCALE, RATIO = (0.08, 1.0), (3 / 4, 4 / 3)
# The same examples everywhere, however slow the machine is; nothing is kept in the working directory.
EVERYWHERE = settings(deadline=None, derandomize=True, database=None, suppress_health_check=[HealthCheck.too_slow])


def test_order_is_a_permutation_of_seed_and_epoch() -> None:
    orders = [epoch_order(seed, epoch, 1000) for seed in (0, 1) for epoch in (0, 1)]
    for order in orders:
        assert (np.sort(order) == np.arange(1000)).all()
    assert len({order.tobytes() for order in orders}) == 4
    assert (epoch_order(0, 1, 1000) == orders[1]).all()


def test_the_streams_do_not_change_between_versions() -> None:
    """Runs are resumed after an upgrade: these values are a promise."""
    assert epoch_order(3, 7, 10).tolist() == [5, 0, 6, 9, 8, 7, 4, 2, 3, 1]
    assert uniforms(3, 7, 5, 1)[0, :3].tolist() == pytest.approx(
        [0.22612768411636353, 0.1353049874305725, 0.23539435863494873], abs=0
    )


@given(st.integers(0, 2**31), st.integers(0, 500), st.integers(0, 10**7), st.integers(1, 40), st.data())
@settings(EVERYWHERE, max_examples=50)
def test_uniforms_of_an_index_do_not_depend_on_the_batch(
    seed: int, epoch: int, start: int, count: int, data: st.DataObject
) -> None:
    whole = uniforms(seed, epoch, start, count)
    assert whole.shape == (count, NUM_UNIFORMS) and whole.dtype == np.float32
    assert (whole >= 0).all() and (whole < 1).all()
    at = data.draw(st.integers(0, count - 1))
    assert (uniforms(seed, epoch, start + at, 1)[0] == whole[at]).all()


def test_uniforms_are_uniform_and_independent() -> None:
    values = uniforms(0, 0, 0, 20_000).astype(np.float64)
    for column in range(NUM_UNIFORMS):
        assert stats.kstest(values[:, column], "uniform").pvalue > 1e-5
    off_diagonal = np.corrcoef(values.T) - np.eye(NUM_UNIFORMS)
    assert np.abs(off_diagonal).max() < 0.04


@given(
    samples=st.integers(1, 400),
    batch_size=st.integers(1, 17),
    ranks=st.integers(1, 8),
    accumulate=st.integers(1, 3),
)
@settings(EVERYWHERE, max_examples=200)
def test_training_batches_are_whole_and_disjoint(samples: int, batch_size: int, ranks: int, accumulate: int) -> None:
    parts = [RankSampler(samples, batch_size, rank, ranks, accumulate) for rank in range(ranks)]
    positions = [
        p for part in parts for b in range(part.batches) for p in range(part.start(b), part.start(b) + batch_size)
    ]
    step = batch_size * ranks * accumulate
    assert sorted(positions) == list(range(samples // step * step))


@given(samples=st.integers(1, 400), batch_size=st.integers(1, 17), ranks=st.integers(1, 8))
@settings(EVERYWHERE, max_examples=200)
def test_validation_counts_each_image_once(samples: int, batch_size: int, ranks: int) -> None:
    parts = [RankSampler(samples, batch_size, rank, ranks, drop_last=False) for rank in range(ranks)]
    assert len({part.batches for part in parts}) == 1
    positions = [
        p for part in parts for b in range(part.batches) for p in range(part.start(b), part.start(b) + batch_size)
    ]
    assert sorted(p for p in positions if p < samples) == list(range(samples))


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_global_batches_do_not_depend_on_ranks(ranks: int, accumulate: int) -> None:
    samples, batch = 100, 16
    for step in range(samples // batch):
        seen: set[int] = set()
        for rank in range(ranks):
            part = RankSampler(samples, batch // ranks // accumulate, rank, ranks, accumulate)
            for b in range(step * accumulate, (step + 1) * accumulate):
                seen |= set(range(part.start(b), part.start(b) + part.batch_size))
        assert seen == set(range(step * batch, (step + 1) * batch))


@pytest.mark.parametrize(("ranks", "batch_size", "accumulate"), [(512, 128, 1), (64, 32, 4), (7, 100, 3)])
def test_imagenet_is_shared_out_evenly_completely_and_without_repetition(
    ranks: int, batch_size: int, accumulate: int
) -> None:
    """Every rank has the same number of batches; a step's samples are the next ones of the epoch's order."""
    for samples, training in ((1_281_167, True), (50_000, False)):
        samplers = [
            RankSampler(samples, batch_size, rank, ranks, accumulate if training else 1, drop_last=training)
            for rank in range(ranks)
        ]
        (batches,) = {sampler.batches for sampler in samplers}
        starts = np.array([[sampler.start(batch) for sampler in samplers] for batch in range(batches)])
        positions = (starts[..., None] + np.arange(batch_size)).reshape(-1)
        assert (positions == np.arange(len(positions))).all()
        left_out = samples - len(positions)
        if training:
            assert batches % accumulate == 0 and left_out == samples % (ranks * batch_size * accumulate)
            visited = epoch_order(0, 1, samples)[positions]
            assert len(np.unique(visited)) == len(visited)
        else:
            assert left_out <= 0, "positions beyond the last image are masked"


@pytest.mark.parametrize(("height", "width"), [(375, 500), (500, 375), (64, 64), (30, 400), (400, 30)])
def test_windows_follow_random_resized_crop(height: int, width: int) -> None:
    count = 3000
    mine = crop_windows(uniforms(0, 0, 0, count), np.full(count, height), np.full(count, width), SCALE, RATIO)
    assert (mine >= 0).all() and (mine[:, 2:] >= 1).all()
    assert (mine[:, 0] + mine[:, 2] <= height).all() and (mine[:, 1] + mine[:, 3] <= width).all()
    torch.manual_seed(0)
    image = Image.new("L", (width, height))
    theirs = np.array([RandomResizedCrop.get_params(image, list(SCALE), list(RATIO)) for _ in range(count)])
    for column in range(4):
        assert stats.ks_2samp(mine[:, column], theirs[:, column], method="asymp").pvalue > 1e-4


def test_windows_of_one_pixel() -> None:
    windows = crop_windows(uniforms(0, 0, 0, 100), np.full(100, 1), np.full(100, 500), SCALE, RATIO)
    assert (windows[:, 2] == 1).all() and (windows[:, 3] >= 1).all()


def test_half_of_the_interpolations_are_bicubic() -> None:
    index = Index("train", (), np.ones(10_000, SAMPLE), ())
    crops = RandomCrops(index, RankSampler(10_000, 10_000), ImageSizes(32), seed=0, scale=SCALE, ratio=RATIO)
    assert abs(crops(0, 0).bicubic.mean() - 0.5) < 0.02


def test_evaluation_sizes_floor_the_longer_side() -> None:
    sizes = evaluation_sizes(np.array([375, 500, 256]), np.array([500, 333, 256]), 256)
    assert sizes.tolist() == [[256, 341], [384, 256], [256, 256]]
