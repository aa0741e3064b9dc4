"""A rank that fails ends the others, which wait for it in something without an end: as real processes, however started.

What the other rank waits in stands for a collective over NCCL; see tests/blocked_ranks.py.
"""

import inspect
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from conftest import TINY
from torch.distributed.elastic.multiprocessing.api import MultiprocessContext
from torch.multiprocessing import ProcessContext

from repghost import processes, rank_failures

ROOT = Path(__file__).parents[1]
PROGRAM = ROOT / "tests" / "blocked_ranks.py"
LIMIT = 600  # seconds until a test gives up; the program would wait for more than a day

Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts a command in a session of its own; what is left of it at the end is killed."""
    started: list[subprocess.Popen[str]] = []

    def start(*launcher: str, nodes: int = 1, **variables: str) -> subprocess.Popen[str]:
        devices = f"trainer.devices={2 // nodes}", f"trainer.num_nodes={nodes}"
        process = subprocess.Popen(
            [sys.executable, *launcher, str(PROGRAM), *TINY, "data=digits", "name=a", *devices], cwd=tmp_path,
            env={**os.environ, "OMP_NUM_THREADS": "1", "FAILURE": "mistake", **variables}, start_new_session=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        started.append(process)
        return process

    yield start
    for process in started:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def ends(process: subprocess.Popen[str]) -> tuple[int, str]:
    """The exit code and what was said, once no process holds the other end of the pipe."""
    said, _ = process.communicate(timeout=LIMIT)
    return process.returncode, said


def test_the_limits_are_half_a_minute() -> None:
    own = 2 * processes._SECONDS_TO_LEAVE
    heard = 2 * rank_failures.SECONDS_UNTIL_SEEN + rank_failures.SECONDS_TO_LEAVE
    assert own <= 30 and heard <= 30
    assert rank_failures.SECONDS_TO_LEAVE + rank_failures.SECONDS_TO_STOP <= 30
    # torch's launcher waits in the method whose limit is set there.
    assert "self._pc.join(-1)" in inspect.getsource(MultiprocessContext._poll)
    assert "grace_period" in inspect.signature(ProcessContext.join).parameters
    # A rank ends after the one that failed, which the launcher is to find first.
    assert rank_failures.SECONDS_UNTIL_SEEN < rank_failures.SECONDS_TO_LEAVE


# -- started by this project -------------------------------------------------------------------------------------------

LAST_LINES = {
    "mistake": (2, "error: photo.jpg is damaged"),
    "defect": (1, "AssertionError: a defect"),
    "killed": (2, "error: rank {} was ended by SIGKILL; out of memory is the usual cause"),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("blocked", "failure", "failing"),
    [("python", "mistake", 1), ("library", "killed", 1), ("library", "defect", 0), ("exit", "mistake", 0)],
)
def test_own_launcher(start: Start, blocked: str, failure: str, failing: int) -> None:
    code, said = ends(start(FAILING=str(failing), FAILURE=failure, BLOCKED=blocked))
    expected, line = LAST_LINES[failure]
    assert (code, said.splitlines()[-1]) == (expected, line.format(failing)), said


# -- started by others -------------------------------------------------------------------------------------------------


@pytest.fixture
def port() -> str:
    """One that is free."""
    with socket.create_server(("localhost", 0)) as free:
        return str(free.getsockname()[1])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("blocked", "failure", "failing"), [("python", "mistake", 0), ("exit", "mistake", 1), ("python", "killed", 0)]
)
def test_srun(start: Start, port: str, blocked: str, failure: str, failing: int) -> None:
    """Each task is a process that nobody looks after; rank 0 serves the store."""
    step = {
        "SLURM_JOB_ID": "1", "SLURM_STEP_ID": "0", "SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2",
        "SLURM_NODEID": "0", "SLURM_NODELIST": "localhost", "SLURM_JOB_NAME": "train",
        "MASTER_ADDR": "localhost", "MASTER_PORT": port,
        "FAILING": str(failing), "FAILURE": failure, "BLOCKED": blocked,
    }  # fmt: skip
    ended = [ends(task) for task in [start(**step, SLURM_PROCID=rank, SLURM_LOCALID=rank) for rank in ("0", "1")]]
    code, said = ended.pop(failing)
    if failure == "killed":
        assert code == -signal.SIGKILL, said
    else:
        assert code == 2 and said.endswith("\nerror: photo.jpg is damaged\n"), said
    [(code, said)] = ended
    assert code == 1 and "error" not in said and "Traceback" not in said, said


TORCHRUN = ("-m", "torch.distributed.run")


@pytest.mark.slow
@pytest.mark.parametrize("blocked", ["python", "library"])
def test_torchrun(start: Start, blocked: str) -> None:
    code, said = ends(start(*TORCHRUN, "--standalone", "--nproc-per-node=2", FAILING="1", BLOCKED=blocked))
    assert code == 1 and said.count("error: photo.jpg is damaged\n") == 1, said


@pytest.mark.slow
def test_torchrun_on_two_machines(start: Start, port: str) -> None:
    """The other machine's launcher hears of nothing; its rank says why it ends."""
    options = "--nnodes=2", "--nproc-per-node=1", "--master-addr=localhost", f"--master-port={port}"
    machines = [
        start(*TORCHRUN, *options, f"--node-rank={node}", nodes=2, FAILING="1", BLOCKED="python", HOST=f"n{node}")
        for node in range(2)
    ]
    for machine, line in zip(machines, ("rank 1 on n1: photo.jpg is damaged", "photo.jpg is damaged"), strict=True):
        code, said = ends(machine)
        assert code == 1 and f"error: {line}\n" in said, said
