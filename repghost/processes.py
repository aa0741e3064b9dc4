"""The processes of a run: what each of several ranks does, and how they are started where no launcher has done it.

Without a launcher of the user's own, `trainer.devices=2` starts two ranks under torch's elastic launcher, which ends
all of them when one fails. This process then passes signals on to them, and what it says at the end, last on the
screen, is the cause of the first failure. Ranks whose starting process is gone stop as after a signal.
Check: `pytest tests/test_signals.py tests/test_distributed.py tests/test_rank_failures.py`.
"""

import logging
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partialmethod
from multiprocessing import resource_tracker
from tempfile import TemporaryDirectory
from types import FrameType
from unittest import mock

import torch.distributed as dist
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning.utilities.rank_zero import rank_zero_only
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, record
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from torch.multiprocessing import ProcessContext

from repghost.errors import StoppedTogether, UserError, ended_by_signals, first_sentence, user_message
from repghost.lost_ranks import lost_ranks
from repghost.machine import available_cpus
from repghost.rank_failures import announce_failure, end_at_once, ended_with_the_others
from repghost.ranks import choose_devices, external_launcher, global_rank, require_meeting_point
from repghost.training.signals import end_workers

PASSED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
_ENDED_BY_SIGNALS = (128 + signal.SIGINT, 128 + signal.SIGTERM)  # exit codes of a program that has nothing to save

_USUAL_CAUSES: dict[int, str] = {
    signal.SIGKILL: "; out of memory is the usual cause",
    signal.SIGABRT: "; NCCL does this when another rank does not answer for trainer.timeout_minutes, and says so above",
}

Function = Callable[[DictConfig], None]

# When a rank fails, the others may lose their connections to it. They are ended before they report that.
_SECONDS_UNTIL_ENDED = 3.0

# After a failure the other ranks have so long to end by themselves, and as long again after SIGTERM. SIGKILL follows,
# since a rank that waits in a library runs no handler. torch's own choice is 30 s after SIGTERM.
_SECONDS_TO_LEAVE = 5.0


def run_on_devices(function: Function, config: DictConfig) -> int:
    """Calls `function(config)` in a process for each device of `config.trainer`; returns the exit code.

    `function` is one that a new process can import. The code is 0, 1 after a failure, or that of a stop by a signal:
    `checkpoint.exit_code` where the config has it. Raises UserError for the mistake that ended the first rank.
    """
    global_rank()
    trainer = config.trainer
    _, devices = choose_devices(trainer.accelerator, trainer.devices, trainer.num_nodes)
    ranks, accumulate = devices * trainer.num_nodes, trainer.get("accumulate", 1)
    if trainer.get("batch_size") and (
        trainer.batch_size % (ranks * accumulate) or trainer.batch_size < 2 * ranks * accumulate
    ):
        raise UserError(
            f"batch_size={trainer.batch_size} (global) does not divide by {ranks} device(s) x accumulate={accumulate}"
            " into batches of two images or more, which BatchNorm needs"
        )
    if ranks > 1 and not external_launcher():
        return _start_ranks(function, config, devices)
    if ranks == 1:
        function(config)
    else:
        require_meeting_point()
        record(_run_rank)(function, config)  # record: for torchrun's summary
    return 0


def _start_ranks(function: Function, config: DictConfig, devices: int) -> int:
    """Starts the ranks under torch's elastic launcher; returns the run's exit code."""
    stopped = OmegaConf.select(config, "checkpoint.exit_code")

    def send(number: int) -> None:
        if len(received) == 1:
            os.write(2, f"{signal.Signals(number).name}: stopping\n".encode())
        ranks = multiprocessing.active_children()
        for rank in ranks:
            os.kill(rank.pid or 0, number)
        if not ranks:
            sys.exit(stopped or 128 + number)

    # More threads than cores wait for each other.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, available_cpus() // devices)))
    os.environ.setdefault("PYTHONWARNINGS", "ignore:resource_tracker")  # its last word on a rank that was killed
    logging.disable()  # what the elastic launcher says about a failure
    with TemporaryDirectory(prefix="ranks_") as folder, signals_passed_on(send) as received, _blocked_in_ranks():
        logs = DefaultLogsSpecs(folder)
        launch = LaunchConfig(min_nodes=1, max_nodes=1, nproc_per_node=devices, max_restarts=0, logs_specs=logs)
        launch.rdzv_backend, launch.rdzv_endpoint = "c10d", "localhost:0"
        launch.signals_to_handle = ""  # `send` does, however many come
        bounded = partialmethod(ProcessContext.join, grace_period=_SECONDS_TO_LEAVE)
        try:
            with mock.patch.object(ProcessContext, "join", bounded):
                return max(elastic_launch(launch, _rank)(function, config).values())
        except ChildFailedError as error:
            rank, failure = error.get_first_failure()
        finally:
            logging.disable(logging.NOTSET)
    recorded = failure.error_file_data["message"]  # a dict, or a word that there is none
    message = recorded["message"] if isinstance(recorded, dict) else ""
    if message.startswith("UserError: "):
        raise UserError(message.removeprefix("UserError: "))
    if received or failure.exitcode in (stopped, *_ENDED_BY_SIGNALS):
        return stopped or (128 + received[0] if received else failure.exitcode)
    if failure.exitcode < 0:
        hint = _USUAL_CAUSES.get(-failure.exitcode, "")
        raise UserError(f"rank {rank} was ended by {failure.signal_name()}{hint}")
    if not message:
        raise UserError(f"rank {rank} ended with exit code {failure.exitcode}; its own message is above")
    print(recorded["extraInfo"]["py_callstack"], end="", file=sys.stderr, flush=True)
    return 1


def _rank(function: Function, config: DictConfig) -> int:
    """What a process of _start_ranks does; returns the exit code, once the ranks agree on it."""
    rank_zero_only.rank = int(os.environ["RANK"])  # type: ignore[attr-defined]  # RANK is newer than Lightning's import
    code = 0
    try:
        with ended_by_signals(quiet=True):
            signal.pthread_sigmask(signal.SIG_UNBLOCK, PASSED_ON)
            record(_run_rank)(function, config)  # record: leaves the error to the launcher
    except StoppedTogether as end:
        code = int(end.code or 0)
    except BaseException as error:
        end_at_once(int(error.code or 1) if isinstance(error, SystemExit) else 1)
    end_workers()
    parent = multiprocessing.parent_process()
    if parent is None or not parent.is_alive():
        sys.exit(code or 1)  # to return is to wait for all ranks and for the launcher
    return code


def _run_rank(function: Function, config: DictConfig) -> None:
    """Calls `function(config)`. Raises the cause of a failure at once and its consequences in other ranks later."""
    with ended_with_the_others() as another_failed:
        try:
            function(config)
        except Exception as error:
            line = user_message(error)
            if line is None and isinstance(error, RuntimeError) and dist.is_initialized():
                line = lost_ranks(error)
                if another_failed.wait(_SECONDS_UNTIL_ENDED):
                    threading.Event().wait()  # until this process is ended
            announce_failure(line or f"{type(error).__name__}: {first_sentence(error)}")
            if line:
                raise UserError(line) from None  # its cause would be lost on the way to a launcher
            raise
        except SystemExit as end:
            if not isinstance(end, StoppedTogether):
                announce_failure("ended by a signal")
            raise


@contextmanager
def _blocked_in_ranks() -> Iterator[None]:
    """Processes that are started in this context begin with the signals blocked: see _rank.

    Python would print a traceback for one that comes while it imports what a rank needs.
    """
    resource_tracker.ensure_running()  # which unblocks signals when it starts
    over = threading.Event()
    threading.Thread(target=over.wait, daemon=True).start()  # takes the signals of this process
    before = signal.pthread_sigmask(signal.SIG_BLOCK, PASSED_ON)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        over.set()


@contextmanager
def signals_passed_on(send: Callable[[int], None]) -> Iterator[list[int]]:
    """Calls `send` with every signal that would end this process, instead; yields the list of those received."""
    received: list[int] = []

    def handle(number: int, frame: FrameType | None) -> None:
        received.append(number)
        send(number)

    # Those that are ignored stay so, as nohup wants.
    heeded = [number for number in PASSED_ON if signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, handle) for number in heeded}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
