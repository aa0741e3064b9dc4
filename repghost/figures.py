"""Top-1 over multiply-accumulates, parameters and latency, RepGhostNet beside other mobile networks (the paper's
Figure 1), as accuracy.png and accuracy.svg.

    python -m repghost.figures [--results results/results.csv] [--latency results/latency.csv] [--data imagenet]
                               [--out FOLDER]

The curves are published: Top-1, parameters and multiply-accumulates of reference/peers.csv, all of timm's results files
and at 224 pixels; multiply-accumulates rounded as there. The latency is what benchmarks/latency.py measured, where
latency.csv holds RepGhostNet fused and a peer beside it: of one machine, backend and number of threads, which the axis
names. Without, it is timm's of one image in float32 on a CPU (i9-10940X), in training form: the paper's own latencies
are of a phone that the others were not measured on. Stars are what results.csv holds. RepGhostNet's points carry their
widths; families differ in marker and line, so that the figure reads in grey. `draw_curve` draws a run's curve.png.
Check: `pytest tests/test_results.py -k "figure or curve"`.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from repghost.errors import run_command
from repghost.files import atomic_write, read_table, require_number
from repghost.reference import Row, peers, published
from repghost.results import HEADER, paper_rows, read_results

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CURVE_PANELS = (
    ("Top-1 (%)", {"val_top1": "raw", "ema_top1": "EMA"}),
    ("box mAP", {"val_map": "raw", "ema_map": "EMA"}),
    ("loss", {"train_loss": "training", "val_loss": "validation, raw", "ema_loss": "validation, EMA"}),
    ("learning rate", {"lr": "learning rate"}),
)
# What the official logs measured in the same way; their training loss is of the last batches of an epoch.
OFFICIAL = ("val_top1", "ema_top1", "train_loss", "lr")

SETTING = ("machine", "device", "backend", "threads", "batch")  # of a measured latency
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
    """The rows of latency.csv (see benchmarks/latency.py), none when there is no such file.

    Raises UserError for a file that is no such table, and one that names the cell which is no number.
    """
    rows = read_table(path, (*SETTING, "model", "form", "image_size", "median_ms"), "latencies")
    for number, row in enumerate(rows, start=2):
        for column, kind in (("threads", int), ("batch", int), ("median_ms", float)):
            require_number(row[column], f"{path}: row {number}: {column}", kind)
    return rows


def measured_latency(rows: Sequence[dict[str, str]]) -> tuple[str, dict[str, float]] | None:
    """The axis and the milliseconds of every network, RepGhostNet fused, in one setting of machine and backend.

    Of the settings with RepGhostNet and a peer it is that of the fewest images at once, then the newest, then that of
    the most networks and the fewest threads. None where there is no such setting.
    """
    chosen = _chosen_setting(rows)
    if not chosen:
        return None
    machine, device, backend, threads, batch = (chosen[0][key] for key in SETTING)
    images = "one image" if batch == "1" else f"{batch} images"
    with_threads = f", {threads} thread{'s' * (threads != '1')}" if device == "cpu" else ""
    label = f"latency, {images}, {backend}{with_threads} (ms)\n{machine}"
    return label.replace("$", r"\$"), {row["model"]: float(row["median_ms"]) for row in chosen}


def _chosen_setting(rows: Sequence[dict[str, str]]) -> list[dict[str, str]]:
    settings: dict[tuple[str, ...], list[dict[str, str]]] = {}
    for row in rows:
        form = "fused" if row["model"].startswith("repghostnet") else "timm_reparameterized"
        if row["form"] == form and row["image_size"] == "224":
            settings.setdefault(tuple(row[key] for key in SETTING), []).append(row)

    def preference(found: list[dict[str, str]]) -> tuple[int, str, int, int]:
        newest = max(row.get("date") or "" for row in found)
        return -int(found[0]["batch"]), newest, len(found), -int(found[0]["threads"])

    with_a_peer = [f for f in settings.values() if len({row["form"] for row in f}) == 2]
    return max(reversed(with_a_peer), key=preference) if with_a_peer else []


def other_backends(rows: Sequence[dict[str, str]]) -> dict[str, dict[str, float]]:
    """Milliseconds of every fused RepGhostNet in the chosen setting (see `measured_latency`), but for the backend.

    By backend; those of OpenVINO and onnxruntime, in which it is exported.
    """
    found: dict[str, dict[str, float]] = {}
    chosen = _chosen_setting(rows)
    same = [key for key in SETTING if key != "backend"] + ["image_size"]
    for row in rows if chosen else ():
        exported = row["backend"].partition(" ")[0] in ("onnxruntime", "openvino")
        fused = row["form"] == "fused" and row["model"].startswith("repghostnet")
        other = row["backend"] != chosen[0]["backend"] and all(row[key] == chosen[0][key] for key in same)
        if exported and fused and other:
            found.setdefault(row["backend"], {})[row["model"]] = float(row["median_ms"])
    return dict(sorted(found.items()))


def draw_accuracy(
    results: Sequence[dict[str, str]], data: str, folder: Path, latency: Sequence[dict[str, str]] = ()
) -> list[Path]:
    """Draws the published figures and what `results` holds of the data set `data`; returns the paths written.

    latency: rows of latency.csv; none for timm's published latency.
    """
    from matplotlib.figure import Figure  # which --help does not need

    figure = Figure(figsize=(15, 4.5), layout="constrained")
    axes = figure.subplots(1, len(PANELS), sharey=True)
    networks, panels = peers(), dict(PANELS)
    if measured := measured_latency(latency):
        panels["step_ms"], milliseconds = measured
        networks = [row | {"step_ms": str(milliseconds.get(row["name"].partition(".")[0], ""))} for row in networks]
    width_of = {row["timm_name"]: float(row["width"]) for row in published()}
    measured_top1 = _measured(results, data)
    for axis, (column, label) in zip(axes, panels.items(), strict=True):
        with_x = sorted((row for row in networks if row[column]), key=lambda row: float(row["top1"]))
        for family, (marker, line, colour) in STYLES.items():
            x, y = ([float(row[key]) for row in with_x if row["family"] == family] for key in (column, "top1"))
            axis.plot(x, y, marker=marker, linestyle=line or "none", color=colour, label=f"{family}, published")
        x_of = {width_of[row["name"]]: float(row[column]) for row in with_x if row["name"] in width_of}
        for row in with_x:
            if width := width_of.get(row["name"]):
                at = float(row[column]), float(row["top1"])
                axis.annotate(f"{width}x", at, (5, -9), textcoords="offset points", fontsize="x-small")
        for (backend, of), mark in zip(
            other_backends(latency).items() if column == "step_ms" else (), "xv+", strict=False
        ):
            tops = [(of[name], float(row["top1"])) for row in with_x if (name := row["name"].partition(".")[0]) in of]
            axis.plot(*zip(*sorted(tops), strict=True), mark, ls=":", color="black", label=f"RepGhostNet, {backend}")
            axis.legend(fontsize="small", loc="lower right")
        if mine := [(x_of[width], top1) for width, top1 in measured_top1 if width in x_of]:
            axis.plot(*zip(*mine, strict=True), "*", color="black", mfc="white", ms=15, label="RepGhostNet, measured")
        axis.set(xlabel=label, xmargin=0.1)
        axis.grid(alpha=0.3)
    axes[0].set(ylabel="ImageNet Top-1 (%)", xscale="log")
    axes[0].legend(fontsize="small", loc="lower right")
    written = [folder / f"accuracy.{suffix}" for suffix in ("png", "svg")]
    for path in written:
        with atomic_write(path) as file:
            figure.savefig(file, format=path.suffix[1:], dpi=150)
    return written


def _measured(results: Sequence[dict[str, str]], data: str) -> list[tuple[float, float]]:
    """(width, Top-1) of every measurement in the paper's table."""
    rows = [dict(zip(HEADER, row, strict=True)) for row in paper_rows(results, data)]
    found = [(float(row["width"]), row[key]) for row in rows for key in ("last EMA Top-1", "best EMA Top-1")]
    return [(width, float(top1)) for width, top1 in found if top1 not in ("", "not measured")]


def draw_curve(history: Sequence[Row], official: dict[int, Row] | None, file: BinaryIO) -> None:
    """Draws the rows of metrics.csv, and those of the official run where there is one, as PNG into `file`."""
    figure = curve_figure(history, official)
    figure.savefig(file, format="png", dpi=110)


def curve_figure(history: Sequence[Row], official: dict[int, Row] | None) -> "Figure":
    """The panels of curve.png. An epoch whose loss explodes is cut off, so that the others stay readable."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 4), layout="constrained")
    panels = [(label, {c: name for c, name in lines.items() if c in history[0]}) for label, lines in CURVE_PANELS]
    panels = [(label, lines) for label, lines in panels if lines]
    for axis, (label, lines) in zip(figure.subplots(1, len(panels)), panels, strict=True):
        for (column, name), style in zip(lines.items(), ("-", "--", ":"), strict=False):
            (line,) = axis.plot([r["epoch"] + 1 for r in history], [r[column] for r in history], style, label=name)
            if official and column in OFFICIAL:
                rows = [row for row in official.values() if column in row]
                epochs, values = [row["epoch"] + 1 for row in rows], [row[column] for row in rows]
                axis.plot(epochs, values, style, color=line.get_color(), alpha=0.35, label=f"{name}, official")
        axis.set(xlabel="epoch", ylabel=label)
        axis.grid(alpha=0.3)
        axis.legend()
        if label == "loss":
            axis.set_ylim(0, min(axis.get_ylim()[1], 2 * history[0]["train_loss"]))
    return figure


def main(arguments: Sequence[str] | None = None) -> None:
    """Draws the figure."""
    parser = argparse.ArgumentParser(prog="python -m repghost.figures", description=__doc__)
    parser.add_argument("--results", default="results/results.csv", help="the CSV file (default: %(default)s)")
    parser.add_argument("--latency", default="results/latency.csv", help="the CSV file (default: %(default)s)")
    parser.add_argument("--data", default="imagenet", help="the data set's name in the results (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("results"), help="folder (default: %(default)s)")
    options = parser.parse_args(arguments)
    rows, latency = read_results(options.results), read_latency(options.latency)
    print(*draw_accuracy(rows, options.data, options.out, latency), sep="\n")


if __name__ == "__main__":
    sys.exit(run_command(main))
