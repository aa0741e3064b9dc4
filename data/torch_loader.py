"""The torch loader: DataLoader workers decode with torchvision, crop and resize, a whole batch at a time.

It holds no random state: `data.sampling` draws everything. A batch always has as many rows as the batch size per rank;
a row without an image has label -1.
Check: `pytest tests/test_loader.py`.
"""

import mmap
import multiprocessing.util
import os
import shutil
import tempfile
from collections.abc import Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate
from torch.utils.data._utils.signal_handling import _remove_worker_pids

from data.crops import Crops, RandomCrops
from data.reader import EpochLoader, LoaderOptions, Piece, ShardReader, part_of, resize
from data.sampling import NUM_UNIFORMS
from repghost.dataset import Batch
from repghost.errors import UserError
from repghost.training.signals import end_workers_at_exit, ignore_signals

AnyBatch = TypeVar("AnyBatch")

SHARED_MEMORY = "/dev/shm"  # where torch's workers put their batches on Linux
SEMAPHORES = 1_000_000  # bytes there for the queues of the workers, a page each, with room to spare
BATCHES_IN_USE = 3  # by the trainer, beside those that wait
LONGEST_TMPDIR = 75  # bytes: a socket's 107 without "/pymp-12345678/listener-12345678"


class BatchLoader(EpochLoader[AnyBatch], DataLoader):  # type: ignore[misc]  # the types of __iter__ differ
    """dataset: maps (epoch, batch) to a batch and a line for each bad image in it. batches: of a full epoch.

    batch_bytes: what a batch takes in shared memory.
    """

    def __init__(self, dataset: Dataset, options: LoaderOptions, batches: int, batch_bytes: int) -> None:
        self._length = batches
        self._batches_left: list[tuple[int, int]] = []  # (epoch, batch)
        self.options = options
        if options.workers:
            end_workers_at_exit()
        self._batch_bytes = batch_bytes
        super().__init__(
            dataset,
            sampler=self._batches_left,
            batch_size=None,
            num_workers=options.workers,
            prefetch_factor=options.prefetch if options.workers else None,
            persistent_workers=options.workers > 0,
            pin_memory=options.pin_memory,
            worker_init_fn=ignore_signals,
        )

    def __len__(self) -> int:
        return self._length

    def close(self) -> None:
        """Ends the workers; another epoch would start new ones.

        Left to Python's garbage collector, which closes their queues before it comes to the loader, they never hear
        that they are to end: torch waits 10 s for each of them, and leaves them behind. Dropping the iterator is not
        enough: after an error Lightning keeps whatever is assigned to any attribute of a DataLoader.
        """
        iterator: Any = self._iterator
        if iterator is not None:
            iterator._shutdown_workers()
            self._iterator = None

    def _batches(self, epoch: int, first: int) -> Iterator[tuple[AnyBatch, list[str]]]:
        self._batches_left[:] = [(epoch, batch) for batch in range(first, len(self))]
        if self.num_workers and self._iterator is None:
            self._check_shared_memory()
            short_socket_names()
        try:
            yield from DataLoader.__iter__(self)
        except RuntimeError as error:
            if "DataLoader worker" in str(error):
                _forget_workers(self)
            raise
        except (ConnectionError, EOFError):
            _forget_workers(self)
            raise RuntimeError("DataLoader worker (pid unknown) was killed while it handed a batch over") from None

    def _check_shared_memory(self) -> None:
        """Raises UserError where the batches that workers hold ready do not fit: one of them would be killed."""
        if not os.path.isdir(SHARED_MEMORY):
            return
        batches = min(len(self), self.num_workers * self.options.prefetch + BATCHES_IN_USE)
        needed = batches * self._batch_bytes + SEMAPHORES
        ranks, memory = self.options.ranks, shutil.disk_usage(SHARED_MEMORY)
        if needed > memory.free or ranks * needed > memory.total:
            raise UserError(
                f"{SHARED_MEMORY}: {memory.free / 1e6:,.1f} MB are free, {ranks} x {self.num_workers} workers need "
                f"{ranks * needed / 1e6:,.1f}: enlarge it (docker run --shm-size=8g), or take fewer data.workers, or a "
                "smaller data.prefetch"
            )


class TorchLoader(BatchLoader[Batch]):
    """The batches of `crops`."""

    def __init__(self, crops: Crops, options: LoaderOptions) -> None:
        super().__init__(CroppedBatches(crops), options, crops.sampler.batches, batch_bytes(crops))


def batch_bytes(crops: Crops) -> int:
    """What a batch takes in shared memory, where each of its tensors is a file of whole pages."""
    rows = crops.sampler.batch_size
    largest = crops.sizes.full if isinstance(crops, RandomCrops) else crops.image_size
    tensors = (3 * largest**2 * rows, 8 * rows, 8 * rows, 4 * NUM_UNIFORMS * rows)
    return sum(-(-size // mmap.PAGESIZE) * mmap.PAGESIZE for size in tensors)


def short_socket_names() -> None:
    """Lets this process and its workers keep their sockets in /tmp where TMPDIR is too long for them.

    A socket's name has at most 107 bytes. With a longer one, a worker fails where nobody sees it, and its batches never
    arrive. Python 3.14 does so by itself.
    """
    if len(os.fsencode(tempfile.gettempdir())) <= LONGEST_TMPDIR:
        return
    before, tempfile.tempdir = tempfile.tempdir, "/tmp"
    try:
        multiprocessing.util.get_temp_dir()  # made once, and known to the workers
    except OSError as error:
        raise UserError(f"TMPDIR={before} is too long for sockets, and /tmp cannot be used: {error.strerror}") from None
    finally:
        tempfile.tempdir = before


class CroppedBatches(Dataset):
    """Maps (epoch, batch) to a batch of uint8 images and a line for each bad image in it."""

    def __init__(self, crops: Crops) -> None:
        self.crops = crops
        self._reader = ShardReader(crops.index)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Batch, list[str]]:
        crops = self.crops(*key)

        def load(row: int, sample: int, piece: Piece) -> Tensor:
            image = self._reader.decode(sample, piece.content).permute(1, 2, 0)
            return resize(part_of(image, piece, crops, row), crops, row)

        black = torch.zeros(crops.image_size, crops.image_size, 3, dtype=torch.uint8)
        images, labels, errors = self._reader.load(crops, load, black)
        # default_collate stacks into shared memory in a worker, which saves the copy on the way to the trainer.
        columns: Any = map(torch.from_numpy, (labels, crops.positions, crops.uniforms))
        return Batch(default_collate(images).permute(0, 3, 1, 2), *columns), errors


def _forget_workers(loader: DataLoader) -> None:
    """Ends the workers of a loader that lost one of them.

    With `BatchLoader.close` the only use of torch's private parts in `data`. Left alone, torch raises its error again,
    wherever the program is, when the next process of any kind ends; and its own shutdown may wait for a lock that the
    dead worker held.
    """
    iterator: Any = loader._iterator
    if iterator._worker_pids_set:
        _remove_worker_pids(id(iterator))
        iterator._worker_pids_set = False
    iterator._shutdown = True
    for worker in iterator._workers:
        worker.kill()
    loader._iterator = None
