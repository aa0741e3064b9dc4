"""Training images of another size than those of the validation, and of sizes that grow."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from runs import PowerCut, cut_after
from test_sampling import EVERYWHERE

from benchmarks.kill import differences
from data.crops import RandomCrops
from data.dali_loader import DaliLoader, dali_installed
from data.image_sizes import ImageSizes
from data.index import load_index
from data.reader import LoaderOptions
from data.sampling import RankSampler
from data.torch_loader import TorchLoader

Program = Callable[..., int]


def test_sizes_by_epoch() -> None:
    assert [ImageSizes(224)(epoch) for epoch in range(3)] == [224, 224, 224]
    sizes = ImageSizes(224, 128, epochs=10, full_epochs=2)
    assert [sizes(epoch) for epoch in range(10)] == [128, 128, 128, 160, 160, 160, 192, 192, 224, 224]
    assert sizes.all() == [128, 160, 192, 224]


@given(st.integers(1, 300), st.integers(0, 300), st.integers(1, 10), st.integers(0, 300))
@EVERYWHERE
def test_sizes_grow_in_steps_and_end_full(epochs: int, at_full_size: int, start: int, more: int) -> None:
    at_full_size, full = min(epochs, at_full_size), 32 * start + more
    sizes = [ImageSizes(full, 32 * start, epochs, at_full_size)(epoch) for epoch in range(epochs)]
    assert sizes == sorted(sizes) and all(size % 32 == 0 or size == full for size in sizes)
    assert sizes[epochs - at_full_size :] == [full] * at_full_size
    assert sizes[0] == (32 * start if at_full_size < epochs else full)


@pytest.mark.parametrize(
    "loader",
    [TorchLoader, pytest.param(DaliLoader, marks=pytest.mark.skipif(not dali_installed(), reason="needs DALI"))],
)
def test_both_loaders_follow(loader: Callable, shards: Path) -> None:
    index = load_index(shards, "train", shards)
    at = [0, 0]
    crops = RandomCrops(
        index, RankSampler(len(index), 9), ImageSizes(96, 32, 4, 1), seed=0, scale=(0.3, 1), ratio=(3 / 4, 4 / 3)
    )
    options = LoaderOptions(workers=1, prefetch=2, start=lambda: (at[0], at[1]))
    batches, found = loader(crops, options), []
    for epoch in range(4):
        at[0] = epoch
        for number, batch in enumerate(batches):
            expected = next(
                iter(TorchLoader(crops, LoaderOptions(workers=0, prefetch=1, start=lambda e=epoch, n=number: (e, n))))
            )  # type: ignore[misc]
            assert torch.equal(batch.images, expected.images)
        found.append(batch.images.shape[2])
    assert found == [32, 32, 64, 96]


def test_crops_that_repeat(shards: Path) -> None:
    index = load_index(shards, "train", shards)
    crops = RandomCrops(index, RankSampler(len(index), 9), ImageSizes(32), 0, (0.3, 1), (3 / 4, 4 / 3), cycle=3)
    first, second = ([crops(epoch + shift, 1).windows.tolist() for epoch in range(3)] for shift in (0, 3))
    assert first == second and first[0] != first[1] != first[2]


def test_a_run_whose_images_grow_resumes_to_the_bit(train_tiny: Program) -> None:
    growing = ("train_image_size=64", "recipe.start_image_size=32", "recipe.full_size_epochs=1", "epochs=3")
    growing = (*growing, "recipe.mix.mixup=0.2", "recipe.mix.cutmix=1", "checkpoint.minutes=1e-9")
    assert train_tiny(*growing, "name=whole") == 0
    for place in ((0, 3), (1, 4), (2, 1)):
        with pytest.MonkeyPatch.context() as patched, pytest.raises(PowerCut):
            cut_after(patched, *place)
            train_tiny(*growing, "name=cut")
    assert train_tiny(*growing, "name=cut") == 0
    assert differences(Path("outputs/whole"), Path("outputs/cut")) == []
