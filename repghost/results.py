"""The paper's table beside what was measured.

`python -m repghost.results` prints for every width the published figures and the newest measurement of each kind in
results/results.csv, to which every finished evaluation appends a row: of the published weights (weights=timm or an
official file) and of a training of one's own, its last and its best epoch. A width that was not measured says so;
nothing is filled in. Check: `pytest tests/test_results.py`.
"""

import argparse
import csv
import io
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from repghost.errors import UserError, run_command
from repghost.files import TABLE_BYTES, locked, read_file, require_number, require_writable, write_text
from repghost.reference import IMAGENET, published
from repghost.text import as_cell, from_cell

COLUMNS = (
    "date", "commit", "name", "data", "width", "weights", "selection", "epoch", "images", "top1", "top5", "loss",
    "fused_top1", "fused_top5", "top1_flips", "max_rel_logit_diff", "params_m", "macs_m",
    "image_size", "crop_fraction", "precision",
)  # fmt: skip
DETECTION_COLUMNS = (
    "date", "commit", "name", "data", "detector", "width", "weights", "selection", "epoch", "images",
    "map", "map50", "map75", "map_small", "map_medium", "map_large", "mar100", "mask_map", "mask_map50",
    "fused_map", "fused_mask_map", "max_score_diff", "unmatched", "params_m", "precision",
)  # fmt: skip
_TEXTS = ("date", "commit", "name", "data", "weights", "selection", "precision", "detector")


class Columns(NamedTuple):
    """Of a table of results: all, those that older files lack, and the numbers that a row has to have."""

    names: tuple[str, ...]
    optional: tuple[str, ...]
    numbers: tuple[str, ...]


AS_PUBLISHED = {"image_size": "224", "crop_fraction": "0.875", "precision": "32-true"}  # older files lack these columns
OF_TASK = {
    "classification": Columns(COLUMNS, tuple(AS_PUBLISHED), ("width", "images", "top1", "top5", "fused_top1")),
    "detection": Columns(DETECTION_COLUMNS, (), ("width", "images", "map", "fused_map")),
}

# Points of Top-1 within which a measurement is the published figure: the same weights differ by a JPEG decoder and a
# resize, a new training by its random draws.
TOLERANCES = {"published weights": 0.03, "training": 0.3}
IMAGES = IMAGENET[1]  # that the published figures are of
MARKERS = ("<!-- table -->", "<!-- /table -->")  # in a Markdown file, around the table


def append_result(path: str | Path, name: str, data: str, evaluation: Mapping[str, Any]) -> None:
    """Adds one finished evaluation (the content of evaluation.json) as a row of the CSV file `path`.

    Columns and rows of others stay what they are; the file is written whole or not at all.
    """
    path, fused = Path(os.path.realpath(path)), evaluation["fused"]  # what a link leads to, not the link, is replaced
    columns = OF_TASK["detection" if "detector" in evaluation else "classification"]
    about = {"date": f"{datetime.now(UTC):%Y-%m-%d}", "commit": commit(), "name": name, "data": data}
    row = {**fused, **evaluation, **about, **{f"fused_{key}": value for key, value in fused.items()}}
    cells = {key: f"{value:.6g}" if isinstance(value := row.get(key), float) else value for key in columns.names}
    cells |= {key: as_cell(str(cells[key])) for key in _TEXTS if cells.get(key) is not None}
    path.parent.mkdir(parents=True, exist_ok=True)
    with locked(f"{path}.lock", "adding a row to it", limit=60):  # sweep jobs may finish together
        header, rows = _read_cells(path, columns)
        header += [column for column in columns.names if column not in header]
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerows([header, *rows, [cells.get(column) for column in header]])
        write_text(path, text.getvalue())


def require_writable_results(path: str | Path, task: str = "classification") -> None:
    """Raises UserError when the file `path` cannot take another row of `task`: to be called before hours of work."""
    path = Path(os.path.realpath(path))
    if path.exists() and not path.is_file():
        raise UserError(f"results={path}: not a file: give results=FILE.csv")
    read_results(path, task)
    require_writable(path, "results")
    if (lock := Path(f"{path}.lock")).exists() and not os.access(lock, os.W_OK):
        raise UserError(f"results={path}: {lock.name} beside it belongs to someone else: give another results=FILE.csv")


def read_results(path: str | Path, task: str = "classification") -> list[dict[str, str]]:
    """The rows of results.csv, or of the table of another task, none when there is no such file.

    It may have been saved by a spreadsheet: with a byte order mark, other line ends, semicolons or tabs between the
    cells, then with decimal commas. Raises UserError that names the line which is no measurement.
    """
    columns = OF_TASK[task]
    header, rows = _read_cells(Path(path), columns)
    found = []
    for number, cells in enumerate(rows, start=2):
        if not any(cells):
            continue
        row = dict.fromkeys(columns.names, "") | dict(zip(header, cells, strict=False))
        row |= {column: from_cell(row[column]) for column in _TEXTS if column in row}
        for column in columns.numbers:
            require_number(row[column], f"{path}: row {number}: {column}")
        found.append(row)
    return found


def _read_cells(path: Path, columns: Columns) -> tuple[list[str], list[list[str]]]:
    """Header and rows of results.csv as they stand there, numbers with decimal points; both empty for no such file."""
    try:
        text = read_file(path, TABLE_BYTES).decode("utf-8-sig")
        lines = io.StringIO(text, newline="")
        delimiter = max(",;\t", key=text.partition("\n")[0].count)
        header, *rows = list(csv.reader(lines, delimiter=delimiter, strict=True)) or [[]]
    except (FileNotFoundError, NotADirectoryError):
        return [], []
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: not a table in UTF-8 ({error}): save it as CSV in UTF-8, or move it away") from None
    if not text.strip():
        return [], []
    if missing := set(columns.names) - set(columns.optional) - set(header):
        raise UserError(f"{path}: not a table of results, it has no column {min(missing)}: give another results=")
    numbers = [i for i, column in enumerate(header) if column in columns.names and column not in _TEXTS]
    for row in rows:
        for i in numbers:
            if delimiter != "," and i < len(row) and re.fullmatch(r"-?\d*,\d+(E[+-]?\d+)?", row[i], re.IGNORECASE):
                row[i] = row[i].replace(",", ".")
    return header, [row for row in rows if row]


HEADER = (
    "width", "params (M)", "MACs (M)", "published Top-1", "published Top-5", "measured", "last EMA Top-1",
    "best EMA Top-1", "Top-5", "fused Top-1", "difference", "within tolerance", "images", "date", "commit",
)  # fmt: skip


def paper_rows(results: Sequence[dict[str, str]], data: str) -> list[list[str]]:
    """The table, a row of HEADER for every width and kind of measurement on the data set `data`, the newest of each.

    The published weights are those of a best epoch. The difference is that of the best epoch, or of the last where
    only that one was measured, to the figure of the official evaluation logs.
    """
    rows = []
    for paper in published():
        figures = [paper["width"], paper["params_m"], paper["flops_m"]]
        figures += [_points(paper["eval_top1"]), _points(paper["eval_top5"])]
        mine = [r for r in results if r["data"] == data and float(r["width"]) == float(paper["width"])]
        # At the published size, crop and precision; train.py's rows do not name the latter.
        mine = [r for r in mine if all(r[key] in ("", value) for key, value in AS_PUBLISHED.items())]
        found = list(_measurements(mine, float(paper["eval_top1"])))
        rows += [[*figures, *cells] for cells in found or [["not measured", *[""] * (len(HEADER) - 6)]]]
    return rows


def _measurements(results: Sequence[dict[str, str]], expected: float) -> Iterator[list[str]]:
    """For each kind of measurement of one width, the cells of HEADER from `measured` on. expected: published Top-1."""
    for kind, tolerance in TOLERANCES.items():
        newest = {row["selection"]: row for row in results if _kind(row) == kind}
        last, best = newest.get("last"), newest.get("best_ema" if kind == "training" else "")
        if not (shown := best or last):
            continue
        top1 = [_points(row["top1"]) if row else "not measured" for row in (last, best)]
        if kind == "published weights":  # which are of one epoch
            top1[0] = ""
        difference = float(shown["top1"]) - expected
        inside = abs(difference) <= tolerance + 0.001  # accuracies are stored with six digits
        within = f"{'yes' if inside else 'no'} ({tolerance:g})"
        if float(shown["images"]) != IMAGES:
            within = f"not of all {IMAGES:,} images"
        yield [
            kind, *top1, _points(shown["top5"]), _points(shown["fused_top1"]), f"{difference:+.2f}",
            within, shown["images"], shown["date"], shown["commit"],
        ]  # fmt: skip


def _kind(row: dict[str, str]) -> str:
    """What a row measured, a key of TOLERANCES; of other weights files nobody knows."""
    if row["weights"] == "ema":
        return "training"
    return "published weights" if row["weights"] == "timm" or row["weights"].startswith("official:") else ""


def as_markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *rows))


def write_between_markers(path: str | Path, table: str) -> bool:
    """Replaces what stands between MARKERS in a Markdown file; False when the file has no such lines."""
    try:
        text = read_file(path, TABLE_BYTES).decode()
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not text in UTF-8 ({error})") from None
    before, start, rest = text.partition(MARKERS[0])
    _, end, after = rest.partition(MARKERS[1])
    if not start or not end:
        return False
    write_text(path, f"{before}{start}\n{table}\n{end}{after}")
    return True


def runs_table(results: Sequence[dict[str, str]]) -> str:
    """Markdown: the newest row of every run and selection, all of one task."""
    rows = []
    newest = list({(row["name"], row["weights"], row["selection"]): row for row in results}.values())
    if newest and "map" in newest[0]:
        columns = ("name", "detector", "width", "data", "selection", "images")
        cells = [[*(row[k] for k in columns), *(as_points(row[k]) for k in SHOWN_FIGURES)] for row in newest]
        return as_markdown(["run", *columns[1:], *SHOWN_FIGURES.values()], cells)
    for row in newest:
        weights = f"{row['weights']}, {row['selection']}" if row["selection"] else row["weights"]
        accuracies = [_points(row[key]) for key in ("top1", "top5", "fused_top1")]
        rows.append([row["name"], row["width"], weights, row["images"], *accuracies, row["top1_flips"]])
    return as_markdown(["run", "width", "weights", "images", "Top-1", "Top-5", "fused Top-1", "flips"], rows)


# Of a detector, in hundredths; those of masks are empty without any.
SHOWN_FIGURES = {
    "map": "box mAP",
    "fused_map": "fused box mAP",
    "mask_map": "mask mAP",
    "fused_mask_map": "fused mask mAP",
}


def as_points(value: str) -> str:
    """A figure in [0, 1] as published ones are: 0.364 as 36.4."""
    return f"{100 * float(value):.1f}" if value else ""


def _points(value: str) -> str:
    return f"{float(value):.2f}"


def commit() -> str:
    """The short hash of the code's commit, with a + where files differ from it; empty outside a checkout."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty=+", "--exclude=*"]
    try:
        return subprocess.run(git, capture_output=True, text=True).stdout.strip()
    except OSError:  # no git
        return ""


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the table, and writes it into a README."""
    parser = argparse.ArgumentParser(prog="python -m repghost.results", description=__doc__)
    parser.add_argument("--results", default="results/results.csv", help="the CSV file (default: %(default)s)")
    parser.add_argument("--data", default="imagenet", help="the data set of the table (default: %(default)s)")
    parser.add_argument("--readme", help=f"also write the table into this file, between {' and '.join(MARKERS)}")
    options = parser.parse_args(arguments)
    results = read_results(options.results)
    table = as_markdown(HEADER, paper_rows(results, options.data))
    print(table)
    if others := [row for row in results if row["data"] != options.data]:
        print(f"\nOther runs in {options.results}:\n\n{runs_table(others)}")
    if options.readme and not write_between_markers(options.readme, table):
        print(f"\n{options.readme} has no lines {' and '.join(MARKERS)}: nothing was written there")


if __name__ == "__main__":
    sys.exit(run_command(main))
