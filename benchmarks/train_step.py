"""Images per second of the training step, of the loader and of both together, beside timm's: same device, same run.

    python benchmarks/train_step.py                     on the GPU where there is one, otherwise on the CPU
    python benchmarks/train_step.py --width 1.0 --batch-size 256

makes JPEG files like ImageNet's (benchmarks/corpus.py), shards of them, and measures
- step: forward, loss, backward, optimizer and average on one batch that stays on the device, this project's and timm's
  in turns, --repetitions times. timm's is what its training script does by default: planar layout, its SGD, loss and
  ModelEmaV2, no torch.compile; on a GPU both use bf16, and timm's is measured with channels_last and torch.compile too.
  Ours with the stored logits of a teacher, too, which it reads in every step.
  Both let cuDNN choose its kernels by timing them and go without TensorFloat-32, as train.py does;
- loader: augmented batches on the device, alone: from the data module of train.py, with the loader, the workers and the
  augmentation that a training on this device has; timm's with its prefetcher on a GPU, and as many workers as cores;
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
--alone leaves timm out, and the ratios.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as train.py does, here for timm's step, too

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

import torch
from omegaconf import DictConfig

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.common import CORPUS, ROOT, described, machine, rates, read_table, write_table
from benchmarks.feeding import training_batches
from benchmarks.loader import measure
from benchmarks.pipelines import Pipeline, timm_recipe
from benchmarks.setting import SHARDS, Setting, corpus_facts, prepare, repeated
from benchmarks.steps import WARM_UP, Run, first_steps, our_step, timed_steps, timm_step
from repghost.dataset import Batch
from repghost.machine import available_cpus
from repghost.training.trainer import keep_compiled

MEMORY = {
    "cuda": ((0.5, 1.0, 1.3, 2.0), (128, 256, 512, 1024)),
    "cpu": ((0.5, 1.0, 2.0), (32, 64)),
}  # widths, batch sizes
Row = dict[str, Any]


# -- steps ------------------------------------------------------------------------------------------------------------


def step_rows(run: Run, repetitions: int, steps: int, quick: bool, alone: bool) -> Iterator[Row]:
    """A row a step; not quick: also in the ways that are not the default. alone: without timm's."""
    kinds = {"step: timm": partial(timm_step, compile=False), "step: ours": partial(our_step, compile="auto")}
    kinds["step: ours, stored logits"] = partial(our_step, compile="auto", taught=True)
    if run.device.type == "cuda":
        kinds["step: timm, channels_last, compiled"] = partial(timm_step, compile=True)
    if not quick:
        other = {"cuda": ("not compiled", False), "cpu": ("compiled", True)}
        name, compile = other[run.device.type]
        kinds[f"step: ours, {name}"] = partial(our_step, compile=compile)
    kinds = {name: make for name, make in kinds.items() if not (alone and "timm" in name)}
    with ExitStack() as stack:
        workers = {name: stack.enter_context(run.process()) for name in kinds}
        begun = {name: worker.submit(first_steps, kinds[name], run).result() for name, worker in workers.items()}
        found: dict[str, list[float]] = {name: [] for name in kinds}
        for _ in range(repetitions):
            for name, worker in workers.items():
                found[name].append(steps * run.batch_size / worker.submit(timed_steps, run, steps).result())
    for name in kinds:
        row = {"what": name, "seconds_to_begin": begun[name], **rates(found[name], found.get("step: timm"))}
        if "stored" in name:
            row["ratio_to_ours"] = median(a / b for a, b in zip(found[name], found["step: ours"], strict=True))
        yield row


# -- loaders, and both together ---------------------------------------------------------------------------------------


def loader_rows(run: Run, setting: Setting, config: DictConfig, options: argparse.Namespace) -> Iterator[Row]:
    """A row a loader: augmented batches on the device. config: of the training that takes this project's."""

    def ours(setting: Setting, workers: int) -> Iterator[Batch]:
        return training_batches(config)

    cores = available_cpus()
    kinds: dict[str, Pipeline] = {"loader: ours": ours}
    if not options.alone:
        kinds = {"loader: timm": timm_recipe, **kinds}
    found: dict[str, list[float]] = {name: [] for name in kinds}
    for _ in range(options.repetitions):
        for name, pipeline in kinds.items():
            found[name].append(measure(pipeline, setting, cores, options.seconds).second)
    for name in kinds:
        workers = run.workers if name == "loader: ours" else cores
        yield {"what": name, "workers": workers, **rates(found[name], found.get("loader: timm"))}


def timm_end_to_end(run: Run, setting: Setting, batches: int) -> float:
    """Images per second of timm's loader and its step in a loop."""
    workers = available_cpus() if run.workers == "auto" else int(run.workers)
    step, loader = timm_step(run, False), iter(timm_recipe(setting, workers))

    def train_on(count: int) -> None:
        for batch in islice(loader, count):
            images, labels = (tensor.to(run.device, non_blocking=True) for tensor in batch)
            step(Batch(images, labels, labels, torch.empty(0)))
        run.wait()

    train_on(max(WARM_UP[run.device.type], 3))
    start = time.perf_counter()
    train_on(batches)
    return batches * run.batch_size / (time.perf_counter() - start)


def train_rows(run: Run, shards: Path, cache: Path, timms: float | None, name: str, *more: str) -> Iterator[Row]:
    """One run of train.py: a row for the whole, for its first step, and for every stage of a step.

    timms: images per second of timm's, None to do without the ratio.
    """
    with tempfile.TemporaryDirectory() as folder:
        arguments = [
            f"trainer={'cpu' if run.device.type == 'cpu' else 'gpu'}", "trainer.devices=1", *run.overrides,
            f"data.root={shards}", f"data.cache={cache}", "profile=true", "name=run",
            f"output={folder}", f"results={folder}/results.csv", *more,
        ]  # fmt: skip
        done = subprocess.run([sys.executable, str(ROOT / "train.py"), *arguments], capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"train.py failed:\n{done.stdout}\n{done.stderr}")
        timing, stages = (read_table(Path(folder, "run", file)) for file in ("timing.csv", "profile.csv"))
    rate = float(timing[-1]["images_per_second"])
    ratio = {} if timms is None else {"ratio_to_timm": rate / timms}
    yield {"what": f"end to end: {name}", "workers": run.workers, "images_per_second": rate, **ratio}
    started = next(line for line in done.stdout.splitlines() if line.startswith("start "))
    yield {"what": f"first step after the command: {name}", "seconds": float(started.split()[-5])}
    for stage in stages:
        yield {
            "what": f"stage: {name}: {stage['stage']}",
            "milliseconds_per_step": float(stage["milliseconds_per_step"]),
            "share_of_step": float(stage["share"]),
        }


# -- memory -----------------------------------------------------------------------------------------------------------


def memory_rows(device: torch.device, threads: int) -> Iterator[Row]:
    """A row a width and batch size; why it failed where it does not fit."""
    widths, sizes = MEMORY[device.type]
    for run in (Run(device, width, size, threads, workers=1) for width in widths for size in sizes):
        row = {"what": f"memory: width {run.width:g}, batch {run.batch_size}", "batch_size": run.batch_size}
        with run.process() as process:
            try:
                yield row | {"megabytes": process.submit(peak_memory, run).result()}
            except Exception as error:  # what an allocator or the kernel says differs
                yield row | {"failed": (str(error) or type(error).__name__).splitlines()[0]}


def peak_memory(run: Run) -> float:
    """Megabytes at the peak of three steps, weights and batch included; for a fresh process.

    On a GPU what PyTorch has allocated, compiled; on a CPU how far the resident size rises above what imports take
    (Linux), not compiled, since compiling takes memory itself.
    """
    gpu = run.device.type == "cuda"
    before = _resident("VmRSS")
    if not gpu:
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    step, batch = our_step(run, compile=gpu), run.batch()
    for _ in range(3):
        step(batch)
    return torch.cuda.max_memory_allocated() / 1e6 if gpu else _resident("VmHWM") - before


def _resident(field: str) -> float:
    """VmRSS (now) or VmHWM (the peak) of this process, in megabytes; see proc(5)."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status[field].split()[0]) * 1024 / 1e6


# -- the report -------------------------------------------------------------------------------------------------------


def verdicts(device: torch.device, table: list[Row]) -> Iterator[str]:
    """What bounds each way of training, a sentence each."""
    rate = {row["what"]: row["images_per_second"] for row in table if "images_per_second" in row}
    loader = rate["loader: ours"]
    for name in ("ours", "ours, compiled"):
        if f"end to end: {name}" in rate:
            step, together = rate[f"step: {name}"], rate[f"end to end: {name}"]
            bound, by = min(step, loader), "the step" if step < loader else "the loader"
            if device.type == "cpu":
                bound = 1 / (1 / step + 1 / loader)
                by = f"the cores, of which the step takes {loader / (step + loader):.0%}"
            yield f"{name}: bound by {by}: {bound:.4g} images/s; {together:.4g} reached, {together / bound:.0%} of it"


def line(row: Row) -> str:
    if "images_per_second" in row:
        begin = f"   {row['seconds_to_begin']:.0f} s to begin" if "seconds_to_begin" in row else ""
        ratio = f"{row['ratio_to_timm']:6.2f} x timm" if "ratio_to_timm" in row else ""
        text = f"{row['images_per_second']:9.1f} images/s {ratio}{begin}"
    elif "share_of_step" in row:
        text = f"{row['milliseconds_per_step']:9.2f} ms {row['share_of_step']:12.1%}"
    elif "seconds" in row:
        text = f"{row['seconds']:9.1f} s"
    else:
        text = f"{row['megabytes']:9.0f} MB" if "megabytes" in row else row["failed"]
    return f"{row['what']:40s} {text}"


def parsed(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add, gpu = parser.add_argument, torch.cuda.is_available()
    add("--width", type=float, default=0.5, help="of the network")
    add("--batch-size", type=int, default=512 if gpu else 64, help="images of a step")
    add("--images", type=int, default=1500, help="files of the corpus")
    add("--repeat", type=int, default=60 if gpu else 1, help="times that an epoch has every file")
    add("--repetitions", type=int, default=5, help="of every measurement")
    add("--steps", type=int, default=50 if gpu else 1, help="of a repetition")
    add("--seconds", type=float, default=3, help="of one measurement of a loader")
    add("--epochs", type=int, default=2, help="of the run of train.py")
    add("--workers", default="auto", help="of this project's loader: data.workers of train.py")
    add("--threads", type=int, default=torch.get_num_threads(), help="of the step on a CPU")
    add("--corpus", type=Path, default=CORPUS, help="folder of the JPEG files")
    add("--out", type=Path, default=ROOT / "results/train_step.csv", help="CSV file")
    add("--device", choices=("cuda", "cpu"), default="cuda" if gpu else "cpu", help="where to train")
    add("--quick", action="store_true", help="neither memory nor what is not the default of train.py on this device")
    add("--alone", action="store_true", help="without timm's side")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    options = parsed(arguments)
    device, corpus = torch.device(options.device), options.corpus.expanduser()
    facts = {"width": options.width, "repetitions": options.repetitions, **machine(device)}
    run = Run(device, options.width, options.batch_size, options.threads, options.workers)
    run.set_up()
    keep_compiled(corpus / "compiled")
    setting = prepare(corpus, options.images, options.batch_size, device, options.width)
    shards = repeated(setting.folder.parent / SHARDS, options.repeat)

    table = list(step_rows(run, options.repetitions, options.steps, options.quick, options.alone))
    table += loader_rows(run, setting, run.config(f"data.root={shards}", f"data.cache={corpus}"), options)
    timms = None
    if not options.alone:
        timms = timm_end_to_end(run, setting, max(options.repetitions * options.steps, 3))
        table.append({"what": "end to end: timm", "images_per_second": timms, "ratio_to_timm": 1.0})
    if device.type == "cuda":
        torch.cuda.empty_cache()  # what this process keeps, train.py cannot have
    table += train_rows(run, shards, corpus, timms, "ours", f"epochs={options.epochs}")
    if not options.quick and device.type == "cpu":
        more = (f"epochs={options.epochs}", "compile=true")
        table += train_rows(run, shards, corpus, timms, "ours, compiled", *more)
    if not options.quick:
        table += memory_rows(device, options.threads)

    facts |= corpus_facts(setting) | {"threads": options.threads}
    print(described(facts))
    print(*verdicts(device, table), *map(line, table), sep="\n")
    write_table(options.out, [facts | row for row in table])


if __name__ == "__main__":
    main()
