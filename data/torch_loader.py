"""The torch loader: DataLoader workers decode with torchvision, crop and resize, a whole batch at a time.

It holds no random state: `data.sampling` draws everything. A batch always has as many rows as the batch size per rank;
a row without an image has label -1.
Check: `pytest tests/test_loader.py`.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate
from torch.utils.data._utils.signal_handling import _remove_worker_pids

from data.crops import Crops
from data.reader import LoaderOptions, ShardReader, resize, within_budget
from repghost.dataset import Batch
from repghost.training.signals import end_workers_at_exit, ignore_signals


class TorchLoader(DataLoader):
    """The batches of an epoch from `options.start` on; its length is that of a full epoch."""

    def __init__(self, crops: Crops, options: LoaderOptions) -> None:
        self._length = crops.sampler.batches
        self._batches_left: list[tuple[int, int]] = []  # (epoch, batch)
        self._options = options
        if options.workers:
            end_workers_at_exit()
        super().__init__(
            CroppedBatches(crops),
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

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        epoch, first = self._options.start()
        self._batches_left[:] = [(epoch, batch) for batch in range(first % len(self), len(self))]
        yield from within_budget(self._batches(), self._options.skip_bad)

    def _batches(self) -> Iterator[tuple[Batch, list[str]]]:
        try:
            yield from super().__iter__()
        except RuntimeError as error:
            if "DataLoader worker" in str(error):
                _forget_workers(self)
            raise
        except (ConnectionError, EOFError):
            _forget_workers(self)
            raise RuntimeError("DataLoader worker (pid unknown) was killed while it handed a batch over") from None


class CroppedBatches(Dataset):
    """Maps (epoch, batch) to a batch of uint8 images and a line for each bad image in it."""

    def __init__(self, crops: Crops) -> None:
        self.crops = crops
        self._reader = ShardReader(crops.index)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Batch, list[str]]:
        crops = self.crops(*key)

        def load(row: int, sample: int) -> Tensor:
            image = self._reader.decode(sample, self._reader.read(sample))
            top, left, height, width = crops.windows[row].tolist()
            return resize(image[:, top : top + height, left : left + width], crops, row)

        black = torch.zeros(3, crops.image_size, crops.image_size, dtype=torch.uint8)
        images, labels, errors = self._reader.load(crops, load, black)
        # default_collate stacks into shared memory in a worker, which saves the copy on the way to the trainer.
        rest = map(torch.from_numpy, (labels, crops.positions, crops.uniforms))
        return Batch(default_collate(images), *rest), errors


def _forget_workers(loader: DataLoader) -> None:
    """Ends the workers of a loader that lost one of them.

    The only use of torch's private parts in `data`. Left alone, torch raises its error again, wherever the program is,
    when the next process of any kind ends; and its own shutdown may wait for a lock that the dead worker held.
    """
    iterator: Any = loader._iterator
    if iterator._worker_pids_set:
        _remove_worker_pids(id(iterator))
        iterator._worker_pids_set = False
    iterator._shutdown = True
    for worker in iterator._workers:
        worker.kill()
    loader._iterator = None
