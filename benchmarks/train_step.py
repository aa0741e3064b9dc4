"""Images per second of the training step, of the loader and of both together, beside timm's: same device, same run.

    python benchmarks/train_step.py                     on the GPU where there is one, otherwise on the CPU
    python benchmarks/train_step.py --width 1.0 --batch-size 256

makes JPEG files like ImageNet's (benchmarks/corpus.py), shards of them, and measures
- step: forward, loss, backward, optimizer and average on one batch that stays on the device, this project's and timm's
  in turns, --repetitions times. timm's is what its training script does by default: planar layout, its SGD, loss and
  ModelEmaV2, no torch.compile; on a GPU both use bf16, and timm's is measured with channels_last and torch.compile too;
- loader: batches of the recipe's crops alone, with as many workers as cores (see benchmarks/loader.py);
- end to end: `python train.py` with its config, callbacks, checkpoints and validation, in a process of its own; the
  rate is that of its last epoch, which timing.csv holds. timm's loader and step in a loop, for comparison;
- first step: seconds from the command to the end of the first step; a second run of this benchmark finds its index and
  its compiled code in the folder of --corpus;
- stages: where a step of that run goes, from its profile=true. The rows add up to the step;
- memory: what a training step takes at its peak, for some widths and batch sizes.
`ours` is always what train.py does by default: compiled on a GPU, not on a CPU, where that takes two minutes at first;
the other one is measured beside it.

On a CPU the loader's workers and the step share the cores: together they cannot reach the slower of the two, but
1 / (1 / step + 1 / loader), which is printed as the bound. On a GPU the bound is the slower of the two.
Rates are medians over repetitions, ratios medians of the ratios within one. --out gets a row a figure.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as train.py does, here for timm's step, too

import argparse
import csv
import multiprocessing
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any, Self

import timm
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from timm.loss import LabelSmoothingCrossEntropy
from timm.optim import create_optimizer_v2
from timm.utils import ModelEmaV2
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.loader import IMAGE_SIZE, Rate, Setting, machine, measure, ours, ours_recipe, prepare, timm_recipe
from benchmarks.loader import write_table as write_rows
from data.dali_loader import DaliLoader, dali_installed
from data.torch_loader import TorchLoader
from repghost.run import resolve_recipe
from repghost.training.trainer import keep_compiled, keep_freed_memory

ROOT = Path(__file__).parents[1]
TIMM, OURS = "step: timm", "step: ours"
CLASSES = 1000
MEMORY = {
    "cuda": ((0.5, 1.0, 1.3, 2.0), (128, 256, 512, 1024)),
    "cpu": ((0.5, 1.0, 2.0), (32, 64)),
}  # widths, batch sizes


@dataclass(frozen=True)
class Run:
    """What is trained, and on what."""

    device: torch.device
    width: float
    batch_size: int

    @property
    def amp(self) -> torch.autocast:
        """bf16 on a GPU, float32 on a CPU, as both projects do by default."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda")

    def batch(self) -> tuple[Tensor, Tensor, Tensor]:
        """(images, labels, positions) of noise; what is in them costs nothing."""
        shape = (self.batch_size, 3, IMAGE_SIZE, IMAGE_SIZE)
        labels = torch.randint(CLASSES, shape[:1], device=self.device)
        return torch.randn(shape, device=self.device), labels, torch.arange(self.batch_size)

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


# -- steps: each makes a function that runs one on a batch ------------------------------------------------------------

Step = Callable[[Tensor, Tensor, Tensor], None]


def our_step(run: Run, compile: bool | str) -> Step:
    """ImageClassifier as train.py builds it, without Lightning around it; compile: the key of that name."""
    overrides = ["data.root=not read", f"width={run.width}", f"compile={compile}", f"batch_size={run.batch_size}"]
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        config = compose("train", overrides)
    resolve_recipe(config)
    if run.device.type == "cpu":
        keep_freed_memory()  # as make_trainer does
    model = instantiate(config.model, num_classes=CLASSES)
    classifier = instantiate(config.classifier)(model, config.recipe, steps_per_epoch=1000).to(run.device)
    classifier.on_fit_start()
    optimizer = classifier.configure_optimizers()

    def step(images: Tensor, labels: Tensor, positions: Tensor) -> None:
        classifier.on_train_batch_start((images, labels, positions), 0)
        with run.amp:
            loss = classifier.training_step((images, labels, positions), 0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        classifier.ema.update(classifier.model)

    return step


def timm_step(run: Run, compile: bool) -> Step:
    """The inner loop of timm's training script; compile: with channels_last, too."""
    name = f"repghostnet_{round(100 * run.width):03d}"
    model: nn.Module = timm.create_model(name, num_classes=CLASSES, drop_rate=0.2)
    model = model.to(run.device, memory_format=torch.channels_last if compile else torch.contiguous_format).train()
    optimizer = create_optimizer_v2(model, "sgd", lr=0.01, momentum=0.9, weight_decay=1e-5)
    average, loss_of = ModelEmaV2(model, decay=0.9999), LabelSmoothingCrossEntropy(0.1)
    network = torch.compile(model) if compile else model

    def step(images: Tensor, labels: Tensor, positions: Tensor) -> None:
        if compile:
            images = images.contiguous(memory_format=torch.channels_last)
        with run.amp:
            loss = loss_of(network(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        average.update(model)

    return step


def step_rows(run: Run, repetitions: int, steps: int, compiled: bool) -> Iterator[dict[str, Any]]:
    """A row a step; compiled: also ours with compile=true where that is not the default."""
    kinds = {TIMM: partial(timm_step, compile=False), OURS: partial(our_step, compile="auto")}
    if run.device.type == "cuda":
        kinds["step: ours, not compiled"] = partial(our_step, compile=False)
        kinds["step: timm, channels_last, compiled"] = partial(timm_step, compile=True)
    elif compiled:
        kinds["step: ours, compiled"] = partial(our_step, compile=True)
    with ExitStack() as stack:
        workers = {name: stack.enter_context(Worker(make, run)) for name, make in kinds.items()}
        rows = {name: {"what": name, "seconds_to_begin": worker.begin()} for name, worker in workers.items()}
        rates: dict[str, list[float]] = {name: [] for name in kinds}
        for _ in range(repetitions):
            for name, worker in workers.items():
                rates[name].append(steps * run.batch_size / worker.seconds(steps))
    for name, row in rows.items():
        yield row | _rates(rates[name], rates[TIMM])


class Worker:
    """A process of its own for each step: how memory is allocated, and what is compiled, belong to a process."""

    def __init__(self, make: Callable[[Run], Step], run: Run) -> None:
        spawn = multiprocessing.get_context("spawn")
        arguments = (make, run, torch.get_num_threads())
        self._pool = ProcessPoolExecutor(1, mp_context=spawn, initializer=_set_up, initargs=arguments)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown()

    def begin(self) -> float:
        """Makes the step and runs the first two, in seconds; imports not counted."""
        return self._pool.submit(_begin).result()

    def seconds(self, steps: int) -> float:
        """What so many steps take."""
        return self._pool.submit(_seconds, steps).result()


_worker: dict[str, Any] = {}  # of this process


def _set_up(make: Callable[[Run], Step], run: Run, threads: int) -> None:
    torch.set_num_threads(threads)
    _worker.update(make=make, run=run)


def _begin() -> float:
    start = time.perf_counter()
    _worker.update(step=_worker["make"](_worker["run"]), batch=_worker["run"].batch())
    _seconds(2)
    return time.perf_counter() - start


def _seconds(steps: int) -> float:
    run, step, batch = (_worker[key] for key in ("run", "step", "batch"))
    run.wait()
    start = time.perf_counter()
    for _ in range(steps):
        step(*batch)
    run.wait()
    return time.perf_counter() - start


def _rates(mine: list[float], timms: list[float]) -> dict[str, float]:
    return {
        "images_per_second": median(mine),
        "lowest": min(mine),
        "highest": max(mine),
        "ratio_to_timm": median(a / b for a, b in zip(mine, timms, strict=True)),
    }


# -- loaders, and both together ---------------------------------------------------------------------------------------


def loader_rows(run: Run, setting: Setting, repetitions: int, seconds: float) -> Iterator[dict[str, Any]]:
    """A row a loader: what a training on this device takes from it; timm's augments in its workers."""
    cores, kind = len(os.sched_getaffinity(0)), DaliLoader if dali_installed() else TorchLoader
    # On a CPU our augmentation runs beside the workers and is part of the loader's cost, on a GPU it is the GPU's.
    mine = ours_recipe if run.device.type == "cpu" else ours
    kinds = {"loader: timm": timm_recipe, "loader: ours": partial(mine, kind=kind)}
    rates: dict[str, list[Rate]] = {name: [] for name in kinds}
    for _ in range(repetitions):
        for name, pipeline in kinds.items():
            rates[name].append(measure(pipeline, setting, cores, seconds))
    for name in kinds:
        mine_, timms = ([rate.second for rate in rates[n]] for n in (name, "loader: timm"))
        yield {"what": name, **_rates(mine_, timms), "workers": cores}


def timm_end_to_end(run: Run, setting: Setting, workers: int, batches: int) -> float:
    """Images per second of timm's loader and its step in a loop."""
    step, loader = timm_step(run, False), iter(timm_recipe(setting, workers))
    for images, labels in islice(loader, 3):
        step(images.to(run.device), labels.to(run.device), labels)
    run.wait()
    start = time.perf_counter()
    for images, labels in islice(loader, batches):
        step(images.to(run.device, non_blocking=True), labels.to(run.device, non_blocking=True), labels)
    run.wait()
    return batches * run.batch_size / (time.perf_counter() - start)


def train(
    run: Run, shards: Path, workers: int, threads: int, cache: Path, folder: Path, *more: str
) -> tuple[Path, str]:
    """One run of train.py; returns its folder, and what it printed."""
    arguments = [
        f"width={run.width}", f"batch_size={run.batch_size}", f"data.root={shards}", f"data.cache={cache}",
        f"data.workers={workers}", f"data.val={shards}/train-000000.tar", f"data.train={shards}/train-*.tar",
        f"trainer={'cpu' if run.device.type == 'cpu' else 'gpu'}", "trainer.devices=1", f"trainer.threads={threads}",
        "profile=true", "name=run", f"output={folder}", f"results={folder}/results.csv", *more,
    ]  # fmt: skip
    done = subprocess.run([sys.executable, str(ROOT / "train.py"), *arguments], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"train.py failed:\n{done.stdout}\n{done.stderr}")
    return folder / "run", done.stdout


def end_to_end_rows(
    run: Run, setting: Setting, shards: Path, cache: Path, workers: int, epochs: int, batches: int, compiled: bool
) -> Iterator[dict[str, Any]]:
    """A row for timm's loop, and for train.py one for the whole and one for every stage of its step."""
    timms = timm_end_to_end(run, setting, workers, batches)
    yield {"what": "end to end: timm", "images_per_second": timms, "ratio_to_timm": 1.0, "workers": workers}
    yield from _training_rows(run, shards, cache, workers, timms, "ours", f"epochs={epochs}")
    if compiled and run.device.type == "cpu":
        yield from _training_rows(
            run, shards, cache, workers, timms, "ours, compiled", f"epochs={epochs}", "compile=true"
        )


def _training_rows(
    run: Run, shards: Path, cache: Path, workers: int, timms: float, name: str, *more: str
) -> Iterator[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        directory, printed = train(run, shards, workers, torch.get_num_threads(), cache, Path(folder), *more)
        timing = list(csv.DictReader((directory / "timing.csv").read_text().splitlines()))
        stages = list(csv.DictReader((directory / "profile.csv").read_text().splitlines()))
    rate = float(timing[-1]["images_per_second"])
    started = re.search(r"first step was done ([\d.]+) s", printed)
    assert started is not None
    yield {"what": f"end to end: {name}", "images_per_second": rate, "ratio_to_timm": rate / timms, "workers": workers}
    yield {"what": f"first step after the command: {name}", "seconds": float(started[1])}
    for stage in stages:
        yield {
            "what": f"stage: {name}: {stage['stage']}",
            "milliseconds_per_step": float(stage["milliseconds_per_step"]),
            "share_of_step": float(stage["share"]),
        }


# -- memory -----------------------------------------------------------------------------------------------------------


def memory_rows(device: torch.device) -> Iterator[dict[str, Any]]:
    """A row a width and batch size; nothing where it does not fit."""
    widths, sizes = MEMORY[device.type]
    for width in widths:
        for size in sizes:
            command = [sys.executable, __file__, "--memory-of", str(width), str(size), "--device", device.type]
            done = subprocess.run(command, capture_output=True, text=True)
            row: dict[str, Any] = {"what": f"memory: width {width:g}, batch {size}", "batch_size": size}
            if done.returncode == 0:
                yield row | {"megabytes": float(done.stdout.splitlines()[-1])}
            else:
                yield row | {"failed": done.stderr.strip().splitlines()[-1]}


def peak_memory(run: Run) -> float:
    """Megabytes at the peak of three steps, weights and batch included.

    On a GPU what PyTorch has allocated, compiled; on a CPU how far the resident size of a fresh process rises above
    what its imports take (Linux), not compiled, since compiling takes memory itself.
    """
    if run.device.type == "cuda":
        step = our_step(run, compile=True)
        for _ in range(3):
            step(*run.batch())
        return torch.cuda.max_memory_allocated() / 1e6
    before = _resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    step, batch = our_step(run, compile=False), run.batch()
    for _ in range(3):
        step(*batch)
    return _resident("VmHWM") - before


def _resident(field: str) -> float:
    """VmRSS (now) or VmHWM (the peak) of this process, in megabytes; see proc(5)."""
    found = re.search(rf"^{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024 / 1e6


# -- the report -------------------------------------------------------------------------------------------------------


def verdicts(device: torch.device, table: list[dict[str, Any]]) -> Iterator[str]:
    """What bounds each way of training, a sentence each."""
    rate = {row["what"]: row["images_per_second"] for row in table if "images_per_second" in row}
    loader = rate["loader: ours"]
    for name in ("ours", "ours, compiled"):
        if f"end to end: {name}" in rate:
            step, together = rate[f"step: {name}"], rate[f"end to end: {name}"]
            if device.type == "cpu":
                bound = 1 / (1 / step + 1 / loader)
                by = f"the cores, of which the step takes {loader / (step + loader):.0%}"
            else:
                bound, by = min(step, loader), "the step" if step < loader else "the loader"
            yield (
                f"{name}: bound by {by}: {bound:.4g} images/s; {together:.4g} reached, {together / bound:.0%} of it, "
                f"{together / min(step, loader):.0%} of the slower of step and loader"
            )


def name_of(device: torch.device) -> str:
    return torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} thread(s)"


def print_report(device: torch.device, table: list[dict[str, Any]], facts: dict[str, Any]) -> None:
    named = ("cpu", "cores", "torch", "timm", "python")
    print(f"{name_of(device)}; " + ", ".join(f"{name} {facts[name]}" for name in named))
    print(*verdicts(device, table), sep="\n")
    for row in table:
        if "images_per_second" in row:
            ratio = f"{row['ratio_to_timm']:6.2f} x timm"
            begin = f"   {row['seconds_to_begin']:.0f} s to begin" if "seconds_to_begin" in row else ""
            print(f"{row['what']:40s} {row['images_per_second']:9.1f} images/s {ratio}{begin}")
        elif "share_of_step" in row:
            print(f"{row['what']:40s} {row['milliseconds_per_step']:9.2f} ms {row['share_of_step']:12.1%}")
        elif "seconds" in row:
            print(f"{row['what']:40s} {row['seconds']:9.1f} s")
        else:
            print(f"{row['what']:40s} " + (f"{row['megabytes']:9.0f} MB" if "megabytes" in row else row["failed"]))


def repeated(shards: Path, times: int, folder: Path) -> Path:
    """A folder in which every training shard of `shards` stands `times` times, as links."""
    if times == 1:
        return shards
    folder.mkdir(parents=True, exist_ok=True)
    for number, shard in enumerate(s for _ in range(times) for s in sorted(shards.glob("train-*.tar"))):
        link = folder / f"train-{number:06d}.tar"
        if not link.exists():
            link.symlink_to(shard.resolve())
    return folder


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = partial(parser.add_argument, metavar="N")
    gpu = torch.cuda.is_available()
    add("--width", type=float, default=0.5, help="(default %(default)s)")
    add("--batch-size", type=int, default=512 if gpu else 64, help="(default %(default)s)")
    add("--images", type=int, default=1500, help="files of the corpus (default %(default)s)")
    add("--repeat", type=int, default=60 if gpu else 1, help="times that an epoch has every file (default %(default)s)")
    add("--repetitions", type=int, default=5, help="(default %(default)s)")
    add("--steps", type=int, default=50 if gpu else 1, help="of a repetition (default %(default)s)")
    add("--seconds", type=float, default=3, help="of one measurement of a loader (default %(default)s)")
    add("--epochs", type=int, default=2, help="of the run of train.py (default %(default)s)")
    add("--workers", type=int, default=len(os.sched_getaffinity(0)), help="end to end (default: the cores)")
    add("--threads", type=int, default=torch.get_num_threads(), help="of the step on a CPU (default %(default)s)")
    add("--corpus", type=Path, default=Path("~/.cache/repghost/benchmark"), metavar="DIR", help="(default %(default)s)")
    add("--out", type=Path, default=ROOT / "results/train_step.csv", metavar="FILE", help="(default %(default)s)")
    add(
        "--device", choices=("cuda", "cpu"), default="cuda" if gpu else "cpu", metavar="D", help="(default %(default)s)"
    )
    parser.add_argument("--quick", action="store_true", help="neither memory nor, on a CPU, the compiled step")
    parser.add_argument("--memory-of", nargs=2, metavar=("WIDTH", "BATCH"), help="prints only that table's figure")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    torch.set_num_threads(options.threads)
    keep_compiled(options.corpus.expanduser() / "compiled")
    if options.memory_of:
        print(peak_memory(Run(device, float(options.memory_of[0]), int(options.memory_of[1]))))
        return

    run = Run(device, options.width, options.batch_size)
    corpus = options.corpus.expanduser()
    setting = prepare(corpus, options.images, options.batch_size)
    shards = repeated(setting.folder.parent / "shards", options.repeat, corpus / f"repeated-{options.repeat}")
    table = list(step_rows(run, options.repetitions, options.steps, not options.quick))
    torch.set_num_threads(1)  # beside busy workers threads would wait for each other (benchmarks/NOTES.md)
    table += loader_rows(run, setting, options.repetitions, options.seconds)
    torch.set_num_threads(options.threads)
    batches = max(options.repetitions * options.steps, 3)
    table += end_to_end_rows(
        run, setting, shards, corpus, options.workers, options.epochs, batches, compiled=not options.quick
    )
    if not options.quick:
        table += memory_rows(device)
    facts = {
        "device": name_of(device), "width": options.width, "batch_size": options.batch_size,
        "repetitions": options.repetitions, **machine(setting),
    }  # fmt: skip
    print_report(device, table, facts)
    write_rows(options.out, [facts | row for row in table])


if __name__ == "__main__":
    main()
