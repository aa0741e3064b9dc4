"""The learning-rate curve of the classifiers: linear warm-up, then a cosine, constant within an epoch.

    e < warm-up epochs:  start + e (peak - start) / warm-up epochs
    otherwise:           final + (peak - final) (1 + cos(pi e / epochs)) / 2

The cosine is not shifted by the warm-up. With the paper's values (0.6, 1e-4, 1e-5, 5 of 300 epochs) this is the `lr`
column of all eight official logs, to the printed digits. Detectors have a rate of each step.
Check: `pytest tests/test_schedule.py`.
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


def step_learning_rate(
    recipe: Mapping[str, Any], step: int, *, epochs: int, steps_per_epoch: int, peak: float
) -> float:
    """The learning rate of `step`, counted from 0, by a recipe for detectors, which has `peak` after its warm-up.

    schedule=steps multiplies by `decay` after every epoch of `milestones`; cosine falls to 0 at the end of the run. The
    warm-up multiplies by what rises linearly from `warmup_factor` to 1 in `warmup_steps` steps.
    """
    if recipe["schedule"] == "cosine":
        factor = 0.5 * (1 + math.cos(math.pi * step / (epochs * steps_per_epoch)))
    else:
        factor = recipe["decay"] ** sum(step >= epoch * steps_per_epoch for epoch in recipe["milestones"] or ())
    if step < (warmup := recipe["warmup_steps"]):
        factor *= recipe["warmup_factor"] + (1 - recipe["warmup_factor"]) * step / warmup
    return float(peak * factor)
