"""The learning-rate curve: linear warm-up, then a cosine, constant within an epoch.

    e < warm-up epochs:  start + e (peak - start) / warm-up epochs
    otherwise:           final + (peak - final) (1 + cos(pi e / epochs)) / 2

The cosine is not shifted by the warm-up. With the paper's values (0.6, 1e-4, 1e-5, 5 of 300 epochs) this is the `lr`
column of all eight official logs, to the printed digits. Check: `pytest tests/test_schedule.py`.
"""

import math
from collections.abc import Mapping
from typing import Any


def learning_rate(epoch: int, *, epochs: int, peak: float, start: float, final: float, warmup_epochs: int) -> float:
    """The learning rate of epoch `epoch` (counted from 0) of a run of `epochs` epochs."""
    if epoch < warmup_epochs:
        return start + epoch * (peak - start) / warmup_epochs
    return final + 0.5 * (peak - final) * (1 + math.cos(math.pi * epoch / epochs))


def linear_scale(value: float, *, batch_size: int, reference_batch_size: int) -> float:
    """`value`, stated for `reference_batch_size`, at `batch_size` (Goyal et al., arXiv 1706.02677, section 2.1)."""
    return value * batch_size / reference_batch_size


def epoch_learning_rate(recipe: Mapping[str, Any], epoch: int, *, epochs: int, batch_size: int) -> float:
    """The learning rate of `epoch`, counted from 0, in a run of `epochs` epochs at the global `batch_size`.

    The three rates of a recipe are stated for batches of `reference_batch_size`.
    """
    peak, start, final = (
        linear_scale(recipe[key], batch_size=batch_size, reference_batch_size=recipe["reference_batch_size"])
        for key in ("learning_rate", "start_learning_rate", "final_learning_rate")
    )
    warmup = recipe["warmup_epochs"]
    return learning_rate(epoch, epochs=epochs, peak=peak, start=start, final=final, warmup_epochs=warmup)
