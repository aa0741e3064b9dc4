"""What making shards takes, for benchmarks/loader.py."""

import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from benchmarks.setting import SHARDS, Setting
from data.write_shards.shards import list_shards
from data.write_shards.write import write_folder, write_shards
from repghost.machine import available_cpus


def writing_rows(setting: Setting, repetitions: int) -> Iterator[dict[str, Any]]:
    """What making shards takes, from the files and from shards that exist, and how large they become."""
    if setting.regions is None:
        return
    original, cores = setting.folder.parent / SHARDS, available_cpus()

    def upgrade(out: Path, **options: Any) -> None:
        write_shards(list_shards(original), out, regions=True, **options)

    writers: dict[str, Callable[..., Any]] = {
        "shards": partial(write_folder, setting.folder, split="train"),
        "regions of shards": upgrade,
    }
    rates: dict[str, list[float]] = {what: [] for what in writers}
    for _ in range(repetitions):
        for what, write in writers.items():
            with TemporaryDirectory(dir=setting.folder.parent) as folder:
                start = time.perf_counter()
                write(Path(folder) / "out", workers=cores, quiet=True)
                rates[what].append(setting.files / (time.perf_counter() - start))
    size = np.unique(setting.original.samples)["size"].mean()
    sizes = {"shards": size, "regions of shards": setting.regions.samples["size"].mean()}
    for what, measured in rates.items():
        yield {
            "what": f"write: {what}",
            "workers": cores,
            "images_per_second": median(measured),
            "seconds_for_10000": 10_000 / median(measured),
            "kilobytes": sizes[what] / 1000,
            "size_to_original": sizes[what] / size,
        }
