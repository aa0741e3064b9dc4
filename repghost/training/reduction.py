"""What the ranks of a run exchange in a step: gradients, BatchNorm's statistics, and whether to save or stop.

All of it is in one tensor and one all-reduce after the backward pass, so that a GPU waits for the others once a step.
What a rank requests is answered some steps later: the host never waits for the step that the GPU is computing.
Check: `pytest tests/test_reduction.py tests/test_distributed.py`.
"""

from collections import deque
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from repghost.training.internals import copy_all

# What a rank requests at the end of a batch; all ranks follow the largest request.
GO_ON, SAVE, STOP = 0, 1, 2


class HostCopy:
    """A copy of a small tensor for the host to read later.

    On a GPU the copy is queued behind what is being computed, and `read` waits for it, asleep. A host that reads it
    `steps_ahead` steps later rarely waits at all, and the GPU always has work queued.
    """

    def __init__(self, value: Tensor) -> None:
        self._copied: torch.cuda.Event | None = None
        if value.is_cuda:
            self._value = torch.empty_like(value, device="cpu", pin_memory=True).copy_(value, non_blocking=True)
            self._copied = torch.cuda.Event(blocking=True)
            self._copied.record()
        else:
            self._value = value.clone()

    def read(self) -> Tensor:
        """The tensor, on the CPU."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._value


def steps_ahead(device: torch.device) -> int:
    """How many steps the host may be ahead of what it reads from `device`: a hiccup of the host costs a GPU nothing."""
    return 3 if device.type == "cuda" else 1


class Requests:
    """What the ranks request of each other at the end of a batch: GO_ON, SAVE or STOP.

    mine: what this rank requests now. ranks: how many there are. device: of the tensors that they exchange.
    """

    def __init__(self, mine: Callable[[], int], ranks: int, device: torch.device) -> None:
        self._mine, self._device = mine, device
        # Their sum over the ranks says what the largest request was.
        self._weights = {GO_ON: 0, SAVE: 1, STOP: ranks + 1}
        self._alone = ranks == 1
        self._sums: deque[HostCopy] = deque()

    def put(self, place: Tensor) -> None:
        """Writes what this rank requests into a tensor [1] that is then summed over the ranks."""
        place.fill_(self._weights[self._mine()])

    def add(self, total: Tensor) -> None:
        """Takes the sum of what all ranks put, a tensor [1]."""
        self._sums.append(HostCopy(total))

    def exchange(self) -> None:
        """Sums the requests at the end of a batch that exchanges nothing else."""
        if not self._alone:
            total = torch.empty(1, device=self._device)
            self.put(total)
            dist.all_reduce(total)
            self.add(total)

    def largest(self) -> int:
        """The largest request of all ranks `steps_ahead` batches ago, the same on each; of a single rank, at once."""
        if self._alone:
            return self._mine()
        total = 0.0
        while len(self._sums) > steps_ahead(self._device):
            total = max(total, float(self._sums.popleft().read()))
        return STOP if total >= self._weights[STOP] else SAVE if total else GO_ON

    def clear(self) -> None:
        """Forgets what was requested, once it is fulfilled."""
        self._sums.clear()


class RankAverage:
    """Averages the gradients of what learns and the floating-point buffers (BatchNorm's statistics) of `model` over all
    ranks.

    Every rank then holds the same model at any moment. The official runs kept each rank's own statistics. The rounding
    is DistributedDataParallel's. Raises ValueError unless all of it has one dtype.
    """

    def __init__(self, model: nn.Module) -> None:
        self._ranks = dist.get_world_size()
        self._parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._buffers = [buffer for buffer in model.buffers() if buffer.is_floating_point()]
        tensors = [*self._parameters, *self._buffers]
        if len(dtypes := {tensor.dtype for tensor in tensors}) > 1:
            raise ValueError(f"a network of one dtype is averaged, not of {dtypes}")
        sizes = [tensor.numel() for tensor in tensors]
        self._flat = torch.zeros(sum(sizes) + 1, dtype=tensors[0].dtype, device=tensors[0].device)
        *parts, self._request = self._flat.split([*sizes, 1])
        # In the memory format of the parameters, which an optimizer of many tensors at once asks for.
        views = [part.as_strided(t.size(), t.stride()) for part, t in zip(parts, tensors, strict=True)]
        self._gradients, self._averages = views[: len(self._parameters)], views[len(self._parameters) :]
        self._all_gradients, self._all_averages, _ = self._flat.split(
            [sum(sizes[: len(self._parameters)]), sum(sizes[len(self._parameters) :]), 1]
        )

    @torch.no_grad()
    def __call__(self, requests: Requests | None = None) -> None:
        """To be called on all ranks after the last backward pass of a step; exchanges `requests` as well."""
        gradients: list[Any] = [parameter.grad for parameter in self._parameters]
        copy_all([*self._gradients, *self._averages], [*gradients, *self._buffers])
        self._all_gradients.mul_(1 / self._ranks)  # before the sum, as DistributedDataParallel does
        if requests is not None:
            requests.put(self._request)
        dist.all_reduce(self._flat)
        self._all_averages.div_(self._ranks)
        if self._buffers:
            copy_all(self._buffers, self._averages)
        for parameter, gradient in zip(self._parameters, self._gradients, strict=True):
            parameter.grad = gradient
        if requests is not None:
            requests.add(self._request)
