"""The batches that BatchNorms have seen, counted once for all of them. Check: `pytest tests/test_classifier.py`."""

from typing import Any

from torch import nn


class BatchCounts:
    """Keeps `num_batches_tracked` of the BatchNorms of a network and of its average, a twin, while they are trained.

    Each BatchNorm would count for itself, on a GPU by a kernel a layer and step, what nothing reads, since all of them
    have a momentum. Until `end` they have no counter, but for state dicts.
    """

    def __init__(self, model: nn.Module, average: nn.Module) -> None:
        pairs = zip(model.modules(), average.modules(), strict=True)
        # Those that do not learn keep their statistics, and count nothing.
        self._norms: list[Any] = [p for p in pairs if isinstance(p[0], nn.BatchNorm2d) and p[0].weight.requires_grad]
        self._counters = [[norm.num_batches_tracked for norm in pair] for pair in self._norms]
        self._batches = 0  # since they were last written
        networks = (model, average)
        self._hooks = [network.register_state_dict_pre_hook(lambda *_: self._put_back()) for network in networks]
        self._hooks += [network.register_state_dict_post_hook(lambda *_: self._take_out()) for network in networks]
        self._take_out()

    def add_batch(self) -> None:
        """To be called for every batch that the network sees in training mode."""
        self._batches += 1

    def end(self) -> None:
        """Gives the BatchNorms their counters, up to date."""
        for hook in self._hooks:
            hook.remove()
        self._put_back()

    def _take_out(self) -> None:
        for pair in self._norms:
            for norm in pair:
                norm.num_batches_tracked = None  # as PyTorch marks a BatchNorm that does not count

    def _put_back(self) -> None:
        for pair, (counter, averaged) in zip(self._norms, self._counters, strict=True):
            averaged.copy_(counter.add_(self._batches))
            for norm, own in zip(pair, (counter, averaged), strict=True):
                norm.num_batches_tracked = own
        self._batches = 0
