"""One shard: its images are read from the source, decoded as a check, stored and indexed.

`write_shard` is the task of a worker process; what it writes depends on its argument alone.
Check: `pytest tests/test_write_shards.py`.
"""

import hashlib
import io
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image
from tqdm import tqdm
from webdataset import TarWriter

from data.parallel import check_stop
from data.tars import DecodeError, open_image, scan_shard
from data.write_shards.parquet import open_parquet
from repghost.errors import UserError
from repghost.files import atomic_write, file_sha256
from repghost.images import to_rgb

# What is stored byte for byte, by PIL's name of the format. MPO is a JPEG with further pictures behind it.
_EXTENSION = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}
_PNG_MODES = ("1", "L", "LA", "I", "I;16", "P", "RGB", "RGBA")


@dataclass(frozen=True)
class Options:
    """What the bytes of the shards depend on, beside the images."""

    images_per_shard: int
    seed: int
    resize: int | None
    quality: int | None


@dataclass(frozen=True)
class Task:
    """One shard: where its images are (columns of sources.ENTRY, one value an image) and where it goes."""

    path: Path
    record: Path
    kind: str
    files: list[str]
    offsets: list[int]
    sizes: list[int]
    labels: list[int]
    keys: list[str]
    options: Options
    skip_bad: int

    def digest(self) -> str:
        """Hex digest of the images; a file that was replaced since has another size."""
        return hashlib.sha256(json.dumps([self.keys, self.labels, self.sizes]).encode()).hexdigest()


@dataclass(frozen=True)
class Shard:
    """A finished shard, as its record tells."""

    rows: np.ndarray  # [n] of SAMPLE, with shard 0
    bytes: int
    sha256: str
    skipped: list[str]  # keys
    converted: int


def finished_shard(task: Task) -> Shard | None:
    """The shard of `task` if an earlier run finished it."""
    if not task.record.exists() or not task.path.exists():
        return None
    with np.load(task.record) as record:
        if str(record["source"]) != task.digest():
            return None
        shard = Shard(
            record["rows"],
            int(record["bytes"]),
            str(record["sha256"]),
            record["skipped"].tolist(),
            int(record["converted"]),
        )
    return shard if task.path.stat().st_size == shard.bytes else None


def write_shard(task: Task) -> Shard:
    """Writes one shard and its record. Runs in a worker process."""
    skipped: list[str] = []
    converted = 0

    def write(file: BinaryIO) -> None:
        nonlocal converted
        # A fixed time and owner: the bytes depend on the images alone.
        with TarWriter(file, encoder=False, mtime=0) as writer:
            for i, data in _read(task):
                check_stop()
                try:
                    stored, extension, changed = _convert(data, task.options)
                except DecodeError as error:
                    skipped.append(task.keys[i])
                    if len(skipped) > task.skip_bad:
                        raise UserError(
                            f"{_name(task, i)}: {error}: replace it, or leave it out with --skip-bad"
                        ) from None
                    tqdm.write(f"skipped {_name(task, i)}: {error}", file=sys.stderr)
                    continue
                converted += changed
                writer.write({"__key__": task.keys[i], extension: stored, "cls": b"%d" % task.labels[i]})

    with atomic_write(task.path) as file:
        write(file)
    rows, _ = scan_shard(str(task.path))  # what the index says is what lies on the disk
    shard = Shard(rows, task.path.stat().st_size, file_sha256(task.path), skipped, converted)
    # Without object arrays: the record is read without pickle.
    record = {**asdict(shard), "skipped": np.array(skipped, dtype=np.str_), "source": task.digest()}
    with atomic_write(task.record) as file:
        np.savez(file, **record)
    return shard


def _name(task: Task, i: int) -> str:
    return task.files[i] if task.kind == "file" else f"{task.files[i]}: {task.keys[i]}"


def _read(task: Task) -> Iterator[tuple[int, bytes]]:
    """(number, bytes) of the images of a task in order."""
    if task.kind == "file":
        for i, path in enumerate(task.files):
            yield i, Path(path).read_bytes()
    elif task.kind == "archive":
        with open(task.files[0], "rb") as file:  # the archive of this split
            if hasattr(os, "posix_fadvise"):  # lets the disk sort the scattered reads
                for offset, size in zip(task.offsets, task.sizes, strict=True):
                    os.posix_fadvise(file.fileno(), offset, size, os.POSIX_FADV_WILLNEED)
            for i, (offset, size) in enumerate(zip(task.offsets, task.sizes, strict=True)):
                yield i, os.pread(file.fileno(), size, offset)
    else:
        yield from enumerate(_read_parquet(task))


def _read_parquet(task: Task) -> list[bytes]:
    """All images of a shard: each of its row groups is read once, in batches."""
    found: dict[tuple[str, int], bytes] = {}
    wanted: dict[str, set[int]] = {}
    for path, row in zip(task.files, task.offsets, strict=True):
        wanted.setdefault(path, set()).add(row)
    for path, rows in wanted.items():
        with open_parquet(path) as file:
            row = 0
            for group in range(file.num_row_groups):
                count = file.metadata.row_group(group).num_rows
                if rows.isdisjoint(range(row, row + count)):
                    row += count
                    continue
                for batch in file.iter_batches(batch_size=64, row_groups=[group], columns=["image"]):
                    check_stop()
                    for value in batch.column("image"):
                        if row in rows:
                            image = value.as_py()
                            found[path, row] = (image["bytes"] if isinstance(image, dict) else image) or b""
                        row += 1
    return [found[place] for place in zip(task.files, task.offsets, strict=True)]


def _convert(data: bytes, options: Options) -> tuple[bytes, str, bool]:
    """(bytes to store, extension, whether the format was changed to PNG). Raises DecodeError."""
    image = open_image(data, decode=True)
    assert image.format is not None, "PIL opened it"
    if options.resize and options.quality and min(image.size) > options.resize:
        short = min(image.size)
        width, height = (options.resize * side // short for side in image.size)
        resized = to_rgb(image).resize((width, height), Image.Resampling.BICUBIC)
        buffer = io.BytesIO()
        resized.save(buffer, "JPEG", quality=options.quality, subsampling="4:2:0")
        return buffer.getvalue(), "jpg", False
    if image.format in _EXTENSION:
        return data, _EXTENSION[image.format], False
    buffer = io.BytesIO()
    (image if image.mode in _PNG_MODES else to_rgb(image)).save(buffer, "PNG")
    return buffer.getvalue(), "png", True
