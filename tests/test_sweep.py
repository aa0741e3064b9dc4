"""Sweeps as real processes: jobs that fail, are finished, are stopped; loggers that fail; mistakes of launching."""

import csv
import json
import os
import pty
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY
from filelock import FileLock
from pytorch_lightning.plugins.environments import SLURMEnvironment
from pytorch_lightning.utilities.rank_zero import rank_zero_only
from test_distributed import ROOT

from repghost.errors import UserError
from repghost.ranks import choose_devices, environment, external_launcher, global_rank, require_meeting_point
from repghost.training.loggers import GuardedLogger, RunWandbLogger
from repghost.training.trainer import keep_compiled, make_trainer

Program = Callable[..., int]

# What launchers of ranks set, this process's own tests included.
RANKS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID")


def inherited(**variables: str) -> dict[str, str]:
    found = {k: v for k, v in os.environ.items() if k not in RANKS and not k.startswith(("SLURM_", "WANDB_"))}
    return {**found, "OMP_NUM_THREADS": "1", **variables}


def command(shards: Path, *arguments: str) -> list[str]:
    return [sys.executable, str(ROOT / "train.py"), *TINY, f"data.root={shards}", *arguments]


def sweep(folder: Path, shards: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs train.py -m in `folder`."""
    return subprocess.run(
        [*command(shards, *arguments), "-m"],
        cwd=folder, env=inherited(), capture_output=True, text=True, timeout=600,
    )  # fmt: skip


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


@pytest.mark.slow
def test_a_sweep_of_two_ranks_with_a_job_that_fails(shards: Path, tmp_path: Path) -> None:
    # A job starts its own ranks, and the first one fails; its name has the values as they were given.
    arguments = ("trainer.devices=2", "epochs=1", "recipe.learning_rate=2e-1", "logger=wandb", "logger.offline=true")
    first = sweep(tmp_path, shards, *arguments, "batch_size=64,8")
    assert first.returncode == 1, first.stdout + first.stderr
    printed = first.stdout
    assert (
        printed.index("[1/2] batch_size=64\n") < printed.index("[2/2] batch_size=8\n") < printed.index("on 2 device(s)")
    )
    assert first.stderr.count("error: batch_size=64 is larger than the 45 training images") == 1
    assert printed.endswith("\n1 failed:\n[1/2] batch_size=64: exit code 2\n")
    runs = sorted(path for path in (tmp_path / "outputs").iterdir() if path.name != ".sweep")
    assert [path.name.split("-")[4] for path in runs] == ["batch_size_64", "batch_size_8"]
    assert runs[1].name.endswith("-recipe.learning_rate_2e_1-recipe.warmup_epochs_1")
    assert json.loads((runs[1] / "evaluation.json").read_text())["images"] == 15
    assert not (runs[0] / "checkpoints").exists()
    (log,) = runs[1].glob("wandb/offline-run-*/*.wandb")
    assert b"sweep-batch_size" in log.read_bytes(), "the group"
    assert f"| {runs[1].name} | 0.1 | ema, last | 15 |" in printed and f"| {runs[0].name} |" not in printed
    assert files(tmp_path / "outputs" / ".sweep") == {"multirun.yaml"}
    assert {path.name for path in tmp_path.iterdir()} == {"outputs", "results"}

    # Again: what is finished is passed over.
    evaluation = (runs[1] / "evaluation.json").stat()
    again = sweep(tmp_path, shards, *arguments, "batch_size=8")
    assert again.returncode == 0 and f"{runs[1].name} is finished" in again.stdout
    assert "epoch " not in again.stdout and f"| {runs[1].name} | 0.1 | ema, last | 15 |" in again.stdout
    assert (runs[1] / "evaluation.json").stat().st_mtime_ns == evaluation.st_mtime_ns


@pytest.mark.slow
def test_a_signal_stops_the_sweep_and_its_job(shards: Path, tmp_path: Path) -> None:
    arguments = ("epochs=1000", "seed=0,1", "-m")
    with subprocess.Popen(
        command(shards, *arguments), cwd=tmp_path, env=inherited(), stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("epoch "):
                process.send_signal(signal.SIGTERM)
                break
        rest = process.stdout.read()
        assert process.wait(600) == 75
    assert "interrupted in [1/2] seed=0: the same command goes on from there" in rest and "seed=1" not in rest
    (run,) = (path for path in (tmp_path / "outputs").iterdir() if path.name != ".sweep")
    assert (run / "checkpoints" / "last.ckpt").exists() and not (run / "evaluation.json").exists()


def test_mistakes_end_before_the_first_job(
    shards: Path, train_tiny: Program, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable in RANKS:
        monkeypatch.delenv(variable, raising=False)

    def error(*arguments: str) -> str:
        assert train_tiny(*arguments, "-m") == 2
        out, err = capfd.readouterr()
        assert out == "" and err.startswith("error: ") and len(err.splitlines()) == 1, out + err
        return err

    assert "wdith" in error("wdith=0.1,0.2")
    assert "width=0: give a number above 0" in error("width=0.1,0")
    assert "recipe=best: give one of coco_1x, distill, finetune, paper, qat, quick" in error("recipe=quick,best")
    assert "outputs/same" in error("width=0.1,0.2", "name=same")
    assert "'name=NAME-${trainer.devices}'" in error("trainer.devices=1,2")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    assert "mix their gradients" in error("width=0.1,0.2")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert "under torchrun" in error("width=0.1,0.2")
    assert not [path for path in Path("outputs").iterdir() if path.name != ".sweep"]


def trainer_of(**options: Any) -> Any:
    defaults: dict[str, Any] = {
        "accelerator": "cpu", "devices": "auto", "num_nodes": 1, "precision": "float32", "epochs": 1, "batch_size": 8,
        "accumulate": 1, "deterministic": False, "threads": None, "timeout_minutes": 1, "directory": Path("outputs"),
    }  # fmt: skip
    return make_trainer(**{**defaults, **options})


TORCHRUN = {
    "TORCHELASTIC_RUN_ID": "1", "RANK": "0", "LOCAL_RANK": "0", "GROUP_RANK": "0", "WORLD_SIZE": "4",
    "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1",
}  # fmt: skip
SRUN = {
    "SLURM_JOB_ID": "1", "SLURM_JOB_NAME": "train", "SLURM_STEP_ID": "0", "SLURM_NTASKS": "4", "SLURM_PROCID": "0",
    "SLURM_NTASKS_PER_NODE": "2", "SLURM_LOCALID": "0", "SLURM_NODEID": "0", "SLURM_NODELIST": "localhost",
}  # fmt: skip


@contextmanager
def variables(**values: str) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patched:
        for name in [*RANKS, *(name for name in os.environ if name.startswith("SLURM_"))]:
            patched.delenv(name, raising=False)
        for name, value in values.items():
            patched.setenv(name, value)
        yield


@pytest.mark.parametrize(("by", "values"), [("torchrun", TORCHRUN), ("srun", SRUN)])
def test_as_many_processes_as_devices(by: str, values: dict[str, str]) -> None:
    with variables(**values):
        assert trainer_of(num_nodes=2).world_size == 4, "devices=auto: what was started"
        assert trainer_of(num_nodes=2, devices=2).world_size == 4
        for wrong in ({}, {"devices": 2}, {"devices": 4}, {"devices": 1, "num_nodes": 2}, {"devices": 1}):
            with pytest.raises(UserError, match=f"{by} started 2 process.es. on each of 2 machine"):
                trainer_of(**wrong)


def test_ranks_wait_for_each_other_as_long_as_said() -> None:
    with variables(**TORCHRUN):
        for minutes in (1, 7):
            assert trainer_of(num_nodes=2, timeout_minutes=minutes).strategy._timeout == timedelta(minutes=minutes)


def test_slurm_without_srun_starts_its_own_ranks() -> None:
    # The variables of a batch script for 4 tasks, and of a step of one task that uses two devices.
    batch = {name: value for name, value in SRUN.items() if name != "SLURM_STEP_ID"}
    for values in (batch, {**SRUN, "SLURM_NTASKS": "1", "SLURM_NTASKS_PER_NODE": "1"}):
        with variables(**values):
            assert external_launcher() is None
            assert choose_devices("cpu", 2, 1) == ("cpu", 2)
            assert not isinstance(environment(), SLURMEnvironment)
    tasks = {name: value for name, value in SRUN.items() if name != "SLURM_NTASKS_PER_NODE"}
    with variables(**tasks), pytest.raises(UserError, match="--ntasks-per-node"):
        trainer_of()
    with variables(), pytest.raises(UserError, match=r"trainer.num_nodes=2: .* on every machine"):
        trainer_of(num_nodes=2)


def test_an_interactive_shell_of_slurm_starts_its_own_ranks() -> None:
    for values in ({"SLURM_STEP_NUM_TASKS": "1"}, {"SLURM_PTY_PORT": "40000"}):
        with variables(**SRUN, **values):
            assert external_launcher() is None


def test_variables_that_were_left_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rank_zero_only, "rank", 1)  # as Lightning reads RANK=1
    with variables(RANK="1", LOCAL_RANK="1", WORLD_SIZE="1", MASTER_PORT="1"):
        assert global_rank() == 0 and rank_zero_only.rank == 0
        assert choose_devices("cpu", 2, 1) == ("cpu", 2)
        assert "RANK" not in os.environ and "WORLD_SIZE" not in os.environ
    with variables(RANK="1", WORLD_SIZE="2"), pytest.raises(UserError, match="RANK=1, WORLD_SIZE=2 in the environment"):
        global_rank()
    partly = {name: value for name, value in TORCHRUN.items() if name != "MASTER_ADDR"}
    with variables(**partly), pytest.raises(UserError, match="MASTER_ADDR is not"):
        trainer_of()
    for values, rank in (({**TORCHRUN, "RANK": "3"}, 3), ({**SRUN, "SLURM_PROCID": "2"}, 2)):
        with variables(**values):
            assert global_rank() == rank


def test_ranks_that_could_not_meet() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        taken = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(server.getsockname()[1])}
        with (
            variables(**SRUN, **taken),
            pytest.raises(UserError, match=f"MASTER_PORT={taken['MASTER_PORT']}: .* in use"),
        ):
            require_meeting_point()
        with variables(**TORCHRUN | taken):
            require_meeting_point()
    with variables(**TORCHRUN | taken), pytest.raises(UserError, match="Connection refused"):
        require_meeting_point()
    for values in (TORCHRUN, {**SRUN, "SLURM_PROCID": "1"}):
        with (
            variables(**values | {"MASTER_ADDR": "no.such.invalid"}),
            pytest.raises(UserError, match=r"no\.such\.invalid"),
        ):
            require_meeting_point()


def test_threads_hold_on_every_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    before = torch.get_num_threads()
    try:
        with variables(**TORCHRUN):
            monkeypatch.setenv("OMP_NUM_THREADS", "")  # so that it is as before after the test
            monkeypatch.delenv("OMP_NUM_THREADS")
            trainer = trainer_of(num_nodes=2, threads=3)
            assert trainer.strategy.launcher.launch(torch.get_num_threads, trainer=trainer) == 3
    finally:
        torch.set_num_threads(before)


def test_damaged_compiled_files_are_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    whole = Path(torch._C.__file__).read_bytes()
    contents = {
        "whole.so": whole,
        "cut.so": whole[: len(whole) // 2],
        "begun.so": whole[:30],
        "empty.so": b"",
        "whole.so.load_ok": b"",
        "a.py": b"1",
    }
    (tmp_path / "ab").mkdir()
    (tmp_path / "locks").mkdir()
    for name, content in contents.items():
        (tmp_path / "ab" / name).write_bytes(content)
    with FileLock(tmp_path / "locks" / "key.lock"):
        keep_compiled(tmp_path)
    assert {path.name for path in (tmp_path / "ab").iterdir()} == contents.keys(), "another process is compiling"
    keep_compiled(tmp_path)
    assert {path.name for path in (tmp_path / "ab").iterdir()} == {"whole.so", "whole.so.load_ok", "a.py"}


@pytest.mark.usefixtures("fresh_wandb")
def test_a_resumed_run_goes_on_in_wandb(train_tiny: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    from repghost.training.classifier import ImageClassifier

    monkeypatch.setenv("WANDB_SILENT", "true")
    options = ("name=a", "logger=wandb", "logger.offline=true")
    step = ImageClassifier.optimizer_step

    def cut(self: ImageClassifier, epoch: int, *arguments: Any) -> None:
        step(self, epoch, *arguments)
        if epoch == 1:
            raise InterruptedError

    with monkeypatch.context() as patched, pytest.raises(InterruptedError):
        patched.setattr(ImageClassifier, "optimizer_step", cut)
        train_tiny(*options)
    identity = Path("outputs/a/wandb_id.txt").read_text().strip()
    time.sleep(1)  # wandb's own folders are named by the second
    assert train_tiny(*options) == 0
    assert Path("outputs/a/wandb_id.txt").read_text().strip() == identity
    written = list(Path("outputs/a/wandb").glob("offline-run-*/*.wandb"))
    assert [path.name for path in written] == [f"run-{identity}.wandb"] * 2


@pytest.mark.usefixtures("fresh_wandb")
def test_wandb_asks_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A training must not wait at a terminal until somebody says who logs in."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    terminal, screen = pty.openpty()
    with os.fdopen(screen, "r") as stdin, os.fdopen(os.dup(screen), "w") as stderr:
        monkeypatch.setattr(sys, "stdin", stdin)
        monkeypatch.setattr(sys, "stderr", stderr)
        logger = GuardedLogger(RunWandbLogger(str(tmp_path), finish_seconds=1, settings={}))
        logger.log_metrics({"loss": 1.0})
        assert sys.stdin is stdin
    os.close(terminal)
    line = capsys.readouterr().out
    assert line.startswith("RunWandbLogger failed and is left out from here on") and "wandb login" in line


@pytest.mark.slow
def test_a_server_that_is_not_there_stops_nothing(shards: Path, tmp_path: Path) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
    done = subprocess.run(
        command(shards, "name=a", "epochs=1", "logger=wandb", "logger.settings.init_timeout=1"),
        cwd=tmp_path, capture_output=True, text=True, timeout=600,
        env=inherited(WANDB_BASE_URL=f"http://127.0.0.1:{port}", WANDB_API_KEY="0" * 40),
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    failures = [line for line in done.stdout.splitlines() if "left out from here on" in line]
    assert len(failures) == 1 and failures[0].startswith("RunWandbLogger failed")
    with open(tmp_path / "outputs/a/metrics.csv", newline="") as file:
        assert len(list(csv.DictReader(file))) == 1
    assert (tmp_path / "outputs/a/evaluation.json").exists()
