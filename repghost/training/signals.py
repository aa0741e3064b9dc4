"""SIGTERM, SIGINT and SIGUSR1 end a run between two batches: saved, and with an exit code that says "start me again".

A handler only sets a flag. At the end of a batch the ranks agree on it (a signal to one of them is enough), save, and
exit with `checkpoint.exit_code`. A second signal changes nothing. Lightning's own handling is switched off: it issues
a collective inside of the handler, and one more per batch that makes the device wait.

What others make of it: `torchrun` passes SIGTERM and SIGINT on, kills what is left after 30 s, and returns 1 whatever
its processes return. SLURM: `#SBATCH --signal=USR1@120`, and `scontrol requeue` in the job's script on the exit code.
Check: `pytest tests/test_signals.py tests/test_resume.py`.
"""

import atexit
import multiprocessing.util  # before _end_workers is registered: what is registered last runs first
import os
import signal
import sys
import threading
from types import FrameType, TracebackType
from typing import Any, Self

import pytorch_lightning as pl
import torch
import torch.distributed as dist

from repghost.errors import UserError

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)

# What a rank wishes for at the end of a batch; the largest wish of all ranks is followed.
GO_ON, SAVE, STOP = 0, 1, 2


class StopSignals:
    """A context in which the signals ask the run to stop; `received` says whether one came.

    exit_code: of a process that stopped because of it. grace_seconds: when no batch ends within that time, because a
    disk or another rank does not answer, the process exits all the same; the run then goes on from the checkpoint
    before. Until `defer` is called there is nothing to save, and a signal ends the process at once.
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
        # Python's handlers wait for the main thread, which may be what hangs. This wakes a thread at once.
        self._woken, wakes = os.pipe()
        os.set_blocking(wakes, False)
        self._descriptor_before, self._wakes = signal.set_wakeup_fd(wakes, warn_on_full_buffer=False), wakes
        threading.Thread(target=self._keep_deadline, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._answered.set()
        signal.set_wakeup_fd(self._descriptor_before)
        os.close(self._wakes)  # which ends the thread
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def defer(self) -> None:
        """From now on a signal waits for the end of a batch."""
        self._deferred = True

    def answered(self) -> None:
        """To be called before a wish to stop is followed: writing a checkpoint may take its time."""
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
                _write_line(f"no batch ended within {self._grace_seconds:g} s: the checkpoint before has to do")
                os._exit(self._exit_code)
        os.close(self._woken)


def _write_line(line: str) -> None:
    """Writes to stderr; not by print, since what the signal interrupted may be a print."""
    os.write(2, f"{line}\n".encode())


class Agreement:
    """Tells every rank the largest wish of all ranks, at the same batch on each.

    On a CPU that is the wish of this batch. On GPUs it is that of the batch before: the answer is copied to the host
    while the next batch is queued, so that the host waits for what the GPU has left behind, and the GPU never waits.
    """

    def __init__(self) -> None:
        self._pending: tuple[torch.Tensor, torch.cuda.Event] | None = None

    def on(self, wish: int, device: torch.device) -> int:
        """GO_ON, SAVE or STOP. Every rank has to call this at the end of the same batches."""
        if not dist.is_initialized() or dist.get_world_size() == 1:
            return wish
        largest = torch.full((), wish, dtype=torch.int32, device=device)
        dist.all_reduce(largest, dist.ReduceOp.MAX)
        if not largest.is_cuda:
            return int(largest)
        before = self._pending
        answer = torch.empty((), dtype=torch.int32, pin_memory=True).copy_(largest, non_blocking=True)
        copied = torch.cuda.Event()
        copied.record()
        self._pending = (answer, copied)
        if before is None:
            return GO_ON
        before[1].synchronize()
        return int(before[0])

    def forget(self) -> None:
        """Drops wishes that a checkpoint has just fulfilled. Every rank has to call this after the same batch."""
        self._pending = None


def replace_lightnings_handling(trainer: pl.Trainer) -> None:
    """Keeps Lightning from handling signals in this trainer."""
    connector: Any = trainer._signal_connector
    loop: Any = trainer.fit_loop.epoch_loop
    for owner, method in ((connector, "register_signal_handlers"), (loop, "_broadcast_sigterm_tensor")):
        assert callable(getattr(owner, method)), f"Lightning has no {method} any more"
        setattr(owner, method, lambda: None)


def ignore_signals(worker: int) -> None:
    """For a DataLoader's `worker_init_fn`: Ctrl-C and job managers signal all processes, the run's own ends workers."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


@atexit.register
def _end_workers() -> None:
    """Python ends the workers that are left by SIGTERM, which they ignore, and then waits for them."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would call their end an error
    for process in multiprocessing.active_children():
        if process.daemon:
            process.kill()
