"""The ranks of a run end together, and the cause of the first failure is what the screen shows last.

A rank that fails writes its cause into the process group's store before its connections close; the others, whose
collectives fail because of that, repeat the cause instead of their own errors. Where Lightning starts the ranks of a
machine (`trainer.devices=2` without torchrun), rank 0 watches its children, which may die without a word, and they
watch rank 0. torchrun does the same itself, and its closing summary shows the cause. Under SLURM it is
`srun --kill-on-bad-exit=1` that ends the other tasks. Check: `pytest tests/test_signals.py`.
"""

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from subprocess import Popen, TimeoutExpired
from typing import Any

import pytorch_lightning as pl
import torch.distributed as dist
from pytorch_lightning.plugins.environments import LightningEnvironment
from pytorch_lightning.strategies.launchers import subprocess_script
from torch.distributed.elastic.multiprocessing.errors import get_error_handler

from repghost.errors import UserError, fail, user_message

_KEY = "first failure"
_POLL_SECONDS = 0.5
_PATIENCE_SECONDS = 5.0  # for a process that is about to end by itself
_PARENT_IS_GONE = "rank 0, which started this process, is gone; out of memory is the usual cause"


@contextmanager
def ranks_end_together(trainer: pl.Trainer) -> Iterator[None]:
    """Runs a block that trains or evaluates with `trainer`; every rank enters it, or is started in it."""
    strategy: Any = trainer.strategy
    if trainer.world_size == 1:
        yield
        return
    environment = strategy.cluster_environment
    children = parent = None
    if not environment.creates_processes_externally:
        children = _Children(strategy.launcher)
    elif isinstance(environment, LightningEnvironment):
        parent = os.getppid()
    over = threading.Event()
    if children is not None:
        threading.Thread(target=children.watch, args=[over], daemon=True).start()
    elif parent is not None:
        threading.Thread(target=_watch_parent, args=[parent, over], daemon=True).start()
    try:
        yield
    except SystemExit:  # agreed on by all ranks, who end by themselves
        over.set()
        if parent is not None:
            raise SystemExit(0) from None  # rank 0's code is the one that counts
        if children is not None:
            children.end(_PATIENCE_SECONDS)
        raise
    except Exception as error:
        over.set()
        if parent is not None and _comes_true(lambda: os.getppid() != parent):
            raise UserError(_PARENT_IS_GONE) from None
        is_first, cause = _first_failure(trainer.global_rank, error)
        killed = children.killed() if children is not None and is_first and user_message(error) is None else None
        if children is not None:
            children.end(0)
        if killed is not None:
            raise UserError(killed) from None
        if is_first:
            get_error_handler().record_exception(error)
            raise
        raise cause from None
    finally:
        over.set()


class _Children:
    """The processes that Lightning's launcher starts for ranks 1 to n - 1 of this machine."""

    def __init__(self, launcher: Any) -> None:
        self._launcher = launcher
        # Lightning's own observer kills everything without saying why, and after an agreed end too.
        assert callable(subprocess_script._launch_process_observer)
        setattr(subprocess_script, "_launch_process_observer", lambda processes: None)  # noqa: B010

    @property
    def _processes(self) -> list[Popen]:
        return self._launcher.procs  # a new list once they are started

    def watch(self, over: threading.Event) -> None:
        """Ends this process when a child has failed and the main thread, in some collective, does not notice."""
        while not over.wait(_POLL_SECONDS):
            failed = [process for process in self._processes if process.poll()]
            if failed and not over.wait(_PATIENCE_SECONDS):
                fail(self.killed() or f"{_name(self._processes, failed[0])} failed; its own message is above")
                self.end(0)
                os._exit(1)

    def killed(self) -> str | None:
        """A line on the child that a signal ended, None when there is none."""
        _comes_true(lambda: any((process.poll() or 0) < 0 for process in self._processes))
        for process in self._processes:
            if process.returncode is not None and process.returncode < 0:
                name = signal.Signals(-process.returncode).name
                hint = "; out of memory is the usual cause" if name == "SIGKILL" else ""
                return f"{_name(self._processes, process)} was ended by {name}{hint}"
        return None

    def end(self, patience: float) -> None:
        """Kills the children that have not ended after `patience` seconds."""
        until = time.monotonic() + patience
        for process in self._processes:
            try:
                process.wait(max(0.0, until - time.monotonic()))
            except TimeoutExpired:
                process.kill()


def _name(processes: list[Popen], process: Popen) -> str:
    return f"rank {processes.index(process) + 1} of this machine"


def _comes_true(condition: Callable[[], bool]) -> bool:
    """Whether `condition` is true soon; the connections of a process that dies close before its parent is told."""
    until = time.monotonic() + 1
    while not condition():
        if time.monotonic() > until:
            return False
        time.sleep(0.05)
    return True


def _watch_parent(parent: int, over: threading.Event) -> None:
    while not over.wait(_POLL_SECONDS):
        if os.getppid() != parent and not over.wait(_PATIENCE_SECONDS):
            fail(_PARENT_IS_GONE)
            os._exit(1)


def _first_failure(rank: int, error: Exception) -> tuple[bool, Exception]:
    """Whether this rank failed first, and the error that says what the first one's cause is."""
    line = user_message(error)
    mine = json.dumps([rank, line is not None, line or f"{type(error).__name__}: {error}"])
    try:
        store: Any = dist.distributed_c10d._get_default_store()
        first = json.loads(store.compare_set(_KEY, "", mine))
    except (RuntimeError, ValueError):  # no process group yet, or the rank that keeps the store is gone
        return True, error
    who, of_the_user, what = first
    kind = UserError if of_the_user else RuntimeError
    return who == rank, kind(f"rank {who} failed first: {what}")
