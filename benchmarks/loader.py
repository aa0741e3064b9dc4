"""Images per second of this project's loaders beside timm's and torchvision's: same files, same cores, same run.

    python benchmarks/loader.py (or python -m benchmarks.loader)

makes JPEG files like ImageNet's (benchmarks/corpus.py) and shards of them, and lets the pipelines below take turns,
--repetitions times. A pipeline has as many worker processes as cores, and the consuming process shares those cores
with them. The clock runs from batch to batch of a filled pipeline: neither its start nor its end counts. The limit of
whatever decodes whole images is `bare decode`: the same workers, and libjpeg-turbo on bytes in memory.

Every figure is a median over the repetitions, every ratio the median of the ratios within one repetition. Figures per
core second count CPU time of all processes instead of time, so that they hold on a machine that does other things too.
--out gets a row a figure: absolute numbers belong to a machine, ratios travel.
"""

import argparse
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, islice, repeat
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
import torchvision
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import DictConfig
from timm.data import create_dataset, create_loader
from timm.data.loader import MultiEpochsDataLoader
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate
from torchvision.transforms import v2

if not __package__:  # started as a file, not as python -m benchmarks.loader
    sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.common import ROOT, machine, write_table
from benchmarks.corpus import TRAIN, corpus
from data.crops import RandomCrops
from data.dali_loader import DaliLoader, dali_installed
from data.index import Index, load_index
from data.reader import LoaderOptions, ShardReader, decode, resize
from data.sampling import RankSampler
from data.torch_loader import CroppedBatches, TorchLoader
from data.write_shards.write import write_folder
from repghost.machine import available_cpus
from repghost.run import resolve_recipe

IMAGE_SIZE = 224
COMPACT = 256  # shorter side of the compact shards
PREFETCH = 2  # batches that a worker is ahead, in every pipeline
READ_AHEAD = 2**17  # bytes that Linux reads around what it is asked for
EPOCH = 1_000_000  # images that an index is repeated to, so that no epoch ends while it is measured


@dataclass(frozen=True)
class Setting:
    """What all pipelines share."""

    folder: Path  # class folders
    original: Index
    compact: Index
    recipe: DictConfig
    batch_size: int

    def crops(self, index: Index) -> RandomCrops:
        """The recipe's crops of an index."""
        sampler = RankSampler(len(index), self.batch_size)
        return RandomCrops(index, sampler, IMAGE_SIZE, 0, self.recipe.scale, self.recipe.ratio)


# -- the pipelines: (setting, workers) -> batches ----------------------------------------------------------------------

Pipeline = Callable[[Setting, int], Iterable[Any]]


def timm_recipe(setting: Setting, workers: int) -> Iterable[Any]:
    """timm's loader with the recipe's augmentation: normalized floats."""
    recipe = setting.recipe
    loader = create_loader(
        create_dataset("", root=str(setting.folder)),
        input_size=(3, IMAGE_SIZE, IMAGE_SIZE),
        batch_size=setting.batch_size,
        is_training=True,
        scale=tuple(recipe.scale),
        ratio=tuple(recipe.ratio),
        hflip=recipe.augment.flip,
        color_jitter=recipe.augment.jitter.brightness,
        re_prob=recipe.augment.erase.probability,
        re_mode="pixel",
        interpolation="random",
        num_workers=workers,
        use_prefetcher=False,
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


def _torchvision(setting: Setting, workers: int, end: list[torch.nn.Module]) -> Iterable[Any]:
    crop = v2.RandomResizedCrop(IMAGE_SIZE, tuple(setting.recipe.scale), tuple(setting.recipe.ratio), antialias=True)
    transform = v2.Compose([crop, v2.RandomHorizontalFlip(setting.recipe.augment.flip), v2.PILToTensor(), *end])
    loader = MultiEpochsDataLoader(
        torchvision.datasets.ImageFolder(str(setting.folder), transform),
        setting.batch_size,
        shuffle=True,
        num_workers=workers,
        prefetch_factor=PREFETCH,
        drop_last=True,
    )
    return chain.from_iterable(repeat(loader))


def ours(setting: Setting, workers: int, index: str = "original", kind: type = TorchLoader) -> Iterable[Any]:
    """This project's loaders: uint8 batches."""
    return kind(setting.crops(getattr(setting, index)), LoaderOptions(workers=workers, prefetch=PREFETCH))


def ours_recipe(setting: Setting, workers: int, index: str = "original", kind: type = TorchLoader) -> Iterator[Tensor]:
    """The same, augmented and normalized in this process: what timm's loader yields."""
    augment = instantiate(setting.recipe.augment)
    for batch in ours(setting, workers, index, kind):
        yield augment.train(batch.images, batch.uniforms)


def cold(setting: Setting, workers: int) -> Iterator[Any]:
    """The torch loader's uint8 batches from shards that the page cache does not hold."""
    index, crops = setting.original, setting.crops(setting.original)
    with ExitStack() as stack:
        files = [stack.enter_context(open(shard, "rb")).fileno() for shard in index.shards]
        for file in files:
            os.fsync(file)
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        for number, batch in enumerate(ours(setting, workers)):
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
    "torch loader, recipe": ours_recipe,
    "torch loader, uint8": ours,
    "torch loader, uint8, cold page cache": cold,
    "torch loader, recipe, compact shards": partial(ours_recipe, index="compact"),
    "torch loader, uint8, compact shards": partial(ours, index="compact"),
    "dali loader, recipe": partial(ours_recipe, kind=DaliLoader),
    "dali loader, uint8": partial(ours, kind=DaliLoader),
    "dali loader, uint8, compact shards": partial(ours, kind=DaliLoader, index="compact"),
    LIMIT: bare_decode,
}


# -- measuring ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rate:
    """Images per second, and per second of CPU time of all processes of the pipeline."""

    second: float
    core_second: float


def measure(pipeline: Pipeline, setting: Setting, workers: int, seconds: float) -> Rate:
    """The rate over at least `seconds`, or to the end if that comes first, on `workers` cores."""
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(cores)[:workers])
    try:
        batches = iter(pipeline(setting, workers))
        for _ in islice(batches, (PREFETCH + 1) * workers):
            pass
        images, start, used = 0, time.perf_counter(), _cpu_seconds()
        while images == 0 or time.perf_counter() - start < seconds:
            # As many batches as there are workers: they tend to arrive together.
            arrived = sum(1 for _ in islice(batches, workers))
            images += arrived * setting.batch_size
            if arrived < workers:
                break
        return Rate(images / (time.perf_counter() - start), images / (_cpu_seconds() - used))
    finally:
        os.sched_setaffinity(0, cores)


def _cpu_seconds() -> float:
    """CPU time that this process and its children have used; a process's clock is told by its id (clock_getres(2))."""
    processes = [os.getpid(), *(child.pid or 0 for child in multiprocessing.active_children())]
    return sum(time.clock_gettime((~process << 3) | 2) for process in processes)


def stages(setting: Setting, batches: int) -> dict[str, float]:
    """Milliseconds of CPU time of each stage that one image passes in a worker, before its batch is handed over."""
    all_crops, reader = setting.crops(setting.original), ShardReader(setting.original)
    all_crops(0, 0)  # draws the order of the epoch, once
    spent = dict.fromkeys(("crops", "read and check", "decode", "resize"), 0.0)
    clock = 0.0

    def lap(stage: str) -> None:
        nonlocal clock
        now = time.thread_time()
        spent[stage] += (now - clock) / (batches * setting.batch_size) * 1000
        clock = now

    for batch in range(batches):
        clock = time.thread_time()
        crops = all_crops(0, batch)
        reader.readahead(crops.samples)
        lap("crops")
        for row, sample in enumerate(crops.samples.tolist()):
            content = reader.read(sample)
            lap("read and check")
            image = decode(content)
            lap("decode")
            top, left, height, width = crops.windows[row].tolist()
            resize(image[:, top : top + height, left : left + width], crops, row)
            lap("resize")
    return spent


# -- what is printed and written ---------------------------------------------------------------------------------------


def prepare(folder: Path, images: int, batch_size: int) -> Setting:
    """The corpus and its shards, made on the first call."""
    files = corpus(folder, images)

    def index(name: str, shorter: int | None) -> Index:
        write_folder(files / TRAIN, files / name, split="train", images_per_shard=500, resize=shorter, quiet=True)
        once = load_index(files / name, "train", files)
        return replace(once, samples=np.tile(once.samples, max(1, EPOCH // images)))

    return Setting(files / TRAIN, index("shards", None), index("compact", COMPACT), paper_recipe(1.0), batch_size)


def paper_recipe(width: float) -> DictConfig:
    """The paper's recipe with the augmentation of a width."""
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        config = compose("train", ["data.root=not read", "recipe=paper", f"width={width}"])
    resolve_recipe(config)
    return config.recipe


def pipeline_rows(setting: Setting, workers: int, seconds: float, repetitions: int) -> Iterator[dict[str, Any]]:
    """A row a pipeline."""
    pipelines = {name: p for name, p in PIPELINES.items() if dali_installed() or not name.startswith("dali")}
    rates: dict[str, list[Rate]] = {name: [] for name in pipelines}
    for _ in range(repetitions):
        for name, pipeline in pipelines.items():
            rates[name].append(measure(pipeline, setting, workers, seconds))

    def ratio(name: str, other: str, unit: str) -> float:
        return median(getattr(a, unit) / getattr(b, unit) for a, b in zip(rates[name], rates[other], strict=True))

    for name, measured in rates.items():
        yield {
            "what": name,
            "workers": workers,
            "images_per_second": median(rate.second for rate in measured),
            "lowest": min(rate.second for rate in measured),
            "highest": max(rate.second for rate in measured),
            "ratio_to_timm": ratio(name, TIMM, "second"),
            "share_of_decode_limit": ratio(name, LIMIT, "second"),
            "images_per_core_second": median(rate.core_second for rate in measured),
            "ratio_to_timm_per_core_second": ratio(name, TIMM, "core_second"),
            "share_of_decode_limit_per_core_second": ratio(name, LIMIT, "core_second"),
        }


def stage_rows(setting: Setting, seconds: float, repetitions: int) -> Iterator[dict[str, Any]]:
    """A row a stage of the torch loader."""
    batches = max(1, 256 // setting.batch_size)
    runs = []
    for _ in range(repetitions):
        sending = 1000 / measure(hand_over, setting, 1, seconds).core_second
        runs.append({**stages(setting, batches), "stack, hand over": sending})
    middle = {stage: median(run[stage] for run in runs) for stage in runs[0]}
    for stage, milliseconds in middle.items():
        yield {
            "what": f"stage: {stage}",
            "workers": 1,
            "milliseconds_per_image": milliseconds,
            "share_of_stages": milliseconds / sum(middle.values()),
        }


def augment_rows(setting: Setting, repetitions: int) -> Iterator[dict[str, Any]]:
    """CPU time of what the training device does to an image: both kinds of colour augmentation, one thread."""
    batch = CroppedBatches(setting.crops(setting.original))[0, 0][0]
    for name, width in (("jitter, widths up to 1.11", 1.0), ("RandAugment, widths from 1.3", 1.3)):
        augment = instantiate(paper_recipe(width).augment)
        times = []
        for _ in range(repetitions + 1):  # the first one warms up
            start = time.thread_time()
            augment.train(batch.images, batch.uniforms)
            times.append((time.thread_time() - start) / setting.batch_size * 1000)
        yield {"what": f"augment: {name}", "workers": 1, "milliseconds_per_image": median(times[1:])}


def corpus_facts(setting: Setting) -> dict[str, Any]:
    """What the figures depend on beside the code and the machine."""
    sizes = np.unique(setting.original.samples)["size"]
    return {"images": len(sizes), "kilobytes": sizes.mean() / 1000, "batch_size": setting.batch_size}


COLUMNS = {  # of the printed table: heading, format
    "what": ("", "{:38s}"),
    "workers": ("workers", "{:>8d}"),
    "images_per_second": ("images/s", "{:>9.0f}"),
    "ratio_to_timm": ("x timm", "{:>7.2f}"),
    "share_of_decode_limit": ("x decode", "{:>9.2f}"),
    "images_per_core_second": ("images/core s", "{:>14.0f}"),
    "ratio_to_timm_per_core_second": ("x timm", "{:>7.2f}"),
    "share_of_decode_limit_per_core_second": ("x decode", "{:>9.2f}"),
}


def print_table(table: list[dict[str, Any]]) -> None:
    widths = {name: len(layout.format("" if "s" in layout else 0)) for name, (_, layout) in COLUMNS.items()}
    print("".join(f"{heading:>{widths[name]}}" for name, (heading, _) in COLUMNS.items()))
    for row in table:
        if "milliseconds_per_image" in row:
            share = f", {row['share_of_stages']:.0%}" if "share_of_stages" in row else ""
            print(f"{row['what']:38s} {row['milliseconds_per_image']:.3f} ms{share}")
        else:
            print("".join(layout.format(row[name]) for name, (_, layout) in COLUMNS.items()))


def main(arguments: list[str] | None = None) -> None:
    cores = available_cpus()
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = partial(parser.add_argument, metavar="N")
    add("--images", type=int, default=1500, help="files of the corpus (default %(default)s)")
    add("--seconds", type=float, default=3, help="of one measurement, at least (default %(default)s)")
    add("--repetitions", type=int, default=5, help="(default %(default)s)")
    add("--batch-size", type=int, default=64, help="(default %(default)s)")
    add("--workers", type=int, nargs="+", default=sorted({cores, 1}, reverse=True), help="(default %(default)s)")
    add("--corpus", type=Path, default=Path("~/.cache/repghost/benchmark"), metavar="DIR", help="(default %(default)s)")
    add("--out", type=Path, default=ROOT / "results/loader.csv", metavar="FILE", help="(default %(default)s)")
    parser.add_argument("--quick", action="store_true", help="a look in a minute or two: few images, short, twice")
    options = parser.parse_args(arguments)
    if options.quick:
        options.images, options.seconds, options.repetitions = min(options.images, 400), min(options.seconds, 0.5), 2

    # The consuming process stands beside busy workers: its threads would wait for each other (benchmarks/NOTES.md).
    torch.set_num_threads(1)
    setting = prepare(options.corpus.expanduser(), options.images, options.batch_size)
    if not dali_installed():
        print("dali loader: left out, the package nvidia-dali-cuda130 is not installed")
    table: list[dict[str, Any]] = []
    for workers in options.workers:
        table += pipeline_rows(setting, workers, options.seconds, options.repetitions)
    table += stage_rows(setting, options.seconds, options.repetitions)
    table += augment_rows(setting, options.repetitions)
    facts = {"repetitions": options.repetitions, **corpus_facts(setting), **machine()}
    print_table(table)
    print(
        ", ".join(
            f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in facts.items()
        )
    )
    write_table(options.out, [row | facts for row in table])


if __name__ == "__main__":
    main()
