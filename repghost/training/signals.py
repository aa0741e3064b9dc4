"""SIGTERM, SIGINT and SIGUSR1 end a run between two batches: saved, and with an exit code that says "start me again".

A handler only sets a flag. At the end of a batch the ranks reduce their flags (a signal to one of them is enough),
save, and exit with `checkpoint.exit_code`. A second signal changes nothing. Lightning's own handling is switched off.

Under torchrun: it passes SIGTERM and SIGINT on, kills what is left after 30 s, and returns 1 whatever its processes
return. Under SLURM: `#SBATCH --signal=USR1@120`, and `scontrol requeue` in the job's script on the exit code.
Check: `pytest tests/test_signals.py tests/test_resume.py`.
"""

import atexit
import multiprocessing.util  # registers what it does at exit now, so that end_workers_at_exit comes before that
import os
import signal
import sys
import threading
from functools import cache
from types import FrameType
from typing import Self

from repghost.errors import UserError

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class StopSignals:
    """A context in which the signals ask the run to stop; `received` says whether one came.

    exit_code: of a process that a signal stopped. grace_seconds: if no batch ends within that time, because a disk or
    another rank hangs, the process exits all the same, and the run resumes from the previous checkpoint. Until `defer`
    is called there is nothing to save, and a signal ends the process at once.
    """

    def __init__(self, exit_code: int, grace_seconds: float) -> None:
        if not 1 <= exit_code <= 255:
            raise UserError(f"checkpoint.exit_code={exit_code} is not in 1 to 255")
        if grace_seconds <= 0:
            raise UserError(f"checkpoint.grace_seconds={grace_seconds}: more than zero")
        self.received = False
        self._exit_code = exit_code
        self._grace_seconds = grace_seconds
        self._deferred = False
        self._answered = threading.Event()
        self._process = os.getpid()

    def __enter__(self) -> Self:
        self._handlers = {number: signal.signal(number, self._handle) for number in SIGNALS}
        # Python's handlers run in the main thread, which may be what hangs. The wake-up descriptor reaches a thread.
        self._woken, wakes = os.pipe()
        os.set_blocking(wakes, False)
        self._descriptor_before, self._wakes = signal.set_wakeup_fd(wakes, warn_on_full_buffer=False), wakes
        threading.Thread(target=self._keep_deadline, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._answered.set()
        signal.set_wakeup_fd(self._descriptor_before)
        os.close(self._wakes)  # which ends the thread
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def defer(self) -> None:
        """From now on a signal waits for the end of a batch."""
        self._deferred = True

    def answered(self) -> None:
        """Ends the grace period: saving the checkpoint may take longer than that."""
        self._answered.set()

    def stop(self) -> None:
        """Ends the process."""
        sys.exit(self._exit_code)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.received or os.getpid() != self._process:  # a forked worker inherits the handler
            return
        self.received = True
        if not self._deferred:
            self.stop()
        _write_line(f"{signal.Signals(number).name}: stopping after this batch")

    def _keep_deadline(self) -> None:
        while number := os.read(self._woken, 1):
            if number[0] in SIGNALS and not self._answered.wait(self._grace_seconds):
                _write_line(
                    f"no batch ended within {self._grace_seconds:g} s: exiting; the previous checkpoint remains"
                )
                os._exit(self._exit_code)
        os.close(self._woken)


def _write_line(line: str) -> None:
    """Writes to stderr; not by print, since what the signal interrupted may be a print."""
    os.write(2, f"{line}\n".encode())


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
