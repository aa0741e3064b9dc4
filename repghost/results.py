"""The paper's table beside what was measured.

`python -m repghost.results` prints for every width the published figures and the newest measurement of each kind in
results/results.csv, to which every finished evaluation appends a row: of the published weights (weights=timm or an
official file) and of a training of one's own, its last and its best epoch. A width that was not measured says so;
nothing is filled in. Check: `pytest tests/test_results.py`.
"""

import argparse
import csv
import io
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from filelock import FileLock

from repghost.errors import UserError
from repghost.files import write_text
from repghost.reference import published

COLUMNS = (
    "date", "commit", "name", "data", "width", "weights", "selection", "epoch", "images", "top1", "top5", "loss",
    "fused_top1", "fused_top5", "top1_flips", "max_rel_logit_diff", "params_m", "macs_m",
    "image_size", "crop_fraction", "precision",
)  # fmt: skip
_ADDED = ("image_size", "crop_fraction", "precision")  # empty in rows that older versions wrote

# Points of Top-1 within which a measurement is the published figure: the same weights differ by a JPEG decoder and a
# resize, a new training by its random draws.
TOLERANCES = {"published weights": 0.03, "training": 0.3}
AS_PUBLISHED = {"image_size": "224", "crop_fraction": "0.875", "precision": "32-true"}
IMAGES = 50_000  # of ImageNet's validation set, which the published figures are of
MARKERS = ("<!-- table -->", "<!-- /table -->")  # in a Markdown file, around the table


def append_result(path: str | Path, name: str, data: str, evaluation: dict[str, Any]) -> None:
    """Adds one finished evaluation (the content of evaluation.json) as a row of the CSV file `path`."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    fused = evaluation["fused"]
    row = {
        **{key: evaluation.get(key) for key in COLUMNS},
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "commit": _commit(),
        "name": name,
        "data": data,
        "fused_top1": fused["top1"],
        "fused_top5": fused["top5"],
        "top1_flips": fused["top1_flips"],
        "max_rel_logit_diff": fused["max_rel_logit_diff"],
    }
    with FileLock(f"{path}.lock"):  # sweep jobs may finish together
        _add_columns(path)
        with open(path, "a", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            if file.tell() == 0:
                writer.writeheader()
            writer.writerow({key: _rounded(value) for key, value in row.items()})


def read_results(path: str | Path) -> list[dict[str, str]]:
    """The rows of results.csv, none when there is no such file."""
    if not Path(path).exists():
        return []
    with open(path, newline="") as file:
        reader = csv.DictReader(file)
        if missing := set(COLUMNS) - set(_ADDED) - set(reader.fieldnames or ()):
            raise UserError(f"{path}: not a table of results, it has no column {min(missing)}")
        return [{key: row.get(key) or "" for key in COLUMNS} for row in reader]


def _add_columns(path: Path) -> None:
    """Gives a file that an older version wrote the columns that were added since."""
    if not path.exists() or not (text := path.read_text()) or text.partition("\n")[0].strip() == ",".join(COLUMNS):
        return
    rows, new = read_results(path), io.StringIO()
    writer = csv.DictWriter(new, COLUMNS)
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, new.getvalue())


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
        mine = [
            r for r in results if r["data"] == data and float(r["width"]) == float(paper["width"]) and _as_published(r)
        ]
        figures = [paper["width"], paper["params_m"], paper["flops_m"], _points(paper["eval_top1"])]
        figures.append(_points(paper["eval_top5"]))
        found = []
        for kind in TOLERANCES:
            of_kind = [row for row in mine if kind_of(row) == kind]
            last = _newest(of_kind, ("last",))
            best = _newest(of_kind, ("best_ema",) if kind == "training" else ("",))
            if shown := best or last:
                found.append([
                    *figures, kind, *(_points(row["top1"]) if row else "not measured" for row in (last, best)),
                    _points(shown["top5"]), _points(shown["fused_top1"]),
                    f"{float(shown['top1']) - float(paper['eval_top1']):+.2f}", _within(shown, paper),
                    shown["images"], shown["date"], shown["commit"],
                ])  # fmt: skip
                if kind == "published weights":
                    found[-1][HEADER.index("last EMA Top-1")] = ""
        rows += found or [[*figures, "not measured", *[""] * (len(HEADER) - len(figures) - 1)]]
    return rows


def paper_table(results: Sequence[dict[str, str]], data: str, format: str = "markdown") -> str:
    """`paper_rows` as `markdown`, `csv` or `latex`."""
    return FORMATS[format](HEADER, paper_rows(results, data))


def kind_of(row: dict[str, str]) -> str:
    """What a row measured, a key of TOLERANCES; of other weights files nobody knows."""
    if row["weights"] == "ema":
        return "training"
    return "published weights" if row["weights"] == "timm" or row["weights"].startswith("official:") else ""


def _as_published(row: dict[str, str]) -> bool:
    """Whether a row was measured at the published size, crop and precision; train.py's rows do not name the latter."""
    return all(row[key] in ("", value) for key, value in AS_PUBLISHED.items())


def _within(measured: dict[str, str], paper: dict[str, str]) -> str:
    if int(measured["images"]) != IMAGES:
        return f"not of all {IMAGES:,} images"
    tolerance = TOLERANCES[kind_of(measured)]
    # Half an image more: figures are shares of 50,000, kept with six digits.
    inside = abs(float(measured["top1"]) - float(paper["eval_top1"])) <= tolerance + 0.001
    return f"{'yes' if inside else 'no'} ({tolerance:g})"


def as_markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(_markdown(cells) for cells in (header, ["---"] * len(header), *rows))


def as_csv(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([header, *rows])
    return text.getvalue().rstrip("\n")


def as_latex(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A tabular with the rules of the booktabs package."""
    lines = [" & ".join(cell.replace("_", r"\_") for cell in cells) + r" \\" for cells in (header, *rows)]
    return "\n".join(
        [rf"\begin{{tabular}}{{{'r' * len(header)}}}", r"\toprule", lines[0], r"\midrule", *lines[1:], r"\bottomrule",
         r"\end{tabular}"]
    )  # fmt: skip


FORMATS = {"markdown": as_markdown, "csv": as_csv, "latex": as_latex}


def write_between_markers(path: str | Path, table: str) -> bool:
    """Replaces what stands between MARKERS in a Markdown file; False when the file has no such lines."""
    text = Path(path).read_text(encoding="utf-8")
    before, start, rest = text.partition(MARKERS[0])
    _, end, after = rest.partition(MARKERS[1])
    if not start or not end:
        return False
    write_text(path, f"{before}{start}\n{table}\n{end}{after}")
    return True


def runs_table(results: Sequence[dict[str, str]]) -> str:
    """Markdown: the newest row of every run and selection."""
    header = ["run", "width", "weights", "images", "Top-1", "Top-5", "fused Top-1", "flips"]
    newest = {(row["name"], row["weights"], row["selection"]): row for row in results}
    lines = [_markdown(header), _markdown(["---"] * len(header))]
    for row in newest.values():
        weights = f"{row['weights']}, {row['selection']}" if row["selection"] else row["weights"]
        accuracies = [f"{float(row[key]):.2f}" for key in ("top1", "top5", "fused_top1")]
        lines.append(_markdown([row["name"], row["width"], weights, row["images"], *accuracies, row["top1_flips"]]))
    return "\n".join(lines)


def _newest(rows: Sequence[dict[str, str]], selections: Sequence[str]) -> dict[str, str] | None:
    return next((row for row in reversed(rows) if row["selection"] in selections), None)


def _points(value: str) -> str:
    return f"{float(value):.2f}"


def _markdown(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _rounded(value: Any) -> Any:
    return f"{value:.6g}" if isinstance(value, float) else value


def _commit() -> str:
    """The short hash of the code's commit, with a + where files differ from it; empty outside a checkout."""
    folder = Path(__file__).parent
    try:
        git = ["git", "-C", str(folder), "describe", "--always", "--dirty=+", "--exclude=*"]
        return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the table, and writes it into a README."""
    parser = argparse.ArgumentParser(prog="python -m repghost.results", description=__doc__)
    parser.add_argument("--results", default="results/results.csv", help="the CSV file (default: %(default)s)")
    parser.add_argument("--data", default="imagenet", help="the data set of the table (default: %(default)s)")
    parser.add_argument("--format", choices=FORMATS, default="markdown", help="of the table (default: %(default)s)")
    parser.add_argument("--readme", help=f"also write the table into this file, between {' and '.join(MARKERS)}")
    options = parser.parse_args(arguments)
    try:
        results = read_results(options.results)
        print(paper_table(results, options.data, options.format))
        others = [row for row in results if row["data"] != options.data]
        if others and options.format == "markdown":
            print(f"\nOther runs in {options.results}:\n\n{runs_table(others)}")
        if options.readme and not write_between_markers(options.readme, paper_table(results, options.data)):
            print(f"\n{options.readme} has no lines {' and '.join(MARKERS)}: nothing was written there")
    except (UserError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
