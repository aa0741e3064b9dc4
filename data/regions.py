"""The part of a JPEG under a window, as a smaller JPEG: cut out of the file without decoding anything.

With a restart marker every few MCUs (ITU T.81, B.2.4.4), the scan of a JPEG is a list of segments that are decoded
independently of each other. The segments under a window, behind a header that states their size, are a JPEG of their
own. Its pixels are those of the whole image: decoders that interpolate chroma look one pixel over an edge, so there are
two between the window and the edges of what is cut out, unless they are those of the image.

`data.write_shards --regions` makes such files and describes each of them beside the index of its split.
Check: `pytest tests/test_regions.py`.
"""

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
from isal.isal_zlib import crc32

from repghost.errors import UserError

# One row for each image. start: where its numbers begin in the array of segments: the CRC-32 of each row of MCUs in two
# halves, the low one first, then the bytes of each segment without its marker. header: bytes before the scan, with
# the checksum crc32. frame: where in them height and width are. interval: MCUs of a segment, which never cross the end
# of a row; 0 for an image that cannot be cut. mcu_height, mcu_width: pixels.
REGION = np.dtype(
    {
        "names": ["start", "header", "frame", "crc32", "interval", "mcu_height", "mcu_width"],
        "formats": ["<u8", "<u4", "<u4", "<u4", "<u2", "u1", "u1"],
    }
)
MARGIN = 2  # pixels between a window and an inner edge

_SOF0, _SOF1, _SOI, _EOI, _SOS, _DNL, _DRI = 0xC0, 0xC1, 0xD8, 0xD9, 0xDA, 0xDC, 0xDD
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # markers of frame headers of any kind of JPEG
_WITHOUT_LENGTH = frozenset((0x01, *range(0xD0, 0xDA)))


class Changed(ValueError):
    """Bytes that are not those that were described."""


def describe(content: bytes) -> tuple[np.ndarray, np.ndarray] | None:
    """The row (REGION, [], with start 0) and the numbers (uint16 [M]) of a JPEG; None for a file that cannot be cut.

    It can be where it has one scan of one or three components of 8 bits, coded by Huffman's method in one pass, and a
    restart interval that divides its rows. The scan itself is taken to be undamaged, as a transcoder writes it.
    """
    found = _geometry(content)
    if found is None:
        return None
    row, height, width = found
    _, header, _, _, interval, mcu_height, mcu_width = row.item()
    scan = np.frombuffer(content, np.uint8)[header:]
    # In a scan 0xFF is followed by 0 unless it begins a marker.
    markers = np.flatnonzero((scan[:-1] == 0xFF) & (scan[1:] != 0))
    rows, columns = -(-height // mcu_height), -(-width // mcu_width)
    count = rows * columns // interval if columns % interval == 0 else 0
    if len(markers) != count or markers[-1] + 2 != len(scan) or scan[markers[-1] + 1] != _EOI:
        return None
    if (scan[markers[:-1] + 1] != 0xD0 + np.arange(count - 1) % 8).any():
        return None
    lengths = np.diff(markers, prepend=-2) - 2
    if lengths.max() > 0xFFFF or lengths.min() < 0:
        return None
    ends = [header, *(header + 2 + markers[columns // interval - 1 :: columns // interval])]
    checksums = [crc32(content[start:end]) for start, end in pairwise(ends)]
    return row, np.concatenate([np.array(checksums, "<u4").view("<u2"), lengths.astype("<u2")])


def frame_header(content: bytes | bytearray) -> int:
    """Where the marker of the frame header of a JPEG is (ITU T.81, B.2.2); 0 when there is none."""
    at = 2
    while at + 9 < len(content) and content[at] == 0xFF:
        marker = content[at + 1]
        if marker in _FRAMES:
            return at
        at += 1 if marker == 0xFF else 2 + int.from_bytes(content[at + 2 : at + 4], "big")  # 0xFF: a fill byte
    return 0


def _geometry(content: bytes) -> tuple[np.ndarray, int, int] | None:
    """The row, height and width that the header tells; None for anything but a JPEG that could be cut."""
    at, frame, components, interval = 2, 0, 0, 0
    if content[:2] != bytes((0xFF, _SOI)):
        return None
    while at + 4 <= len(content) and content[at] == 0xFF:
        marker = content[at + 1]
        if marker == 0xFF:  # a fill byte
            at += 1
            continue
        if marker in _WITHOUT_LENGTH or marker in (0, _DNL):
            return None
        end = at + 2 + int.from_bytes(content[at + 2 : at + 4], "big")
        if end > len(content):
            return None
        if marker in _FRAMES:
            components = content[at + 9] if end - at > 9 else 0
            if frame or marker not in (_SOF0, _SOF1) or components not in (1, 3) or end != at + 10 + 3 * components:
                return None
            if content[at + 4] != 8:
                return None
            frame = at + 5
        elif marker == _DRI:
            interval = int.from_bytes(content[at + 4 : end], "big")
        elif marker == _SOS:
            if not frame or not interval or content[at + 4] != components:
                return None
            return _measured(content, end, frame, components, interval)
        at = end
    return None


def _measured(
    content: bytes, header: int, frame: int, components: int, interval: int
) -> tuple[np.ndarray, int, int] | None:
    """What `_geometry` returns, once it knows where everything is."""
    height, width = struct.unpack_from(">HH", content, frame)
    factors = [content[frame + 6 + 3 * i] for i in range(components)]
    across, down = max(factor >> 4 for factor in factors), max(factor & 15 for factor in factors)
    if components == 1:  # then a block is an MCU, whatever the factors are (A.2.2)
        across = down = 1
    if not (height and width and 1 <= across <= 4 and 1 <= down <= 4 and interval <= 0xFFFF):
        return None
    row = np.array((0, header, frame, crc32(content[:header]), interval, 8 * down, 8 * across), REGION)
    return row, height, width


@dataclass(frozen=True)
class Cut:
    """What has to be read of a file for a window, and what is made of it.

    header, frame, crc32: see REGION. offset, size: of the rows of segments, in the file. window: (top, left, height,
    width) of its pixels in those of the image.
    """

    header: int
    frame: int
    crc32: int
    offset: int
    size: int
    window: tuple[int, int, int, int]
    checksums: np.ndarray  # of each row of segments
    lengths: np.ndarray  # int64 [rows, columns] of segments, markers included
    first: int  # the first column of segments that is kept, and the one behind the last
    last: int

    def make(self, header: bytes, rows: bytes) -> bytearray:
        """The JPEG, from the first `header` bytes of the file and the `size` bytes from `offset` on.

        Raises Changed where the bytes of either are not those that were described.
        """
        if crc32(header) != self.crc32:
            raise Changed
        ends = self.lengths.cumsum().reshape(self.lengths.shape)
        begins = ends[:, self.first] - self.lengths[:, self.first]
        of_rows = (part.tolist() for part in (self.checksums, begins, ends[:, self.last - 1], ends[:, -1]))
        view, start, kept = memoryview(rows), 0, []
        for checksum, first, last, end in zip(*of_rows, strict=True):
            if crc32(view[start:end]) != checksum:
                raise Changed
            kept.append(view[first:last])
            start = end
        made = bytearray().join((header, *kept))
        struct.pack_into(">HH", made, self.frame, *self.window[2:])
        numbers = np.frombuffer(made, np.uint8)
        markers = self.lengths[:, self.first : self.last].cumsum() + (len(header) - 1)
        if (numbers[markers - 1] != 0xFF).any() or (numbers[markers] & 0xF0 != 0xD0).any():
            raise Changed  # lengths that add up, but are not those of the segments
        numbers[markers] = 0xD0 + (np.arange(len(markers)) & 7)
        numbers[markers[-1]] = _EOI
        return made


@dataclass(frozen=True)
class Regions:
    """The regions of a split, in two files beside its index, which are mapped: the processes of a machine share them.

    rows: .npy of REGION [N]. segments: .npy of uint16, the numbers of all images.
    """

    rows_file: str
    segments_file: str

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.rows_file, self.segments_file)  # not what is mapped

    @cached_property
    def rows(self) -> np.ndarray:
        return _mapped(self.rows_file, REGION)

    @cached_property
    def segments(self) -> np.ndarray:
        return _mapped(self.segments_file, np.dtype("<u2"))

    def require(self, samples: np.ndarray) -> None:
        """Raises UserError unless these are the regions of `samples`, [N] of data.tars.SAMPLE."""
        if len(self.rows) != len(samples):
            raise UserError(
                f"{self.rows_file}: {len(self.rows)} images, but the index has {len(samples)}: copy both again"
            )
        rows = np.array(self.rows)
        can = rows["interval"] > 0
        high, wide = (np.maximum(rows[f"mcu_{side}"], 1).astype(np.int64) for side in ("height", "width"))
        down = -(-samples["height"].astype(np.int64) // high)
        segments = down * -(-samples["width"].astype(np.int64) // wide) // np.maximum(rows["interval"], 1)
        last = rows["start"].astype(np.int64) + 2 * down + segments
        wrong = can & (
            (rows["start"] >= len(self.segments)) | (last > len(self.segments)) | (rows["header"] >= samples["size"])
            | (rows["frame"] + 4 > rows["header"]) | (rows["mcu_height"] == 0) | (rows["mcu_width"] == 0)
        )  # fmt: skip
        if wrong.any():
            raise UserError(f"{self.rows_file}: image {wrong.argmax()} lies outside of its files: copy them again")

    def cut(self, row: int, height: int, width: int, window: Sequence[int]) -> Cut | None:
        """How to cut `window` (top, left, height, width) out of the file of image `row`, whose size is given in pixels.

        None for an image that is to be decoded whole.
        """
        start, header, frame, crc32, interval, mcu_height, mcu_width = self.rows[row].item()
        if not interval:
            return None
        segment_width = interval * mcu_width
        rows, columns = -(-height // mcu_height), -(-width // mcu_width) // interval
        top, bottom = max(0, window[0] - MARGIN) // mcu_height, window[0] + window[2] + MARGIN
        first, right = max(0, window[1] - MARGIN) // segment_width, window[1] + window[3] + MARGIN
        bottom, last = min(rows, -(-bottom // mcu_height)), min(columns, -(-right // segment_width))
        if width - first * segment_width < mcu_width:  # decoders do not interpolate in a very narrow image
            first = max(0, first - 1)
        begin = start + 2 * rows
        lengths = np.array(self.segments[begin : begin + bottom * columns], np.int64).reshape(bottom, columns) + 2
        offset, lengths = header + int(lengths[:top].sum()), lengths[top:]
        checksums = np.array(self.segments[start + 2 * top : start + 2 * bottom]).view("<u4")
        y, x = top * mcu_height, first * segment_width
        return Cut(
            header=header,
            frame=frame,
            crc32=crc32,
            offset=offset,
            size=int(lengths.sum()),
            window=(y, x, min(height, bottom * mcu_height) - y, min(width, last * segment_width) - x),
            checksums=checksums,
            lengths=lengths,
            first=first,
            last=last,
        )


def _mapped(file: str, dtype: np.dtype) -> np.ndarray:
    try:
        found = np.load(file, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{file}: cannot be read ({error}): copy it again or write the shards again") from None
    if found.dtype != dtype or found.ndim != 1:
        raise UserError(f"{file}: not what it should be, but {found.dtype} {list(found.shape)}: copy it again")
    return found.view(np.ndarray)  # of which slices are made in a fraction of the time
