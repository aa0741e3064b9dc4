"""Reports of an evaluation: CSV files and pictures.

    classes        classes.csv, the accuracy of every class, and confusions.csv, the pairs that are confused most
    predictions    predictions.csv, the five likeliest classes of every image
    confusion      confusion.png, the confusion matrix
    worst          worst.png, the images that the network is most confidently wrong about

Check: `pytest tests/test_evaluation.py -k reports`.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from repghost.errors import UserError
from repghost.files import atomic_write, rows_as_csv, write_text
from repghost.text import as_cell

if TYPE_CHECKING:
    from repghost.dataset import DataModule  # which needs torch

PICTURES = ("confusion", "worst")
REPORTS = ("classes", "predictions", *PICTURES)
CONFUSED_PAIRS = 100  # rows of confusions.csv
CONFUSION_COLUMNS = ("label", "class", "predicted_label", "predicted_class", "images", "share")
WORST_IMAGES = 25
Rows = Iterator[dict[str, Any]]


class Predictions(NamedTuple):
    """The K likeliest classes of N images (K = 5, or all of fewer classes), likeliest first."""

    positions: np.ndarray  # int64 [N], rows of the index
    labels: np.ndarray  # int64 [N]
    top: np.ndarray  # int64 [N, K]
    probabilities: np.ndarray  # float32 [N, K]


def report_names(report: str | Sequence[str] | None, known: Sequence[str] = REPORTS) -> list[str]:
    """The names in the value of `report`, a name or several. Raises UserError for one that is not in `known`."""
    names = [report] if isinstance(report, str) else list(report or ())
    if unknown := set(names) - set(known):
        raise UserError(f"report={min(unknown)} is not one of {', '.join(known)}")
    return names


def write_reports(names: Sequence[str], predictions: Predictions, data: "DataModule", folder: Path) -> None:
    """Writes the reports `names` on the predictions for the validation images of `data` into `folder`."""
    index = data.index("val")
    if "classes" in names:
        write_text(folder / "classes.csv", rows_as_csv(list(_class_rows(predictions, index.classes))))
        confusions = rows_as_csv(list(_confusion_rows(predictions, index.classes)), CONFUSION_COLUMNS)
        write_text(folder / "confusions.csv", confusions)
    if "predictions" in names:
        write_text(folder / "predictions.csv", rows_as_csv(list(_prediction_rows(predictions, index.keys()))))
    if "confusion" in names:
        from repghost.evaluation.pictures import draw_confusion  # matplotlib is slow to import

        with atomic_write(folder / "confusion.png") as file:
            draw_confusion(_confusion_counts(predictions, len(index.classes)), index.classes, file)
    if "worst" in names:
        from repghost.evaluation.pictures import draw_images

        worst = _worst(predictions)
        images = data.images("val", predictions.positions[worst].tolist()) if len(worst) else ()
        lines = [_worst_line(predictions, int(row), index.classes) for row in worst]
        with atomic_write(folder / "worst.png") as file:
            draw_images(images, lines, file)


def _class_rows(predictions: Predictions, classes: Sequence[str]) -> Rows:
    labels, hits = predictions.labels, predictions.top == predictions.labels[:, None]
    groups = (labels, labels[hits[:, 0]], labels[hits.any(1)])
    counts = (np.bincount(group, minlength=len(classes)).tolist() for group in groups)
    for label, (name, images, *right) in enumerate(zip(classes, *counts, strict=True)):
        top1, top5 = (100 * count / images if images else "" for count in right)
        yield {"label": label, "class": as_cell(name), "images": images, "top1": top1, "top5": top5}


def _confusion_counts(predictions: Predictions, classes: int) -> np.ndarray:
    """int64 [classes, classes]: images of each class (row) that were taken for each class (column)."""
    pairs = predictions.labels * classes + predictions.top[:, 0]
    return np.bincount(pairs, minlength=classes**2).reshape(classes, classes)


def _confusion_rows(predictions: Predictions, classes: Sequence[str]) -> Rows:
    counts = _confusion_counts(predictions, len(classes))
    images = counts.sum(1)
    np.fill_diagonal(counts, 0)
    flat = counts.ravel()
    for pair in np.argsort(-flat, kind="stable")[:CONFUSED_PAIRS].tolist():
        if count := int(flat[pair]):
            label, other = divmod(pair, len(classes))
            names = (as_cell(classes[label]), other, as_cell(classes[other]))
            yield dict(zip(CONFUSION_COLUMNS, (label, *names, count, 100 * count / int(images[label])), strict=True))


def _prediction_rows(predictions: Predictions, keys: Sequence[str]) -> Rows:
    for position, label, top, probabilities in zip(*(x.tolist() for x in predictions), strict=True):
        yield {
            "key": as_cell(keys[position]),
            "label": label,
            **{f"predicted_{k}": predicted for k, predicted in enumerate(top, 1)},
            **{f"probability_{k}": f"{probability:.6g}" for k, probability in enumerate(probabilities, 1)},
        }


def _worst(predictions: Predictions) -> np.ndarray:
    """int64 [M]: of the predictions that are wrong, the most confident ones, the worst first."""
    wrong = np.flatnonzero(predictions.top[:, 0] != predictions.labels)
    return wrong[np.argsort(-predictions.probabilities[wrong, 0], kind="stable")][:WORST_IMAGES]


def _worst_line(predictions: Predictions, row: int, classes: Sequence[str]) -> tuple[str, str]:
    """What is written above an image: its class, and what it was taken for."""
    label, predicted = classes[predictions.labels[row]], classes[predictions.top[row, 0]]
    return label, f"{predicted} {predictions.probabilities[row, 0]:.0%}"
