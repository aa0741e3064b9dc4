"""Reports of an evaluation as CSV files: classes.csv and confusions.csv, predictions.csv.

`classes` is the accuracy of every class and the pairs of classes that are confused most, `predictions` the five
likeliest classes of every image. Check: `pytest tests/test_evaluation.py -k reports`.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from repghost.dataset import SplitIndex
from repghost.errors import UserError
from repghost.files import rows_as_csv, write_text

REPORTS = ("classes", "predictions")
CONFUSED_PAIRS = 100  # rows of confusions.csv
CONFUSION_COLUMNS = ("label", "class", "predicted_label", "predicted_class", "images", "share")
Rows = Iterator[dict[str, Any]]


class Predictions(NamedTuple):
    """The K likeliest classes of N images (K = 5, or all of fewer classes), likeliest first."""

    positions: Tensor  # int64 [N], rows of the index
    labels: Tensor  # int64 [N]
    top: Tensor  # int64 [N, K]
    probabilities: Tensor  # float32 [N, K]


def report_names(report: str | Sequence[str] | None) -> list[str]:
    """The names in the value of `report`, a name or several. Raises UserError for one that is not in REPORTS."""
    names = [report] if isinstance(report, str) else list(report or ())
    if unknown := set(names) - set(REPORTS):
        raise UserError(f"report={min(unknown)} is not one of {', '.join(REPORTS)}")
    return names


def write_reports(names: Sequence[str], predictions: Predictions, index: SplitIndex, folder: Path) -> None:
    """Writes the reports `names` on the predictions for the images of `index` into `folder`."""
    if "classes" in names:
        write_text(folder / "classes.csv", rows_as_csv(list(_class_rows(predictions, index.classes))))
        confusions = rows_as_csv(list(_confusion_rows(predictions, index.classes)), CONFUSION_COLUMNS)
        write_text(folder / "confusions.csv", confusions)
    if "predictions" in names:
        write_text(folder / "predictions.csv", rows_as_csv(list(_prediction_rows(predictions, index.keys()))))


def _class_rows(predictions: Predictions, classes: Sequence[str]) -> Rows:
    labels, hits = predictions.labels, predictions.top == predictions.labels[:, None]
    groups = (labels, labels[hits[:, 0]], labels[hits.any(1)])
    counts = (torch.bincount(group, minlength=len(classes)).tolist() for group in groups)
    for label, (name, images, *right) in enumerate(zip(classes, *counts, strict=True)):
        top1, top5 = (100 * count / images if images else "" for count in right)
        yield {"label": label, "class": name, "images": images, "top1": top1, "top5": top5}


def _confusion_rows(predictions: Predictions, classes: Sequence[str]) -> Rows:
    labels, predicted = predictions.labels, predictions.top[:, 0]
    images = torch.bincount(labels, minlength=len(classes))
    wrong = (labels * len(classes) + predicted)[labels != predicted]
    counts = torch.bincount(wrong, minlength=len(classes) ** 2)
    for pair in counts.argsort(descending=True, stable=True)[:CONFUSED_PAIRS].tolist():
        if count := int(counts[pair]):
            label, other = divmod(pair, len(classes))
            cells = (label, classes[label], other, classes[other], count, 100 * count / int(images[label]))
            yield dict(zip(CONFUSION_COLUMNS, cells, strict=True))


def _prediction_rows(predictions: Predictions, keys: Sequence[str]) -> Rows:
    for position, label, top, probabilities in zip(*(x.tolist() for x in predictions), strict=True):
        yield {
            "key": keys[position],
            "label": label,
            **{f"predicted_{k}": predicted for k, predicted in enumerate(top, 1)},
            **{f"probability_{k}": f"{probability:.6g}" for k, probability in enumerate(probabilities, 1)},
        }
