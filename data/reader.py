"""The bytes of a sample: read from its shard by offset, checked against the index.

A checksum is the only thing that finds flipped bytes; every decoder passes over them in silence.
"""

import io
import logging
import os
import resource
import zlib
from collections.abc import Iterable, Sequence
from contextlib import suppress

import numpy as np
import torch
import torchvision
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from data.crops import BatchPlan
from data.index import Index
from repghost.errors import UserError
from repghost.images import to_rgb

log = logging.getLogger(__name__)


class BadImage(UserError):
    """One sample that cannot be used; the message names shard, member and cause."""


class ShardReader:
    """Reads samples of `index`; one per process, files are opened on first use."""

    def __init__(self, index: Index) -> None:
        self.index = index
        self._files: dict[int, int] = {}

    def announce(self, rows: Iterable[int]) -> None:
        """Tells the kernel which samples are read next, so that it fetches them side by side."""
        if not hasattr(os, "posix_fadvise"):
            return
        for row in rows:
            sample = self.index.samples[row]
            with suppress(OSError):  # reading will meet it again, and say whose image it is
                os.posix_fadvise(
                    self._file(int(sample["shard"])), int(sample["offset"]), int(sample["size"]), os.POSIX_FADV_WILLNEED
                )

    def read(self, row: int) -> bytes:
        """The bytes of sample `row`; BadImage when they are not those that were indexed."""
        sample = self.index.samples[row]
        size = int(sample["size"])
        try:
            content = os.pread(self._file(int(sample["shard"])), size, int(sample["offset"]))
        except OSError as error:
            raise BadImage(f"{self.index.name(row)}: {error.strerror}") from None
        if len(content) != size:
            raise BadImage(f"{self.index.name(row)}: the shard ends inside this image")
        if zlib.crc32(content) != sample["crc32"]:
            raise BadImage(f"{self.index.name(row)}: its bytes changed since it was indexed (checksum differs)")
        return content

    def _file(self, shard: int) -> int:
        if shard not in self._files:
            self._files[shard] = os.open(self.index.shards[shard], os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        return self._files[shard]


def allow_open_files(count: int) -> None:
    """Raises this process's limit of open files where it is lower than a data set of `count` shards needs."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = count + 512
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return
    if hard != resource.RLIM_INFINITY and hard < wanted:
        raise UserError(f"{count} shards need {wanted} open files, the limit is {hard}: raise it with `ulimit -Hn`")
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


class SkipBudget:
    """The bad images that an epoch may leave out; each is logged."""

    def __init__(self, images: int) -> None:
        self._left = self._images = images

    def spend(self, errors: Sequence[str]) -> None:
        """Takes the bad images of a batch, a line each. Raises BadImage with the first that is too many."""
        for error in errors:
            if not self._left:
                raise BadImage(f"{error} (data.skip_budget allows {self._images} bad image(s) per epoch)")
            self._left -= 1
            log.warning("skipped: %s", error)


def resize(window: Tensor, plan: BatchPlan, row: int, image_size: int) -> Tensor:
    """uint8 [3, S, S] of the window uint8 [3, h, w] that `plan` cuts for a row: resized, and its centre cut out."""
    mode = "bicubic" if plan.bicubic[row] else "bilinear"
    resized = interpolate(window.unsqueeze(0), plan.resized[row].tolist(), mode=mode, antialias=True)
    top, left = plan.corners[row].tolist()
    return resized[0, :, top : top + image_size, left : left + image_size]


def decode(content: bytes) -> Tensor:
    """uint8 [3, H, W] in RGB, as PIL decodes it, EXIF orientation not applied; 16 bits are scaled to 8.

    torchvision is the fast way. It refuses some files that PIL reads (a JPEG without its end marker) and converts
    CMYK in its own way; those go through PIL itself.
    """
    if content[:2] == b"\xff\xd8" and content[-2:] == b"\xff\xd9" and jpeg_components(content) != 4:
        encoded = torch.frombuffer(bytearray(content), dtype=torch.uint8)
        return torchvision.io.decode_jpeg(encoded, torchvision.io.ImageReadMode.RGB)
    with Image.open(io.BytesIO(content)) as image:
        return torch.from_numpy(np.array(to_rgb(image))).permute(2, 0, 1)


def jpeg_components(content: bytes) -> int:
    """Colour components of a JPEG, from its frame header (ITU T.81, B.2.2); 0 when there is none."""
    at = 2
    while at + 9 < len(content) and content[at] == 0xFF:
        marker = content[at + 1]
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            return content[at + 9]
        at += 2 + int.from_bytes(content[at + 2 : at + 4], "big")
    return 0
