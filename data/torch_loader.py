"""The torch loader: torchvision decodes, crops and resizes in DataLoader workers, a whole batch at a time.

A batch is (uint8 images [N, 3, S, S], int64 labels [N], int64 positions [N], float32 draws [N, DRAWS]), always N rows;
a row without an image has label -1. Anything random was drawn by data.sampling; nothing here keeps state.
"""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate
from torch.utils.data._utils.signal_handling import _remove_worker_pids

from data.crops import BatchPlan, Plan
from data.reader import BadImage, ShardReader, SkipBudget, decode, resize
from repghost.dataset import Batch
from repghost.training.signals import end_workers_at_exit, ignore_signals

Position = Callable[[], tuple[int, int]]


class TorchLoader(DataLoader):
    """Batches of `plan` from the trainer's position on; its length is that of a full epoch.

    position: called when an epoch is entered, gives (epoch, batch) to begin at. skip_bad: images that may be masked
    per epoch before the loader gives up with the last one's error.
    """

    def __init__(
        self,
        plan: Plan,
        *,
        image_size: int,
        workers: int,
        prefetch: int,
        pin_memory: bool,
        position: Position,
        skip_bad: int,
    ) -> None:
        self._route = _Route(plan.partition.batches)
        self._position = position
        self._skip_bad = skip_bad
        if workers:
            end_workers_at_exit()
        super().__init__(
            PlannedBatches(plan, image_size, keep_going=skip_bad > 0),
            sampler=self._route,
            batch_size=None,
            num_workers=workers,
            prefetch_factor=prefetch if workers else None,
            persistent_workers=workers > 0,
            pin_memory=pin_memory,
            worker_init_fn=ignore_signals,
        )

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        epoch, first = self._position()
        self._route.epoch, self._route.batch = epoch, first % self._route.batches
        budget = SkipBudget(self._skip_bad)
        for batch, errors in self._batches():
            budget.spend(errors)
            yield batch

    def _batches(self) -> Iterator[tuple[Batch, list[str]]]:
        try:
            yield from super().__iter__()
        except RuntimeError as error:
            if "DataLoader worker" in str(error):
                self._forget_workers()
            raise
        except (ConnectionError, EOFError):
            self._forget_workers()
            raise RuntimeError("DataLoader worker (pid unknown) was killed while it handed a batch over") from None

    def _forget_workers(self) -> None:
        """Otherwise torch raises its error again, wherever the program is, when the next process of any kind ends."""
        iterator: Any = self._iterator
        if iterator._worker_pids_set:
            _remove_worker_pids(id(iterator))
            iterator._worker_pids_set = False
        iterator._shutdown = True  # its own way to end them may wait for a lock that the dead one held
        for worker in iterator._workers:
            worker.kill()
        self._iterator = None

    def __len__(self) -> int:
        return self._route.batches


class _Route(Sampler):
    """Yields the (epoch, batch) pairs that are left of an epoch."""

    def __init__(self, batches: int) -> None:
        self.batches, self.epoch, self.batch = batches, 0, 0

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return iter([(self.epoch, batch) for batch in range(self.batch, self.batches)])

    def __len__(self) -> int:
        return self.batches - self.batch


class PlannedBatches(Dataset):
    """Maps (epoch, batch) to a loaded batch and the errors met in it."""

    def __init__(self, plan: Plan, image_size: int, keep_going: bool) -> None:
        self._plan = plan
        self._image_size = image_size
        self._keep_going = keep_going
        self._reader = ShardReader(plan.index)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Batch, list[str]]:
        plan = self._plan(*key)
        images = [torch.zeros(3, self._image_size, self._image_size, dtype=torch.uint8)] * plan.rows
        labels = torch.full((plan.rows,), -1)
        labels[: len(plan.samples)] = torch.from_numpy(self._plan.index.samples["label"][plan.samples].astype(np.int64))
        errors: list[str] = []
        self._reader.announce(plan.samples)
        for row, sample in enumerate(plan.samples):
            try:
                images[row] = self._load(plan, row, int(sample))
            except BadImage as error:
                errors.append(str(error))
                labels[row] = -1
                if not self._keep_going:
                    break
        # default_collate stacks into shared memory in a worker, which saves the copy on the way to the trainer.
        positions, uniforms = torch.from_numpy(plan.positions), torch.from_numpy(plan.draws)
        return Batch(default_collate(images), labels, positions, uniforms), errors

    def _load(self, plan: BatchPlan, row: int, sample: int) -> Tensor:
        """uint8 [3, S, S]: read, decode, crop, resize, centre."""
        content = self._reader.read(sample)
        try:
            image = decode(content)
        except Exception as error:  # a decoder may raise anything; the cause goes into the one line
            raise BadImage(f"{self._plan.index.name(sample)}: {error}") from None
        top, left, height, width = plan.windows[row].tolist()
        return resize(image[:, top : top + height, left : left + width], plan, row, self._image_size)
