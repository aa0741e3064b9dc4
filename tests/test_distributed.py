"""Two real gloo processes: every validation image once, one model on both ranks, the same figures from evaluate.py."""

import csv
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import TINY

from repghost.errors import UserError
from repghost.lost_ranks import lost_ranks
from repghost.ranks import choose_devices

Program = Callable[..., int]
ROOT = Path(__file__).parents[1]


def launch(folder: Path, program: str, *arguments: str, ranks: int = 2) -> None:
    """Runs a program under torchrun, checks that it ended well."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, str(ROOT / program), *arguments],
        cwd=folder, env=environment, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.usefixtures("forked_ranks")
def test_two_ranks_train_validate_and_evaluate(
    train_tiny: Program, evaluate_with: Program, capfd: pytest.CaptureFixture[str]
) -> None:
    # 15 validation images in batches of 4 on 2 ranks: the last batch is half empty on one and nearly on the other.
    assert train_tiny("trainer.devices=2", "data.eval_batch_size=4", "name=two") == 0
    assert capfd.readouterr().out.count("epoch   1/2") == 1, "one rank prints"
    run = Path("outputs/two")
    evaluation = json.loads((run / "evaluation.json").read_text())
    assert evaluation["images"] == 15
    with open(run / "metrics.csv", newline="") as file:
        metrics = list(csv.DictReader(file))
    assert evaluation["top1"] == float(metrics[-1]["ema_top1"])

    assert evaluate_with(f"run={run}", "trainer=cpu", "trainer.devices=2", "data.eval_batch_size=5") == 0
    again = json.loads((run / "evaluation.json").read_text())
    assert again["images"] == 15 and again["top1"] == evaluation["top1"]
    assert again["loss"] == pytest.approx(evaluation["loss"], rel=1e-4), "batches of another size round otherwise"

    checkpoint = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    assert checkpoint["train_sums"].shape == (2, 2), "a row for each rank"


@pytest.mark.parametrize(
    ("by", "variables", "way_out"),
    [
        (
            "srun",
            {
                "SLURM_JOB_ID": "1", "SLURM_STEP_ID": "0", "SLURM_NTASKS": "16", "SLURM_NTASKS_PER_NODE": "8",
                "SLURM_PROCID": "3", "SLURM_JOB_NAME": "train",
            },
            "give --gpus-per-node=8, and neither --gpus-per-task nor --gpu-bind",
        ),
        (
            "torchrun",
            {
                "TORCHELASTIC_RUN_ID": "1", "RANK": "3", "LOCAL_RANK": "3", "GROUP_RANK": "0", "WORLD_SIZE": "16",
                "LOCAL_WORLD_SIZE": "8", "MASTER_ADDR": "localhost", "MASTER_PORT": "1",
            },
            "leave CUDA_VISIBLE_DEVICES the same for all",
        ),
    ],
)  # fmt: skip
@pytest.mark.parametrize("devices", ["auto", 8, 1])
@pytest.mark.parametrize("accelerator", ["auto", "gpu"])
def test_ranks_that_see_one_gpu_each(
    by: str, variables: dict[str, str], way_out: str, devices: int | str, accelerator: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """As srun --gpus-per-task=1 has it. Lightning gives the third rank of a machine its third GPU."""
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UserError) as error:
        choose_devices(accelerator, devices, 2)
    assert str(error.value).startswith(f"{by} started 8 processes on this machine, and this one sees 1 GPU(s)")
    assert way_out in str(error.value)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    if devices != 1:
        assert choose_devices(accelerator, devices, 2) == ("gpu", 8)


WORK = "WorkNCCL(SeqNum=5, OpType=ALLREDUCE, NumelIn=1, NumelOut=1, Timeout(ms)=600000) ran for 600012 milliseconds"
REMOTE_ERROR = (
    "NCCL error in: /torch/csrc/distributed/c10d/NCCLUtils.hpp:268, remote process exited or there was a network error,"
    " NCCL version 2.30.7\nncclRemoteError: A call failed possibly due to a network error or a remote process exiting "
    "prematurely.\nLast error:\n"
)
NOT_LOST = (
    "shape '[2, 3]' is invalid for input of size 4",
    "CUDA error: out of memory",
    "NCCL error in: /torch/csrc/distributed/c10d/NCCLUtils.cpp:77, unhandled cuda error, NCCL version 2.30.7",
)


@pytest.mark.parametrize(
    ("message", "line"),
    [
        *(
            (f"[/gloo/transport/tcp/pair.cc:5{end}. This is typically", "a rank on 10.0.0.2 has ended; {}")
            for end in (
                "45] Read error [10.0.0.2]:13505: Connection reset by peer",
                "47] Connection closed by peer [10.0.0.2]:13505",
                "79] Write error [10.0.0.2]:13505: Broken pipe",
            )
        ),
        (
            f"{REMOTE_ERROR}socketProgress: Connection closed by remote peer n2<51234>",
            "a rank on n2 has ended; {}",
        ),
        (
            f"{REMOTE_ERROR}Unknown NCCL error!",
            "another rank has ended, or its network failed; {}",
        ),
        ("NCCL communicator was aborted on rank 1.", "another rank has ended, or its network failed; {}"),
        (
            "[3] is setting up NCCL communicator and retrieving ncclUniqueId from [0] via c10d key-value store by key "
            "'0', but store->get('0') got error: wait timeout after 600000ms, keys: /default_pg/0//cuda//0",
            "rank 0 does not answer within trainer.timeout_minutes",
        ),
    ],
)
def test_a_rank_that_ended(message: str, line: str) -> None:
    assert lost_ranks(RuntimeError(message)) == line.format("its own last line says why")


@pytest.mark.parametrize("message", NOT_LOST)
def test_errors_that_are_about_no_other_rank(message: str) -> None:
    assert lost_ranks(RuntimeError(message)) is None


TIMEOUTS = [
    "[/gloo/transport/tcp/unbound_buffer.cc:84] Timed out waiting 60000ms for recv operation to complete",
    f"[Rank 1] Watchdog caught collective operation timeout: {WORK} before timing out.",
    "NCCL communicator was aborted on rank 1. Original reason for failure was: [Rank 1] Watchdog caught collective "
    f"operation timeout: {WORK} before timing out.",
    "NCCL timeout in: /torch/csrc/distributed/c10d/NCCLUtils.cpp:58",
    "wait timeout after 600000ms, keys: /default_pg/0//cuda//0",
]


@pytest.mark.parametrize("message", TIMEOUTS)
def test_a_timeout_is_that_of_a_rank(message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("repghost.lost_ranks._silent_ranks", lambda: "rank 7 does not answer")
    assert lost_ranks(RuntimeError(message)) == "rank 7 does not answer within trainer.timeout_minutes"


def test_a_rank_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of three ranks one has written nothing into the store at which they met."""
    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    store.set("answers/0", "")
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("MASTER_PORT", str(store.port))
    monkeypatch.setattr("repghost.lost_ranks._SECONDS", 1.0)
    monkeypatch.setattr(dist, "get_rank", lambda: 1)
    monkeypatch.setattr(dist, "get_world_size", lambda: 3)
    assert lost_ranks(RuntimeError(TIMEOUTS[0])) == "rank 2 does not answer within trainer.timeout_minutes"
    del store
    assert lost_ranks(RuntimeError(TIMEOUTS[0])) == "rank 0 on localhost does not answer within trainer.timeout_minutes"


@pytest.mark.slow
def test_machines_that_share_no_folder(shards: Path, tmp_path: Path) -> None:
    """Each rank has an output folder of its own; again, too, and nothing is trained."""
    with socket.create_server(("localhost", 0)) as free:
        port = free.getsockname()[1]
    folders = [tmp_path / "a", tmp_path / "b"]

    def start(rank: int) -> subprocess.Popen[str]:
        folders[rank].mkdir(exist_ok=True)
        options = ["--nnodes=2", f"--node-rank={rank}", "--master-addr=localhost", f"--master-port={port}"]
        arguments = [*TINY, f"data.root={shards}", "trainer.num_nodes=2", "name=one"]
        return subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", *options, str(ROOT / "train.py"), *arguments],
            cwd=folders[rank], env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip

    for _ in range(2):
        for process in [start(0), start(1)]:
            said = process.communicate(timeout=600)[0]
            line = f"error: outputs/one: rank 1 on {socket.gethostname()} does not see what rank 0 on"
            assert process.returncode == 1 and said.count(line) == 1 and "epoch  " not in said, said
        assert not any(list(folder.iterdir()) for folder in folders), "a refused command leaves nothing behind"


@pytest.mark.slow
def test_more_ranks_than_images(shards: Path, tmp_path: Path) -> None:
    launch(
        tmp_path, "train.py", *TINY, f"data.root={shards}", "trainer.devices=2", "data.eval_batch_size=64", "name=few",
        "epochs=1",
    )  # fmt: skip
    assert json.loads((tmp_path / "outputs/few/evaluation.json").read_text())["images"] == 15
