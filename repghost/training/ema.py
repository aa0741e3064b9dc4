"""The average of the weights: an exponential moving average over parameters and buffers, from the first step on.

It starts from the initial weights, as timm's ModelEmaV2 does (torch's AveragedModel copies the model at its first
update instead). Integer buffers (BatchNorm's batch counter) are copied. Check: `pytest tests/test_ema.py`.
"""

import copy
from collections.abc import Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from repghost.training.internals import copy_all


class WeightAverage:
    """Keeps `model`, the averaged twin of a training model, in evaluation mode.

    Not an nn.Module on purpose: a second trainable copy inside the LightningModule would take part in its state dict.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self._average = get_ema_multi_avg_fn(decay)
        self._tensors: list[tuple[list[Tensor], list[Tensor]]] = []  # floating-point ones, integers: average and model

    def to(self, device: torch.device) -> None:
        """Moves the average; to be called after the training model was moved."""
        self.model.to(device)
        self._tensors = []

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """average <- decay * average + (1 - decay) * model, over every parameter and floating-point buffer.

        The tensors are looked up at the first call: later calls must pass the same model, and it must not have moved to
        another device without this average. An optimizer's step and `load_state_dict` write into the same tensors.
        """
        if not self._tensors:
            pairs = list(zip(*(chain(m.parameters(), m.buffers()) for m in (self.model, model)), strict=True))
            for floating in (True, False):
                found = [pair for pair in pairs if pair[0].is_floating_point() is floating]
                self._tensors.append(([average for average, _ in found], [current for _, current in found]))
        floats, counts = self._tensors
        self._average(*floats, 0)  # the last argument, a number of updates, is not read
        if counts[0]:
            copy_all(*counts)


def ema_decay(recipe: Mapping[str, Any], steps: int) -> float:
    """The decay of the weight average in a run of `steps` steps; `ema_span` is its memory as a share of them."""
    span, decay = recipe["ema_span"], recipe["ema_decay"]
    return float(decay if span is None else max(0.0, 1 - 1 / (span * steps)))
