"""Detectors with RepGhostNet as their backbone beside published ones with other backbones.

`python -m repghost.detection.results` prints what is published of torchvision's detectors on COCO's 5,000 validation
images (val2017), with its source, and below it the newest row of every run in results/detection.csv, to which every
finished evaluation of a detector appends one: first those on the data set `--data`, by default `coco`, then the others.
Check: `pytest tests/test_detection_evaluation.py -k results`.
"""

import argparse
import sys
from collections.abc import Sequence

from repghost.errors import run_command
from repghost.reference import published_detectors
from repghost.results import as_markdown, as_points, read_results, runs_table

HEADER = ("detector", "backbone", "params (M)", "box mAP", "mask mAP", "fused box mAP", "images", "source")
_IMAGES = "5000"  # of COCO's val2017


def rows_beside_published(results: Sequence[dict[str, str]]) -> list[list[str]]:
    """The published detectors, then the runs in `results`, rows of HEADER. Figures are in hundredths."""
    rows = [
        [row["detector"], row["backbone"], row["params_m"], row["box_map"], row["mask_map"], "", _IMAGES, row["source"]]
        for row in published_detectors()
    ]
    for row in {(row["name"], row["selection"]): row for row in results}.values():
        figures = [as_points(row[key]) for key in ("map", "mask_map", "fused_map")]
        source = f"this project, run {row['name']}, {row['selection'].replace('_', ' ')} epoch, commit {row['commit']}"
        backbone, params = f"RepGhostNet {row['width']}x", f"{float(row['params_m']):.1f}"
        rows.append([row["detector"], backbone, params, *figures, row["images"], source])
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(prog="python -m repghost.detection.results", description=__doc__)
    parser.add_argument("--results", default="results/detection.csv", help="the CSV file (default: %(default)s)")
    parser.add_argument("--data", default="coco", help="the data set of the table (default: %(default)s)")
    options = parser.parse_args(arguments)
    results = read_results(options.results, "detection")
    print(as_markdown(HEADER, rows_beside_published([row for row in results if row["data"] == options.data])))
    if others := [row for row in results if row["data"] != options.data]:
        print(f"\nOther runs in {options.results}:\n\n{runs_table(others)}")


if __name__ == "__main__":
    sys.exit(run_command(main))
