"""From a shard to the pixels of a sample: read by offset, cut, checked against the index, decoded, resized.

A checksum is the only thing that finds flipped bytes; decoders do not notice them.
Check: `pytest tests/test_loader.py tests/test_faults.py`.
"""

import io
import logging
import os
import resource
import time
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from contextlib import suppress
from dataclasses import dataclass
from itertools import repeat
from typing import Generic, NamedTuple, TypeVar

import numpy as np
import torch
import torchvision
from isal.isal_zlib import crc32
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from data.crops import BatchCrops
from data.index import Index
from data.regions import Changed, Cut, frame_header
from data.tars import why_unreadable
from repghost.errors import UserError, printable
from repghost.images import FORMATS, to_rgb

log = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class LoaderOptions:
    """What both loaders take beside their crops; as a string, how many threads and processes there are of which loader.

    workers: processes (torch) or threads (DALI) that decode. prefetch: batches that each process, or DALI, is ahead.
    loader: `torch` or `dali`, for which they are meant.
    readers: processes that read for DALI; 0 reads in a thread. hw_decoder_load, thread_affinity: the share of a batch
    that a GPU's JPEG decoder takes, and whether the threads that decode for a GPU keep to the cores of its socket; both
    as DALI's own defaults. pin_memory: of what is not on the GPU. start: called when an epoch is entered, returns the
    (epoch, batch) to begin at. skip_bad: bad images per epoch that are masked and logged; one more ends the epoch with
    its error. ranks: on this machine, each with such a loader; they share its memory.
    """

    workers: int
    prefetch: int
    loader: str = "torch"
    readers: int = 0
    hw_decoder_load: float = 0.65
    thread_affinity: bool = True
    pin_memory: bool = False
    start: Callable[[], tuple[int, int]] = lambda: (0, 0)
    skip_bad: int = 0
    ranks: int = 1

    def __str__(self) -> str:
        if self.loader == "torch" and not self.workers:
            return "torch, in the training process"
        decoding = _count(max(1, self.workers), "thread" if self.loader == "dali" else "worker")
        reading = f" and {_count(self.readers, 'reader')}" if self.readers else ""
        return f"{self.loader}, {decoding}{reading} per rank, prefetch {self.prefetch}"


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


class BadImage(UserError):
    """One sample that cannot be used; the message names shard, member and cause."""


class Piece(NamedTuple):
    """An image file that holds the part of a sample that a crop needs: the stored one, or one cut out of it.

    top, left: of its first pixel in the stored image.
    """

    content: bytes | bytearray
    top: int = 0
    left: int = 0


class ShardReader:
    """Reads samples of `index`; one per process, files are opened on first use."""

    def __init__(self, index: Index) -> None:
        self.index = index
        self._files: dict[int, io.FileIO] = {}  # closed with the reader

    def load(
        self, crops: BatchCrops, load: Callable[[int, int, Piece], T], missing: T
    ) -> tuple[list[T], np.ndarray, list[str]]:
        """The items of a batch, its labels (int64 [N]), and a line for each bad image.

        load: called with row, sample and its file, returns an item or raises BadImage. A row without an image has
        `missing` and the label -1.
        """
        samples = crops.samples.tolist()
        cuts = [self._cut(*one) for one in zip(samples, crops.parts.tolist(), strict=False)]  # no sample: padding
        self.readahead(samples, cuts)
        items, labels = [missing] * len(crops.positions), np.full(len(crops.positions), -1)
        errors: list[str] = []
        for row, (sample, cut) in enumerate(zip(samples, cuts, strict=True)):
            try:
                piece = Piece(self.read(sample)) if cut is None else self._read_cut(sample, cut)
                items[row] = load(row, sample, piece)
                labels[row] = self.index.samples["label"][sample]
            except BadImage as error:
                errors.append(str(error))
        return items, labels, errors

    def _cut(self, row: int, part: Sequence[int]) -> Cut | None:
        """How to cut `part` (top, left, height, width) out of sample `row`; None for one that is read whole."""
        if self.index.regions is None:
            return None
        sample = self.index.samples[row]
        return self.index.regions.cut(row, int(sample["height"]), int(sample["width"]), part)

    def readahead(self, samples: Iterable[int], cuts: Iterable[Cut | None] = repeat(None)) -> None:
        """Tells the kernel what of the samples is read next, so that it fetches them side by side."""
        for row, cut in zip(samples, cuts, strict=False):
            shard, offset, size = (int(self.index.samples[row][name]) for name in ("shard", "offset", "size"))
            if cut is not None:  # the header is small, and mostly in a page that is fetched as well
                offset, size = offset + cut.offset, cut.size
            # macOS has no such call; reading will meet any other error again, and say whose image it is.
            with suppress(OSError, AttributeError):
                os.posix_fadvise(self._file(shard), offset, size, os.POSIX_FADV_WILLNEED)

    def read(self, row: int) -> bytes:
        """The bytes of sample `row`; BadImage when they are not those that were indexed."""
        sample = self.index.samples[row]
        content = self._read(row, 0, int(sample["size"]))
        if crc32(content) != sample["crc32"]:
            raise BadImage(f"{self.index.name(row)}: its bytes changed since it was indexed (checksum differs)")
        if not sample["height"]:
            raise BadImage(f"{self.index.name(row)}: {why_unreadable(content)}")
        return content

    def _read_cut(self, row: int, cut: Cut) -> Piece:
        """What `cut` leaves of the file of sample `row`; BadImage when its bytes are not those that were indexed."""
        header, rows = self._read(row, 0, cut.header), self._read(row, cut.offset, cut.size)
        try:
            return Piece(cut.make(header, rows), *cut.window[:2])
        except Changed:
            raise BadImage(
                f"{self.index.name(row)}: its bytes changed since it was indexed (checksum differs)"
            ) from None

    def _read(self, row: int, start: int, size: int) -> bytes:
        """`size` bytes of the file of sample `row`, from its byte `start` on."""
        sample = self.index.samples[row]
        try:
            content = os.pread(self._file(int(sample["shard"])), size, int(sample["offset"]) + start)
        except OSError as error:
            raise BadImage(f"{self.index.name(row)}: {error.strerror}") from None
        if len(content) != size:
            raise BadImage(f"{self.index.name(row)}: the shard ends inside this image")
        return content

    def decode(self, row: int, content: bytes | bytearray) -> Tensor:
        """`decode` of the bytes of sample `row`; BadImage when they do not decode."""
        try:
            return decode(content)
        except Exception as error:  # a decoder may raise anything; the cause goes into the one line
            raise BadImage(f"{self.index.name(row)}: {error}") from None

    def _file(self, shard: int) -> int:
        if shard not in self._files:
            self._files[shard] = io.FileIO(self.index.shards[shard])
        return self._files[shard].fileno()


def allow_open_files(count: int) -> None:
    """Raises this process's limit of open files where it is lower than a data set of `count` shards needs."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = count + 512
    if soft != resource.RLIM_INFINITY and soft < wanted:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        except ValueError:
            need = f"{count} shards need {wanted} open files, the limit is {hard}"
            raise UserError(f"{need}: raise it with `ulimit -Hn`") from None


class EpochLoader(Sized, Generic[T]):
    """What both loaders are: the batches of an epoch from `options.start` on; the length is that of a full epoch.

    `seconds_waited` is how long its user has waited for batches. Every bad image is logged; the first one beyond the
    `options.skip_bad` of an epoch ends it with a BadImage.
    """

    options: LoaderOptions
    seconds_waited = 0.0

    def _batches(self, epoch: int, first: int) -> Iterator[tuple[T, list[str]]]:
        """The batches of an epoch from `first` on, each with a line for each of its bad images."""
        raise NotImplementedError

    def __iter__(self) -> Iterator[T]:
        epoch, first = self.options.start()
        allowed = left = self.options.skip_bad
        begun = time.perf_counter()
        for batch, errors in self._batches(epoch, first % len(self)):
            self.seconds_waited += time.perf_counter() - begun
            for error in errors:
                if not left:
                    raise BadImage(f"{error} (data.skip_budget allows {allowed} bad image(s) per epoch)")
                left -= 1
                log.warning("skipped: %s", printable(error))
            yield batch
            begun = time.perf_counter()
        self.seconds_waited += time.perf_counter() - begun


def part_of(image: Tensor, piece: Piece, crops: BatchCrops, row: int) -> Tensor:
    """The window of a row, or as much of it as it needs, in what its file was decoded to: uint8 [H, W, 3] to [h, w, 3].

    All of the window where it is there: to resize a part of it, the part has to be copied.
    """
    top, left, height, width = (crops.windows[row] - (piece.top, piece.left, 0, 0)).tolist()
    if min(top, left) < 0 or top + height > image.shape[0] or left + width > image.shape[1]:
        top, left, height, width = (crops.parts[row] - (piece.top, piece.left, 0, 0)).tolist()
    return image[top : top + height, left : left + width]


def resize(part: Tensor, crops: BatchCrops, row: int) -> Tensor:
    """uint8 [S, S, 3] of what was decoded for a row, uint8 [h, w, 3]: its window resized, and the centre cut out.

    Three values of a pixel side by side are what torch resizes fastest, and decoders give.
    """
    window, mode = part, "bicubic" if crops.bicubic[row] else "bilinear"
    top, left, height, width = crops.windows[row].tolist()
    if part.shape[:2] != (height, width):  # nothing reads the pixels around it
        window = part.new_empty(height, width, 3)
        top, left = crops.parts[row, 0] - top, crops.parts[row, 1] - left
        window[top : top + part.shape[0], left : left + part.shape[1]] = part
    # In this order of calls: torch goes by the strides, and would take channels_last for something else.
    image = window.contiguous().unsqueeze(0).permute(0, 3, 1, 2)
    resized = interpolate(image, crops.sizes[row].tolist(), mode=mode, antialias=True)[0].permute(1, 2, 0)
    top, left = crops.corners[row].tolist()
    return resized[top : top + crops.image_size, left : left + crops.image_size]


def decode(content: bytes | bytearray) -> Tensor:
    """uint8 [3, H, W] in RGB, as PIL decodes it, EXIF orientation not applied; 16 bits are scaled to 8.

    torchvision is the fast way. It refuses some files that PIL reads (a JPEG without its end marker) and converts
    CMYK in its own way; those go through PIL itself.
    """
    if plain_jpeg(content):
        writable = content if isinstance(content, bytearray) else bytearray(content)
        encoded = torch.frombuffer(writable, dtype=torch.uint8)
        return torchvision.io.decode_jpeg(encoded, torchvision.io.ImageReadMode.RGB)
    with Image.open(io.BytesIO(content), formats=FORMATS) as image:
        return torch.from_numpy(np.array(to_rgb(image))).permute(2, 0, 1)


def plain_jpeg(content: bytes | bytearray) -> bool:
    """Whether it is a JPEG that all decoders agree on: with its end marker, without a fourth colour component."""
    whole = content[:2] == b"\xff\xd8" and content[-2:] == b"\xff\xd9"
    return whole and not ((at := frame_header(content)) and content[at + 9] == 4)
