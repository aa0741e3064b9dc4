"""Stops a run whose loss is not a number, without making the device wait."""

import torch
from torch import Tensor

from repghost.errors import UserError


class LossWatch:
    """Looks at the loss of every step one step later.

    On a GPU the verdict on a step is copied to the host while the next step is queued, and read only then: the host
    waits for a step that the GPU has left behind, the GPU never waits for the host.
    """

    def __init__(self) -> None:
        self._pending: tuple[Tensor, torch.cuda.Event | None, int, int, Tensor] | None = None

    def follow(self, loss: Tensor, epoch: int, batch: int, positions: Tensor) -> None:
        """Takes note of a step's loss (a scalar on any device) and checks the one before it."""
        before = self._pending
        finite, event = torch.isfinite(loss.detach()), None
        if finite.is_cuda:
            finite = torch.empty((), dtype=torch.bool, pin_memory=True).copy_(finite, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        self._pending = (finite, event, epoch, batch, positions)
        if not loss.is_cuda:
            self.check()
        elif before is not None:
            _require_finite(*before)

    def check(self) -> None:
        """Checks the last step; waits for it."""
        if self._pending is not None:
            _require_finite(*self._pending)


def _require_finite(finite: Tensor, event: torch.cuda.Event | None, epoch: int, batch: int, positions: Tensor) -> None:
    if event is not None:
        event.synchronize()
    if not finite:
        first, last = int(positions[0]), int(positions[-1])
        raise UserError(
            f"the loss is not finite in epoch {epoch}, batch {batch} (positions {first} to {last} of the epoch); "
            "the last checkpoint is from before; begin a new run with a smaller learning rate or another precision"
        )
