"""`profile=true`: where the time of a training step goes, as a table, and as a trace that a person can open.

Both are taken from a few steps after the first ones, which compile and choose kernels. The table comes first: the
wall-clock time of each stage without the stages inside it, so that the rows add up to the step. To give each stage of a
GPU a time of its own, every boundary waits for the GPU: the sum is what the steps would take without any overlap. The
trace of the next steps waits for nothing. Check: `pytest tests/test_profile.py`.
"""

import os
import time
from pathlib import Path

import torch
from pytorch_lightning.profilers import Profiler
from pytorch_lightning.utilities.rank_zero import rank_zero_only
from torch.profiler import profile, record_function, schedule

from repghost.errors import print_rank_zero
from repghost.files import rows_as_csv, write_text
from repghost.training.internals import STAGE_OF_ACTION

SKIPPED, CLOCKED, TRACED = 5, 10, 3  # steps, in this order; the tracer takes one more before its own to warm up
REST = "rest of the loop"
STAGES = (*dict.fromkeys(STAGE_OF_ACTION.values()), REST)


class StepProfiler(Profiler):
    """Clocks, then traces a few training steps of rank 0; writes profile.csv and trace.json.gz into `directory`.

    A run that ends before these steps leaves what it got to.
    """

    def __init__(self, directory: Path) -> None:
        super().__init__()
        self._directory = directory
        self._begun = 0  # steps
        self._open: list[tuple[str, record_function]] = []  # stages of the step, the outermost first
        self._since = 0.0
        self._spent = dict.fromkeys(STAGES, 0.0)  # seconds
        traced = schedule(wait=SKIPPED + CLOCKED, warmup=1, active=TRACED, repeat=1)
        self._tracer = profile(schedule=traced, on_trace_ready=self._write_trace)

    def start(self, action_name: str) -> None:
        if action_name.endswith(".on_validation_start"):  # no part of a step, nor is the end of an epoch
            self._switch(0)
        elif action_name.endswith("train_dataloader_next") and rank_zero_only.rank == 0:  # type: ignore[attr-defined]
            self._begin_step()
        if self._open and (stage := _stage(action_name)):
            self._switch(len(self._open), stage)

    def stop(self, action_name: str) -> None:
        if len(self._open) > 1 and _stage(action_name):
            self._switch(len(self._open) - 1)

    def teardown(self, stage: str | None) -> None:
        self._switch(0)
        if self._begun:
            self._tracer.stop()
        if SKIPPED + 1 < self._begun <= SKIPPED + CLOCKED:
            self._write_table(self._begun - 1 - SKIPPED)
        self._begun = 0

    def _begin_step(self) -> None:
        self._switch(0)
        (self._tracer.step if self._begun else self._tracer.start)()
        if self._begun == SKIPPED + CLOCKED:
            self._write_table(CLOCKED)
        if self._begun == 1:
            print_rank_zero(f"start      the first step was done {_age():.1f} s after the command")
        self._begun += 1
        if SKIPPED < self._begun <= SKIPPED + CLOCKED + 1 + TRACED:
            self._switch(0, REST)

    def _switch(self, depth: int, stage: str | None = None) -> None:
        """Ends the stages from `depth` on, the innermost first, then begins `stage`.

        The time since the last boundary was spent in the innermost one.
        """
        if SKIPPED < self._begun <= SKIPPED + CLOCKED:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if self._open:
                self._spent[self._open[-1][0]] += time.perf_counter() - self._since
        while len(self._open) > depth:
            self._open.pop()[1].__exit__(None, None, None)
        if stage:
            self._open.append((stage, record_function(stage)))
            self._open[-1][1].__enter__()
        self._since = time.perf_counter()

    def _write_table(self, steps: int) -> None:
        whole = sum(self._spent.values())
        print_rank_zero(f"profile    {steps} steps of {1000 * whole / steps:.1f} ms")
        rows: list[dict[str, object]] = []
        for stage, spent in self._spent.items():
            milliseconds, share = 1000 * spent / steps, spent / whole
            rows.append({"stage": stage, "milliseconds_per_step": round(milliseconds, 3), "share": round(share, 4)})
            print_rank_zero(f"           {stage:<20} {milliseconds:9.2f} ms {share:7.1%}")
        write_text(self._directory / "profile.csv", rows_as_csv(rows))

    def _write_trace(self, tracer: profile) -> None:
        file = self._directory / "trace.json.gz"
        tracer.export_chrome_trace(str(file))
        print_rank_zero(f"trace      {file}: open it at ui.perfetto.dev")


def _age() -> float:
    """Seconds since this process was started (proc_pid_stat(5), field 22)."""
    started = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19]) / os.sysconf("SC_CLK_TCK")
    return time.clock_gettime(time.CLOCK_BOOTTIME) - started


def _stage(action: str) -> str | None:
    return next((stage for end, stage in STAGE_OF_ACTION.items() if action.endswith(end)), None)
