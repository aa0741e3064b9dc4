"""The batches that BatchNorms have seen, counted once for all of them. Check: `pytest tests/test_classifier.py`."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


class BatchCounts:
    """Keeps `num_batches_tracked` of the BatchNorms of a network and of its average, a twin, while they are trained.

    Each BatchNorm would count for itself, on a GPU by a kernel a layer and step, what nothing reads, since all of them
    have a momentum. Between `take_out` and `put_back` they have no counter, but for state dicts: see `in_place`.
    """

    def __init__(self, model: nn.Module, average: nn.Module) -> None:
        pairs = zip(model.modules(), average.modules(), strict=True)
        # Those that do not learn keep their statistics, and count nothing.
        self._norms: list[Any] = [p for p in pairs if isinstance(p[0], nn.BatchNorm2d) and p[0].weight.requires_grad]
        self._counters = [[norm.num_batches_tracked for norm in pair] for pair in self._norms]
        self._batches = 0  # since they were last written
        self._taken_out = False

    def add_batch(self) -> None:
        """To be called for every batch that the network sees in training mode."""
        self._batches += 1

    def take_out(self) -> None:
        """Leaves the BatchNorms without counters."""
        for pair in self._norms:
            for norm in pair:
                norm.num_batches_tracked = None  # as PyTorch marks a BatchNorm that does not count
        self._taken_out = True

    def put_back(self) -> None:
        """Gives the BatchNorms their counters, up to date."""
        for pair, (counter, averaged) in zip(self._norms, self._counters, strict=True):
            averaged.copy_(counter.add_(self._batches))
            for norm, own in zip(pair, (counter, averaged), strict=True):
                norm.num_batches_tracked = own
        self._batches, self._taken_out = 0, False

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """A context with the counters, which are then where they were before."""
        if not self._taken_out:
            yield
            return
        self.put_back()
        try:
            yield
        finally:
            self.take_out()
