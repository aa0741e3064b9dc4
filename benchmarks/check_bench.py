"""What the checks of check_gpu.py run on and with: their size, their folder, and the commands that they start.

A command runs in a session of its own, of which nothing is left when its check is over.
"""

import csv
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from benchmarks.check_report import Failed, Skipped
from benchmarks.common import ROOT

LOG_LINES = 30  # of a command's output in a report


@dataclass(frozen=True)
class Scale:
    """How large the checks are on a kind of device: one that has to be quick on two cores, one that says something.

    digits: keys of the runs that have to learn; short: of those that are stopped, killed or damaged. least_top1: in
    percent. batch_sizes: of the rates; images: of their corpus; repeat: times that an epoch has each of them.
    race: batches, and images of each. measuring: further options of train_step.py. patience: seconds for a command, and
    for the end of one with a failing rank.
    """

    digits: Mapping[str, Any]
    short: Mapping[str, Any]
    least_top1: float
    batch_sizes: tuple[int, int]
    images: int
    repeat: int
    seconds: float
    race: tuple[int, int]
    measuring: tuple[str, ...]
    patience: tuple[float, float]


@dataclass
class Bench:
    """Where and on what the checks run. devices: GPUs, on a CPU processes. until: the monotonic clock's last second."""

    folder: Path
    corpus: Path
    device: str
    devices: int
    scale: Scale
    until: float
    kept: dict[str, Any] = field(default_factory=dict)  # what several checks share, by name

    def once(self, name: str, make: Callable[[], Any]) -> Any:
        """What `make` returned when it was first called under this name; a failure fails again."""
        if name not in self.kept:
            try:
                self.kept[name] = make()
            except (Failed, Skipped) as error:
                self.kept[name] = error
        if isinstance(self.kept[name], Exception):
            raise self.kept[name]
        return self.kept[name]

    @contextmanager
    def command(self, name: str, *arguments: str | Path) -> Iterator["Command"]:
        """Python with these arguments in the folder of the checks; nothing of it is left at the end."""
        started = Command(self, name, [sys.executable, *map(str, arguments)])
        try:
            yield started
        finally:
            started.kill()

    def finished(self, name: str, *arguments: str | Path) -> str:
        """What a command said that ended with exit code 0. Raises Failed for another one."""
        with self.command(name, *arguments) as command:
            if code := command.end():
                raise Failed(f"{name}: exit code {code}", command.said)
        return command.text

    def called(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """What a function of benchmarks/check_rates.py returns, as JSON has it, in a process of its own."""
        name, out = function.__name__, self.folder / f"{function.__name__}.json"
        program = ROOT / "benchmarks/check_rates.py"
        self.finished(name, program, name, json.dumps(arguments, default=str), out)
        return json.loads(out.read_text())

    def keys(self, name: str, **keys: Any) -> list[str | Path]:
        """train.py and its overrides for a run called `name` on this device."""
        trainer = "cpu" if self.device == "cpu" else "gpu"
        own: dict[str, Any] = {"trainer": trainer, "trainer.devices": 1, "recipe": "quick"}
        own |= {"data": "digits", "data.cache": self.folder / "cache", "curve_seconds": 1e9, "name": name}
        return [ROOT / "train.py", *(f"{key}={value}" for key, value in {**own, **keys}.items())]

    def train(self, name: str, **keys: Any) -> dict[str, Any]:
        """Trains to the end; the content of evaluation.json."""
        self.finished(name, *self.keys(name, **keys))
        return cast(dict[str, Any], json.loads((self.run(name) / "evaluation.json").read_text()))

    def run(self, name: str) -> Path:
        """The folder of a run."""
        return self.folder / "outputs" / name

    def epochs(self, name: str) -> list[int]:
        """Those that a run has finished: the rows of metrics.csv."""
        with suppress(FileNotFoundError), open(self.run(name) / "metrics.csv", newline="") as file:
            return [int(float(row["epoch"])) for row in csv.DictReader(file)]
        return []

    def digits(self) -> dict[str, Any]:
        """The evaluation of the run that others begin with."""
        return cast(dict[str, Any], self.once("digits", lambda: self.train("digits", **self.scale.digits)))


class Command:
    """A process in a session of its own, with its output in a file."""

    def __init__(self, bench: Bench, name: str, command: list[str]) -> None:
        self._bench, self._name, self._log = bench, name, bench.folder / f"{name}.log"
        self._until = time.monotonic() + bench.scale.patience[0]
        with open(self._log, "a") as log:
            self._process = subprocess.Popen(
                command, cwd=bench.folder, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )

    @property
    def text(self) -> str:
        return self._log.read_text(errors="replace")

    @property
    def said(self) -> str:
        """The end of its output."""
        return "\n".join(self.text.splitlines()[-LOG_LINES:])

    def until(self, condition: Callable[[], bool]) -> None:
        """Waits. Raises Failed when the process ends before, and when the time is over."""
        while not condition():
            if self._process.poll() is not None:
                raise Failed(f"{self._name} ended too early, with exit code {self._process.returncode}", self.said)
            self._sleep()

    def signal(self, number: int) -> None:
        self._process.send_signal(number)

    def signal_all(self, number: int) -> None:
        """To the process and all that it started."""
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)

    def end(self, within: float = math.inf) -> int:
        """The exit code, once every process of its session is gone. Raises Failed when the time is over."""
        self._until = min(self._until, time.monotonic() + within)
        while self._process.poll() is None or self._is_left():
            self._sleep()
        return self._process.returncode

    def kill(self) -> None:
        self.signal_all(signal.SIGKILL)
        self._process.wait()

    def _is_left(self) -> bool:
        """Whether a process of the group lives; one that nobody has waited for is over (proc_pid_stat(5))."""
        for path in Path("/proc").glob("[0-9]*/stat"):
            with suppress(OSError):
                state, _, group = path.read_text().rpartition(")")[2].split()[:3]
                if int(group) == self._process.pid and state != "Z":
                    return True
        return False

    def _sleep(self) -> None:
        if time.monotonic() > min(self._until, self._bench.until):
            raise Failed(f"{self._name} was still running when its time was over", self.said)
        time.sleep(0.05)


def require_gpu(bench: Bench) -> None:
    if bench.device == "cpu":
        raise Skipped("needs a GPU")


def require_devices(bench: Bench, count: int) -> None:
    if bench.devices < count:
        raise Skipped(f"needs {count} devices, and there are {bench.devices} here")
