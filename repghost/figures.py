"""Top-1 over multiply-accumulates, parameters and latency, RepGhostNet beside other mobile networks (the paper's
Figure 1), as accuracy.png and accuracy.svg.

    python -m repghost.figures [--results results/results.csv] [--latency results/latency.csv] [--data imagenet]
                               [--out FOLDER]

The curves are published: Top-1, parameters and multiply-accumulates of reference/peers.csv, all of timm's results files
and at 224 pixels; multiply-accumulates rounded as there. The latency is what benchmarks/latency.py measured, where
latency.csv holds RepGhostNet fused and a peer beside it: of one machine, backend and number of threads, which the axis
names. Without, it is timm's of one image in float32 on a CPU (i9-10940X), in training form: the paper's own latencies
are of a phone that the others were not measured on. Stars are what results.csv holds. Families differ in marker and
line, so the figure reads in grey.
Check: `pytest tests/test_results.py -k figure`.
"""

import argparse
import csv
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import matplotlib

from repghost.reference import peers

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from repghost.errors import UserError
from repghost.files import atomic_write
from repghost.results import HEADER, paper_rows, read_results

CURVE_PANELS = (
    ("Top-1 (%)", {"val_top1": "raw", "ema_top1": "EMA"}),
    ("loss", {"train_loss": "training", "val_loss": "validation, raw", "ema_loss": "validation, EMA"}),
    ("learning rate", {"lr": "learning rate"}),
)
# What the official logs measured in the same way; their training loss is of the last batches of an epoch.
OFFICIAL = ("val_top1", "ema_top1", "train_loss", "lr")

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


def read_latency(path: str | Path) -> list[dict[str, str]]:
    """The rows of latency.csv (see benchmarks/latency.py), none when there is no such file."""
    if not Path(path).exists():
        return []
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    needed = {"model", "form", "backend", "device", "machine", "threads", "batch", "image_size", "median_ms"}
    if rows and (missing := needed - rows[0].keys()):
        raise UserError(f"{path}: not a table of latencies, it has no column {min(missing)}")
    return rows


def measured_latency(rows: Sequence[dict[str, str]]) -> tuple[str, dict[str, float]] | None:
    """The axis and the milliseconds of every network, RepGhostNet fused, in the setting that the figure is of.

    Of the settings with RepGhostNet and a peer: one image before more, then the newest, then a backend that folds
    the peers' BatchNorm too, then the fewest threads. None where there is no such setting.
    """
    settings: dict[tuple[str, ...], list[dict[str, str]]] = {}
    for row in rows:
        form = "fused" if row["model"].startswith("repghostnet") else "timm_reparameterized"
        if row["form"] == form and row["image_size"] == "224":
            key = tuple(row[k] for k in ("machine", "device", "backend", "threads", "batch"))
            settings.setdefault(key, []).append(row)
    of_both = {k: v for k, v in settings.items() if len({r["model"].startswith("repghostnet") for r in v}) == 2}
    if not of_both:
        return None

    def preference(item: tuple[tuple[str, ...], list[dict[str, str]]]) -> tuple[Any, ...]:
        (_, _, backend, threads, batch), found = item
        return -int(batch), max(r.get("date") or "" for r in found), backend != "eager", -int(threads)

    (machine, device, backend, threads, batch), chosen = max(of_both.items(), key=preference)
    images = "one image" if batch == "1" else f"{batch} images"
    with_threads = f", {threads} thread{'s' * (threads != '1')}" if device == "cpu" else ""
    label = f"latency, {images}, {backend}{with_threads} (ms)\n{machine}"
    return label, {row["model"]: float(row["median_ms"]) for row in chosen}


def draw_accuracy(
    results: Sequence[dict[str, str]], data: str, folder: Path, latency: Sequence[dict[str, str]] = ()
) -> list[Path]:
    """Draws the published figures and what `results` holds of the data set `data`; returns the paths written.

    latency: rows of latency.csv; none for timm's published latency.
    """
    figure, axes = plt.subplots(1, len(PANELS), figsize=(15, 4.5), sharey=True, layout="constrained")
    networks = peers()
    panels = dict(PANELS)
    if measured := measured_latency(latency):
        panels["step_ms"], milliseconds = measured
        for row in networks:
            row["step_ms"] = str(milliseconds.get(row["name"].partition(".")[0], ""))
    for axis, (column, label) in zip(axes, panels.items(), strict=True):
        for family, (marker, line, colour) in STYLES.items():
            of_family = [r for r in networks if r["family"] == family and r[column]]
            rows = sorted(of_family, key=lambda r: float(r["top1"]))
            x, y = [float(r[column]) for r in rows], [float(r["top1"]) for r in rows]
            axis.plot(x, y, marker=marker, linestyle=line or "none", color=colour, label=f"{family}, published")
        mine = _measured(results, data, column, networks)
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


def _measured(
    results: Sequence[dict[str, str]], data: str, column: str, networks: Sequence[dict[str, str]]
) -> list[tuple[float, float]]:
    """(x, Top-1) of every measurement in the paper's table, where `networks` has an x of that width."""
    published = {row["name"].partition(".")[0]: row for row in networks}
    points = []
    for row in paper_rows(results, data):
        cells = dict(zip(HEADER, row, strict=True))
        for top1 in (cells["last EMA Top-1"], cells["best EMA Top-1"]):
            if top1 and top1 != "not measured":
                name = f"repghostnet_{round(100 * float(cells['width'])):03d}"
                if published[name][column]:
                    points.append((float(published[name][column]), float(top1)))
    return points


def main(arguments: Sequence[str] | None = None) -> None:
    """Draws the figure."""
    parser = argparse.ArgumentParser(prog="python -m repghost.figures", description=__doc__)
    parser.add_argument("--results", default="results/results.csv", help="the CSV file (default: %(default)s)")
    parser.add_argument("--latency", default="results/latency.csv", help="the CSV file (default: %(default)s)")
    parser.add_argument("--data", default="imagenet", help="the data set's name in the results (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("results"), help="folder (default: %(default)s)")
    options = parser.parse_args(arguments)
    try:
        rows, latency = read_results(options.results), read_latency(options.latency)
        print(*draw_accuracy(rows, options.data, options.out, latency), sep="\n")
    except (UserError, OSError) as error:
        sys.exit(f"error: {error}")


def draw_curve(
    history: Sequence[dict[str, float]], official: dict[int, dict[str, float]] | None, file: BinaryIO
) -> None:
    """Draws the rows of metrics.csv, and those of the official run where there is one, as PNG into `file`."""
    figure, axes = plt.subplots(1, len(CURVE_PANELS), figsize=(15, 4), layout="constrained")
    for axis, (label, lines) in zip(axes, CURVE_PANELS, strict=True):
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


if __name__ == "__main__":
    main()
