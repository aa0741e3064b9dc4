"""Pictures of an evaluation as PNG: the confusion matrix, and images with what they are and were taken for.

Check: `pytest tests/test_evaluation.py -k reports`.
"""

import warnings
from collections.abc import Iterable, Sequence
from typing import Any, BinaryIO

import numpy as np
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from torch import Tensor

from repghost.text import one_line

NAMED_CLASSES = 60  # more names than that cannot be read beside a matrix
NUMBERED_CLASSES = 20  # nor more numbers in it
NAME_LENGTH = 24
_COLUMNS = 5


def draw_confusion(counts: np.ndarray, classes: Sequence[str], file: BinaryIO) -> None:
    """Draws a confusion matrix: rows are what the images are, columns what they were taken for.

    counts: int [N, N], images. The colour is the share of the row's images, spread so that single mistakes among a
    thousand classes are seen. Every class has at least a pixel.
    """
    count = len(classes)
    side = min(12.0, 4 + 0.3 * count)
    figure = Figure(figsize=(side + 1, side), layout="constrained")
    axis = figure.subplots()
    shares = 100 * counts / np.maximum(counts.sum(1, keepdims=True), 1)
    image = axis.imshow(shares, cmap="magma_r", norm=PowerNorm(0.4, 0, 100), interpolation="nearest")
    figure.colorbar(image, ax=axis, label="share of the images of a class (%)", shrink=0.8)
    axis.set(xlabel="predicted", ylabel="class")
    if count <= NAMED_CLASSES:
        names = [_short(name) for name in classes]
        axis.set_xticks(range(count), names, rotation=90, fontsize="small", parse_math=False)
        axis.set_yticks(range(count), names, fontsize="small", parse_math=False)
    if count <= NUMBERED_CLASSES:
        for (row, column), number in np.ndenumerate(counts):
            if number:
                colour = "white" if shares[row, column] > 10 else "black"
                axis.text(column, row, f"{number}", ha="center", va="center", fontsize="small", color=colour)
    _save(figure, file, dpi=150)


def draw_images(images: Iterable[Tensor], lines: Sequence[tuple[str, str]], file: BinaryIO) -> None:
    """Draws images (uint8 [3, S, S] each) in a grid, two lines above each: what it is and what it was taken for."""
    rows = max(1, -(-len(lines) // _COLUMNS))
    figure = Figure(figsize=(2.2 * _COLUMNS, 2.6 * rows), layout="constrained")
    for axis in figure.subplots(rows, _COLUMNS, squeeze=False).flat:
        axis.set_axis_off()
    for axis, image, (name, predicted) in zip(figure.axes, images, lines, strict=False):
        axis.imshow(image.permute(1, 2, 0).numpy())
        title = f"{_short(name)}\ntaken for {_short(predicted)}"
        axis.set_title(title, fontsize="x-small", parse_math=False)
    if not lines:
        figure.suptitle("no image was taken for another class")
    _save(figure, file, dpi=110)


def _short(name: str) -> str:
    shown = one_line(name)
    return shown if len(shown) <= NAME_LENGTH else f"{shown[: NAME_LENGTH - 10]}…{shown[-9:]}"


def _save(figure: Figure, file: BinaryIO, **options: Any) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph", UserWarning)  # no font of this machine has it: a box is drawn
        figure.savefig(file, format="png", **options)
