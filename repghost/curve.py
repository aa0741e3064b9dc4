"""curve.png: accuracy, loss and learning rate of a run over its epochs, beside the official run of its width."""

from collections.abc import Sequence
from typing import BinaryIO

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

PANELS = (
    ("Top-1 (%)", {"val_top1": "raw", "ema_top1": "EMA"}),
    ("loss", {"train_loss": "training", "val_loss": "validation, raw", "ema_loss": "validation, EMA"}),
    ("learning rate", {"lr": "learning rate"}),
)
# What the official logs measured in the same way; their training loss is of the last batches of an epoch.
OFFICIAL = ("val_top1", "ema_top1", "train_loss", "lr")


def draw_curve(
    history: Sequence[dict[str, float]], official: dict[int, dict[str, float]] | None, file: BinaryIO
) -> None:
    """Draws the rows of metrics.csv, and those of the official run where there is one, as PNG into `file`."""
    figure, axes = plt.subplots(1, len(PANELS), figsize=(15, 4), layout="constrained")
    for axis, (label, lines) in zip(axes, PANELS, strict=True):
        for (column, name), style in zip(lines.items(), ("-", "--", ":"), strict=False):
            (line,) = axis.plot([r["epoch"] + 1 for r in history], [r[column] for r in history], style, label=name)
            if official and column in OFFICIAL:
                rows = [row for row in official.values() if column in row]
                epochs, values = [row["epoch"] + 1 for row in rows], [row[column] for row in rows]
                axis.plot(epochs, values, style, color=line.get_color(), alpha=0.35, label=f"{name}, official")
        axis.set(xlabel="epoch", ylabel=label)
        axis.grid(alpha=0.3)
        axis.legend()
    figure.savefig(file, format="png", dpi=110)
    plt.close(figure)
