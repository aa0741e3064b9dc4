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
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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

from repghost.errors import UserError, user_message
from repghost.lost_ranks import lost_ranks
from repghost.training.signals import end_workers

PASSED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)

Function = Callable[[DictConfig], None]

# When a rank fails, the others lose their connections to it. The launcher ends them before they report that.
_SECONDS_UNTIL_ENDED = 3.0


class Launcher(NamedTuple):
    """What started this process as one of several: `devices` of them on each of `nodes` machines."""

    name: str
    devices: int
    nodes: int


def external_launcher() -> Launcher | None:
    """The torchrun or srun that started this process as a rank; None where a run starts its own ranks.

    Shells and batch scripts of SLURM have its variables too: only what srun started is a step, and only several tasks
    are ranks. Raises UserError for srun without --ntasks-per-node, which Lightning needs.
    """
    if TorchElasticEnvironment.detect():
        devices = int(os.environ["LOCAL_WORLD_SIZE"])
        return Launcher("torchrun", devices, int(os.environ["WORLD_SIZE"]) // devices)
    if "SLURM_STEP_ID" in os.environ and SLURMEnvironment.detect() and (tasks := int(os.environ["SLURM_NTASKS"])) > 1:
        if "SLURM_NTASKS_PER_NODE" not in os.environ:
            raise UserError(f"srun started {tasks} tasks: give --ntasks-per-node instead of --ntasks")
        devices = int(os.environ["SLURM_NTASKS_PER_NODE"])
        return Launcher("srun", devices, tasks // devices)
    return None


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
    trainer = config.trainer
    _, devices = choose_devices(trainer.accelerator, trainer.devices, trainer.num_nodes)
    ranks, accumulate = devices * trainer.num_nodes, trainer.get("accumulate", 1)
    if trainer.get("batch_size") and (accumulate < 1 or trainer.batch_size % (ranks * accumulate)):
        raise UserError(
            f"batch_size={trainer.batch_size} (global) does not divide by {ranks} device(s) x accumulate={accumulate}"
        )
    if ranks > 1 and not external_launcher():
        return _start_ranks(function, config, devices)
    (record(_run_rank) if ranks > 1 else _run_rank)(function, config)  # record: for torchrun's summary
    return 0


def _start_ranks(function: Function, config: DictConfig, devices: int) -> int:
    """Starts the ranks under torch's elastic launcher; returns the run's exit code."""
    stopped = OmegaConf.select(config, "checkpoint.exit_code")

    def send(number: int) -> None:
        ranks = multiprocessing.active_children()
        for rank in ranks:
            os.kill(rank.pid or 0, number)
        if not ranks:
            sys.exit(stopped or 128 + number)

    # More threads than cores wait for each other.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // devices)))
    os.environ.setdefault("PYTHONWARNINGS", "ignore:resource_tracker")  # its last word on a rank that was killed
    logging.disable()  # what the elastic launcher says about a failure
    with TemporaryDirectory(prefix="ranks_") as folder, signals_passed_on(send) as received:
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
    if received or failure.exitcode == stopped:
        return stopped or 128 + received[0]
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
        _run_rank(function, config)
    except SystemExit as end:
        code = int(end.code or 0)
    finally:
        end_workers()
    parent = multiprocessing.parent_process()
    if (code and not dist.is_initialized()) or parent is None or not parent.is_alive():
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
