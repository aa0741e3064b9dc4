"""What detectors found, as flat arrays: on a rank, gathered from all of them, and as COCO's results.

Check: `pytest tests/test_detection_evaluation.py`.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import chain
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import Tensor
from torchvision.ops import box_iou

from repghost.detection.masks import run_lengths
from repghost.errors import UserError

_SAME_BOX = 0.9  # IoU from which on the boxes of two networks stand for one detection


@dataclass(frozen=True)
class Detections:
    """N detections in M images, ordered by image and there by descending score.

    images: int64 [M], rows of the index that were looked at. rows: int64 [N], the image of each detection. labels:
    int64 [N], from 1. scores: float32 [N]. boxes: float32 [N, 4], left, top, right, bottom in pixels. masks: uint8 [B],
    COCO's compressed RLEs one after the other. lengths: int64 [N], bytes of each, all 0 without masks.
    """

    images: Tensor
    rows: Tensor
    labels: Tensor
    scores: Tensor
    boxes: Tensor
    masks: Tensor
    lengths: Tensor

    @classmethod
    def of(cls, outputs: Sequence[Mapping[str, Tensor]], positions: Tensor) -> Self:
        """The detections in a batch. outputs: of a detector in evaluation mode. positions: int64, -1 for no image."""
        kept = [(int(row), output) for row, output in zip(positions, outputs, strict=True) if row >= 0]
        found = [{key: tensor.detach().cpu() for key, tensor in output.items()} for _, output in kept]
        masks = [
            run_lengths(output["masks"]) if "masks" in output else [b""] * len(output["boxes"]) for output in found
        ]
        flat = [mask for of_image in masks for mask in of_image]
        return cls(
            images=torch.tensor([row for row, _ in kept], dtype=torch.int64),
            rows=torch.tensor(
                [row for (row, _), output in zip(kept, found, strict=True) for _ in output["labels"]]
            ).long(),
            labels=torch.cat([torch.empty(0, dtype=torch.int64), *(output["labels"] for output in found)]),
            scores=torch.cat([torch.empty(0), *(output["scores"].float() for output in found)]),
            boxes=torch.cat([torch.empty(0, 4), *(output["boxes"].float() for output in found)]),
            masks=torch.frombuffer(bytearray(b"".join(flat) or b"\0"), dtype=torch.uint8)[: sum(map(len, flat))],
            lengths=torch.tensor([len(mask) for mask in flat], dtype=torch.int64),
        )

    @staticmethod
    def joined(batches: Sequence["Detections"]) -> "Detections | None":
        """The detections of these batches of all ranks; None on all ranks but the first.

        To be called on all ranks together.
        """
        of_ranks: list[Any] | None = [batches]
        if dist.is_initialized() and (ranks := dist.get_world_size()) > 1:
            of_ranks = [None] * ranks if dist.get_rank() == 0 else None
            dist.gather_object(batches, of_ranks)
        if of_ranks is None:
            return None
        # Every batch is of successive images, so that those of all ranks have to be put in order, and nothing in them.
        every = sorted(chain([Detections.of([], torch.empty(0))], *of_ranks), key=lambda found: found.images.tolist())
        columns = {each.name: torch.cat([getattr(found, each.name) for found in every]) for each in fields(Detections)}
        return Detections(**columns)

    def require_all(self, images: int) -> None:
        """Raises UserError unless each of the `images` images of the index was looked at exactly once."""
        if not torch.equal(self.images, torch.arange(images)):
            once = len(self.images.unique())
            raise UserError(
                f"evaluated {len(self.images)} images, {once} of them different, but the data set has {images}"
            )

    def of_image(self, row: int) -> slice:
        """Where the detections of an image are."""
        first, end = torch.searchsorted(self.rows, torch.tensor([row, row + 1])).tolist()
        return slice(first, end)

    def results(
        self, images: Sequence[Mapping[str, Any]], categories: Sequence[int], which: slice = slice(None)
    ) -> Iterator[dict[str, Any]]:
        """COCO's results. images: of COCO's annotations, in the order of the index. categories: id of each class.

        which: of the detections.
        """
        left, top, right, bottom = self.boxes[which].double().unbind(1)
        boxes = torch.stack([left, top, right - left, bottom - top], dim=1).tolist()
        content, end = self.masks.numpy().tobytes(), int(self.lengths[: which.start or 0].sum())
        columns = [getattr(self, name)[which].tolist() for name in ("rows", "labels", "scores", "lengths")]
        for row, label, score, length, box in zip(*columns, boxes, strict=True):
            image, start, end = images[row], end, end + length
            result = {"image_id": image["id"], "category_id": categories[label - 1], "bbox": box, "score": score}
            if length:
                size = [image["height"], image["width"]]
                result["segmentation"] = {"size": size, "counts": content[start:end].decode("ascii")}
            yield result


def difference(one: Detections, other: Detections) -> dict[str, float | int]:
    """How far two networks differ on the same images.

    Detections of the same class whose boxes, made a pixel larger, have an IoU of 0.9 or more are the same one:
    `max_score_diff` is the largest difference of their scores, `unmatched` how many detections of either have no
    counterpart.
    """
    largest, matched = 0.0, 0
    wider = one.boxes.new_tensor([-0.5, -0.5, 0.5, 0.5])  # boxes at the border of an image may have no area
    for row in one.images.tolist():
        a, b = one.of_image(row), other.of_image(row)
        iou = box_iou(one.boxes[a] + wider, other.boxes[b] + wider)
        iou[one.labels[a][:, None] != other.labels[b]] = 0
        if iou.numel():
            best, place = iou.max(dim=1)
            same = best >= _SAME_BOX
            matched += int(same.sum())
            differences = (one.scores[a] - other.scores[b][place]).abs()[same]
            largest = max(largest, float(differences.max())) if len(differences) else largest
    return {"max_score_diff": largest, "unmatched": len(one.rows) + len(other.rows) - 2 * matched}
