"""One shard: its images are read from their source, decoded as a check, stored and indexed.

`write_shard` is the task of a worker process; what it writes depends on its argument alone.
Check: `pytest tests/test_write_shards.py`.
"""

import hashlib
import io
import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from data.coco import OBJECT, object_row
from data.parallel import check_stop
from data.tars import SAMPLE, scan_annotated, scan_shard
from data.write_shards.regions import Rewritten, region_arrays, rewrite
from data.write_shards.source import Entry
from repghost.errors import UserError, printable
from repghost.files import atomic_write, file_sha256
from repghost.images import DecodeError, open_image, to_rgb

# What is stored byte for byte, by PIL's name of the format. MPO is a JPEG with further pictures behind it.
_EXTENSION = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}
NOTHING = {"records": np.empty(0, SAMPLE), "ids": np.empty(0, np.int64), "objects": np.empty(0, OBJECT)}
_PNG_MODES = ("1", "L", "LA", "I;16", "P", "RGB", "RGBA")


@dataclass(frozen=True)
class Options:
    """What the bytes of the shards depend on, beside the images."""

    shuffle: str  # that of the sources
    images_per_shard: int
    seed: int
    resize: int | None  # pixels of the shorter side; None stores the original bytes
    quality: int | None  # of the JPEGs of `resize`; None without it
    regions: str | None = None  # name and version of the program that rewrites JPEGs so that they can be cut


@dataclass(frozen=True)
class Task:
    """One shard: its images in the order in which they are stored, how to read them, and where it goes."""

    path: Path
    record: Path  # tells a later run that the shard is finished
    entries: list[Entry]
    read: Callable[[Sequence[Entry]], Iterator[bytes]]
    options: Options
    skip_bad: int

    def digest(self) -> str:
        """Hex digest of the images; a file that was replaced since has another size, or another checksum in shards."""
        names = ["key", "label", "size", *["crc32"] * any(entry.crc32 is not None for entry in self.entries)]
        columns = [[getattr(entry, name) for entry in self.entries] for name in names]
        annotations = b"".join(entry.annotations for entry in self.entries)
        return hashlib.sha256(json.dumps(columns).encode() + annotations).hexdigest()


@dataclass(frozen=True)
class Shard:
    """A finished shard, as its record tells."""

    rows: np.ndarray  # [n] of SAMPLE, with shard 0
    bytes: int
    sha256: str
    skipped: list[str]  # keys of images that do not decode
    converted: int  # images of other formats, stored as PNG
    whole: dict[str, int]  # with Options.regions: how many images stay whole, by reason
    records: np.ndarray  # [n] of SAMPLE, as rows: their annotations; for detection
    ids: np.ndarray  # int64 [n]: the images' ids in COCO; for detection
    objects: np.ndarray  # [m] of OBJECT, with rows of this shard; for detection


def finished_shard(task: Task) -> Shard | None:
    """The shard of `task` if an earlier run finished it."""
    if not task.record.exists() or not task.path.exists():
        return None
    with np.load(task.record) as record:
        if str(record["source"]) != task.digest() or task.path.stat().st_size != record["bytes"]:
            return None
        values = {name: record[name].tolist() for name in ("bytes", "sha256", "skipped", "converted")}
        # Records of earlier versions have none of these.
        whole = json.loads(str(record["whole"])) if "whole" in record else {}
        annotated = {name: record.get(name, nothing) for name, nothing in NOTHING.items()}
        return Shard(record["rows"], **values, whole=whole, **annotated)


def write_shard(task: Task) -> Shard:
    """Writes one shard and its record. Runs in a worker process."""
    from webdataset import TarWriter  # which imports torch, for which nobody who asks for --help should wait

    skipped: list[str] = []
    described: list[tuple[np.ndarray, np.ndarray] | str] = []  # of data.regions, or why an image stays whole
    converted = 0
    # A fixed time and owner: the bytes depend on the images alone.
    with atomic_write(task.path) as file, TarWriter(file, encoder=False, mtime=0) as writer:
        for entry, data in zip(task.entries, task.read(task.entries), strict=True):
            check_stop()
            try:
                stored, extension, changed, rewritten = _convert_and_rewrite(data, task.options)
                if entry.annotations:
                    _check_size(stored, entry.annotations)
            except DecodeError as error:
                skipped.append(entry.key)
                if len(skipped) > task.skip_bad:
                    raise UserError(f"{entry}: {error}: replace it, or leave it out with --skip-bad") from None
                tqdm.write(printable(f"skipped {entry}: {error}"), file=sys.stderr)
                continue
            except UserError as error:
                raise UserError(f"{entry}: {error}") from None
            converted += changed
            if task.options.regions:
                described.append(rewritten if isinstance(rewritten, str) else rewritten.described)
            beside = {"json": entry.annotations} if entry.annotations else {"cls": b"%d" % entry.label}
            writer.write({"__key__": entry.key, extension: stored, **beside})
    # What the index says is what lies on the disk.
    annotated = dict(NOTHING)
    if task.entries[0].annotations:
        rows, annotated["records"] = scan_annotated(str(task.path))
        annotated |= _read_records(task.path, annotated["records"])
    else:
        rows, _ = scan_shard(str(task.path))
    size, digest = task.path.stat().st_size, file_sha256(task.path)
    whole = Counter(each for each in described if isinstance(each, str))
    shard = Shard(rows, size, digest, skipped, converted, dict(whole), **annotated)
    # Without object arrays: the record is read without pickle.
    record = {**asdict(shard), "skipped": np.array(skipped, dtype=np.str_), "whole": json.dumps(whole)}
    record |= region_arrays(described)
    with atomic_write(task.record) as file:
        np.savez(file, **record, source=task.digest())
    return shard


def _convert_and_rewrite(data: bytes, options: Options) -> tuple[bytes, str, bool, Rewritten | str]:
    """As `_convert`, and what `rewrite` made of it, with Options.regions. Raises DecodeError."""
    if not options.regions:
        return *_convert(data, options), ""
    reduced = _reduced_side(open_image(data, decode=False), options)
    rewritten = "" if reduced else rewrite(data)
    if isinstance(rewritten, Rewritten):  # so it was decoded
        return rewritten.content, "jpg", False, rewritten
    stored, extension, changed = _convert(data, options)
    if stored is not data:
        rewritten = rewrite(stored)
    return rewritten.content if isinstance(rewritten, Rewritten) else stored, extension, changed, rewritten


def _reduced_side(image: Image.Image, options: Options) -> int | None:
    """Pixels of the shorter side to which an image is reduced; None for one that is not."""
    return options.resize if options.resize and min(image.size) > options.resize else None


def _check_size(stored: bytes, annotations: bytes) -> None:
    """Raises DecodeError where an image has not the size that its annotations say."""
    size, record = open_image(stored, decode=False).size, json.loads(annotations)
    if size != (stated := (record["width"], record["height"])):
        what = "{} x {} pixels, but its annotations (image {}) say {} x {}".format(*size, record["id"], *stated)
        raise DecodeError(f"{what} (EXIF orientation does not count)")


def _read_records(path: Path, records: np.ndarray) -> dict[str, np.ndarray]:
    """`ids` and `objects` of a shard, from the annotations in it."""
    with open(path, "rb") as file:
        contents = [json.loads(os.pread(file.fileno(), int(at["size"]), int(at["offset"]))) for at in records]
    objects = [object_row(row, a) for row, record in enumerate(contents) for a in record["annotations"]]
    return {"ids": np.array([record["id"] for record in contents], np.int64), "objects": np.array(objects, OBJECT)}


def _convert(data: bytes, options: Options) -> tuple[bytes, str, bool]:
    """(bytes to store, extension, whether the format was changed to PNG). Raises DecodeError."""
    image = open_image(data, decode=True)
    assert image.format is not None, "PIL opened it"
    buffer = io.BytesIO()
    if reduced := _reduced_side(image, options):
        width, height = (reduced * side // min(image.size) for side in image.size)
        resized = to_rgb(image).resize((width, height), Image.Resampling.BICUBIC)
        resized.save(buffer, "JPEG", quality=options.quality, subsampling="4:2:0")
        return buffer.getvalue(), "jpg", False
    if image.format in _EXTENSION:
        return data, _EXTENSION[image.format], False
    (image if image.mode in _PNG_MODES else to_rgb(image)).save(buffer, "PNG")
    return buffer.getvalue(), "png", True
