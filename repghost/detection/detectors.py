"""torchvision's detectors with a RepGhostNet of any width as their backbone.

The classes are torchvision's own, with the anchors, heads and losses of its builders, but for ImageNet's mean and
standard deviation in all of them (SSDLite's builder has others). Values are those of conf/detector.
Check: `pytest tests/test_detectors.py`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from torchvision.models.detection import FCOS, FasterRCNN, MaskRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator, DefaultBoxGenerator
from torchvision.models.detection.ssd import SSD
from torchvision.models.detection.ssdlite import SSDLiteHead
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool, LastLevelP6P7

from repghost.detection.backbone import SSDLITE_NORM, Norm, PyramidBackbone, SSDLiteBackbone
from repghost.errors import UserError
from repghost.reference import IMAGENET_MEAN, IMAGENET_STD

Name = Literal["retinanet", "faster_rcnn", "mask_rcnn", "ssdlite", "fcos"]

LEVELS = 5  # of a feature pyramid with its extra maps
SSD_MAPS = 6
_RATIOS = (0.5, 1.0, 2.0)  # heights by widths of anchors
_SSD_RATIOS = [2, 3]  # besides 1, each also inverted
_NEVER = -1e4  # a logit whose score is 0
_FCOS_GROUPS = 32  # of the GroupNorms in the heads of FCOS


@dataclass(frozen=True)
class _Settings:
    """The arguments of `detector`; classes: with the background."""

    width: float
    classes: int
    image_size: Sequence[int]
    trainable_layers: int
    norm: Norm
    channels: int
    anchor_sizes: Sequence[float]
    score_threshold: float
    nms_threshold: float
    candidates: int
    detections: int

    @property
    def normalization(self) -> dict[str, Any]:
        return {"image_mean": [*IMAGENET_MEAN], "image_std": [*IMAGENET_STD]}

    @property
    def images(self) -> dict[str, Any]:
        """How images are resized and normalized, as torchvision's classes name it."""
        return {"min_size": self.image_size[0], "max_size": self.image_size[-1], **self.normalization}

    @property
    def postprocessing(self) -> dict[str, Any]:
        """Which boxes are kept, as one-stage detectors name it."""
        return {
            "score_thresh": self.score_threshold, "nms_thresh": self.nms_threshold,
            "topk_candidates": self.candidates, "detections_per_img": self.detections,
        }  # fmt: skip

    def pyramid(self, maps: int) -> PyramidBackbone:
        """Five levels: of 3 maps with the two convolutions of RetinaNet, of 4 with one that is subsampled."""
        extra = LastLevelP6P7(self.channels, self.channels) if maps == 3 else LastLevelMaxPool()
        return PyramidBackbone(self.width, maps, self.trainable_layers, self.norm, self.channels, extra)

    def anchors(self, scales: Sequence[float], ratios: Sequence[float]) -> AnchorGenerator:
        """Anchors of every level: its size times each of `scales`, in each of `ratios`."""
        sizes = tuple(tuple(int(size * scale) for scale in scales) for size in self.anchor_sizes)
        return AnchorGenerator(sizes, (tuple(ratios),) * LEVELS)


def detector(
    name: Name,
    width: float,
    num_classes: int,
    *,
    image_size: Sequence[int],
    trainable_layers: int,
    norm: Norm,
    channels: int,
    anchor_sizes: Sequence[float],
    score_threshold: float,
    nms_threshold: float,
    candidates: int,
    detections: int,
) -> nn.Module:
    """One of torchvision's detectors, with new weights.

    In training mode it takes images (a list of float32 [3, H, W] in [0, 1], of any sizes) and targets (a list of dicts
    with `boxes` float32 [n, 4], left, top, right, bottom in pixels, `labels` int64 [n] from 1, for mask_rcnn also
    `masks` uint8 [n, H, W]) and returns a dict of losses. In evaluation mode it takes the images and returns a list of
    dicts with `boxes`, `labels`, `scores` [n] and, of mask_rcnn, `masks` float32 [n, 1, H, W] in [0, 1]. The boxes are
    in the pixels of the images given, best first. `backbone.body` is the RepGhostNet.

    num_classes: without the background. image_size: shorter side and the most that the longer one may have, to which
    images are resized; of ssdlite the side of a square. trainable_layers, norm: see `Backbone`; "synchronized" puts
    SyncBatchNorm everywhere, which trains on GPUs only when there are several ranks. channels: of the feature
    pyramid, of ssdlite those of its third map. anchor_sizes: side of the square anchor of each of the 5 levels, in
    pixels of the resized image; of ssdlite the smallest and the largest as a share of the image. score_threshold: the
    least of a box. nms_threshold: the IoU of two boxes of a class from which on only the better one stays. candidates:
    boxes that enter the suppression, of a level (retinanet, fcos), a class (ssdlite) or in all, before and after the
    suppression of the proposals (faster_rcnn, mask_rcnn). detections: boxes of an image, at most.

    Raises UserError for an argument that no detector has.
    """
    if name not in _BUILDERS:
        raise UserError(f"detector={name}: give one of {', '.join(_BUILDERS)}")
    if num_classes < 1:
        raise UserError(f"num_classes={num_classes}: give at least one class")
    sides, sizes = ((1,), 2) if name == "ssdlite" else ((1, 2), LEVELS)
    if len(image_size) not in sides:
        raise UserError(f"detector.image_size={[*image_size]}: {name} takes {' or '.join(map(str, sides))} number(s)")
    if len(anchor_sizes) != sizes:
        raise UserError(f"detector.anchor_sizes={[*anchor_sizes]}: {name} takes {sizes} numbers")
    if name == "fcos" and channels % _FCOS_GROUPS:
        raise UserError(f"detector.channels={channels}: fcos takes multiples of {_FCOS_GROUPS}")
    settings = _Settings(
        width, num_classes + 1, image_size, trainable_layers, norm, channels, anchor_sizes, score_threshold,
        nms_threshold, candidates, detections,
    )  # fmt: skip
    model = _BUILDERS[name](settings)
    return nn.SyncBatchNorm.convert_sync_batchnorm(model) if norm == "synchronized" else model


def _retinanet(s: _Settings) -> RetinaNet:
    anchors = s.anchors([2 ** (third / 3) for third in range(3)], _RATIOS)
    model = RetinaNet(s.pyramid(3), s.classes, anchor_generator=anchors, **s.images, **s.postprocessing)
    _without_background(model.head.classification_head.cls_logits, s.classes)
    return model


def _fcos(s: _Settings) -> FCOS:
    anchors = s.anchors([1], [1.0])  # points, which FCOS describes by squares
    model = FCOS(s.pyramid(3), s.classes, anchor_generator=anchors, **s.images, **s.postprocessing)
    _without_background(model.head.classification_head.cls_logits, s.classes)
    return model


@torch.no_grad()
def _without_background(logits: nn.Conv2d, classes: int) -> None:
    """Lets no box have the label 0, for which torchvision's heads with a sigmoid a class have an output as well."""
    assert logits.bias is not None
    logits.bias[::classes] = _NEVER


def _rcnn(kind: type[FasterRCNN], s: _Settings) -> FasterRCNN:
    return kind(
        s.pyramid(4),
        s.classes,
        rpn_anchor_generator=s.anchors([1], _RATIOS),
        rpn_pre_nms_top_n_test=s.candidates,
        rpn_post_nms_top_n_test=s.candidates,
        box_score_thresh=s.score_threshold,
        box_nms_thresh=s.nms_threshold,
        box_detections_per_img=s.detections,
        **s.images,
    )


def _ssdlite(s: _Settings) -> SSD:
    backbone = SSDLiteBackbone(s.width, s.trainable_layers, s.norm, s.channels)
    smallest, largest = s.anchor_sizes
    anchors = DefaultBoxGenerator([_SSD_RATIOS] * SSD_MAPS, min_ratio=smallest, max_ratio=largest)
    head = SSDLiteHead(backbone.out_channels, anchors.num_anchors_per_location(), s.classes, SSDLITE_NORM)
    size = (s.image_size[0], s.image_size[0])
    return SSD(backbone, anchors, size, s.classes, head=head, **s.normalization, **s.postprocessing)


_BUILDERS: dict[str, Callable[[_Settings], nn.Module]] = {
    "retinanet": _retinanet,
    "faster_rcnn": lambda s: _rcnn(FasterRCNN, s),
    "mask_rcnn": lambda s: _rcnn(MaskRCNN, s),
    "ssdlite": _ssdlite,
    "fcos": _fcos,
}
