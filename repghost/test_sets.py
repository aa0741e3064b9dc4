"""The test sets beside ImageNet's own: how their labels relate to the 1,000 outputs of a network.

ImageNet-A and -R have 200 of the classes, ImageNet-Sketch all and ImageNetV2 all under their numbers: of the logits
those are taken that belong to the classes of the data set, in its order, which is timm's class mask. ReaL gives every
validation image the set of labels that are right (arXiv 2006.07159): any of them counts, images without one do not.
Check: `pytest tests/test_evaluation.py`.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from repghost.dataset import SplitIndex
from repghost.errors import UserError
from repghost.metrics import score_sums
from repghost.reference import PUBLISHED, synsets


@dataclass(frozen=True)
class LabelMap:
    """What of the logits and labels counts.

    columns: int64 [classes of the data set], the outputs that belong to its classes; None for all, as they are.
    accepted: bool [images, outputs], the right labels of every image, in the order of the index; None for its label.
    """

    columns: Tensor | None = None
    accepted: Tensor | None = None

    def to(self, device: torch.device) -> "LabelMap":
        return LabelMap(*(t if t is None else t.to(device) for t in (self.columns, self.accepted)))

    def images(self, images: int) -> int:
        """How many of the data set's images count."""
        return images if self.accepted is None else int(self.accepted.any(1).sum())

    def select(self, logits: Tensor) -> Tensor:
        """[N, 1000] to [N, classes of the data set]."""
        return logits if self.columns is None else logits[:, self.columns]

    def sums(self, logits: Tensor, labels: Tensor, positions: Tensor) -> Tensor:
        """As `repghost.metrics.score_sums`; positions: int64 [N], rows of the index.

        With several right labels the loss is that of the image's own label.
        """
        if self.accepted is None:
            return score_sums(logits, labels)
        # Rows without an image have positions past the end of the data set and label -1.
        accepted = self.accepted[positions.clamp(max=len(self.accepted) - 1)]
        counted = (labels >= 0) & accepted.any(1)
        loss = F.cross_entropy(logits, labels.where(counted, -1), ignore_index=-1, reduction="sum").double()
        hits = accepted.gather(1, logits.topk(min(5, logits.shape[1]), dim=1).indices) & counted[:, None]
        return torch.stack([loss, hits[:, 0].sum(), hits.any(1).sum(), counted.sum()])


def label_map(name: str | None, real_labels: str | Path | None, index: SplitIndex, outputs: int) -> LabelMap:
    """The test set `name` (a key of PUBLISHED, None for an ordinary data set) with the classes and images of `index`.

    outputs: of the network. Raises UserError when they do not fit.
    """
    if name is not None and name not in PUBLISHED:
        raise UserError(f"test_set={name} is not one of {', '.join(PUBLISHED)}")
    expected = len(index.classes) if name in (None, "imagenet_real") else len(synsets())
    if outputs != expected:
        raise UserError(f"the weights have {outputs} classes, {name or 'the data'} {expected}")
    if name is None:
        return LabelMap()
    if name != "imagenet_real":
        return LabelMap(columns=torch.tensor(class_columns(index.classes)))
    if real_labels is None:
        raise UserError("real_labels is missing: give the path of ReaL's real.json, real_labels=FILE")
    return LabelMap(accepted=_accepted(Path(real_labels), index, outputs))


def class_columns(classes: Sequence[str]) -> list[int]:
    """The label in ImageNet of every class, named by its WordNet id or by its number."""
    label_of = {name: label for label, name in enumerate(synsets())} | {str(n): n for n in range(len(synsets()))}
    if unknown := [name for name in classes if name not in label_of]:
        hint = "data.class_names=FILE names them"
        raise UserError(
            f"{len(unknown)} classes are no WordNet ids or numbers of ImageNet's 1,000: {unknown[0]}: {hint}"
        )
    return [label_of[name] for name in classes]


def _accepted(path: Path, index: SplitIndex, outputs: int) -> Tensor:
    """bool [images, outputs] from ReaL's list of labels for every ILSVRC2012_val number, counted from 1."""
    try:
        labels = json.loads(path.expanduser().read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not ReaL's list of labels ({error})") from None
    accepted = torch.zeros(len(index), outputs, dtype=torch.bool)
    for row, key in enumerate(index.keys()):
        match = re.search(r"ILSVRC2012_val_(\d{8})", key)
        if not match or not 1 <= int(match[1]) <= len(labels):
            raise UserError(f"{key}: not a name of an ImageNet validation image that {path} has labels for")
        accepted[row, labels[int(match[1]) - 1]] = True
    return accepted
