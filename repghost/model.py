"""RepGhostNet (arXiv 2211.06088), in training form and in fused form.

Parameter names, shapes and order are the official implementation's, so published checkpoints load with
`strict=True` and give the same logits. In fused form (`fused=True`, what `repghost.reparameterize` returns)
there is no BatchNorm: every convolution keeps its name and has a bias.
Check: `pytest tests/test_model.py`, which compares keys and logits with timm's, and parameters and
multiply-accumulates with the published table.
"""

import math
from collections import OrderedDict
from functools import cache
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from repghost.errors import UserError

WIDTHS = (0.5, 0.58, 0.8, 1.0, 1.11, 1.3, 1.5, 2.0)  # the published width multipliers

# Blocks of every stage at width 1.0: kernel, mid channels, out channels, squeeze-and-excitation, stride.
STAGES = (
    ((3, 8, 16, False, 1),),
    ((3, 24, 24, False, 2),),
    ((3, 36, 24, False, 1),),
    ((5, 36, 40, True, 2),),
    ((5, 60, 40, True, 1),),
    ((3, 120, 80, False, 2),),
    ((3, 100, 80, False, 1), *[(3, 120, 80, False, 1)] * 2, (3, 240, 112, True, 1), (3, 336, 112, True, 1)),
    ((5, 336, 160, True, 2),),
    ((5, 480, 160, False, 1), (5, 480, 160, True, 1)) * 2,
)
FEATURE_STAGES = (2, 4, 6, 8)  # after which `features` takes its maps: before the next stride of 2, and the last one

Reparam = Literal["bn", "identity", "none"]


def round_channels(value: float) -> int:
    """The multiple of 4 nearest to `value`, but at least 4 and at least 0.9 of `value`."""
    channels = max(4, math.floor((value + 2) / 4) * 4)
    return channels + 4 if channels < 0.9 * value else channels


def _conv_bn(
    in_channels: int, out_channels: int, kernel: int, fused: bool, stride: int = 1, groups: int = 1
) -> tuple[nn.Conv2d, nn.Module]:
    """A convolution without bias and its BatchNorm; fused, a convolution with bias and an identity."""
    conv = nn.Conv2d(in_channels, out_channels, kernel, stride, kernel // 2, groups=groups, bias=fused)
    return conv, nn.Identity() if fused else nn.BatchNorm2d(out_channels)


class SqueezeExcite(nn.Module):
    """Channel attention: [N, C, H, W] times a gate in [0, 1] for each channel, computed from the averages."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        reduced = round_channels(channels / 4)
        self.conv_reduce = nn.Conv2d(channels, reduced, 1)
        self.conv_expand = nn.Conv2d(reduced, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        gate = F.relu(self.conv_reduce(F.adaptive_avg_pool2d(x, 1)))
        return x * F.hardsigmoid(self.conv_expand(gate))


class RepGhostModule(nn.Module):
    """[N, in, H, W] to [N, out, H, W]: a 1x1 convolution, then a depthwise one and an identity branch, added.

    `reparam` says what the identity branch is: "bn" (a BatchNorm, as published), "identity" (without
    BatchNorm) or "none". Fused, it is part of the depthwise convolution.
    """

    def __init__(
        self, in_channels: int, out_channels: int, relu: bool, reparam: Reparam = "bn", fused: bool = False
    ) -> None:
        super().__init__()
        self.primary_conv = nn.Sequential(
            *_conv_bn(in_channels, out_channels, 1, fused), nn.ReLU(inplace=True) if relu else nn.Identity()
        )
        self.fusion_bn: nn.Sequential | None = None
        if reparam != "none" and not fused:
            self.fusion_bn = nn.Sequential(nn.BatchNorm2d(out_channels) if reparam == "bn" else nn.Identity())
        self.cheap_operation = nn.Sequential(*_conv_bn(out_channels, out_channels, 3, fused, groups=out_channels))
        self.relu = nn.ReLU(inplace=True) if relu else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = self.primary_conv(x)
        y = self.cheap_operation(x)
        if self.fusion_bn is not None:
            y = y + self.fusion_bn(x)
        return self.relu(y)


class RepGhostBottleneck(nn.Module):
    """[N, in, H, W] to [N, out, H/stride, W/stride]: two RepGhost modules and a shortcut around them.

    `shortcut=False` leaves the shortcut out where it is the identity (in = out and stride 1).
    """

    def __init__(
        self,
        in_channels: int,
        mid_channels: int,
        out_channels: int,
        kernel: int,
        stride: int,
        se: bool,
        reparam: Reparam = "bn",
        shortcut: bool = True,
        fused: bool = False,
    ) -> None:
        super().__init__()
        self.ghost1 = RepGhostModule(in_channels, mid_channels, True, reparam, fused)
        self.conv_dw: nn.Module = nn.Identity()
        self.bn_dw: nn.Module = nn.Identity()
        if stride > 1:
            self.conv_dw, self.bn_dw = _conv_bn(mid_channels, mid_channels, kernel, fused, stride, mid_channels)
        self.se = SqueezeExcite(mid_channels) if se else nn.Identity()
        self.ghost2 = RepGhostModule(mid_channels, out_channels, False, reparam, fused)
        self.shortcut: nn.Module | None = nn.Identity() if shortcut else None
        if in_channels != out_channels or stride != 1:
            self.shortcut = nn.Sequential(
                *_conv_bn(in_channels, in_channels, kernel, fused, stride, in_channels),
                *_conv_bn(in_channels, out_channels, 1, fused),
            )

    def forward(self, x: Tensor) -> Tensor:
        y = self.se(self.bn_dw(self.conv_dw(self.ghost1(x))))
        y = self.ghost2(y)
        return y if self.shortcut is None else y + self.shortcut(x)


class RepGhostNet(nn.Module):
    """Images [N, in_channels, H, W] to logits [N, num_classes]; torch's default initialisation.

    width: the multiplier of all channels, one of `WIDTHS` or any other positive number.
    dropout: the probability before the classifier, in training mode.
    reparam: the identity branch of the RepGhost modules, "bn" as published; "identity" (without BatchNorm) and "none"
        are ablations of the paper.
    shortcut: False is the paper's ablation without the residual shortcut in the blocks with in = out and stride 1.
    fused: build the form that `repghost.reparameterize` returns, to load its state dict. `reparam` then makes no
        difference, because the identity branch is part of a convolution.
    feature_channels, feature_strides: of the maps that `features` returns.

    Raises UserError for a width that is not positive and finite, less than one class or input channel, a dropout
    outside [0, 1) and an unknown identity branch.
    """

    feature_strides = (4, 8, 16, 32)

    def __init__(
        self,
        width: float = 1.0,
        num_classes: int = 1000,
        in_channels: int = 3,
        dropout: float = 0.2,
        reparam: Reparam = "bn",
        shortcut: bool = True,
        fused: bool = False,
    ) -> None:
        super().__init__()
        if not (math.isfinite(width) and width > 0):
            raise UserError(f"width={width}: give a positive number; the published widths are {WIDTHS}")
        if in_channels < 1:
            raise UserError(f"in_channels={in_channels}: an image has at least one channel")
        if not 0 <= dropout < 1:
            raise UserError(f"dropout={dropout}: give a probability of at least 0 and below 1")
        if reparam not in get_args(Reparam):
            raise UserError(f"reparam={reparam}: give one of {', '.join(get_args(Reparam))}")
        self.width, self.shortcut, self.fused = width, shortcut, fused

        channels = round_channels(16 * width)
        self.conv_stem, self.bn1 = _conv_bn(in_channels, channels, 3, fused, stride=2)
        self.relu = nn.ReLU(inplace=True)
        stages, out_channels = [], []
        for rows in STAGES:
            blocks = []
            for kernel, mid, out, se, stride in rows:
                mid, out = round_channels(mid * width), round_channels(out * width)
                blocks.append(RepGhostBottleneck(channels, mid, out, kernel, stride, se, reparam, shortcut, fused))
                channels = out
            stages.append(nn.Sequential(*blocks))
            out_channels.append(channels)
        self.feature_channels = tuple(out_channels[i] for i in FEATURE_STAGES)
        conv, bn = _conv_bn(channels, round_channels(960 * width), 1, fused)
        last = nn.Sequential(OrderedDict(conv=conv, bn1=bn, relu=nn.ReLU(inplace=True)))  # blocks.9.0
        self.blocks = nn.Sequential(*stages, nn.Sequential(last))
        self.conv_head = nn.Conv2d(conv.out_channels, 1280, 1)
        self.dropout = nn.Dropout(dropout)
        self.reset_classifier(num_classes)

    def reset_classifier(self, num_classes: int) -> None:
        """Replace the classifier by a new one, with the device and dtype of the layer before it."""
        if num_classes < 1:
            raise UserError(f"num_classes={num_classes}: give at least one class")
        weight = self.conv_head.weight
        self.classifier = nn.Linear(self.conv_head.out_channels, num_classes, device=weight.device, dtype=weight.dtype)

    def features(self, x: Tensor) -> list[Tensor]:
        """Images to the last map of every resolution, for detection and other dense tasks.

        Image sides of H and W pixels, from 32 on and not necessarily multiples of 32, give maps
        [N, feature_channels[i], ceil(H / feature_strides[i]), ceil(W / feature_strides[i])]. timm's `features_only`
        takes its maps after the first block of every resolution and leaves out the last stage, `blocks.8`; these come
        after the last block. The convolution before the pooling (`blocks.9`) and the head have no part in them.
        """
        x, maps = self.relu(self.bn1(self.conv_stem(x))), []
        for number in range(FEATURE_STAGES[-1] + 1):
            x = self.blocks[number](x)
            if number in FEATURE_STAGES:
                maps.append(x)
        return maps

    def forward_features(self, x: Tensor) -> Tensor:
        """Images to the last feature map, [N, conv_head.in_channels, ceil(H / 32), ceil(W / 32)]."""
        return self.blocks(self.relu(self.bn1(self.conv_stem(x))))

    def forward_head(self, x: Tensor) -> Tensor:
        """The last feature map to logits [N, num_classes]."""
        x = F.relu(self.conv_head(F.adaptive_avg_pool2d(x, 1)))
        return self.classifier(self.dropout(x.flatten(1)))

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


# The name in the config.yaml of every run; `repghost.repghostnet` also loads weights.
repghostnet = RepGhostNet


def count_parameters(model: nn.Module) -> int:
    """The number of parameters (BatchNorm statistics are buffers and do not count)."""
    return sum(parameter.numel() for parameter in model.parameters())


def count_macs(model: RepGhostNet, image_size: int = 224) -> int:
    """Multiply-accumulates of the convolutions and the classifier for one square image: the paper's FLOPs.

    Counted on the fused form, which has the same and no BatchNorm, without storage: nothing is computed.
    """
    channels, classes = model.conv_stem.in_channels, model.classifier.out_features
    return _count_macs(model.width, classes, channels, model.shortcut, image_size)


@cache
def _count_macs(width: float, classes: int, channels: int, shortcut: bool, image_size: int) -> int:
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        twin = RepGhostNet(width, classes, channels, shortcut=shortcut, fused=True)
        twin(torch.empty(1, channels, image_size, image_size))
    return counter.get_total_flops() // 2
