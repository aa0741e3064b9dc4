"""The encoded files of batch after batch, which DALI decodes: read in this process, or ahead by processes of their own.

In the training process, reading and checksums take the interpreter's lock from the thread that keeps the GPU busy;
reader processes spare it 4 ms a batch of 128 images. They put files into memory that they share with this process. It
is no part of /dev/shm, so its size does not matter, and their pipes have no names, so TMPDIR may be long.
Check: `pytest tests/test_dali_loader.py`, `python benchmarks/thread_time.py`.
"""

import io
import mmap
import os
import pickle
import signal
import threading
import traceback
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from multiprocessing import get_context, reduction, resource_tracker
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import torch
from PIL import Image

from data.crops import BatchCrops, Crops
from data.parallel import end_with_parent
from data.reader import Piece, ShardReader, plain_jpeg
from repghost.errors import UserError
from repghost.training.signals import SIGNALS, end_workers_at_exit

Content = bytes | bytearray | memoryview

_BLACK: bytes | bytearray = b"P6 1 1 255\n\0\0\0"  # an image of one black pixel, where there is none


@dataclass(frozen=True)
class EncodedBatch:
    """One batch as it was read.

    crops: their parts are what DALI cuts out. files: of every row, as DALI can decode it. starts: int64 [N, 2] of (top,
    left), where the part begins in the file's image. labels: int64 [N], -1 for a row without an image. errors: a line
    for each bad image. slot: of a ReaderPool, which holds the files.
    """

    crops: BatchCrops
    files: Sequence[Content]
    starts: np.ndarray
    labels: np.ndarray
    errors: list[str]
    slot: int = -1


class BatchReader:
    """Reads batches, counted over all epochs, in this process.

    whole_windows: whether all of a window is decoded, not only the part of it that the output is computed from.
    """

    def __init__(self, crops: Crops, whole_windows: bool) -> None:
        self._crops, self._whole_windows = crops, whole_windows
        self._reader = ShardReader(crops.index)

    def read(self, iteration: int, decoded: bool) -> EncodedBatch:
        """Batch `iteration`. decoded: with the pixels of every image instead of its file."""
        crops = self._crops(*divmod(iteration, self._crops.sampler.batches))
        if self._whole_windows:
            crops = replace(crops, parts=crops.windows)
        starts = np.zeros((len(crops.parts), 2), np.int64)

        def load(row: int, sample: int, piece: Piece) -> bytes | bytearray:
            starts[row] = crops.parts[row, 0] - piece.top, crops.parts[row, 1] - piece.left
            if not decoded and _read_as_pil_does(piece.content):
                return piece.content
            buffer = io.BytesIO()
            pixels = self._reader.decode(sample, piece.content).permute(1, 2, 0).numpy()
            Image.fromarray(pixels).save(buffer, "PPM")
            return buffer.getvalue()

        files, labels, errors = self._reader.load(crops, load, missing=_BLACK)
        return EncodedBatch(crops, files, starts, labels, errors)

    def release(self, batch: EncodedBatch) -> None:
        """To be called when the files of a batch are no longer needed."""

    def close(self) -> None:
        """To be called at the end."""


class ReaderPool:
    """BatchReader in `readers` processes, for a caller that holds at most `held` batches at a time.

    They heed no signal but SIGKILL, and end with the pool, and with this process however it ends.
    """

    def __init__(self, crops: Crops, whole_windows: bool, readers: int, held: int) -> None:
        end_workers_at_exit()
        self._ahead = readers + 1  # batches that are asked for before they are needed
        self._slots = [_SharedMemory() for _ in range(held + self._ahead)]
        self._free = list(range(len(self._slots)))
        self._asked: deque[tuple[int, bool, int, Connection]] = deque()
        self._count = 0  # batches that were asked for
        with_crops, context = _SharedMemory(), get_context("spawn")
        (size,) = with_crops.write([pickle.dumps((crops, whole_windows), pickle.HIGHEST_PROTOCOL)])
        self._connections, theirs = zip(*(context.Pipe() for _ in range(readers)), strict=True)
        self.processes = [
            context.Process(target=_serve, args=(each, with_crops, size, self._slots), daemon=True) for each in theirs
        ]
        resource_tracker.ensure_running()  # which unblocks signals when it starts
        before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # what a process inherits
        try:
            for process in self.processes:
                process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        for connection in theirs:  # so that reading from a process that was killed is an error
            connection.close()

    def read(self, iteration: int, decoded: bool) -> EncodedBatch:
        """See BatchReader. Batches are read ahead in their order; another one than the next costs those."""
        try:
            if self._asked and self._asked[0][:2] != (iteration, decoded):
                while self._asked:
                    self.release(self._receive())
            following = iteration + len(self._asked)
            for number in range(following, following + self._ahead + 1 - len(self._asked)):
                self._ask(number, decoded)
            return self._receive()
        except (EOFError, ConnectionError):
            raise UserError(
                "a process that reads images was killed, most often for want of memory: take fewer data.readers or a "
                "smaller data.prefetch"
            ) from None

    def _ask(self, iteration: int, decoded: bool) -> None:
        connection, slot = self._connections[self._count % len(self._connections)], self._free.pop()
        connection.send((iteration, decoded, slot))
        self._asked.append((iteration, decoded, slot, connection))
        self._count += 1

    def _receive(self) -> EncodedBatch:
        *_, slot, connection = self._asked.popleft()
        answer = connection.recv()
        if isinstance(answer, Exception):
            raise answer
        crops, sizes, starts, labels, errors = answer
        return EncodedBatch(crops, self._slots[slot].read(sizes), starts, labels, errors, slot)

    def release(self, batch: EncodedBatch) -> None:
        """To be called when the files of a batch are no longer needed: others take their place."""
        self._free.append(batch.slot)

    def close(self) -> None:
        """Ends the processes."""
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()


def _serve(connection: Connection, with_crops: "_SharedMemory", size: int, slots: "list[_SharedMemory]") -> None:
    """What a reader process does."""
    threading.Thread(target=end_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    reader = BatchReader(*pickle.loads(*with_crops.read([size])))
    with suppress(EOFError, ConnectionError):  # the pool is gone
        while True:
            iteration, decoded, slot = connection.recv()
            try:
                batch = reader.read(iteration, decoded)
                answer: Any = batch.crops, slots[slot].write(batch.files), batch.starts, batch.labels, batch.errors
            except Exception as error:
                error.add_note(f"in a process that reads images:\n{traceback.format_exc()}")
                answer = error
            connection.send(answer)


class _SharedMemory:
    """Memory that processes share, with room for what was written last: a file without a name (memfd_create(2)).

    Unlike multiprocessing's SharedMemory, nothing is left of it when its processes are killed.
    """

    def __init__(self, duplicate: Any = None) -> None:
        """duplicate: what multiprocessing's DupFd made of the file, for another process."""
        self._file = io.FileIO(duplicate.detach() if duplicate else os.memfd_create("batch"), "r+")
        self._mapped: Any = None  # a memoryview; whoever still has a part of an earlier one keeps that

    def __reduce__(self) -> tuple[Any, ...]:
        return _SharedMemory, (reduction.DupFd(self._file.fileno()),)

    def write(self, parts: Sequence[Content]) -> list[int]:
        """Puts the parts one behind the other; returns their sizes in bytes."""
        sizes = [len(part) for part in parts]
        if self._capacity() < sum(sizes):
            self._file.truncate(sum(sizes) * 5 // 4)  # the next ones are about as large
        for part, place in zip(parts, self.read(sizes), strict=True):
            place[:] = part
        return sizes

    def read(self, sizes: Sequence[int]) -> list[memoryview]:
        """The parts, which stay as they are until the next write."""
        stops = np.cumsum(sizes).tolist()
        if self._mapped is None or len(self._mapped) < stops[-1]:
            self._mapped = memoryview(mmap.mmap(self._file.fileno(), self._capacity()))
        return [self._mapped[stop - size : stop] for stop, size in zip(stops, sizes, strict=True)]

    def _capacity(self) -> int:
        return os.fstat(self._file.fileno()).st_size


def _read_as_pil_does(content: bytes | bytearray) -> bool:
    """Whether DALI gives PIL's pixels: of JPEG without a fourth component, PNG of up to 8 bits a value, and WebP.

    A JPEG without its end marker may be cut off anywhere.
    """
    png = content[:4] == b"\x89PNG" and content[24:25] != b"\x10"  # PNG specification, 11.2.1
    return png or content[:4] == b"RIFF" or plain_jpeg(content)
