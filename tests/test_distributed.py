"""Two real gloo processes: every validation image once, one model on both ranks, the same figures from evaluate.py."""

import csv
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import TINY

from repghost.lost_ranks import lost_ranks

ROOT = Path(__file__).parents[1]


def launch(folder: Path, program: str, *arguments: str, ranks: int = 2) -> str:
    """Runs a program under torchrun, checks that it ended well, returns what it printed."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, str(ROOT / program), *arguments],
        cwd=folder, env=environment, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_two_ranks_train_validate_and_evaluate(shards: Path, tmp_path: Path) -> None:
    # 15 validation images in batches of 4 on 2 ranks: the last batch is half empty on one and nearly on the other.
    printed = launch(
        tmp_path, "train.py", *TINY, f"data.root={shards}", "trainer.devices=2", "data.eval_batch_size=4", "name=two"
    )
    assert printed.count("epoch   1/2") == 1, "one rank prints"
    run = tmp_path / "outputs" / "two"
    evaluation = json.loads((run / "evaluation.json").read_text())
    assert evaluation["images"] == 15
    with open(run / "metrics.csv", newline="") as file:
        metrics = list(csv.DictReader(file))
    assert evaluation["top1"] == float(metrics[-1]["ema_top1"])

    launch(tmp_path, "evaluate.py", f"run={run}", "trainer=cpu", "trainer.devices=2", "data.eval_batch_size=5")
    again = json.loads((run / "evaluation.json").read_text())
    assert again["images"] == 15 and again["top1"] == evaluation["top1"]
    assert again["loss"] == pytest.approx(evaluation["loss"], rel=1e-4), "batches of another size round otherwise"

    checkpoint = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    assert checkpoint["train_sums"].shape == (2, 2), "a row for each rank"


@pytest.mark.parametrize(
    "message",
    [
        "[/gloo/transport/tcp/pair.cc:545] Read error [10.0.0.2]:13505: Connection reset by peer. This is typically",
        "[/gloo/transport/tcp/pair.cc:547] Connection closed by peer [10.0.0.2]:13505. This is typically",
        "[/gloo/transport/tcp/pair.cc:379] Write error [10.0.0.2]:13505: Broken pipe",
    ],
)
def test_a_rank_that_ended(message: str) -> None:
    assert lost_ranks(RuntimeError(message)) == "a rank on 10.0.0.2 has ended; its own last line says why"
    assert lost_ranks(RuntimeError("shape '[2, 3]' is invalid for input of size 4")) is None


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
