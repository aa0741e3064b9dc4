"""RepGhostNet as a backbone: the feature pyramid and the maps of SSDLite, for torchvision's detectors or one's own.

torchvision's own adapters fit its own networks only: IntermediateLayerGetter does not see into `blocks`, and the
extractor of SSDLite is MobileNet's. Check: `pytest tests/test_detectors.py`.
"""

from collections import OrderedDict
from functools import partial
from typing import Literal, Self, get_args

from torch import Tensor, nn
from torchvision.models.detection.ssdlite import _extra_block, _normal_init
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import ExtraFPNBlock

from repghost.errors import UserError
from repghost.model import FEATURE_STAGES, RepGhostNet
from repghost.reparameterization import is_batch_norm

Norm = Literal["frozen", "synchronized", "trained"]

# What `trainable_layers` counts, from the last: the parts of a RepGhostNet that make the maps of one resolution.
LAYERS = (
    ("blocks.7", "blocks.8"), ("blocks.5", "blocks.6"), ("blocks.3", "blocks.4"), ("blocks.1", "blocks.2"),
    ("conv_stem", "bn1", "blocks.0"),
)  # fmt: skip
SSDLITE_NORM = partial(nn.BatchNorm2d, eps=0.001, momentum=0.03)  # of torchvision's SSDLite


class Backbone(nn.Module):
    """Images [N, 3, H, W] to an ordered dict of maps. A BatchNorm whose weight does not learn keeps its statistics.

    body: a RepGhostNet without what comes after its maps (`blocks.9`, `conv_head`, `classifier`), so that every
    parameter has a gradient; `repghost.weights.start_from(backbone.body, source)` gives it weights of a classifier.

    width: of the RepGhostNet. trainable_layers: how many of `LAYERS` learn. norm: "frozen" keeps the BatchNorms of all
    layers as they are; the other two let them learn with their layers, and are told apart by `detector`. maps: how many
    of the RepGhostNet's are used, those of the largest strides.
    """

    out_channels: int | list[int]

    def __init__(self, width: float, trainable_layers: int, norm: Norm, maps: int) -> None:
        super().__init__()
        if norm not in get_args(Norm):
            raise UserError(f"norm={norm}: give one of {', '.join(get_args(Norm))}")
        if not 0 <= trainable_layers <= len(LAYERS):
            raise UserError(f"trainable_layers={trainable_layers}: give a number from 0 to {len(LAYERS)}")
        self.body = RepGhostNet(width)
        del self.body.blocks[FEATURE_STAGES[-1] + 1 :], self.body.conv_head, self.body.classifier
        for name in (name for names in LAYERS[trainable_layers:] for name in names):
            self.body.get_submodule(name).requires_grad_(False)
        for module in self.body.modules():
            if norm == "frozen" and is_batch_norm(module):
                module.requires_grad_(False)
        self._maps = maps
        self.body_channels = self.body.feature_channels[-maps:]

    def features(self, images: Tensor) -> "OrderedDict[str, Tensor]":
        """The maps of the body that are used, named from "0"."""
        maps = self.body.features(images)[-self._maps :]
        return OrderedDict((str(number), x) for number, x in enumerate(maps))

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        for module in self.body.modules():
            if is_batch_norm(module) and not module.weight.requires_grad:
                module.eval()
        return self


class PyramidBackbone(Backbone):
    """torchvision's feature pyramid on the maps: all of its own have `channels` channels, then those of `extra`."""

    def __init__(
        self, width: float, trainable_layers: int, norm: Norm, maps: int, channels: int, extra: ExtraFPNBlock
    ) -> None:
        super().__init__(width, trainable_layers, norm, maps)
        self.out_channels = channels
        self.fpn = FeaturePyramidNetwork([*self.body_channels], channels, extra)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return self.fpn(self.features(images))


class SSDLiteBackbone(Backbone):
    """Six maps: those of the body at strides 16 and 32, and four that follow, of `channels` channels, half and quarter.

    torchvision's takes the wider tensor inside of the block after the first of them, and the last convolution of the
    classifier. Those here are narrower, and what is lost in them is little beside what the heads on them save.
    """

    def __init__(self, width: float, trainable_layers: int, norm: Norm, channels: int) -> None:
        super().__init__(width, trainable_layers, norm, maps=2)
        extra = [channels, channels // 2, channels // 2, channels // 4]
        self.out_channels = [*self.body_channels, *extra]
        inputs = self.out_channels[1:-1]
        self.extra = nn.ModuleList(_extra_block(i, o, SSDLITE_NORM) for i, o in zip(inputs, extra, strict=True))
        _normal_init(self.extra)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        maps = self.features(images)
        x = maps["1"]
        for number, block in enumerate(self.extra, 2):
            maps[str(number)] = x = block(x)
        return maps
