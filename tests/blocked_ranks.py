"""A program of two ranks like train.py: rank $FAILING fails, while the other waits for it in something without an end.

$BLOCKED says in what: `python`, where signals are remembered but change nothing, as in a training; `library`, where
Python cannot run at all; `exit`, after its work, as NCCL does in destroy_process_group. What Lightning registers for
NCCL at exit has no end in the rank that fails, either. $FAILURE says how: `mistake`, `defect` or `killed`. $HOST,
where there is one, is the machine's name.
"""

import atexit
import ctypes
import os
import signal
import socket
import sys
import threading
from pathlib import Path

import torch.distributed as dist
from omegaconf import DictConfig

sys.path.insert(0, str(Path(__file__).parents[1]))

from repghost.errors import UserError
from repghost.launch import command
from repghost.processes import run_on_devices
from repghost.training.signals import StopSignals

LONG = 100_000


@command("train")
def main(config: DictConfig) -> int:
    return run_on_devices(work, config)


def work(config: DictConfig) -> None:
    rank = int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", "")))
    if host := os.environ.get("HOST"):
        socket.gethostname = lambda: host
    dist.init_process_group("gloo", rank=rank, world_size=2)
    atexit.register(threading.Event().wait, LONG)
    with StopSignals(config.checkpoint.exit_code, quiet=True) as signals:
        signals.deferred = True
        dist.barrier()
        print(f"rank {rank} is process {os.getpid()}", flush=True)
        if rank == int(os.environ["FAILING"]):
            fail(os.environ["FAILURE"])
        if os.environ["BLOCKED"] == "python":
            threading.Event().wait(LONG)
        if os.environ["BLOCKED"] == "library":
            ctypes.PyDLL(None).sleep(LONG)


def fail(how: str) -> None:
    if how == "mistake":
        raise UserError("photo.jpg is damaged")
    if how == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("a defect")


if __name__ == "__main__":
    main()
