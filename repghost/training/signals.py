"""Signals end a run between two batches: saved, and with an exit code that says "start me again".

They are SIGTERM, SIGINT, SIGUSR1 and SIGUSR2. A handler only sets a flag. At the end of a batch the ranks reduce their
flags (a signal to one of them is enough), save, and exit with `checkpoint.exit_code`. A second signal changes nothing.
Lightning's own handling is switched off.

Under torchrun: it passes SIGTERM and SIGINT on, kills what is left after 30 s, and returns 1 whatever its processes
return. Under SLURM: `#SBATCH --signal=USR1@120`, and `scontrol requeue` in the job's script on the exit code.
Check: `pytest tests/test_signals.py tests/test_resume.py`.
"""

import atexit
import multiprocessing.util  # registers what it does at exit now, so that end_workers_at_exit comes before that
import os
import signal
import sys
from contextlib import suppress
from functools import cache
from types import FrameType
from typing import Self

from repghost.errors import StoppedTogether

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)  # the last one is submitit's


class StopSignals:
    """A context in which the signals ask the run to stop; `received` says whether one came.

    exit_code: of a process that a signal stopped. Until `deferred` is set there is nothing to save, and a signal ends
    the process at once. quiet: without a line, on all ranks but one. A signal leaves its handlers in place, so that
    more of them change nothing while the process ends.
    """

    def __init__(self, exit_code: int, quiet: bool = False) -> None:
        self.received = self.deferred = False
        self._exit_code = exit_code
        self._quiet = quiet
        self._process = os.getpid()

    def __enter__(self) -> Self:
        self._handlers = {number: signal.signal(number, self._handle) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        if not self.received:
            for number, handler in self._handlers.items():
                signal.signal(number, handler)

    def stop(self) -> None:
        """Ends the process, as all ranks do that saved together."""
        raise StoppedTogether(self._exit_code)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.received or os.getpid() != self._process:  # a forked worker inherits the handler
            return
        self.received = True
        if not self._quiet:
            what = "stopping after this batch" if self.deferred else "stopped before the first batch"
            with suppress(OSError):  # not by print, since what the signal interrupted may be a print
                os.write(2, f"{signal.Signals(number).name}: {what}\n".encode())
        if not self.deferred:
            sys.exit(self._exit_code)


def ignore_signals(worker: int) -> None:
    """For a DataLoader's `worker_init_fn`: Ctrl-C and job managers signal all processes, the run's own ends workers."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


@cache
def end_workers_at_exit() -> None:
    """To be called before workers start that ignore signals: a process that ends early must not wait for them.

    At exit multiprocessing sends SIGTERM to the workers that are left, which ignore it, and joins them.
    """
    atexit.register(end_workers)


def end_workers() -> None:
    """Kills the workers of this process."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would call their end an error
    for process in multiprocessing.active_children():
        if process.daemon:
            process.kill()
