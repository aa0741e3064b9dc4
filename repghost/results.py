"""The paper's table beside what was measured.

`python -m repghost.results` prints for every width the published figures and the newest measurement of each kind in
results/results.csv, to which every finished evaluation appends a row. A width that was not measured says so.
"""

import argparse
import csv
import subprocess
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.resources import files
from pathlib import Path
from typing import Any

from filelock import FileLock

from repghost.errors import UserError

COLUMNS = (
    "date", "commit", "name", "data", "width", "weights", "selection", "epoch", "images", "top1", "top5", "loss",
    "fused_top1", "fused_top5", "top1_flips", "max_rel_logit_diff", "params_m", "macs_m",
)  # fmt: skip


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
    with FileLock(f"{path}.lock"), open(path, "a", newline="") as file:  # sweep jobs may finish together
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
        if missing := set(COLUMNS) - set(reader.fieldnames or ()):
            raise UserError(f"{path}: not a table of results, it has no column {min(missing)}")
        return list(reader)


def published() -> list[dict[str, str]]:
    """The rows of the paper's table, one a width, with the figures of the official logs."""
    with (files("repghost") / "reference" / "paper.csv").open() as file:
        return list(csv.DictReader(file))


def paper_table(results: Sequence[dict[str, str]], data: str) -> str:
    """Markdown: every width's published figures beside the newest measurement on the data set `data`."""
    header = ["width", "params (M)", "MACs (M)", "published Top-1", "published Top-5"]
    header += ["last EMA Top-1", "best EMA Top-1", "fused Top-1", "difference"]
    lines = [_markdown(header), _markdown(["---"] * len(header))]
    for paper in published():
        mine = [r for r in results if r["data"] == data and float(r["width"]) == float(paper["width"])]
        last, best = (_newest(mine, selection) for selection in ("last", "best_ema"))
        shown = last or best
        lines.append(
            _markdown(
                [paper["width"], paper["params_m"], paper["flops_m"], paper["top1"], paper["top5"]]
                + [f"{float(row['top1']):.2f}" if row else "not measured" for row in (last, best)]
                + [f"{float(shown['fused_top1']):.2f}" if shown else "", _difference(best or last, paper)]
            )
        )
    return "\n".join(lines)


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


def _newest(rows: Sequence[dict[str, str]], selection: str) -> dict[str, str] | None:
    return next((row for row in reversed(rows) if row["selection"] == selection), None)


def _difference(measured: dict[str, str] | None, paper: dict[str, str]) -> str:
    return f"{float(measured['top1']) - float(paper['top1']):+.2f}" if measured else ""


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
    """Prints the table."""
    parser = argparse.ArgumentParser(prog="python -m repghost.results", description=__doc__)
    parser.add_argument("--results", default="results/results.csv", help="the CSV file (default: %(default)s)")
    parser.add_argument("--data", default="imagenet", help="the data set of the table (default: %(default)s)")
    options = parser.parse_args(arguments)
    results = read_results(options.results)
    print(paper_table(results, options.data))
    if others := [row for row in results if row["data"] != options.data]:
        print(f"\nOther runs in {options.results}:\n\n{runs_table(others)}")


if __name__ == "__main__":
    main()
