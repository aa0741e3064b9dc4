"""The average of the weights: an exponential moving average over parameters and buffers, from the first step on.

It starts from the initial weights, as timm's ModelEmaV2 does (torch's AveragedModel copies the model at its first
update instead). Integer buffers (BatchNorm's batch counter) are copied. Check: `pytest tests/test_ema.py`.
"""

import copy

import torch
from torch import nn


class WeightAverage:
    """Keeps `model`, the averaged twin of a training model, in evaluation mode.

    Not an nn.Module on purpose: a second trainable copy inside the LightningModule would take part in its state dict
    and in DistributedDataParallel's search for unused parameters.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.model = copy.deepcopy(model).eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """average <- decay * average + (1 - decay) * model, over every parameter and floating-point buffer."""
        average, current = self._tensors(self.model), self._tensors(model)
        torch._foreach_lerp_(average[0], current[0], 1 - self.decay)
        for mine, theirs in zip(average[1], current[1], strict=True):
            mine.copy_(theirs)

    @staticmethod
    def _tensors(model: nn.Module) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """(floating-point, integer) tensors of the model, in the order of its state dict."""
        tensors = list(model.state_dict().values())
        return [t for t in tensors if t.is_floating_point()], [t for t in tensors if not t.is_floating_point()]
