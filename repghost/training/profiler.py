"""`profile=true`: where the time of a training step goes, as a table, and as a trace that a person can open.

Both are taken from a few steps after the first ones, which compile and choose kernels. The table comes first: the
wall-clock time of each stage without the stages inside it, so that the rows add up to the step. To give each stage of a
GPU a time of its own, every boundary waits for the GPU: the sum is what the steps would take without any overlap. The
trace of the next steps waits for nothing. Check: `pytest tests/test_profile.py`.
"""

import os
import time
from collections import defaultdict
from pathlib import Path

import torch
from pytorch_lightning.profilers import Profiler
from pytorch_lightning.utilities.rank_zero import rank_zero_only
from torch.profiler import profile, record_function, schedule

from repghost.errors import print_rank_zero
from repghost.files import rows_as_csv, write_text
from repghost.training.internals import STAGE_OF_ACTION

SKIPPED, CLOCKED, WARMUP, TRACED = 5, 10, 1, 3  # steps, in this order
END = SKIPPED + CLOCKED + WARMUP + TRACED
REST = "rest of the loop"
STAGES = (*dict.fromkeys(STAGE_OF_ACTION.values()), REST)


class StepProfiler(Profiler):
    """Clocks, then traces a few training steps; writes profile.csv and trace.json.gz into `directory`.

    A run that ends before its END steps leaves what it got to.
    """

    def __init__(self, directory: Path) -> None:
        super().__init__()
        self._directory = directory
        self._steps = -1  # that have ended; -1 until the first has begun
        self._spent: defaultdict[str, float] = defaultdict(float)  # seconds of each stage
        self._open: list[tuple[str, record_function]] = []  # stages, the outermost first; empty between steps
        self._since = 0.0
        self._trace = profile(
            schedule=schedule(skip_first=SKIPPED + CLOCKED, wait=0, warmup=WARMUP, active=TRACED, repeat=1),
            on_trace_ready=self._write_trace,
        )

    def start(self, action_name: str) -> None:
        if action_name.endswith(".on_validation_start"):  # no part of a step, like the end of an epoch
            self._close(0)
        elif stage := _stage(action_name):
            if action_name.endswith("train_dataloader_next"):
                self._next_step()
            if self._open:
                self._enter(stage)

    def stop(self, action_name: str) -> None:
        if _stage(action_name) and len(self._open) > 1:
            self._close(len(self._open) - 1)

    def teardown(self, stage: str | None) -> None:
        self._close(0)
        if 0 <= self._steps < END:
            self._trace.stop()
            if SKIPPED < self._steps < SKIPPED + CLOCKED:
                self._write_table(self._steps - SKIPPED)
        self._steps = END

    def _next_step(self) -> None:
        if rank_zero_only.rank != 0 or self._steps == END:  # type: ignore[attr-defined]
            return
        self._close(0)
        self._steps += 1
        if self._steps == 0:
            self._trace.start()
        else:
            self._trace.step()
        if self._steps == 1:
            print_rank_zero(f"start      the first step was done {_age():.1f} s after the command")
        if self._steps == SKIPPED + CLOCKED:
            self._write_table(CLOCKED)
        if SKIPPED <= self._steps < END:
            self._enter(REST)

    def _enter(self, stage: str) -> None:
        self._charge()
        self._open.append((stage, record_function(stage)))
        self._open[-1][1].__enter__()

    def _close(self, depth: int) -> None:
        """Ends the stages from `depth` on, the innermost first."""
        self._charge()
        while len(self._open) > depth:
            self._open.pop()[1].__exit__(None, None, None)

    def _charge(self) -> None:
        """Adds the time since the last boundary to the innermost stage."""
        if SKIPPED <= self._steps < SKIPPED + CLOCKED and torch.cuda.is_available():
            torch.cuda.synchronize()
        now = time.perf_counter()
        if self._open:
            self._spent[self._open[-1][0]] += now - self._since
        self._since = now

    def _write_table(self, steps: int) -> None:
        whole = sum(self._spent.values())
        print_rank_zero(f"profile    {steps} steps of {1000 * whole / steps:.1f} ms")
        rows: list[dict[str, object]] = []
        for stage in STAGES:
            milliseconds, share = 1000 * self._spent[stage] / steps, self._spent[stage] / whole
            rows.append({"stage": stage, "milliseconds_per_step": round(milliseconds, 3), "share": round(share, 4)})
            print_rank_zero(f"           {stage:<20} {milliseconds:9.2f} ms {share:7.1%}")
        write_text(self._directory / "profile.csv", rows_as_csv(rows))

    def _write_trace(self, trace: profile) -> None:
        trace.export_chrome_trace(str(self._directory / "trace.json.gz"))
        print_rank_zero(f"trace      {self._directory / 'trace.json.gz'}: open it at ui.perfetto.dev")


def _age() -> float:
    """Seconds since this process was started (proc_pid_stat(5), field 22)."""
    started = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19]) / os.sysconf("SC_CLK_TCK")
    return time.clock_gettime(time.CLOCK_BOOTTIME) - started


def _stage(action: str) -> str | None:
    return next((stage for end, stage in STAGE_OF_ACTION.items() if action.endswith(end)), None)
