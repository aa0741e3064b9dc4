"""The bytes of a sample: read from its shard by offset, checked against the index.

A checksum is the only thing that finds flipped bytes; every decoder passes over them in silence.
"""

import logging
import os
import resource
import zlib
from collections.abc import Iterable, Sequence
from contextlib import suppress

from data.index import Index
from repghost.errors import UserError

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
