"""curve.png: accuracy and loss of a run over its epochs."""

from collections.abc import Sequence
from typing import BinaryIO

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt


def draw_curve(history: Sequence[dict[str, float]], file: BinaryIO) -> None:
    """Draws raw and averaged Top-1, and the losses, of the rows of metrics.csv as PNG into `file`."""
    epochs = [row["epoch"] + 1 for row in history]
    figure, (accuracy, loss) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for axes, label, lines in (
        (accuracy, "Top-1 (%)", {"val_top1": "raw", "ema_top1": "EMA"}),
        (loss, "loss", {"train_loss": "training", "val_loss": "validation, raw", "ema_loss": "validation, EMA"}),
    ):
        for (column, name), style in zip(lines.items(), ("-", "--", ":"), strict=False):
            axes.plot(epochs, [row[column] for row in history], style, label=name)
        axes.set(xlabel="epoch", ylabel=label)
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(file, format="png", dpi=110)
    plt.close(figure)
