"""A rank that fails ends the others within half a minute, on whatever machine they are and whatever they wait for.

Collectives over gloo fail in the other ranks when one has gone. Those over NCCL do not: they wait until
`trainer.timeout_minutes` is over, and so does a signal's handler in Python. A rank that fails therefore says so in the
store at which the ranks met, and leaves without waiting for anything; in every other rank a thread reads this and ends
the process. Ranks that run no Python any more are killed by what started them.
Check: `pytest tests/test_rank_failures.py`.
"""

import atexit
import json
import multiprocessing
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import NoReturn

import torch.distributed as dist

from repghost.errors import StoppedTogether, printable

_SECONDS_BETWEEN_LOOKS = 1.0
SECONDS_UNTIL_SEEN = 2.0  # a failure, by all ranks; so long the store has to be there
SECONDS_TO_LEAVE = 8.0  # for a rank that failed too, or that gloo or a launcher is about to end
SECONDS_TO_STOP = 20.0  # for a rank that may still save
_UNTIL_ANSWERED = timedelta(days=1)  # a cut link may come back, and is noticed after trainer.timeout_minutes if not


def open_store(seconds: float) -> dist.TCPStore:
    """A connection of its own to the store at which the ranks met. Raises DistError where nobody answers."""
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return dist.TCPStore(host, port, timeout=timedelta(seconds=seconds), wait_for_workers=False)


def announce_failure(cause: str) -> None:
    """Tells the other ranks that this one fails, and why, in one line. Does nothing before the ranks have met."""
    if dist.is_initialized():
        with suppress(dist.DistError):  # who served the store has ended
            store = open_store(SECONDS_UNTIL_SEEN)
            store.set(_key(), json.dumps({"host": socket.gethostname(), "rank": dist.get_rank(), "cause": cause}))
            threading.Event().wait(SECONDS_UNTIL_SEEN)


@contextmanager
def ended_with_the_others() -> Iterator[threading.Event]:
    """From here on, this process ends some seconds after another rank has announced its failure; the event says so.

    Until the work within is done, it also ends when the store is gone, though not before it could save.
    """
    failed, done, over = threading.Event(), threading.Event(), threading.Event()
    thread = threading.Thread(target=_end_with_the_others, args=(failed, done, over), daemon=True)

    def leave() -> None:
        over.set()
        thread.join(SECONDS_TO_LEAVE)

    thread.start()
    atexit.register(leave)  # what is registered later, such as to leave the process group, comes before
    try:
        yield failed
    except BaseException as error:
        if not isinstance(error, StoppedTogether):
            leave()
        raise
    finally:
        done.set()


def _end_with_the_others(failed: threading.Event, done: threading.Event, over: threading.Event) -> None:
    while not dist.is_initialized():
        if over.wait(_SECONDS_BETWEEN_LOOKS):
            return
    try:
        store = open_store(SECONDS_TO_STOP)
        store.set_timeout(_UNTIL_ANSWERED)
        while not store.check([_key()]):
            if over.wait(_SECONDS_BETWEEN_LOOKS):
                return
        failure = json.loads(store.get(_key()))
    except dist.DistError:  # nobody is there any more
        _stop(done)
        return
    failed.set()
    if not over.wait(SECONDS_TO_LEAVE):
        # Once on every machine but that of the rank, which has said it itself.
        first = os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID")) == "0"
        if first and failure["host"] != socket.gethostname():
            line = f"error: rank {failure['rank']} on {failure['host']}: {failure['cause']}"
            os.write(2, f"{printable(line)}\n".encode())
        end_at_once(1)


def _stop(done: threading.Event) -> None:
    """Ends this process after the one that served the store: that of rank 0 under srun, else torchrun or our launcher.

    Rank 0 may have finished, and this rank is about to; the others of a launcher may still stop together.
    """
    if not done.wait(SECONDS_TO_LEAVE):
        os.kill(os.getpid(), signal.SIGTERM)
        if not done.wait(SECONDS_TO_STOP):
            end_at_once(1)


def _key() -> str:
    return f"failed/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"


def end_failed_rank(error: BaseException) -> None:
    """Ends this process with what Python says about `error` and its exit code, but at once, if it is one of many ranks.

    At exit Lightning leaves the process group, in which NCCL waits for all ranks. After a stop that they agreed on they
    come there together, and nothing is done here.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1 or isinstance(error, StoppedTogether):
        return
    if isinstance(error, SystemExit):
        end_at_once(error.code if isinstance(error.code, int) else bool(error.code))
    sys.excepthook(type(error), error, error.__traceback__)
    end_at_once(1)


def end_at_once(code: int) -> NoReturn:
    """Ends this process and those that it started, and runs nothing that is registered for its exit."""
    for process in multiprocessing.active_children():
        process.kill()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):  # nobody may be left to read it
            stream.flush()
    os._exit(code)
