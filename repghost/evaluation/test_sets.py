"""How the labels of a data set relate to the outputs of a network: by the names of the classes of both.

A data set may have some of the network's classes, or all of them in another order: the outputs are those of the same
names. So it is with the test sets beside ImageNet's own.

ImageNet-A and -R have 200 of the classes, ImageNet-Sketch all and ImageNetV2 all under their numbers: of the logits
those are taken that belong to the classes of the data set, in its order, which is timm's class mask. ReaL gives every
validation image the set of labels that are right (arXiv 2006.07159): any of them counts, images without one do not.
Check: `pytest tests/test_evaluation.py`.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from repghost.dataset import SplitIndex
from repghost.errors import UserError
from repghost.metrics import score_sums
from repghost.reference import class_words, synsets
from repghost.text import one_line


@dataclass(frozen=True)
class LabelMap:
    """What of the logits and labels counts.

    columns: int64 [classes of the data set], the outputs that belong to its classes; None for all, as they are.
    accepted: bool [images, classes of the data set], the right labels of every image, in the order of the index; None
    for its label. note: for a person, how outputs and labels were matched; None where they are the same.
    """

    columns: Tensor | None = None
    accepted: Tensor | None = None
    note: str | None = None

    def to(self, device: torch.device) -> "LabelMap":
        columns, accepted = (t if t is None else t.to(device) for t in (self.columns, self.accepted))
        return replace(self, columns=columns, accepted=accepted)

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


def label_map(
    name: str | None, real_labels: str | Path | None, index: SplitIndex, outputs: int, classes: Sequence[str] | None
) -> LabelMap:
    """The test set `name` (a key of PUBLISHED, None for an ordinary data set) with the classes and images of `index`.

    outputs: of the network. classes: their names, None where nobody knows them. Raises UserError when they do not fit.
    """
    if classes is not None and len(classes) != outputs:  # of an earlier version, or changed by hand
        classes = None
    if outputs == len(synsets()) and classes is not None and tuple(classes) == class_words():
        classes = synsets()
    if name in (None, "imagenet_real"):
        columns, note = match_classes(index.classes, classes, outputs)
        selected = None if columns is None else torch.tensor(columns)
        if name is None:
            return LabelMap(selected, note=note)
        if real_labels is None:
            raise UserError("real_labels is missing: give the path of ReaL's real.json, real_labels=FILE")
        accepted = _accepted(Path(real_labels), index, outputs)
        return LabelMap(selected, accepted if selected is None else accepted[:, selected], note)
    if outputs != len(synsets()):
        raise UserError(f"the weights have {outputs} classes, {name} {len(synsets())}")
    output_of = {label: output for output, label in enumerate(class_columns(classes or synsets()))}
    return LabelMap(torch.tensor([output_of[label] for label in class_columns(index.classes)]))


def match_classes(
    data: Sequence[str], network: Sequence[str] | None, outputs: int
) -> tuple[list[int] | None, str | None]:
    """The output of a network for every class of a data set, and a note on how they were matched.

    data, network: names of the classes in label order; network: None where nobody knows them, their number has to be
    that of the data set then. None for the outputs as they are. Raises UserError that names the first class which the
    network does not have.
    """
    # Without names of their own the classes of shards are numbered; so are ImageNet's in some of its copies.
    numbered = {name: n for n, name in enumerate(map(str, range(outputs)))}
    numbers = [numbered[name] for name in data] if numbered.keys() == set(data) and len(data) == outputs else None
    if network is None:
        if len(data) != outputs:
            raise UserError(f"the weights have {outputs} classes, the data {len(data)}")
        network = data if numbers is None or outputs != len(synsets()) else synsets()
    if tuple(data) == tuple(network):
        return None, None
    output_of = {name: output for output, name in enumerate(network)}
    if unknown := [name for name in data if name not in output_of]:
        if numbers:
            in_order = numbers == list(range(outputs))
            return (
                None if in_order else numbers,
                "the classes of the data set are numbers: taken for the labels of the network",
            )
        which = f"{one_line(unknown[0])} ({len(unknown)} of the {len(data)} classes of the data set)"
        hint = "if it is only named otherwise, data.class_names=FILE names the classes"
        raise UserError(f"the network does not know the class {which}: {hint}")
    for names in (network, data):
        _require_different(names)
    columns = [output_of[name] for name in data]
    if len(columns) < outputs:
        return columns, f"scored among the {len(columns)} classes of the data set, of the network's {outputs}"
    return columns, "the classes of the data set are in another order than the network's: matched by name"


def _require_different(names: Sequence[str]) -> None:
    if len(set(names)) < len(names):
        twice = next(name for i, name in enumerate(names) if name in names[:i])
        raise UserError(f"two classes are called {one_line(twice)}: they cannot be told apart by name")


def class_columns(classes: Sequence[str]) -> list[int]:
    """The label in ImageNet of every class, named by its WordNet id or by its number."""
    label_of = {name: label for label, name in enumerate(synsets())} | {str(n): n for n in range(len(synsets()))}
    if unknown := [name for name in classes if name not in label_of]:
        hint = "data.class_names=FILE names them"
        raise UserError(
            f"{len(unknown)} classes are no WordNet ids or numbers of ImageNet's 1,000: {one_line(unknown[0])}: {hint}"
        )
    _require_different(classes)
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
