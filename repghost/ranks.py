"""Which ranks a run has: one for each device, started by torchrun, by srun, or by `repghost.processes`.

Check: `pytest tests/test_sweep.py tests/test_distributed.py`.
"""

import os
import socket
from typing import NamedTuple

import torch
from pytorch_lightning.plugins.environments import (
    ClusterEnvironment,
    LightningEnvironment,
    SLURMEnvironment,
    TorchElasticEnvironment,
)
from pytorch_lightning.utilities.rank_zero import rank_zero_only

from repghost.errors import UserError


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

    Raises UserError for devices that this machine lacks or a rank does not see, and unless there is or will be a
    process for each device: a rank would wait for those that are missing.
    """
    gpus = torch.cuda.device_count()
    if accelerator == "auto":
        accelerator = "gpu" if gpus else "cpu"
    if accelerator == "gpu" and not gpus:
        raise UserError("trainer=gpu, but this machine shows no GPU to PyTorch (trainer=cpu runs without one)")
    launcher = external_launcher()
    if devices == "auto":
        devices = launcher.devices if launcher else gpus if accelerator == "gpu" else 1
    assert isinstance(devices, int)
    if accelerator == "gpu" and launcher and gpus < launcher.devices:
        raise UserError(_too_few_visible(launcher, gpus))
    if accelerator == "gpu" and devices > gpus:
        raise UserError(f"trainer.devices={devices}, but this machine has {gpus} GPU(s)")
    if launcher and launcher[1:] != (devices, num_nodes):
        started = "{} started {} process(es) on each of {} machine(s)".format(*launcher)
        raise UserError(f"{started}, not trainer.devices={devices} on each of trainer.num_nodes={num_nodes}")
    if not launcher and num_nodes > 1:
        raise UserError(f"trainer.num_nodes={num_nodes}: start the run with torchrun or srun on every machine")
    return accelerator, devices


def _too_few_visible(launcher: Launcher, gpus: int) -> str:
    """Rank i of a machine computes on the GPU i that it sees, and reaches the others directly."""
    way_out = (
        f"give --gpus-per-node={launcher.devices}, and neither --gpus-per-task nor --gpu-bind"
        if launcher.name == "srun"
        else "start as many as there are, leave CUDA_VISIBLE_DEVICES the same for all, and no --virtual-local-rank"
    )
    return (
        f"{launcher.name} started {launcher.devices} processes on this machine, and this one sees {gpus} GPU(s); each "
        f"has to see all {launcher.devices}: {way_out}"
    )
