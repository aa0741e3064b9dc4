"""Kills runs with SIGKILL and compares what they come to with a run that nobody disturbed: bit for bit, or not.

    python benchmarks/kill.py --kills 50
    python benchmarks/kill.py --kills 10 --task detection     (or distill, or teach)

Trains a tiny network on the embedded digits (distill: with another one as its teacher; teach: stores the logits of
that one), or a tiny detector on the embedded scenes, kills the process at a random moment, starts the same command
again, and so on, five kills a run; then lets the run finish and compares weights, average, optimizer, best epochs,
metrics.csv and evaluation, or the stored logits. A fifth of the kills hit the writing of a checkpoint (its temporary
file is there, and is left behind), a tenth a validation (its progress bar is the last one drawn); nothing in train.py
knows of this. Writes a row for each kill into results/kill.csv and the summary into results/kill.md, for other tasks
into results/kill_TASK.*; exit code 1 when anything differed.
"""

import argparse
import csv
import os
import pty
import random
import re
import subprocess
import sys
import tempfile
import termios
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
RANDOM, WRITING, VALIDATION = "random", "writing", "validation"
KILLS_PER_RUN = 5
RUN = [
    "data=digits", "recipe=quick", "width=0.1", "epochs=2", "recipe.warmup_epochs=1", "trainer=cpu", "data.workers=0",
    "data.eval_batch_size=8", "curve_seconds=1e9", "checkpoint.minutes=0.001",
]  # fmt: skip
TEACHER = "teacher=outputs/teacher"
OF_TASK = {
    "classification": RUN,
    "distill": [*RUN, TEACHER, "recipe.teacher_weight=0.5", "recipe.mix.mixup=0.2"],
    "teach": [*RUN, TEACHER, "recipe.mix.mixup=0.2"],
    "detection": [
        "task=detection", "data=digits_scenes", "recipe=quick_detection", "detector=ssdlite", "width=0.1", "epochs=2",
        "detector.image_size=[64]", "detector.channels=16", "detector.candidates=50", "detector.detections=20",
        "batch_size=32", "trainer=cpu", "data.workers=0", "data.eval_batch_size=20", "curve_seconds=1e9",
        "checkpoint.minutes=0.001",
    ],
}  # fmt: skip
SAME_BYTES = ("metrics.csv", "model.safetensors", "model_fused.safetensors", "evaluation.json")
SAME_VALUES = ("state_dict", "ema", "optimizer_states", "history", "train_sums", "epoch", "global_step")


def differences(one: Path, other: Path) -> list[str]:
    """What differs between the folders of two finished runs; empty when they are the same to the bit."""
    if stored := sorted(path.name for path in one.glob("*.logits")):  # by repghost.teach
        stored.append("store.json")
        return [name for name in stored if (one / name).read_bytes() != (other / name).read_bytes()]
    found = [name for name in SAME_BYTES if (one / name).read_bytes() != (other / name).read_bytes()]
    for name in ("last.ckpt", "best_raw.ckpt", "best_ema.ckpt"):
        a, b = (torch.load(run / "checkpoints" / name, weights_only=True) for run in (one, other))
        leaves_a, leaves_b = (dict(_leaves({key: c[key] for key in SAME_VALUES}, name)) for c in (a, b))
        for path in leaves_a.keys() | leaves_b.keys():
            if path not in leaves_a or path not in leaves_b or not _equal(leaves_a[path], leaves_b[path]):
                found.append(path)
    return sorted(found)


def _leaves(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _leaves(inner, f"{path}: {key}" if path.endswith(".ckpt") else f"{path}.{key}")
    else:
        yield path, value


def _equal(a: Any, b: Any) -> bool:
    return torch.equal(a, b) if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) else a == b


@dataclass
class Kill:
    """One kill. moment: what it hit. seconds: since the process began. identical: what its run came to."""

    run: str
    moment: str
    seconds: float
    identical: bool | None = None


class Process:
    """train.py, or repghost.teach, in a terminal of its own, so that it draws its progress bars."""

    def __init__(self, folder: Path, run: str, command: list[str], teaches: bool = False) -> None:
        self._folder = folder / "outputs" / run / "checkpoints"
        self._leftovers = self._temporaries()
        self._terminal, slave = pty.openpty()
        termios.tcsetwinsize(slave, (24, 120))  # a bar of no width is not drawn
        program = ["-m", "repghost.teach", f"outputs/{run}"] if teaches else [str(ROOT / "train.py"), f"name={run}"]
        self._process = subprocess.Popen(
            [sys.executable, *program, *command, f"data.cache={folder}"],
            cwd=folder, env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}, start_new_session=True,
            stdin=slave, stdout=slave, stderr=slave,
        )  # fmt: skip
        os.close(slave)
        self._began = time.monotonic()
        self.output = b""
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        with suppress(OSError):  # what a terminal gives that nobody writes to any more
            while chunk := os.read(self._terminal, 65536):
                self.output += chunk

    def _temporaries(self) -> set[tuple[Path, int]]:
        found = set()
        for path in self._folder.glob(".*.tmp"):
            with suppress(FileNotFoundError):
                found.add((path, path.stat().st_mtime_ns))
        return found

    @property
    def seconds(self) -> float:
        """Since it began."""
        return time.monotonic() - self._began

    def runs(self) -> bool:
        return self._process.poll() is None

    def trains(self) -> bool:
        """Whether its first batch has begun."""
        return b"Epoch" in self.output

    def writes(self) -> bool:
        """Whether a checkpoint is being written, or was when the process died."""
        return bool(self._temporaries() - self._leftovers)

    def validates(self) -> bool:
        """Whether the last progress bar is that of a validation, of an epoch: not of the evaluation of the run."""
        if re.search(rb"epoch +(\d+)/\1 ", self.output):
            return False
        return self.output.rfind(b"Validation") > max(self.output.rfind(b"Epoch"), self.output.rfind(b"epoch"))

    def moment(self) -> str:
        return WRITING if self.writes() else VALIDATION if self.validates() else RANDOM

    def kill(self) -> None:
        self._process.kill()

    def wait(self) -> int:
        """The exit code, once the process and all that it started are gone."""
        self._reader.join()
        os.close(self._terminal)
        return self._process.wait()


@dataclass
class Pace:
    """How long an undisturbed run takes: until its first batch, and from there to the end."""

    start: float
    rest: float


def kill_at(moment: str, process: Process, pace: Pace, rng: random.Random) -> bool:
    """Kills at a random time, or at the next such moment after that; False when it was too late.

    Every fifth of the random times is in the start. The others are such that the kills of a run reach its end.
    """
    starting = moment == RANDOM and rng.random() < 0.2
    sleep = rng.uniform(0, pace.start if starting else 2 * pace.rest / KILLS_PER_RUN)
    delay = rng.uniform(0, 0.2) if moment == VALIDATION else 0
    while process.runs() and not (starting or process.trains()):
        time.sleep(0.001)
    until = time.monotonic() + sleep
    while process.runs() and time.monotonic() < until:
        time.sleep(0.001)
    while process.runs() and moment not in (RANDOM, process.moment()):
        time.sleep(0.0002)
    time.sleep(delay)
    in_time = process.runs()
    process.kill()
    process.wait()
    return in_time


def kill_and_finish(
    run: str, todo: list[str], start: Callable[[str], Process], pace: Pace, rng: random.Random
) -> list[Kill]:
    """Takes up to five moments from `todo`, then lets the run finish."""
    kills: list[Kill] = []
    while todo and len(kills) < KILLS_PER_RUN:
        process = start(run)
        if not kill_at(todo[0], process, pace, rng):
            break
        hit = process.moment()
        kills.append(Kill(run, hit, round(process.seconds, 3)))
        for counts_as in (hit, RANDOM):
            if counts_as in todo:
                todo.remove(counts_as)
                break
    finished = start(run)
    if finished.wait() != 0:
        sys.exit(f"{run} failed:\n{finished.output.decode()}")
    return kills


def main() -> int:
    """The exit code: 0 when every run came to the same."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50, help="how many (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: %(default)s)")
    parser.add_argument("--task", choices=OF_TASK, default="classification", help="(default: %(default)s)")
    parser.add_argument("--results", type=Path, default=ROOT / "results", help="folder (default: results)")
    parser.add_argument("overrides", nargs="*", help="of train.py, such as trainer.devices=2")
    options = parser.parse_args()
    rng, of_task = random.Random(options.seed), [*OF_TASK[options.task], *options.overrides]
    teaches = options.task == "teach"
    writing, validation = -(-options.kills // 5), 0 if teaches else -(-options.kills // 10)
    todo = [WRITING] * writing + [VALIDATION] * validation + [RANDOM] * max(0, options.kills - writing - validation)
    rng.shuffle(todo)
    kills: list[Kill] = []
    differing: dict[str, list[str]] = {}
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)

        def begin(run: str) -> Process:
            return Process(folder, run, of_task, teaches)

        if TEACHER in of_task and (teacher := Process(folder, "teacher", RUN)).wait() != 0:
            sys.exit(teacher.output.decode())
        undisturbed = begin("undisturbed")
        while undisturbed.runs() and not undisturbed.trains():
            time.sleep(0.001)
        start = undisturbed.seconds
        if undisturbed.wait() != 0:
            sys.exit(undisturbed.output.decode())
        pace, runs = Pace(start, undisturbed.seconds - start), 0
        while todo:
            runs += 1
            run = f"run{runs}"
            mine = kill_and_finish(run, todo, begin, pace, rng)
            differing[run] = differences(folder / "outputs" / "undisturbed", folder / "outputs" / run)
            for kill in mine:
                kill.identical = not differing[run]
                print(f"{kill.run:<8} {kill.moment:<10} {kill.seconds:7.3f} s", flush=True)
            print(
                f"{run:<8} {'differs: ' + ', '.join(differing[run][:5]) if differing[run] else 'identical'}", flush=True
            )
            kills += mine
        table = "detection.csv" if options.task == "detection" else "results.csv"
        names = []
        if not teaches:
            with open(folder / "results" / table, newline="") as file:
                names = [row["name"] for row in csv.DictReader(file) if row["name"] != "teacher"]
    same = sum(bool(kill.identical) for kill in kills)
    hit = {moment: sum(kill.moment == moment for kill in kills) for moment in (WRITING, VALIDATION)}
    compared = (
        f"{', '.join(SAME_BYTES)}; {', '.join(SAME_VALUES)} of last, best_raw and best_ema.ckpt. "
        f"Rows in {table} beyond two a run: {len(names) - 2 * len(set(names))}."
    )
    summary = (
        f"{same} of {len(kills)} kills in {runs} runs: bit-identical to a run without one "
        f"({hit[WRITING]} while a checkpoint was written, {hit[VALIDATION]} during a validation). "
        f"Compared: {'all files of the store.' if teaches else compared}"
    )
    print(f"\n{summary}\n{time.monotonic() - began:.0f} s")
    options.results.mkdir(parents=True, exist_ok=True)
    name = "kill" if options.task == "classification" else f"kill_{options.task}"
    with open(options.results / f"{name}.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Kill)])
        writer.writeheader()
        writer.writerows(map(asdict, kills))
    command = " ".join(
        [
            f"python benchmarks/kill.py --kills {options.kills} --seed {options.seed} --task {options.task}",
            *options.overrides,
        ]
    )
    (options.results / f"{name}.md").write_text(f"# Kills\n\n`{command}`, torch {torch.__version__}\n\n{summary}\n")
    return 0 if same == len(kills) else 1


if __name__ == "__main__":
    sys.exit(main())
