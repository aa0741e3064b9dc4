"""What the benchmarks share: where they ran, rates with their ratios, and the CSV file of a table."""

import csv
import platform
from collections.abc import Iterable, Sequence
from datetime import date
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

from repghost.machine import available_cpus

ROOT = Path(__file__).parents[1]


def machine() -> dict[str, Any]:
    """The processor, the cores that this process may use, versions, and the date."""
    names = [line.partition(": ")[2] for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line]
    return {
        "cpu": names[0] if names else platform.machine(),
        "cores": available_cpus(),
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "torchvision", "timm", "pillow")},
        "date": date.today().isoformat(),
    }


def rates(mine: Sequence[float], reference: Sequence[float]) -> dict[str, float]:
    """The median of `mine` (images/s, one a repetition), its range, and the median of the ratios to `reference`."""
    return {
        "images_per_second": median(mine),
        "lowest": min(mine),
        "highest": max(mine),
        "ratio_to_timm": median(a / b for a, b in zip(mine, reference, strict=True)),
    }


def write_table(path: Path, table: Iterable[dict[str, Any]]) -> None:
    """Writes rows that need not have the same columns; floats with four digits."""
    table = list(table)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(name for row in table for name in row)))
        writer.writeheader()
        for row in table:
            writer.writerow({k: f"{v:.4g}" if isinstance(v, float) else v for k, v in row.items()})


def read_table(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV file."""
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))
