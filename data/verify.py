"""Reads, checksums and decodes every image of a split, for `python -m data.index SHARDS --verify`.

Check: `pytest tests/test_index.py -k verify`.
"""

import os
import zlib
from collections.abc import Sequence
from contextlib import closing

import numpy as np
from tqdm import tqdm

from data.parallel import check_stop, run_parallel
from data.tars import DecodeError, member_name, member_names, open_image
from repghost.files import file_sha256


def verify(
    shards: Sequence[str], samples: np.ndarray, checksums: Sequence[str | None], workers: int, title: str
) -> list[str]:
    """A line for each shard or image that is not what it was.

    samples: [N] of SAMPLE, in the order of the shards. checksums: the sha256 of each shard, where there is one. title:
    of the progress bar.
    """
    bounds = np.searchsorted(samples["shard"], np.arange(1, len(shards)))
    tasks = list(zip(shards, np.split(samples, bounds), checksums, strict=True))
    damaged: dict[int, list[str]] = {}
    with (
        tqdm(total=len(samples), desc=title, unit="images") as bar,
        closing(run_parallel(_verify_shard, tasks, min(workers, len(tasks)))) as results,
    ):
        for number, lines in results:
            damaged[number] = lines
            bar.update(len(tasks[number][1]))
    return [line for number in sorted(damaged) for line in damaged[number]]


def _verify_shard(task: tuple[str, np.ndarray, str | None]) -> list[str]:
    path, samples, checksum = task
    lines = []
    names = member_names(path)
    with open(path, "rb") as file:
        for sample in samples:
            check_stop()
            data = os.pread(file.fileno(), int(sample["size"]), int(sample["offset"]))
            try:
                if zlib.crc32(data) != sample["crc32"]:
                    raise DecodeError("its bytes have changed (checksum)")
                open_image(data, decode=True)
            except DecodeError as error:
                lines.append(f"{path}: {member_name(names, int(sample['offset']))}: {error}")
    if checksum is not None and not lines and file_sha256(path) != checksum:
        lines.append(f"{path}: its labels or tar headers have changed (checksum): copy it again")
    return lines
