"""Shards as tar files: their samples by offset, and everything that can be wrong with a tar."""

import io
import os
import re
import tarfile
import warnings
import zlib
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, UnidentifiedImageError

from data.parallel import check_stop
from repghost.errors import UserError

# One row for each sample, 32 bytes. height and width are as stored (EXIF orientation is not applied).
SAMPLE = np.dtype(
    [
        ("offset", "<i8"),
        ("shard", "<u4"),
        ("size", "<u4"),
        ("height", "<u4"),
        ("width", "<u4"),
        ("crc32", "<u4"),
        ("label", "<i4"),
    ]
)
IMAGE_MEMBERS = frozenset({"jpg", "jpeg", "png", "webp"})
# webdataset's rule: the key ends at the first dot of the file name.
_MEMBER = re.compile(r"((?:.*/)?[^./]+)\.([^/]+)", re.DOTALL)
_COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")  # gzip, bzip2, xz, zstandard
_MAX_LONG_NAME_BLOCKS = 16
# What tarfile raises on damaged headers: sizes that no file or memory has, words for numbers.
TAR_DAMAGE = (tarfile.TarError, ValueError, OverflowError, MemoryError, OSError)


class DecodeError(ValueError):
    """Bytes that PIL does not decode; the message is the reason, on one line."""


def open_image(data: bytes, decode: bool) -> Image.Image:
    """The image in `data`, header only or fully decoded. Raises DecodeError, also for decompression bombs."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # remarks about odd EXIF data
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(data))
            if decode:
                image.load()
            return image
    except UnidentifiedImageError:
        raise DecodeError("not an image in a known format") from None
    except MemoryError:
        raise
    except Exception as error:  # PIL's decoders raise anything on damaged data
        raise DecodeError(" ".join(f"{type(error).__name__}: {error}".split())) from None


def member_name(path: str | Path, offset: int) -> str:
    """Name of the tar member whose data begin at `offset`.

    Its header is the block before. A long name (GNU or PAX) stands in blocks before that one; they belong to
    this member if a tar that is read from there begins with a member whose data are at `offset`. Always a name that
    can be printed, for it ends in messages.
    """
    block = tarfile.BLOCKSIZE
    try:
        file = open(path, "rb")  # noqa: SIM115 - closed below; only a failure to open it is caught here
    except OSError as error:
        return f"(image at byte {offset}: {error.strerror})"
    with file:
        for blocks in (*range(3, _MAX_LONG_NAME_BLOCKS), 1):
            start = offset - blocks * block
            if start < 0:
                continue
            file.seek(start)
            try:
                member = tarfile.TarFile(fileobj=file).next()
            except TAR_DAMAGE:
                continue
            if member is not None and member.offset_data == offset:
                return printable(member.name)
    return f"(no tar header before byte {offset})"


def printable(name: str) -> str:
    """`name` on one line and in characters that every stream takes: others are escaped as in a Python string."""
    return name if name.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in name)


def scan_shard(path: str) -> tuple[np.ndarray, list[str]]:
    """[n] of SAMPLE (with shard 0) and the n keys of one tar, in the order of the image members.

    Every byte is read once for the checksum; of the images only the headers are parsed. Members that are
    neither an image nor a label are ignored.
    """
    images: dict[str, tuple[int, int, int, int, int]] = {}
    labels: dict[str, int] = {}
    with open(path, "rb") as file:
        start, end = file.read(8), os.fstat(file.fileno()).st_size
        if start.startswith(_COMPRESSED):
            raise UserError(f"{path}: compressed, so samples cannot be read by offset: unpack it to a plain .tar")
        file.seek(0)
        try:
            with tarfile.open(fileobj=file, mode="r:") as tar:
                for member in tar:
                    # Sizes are checked before memory is taken for them; a negative one would lead back for ever.
                    if not 0 <= member.size <= end - member.offset_data:
                        raise UserError(f"{path}: truncated or damaged in {printable(member.name)}: copy it again")
                    match = _MEMBER.fullmatch(printable(member.name))
                    if match is None or not member.isreg() or member.issparse():
                        continue
                    key, extension = match[1], match[2].lower()
                    if extension == "cls":
                        if key in labels:
                            raise UserError(f"{path}: key {key} is there twice")
                        labels[key] = _label(path, key, _data(tar, member))
                    elif extension in IMAGE_MEMBERS:
                        if key in images:
                            raise UserError(f"{path}: key {key} is there twice")
                        images[key] = _describe(path, member, _data(tar, member))
                check_tar_end(path, file, tar, end)
        except UserError:
            raise
        except TAR_DAMAGE as error:
            reason = printable(str(error)) or type(error).__name__
            raise UserError(f"{path}: damaged or not a tar ({reason}): copy it again") from None
    for key in images:
        if key not in labels:
            raise UserError(f"{path}: key {key} has an image but no .cls")
    for key in labels:
        if key not in images:
            raise UserError(f"{path}: key {key} has a .cls but no image ({', '.join(sorted(IMAGE_MEMBERS))})")
    rows = np.zeros(len(images), SAMPLE)
    for i, (key, (offset, size, height, width, crc32)) in enumerate(images.items()):
        rows[i] = (offset, 0, size, height, width, crc32, labels[key])
    return rows, list(images)


def _data(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    check_stop()
    file = tar.extractfile(member)
    assert file is not None, "a regular member"
    return file.read()


def _label(path: str, key: str, data: bytes) -> int:
    if not re.fullmatch(rb"\s*[+-]?[0-9]{1,9}\s*", data):
        raise UserError(f"{path}: the .cls of key {key} is {data[:20]!r}, not a class number")
    if int(data) < 0:
        raise UserError(f"{path}: key {key} has the label {int(data)}: labels count from 0")
    return int(data)


def _describe(path: str, member: tarfile.TarInfo, data: bytes) -> tuple[int, int, int, int, int]:
    try:
        width, height = open_image(data, decode=False).size
    except DecodeError as error:
        raise UserError(f"{path}: {printable(member.name)}: {error}") from None
    return member.offset_data, member.size, height, width, zlib.crc32(data)


def check_tar_end(path: str, file: BinaryIO, tar: tarfile.TarFile, end: int | None = None) -> None:
    """A tar ends in zero blocks; tarfile takes the end of the file, or garbage, for the end as well.

    With `end`, nothing else may stand before that byte: there are samples behind a hole, or behind the end of the
    first of two tars in one file, that nobody would miss.
    """
    file.seek(tar.offset)
    if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        raise UserError(f"{path}: truncated or damaged after byte {tar.offset}: copy it again")
    while end is not None and file.tell() < end:
        rest = file.read(min(2**20, end - file.tell()))
        if rest.count(0) < len(rest):
            raise UserError(f"{path}: its tar ends at byte {tar.offset}, but there is more: copy it again")
