"""Images per second of this project's loaders beside timm's and torchvision's: same files, same cores, same run.

    python benchmarks/loader.py (or python -m benchmarks.loader)

makes JPEG files like ImageNet's (benchmarks/corpus.py) and shards of them, and lets the pipelines below take turns,
--repetitions times. A pipeline has as many worker processes as cores, and the consuming process shares those cores
with them. The clock runs from batch to batch of a filled pipeline: neither its start nor its end counts. The limit of
whatever decodes whole images on a CPU is `bare decode`: the same workers, and libjpeg-turbo on bytes in memory.

Batches are made for --device by the data module of train.py: on a GPU DALI decodes there, timm's prefetcher and this
project's augmentation work there, and a batch counts once it is there (benchmarks/pipelines.py).

Every figure is a median over the repetitions, every ratio the median of the ratios within one repetition. Figures per
core second count CPU time of all processes instead of time, so that they hold on a machine that does other things too.
--out gets a row a figure: absolute numbers belong to a machine, ratios travel.
"""

import argparse
import gc
import multiprocessing
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

import torch

if not __package__:  # started as a file, not as python -m benchmarks.loader
    sys.path.insert(0, str(Path(__file__).parents[1]))


from benchmarks.common import CORPUS, ROOT, described, kernels_of_training, machine, wait_for, write_table
from benchmarks.pipelines import (
    LIMIT,
    PIPELINES,
    PREFETCH,
    TIMM,
    Pipeline,
    hand_over,
)
from benchmarks.setting import Setting, corpus_facts, prepare, training_recipe
from benchmarks.writing import writing_rows
from data.crops import BatchCrops
from data.dali_loader import dali_installed
from data.index import Index
from data.reader import Piece, ShardReader, decode, part_of, resize
from data.torch_loader import CroppedBatches
from repghost.machine import available_cpus
from repghost.training.trainer import keep_compiled

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
        return _rate(iter(pipeline(setting, workers)), setting, workers, seconds)
    finally:
        os.sched_setaffinity(0, cores)
        gc.collect()  # a pipeline of DALI that is garbage when workers are forked hangs the one that collects it


def _rate(batches: Iterator[Any], setting: Setting, workers: int, seconds: float) -> Rate:
    for _ in islice(batches, (PREFETCH + 1) * workers):
        pass
    wait_for(setting.device)
    images, start, used = 0, time.perf_counter(), _cpu_seconds()
    while images == 0 or time.perf_counter() - start < seconds:
        # As many batches as there are workers: they tend to arrive together.
        arrived = sum(1 for _ in islice(batches, workers))
        wait_for(setting.device)
        images += arrived * setting.batch_size
        if arrived < workers:
            break
    return Rate(images / (time.perf_counter() - start), images / (_cpu_seconds() - used))


def _cpu_seconds() -> float:
    """CPU time that this process and its children have used; a process's clock is told by its id (clock_getres(2))."""
    processes = [os.getpid(), *(child.pid or 0 for child in multiprocessing.active_children())]
    return sum(time.clock_gettime((~process << 3) | 2) for process in processes)


def stages(setting: Setting, index: Index, batches: int) -> dict[str, float]:
    """Milliseconds of CPU time of each stage that one image passes in a worker, before its batch is handed over."""
    all_crops, reader = setting.crops(index), ShardReader(index)
    all_crops(0, 0)  # draws the order of the epoch, once
    spent = dict.fromkeys(("crops", "read, check, cut", "decode", "resize"), 0.0)
    clock = 0.0

    def lap(stage: str) -> None:
        nonlocal clock
        now = time.thread_time()
        spent[stage] += (now - clock) / (batches * setting.batch_size) * 1000
        clock = now

    for batch in range(batches):
        clock = time.thread_time()
        crops = all_crops(0, batch)
        lap("crops")

        def load(row: int, sample: int, piece: Piece, crops: BatchCrops = crops) -> None:
            lap("read, check, cut")
            image = decode(piece.content).permute(1, 2, 0)
            lap("decode")
            resize(part_of(image, piece, crops, row), crops, row)
            lap("resize")

        reader.load(crops, load, missing=None)
    return spent


# -- what is printed and written ---------------------------------------------------------------------------------------


def pipeline_rows(setting: Setting, workers: int, seconds: float, repetitions: int) -> Iterator[dict[str, Any]]:
    """A row a pipeline."""
    pipelines = {
        name: pipeline
        for name, pipeline in PIPELINES.items()
        if (dali_installed() or not name.startswith("dali")) and (setting.regions or "regions" not in name)
    }
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
    """A row a stage of the torch loader, with files that are decoded whole and with those that are cut."""
    batches = max(1, 256 // setting.batch_size)
    indexes = {"": setting.original} | ({", regions": setting.regions} if setting.regions else {})
    runs: dict[str, list[dict[str, float]]] = {kind: [] for kind in indexes}
    for _ in range(repetitions):
        sending = 1000 / measure(hand_over, setting, 1, seconds).core_second
        for kind, index in indexes.items():
            runs[kind].append({**stages(setting, index, batches), "stack, hand over": sending})
    for kind, found in runs.items():
        middle = {stage: median(run[stage] for run in found) for stage in found[0]}
        for stage, milliseconds in middle.items():
            yield {
                "what": f"stage: {stage}{kind}",
                "workers": 1,
                "milliseconds_per_image": milliseconds,
                "share_of_stages": milliseconds / sum(middle.values()),
            }


def augment_rows(setting: Setting, repetitions: int) -> Iterator[dict[str, Any]]:
    """What the device's part costs an image, for both kinds of colour augmentation.

    On a CPU seconds of CPU time of one thread, on a GPU time of the device, which does nothing else.
    """
    batch = CroppedBatches(setting.crops(setting.original))[0, 0][0]
    images, uniforms = batch.images.to(setting.device), batch.uniforms.to(setting.device)
    clock, turns = (time.perf_counter, 20) if setting.on_gpu else (time.thread_time, 1)
    for name, width in (("jitter, widths up to 1.11", 1.0), ("RandAugment, widths from 1.3", 1.3)):
        augment = replace(setting, recipe=training_recipe(width)).augment()
        times = []
        for _ in range(repetitions + 1):  # the first one warms up
            wait_for(setting.device)
            start = clock()
            for _ in range(turns):
                augment.train(images, uniforms)
            wait_for(setting.device)
            times.append((clock() - start) / (turns * setting.batch_size) * 1000)
        yield {"what": f"augment: {name}", "workers": 1, "milliseconds_per_image": median(times[1:])}


COLUMNS = {  # of the printed table: heading, format
    "what": ("", "{:46s}"),
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
        if "seconds_for_10000" in row:
            print(
                f"{row['what']:46s} {row['images_per_second']:.0f} images/s, "
                f"10,000 in {row['seconds_for_10000']:.0f} s, "
                f"{row['kilobytes']:.1f} kB an image, {row['size_to_original']:.3f} of the original"
            )
        elif "milliseconds_per_image" in row:
            share = f", {row['share_of_stages']:.0%}" if "share_of_stages" in row else ""
            print(f"{row['what']:46s} {row['milliseconds_per_image']:.3f} ms{share}")
        else:
            print("".join(layout.format(row[name]) for name, (_, layout) in COLUMNS.items()))


def main(arguments: list[str] | None = None) -> None:
    cores, gpu = available_cpus(), torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = partial(parser.add_argument, metavar="N")
    add("--images", type=int, default=1500, help="files of the corpus (default %(default)s)")
    add("--seconds", type=float, default=3, help="of one measurement, at least (default %(default)s)")
    add("--repetitions", type=int, default=5, help="(default %(default)s)")
    add("--batch-size", type=int, default=64, help="(default %(default)s)")
    add("--workers", type=int, nargs="+", default=sorted({cores, 1}, reverse=True), help="(default %(default)s)")
    add("--corpus", type=Path, default=CORPUS, metavar="DIR", help="(default %(default)s)")
    add("--out", type=Path, default=ROOT / "results/loader.csv", metavar="FILE", help="(default %(default)s)")
    device_help = "that the batches are for (default: a GPU where there is one)"
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if gpu else "cpu", help=device_help)
    parser.add_argument("--quick", action="store_true", help="a look in a minute or two: few images, short, twice")
    options = parser.parse_args(arguments)
    if options.quick:
        options.images, options.seconds, options.repetitions = min(options.images, 400), min(options.seconds, 0.5), 2

    device, folder = torch.device(options.device), options.corpus.expanduser()
    facts = {"repetitions": options.repetitions, **machine(device)}
    # The consuming process stands beside busy workers: its threads would wait for each other (benchmarks/NOTES.md).
    torch.set_num_threads(1)
    kernels_of_training()
    if device.type == "cuda":
        keep_compiled(folder / "compiled")
    setting = prepare(folder, options.images, options.batch_size, device)
    facts |= corpus_facts(setting)
    if not dali_installed():
        print("dali loader: left out, the package nvidia-dali-cuda130 is not installed")
    if setting.regions is None:
        print("regions: left out, the program jpegtran is not installed")
    parts = [pipeline_rows(setting, workers, options.seconds, options.repetitions) for workers in options.workers]
    parts += [stage_rows(setting, options.seconds, options.repetitions), augment_rows(setting, options.repetitions)]
    parts += [writing_rows(setting, min(2, options.repetitions))]
    table: list[dict[str, Any]] = []
    for rows in parts:  # each takes minutes, so that what is there is kept
        table += rows
        write_table(options.out, [facts | row for row in table])
    print_table(table)
    print(described(facts))


if __name__ == "__main__":
    main()
