"""Top-1 over multiply-accumulates, parameters and latency, RepGhostNet beside other mobile networks (the paper's
Figure 1), as accuracy.png and accuracy.svg.

    python -m repghost.figures [--results results/results.csv] [--data imagenet] [--out FOLDER]

The curves are published: Top-1, parameters, multiply-accumulates and latency of reference/peers.csv, all of timm's
results files and at 224 pixels; multiply-accumulates rounded as there. The latency is of one image in float32 on a CPU
(i9-10940X), in training form: the paper's own latencies are of a phone that the others were not measured on. Stars are
what results.csv holds. Families differ in marker and line, so the figure reads in grey.
Check: `pytest tests/test_results.py -k figure`.
"""

import argparse
import csv
import sys
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from repghost.atomic import atomic_write
from repghost.errors import UserError
from repghost.results import HEADER, paper_rows, read_results

# Column of peers.csv, and the axis.
PANELS = {
    "macs_m": "multiply-accumulates (M)",
    "params_m": "parameters (M)",
    "step_ms": "latency, one image on a CPU, training form (ms)",
}
STYLES = {
    "RepGhostNet": ("o", "-", "black"),
    "GhostNet": ("s", "", "0.35"),
    "MobileNetV2": ("^", "--", "0.45"),
    "MobileNetV3": ("v", ":", "0.45"),
    "MobileNetV4": ("D", "-.", "0.45"),
    "MobileOne": ("P", (0, (5, 2, 1, 2, 1, 2)), "0.45"),
}


def peers() -> list[dict[str, str]]:
    """The rows of reference/peers.csv: networks, their family and timm's published figures."""
    with (files("repghost") / "reference" / "peers.csv").open() as file:
        return list(csv.DictReader(file))


def draw_accuracy(results: Sequence[dict[str, str]], data: str, folder: Path) -> list[Path]:
    """Draws the published figures and what `results` holds of the data set `data`; returns the paths written."""
    figure, axes = plt.subplots(1, len(PANELS), figsize=(15, 4.5), sharey=True, layout="constrained")
    for axis, (column, label) in zip(axes, PANELS.items(), strict=True):
        for family, (marker, line, colour) in STYLES.items():
            rows = sorted((r for r in peers() if r["family"] == family), key=lambda r: float(r["top1"]))
            x, y = [float(r[column]) for r in rows], [float(r["top1"]) for r in rows]
            axis.plot(x, y, marker=marker, linestyle=line or "none", color=colour, label=f"{family}, published")
        mine = _measured(results, data, column)
        if mine:
            axis.plot(*zip(*mine, strict=True), "*", color="black", mfc="white", ms=15, label="RepGhostNet, measured")
        axis.set(xlabel=label)
        axis.grid(alpha=0.3)
    axes[0].set(ylabel="ImageNet Top-1 (%)", xscale="log")
    axes[0].legend(fontsize="small")
    written = []
    for suffix in ("png", "svg"):
        written.append(folder / f"accuracy.{suffix}")
        with atomic_write(written[-1]) as file:
            figure.savefig(file, format=suffix, dpi=150)
    plt.close(figure)
    return written


def _measured(results: Sequence[dict[str, str]], data: str, column: str) -> list[tuple[float, float]]:
    """(x, Top-1) of every measurement in the paper's table."""
    published = {row["name"].partition(".")[0]: row for row in peers()}
    points = []
    for row in paper_rows(results, data):
        cells = dict(zip(HEADER, row, strict=True))
        for top1 in (cells["last EMA Top-1"], cells["best EMA Top-1"]):
            if top1 and top1 != "not measured":
                name = f"repghostnet_{round(100 * float(cells['width'])):03d}"
                points.append((float(published[name][column]), float(top1)))
    return points


def main(arguments: Sequence[str] | None = None) -> None:
    """Draws the figure."""
    parser = argparse.ArgumentParser(prog="python -m repghost.figures", description=__doc__)
    parser.add_argument("--results", default="results/results.csv", help="the CSV file (default: %(default)s)")
    parser.add_argument("--data", default="imagenet", help="the data set's name in it (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("results"), help="folder (default: %(default)s)")
    options = parser.parse_args(arguments)
    try:
        print(*draw_accuracy(read_results(options.results), options.data, options.out), sep="\n")
    except (UserError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
