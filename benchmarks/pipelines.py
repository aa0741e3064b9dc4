"""The pipelines that loader.py compares.

Each is a function of a setting and a number of workers that yields batches on the setting's device. Those with
"recipe" in their names yield what a training step takes: augmented, normalized floats. On a GPU that is computed there,
by timm's prefetcher as in timm's training script. This project's batches are those of train.py (benchmarks/feeding.py),
with its defaults for the device, but for the loader and the workers.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from functools import partial
from itertools import chain, repeat
from typing import Any

import numpy as np
import torch
import torchvision
from timm.data import create_dataset, create_loader
from timm.data.loader import MultiEpochsDataLoader
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate
from torchvision.transforms import v2

from benchmarks.feeding import training_batches, training_config
from benchmarks.setting import COMPACT, EPOCH, IMAGE_SIZE, REGIONS, REPEATED, SHARDS, Setting, repeated
from data.reader import LoaderOptions
from data.torch_loader import TorchLoader
from repghost.dataset import Batch

PREFETCH = 2  # batches that a worker is ahead, in every pipeline
READ_AHEAD = 2**17  # bytes that Linux reads around what it is asked for


# -- the pipelines: (setting, workers) -> batches ----------------------------------------------------------------------

Pipeline = Callable[[Setting, int], Iterable[Any]]


def timm_recipe(setting: Setting, workers: int) -> Iterable[Any]:
    """timm's loader with the recipe's augmentation: normalized floats, normalized and erased on a GPU if there is one.

    From pinned memory, which timm's script leaves to an option: pageable memory would stop the copies.
    """
    recipe = setting.recipe
    if (files := setting.files) < setting.batch_size:
        raise SystemExit(f"a corpus of {files} images gives timm no batch of {setting.batch_size}: more --images")
    loader = create_loader(
        create_dataset("", root=str(setting.folder)),
        input_size=(3, IMAGE_SIZE, IMAGE_SIZE),
        batch_size=setting.batch_size,
        is_training=True,
        scale=tuple(recipe.scale),
        ratio=tuple(recipe.ratio),
        hflip=recipe.augment.flip,
        color_jitter=recipe.augment.jitter.brightness if recipe.augment.jitter else 0.0,
        auto_augment="rand-m9-mstd0.5" if recipe.augment.rand_augment else None,
        re_prob=recipe.augment.erase.probability,
        re_mode="pixel",
        interpolation="random",
        num_workers=workers,
        use_prefetcher=setting.on_gpu,
        pin_memory=setting.on_gpu,
        device=setting.device,
        use_multi_epochs_loader=True,
    )
    return chain.from_iterable(repeat(loader))


def torchvision_float(setting: Setting, workers: int) -> Iterable[Any]:
    """torchvision's reference recipe for classification: crop, flip, normalize, erase, no colour."""
    augment = setting.recipe.augment
    end = [v2.ToDtype(torch.float32, scale=True), v2.Normalize(list(augment.mean), list(augment.std))]
    return _torchvision(setting, workers, [*end, v2.RandomErasing(augment.erase.probability)])


def torchvision_uint8(setting: Setting, workers: int) -> Iterable[Any]:
    """Its crop and flip alone."""
    return _torchvision(setting, workers, [])


def _torchvision(setting: Setting, workers: int, end: list[torch.nn.Module]) -> Iterator[list[Tensor]]:
    crop = v2.RandomResizedCrop(IMAGE_SIZE, tuple(setting.recipe.scale), tuple(setting.recipe.ratio), antialias=True)
    transform = v2.Compose([crop, v2.RandomHorizontalFlip(setting.recipe.augment.flip), v2.PILToTensor(), *end])
    loader = MultiEpochsDataLoader(
        torchvision.datasets.ImageFolder(str(setting.folder), transform),
        setting.batch_size,
        shuffle=True,
        num_workers=workers,
        prefetch_factor=PREFETCH,
        drop_last=True,
        pin_memory=setting.on_gpu,
    )
    for images, labels in chain.from_iterable(repeat(loader)):
        yield [tensor.to(setting.device, non_blocking=True) for tensor in (images, labels)]


def ours(
    setting: Setting, workers: int, data: str = SHARDS, loader: str = "torch", augmented: bool = False
) -> Iterator[Batch]:
    """This project's loaders as train.py has them; not augmented: uint8 batches."""
    shards = repeated(setting.folder.parent / data, REPEATED)
    overrides = [f"data.root={shards}", f"data.cache={shards.parent}", f"loader={loader}", f"data.workers={workers}"]
    overrides += [f"width={setting.width}", f"batch_size={setting.batch_size}", "trainer.threads=1"]
    return training_batches(training_config(setting.device, *overrides), augmented)


def cold(setting: Setting, workers: int, regions: bool = False) -> Iterator[Any]:
    """The torch loader's uint8 batches from shards that the page cache does not hold."""
    index = setting.regions if regions else setting.original
    assert index is not None
    crops = setting.crops(index)
    with ExitStack() as stack:
        files = [stack.enter_context(open(shard, "rb")).fileno() for shard in index.shards]
        for file in files:
            os.fsync(file)
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        for number, batch in enumerate(TorchLoader(crops, LoaderOptions(workers=workers, prefetch=PREFETCH))):
            yield batch
            for sample in index.samples[crops(0, number).samples]:  # the index repeats: they come again
                start, length = int(sample["offset"]) - READ_AHEAD, int(sample["size"]) + 2 * READ_AHEAD
                os.posix_fadvise(files[sample["shard"]], max(0, start), length, os.POSIX_FADV_DONTNEED)


def bare_decode(setting: Setting, workers: int) -> Iterable[Any]:
    """libjpeg-turbo on whole files, and nothing else."""
    return DataLoader(BareDecode(setting), batch_size=None, num_workers=workers, prefetch_factor=PREFETCH)


class BareDecode(Dataset):
    """Decodes batch after batch of files held in memory and drops the pixels."""

    def __init__(self, setting: Setting) -> None:
        self._encoded = [
            torch.from_numpy(np.fromfile(file, np.uint8)) for file in sorted(setting.folder.rglob("*.jpg"))
        ]
        self._batch_size = setting.batch_size

    def __len__(self) -> int:
        return EPOCH // self._batch_size

    def __getitem__(self, batch: int) -> int:
        for i in range(batch * self._batch_size, (batch + 1) * self._batch_size):
            torchvision.io.decode_jpeg(self._encoded[i % len(self._encoded)], torchvision.io.ImageReadMode.RGB)
        return batch


class HandOver(Dataset):
    """A batch of ready images, again and again: what stacking it and sending it to the consumer costs."""

    def __init__(self, batch_size: int) -> None:
        self._images = list(torch.zeros(batch_size, 3, IMAGE_SIZE, IMAGE_SIZE, dtype=torch.uint8))

    def __len__(self) -> int:
        return EPOCH // len(self._images)

    def __getitem__(self, batch: int) -> Tensor:
        return default_collate(self._images)


def hand_over(setting: Setting, workers: int) -> Iterable[Any]:
    return DataLoader(HandOver(setting.batch_size), batch_size=None, num_workers=workers, prefetch_factor=PREFETCH)


TIMM, LIMIT = "timm, recipe", "bare decode"
PIPELINES: dict[str, Pipeline] = {
    TIMM: timm_recipe,
    "torchvision, its recipe": torchvision_float,
    "torchvision, uint8": torchvision_uint8,
    "torch loader, recipe": partial(ours, augmented=True),
    "torch loader, uint8": ours,
    "torch loader, uint8, cold page cache": cold,
    "torch loader, recipe, compact shards": partial(ours, data=COMPACT, augmented=True),
    "torch loader, uint8, compact shards": partial(ours, data=COMPACT),
    "torch loader, recipe, regions": partial(ours, data=REGIONS, augmented=True),
    "torch loader, uint8, regions": partial(ours, data=REGIONS),
    "torch loader, uint8, regions, cold page cache": partial(cold, regions=True),
    "dali loader, recipe": partial(ours, loader="dali", augmented=True),
    "dali loader, uint8": partial(ours, loader="dali"),
    "dali loader, recipe, regions": partial(ours, loader="dali", data=REGIONS, augmented=True),
    "dali loader, uint8, regions": partial(ours, loader="dali", data=REGIONS),
    "dali loader, uint8, compact shards": partial(ours, loader="dali", data=COMPACT),
    LIMIT: bare_decode,
}
