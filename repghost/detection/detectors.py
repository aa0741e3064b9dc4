"""torchvision's detectors with a RepGhostNet of any width as their backbone.

The classes are torchvision's own, with the anchors, heads and losses of its builders, but for ImageNet's mean and
standard deviation in all of them (SSDLite's builder has others). Values are those of conf/detector.

In training mode a detector takes images (a list of float32 [3, H, W] in [0, 1], of any sizes) and targets (a list of
dicts with `boxes` float32 [n, 4], left, top, right, bottom in pixels, `labels` int64 [n] from 1, for mask_rcnn also
`masks` uint8 [n, H, W]) and returns a dict of losses. In evaluation mode it takes the images and returns a list of
dicts with `boxes`, `labels`, `scores` [n] and, of mask_rcnn, `masks` float32 [n, 1, H, W] in [0, 1]. The boxes are in
the pixels of the images given, best first. Check: `pytest tests/test_detectors.py`.
"""

from collections.abc import Sequence
from typing import Any, Literal, get_args

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

_IMAGENET = {"image_mean": [*IMAGENET_MEAN], "image_std": [*IMAGENET_STD]}
_RATIOS = (0.5, 1.0, 2.0)  # heights by widths of anchors
_OCTAVE = tuple(2 ** (third / 3) for third in range(3))  # RetinaNet's anchors of a level, times its size
_SSD_RATIOS = [[2, 3]] * 6  # of each of the six maps, besides 1, and inverted
_FCOS_GROUPS = 32  # of the GroupNorms in the heads of FCOS
_NEVER = -1e4  # a logit whose score is 0


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
    """One of torchvision's detectors, with new weights (see the module); `backbone.body` is its RepGhostNet.

    num_classes: without the background. image_size: shorter side and the most that the longer one may have, to which
    images are resized; of ssdlite the side of a square. trainable_layers, norm: see `Backbone`; "synchronized" makes
    every BatchNorm a SyncBatchNorm, which several ranks can train on GPUs only. channels: of the feature pyramid, of
    ssdlite those of its third map. anchor_sizes: side of the square anchors of each of the 5 levels, in pixels of the
    resized image; of ssdlite the smallest and the largest as a share of the image. score_threshold: the least of a box.
    nms_threshold: the IoU with a better box of its class above which a box goes. candidates: boxes before that, of a
    level (retinanet, fcos), of a class (ssdlite), or proposals. detections: boxes of an image, at most.

    Raises UserError for an argument that no detector has.
    """
    _require_possible(name, num_classes, image_size, channels, anchor_sizes)
    body, classes = (width, trainable_layers, norm), num_classes + 1
    kept: dict[str, Any] = {
        "score_thresh": score_threshold, "nms_thresh": nms_threshold, "detections_per_img": detections
    }  # fmt: skip
    images = {"min_size": image_size[0], "max_size": image_size[-1], **_IMAGENET}
    model: Any
    if name == "ssdlite":
        backbone, size = SSDLiteBackbone(*body, channels), (image_size[0], image_size[0])
        boxes = DefaultBoxGenerator(_SSD_RATIOS, *anchor_sizes)
        head = SSDLiteHead(backbone.out_channels, boxes.num_anchors_per_location(), classes, SSDLITE_NORM)
        model = SSD(backbone, boxes, size, classes, head=head, topk_candidates=candidates, **kept, **_IMAGENET)
    elif name in ("retinanet", "fcos"):
        pyramid = PyramidBackbone(*body, 3, channels, LastLevelP6P7(channels, channels))
        kind, scales, ratios = (RetinaNet, _OCTAVE, _RATIOS) if name == "retinanet" else (FCOS, (1,), (1.0,))
        anchors = _anchors(anchor_sizes, scales, ratios)
        model = kind(pyramid, classes, anchor_generator=anchors, topk_candidates=candidates, **kept, **images)
        _without_background(model.head.classification_head.cls_logits, classes)
    else:
        pyramid = PyramidBackbone(*body, 4, channels, LastLevelMaxPool())
        proposals = dict.fromkeys(("rpn_pre_nms_top_n_test", "rpn_post_nms_top_n_test"), candidates)
        of_boxes = {f"box_{key}": value for key, value in kept.items()}
        anchors = _anchors(anchor_sizes, (1,), _RATIOS)
        kind = MaskRCNN if name == "mask_rcnn" else FasterRCNN
        model = kind(pyramid, classes, rpn_anchor_generator=anchors, **proposals, **of_boxes, **images)
    return nn.SyncBatchNorm.convert_sync_batchnorm(model) if norm == "synchronized" else model


def _require_possible(
    name: str, num_classes: int, image_size: Sequence[int], channels: int, anchor_sizes: Sequence[float]
) -> None:
    """Raises UserError for arguments that do not fit to the detector."""
    if name not in get_args(Name):
        raise UserError(f"detector={name}: give one of {', '.join(get_args(Name))}")
    if num_classes < 1:
        raise UserError(f"num_classes={num_classes}: give at least one class")
    counts, sizes = ((1,), 2) if name == "ssdlite" else ((1, 2), 5)
    if len(image_size) not in counts:
        raise UserError(f"detector.image_size={[*image_size]}: {name} takes {' or '.join(map(str, counts))} number(s)")
    if len(anchor_sizes) != sizes:
        raise UserError(f"detector.anchor_sizes={[*anchor_sizes]}: {name} takes {sizes} numbers")
    if name == "fcos" and (channels % _FCOS_GROUPS or channels == _FCOS_GROUPS):  # which fails on a map of one pixel
        raise UserError(
            f"detector.channels={channels}: fcos takes multiples of {_FCOS_GROUPS} from {2 * _FCOS_GROUPS} on"
        )


def _anchors(sizes: Sequence[float], scales: Sequence[float], ratios: Sequence[float]) -> AnchorGenerator:
    """Anchors of every level: its size times each of `scales`, in each of `ratios`."""
    sides = tuple(tuple(int(size * scale) for scale in scales) for size in sizes)
    return AnchorGenerator(sides, (tuple(ratios),) * len(sides))


@torch.no_grad()
def _without_background(logits: nn.Conv2d, classes: int) -> None:
    """Lets no box have the label 0, for which torchvision's heads with a sigmoid a class have an output as well."""
    assert logits.bias is not None
    logits.bias[::classes] = _NEVER
