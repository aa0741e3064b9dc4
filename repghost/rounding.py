"""INT8 as arithmetic on floats: what a quantized layer makes of its weights and of its input.

For the gradient, rounding is the identity (the straight-through estimator of Bengio et al., arXiv 1308.3432).
Check: `pytest tests/test_quantize.py`.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def rounded_weight(weight: Tensor) -> Tensor:
    """A weight [out, ...] as symmetric INT8 with a scale for every output channel, in its own dtype."""
    scale = weight.detach().flatten(1).abs().amax(1).clamp_min(torch.finfo(weight.dtype).tiny) / 127
    scale = scale.view(-1, *[1] * (weight.ndim - 1))
    return weight + (scale * (weight / scale).round() - weight).detach()


def rounded_input(x: Tensor, seen: Tensor | None = None) -> Tensor:
    """`x` of any shape as affine INT8 with one scale, over the range of `seen` (by default its own) and zero."""
    values = x.detach()
    low, high = (values if seen is None else seen).aminmax()
    low, high = low.clamp_max(0), high.clamp_min(0)
    scale = (high - low).clamp_min(torch.finfo(x.dtype).tiny) / 255
    zero = (-128 - low / scale).round()
    levels = ((values / scale).round() + zero).clamp(-128, 127)
    return x + ((levels - zero) * scale - values).detach()


class RoundedConv2d(nn.Conv2d):
    """A convolution that computes with rounded weights and inputs in training mode, and exactly in evaluation mode."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        weight = rounded_weight(self.weight)
        return F.conv2d(rounded_input(x), weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class RoundedLinear(nn.Linear):
    """A linear layer that computes with rounded weights and inputs in training mode, and exactly in evaluation mode."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        return F.linear(rounded_input(x), rounded_weight(self.weight), self.bias)


def round_layers(model: nn.Module) -> None:
    """Makes every convolution and linear layer of `model` a rounded one, with the parameters that it has."""
    for layer in model.modules():
        if type(layer) is nn.Conv2d:
            layer.__class__ = RoundedConv2d
        elif type(layer) is nn.Linear:
            layer.__class__ = RoundedLinear
