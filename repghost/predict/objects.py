"""The objects that the detector of a run finds in images, as JSON lines and drawn into copies of the images.

The detector is in fused form, in float32, on the GPU where there is one, and sees one image at a time: what it finds
does not depend on the others. Check: `pytest tests/test_detection_use.py`.
"""

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor, to_pil_image, to_tensor
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks

from repghost.detection.masks import MASK_THRESHOLD, run_lengths
from repghost.detection.run import load_detector
from repghost.errors import printable
from repghost.images import read_image
from repghost.reparameterization import reparameterize


class Objects(NamedTuple):
    """What is found in one image, best first.

    boxes: float32 [N, 4], left, top, right, bottom in pixels. masks: float32 [N, 1, H, W], probabilities, or None.
    """

    file: str
    image: Image.Image
    boxes: Tensor
    names: list[str]
    scores: Tensor
    masks: Tensor | None

    def as_json(self) -> str:
        """One line of JSON in ASCII; masks are COCO's RLEs."""
        boxes = [[round(side, 2) for side in box] for box in self.boxes.tolist()]
        scores = [round(score, 6) for score in self.scores.tolist()]
        line = {"file": self.file, "boxes": boxes, "labels": self.names, "scores": scores}
        if self.masks is not None:
            size = [self.image.height, self.image.width]
            line["masks"] = [{"size": size, "counts": counts.decode()} for counts in run_lengths(self.masks)]
        return json.dumps(line)

    def drawn(self) -> Image.Image:
        """A copy of the image with masks, boxes, names and scores."""
        picture = pil_to_tensor(self.image)
        if self.masks is not None and len(self.masks):
            picture = draw_segmentation_masks(picture, self.masks[:, 0] >= MASK_THRESHOLD, alpha=0.5)
        if len(self.boxes):
            labels = [f"{printable(n)} {s:.0%}" for n, s in zip(self.names, self.scores.tolist(), strict=True)]
            picture = draw_bounding_boxes(picture, self.boxes, labels, width=max(1, min(self.image.size) // 200))
        return to_pil_image(picture)


def finder(run: Path, selection: str, score: float) -> Callable[..., Iterator[Any]]:
    """The detector of a run as a function like a `Predictor`: of files and of what takes those that cannot be read.

    It gives `Objects`. score: the least of an object.
    """
    model, classes, _ = load_detector(run, selection)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    fused = reparameterize(model).to(device)

    @torch.inference_mode()
    def found(images: Iterable[str], on_error: Callable[[str, Exception], None]) -> Iterator[Objects]:
        for file in images:
            try:
                image = read_image(file)
            except Exception as error:  # a decoder may raise anything
                on_error(file, error)
                continue
            output = {key: value.cpu() for key, value in fused([to_tensor(image).to(device)])[0].items()}
            kept = {key: value[output["scores"] >= score] for key, value in output.items()}
            names = [classes[label - 1] for label in kept["labels"].tolist()]
            yield Objects(file, image, kept["boxes"], names, kept["scores"], kept.get("masks"))

    return found
