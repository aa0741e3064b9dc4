"""A picture of images with their objects and with what a detector found in them.

Check: `pytest tests/test_detection_evaluation.py -k report`.
"""

from collections.abc import Mapping, Sequence
from typing import Any, BinaryIO

import torch
from faster_coco_eval.core import mask
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import InterpolationMode, resize, to_pil_image

from repghost.detection.detections import Detections
from repghost.detection.figures import Truth
from repghost.predict.objects import Objects

_SIDE = 400  # pixels that the shorter side of an image has at least, so that names can be read
_PAIRS = 2  # images in a row of the figure


def draw_detections(
    images: Sequence[Tensor],
    shown: Sequence[tuple[int, float]],
    score: float,
    detections: Detections,
    truth: Truth,
    classes: Sequence[str],
    file: BinaryIO,
) -> None:
    """Draws pairs of pictures as PNG into `file`: an image with its objects, and with what was found in it.

    images: uint8 [3, H, W] each. shown: their rows in the index, and how well each was done, in [0, 1]. score: the
    least of a detection that is drawn.
    """
    rows = max(1, -(-len(images) // _PAIRS))
    figure = Figure(figsize=(8 * _PAIRS, 4 * rows), layout="constrained")
    for axis in figure.subplots(rows, 2 * _PAIRS, squeeze=False).flat:
        axis.set_axis_off()
    pictures: list[tuple[Image.Image, str]] = []
    for image, (row, quality) in zip(images, shown, strict=True):
        objects = [each for each in truth.objects(row) if not each.get("iscrowd")]
        results = detections.results(truth.images, truth.categories, detections.of_image(row))
        found = [each for each in results if each["score"] >= score]
        pictures.append((_drawn(image, objects, truth, classes), f"image {truth.images[row]['id']}: its objects"))
        pictures.append((_drawn(image, found, truth, classes), f"found: panoptic quality {quality:.0%}"))
    for axis, (picture, title) in zip(figure.axes, pictures, strict=False):
        axis.imshow(picture)
        axis.set_title(title, fontsize="small", parse_math=False)
    figure.savefig(file, format="png", dpi=80)


def _drawn(
    image: Tensor, annotations: Sequence[Mapping[str, Any]], truth: Truth, classes: Sequence[str]
) -> Image.Image:
    """annotations: COCO's annotations or results of the image."""
    height, width = image.shape[1:]
    scale = max(1, -(-_SIDE // min(height, width)))
    size = [scale * height, scale * width]
    boxes, labels = truth.boxes_of(annotations)
    scores = torch.tensor([each.get("score", 1.0) for each in annotations])
    rles = [mask.segmToRle(each["segmentation"], width, height) for each in annotations if each.get("segmentation")]
    masks = None
    if rles and len(rles) == len(labels):
        pixels = torch.stack([torch.from_numpy(mask.decode(rle)) for rle in rles])
        masks = resize(pixels, size, InterpolationMode.NEAREST).float()[:, None]
    enlarged = to_pil_image(resize(image, size, InterpolationMode.BILINEAR, antialias=True))
    names = [classes[label - 1] for label in labels.tolist()]
    return Objects("", enlarged, scale * boxes, names, scores, masks).drawn()
