"""Who starts the processes of a run, one a device: the run itself, torchrun or srun; and whether there are enough."""

import os
from typing import NamedTuple

from pytorch_lightning.plugins.environments import (
    ClusterEnvironment,
    LightningEnvironment,
    SLURMEnvironment,
    TorchElasticEnvironment,
)

from repghost.errors import UserError


class Started(NamedTuple):
    """Who started this process as one of several: `devices` of them on each of `nodes` machines."""

    by: str
    devices: int
    nodes: int


def started_outside() -> Started | None:
    """What torchrun or srun started; None where a run starts its own ranks.

    Shells and batch scripts of SLURM have its variables too: only what srun started is a step, and only several tasks
    are ranks. Raises UserError for srun without --ntasks-per-node, which Lightning needs.
    """
    if TorchElasticEnvironment.detect():
        devices = int(os.environ["LOCAL_WORLD_SIZE"])
        return Started("torchrun", devices, int(os.environ["WORLD_SIZE"]) // devices)
    if "SLURM_STEP_ID" in os.environ and SLURMEnvironment.detect() and (tasks := int(os.environ["SLURM_NTASKS"])) > 1:
        if "SLURM_NTASKS_PER_NODE" not in os.environ:
            raise UserError(f"srun started {tasks} tasks: give --ntasks-per-node instead of --ntasks")
        devices = int(os.environ["SLURM_NTASKS_PER_NODE"])
        return Started("srun", devices, tasks // devices)
    return None


def require_processes(started: Started | None, devices: int, num_nodes: int) -> None:
    """Raises UserError unless there is or will be a process for each device; a rank would wait for those missing."""
    if started and (started.devices, started.nodes) != (devices, num_nodes):
        raise UserError(
            f"{started.by} started {started.devices} process(es) on each of {started.nodes} machine(s), but "
            f"trainer.devices={devices} and trainer.num_nodes={num_nodes}: they must be the same"
        )
    if not started and num_nodes > 1 and "MASTER_ADDR" not in os.environ:
        raise UserError(
            f"trainer.num_nodes={num_nodes}: start the run with torchrun or srun on every machine, "
            "or set MASTER_ADDR, MASTER_PORT and NODE_RANK there"
        )


def environment(started: Started | None) -> ClusterEnvironment:
    """Lightning's side of it; its own guess would take any shell of SLURM for srun."""
    if started is None:
        return LightningEnvironment()
    return TorchElasticEnvironment() if started.by == "torchrun" else SLURMEnvironment(auto_requeue=False)
