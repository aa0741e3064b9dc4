"""What a teacher, mixing and growing images gain a small network, on real images: Top-1 over several seeds.

    apt-get install dataset-fashion-mnist
    python benchmarks/distillation.py

writes parts of Debian's Fashion-MNIST as shards, trains a wider teacher on more of the images, and then every variant
of the recipe below with each seed, as many at a time as there are cores, and evaluates the averaged weights on all
10,000 test images. Writes a row for each run into results/distillation.csv and the table of means into
results/distillation.md. What is finished is not done again.
"""

import argparse
import gzip
import json
import os
import subprocess
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
import torch
from PIL import Image

if not __package__:  # started as a file, not as python -m benchmarks.distillation
    sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.common import ROOT, described, machine, write_table
from data.write_shards.write import write_folder
from repghost.machine import available_cpus

SOURCE = Path("/usr/share/datasets/fashion-mnist")
VALIDATED = 200  # test images that a run looks at after every epoch; its result is that of all 10,000
RECIPE = [
    "recipe=quick", "batch_size=64", "recipe.augment.jitter={brightness:0,contrast:0,saturation:0}", "trainer=cpu",
    "trainer.threads=1", "data.workers=1", "curve_seconds=1e9", "loader=torch", "recipe.scale=[0.5,1]",
]  # fmt: skip
TAUGHT = ["recipe.teacher_weight=0.9", "recipe.teacher_temperature=2"]
GROWING = ["recipe.start_image_size=32"]
VARIANTS: dict[str, list[str]] = {
    "recipe": [],
    "teacher in the step": [*TAUGHT, "teacher={teacher}"],
    "stored logits": [*TAUGHT, "recipe.teacher_logits={logits}"],
    "hard labels": ["recipe.teacher_loss=hard", "recipe.teacher_weight=0.5", "teacher={teacher}"],
    "mixup, CutMix": ["recipe.mix.mixup=0.1", "recipe.mix.cutmix=1", "recipe.mix.probability=0.5"],
    "teacher, mixup, CutMix": [
        *TAUGHT, "teacher={teacher}", "recipe.mix.mixup=0.1", "recipe.mix.cutmix=1", "recipe.mix.probability=0.5",
    ],
    "growing images": [*GROWING, "recipe.full_size_epochs={last}"],
}  # fmt: skip


def main() -> int:
    """The exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--images", type=int, default=3000, help="training images (default: %(default)s)")
    add("--teacher-images", type=int, default=30_000, help="the same and more (default: %(default)s)")
    add("--size", type=int, default=64, help="pixels (default: %(default)s)")
    add("--teacher-size", type=int, default=32, help="(default: %(default)s)")
    add("--epochs", type=int, default=12, help="of the networks that are compared (default: %(default)s)")
    add("--teacher-epochs", type=int, default=5, help="(default: %(default)s)")
    add("--width", type=float, default=0.5, help="of the networks that are compared (default: %(default)s)")
    add("--teacher-width", type=float, default=1.0, help="(default: %(default)s)")
    add("--seeds", type=int, default=3, help="of each variant (default: %(default)s)")
    add("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), help="(default: all)")
    add("--folder", type=Path, default=Path("~/.cache/repghost/distillation"), help="(default: %(default)s)")
    add("--out", type=Path, default=ROOT / "results" / "distillation.csv", help="(default: results/distillation.csv)")
    add("overrides", nargs="*", help="of train.py, for all variants")
    options = parser.parse_intermixed_args()
    facts = machine(torch.device("cpu"))
    print(described(facts))
    folder = options.folder.expanduser()
    prepare(folder, options.images, options.teacher_images)
    common = [*RECIPE, *options.overrides]
    widest = f"w{options.teacher_width:g}_{options.teacher_size}_{options.teacher_images}_{options.teacher_epochs}"
    teacher = folder / "outputs" / f"teacher_{widest}"
    its = [f"data.root={folder / str(options.teacher_images)}", f"image_size={options.teacher_size}"]
    its += [f"epochs={options.teacher_epochs}", f"width={options.teacher_width}", "seed=100"]
    train(folder, teacher.name, [*common, *its])
    print(f"the teacher: Top-1 {evaluate(folder, teacher.name):.2f}%", flush=True)
    of_students = [*common, f"data.root={folder / str(options.images)}", f"image_size={options.size}"]
    of_students += [f"epochs={options.epochs}", f"width={options.width}"]
    runs = [(variant, seed) for seed in range(options.seeds) for variant in options.variants]

    def run(job: tuple[str, int]) -> dict[str, Any]:
        variant, seed = job
        logits = folder / f"logits_{widest}_{options.images}_{options.epochs}_s{seed}"
        values = {"teacher": teacher, "logits": logits, "last": options.epochs // 2}
        command = [*of_students, f"seed={seed}", *(part.format(**values) for part in VARIANTS[variant])]
        if "stored" in variant:
            call(folder, "-m", "repghost.teach", *of_students, f"seed={seed}", f"teacher={teacher}", str(logits))
        setting = f"{options.width:g}_{options.size}_{options.images}_{options.epochs}"
        name = f"{setting}_{variant.replace(' ', '_').replace(',', '')}_s{seed}"
        top1, seconds = train(folder, name, command)
        print(f"{variant:<24} seed {seed}  Top-1 {top1:.2f}%  {seconds:.1f} s an epoch", flush=True)
        return {"variant": variant, "seed": seed, "top1": top1, "seconds_per_epoch": seconds}

    with ThreadPoolExecutor(available_cpus()) as pool:
        rows = list(pool.map(run, runs))
    rows.insert(0, {"variant": "the teacher", "seed": 100, "top1": evaluate(folder, teacher.name)})
    keys: tuple[str, ...] = ("images", "size", "epochs", "width")
    keys += tuple(f"teacher_{key}" for key in keys)
    setting = {key: getattr(options, key) for key in keys}
    rows = [{**row, **setting, **facts} for row in rows]
    write_table(options.out, rows)
    text = "\n".join(table(rows))
    options.out.with_suffix(".md").write_text(f"{text}\n")
    print(text)
    return 0


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


def table(rows: Iterable[dict[str, Any]]) -> Iterable[str]:
    """Mean and standard deviation of every variant, as Markdown."""
    rows = list(rows)
    yield "| variant | Top-1 in percent | seconds an epoch |"
    yield "| --- | --- | --- |"
    for variant in dict.fromkeys(row["variant"] for row in rows):
        mine = [row for row in rows if row["variant"] == variant]
        top1 = [row["top1"] for row in mine]
        spread = f" ± {stdev(top1):.2f}" if len(top1) > 1 else ""
        seconds = [row["seconds_per_epoch"] for row in mine if "seconds_per_epoch" in row]
        yield f"| {variant} | {mean(top1):.2f}{spread} | {f'{mean(seconds):.1f}' if seconds else ''} |"


if __name__ == "__main__":
    sys.exit(main())
