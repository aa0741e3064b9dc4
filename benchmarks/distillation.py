"""What a teacher, mixing and growing images gain a small network, on real images: Top-1 over several seeds.

    apt-get install dataset-fashion-mnist
    python benchmarks/distillation.py

writes parts of Debian's Fashion-MNIST as shards, trains a wider teacher on more of the images, and then every variant
of the recipe below with each seed, as many at a time as there are cores, and evaluates the averaged weights on all
10,000 test images. Writes a row for each run into results/distillation.csv and the table of means into
results/distillation.md. What is finished is not done again.
"""

import argparse
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch

if not __package__:  # started as a file, not as python -m benchmarks.distillation
    sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.common import ROOT, described, machine, write_table
from benchmarks.fashion_mnist import FOLDER, RECIPE, call, evaluate, prepare, train
from repghost.machine import available_cpus

TAUGHT = ["recipe.teacher_weight=0.9", "recipe.teacher_temperature=2"]
GROWING = ["recipe.start_image_size=32"]
VARIANTS: dict[str, list[str]] = {
    "recipe": [],
    "teacher in the step": [*TAUGHT, "teacher={teacher}"],
    "stored logits": [*TAUGHT, "recipe.teacher_logits={logits}"],
    "stored logits, T 1": [
        "recipe.teacher_weight=0.9", "recipe.teacher_temperature=1", "recipe.teacher_logits={logits}",
    ],
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
    add("--folder", type=Path, default=FOLDER, help="(default: %(default)s)")
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

    def logits(seed: int) -> Path:
        return folder / f"logits_{widest}_{options.images}_{options.epochs}_s{seed}"

    def teach(seed: int) -> None:
        call(folder, "-m", "repghost.teach", *of_students, f"seed={seed}", f"teacher={teacher}", str(logits(seed)))

    def run(job: tuple[str, int]) -> dict[str, Any]:
        variant, seed = job
        values = {"teacher": teacher, "logits": logits(seed), "last": options.epochs // 2}
        command = [*of_students, f"seed={seed}", *(part.format(**values) for part in VARIANTS[variant])]
        setting = f"{options.width:g}_{options.size}_{options.images}_{options.epochs}"
        name = f"{setting}_{variant.replace(' ', '_').replace(',', '')}_s{seed}"
        top1, seconds = train(folder, name, command)
        print(f"{variant:<24} seed {seed}  Top-1 {top1:.2f}%  {seconds:.1f} s an epoch", flush=True)
        return {"variant": variant, "seed": seed, "top1": top1, "seconds_per_epoch": seconds}

    with ThreadPoolExecutor(available_cpus()) as pool:
        if any("{logits}" in part for variant in options.variants for part in VARIANTS[variant]):
            list(pool.map(teach, range(options.seeds)))
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
