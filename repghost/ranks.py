"""The processes of a run: one for each device, started by torchrun, by srun, or here.

Without a launcher of the user's own, `trainer.devices=2` starts two ranks under torch's elastic launcher, which ends
all of them when one fails. This process then passes signals on to them, and what it says at the end, last on the
screen, is the cause of the first failure. Ranks whose starting process is gone stop as after a signal.
Check: `pytest tests/test_signals.py tests/test_distributed.py`.
"""

import logging
import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker
from tempfile import TemporaryDirectory
from types import FrameType
from typing import NamedTuple

import torch
import torch.distributed as dist
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning.plugins.environments import (
    ClusterEnvironment,
    LightningEnvironment,
    SLURMEnvironment,
    TorchElasticEnvironment,
)
from pytorch_lightning.utilities.rank_zero import rank_zero_only
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, record
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from repghost.errors import UserError, ended_by_signals, user_message
from repghost.lost_ranks import lost_ranks
from repghost.machine import available_cpus
from repghost.training.signals import end_workers

PASSED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
_ENDED_BY_SIGNALS = (128 + signal.SIGINT, 128 + signal.SIGTERM)  # exit codes of a program that has nothing to save

Function = Callable[[DictConfig], None]

# When a rank fails, the others lose their connections to it. The launcher ends them before they report that.
_SECONDS_UNTIL_ENDED = 3.0


class Launcher(NamedTuple):
    """What started this process as one of several: `devices` of them on each of `nodes` machines."""

    name: str
    devices: int
    nodes: int


# torchrun's, with RANK; without its others they are of a scheduler, or left over.
_OF_TORCHRUN = ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "LOCAL_RANK", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")
_OF_A_RANK = ("RANK", "LOCAL_RANK", "GROUP_RANK", "NODE_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")


def external_launcher() -> Launcher | None:
    """The torchrun or srun that started this process as a rank; None where a run starts its own ranks.

    Shells and batch scripts of SLURM have its variables too: only what srun started is a step, only several tasks are
    ranks, and in the step of an interactive shell nobody starts the others. Raises UserError for variables of torchrun
    that are not complete, and for srun without --ntasks-per-node, which Lightning needs.
    """
    if TorchElasticEnvironment.detect():
        if missing := [name for name in ("RANK", *_OF_TORCHRUN) if name not in os.environ]:
            raise UserError(f"TORCHELASTIC_RUN_ID is set but {missing[0]} is not: unset it, or start ranks by torchrun")
        devices = int(os.environ["LOCAL_WORLD_SIZE"])
        return Launcher("torchrun", devices, int(os.environ["WORLD_SIZE"]) // devices)
    if "SLURM_STEP_ID" not in os.environ or "SLURM_PTY_PORT" in os.environ or not SLURMEnvironment.detect():
        return None
    # An interactive step has the number of tasks of its allocation in SLURM_NTASKS.
    if (tasks := int(os.environ.get("SLURM_STEP_NUM_TASKS", os.environ["SLURM_NTASKS"]))) > 1:
        if "SLURM_NTASKS_PER_NODE" not in os.environ:
            raise UserError(f"srun started {tasks} tasks: give --ntasks-per-node instead of --ntasks")
        devices = int(os.environ["SLURM_NTASKS_PER_NODE"])
        return Launcher("srun", devices, tasks // devices)
    return None


def global_rank() -> int:
    """The number of this process among the ranks that a launcher started, 0 without a launcher.

    What a scheduler or an earlier launcher left in the environment is dropped then, from Lightning too. Raises
    UserError where it speaks of other ranks: nobody would start them.
    """
    if launcher := external_launcher():
        return int(os.environ["RANK" if launcher.name == "torchrun" else "SLURM_PROCID"])
    if (size := os.environ.get("WORLD_SIZE", "1")) not in ("", "1"):
        found = ", ".join(f"{name}={os.environ[name]}" for name in _OF_A_RANK if name in os.environ)
        raise UserError(f"{found} in the environment, but no torchrun started these {size} ranks: unset them")
    for name in _OF_A_RANK:
        os.environ.pop(name, None)
    rank_zero_only.rank = 0  # type: ignore[attr-defined]  # Lightning read the variables when it was imported
    return 0


def require_meeting_point() -> None:
    """Raises UserError where the ranks of an external launcher could not find each other, which takes minutes."""
    address, port = environment().main_address, environment().main_port
    try:
        if isinstance(environment(), TorchElasticEnvironment):  # which has opened it before it starts a rank
            socket.create_connection((address, port), timeout=10).close()
        elif global_rank() == 0:
            with socket.socket() as server:
                server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                server.bind(("", port))
        else:
            socket.getaddrinfo(address, port)
    except OSError as error:
        raise UserError(
            f"MASTER_ADDR={address} MASTER_PORT={port}: the ranks cannot meet there: {error.strerror}"
        ) from None


def environment() -> ClusterEnvironment:
    """Lightning's view of the launcher; its own guess would take any shell of SLURM for srun."""
    if launcher := external_launcher():
        return TorchElasticEnvironment() if launcher.name == "torchrun" else SLURMEnvironment(auto_requeue=False)
    return LightningEnvironment()


def choose_devices(accelerator: str, devices: int | str, num_nodes: int) -> tuple[str, int]:
    """`cpu` or `gpu`, and the number of processes on this machine, for the values of conf/trainer.

    Raises UserError for devices that this machine lacks, and unless there is or will be a process for each device: a
    rank would wait for those that are missing.
    """
    if accelerator not in ("auto", "cpu", "gpu"):
        raise UserError(f"trainer.accelerator={accelerator} is not one of auto, cpu, gpu")
    gpus = torch.cuda.device_count()
    if accelerator == "auto":
        accelerator = "gpu" if gpus else "cpu"
    if accelerator == "gpu" and not gpus:
        raise UserError("trainer=gpu, but this machine shows no GPU to PyTorch (trainer=cpu runs without one)")
    launcher = external_launcher()
    if devices == "auto":
        devices = launcher.devices if launcher else gpus if accelerator == "gpu" else 1
    if not isinstance(devices, int) or devices < 1 or num_nodes < 1:
        raise UserError(f"trainer.devices={devices}, trainer.num_nodes={num_nodes}: both are counts from 1 on")
    if accelerator == "gpu" and devices > gpus:
        raise UserError(f"trainer.devices={devices}, but this machine has {gpus} GPU(s)")
    if launcher and launcher[1:] != (devices, num_nodes):
        started = "{} started {} process(es) on each of {} machine(s)".format(*launcher)
        raise UserError(f"{started}, not trainer.devices={devices} on each of trainer.num_nodes={num_nodes}")
    if not launcher and num_nodes > 1:
        raise UserError(f"trainer.num_nodes={num_nodes}: start the run with torchrun or srun on every machine")
    return accelerator, devices


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
    if ranks > 1:
        require_meeting_point()
    (record(_run_rank) if ranks > 1 else _run_rank)(function, config)  # record: for torchrun's summary
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
        try:
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
        hint = "; out of memory is the usual cause" if failure.exitcode == -signal.SIGKILL else ""
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
            _run_rank(function, config)
    except SystemExit as end:
        code = int(end.code or 0)
    finally:
        end_workers()
    parent = multiprocessing.parent_process()
    if code in _ENDED_BY_SIGNALS or (code and not dist.is_initialized()) or parent is None or not parent.is_alive():
        sys.exit(code or 1)  # to return is to wait for all ranks and for the launcher
    return code


def _run_rank(function: Function, config: DictConfig) -> None:
    """Calls `function(config)`. Raises the cause of a failure at once and its consequences in other ranks later."""
    try:
        function(config)
    except Exception as error:
        if line := user_message(error):
            raise UserError(line) from None  # its cause would be lost on the way to a launcher
        if isinstance(error, RuntimeError) and dist.is_initialized():
            lost = lost_ranks(error)
            time.sleep(_SECONDS_UNTIL_ENDED)
            if lost:
                raise UserError(lost) from None
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
