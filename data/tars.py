"""Shards as tar files: their samples by offset, and everything that can be wrong with a tar.

Check: `pytest tests/test_index.py tests/test_faults.py`.
"""

import logging
import os
import re
import tarfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from isal.isal_zlib import crc32

from data.parallel import check_stop
from repghost.errors import UserError, printable
from repghost.images import FILE_BYTES, DecodeError, open_image

log = logging.getLogger(__name__)

# One row for each sample, 32 bytes. height and width are as stored (EXIF orientation is not applied); both are 0 for a
# member of a foreign shard that is named like an image and cannot be opened as one: a bad image, known from the start.
SAMPLE = np.dtype(
    {"names": ["offset", "shard", "size", "height", "width", "crc32", "label"], "formats": ["<i8", *5 * ["<u4"], "<i4"]}
)
LABEL_BYTES = 1000  # of a class number, which has nine digits
IMAGE_MEMBERS = ("jpg", "jpeg", "png", "webp")
# webdataset's rule: the key ends at the first dot of the file name.
_MEMBER = re.compile(r"((?:.*/)?[^./]+)\.([^/]+)", re.DOTALL)
_COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")  # gzip, bzip2, xz, zstandard
# What tarfile raises on damaged headers: sizes that no file or memory has, words for numbers.
TAR_DAMAGE = (tarfile.TarError, ValueError, OverflowError, MemoryError, OSError)


def member_names(path: str | Path) -> dict[int, str]:
    """{offset of its data: name} of the members of a tar, as far as its headers can be read."""
    names: dict[int, str] = {}
    with suppress(*TAR_DAMAGE), tarfile.open(path, "r:") as tar:
        for member in tar:
            if member.size < 0:  # would lead back for ever
                break
            names[member.offset_data] = member.name
    return names


def member_name(names: Mapping[int, str], offset: int) -> str:
    """Name of the member whose data begin at `offset`, for a message."""
    return printable(names[offset]) if offset in names else f"(no tar header before byte {offset})"


def scan_shard(path: str) -> tuple[np.ndarray, list[str]]:
    """[n] of SAMPLE (with shard 0) and the n keys of one tar, in the order of the image members.

    Every byte is read once for the checksum; of the images only the headers are parsed. One that cannot be opened has
    height and width 0. Members that are neither an image nor a label are ignored.
    """
    images, labels = _scan(path, "cls", _label)
    return np.array([(*row, labels[key]) for key, row in images.items()], SAMPLE), list(images)


def scan_annotated(path: str) -> tuple[np.ndarray, np.ndarray]:
    """[n] and [n] of SAMPLE: the images of one tar as `scan_shard` tells them, and the .json member of each.

    The label of all is -1; height and width of a .json member are 1.
    """
    images, records = _scan(path, "json", _locate)
    rows = [[(*members[key], -1) for key in images] for members in (images, records)]
    return np.array(rows[0], SAMPLE), np.array(rows[1], SAMPLE)


def _scan(path: str, beside: str, read_beside: Callable[..., Any]) -> tuple[dict[str, tuple[int, ...]], dict[str, Any]]:
    """By key, what `_describe` makes of the image members of a tar, and `read_beside` of those called KEY.`beside`."""
    images: dict[str, tuple[int, ...]] = {}
    others: dict[str, Any] = {}
    kinds: dict[str, tuple[dict[str, Any], Callable[..., Any]]] = dict.fromkeys(IMAGE_MEMBERS, (images, _describe))
    kinds[beside] = others, read_beside
    with open(path, "rb") as file:
        start, end = file.read(8), os.fstat(file.fileno()).st_size
        if start.startswith(_COMPRESSED):
            raise UserError(f"{path}: compressed, so samples cannot be read by offset: unpack it to a plain .tar")
        file.seek(0)
        with open_tar(path, file, end) as tar:
            for member in tar:
                # Sizes are checked before memory is taken for them; a negative one would lead back for ever.
                if not 0 <= member.size <= end - member.offset_data:
                    raise UserError(f"{path}: truncated or damaged in {printable(member.name)}: copy it again")
                match = _MEMBER.fullmatch(printable(member.name))
                if match is None or not member.isreg() or member.issparse():
                    continue
                key, extension = match[1], match[2].lower()
                if extension not in kinds:
                    continue
                if member.size > (LABEL_BYTES if extension == "cls" else FILE_BYTES):
                    raise UserError(f"{path}: {printable(member.name)} has {member.size:,} bytes: too large")
                check_stop()
                found, read = kinds[extension]
                if key in found:
                    raise UserError(f"{path}: key {key} is there twice")
                found[key] = read(path, member, os.pread(file.fileno(), member.size, member.offset_data))
    if lonely := min(images.keys() ^ others.keys(), default=None):
        kind = f".{beside}"
        what = f"an image but no {kind}" if lonely in images else f"a {kind} but no image ({', '.join(IMAGE_MEMBERS)})"
        raise UserError(f"{path}: key {lonely} has {what}")
    return images, others


def _label(path: str, member: tarfile.TarInfo, data: bytes) -> int:
    if not re.fullmatch(rb"\s*\+?[0-9]{1,9}\s*", data):
        raise UserError(f"{path}: {printable(member.name)} is {data[:20]!r}, not a class number (0, 1, 2 ...)")
    return int(data)


def _locate(path: str, member: tarfile.TarInfo, data: bytes) -> tuple[int, ...]:
    """A row of SAMPLE without the label, for a member that is no image."""
    return member.offset_data, 0, member.size, 1, 1, crc32(data)


def _describe(path: str, member: tarfile.TarInfo, data: bytes) -> tuple[int, ...]:
    """A row of SAMPLE without the label."""
    try:
        width, height = open_image(data, decode=False).size
    except DecodeError:
        width = height = 0
    return member.offset_data, 0, member.size, height, width, crc32(data)


def report_unreadable(shards: Sequence[str], samples: np.ndarray) -> None:
    """Warns of the images in `samples` ([N] of SAMPLE) that cannot be opened; UserError when all are such."""
    bad = np.flatnonzero(samples["height"] == 0)
    if not len(bad):
        return
    first = samples[bad[0]]
    shard, offset = shards[first["shard"]], int(first["offset"])
    name = f"{printable(shard)}: {member_name(member_names(shard), offset)}"
    if len(bad) == len(samples):
        with open(shard, "rb") as file:
            reason = why_unreadable(os.pread(file.fileno(), int(first["size"]), offset))
        raise UserError(f"{name}: {reason}; nor is there any other image that can be opened")
    log.warning("%d of %d images cannot be opened, the first is %s", len(bad), len(samples), name)


def why_unreadable(data: bytes) -> str:
    """Why an image whose height and width are 0 in the index cannot be used."""
    try:
        open_image(data, decode=False)
    except DecodeError as error:
        return str(error)
    return "could not be opened when it was indexed"


@contextmanager
def open_tar(path: str, file: BinaryIO, end: int | None = None) -> Iterator[tarfile.TarFile]:
    """The tar that begins where `file` is. Damage, also in what is read from it, is a UserError that names `path`.

    So is one that does not end in zero blocks; tarfile also stops silently at garbage or a truncated file. end: up to
    this byte there may be nothing but zeros, so that no sample is lost behind a hole or in a second tar.
    """
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            yield tar
            file.seek(tar.offset)
            if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise UserError(f"{path}: truncated or damaged after byte {tar.offset}: copy it again")
            while end is not None and file.tell() < end:
                rest = file.read(min(2**20, end - file.tell()))
                if rest.count(0) < len(rest):
                    raise UserError(f"{path}: its tar ends at byte {tar.offset}, but there is more: copy it again")
    except UserError:
        raise
    except TAR_DAMAGE as error:
        reason = printable(str(error)) or type(error).__name__
        raise UserError(f"{path}: damaged or not a tar ({reason}): copy it again") from None


def read_rows(path: Path, sizes: Sequence[int], scanned: bool = False) -> np.ndarray:
    """[N] of SAMPLE from the file of an index, each row within its shard.

    sizes: bytes of each shard. scanned: by scan_shard, so that there may be images that cannot be opened.
    """
    try:
        with open(path, "rb") as file:
            rows = np.lib.format.read_array(file)
    except ValueError as error:
        raise UserError(f"{path}: damaged ({printable(str(error))}): remove it and make it again") from None
    if rows.dtype != SAMPLE or rows.ndim != 1 or not len(rows):
        raise UserError(f"{path}: not an index of images, but {rows.dtype} {list(rows.shape)}")
    last = np.array([*sizes, -1])[np.minimum(rows["shard"], len(sizes))] - rows["size"]  # -1: there is no such shard
    empty = (rows["height"] == 0) | (rows["width"] == 0)
    wrong = (rows["offset"] < 0) | (rows["offset"] > last) | (empty & (not scanned))
    if wrong.any():
        what = f"image {wrong.argmax()} has no pixels or lies outside of its shard"
        raise UserError(f"{path}: {what}: remove it and make it again")
    return rows
