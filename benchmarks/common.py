"""What the benchmarks share: where they ran, the same kernels for both sides, rates with their ratios, CSV files."""

import csv
import os
import platform
import subprocess
from collections.abc import Iterable, Sequence
from datetime import date
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import torch

from repghost.machine import available_cpus

ROOT = Path(__file__).parents[1]
CORPUS = Path("~/.cache/repghost/benchmark")  # where the benchmarks keep their JPEG files
IDLE_LOAD = 0.5  # processes that run or wait to, on average over a minute
CYCLES_WHILE_ASKING = 2_000_000_000  # about a second, in which nvidia-smi sees the clocks of a GPU that works
GPU_FIELDS = {  # of the table: nvidia-smi's names
    "driver": ("driver_version",),
    "sm_mhz": ("clocks.sm", "clocks.max.sm"),
    "memory_mhz": ("clocks.mem", "clocks.max.mem"),
}


# -- where it ran ------------------------------------------------------------------------------------------------------


def machine(device: torch.device) -> dict[str, Any]:
    """What computes, and whether it did anything else just before: the load of a minute, other processes on the GPU.

    Also the processor, the cores that this process may use, versions and the date. To be called before the benchmark
    itself makes a load. Clocks are those of a GPU that works, beside their limits.
    """
    facts = {"device": processor(), "load": round(os.getloadavg()[0], 2)}
    if device.type == "cuda":
        facts |= gpu(device)
    return facts | {
        "cpu": processor(),
        "cores": available_cpus(),
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "torchvision", "timm", "pillow")},
        "date": date.today().isoformat(),
    }


def processor() -> str:
    """The name of the processor, or of the board on ARM, whose processors do not say."""
    try:
        lines = [line.partition(":") for line in Path("/proc/cpuinfo").read_text().splitlines()]
    except OSError:
        lines = []
    found = {key.strip(): value.strip() for key, _, value in lines}
    return found.get("model name") or found.get("Model") or platform.processor() or platform.machine()


def gpu(device: torch.device) -> dict[str, Any]:
    """Name, driver, clocks and the number of other processes of a GPU; what nvidia-smi does not say is left empty."""
    processes = nvidia_smi("compute-apps", ("gpu_uuid", "pid"))  # before this process is one of them
    properties = torch.cuda.get_device_properties(device)
    uuid = f"GPU-{properties.uuid}"
    torch.cuda._sleep(CYCLES_WHILE_ASKING)
    names = [name for fields in GPU_FIELDS.values() for name in fields]
    found = next((row for row in nvidia_smi("gpu", ("uuid", *names)) if row["uuid"] == uuid), dict.fromkeys(names, ""))
    torch.cuda.synchronize(device)
    others = sum(row["gpu_uuid"] == uuid and row["pid"] != str(os.getpid()) for row in processes)
    clocks = {column: " of ".join(found[name] for name in fields) for column, fields in GPU_FIELDS.items()}
    return {"device": properties.name, **clocks, "other_gpu_processes": others}


def nvidia_smi(what: str, fields: Sequence[str]) -> list[dict[str, str]]:
    """The rows of `nvidia-smi --query-WHAT=FIELDS`, empty where it fails or is not there."""
    command = ["nvidia-smi", f"--query-{what}={','.join(fields)}", "--format=csv,noheader,nounits"]
    try:
        text = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    rows = [[cell.strip() for cell in line.split(",")] for line in text.splitlines()]
    return [dict(zip(fields, row, strict=True)) for row in rows if len(row) == len(fields)]


def described(facts: dict[str, Any]) -> str:
    """The facts of a table on a line, and whether the machine was otherwise idle."""
    text = "; ".join(
        f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in facts.items()
    )
    busy = [f"load {facts['load']:.1f} on {facts['cores']} cores"] if facts["load"] > IDLE_LOAD else []
    if others := facts.get("other_gpu_processes"):
        busy.append(f"{others} other process(es) on the GPU")
    verdict = f"the machine was NOT otherwise idle: {', '.join(busy)}" if busy else "the machine was otherwise idle"
    return f"{text}\n{verdict}"


# -- how it ran --------------------------------------------------------------------------------------------------------


def kernels_of_training() -> None:
    """Lets cuDNN time its kernels, and keeps float32 from becoming TensorFloat-32, as train.py does: for both sides."""
    torch.backends.cudnn.benchmark = True
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False


def wait_for(device: torch.device) -> None:
    """Returns when the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# -- what came of it ---------------------------------------------------------------------------------------------------


def rates(mine: Sequence[float], reference: Sequence[float] | None) -> dict[str, float]:
    """The median of `mine` (images/s, one a repetition), its range, and the median of the ratios to `reference`."""
    found = {"images_per_second": median(mine), "lowest": min(mine), "highest": max(mine)}
    if reference is not None:
        found["ratio_to_timm"] = median(a / b for a, b in zip(mine, reference, strict=True))
    return found


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
