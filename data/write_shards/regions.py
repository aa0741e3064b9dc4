"""JPEG files rewritten without loss, so that a part of one can be cut out of it and decoded alone (see data.regions).

The work is done by libjpeg-turbo's jpegtran: same DCT coefficients and metadata, one scan, a restart marker every few
MCUs, Huffman tables for each image. Those tables take 2 ms more to make than the standard ones, once; files are 4%
smaller for it, and decode a little faster. What cannot be rewritten, or not without a doubt, stays as it is.
Check: `pytest tests/test_write_regions.py`.
"""

import re
import shutil
import signal
import subprocess
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data.regions import REGION, describe, frame_header
from repghost.errors import UserError
from repghost.files import atomic_write, file_sha256
from repghost.images import open_image

_TOOL = "jpegtran"
_SECONDS = 300  # for one image; the largest that are taken need two
_REWRITTEN, _LOSSLESS, _ARITHMETIC = (0xC0, 0xC1, 0xC2), 0xC3, 0xC9  # markers of frames (ITU T.81, table B.1)

_OTHER = "JPEG of another kind"
_NAMES = {"WEBP": "WebP"}  # of formats, where PIL's are others
_WHOLE, _NO_SEGMENTS = np.zeros((), REGION), np.zeros(0, "<u2")  # of an image that cannot be cut


def transcoder() -> str:
    """Name and version of the program that rewrites: "jpegtran, libjpeg-turbo 2.1.5 (build 20230203)".

    Raises UserError where it is not installed, or another program of that name is, which may write something else.
    """
    packages = (
        "apt-get install libjpeg-turbo-progs (Debian, Ubuntu), dnf install libjpeg-turbo-utils (Fedora), "
        "brew or conda install libjpeg-turbo"
    )
    if (path := shutil.which(_TOOL)) is None:
        raise UserError(f"--regions needs the program {_TOOL}, which is not installed: {packages}")
    try:
        found = subprocess.run([path, "-version"], stdin=subprocess.DEVNULL, capture_output=True, timeout=_SECONDS)
    except subprocess.TimeoutExpired:
        raise UserError(f"{path}: does not say its version: {packages}") from None
    version = re.search(r"^libjpeg-turbo version (.+)", (found.stdout + found.stderr).decode(errors="replace"), re.M)
    if version is None:
        raise UserError(f"{path}: not the {_TOOL} of libjpeg-turbo, which --regions needs: {packages}")
    return f"{_TOOL}, libjpeg-turbo {version[1].strip()}"


@dataclass(frozen=True)
class Rewritten:
    """A JPEG that can be cut. described: see `data.regions.describe`."""

    content: bytes
    described: tuple[np.ndarray, np.ndarray]


def rewrite(content: bytes) -> Rewritten | str:
    """A JPEG with the same pixels that can be cut, or in a word or two why the image in `content` stays whole.

    Raises DecodeError for what is no image, and UserError when the program does not end, or is ended by others.
    """
    from data.reader import decode  # slow to import, by way of torch

    image_format = open_image(content, decode=False).format or ""
    if image_format != "JPEG":
        return _NAMES.get(image_format, image_format)
    columns = _mcu_columns(content)
    if isinstance(columns, str):
        return columns
    rewritten = _run(content, restart_interval(columns))
    if rewritten is None:
        return "damaged"
    described = describe(rewritten)
    if described is None:
        return _OTHER
    try:
        before, after = decode(content).numpy(), decode(rewritten).numpy()
    except Exception:  # a decoder may raise anything
        return "damaged"
    return Rewritten(rewritten, described) if np.array_equal(before, after) else "other pixels when rewritten"


def _run(content: bytes, interval: int) -> bytes | None:
    """What the program makes of a JPEG; None for a damaged one, of which it makes something, too, and says so."""
    # -copy all: EXIF and its thumbnail, ICC profiles, comments.
    command = [_TOOL, "-copy", "all", "-optimize", "-restart", f"{interval}B"]
    try:
        # A group of its own: else Ctrl-C would end it before this process knows, as if the image were damaged.
        done = subprocess.run(command, input=content, capture_output=True, timeout=_SECONDS, process_group=0)
    except subprocess.TimeoutExpired:
        raise UserError(f"{_TOOL} did not rewrite it within {_SECONDS} s: start the same command again") from None
    if done.returncode < 0:
        name = signal.Signals(-done.returncode).name
        raise UserError(f"{_TOOL} was ended by {name}: start the same command again")
    return None if done.returncode or done.stderr else done.stdout


def restart_interval(columns: int) -> int:
    """MCUs between two restart markers: the divisor of those in a row that is nearest to 4, the smaller one of two.

    They then never cross the end of a row. 1 is no further away than 7.
    """
    return min((count for count in range(1, 7) if columns % count == 0), key=lambda count: (abs(count - 4), count))


def _mcu_columns(content: bytes) -> int | str:
    """MCUs in a row of a JPEG, from its frame header (ITU T.81, B.2.2), or why it is not rewritten."""
    if not (at := frame_header(content)):
        return "damaged"
    marker, components = content[at + 1], content[at + 9]
    if marker not in _REWRITTEN:
        known = {_LOSSLESS: "lossless JPEG"}.get(marker, _OTHER)
        return "arithmetic coding" if marker >= _ARITHMETIC else known
    if components == 4:
        return "CMYK"
    factors = [factor >> 4 for factor in content[at + 11 : at + 10 + 3 * components : 3]]
    columns = -(-int.from_bytes(content[at + 7 : at + 9], "big") // 8)
    # A single component has no larger MCUs, whatever its factors are (A.2.2).
    return -(-columns // max(factors)) if components > 1 and all(factors) else columns


def region_arrays(images: Sequence[tuple[np.ndarray, np.ndarray] | str]) -> dict[str, np.ndarray]:
    """For the record of a shard: regions ([n] of REGION, `start` within the shard) and segments (uint16).

    images: in their order, what `data.regions.describe` says of each, or why it stays whole.
    """
    pairs = [(_WHOLE, _NO_SEGMENTS) if isinstance(image, str) else image for image in images]
    rows = np.array([row for row, _ in pairs], REGION)
    rows["start"] = np.cumsum([0, *(len(segments) for _, segments in pairs)])[:-1]
    return {"regions": rows, "segments": np.concatenate([_NO_SEGMENTS, *(segments for _, segments in pairs)])}


def write_regions(out: Path, split: str, records: Sequence[Path], whole: Iterable[Mapping[str, int]]) -> dict[str, Any]:
    """Writes the two files of `data.regions.Regions` for a split; returns what its manifest says of them.

    records: of its shards, in order, with `region_arrays`. whole: {reason: images that stay whole} of each.
    """
    rows: list[np.ndarray] = []
    count = 0
    for record in records:
        with np.load(record) as found:
            rows.append(found["regions"])
            rows[-1]["start"] += np.uint64(count)
            count += len(found["segments"])
    names = f"{split}.regions.npy", f"{split}.segments.npy"
    with atomic_write(out / names[0]) as file:
        np.save(file, np.concatenate(rows))
    with atomic_write(out / names[1]) as file:  # 0.6 GB for ImageNet, so not all of it at once
        header = {"descr": "<u2", "fortran_order": False, "shape": (count,)}
        np.lib.format.write_array_header_1_0(file, header)
        for record in records:
            with np.load(record) as found:
                file.write(found["segments"].tobytes())
    files = [{"file": name, "bytes": (out / name).stat().st_size, "sha256": file_sha256(out / name)} for name in names]
    counts = sum(map(Counter, whole), Counter())
    return {"files": files, "whole": dict(sorted(counts.items()))}
