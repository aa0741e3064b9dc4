"""`profile=true`: where the time of a training step goes, as a table, and as a trace that a person can open.

Both are taken from a few steps once the first ones, which compile and choose kernels, are over. The table comes first:
seconds of each stage by the wall clock, without the time of stages inside of it, so that the rows add up to the whole.
A GPU works behind the host's back; so that each stage has its own time, every boundary waits for it, and the sum is
what the steps would take without any overlap. The trace of the steps after those waits for nothing.
Check: `pytest tests/test_profile.py`.
"""

import csv
import gzip
import io
import os
import shutil
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning.profilers import Profiler
from pytorch_lightning.utilities.rank_zero import rank_zero_only
from torch.profiler import ProfilerActivity, profile, record_function

from repghost.errors import print_rank_zero
from repghost.files import write_text

SKIPPED, CLOCKED, TRACED = 5, 10, 3  # steps, in this order
REST = "rest of the loop"

# What Lightning calls the parts of a step: the end of each name, and the stage that it is.
_STAGES = {
    "train_dataloader_next": "wait for data",
    ".batch_to_device": "copy to device",
    ".on_after_batch_transfer": "augment",
    ".training_step": "forward",
    ".backward": "backward",
    ".optimizer_zero_grad": "optimizer",
    ".optimizer_step": "optimizer",
    ".average": "EMA",
    ".on_train_batch_start": "logging and checks",
    ".on_train_batch_end": "logging and checks",
}
STAGES = (*dict.fromkeys(_STAGES.values()), REST)


class StepProfiler(Profiler):
    """Clocks, then traces a few training steps; writes profile.csv and trace.json.gz into `directory`.

    A run that ends before its SKIPPED + CLOCKED + TRACED steps leaves what it got to.
    """

    def __init__(self, directory: Path) -> None:
        super().__init__()
        self._directory = directory
        self._silent = rank_zero_only.rank != 0  # type: ignore[attr-defined]
        self._steps = -1  # that have ended; -1 until the first has begun
        self._clock: _Clock | None = None
        self._trace: Any = None
        self._open: list[tuple[str, record_function]] = []

    def start(self, action_name: str) -> None:
        if self._clock and action_name.endswith(".on_validation_start"):
            self._clock.pause()
        stage = _stage(action_name)
        if stage is None:
            return
        if stage == "wait for data":
            self._next_step()
        if self._clock:
            self._clock.enter(stage)
        if self._trace:
            self._open.append((action_name, record_function(stage)))
            self._open[-1][1].__enter__()

    def stop(self, action_name: str) -> None:
        stage = _stage(action_name)
        if stage is None:
            return
        if self._clock:
            self._clock.leave()
        if self._open and self._open[-1][0] == action_name:
            self._open.pop()[1].__exit__(None, None, None)

    def teardown(self, stage: str | None) -> None:
        self._finish()
        self._steps = SKIPPED + CLOCKED + TRACED

    def _next_step(self) -> None:
        if self._silent:
            return
        self._steps += 1
        if self._steps == 1:
            print_rank_zero(f"start      the first step was done {_age():.1f} s after the command")
        if self._steps == SKIPPED:
            self._clock = _Clock()
        elif self._steps == SKIPPED + CLOCKED:
            self._finish()
            gpu = [ProfilerActivity.CUDA] if torch.cuda.is_available() else []
            self._trace = profile(activities=[ProfilerActivity.CPU, *gpu])
            self._trace.start()
        elif self._steps == SKIPPED + CLOCKED + TRACED:
            self._finish()
        if self._clock:
            self._clock.go_on()

    def _finish(self) -> None:
        """Writes what was taken, and takes nothing more of it."""
        if self._clock:
            self._write(self._clock.read(), self._steps - SKIPPED)
            self._clock = None
        if self._trace:
            while self._open:
                self._open.pop()[1].__exit__(None, None, None)
            self._trace.stop()
            plain = self._directory / "trace.json"
            self._trace.export_chrome_trace(str(plain))
            with open(plain, "rb") as source, gzip.open(self._directory / "trace.json.gz", "wb") as target:
                shutil.copyfileobj(source, target)
            plain.unlink()
            self._trace = None
            print_rank_zero(f"trace      {self._directory / 'trace.json.gz'}: open it at ui.perfetto.dev")

    def _write(self, spent: dict[str, float], steps: int) -> None:
        if steps < 1:
            return
        whole = sum(spent.values())
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(("stage", "milliseconds_per_step", "share"))
        lines = [f"profile    {steps} steps of {1000 * whole / steps:.1f} ms"]
        for stage in STAGES:
            milliseconds, share = 1000 * spent[stage] / steps, spent[stage] / whole
            writer.writerow((stage, f"{milliseconds:.3f}", f"{share:.4f}"))
            lines.append(f"           {stage:<20} {milliseconds:9.2f} ms {share:7.1%}")
        write_text(self._directory / "profile.csv", text.getvalue())
        print_rank_zero("\n".join(lines))


class _Clock:
    """Time by stage; what happens in a stage within another counts for the inner one."""

    def __init__(self) -> None:
        self._spent: defaultdict[str, float] = defaultdict(float)
        self._stack = [REST]
        self._since = _now()
        self._paused = False

    def enter(self, stage: str) -> None:
        self._charge()
        self._stack.append(stage)

    def leave(self) -> None:
        self._charge()
        if len(self._stack) > 1:  # not of a stage that had begun before the clock
            self._stack.pop()

    def pause(self) -> None:
        """Until `go_on`: a validation and an epoch's end are no part of a step."""
        self._charge()
        self._paused = True

    def go_on(self) -> None:
        if self._paused:
            self._paused, self._since = False, _now()

    def read(self) -> dict[str, float]:
        """Seconds of each stage."""
        self._charge()
        return self._spent

    def _charge(self) -> None:
        now = _now()
        if not self._paused:
            self._spent[self._stack[-1]] += now - self._since
        self._since = now


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def _age() -> float:
    """Seconds since this process was started (proc_pid_stat(5), field 22)."""
    started = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19]) / os.sysconf("SC_CLK_TCK")
    return time.clock_gettime(time.CLOCK_BOOTTIME) - started


def _stage(action: str) -> str | None:
    return next((stage for end, stage in _STAGES.items() if action.endswith(end)), None)
