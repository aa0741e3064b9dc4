"""Lists of the rows of a batch that need a kind of work, made on the host, for work on a GPU.

The host knows what was drawn for each row. Asked how many rows drew an operation, a GPU would keep the host waiting.
The lists have fixed lengths, as torch.compile compiles every new shape anew: the rows that need the work come first and
are followed by others, for which the work must be the identity.
Check: `pytest tests/test_rand_augment.py tests/test_augment.py`.
"""

from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from scipy.special import bdtrc
from torch import Tensor

_RARE = 1e-9  # probability that a list is too short; a run of 300 epochs on 8 GPUs makes about 2e7 lists


class RowPlan(NamedTuple):
    """The rows that each of K kinds of work is done for, in a batch of N rows."""

    order: Tensor  # int64 [K, N]: for each kind all rows, those that need it first
    counts: tuple[int, ...]  # K numbers: how many rows, from the first on, the work is done for

    def rows(self) -> list[Tensor]:
        """int64 [count] for each kind."""
        return [order[:count] for order, count in zip(self.order.unbind(), self.counts, strict=True)]


def every_row(kinds: int, rows: int, device: torch.device) -> RowPlan:
    """The plan that does each of `kinds` kinds of work for all `rows` rows."""
    return RowPlan(torch.arange(rows, device=device).expand(kinds, rows), (rows,) * kinds)


def plan_rows(needed: Tensor, shares: Sequence[float]) -> RowPlan:
    """The plan for `needed`, bool [K, N]: whether a row needs a kind of work; shares: the K probabilities of that.

    The counts depend on N and `shares` alone. For the rare batch where one of them is too small, all of them are N: no
    more than two combinations of shapes are ever compiled.
    """
    rows = needed.shape[1]
    counts = tuple(enough(rows, share) for share in shares)
    if any(number > count for number, count in zip(needed.sum(1).tolist(), counts, strict=True)):
        counts = (rows,) * len(counts)
    return RowPlan(needed.byte().argsort(dim=1, descending=True, stable=True), counts)


@cache
def enough(rows: int, share: float) -> int:
    """The length, at least 1, of a list of rows that is too short for a batch with a probability of at most 1e-9.

    rows: of the batch; share: the probability that a row belongs on the list.
    """
    longer = bdtrc(np.arange(rows), rows, share)  # probability of more than 0, 1, ... rows
    return max(1, int((longer > _RARE).sum()))
