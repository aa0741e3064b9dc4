"""Debian's Fashion-MNIST as shards, and trainings on it by the commands of this project, for the other benchmarks.

apt-get install dataset-fashion-mnist
"""

import gzip
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.common import ROOT
from data.write_shards.write import write_folder
from repghost.machine import available_cpus

SOURCE = Path("/usr/share/datasets/fashion-mnist")
FOLDER = Path("~/.cache/repghost/distillation")
VALIDATED = 200  # test images that a run looks at after every epoch; its result is that of all 10,000
RECIPE = [
    "recipe=quick", "batch_size=64", "recipe.augment.jitter={brightness:0,contrast:0,saturation:0}", "trainer=cpu",
    "trainer.threads=1", "data.workers=1", "curve_seconds=1e9", "loader=torch", "recipe.scale=[0.5,1]",
]  # fmt: skip


def prepare(folder: Path, *images: int) -> None:
    """`folder`/NUMBER, with so many training images and some test images; `folder`/test, with all test images."""
    if not SOURCE.is_dir():
        raise SystemExit(f"{SOURCE} is missing: apt-get install dataset-fashion-mnist")
    wanted = {str(number): {"train": ("train", number), "val": ("t10k", VALIDATED)} for number in images}
    for name, splits in (wanted | {"test": {"train": ("t10k", 20), "val": ("t10k", 10_000)}}).items():
        if not (folder / name / "manifest.json").exists():
            source = folder / f"{name}.images"
            for split, (of, count) in splits.items():
                write_images(source / split, of, count)
            write_folder(source, folder / name, workers=available_cpus(), quiet=True)


def write_images(folder: Path, of: str, count: int) -> None:
    """`folder`/CLASS/NUMBER.png, lossless."""
    pixels, labels = (_idx(SOURCE / f"{of}-{kind}-ubyte.gz") for kind in ("images-idx3", "labels-idx1"))
    for number, (image, label) in enumerate(zip(pixels[:count], labels[:count], strict=True)):
        path = folder / str(label) / f"{number:05}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).convert("RGB").save(path)


def _idx(path: Path) -> np.ndarray:
    """A file of MNIST's format: two zero bytes, type, number of dimensions, the dimensions, the values."""
    content = gzip.decompress(path.read_bytes())
    dimensions = np.frombuffer(content, ">i4", content[3], 4)
    return np.frombuffer(content, np.uint8, offset=4 + 4 * len(dimensions)).reshape(dimensions)


def train(folder: Path, name: str, command: Sequence[str]) -> tuple[float, float]:
    """Trains a run; returns Top-1 on all test images and the median time of an epoch in seconds."""
    call(folder, "train.py", *command, f"name={name}", f"output={folder / 'outputs'}")
    timing = np.genfromtxt(folder / "outputs" / name / "timing.csv", delimiter=",", names=True)
    return evaluate(folder, name), float(np.median(np.atleast_1d(timing["train_seconds"])))


def evaluate(folder: Path, name: str) -> float:
    """Top-1 in percent of a run's averaged weights on all test images."""
    result = folder / "outputs" / name / "test.json"
    if not result.exists():
        table = result.with_suffix(".csv")
        call(
            folder, "evaluate.py", f"run={folder / 'outputs' / name}", f"data.root={folder / 'test'}",
            f"results={table}", "trainer=cpu", "trainer.threads=1", "data.workers=1", "loader=torch",
        )  # fmt: skip
        rows = np.genfromtxt(table, delimiter=",", names=True, dtype=None, encoding="utf-8")
        result.write_text(json.dumps({"top1": float(np.atleast_1d(rows["top1"])[-1])}))
    return float(json.loads(result.read_text())["top1"])


def call(folder: Path, *command: str) -> None:
    """Runs a command of this project in `folder`."""
    program = [str(ROOT / command[0])] if command[0].endswith(".py") else ["-m", command[1]]
    rest = command[1:] if command[0].endswith(".py") else command[2:]
    found = subprocess.run(
        [sys.executable, *program, *rest], cwd=folder, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    if found.returncode:
        raise SystemExit(f"{' '.join(command)}:\n{found.stdout[-2000:]}{found.stderr[-2000:]}")
