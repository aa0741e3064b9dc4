"""The learning-rate curve: linear warm-up, then a cosine, constant within an epoch.

    e < warm-up epochs:  start + e (peak - start) / warm-up epochs
    otherwise:           final + (peak - final) (1 + cos(pi e / epochs)) / 2

The cosine is not shifted by the warm-up. With the recipe's values (0.6, 1e-4, 1e-5, 5 of 300 epochs) this is the `lr`
column of all eight official logs, to the printed digits. Check: `pytest tests/test_schedule.py`.
"""

import math


def learning_rate(epoch: int, *, epochs: int, peak: float, start: float, final: float, warmup_epochs: int) -> float:
    """The learning rate of epoch `epoch` (counted from 0) of a run of `epochs` epochs."""
    if epoch < warmup_epochs:
        return start + epoch * (peak - start) / warmup_epochs
    return final + 0.5 * (peak - final) * (1 + math.cos(math.pi * epoch / epochs))


def linear_scale(value: float, *, batch_size: int, reference_batch_size: int) -> float:
    """`value`, stated for `reference_batch_size`, at `batch_size` (Goyal et al., arXiv 1706.02677, section 2.1)."""
    return value * batch_size / reference_batch_size
