"""What latency.py reports: a row a figure in a CSV file, ratios in words, and rows that were measured elsewhere."""

import csv
import io
from collections.abc import Sequence
from datetime import date
from importlib.metadata import version
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from benchmarks.latency_calls import FORMS, FUSED, PACKAGES, TORCH, Candidate
from repghost.errors import UserError
from repghost.figures import read_latency
from repghost.files import write_text
from repghost.reference import peers

COLUMNS = (
    "model", "family", "width", "form", "backend", "device", "machine", "threads", "batch", "image_size",
    "memory_format", "median_ms", "p10_ms", "p90_ms", "images_per_second", "top1", "versions", "date",
)  # fmt: skip
# What a row is a figure of.
KEY = ("model", "form", "backend", "device", "machine", "threads", "batch", "image_size", "memory_format")
MATCHED = 1.5  # points of Top-1 within which a RepGhostNet and a peer are compared


def row_of(candidate: Candidate, setting: dict[str, Any]) -> dict[str, Any]:
    """The row of a candidate. setting: the columns that all of its round share."""
    network = candidate.network
    durations = [1000 * seconds for calls in candidate.rounds for seconds in calls]
    deciles = quantiles(durations, n=10, method="inclusive")
    middle = median(durations)
    return {
        **setting,
        "model": network.model,
        "family": network.family,
        "width": "" if network.width is None else f"{network.width:g}",
        "form": network.form,
        "backend": candidate.backend,
        "device": candidate.device,
        "memory_format": candidate.memory_format,
        "median_ms": f"{middle:.4g}",
        "p10_ms": f"{deciles[0]:.4g}",
        "p90_ms": f"{deciles[-1]:.4g}",
        "images_per_second": f"{1000 * setting['batch'] / middle:.4g}",
        "top1": network.top1,
        "versions": f"{PACKAGES[candidate.backend]} {version(PACKAGES[candidate.backend])}",
    }


def ratio(slower: Candidate, faster: Candidate) -> tuple[float, float, float]:
    """How many times as fast `faster` is: the median of the rounds, the lowest and the highest."""
    pairs = zip(slower.rounds, faster.rounds, strict=True)
    ratios = [median(a) / median(b) for a, b in pairs]
    return median(ratios), min(ratios), max(ratios)


def print_ratios(candidates: Sequence[Candidate], title: str) -> None:
    """The fused networks beside timm's and the training form of the same width, and beside peers as accurate."""
    print(f"\n{title}")
    for fused in (c for c in candidates if c.network.form == FUSED):
        own, top1 = fused.network, float(fused.network.top1 or "nan")  # a detector has none
        accuracy = f", Top-1 {top1:.1f}" if own.top1 else ""
        print(f"  {own.model}, fused, {_how(fused)}: {1000 * median(map(median, fused.rounds)):.2f} ms{accuracy}")
        for other in candidates:
            network = other.network
            same = network.model == own.model and network.form != FUSED
            peer = network.width is None and abs(float(network.top1) - top1) <= MATCHED
            if other.backend == fused.backend and (same or peer):
                middle, low, high = ratio(other, fused)
                what = network.form if same else f"Top-1 {float(network.top1):.1f}"
                what = f"{network.model} ({what}, {_how(other)})"
                print(f"    {middle:5.2f} [{low:.2f} to {high:.2f}] times as fast as {what}")


def _how(candidate: Candidate) -> str:
    return f"{candidate.backend} {candidate.memory_format}" if candidate.backend in TORCH else candidate.backend


def merge(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Adds `rows` to the CSV file `path`; those of the same machine and setting take the place of older ones."""
    new = {tuple(str(row[k]) for k in KEY): row for row in rows}
    kept = [row for row in read_latency(path) if tuple(row[k] for k in KEY) not in new]
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows([*kept, *new.values()])
    write_text(path, text.getvalue())


def imported(path: Path) -> list[dict[str, Any]]:
    """The rows of a CSV file written by hand or by another tool, completed from the published figures.

    It needs model, form, backend, machine, threads, batch and median_ms. Raises UserError that names line and column.
    """
    published = {row["name"].partition(".")[0]: row for row in peers()}
    rows = []
    try:
        with open(path, newline="") as file:
            found = list(csv.DictReader(file))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    for line, row in enumerate(found, 2):
        for column in ("model", "form", "backend", "machine", "threads", "batch", "median_ms"):
            if not row.get(column):
                raise UserError(f"{path}, line {line}: {column} is missing")
        if row["model"] not in published:
            raise UserError(f"{path}, line {line}: model={row['model']} is not one of {', '.join(published)}")
        if row["form"] not in FORMS:
            raise UserError(f"{path}, line {line}: form={row['form']} is not one of {', '.join(FORMS)}")
        try:
            per_second = 1000 * int(row["batch"]) / float(row["median_ms"])
        except (ValueError, ZeroDivisionError):
            raise UserError(f"{path}, line {line}: batch and median_ms have to be numbers above 0") from None
        of_model = published[row["model"]]
        width = f"{int(row['model'][-3:]) / 100:g}" if of_model["family"] == "RepGhostNet" else ""
        filled = {
            "device": "cpu", "image_size": "224", "memory_format": "", "p10_ms": "", "p90_ms": "", "versions": "",
            "date": date.today().isoformat(),
        }  # fmt: skip
        given = {column: row[column] for column in COLUMNS if row.get(column)}
        derived = {
            "family": of_model["family"], "width": width, "top1": of_model["top1"],
            "images_per_second": f"{per_second:.4g}",
        }  # fmt: skip
        rows.append({**filled, **given, **derived})
    return rows
