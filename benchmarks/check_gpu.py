"""Whether this project does on the GPUs of this machine what it does in its tests on a CPU, and how fast it is there.

    make check-gpu (or python benchmarks/check_gpu.py)      all GPUs: 30 minutes at most on one, 40 on several
    python benchmarks/check_gpu.py --only race digits       the checks whose names hold one of these words
    python benchmarks/check_gpu.py --cpu                    the same on a CPU, as far as that goes, in ten minutes

needs the environment of `make test` and downloads nothing: it trains on the embedded digits, and measures on JPEG files
that it makes (benchmarks/corpus.py). It prints a line for each check, with its figure and its bar, and writes
check_gpu.json and check_gpu.md into --out: attach them to an issue. It ends early when a check fails without which the
others say nothing. Exit code 1 when a line says FAIL. The commands' output is in --folder.
"""

import argparse
import shutil
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import check_rates, check_runs
from benchmarks.check_bench import Bench, Scale
from benchmarks.check_report import (
    FAIL,
    SKIP,
    Bar,
    Failed,
    Line,
    Report,
    Skipped,
    at_least,
    at_most,
    judged,
    no_bar,
    told,
)
from benchmarks.common import CORPUS, ROOT, described, nvidia_smi
from repghost.errors import UserError, run_command
from repghost.results import commit

SCALES = {
    "cuda": Scale(
        digits={"width": 0.5, "epochs": 10},
        short={"width": 0.5, "epochs": 30},
        least_top1=97,
        batch_sizes=(128, 1024),
        images=1500,
        repeat=60,
        seconds=6,
        race=(50, 128),
        measuring=("--repetitions=3", "--steps=50", "--seconds=3", "--epochs=2"),
        patience=(600, 120),
    ),
    "cpu": Scale(
        digits={"width": 0.5, "epochs": 5},
        short={"width": 0.1, "epochs": 3, "recipe.warmup_epochs": 1},
        least_top1=90,
        batch_sizes=(4, 8),
        images=24,
        repeat=3,
        seconds=0.2,
        race=(12, 4),
        measuring=("--repetitions=1", "--steps=1", "--seconds=0.2", "--epochs=1", "--threads=1"),
        patience=(2400, 900),  # it may share its cores with other things
    ),
}
MARK = ".check_gpu"  # in the folder that may be emptied
MINUTES = {"one GPU": 30, "several GPUs": 40, "cpu": 90}  # the last one for a machine that does other things, too


@dataclass(frozen=True)
class Check:
    """A line. essential: without it the lines after it say nothing."""

    name: str
    run: Callable[[Bench], float | str]
    bar: Bar
    essential: bool = False


def checks(scale: Scale, kind: str) -> Iterator[Check]:
    """All of them, in their order. kind: of the machine, as in `judged`."""
    runs, rates = check_runs, check_rates
    top1, (small, large) = at_least(scale.least_top1, "%"), scale.batch_sizes
    yield Check("tests that need a GPU", rates.gpu_tests, told("all run and pass"))
    for size in scale.batch_sizes:
        bar = at_least(10_000, " images/s", "reference")
        yield Check(f"decoding, batches of {size}", partial(rates.decode, batch_size=size), bar)
    yield Check("share of the JPEG decoder, while it works", rates.hardware_decoder, at_least(1, "%"))
    yield Check("race: batches that change when read late", rates.race, at_most(0), essential=True)
    yield Check("digits: Top-1", runs.digits, top1, essential=True)
    yield Check("digits, loader=torch: Top-1", runs.torch_loader, top1)
    yield Check("digits, precision=fp16: Top-1", runs.fp16, top1)
    yield Check("finetune, past its unfreezing: Top-1", runs.finetune, top1)
    yield Check("evaluation, three times: those that differ", runs.repeated_evaluation, at_most(0))
    yield Check("evaluation on the CPU: images that differ", runs.evaluation_on_cpu, at_most(1))
    yield Check("SIGTERM and resume", runs.sigterm, told("exit code 75, goes on"))
    yield Check("kill -9 and resume", runs.sigkill, told("goes on"))
    yield Check("checkpoint of a CPU, resumed on a GPU", runs.from_cpu, told("goes on"))
    sizes = [(0.5, small, 10_000), (0.5, large, 10_000), (1.0, large, 8_000)]
    for width, size, least in sizes if kind != "cpu" else sizes[:2]:
        what = f"{width}x, batch {size}"
        rate = partial(rates.rate, width=width, batch_size=size)
        for part in ("step", "loader"):
            yield Check(f"{part}, {what}", partial(rate, what=part), no_bar(" images/s"))
        bar = at_least(least, " images/s", "reference")
        yield Check(f"end to end, {what}", partial(rate, what="end to end"), bar)
        together = partial(rates.together, width=width, batch_size=size)
        yield Check(f"of the slower of both, {what}", together, at_least(90, "%", "gpu"))
    yield Check("all devices: Top-1", runs.several, top1)
    yield Check("a failing rank ends all", runs.failing_rank, at_most(30, " s", "gpu"))
    yield Check("processes on a GPU, with a rank on each", runs.contexts, at_most(1))
    for ranks in (2, 4, 8):
        what = f"train.py on {ranks} devices, of {ranks} x one"
        yield Check(what, partial(rates.scaling, ranks=ranks), at_least(80, "%", "gpu"))


def outcome(check: Check, bench: Bench, kind: str) -> Line:
    """Runs a check; whatever goes wrong in it is its line."""
    began = time.monotonic()
    try:
        if began > bench.until:
            raise Failed("not run: the time was over")
        line = judged(check.name, check.run(bench), check.bar, kind)
    except Skipped as skipped:
        line = Line(check.name, SKIP, str(skipped), check.bar.text)
    except Failed as failure:
        line = Line(check.name, FAIL, str(failure), check.bar.text, log=failure.log)
    except Exception as error:  # of this program, or of what a command left
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        line = Line(check.name, FAIL, reason, check.bar.text, log=traceback.format_exc())
    line.seconds = time.monotonic() - began
    return line


def run_checks(chosen: Iterable[Check], bench: Bench, kind: str, report: Report, stem: Path) -> None:
    """Adds the lines to the report, which is written after each, and prints them."""
    for check in chosen:
        if report.stopped_by:
            line = Line(check.name, SKIP, f"not run: {report.stopped_by} failed", check.bar.text)
        else:
            if sys.stdout.isatty():
                print(f"...   {check.name}", end="\r", flush=True)
            line = outcome(check, bench, kind)
        if check.essential and line.status == FAIL:
            report.stopped_by = check.name
        report.lines.append(line)
        report.seconds += line.seconds
        report.write(stem)
        print(line, flush=True)


def device_works(bench: Bench, report: Report) -> str:
    """What it is; notes it in the report."""
    report.facts |= bench.called(check_rates.facts, bench.device)
    print(described(report.facts), flush=True)
    return str(report.facts["device"])


def machine_kind(facts: Mapping[str, Any]) -> str:
    """Which bars hold for a machine: see `judged`."""
    if "capability" not in facts:
        return "cpu"
    return "reference" if "H100" in facts["device"] and facts["cores"] >= 16 else "gpu"


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--cpu", action="store_true", help="on a CPU, with two processes where several GPUs are needed")
    add("--only", nargs="+", metavar="WORD", help="only the checks whose names hold one of these words")
    add("--minutes", type=float, help="after which no check goes on (default: 30, 40 with several GPUs, 90 with --cpu)")
    add("--out", type=Path, default=ROOT / "results", help="folder of the reports (default: %(default)s)")
    add("--folder", type=Path, default=ROOT / "outputs/check_gpu", help="of runs and logs, emptied (%(default)s)")
    add("--corpus", type=Path, default=CORPUS, help="of the JPEG files (default: %(default)s)")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code: 1 when a check failed."""
    options = parsed(arguments)
    gpus = torch.cuda.device_count()
    if not (gpus or options.cpu):
        found = nvidia_smi("gpu", ("name", "driver_version"))
        shown = f": nvidia-smi shows {found[0]['name']}, driver {found[0]['driver_version']}" if found else ""
        cuda = f"torch {torch.__version__}, made for CUDA {torch.version.cuda}, finds no GPU here"
        raise UserError(f"{cuda}{shown}; --cpu checks what a CPU can")
    device, devices = ("cpu", 2) if options.cpu else ("cuda", gpus)
    minutes = options.minutes or MINUTES["cpu" if options.cpu else "several GPUs" if gpus > 1 else "one GPU"]
    folder, out = options.folder.resolve(), options.out.resolve()
    if folder.exists() and any(folder.iterdir()) and not (folder / MARK).exists():
        raise UserError(f"--folder {folder}: holds something that is not of this program: name another one")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / MARK).touch()
    until = time.monotonic() + 60 * minutes
    bench = Bench(folder, options.corpus.expanduser().resolve(), device, devices, SCALES[device], until)

    stem = out / ("check_cpu" if options.cpu else "check_gpu")
    report = Report("check-gpu on a CPU" if options.cpu else "check-gpu", {"commit": commit()})
    if not options.cpu:
        report.texts["topology"] = check_rates.topology()
    first = Check("the device", partial(device_works, report=report), told("convolves as a CPU does"), essential=True)
    run_checks([first], bench, "", report, stem)
    kind = machine_kind(report.facts)
    words = options.only or [""]
    chosen = [check for check in checks(bench.scale, kind) if any(word in check.name for word in words)]
    if not chosen:
        raise UserError(f"--only {' '.join(words)}: no check has such a name")
    run_checks(chosen, bench, kind, report, stem)
    print(f"{report.verdict}; {report.seconds / 60:.1f} minutes; {' and '.join(map(str, report.write(stem)))}")
    return 1 if report.failed else 0


if __name__ == "__main__":
    sys.exit(run_command(main))
