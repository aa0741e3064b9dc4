"""Many independent tasks on all processor cores; the first failure stops all.

Python's own process pool with what a long run needs: a stop that reaches the tasks that are under way, one clear error
when a process is killed, and no process that outlives its parent. Check: `pytest tests/test_parallel.py`.
"""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.synchronize import Event
from typing import TypeVar

from repghost.errors import UserError

T = TypeVar("T")
R = TypeVar("R")

_stop: Event | None = None  # set in a worker process by its initializer


class Stopped(Exception):
    """The run is ending, so the result of this task is no longer wanted."""


def check_stop() -> None:
    """Raises Stopped once the run is ending. Tasks call it between two pieces of work."""
    if _stop is not None and _stop.is_set():
        raise Stopped


def run_parallel(function: Callable[[T], R], tasks: Iterable[T], workers: int) -> Generator[tuple[int, R], None, None]:
    """Yields (number of the task, its result) for every task, in the order in which they end.

    One worker means this process. `function` must be a module-level function: processes are spawned, not forked,
    because the libraries that it uses run threads. The first exception of a task ends the run and is raised here.
    Close the generator (contextlib.closing) to end the run early.
    """
    if workers <= 1:
        yield from ((number, function(task)) for number, task in enumerate(tasks))
        return
    context = multiprocessing.get_context("spawn")
    stop = context.Event()
    with ProcessPoolExecutor(workers, context, initializer=_start_worker, initargs=(stop,)) as pool:
        try:
            # Workers begin with Ctrl-C blocked: Python would print a traceback while it imports what they need.
            before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
            try:
                numbers = {pool.submit(function, task): number for number, task in enumerate(tasks)}
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, before)
            for future in as_completed(numbers):
                yield numbers[future], future.result()
        except BrokenProcessPool:
            raise UserError("a worker process was killed, most often for want of memory: use fewer workers") from None
        finally:
            stop.set()
            pool.shutdown(cancel_futures=True)


def _start_worker(stop: Event) -> None:
    global _stop
    _stop = stop
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process; the parent decides
    threading.Thread(target=end_with_parent, daemon=True).start()


def end_with_parent() -> None:
    """Ends this process when its parent is gone; without it a worker would wait for its next task for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None, "runs in a worker"
    parent.join()
    os._exit(1)
