"""Wherever a run is stopped, cut or killed, the same command comes to the same bits as a run that was not."""

import csv
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY

import train
from benchmarks.kill import differences
from repghost import run as run_module
from repghost.checkpoint import Checkpoints
from repghost.classifier import ImageClassifier
from repghost.evaluation import Evaluation
from repghost.progress import RunFiles

ROOT = Path(__file__).parents[1]
# The first epoch is the best one: a copy of it that was not made would be missed.
FIRST_IS_BEST = ["seed=3", "recipe.learning_rate=1.0", "recipe.ema_span=0.1"]
Program = Callable[..., int]


class PowerCut(BaseException):
    """Nothing may catch it, as nothing can catch SIGKILL."""


@pytest.fixture(scope="module")
def whole(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(folder)
        patched.setattr(sys, "argv", ["train.py", *TINY, *FIRST_IS_BEST, f"data.root={shards}", "name=whole"])
        train.main()
    run = folder / "outputs" / "whole"
    with open(run / "metrics.csv", newline="") as file:
        first, second = csv.DictReader(file)
    assert all(float(first[column]) > float(second[column]) for column in ("val_top1", "ema_top1"))
    return run


@pytest.fixture
def train_again(train_tiny: Program) -> Program:
    """The same run in the folder of the test."""
    return lambda *arguments: train_tiny(*FIRST_IS_BEST, *arguments)


def at(
    patched: pytest.MonkeyPatch, owner: type, method: str, when: Callable[..., bool], event: Callable[[], None]
) -> None:
    """Lets `event` happen at the end of the call of `owner.method` for which `when(self, *arguments)`."""
    original = getattr(owner, method)

    def wrapped(self: Any, *arguments: Any, **keywords: Any) -> Any:
        result = original(self, *arguments, **keywords)
        if when(self, *arguments, **keywords):
            event()
        return result

    patched.setattr(owner, method, wrapped)


def interrupt() -> None:
    os.kill(os.getpid(), signal.SIGUSR1)


def cut() -> None:
    raise PowerCut


def step(epoch: int, batch: int) -> tuple[type, str, Callable[..., bool]]:
    return ImageClassifier, "optimizer_step", lambda self, e, b, *_: (e, b) == (epoch, batch)


def validation(epoch: int, batch: int) -> tuple[type, str, Callable[..., bool]]:
    return ImageClassifier, "validation_step", lambda self, _, b: (self.current_epoch, b) == (epoch, batch)


def end_of(method: str, epoch: int) -> tuple[type, str, Callable[..., bool]]:
    return ImageClassifier, method, lambda self: self.current_epoch == epoch


# 5 batches of training and 2 of validation in each of 2 epochs.
PLACES = {
    "first batch": step(0, 0),
    "within an epoch": step(1, 2),
    "last batch but one": step(0, 3),
    "last batch": step(0, 4),
    "first batch of a validation": validation(1, 0),
    "last batch of a validation": validation(0, 1),
    "end of a validation": end_of("on_validation_epoch_end", 0),
    "very end": end_of("on_validation_epoch_end", 1),
    "evaluation": (Evaluation, "validation_step", lambda self, _, b: b == 0),
}


@pytest.mark.parametrize("place", PLACES)
def test_a_run_that_a_signal_stopped(
    place: str, whole: Path, train_again: Program, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.MonkeyPatch.context() as patched:
        at(patched, *PLACES[place], interrupt)
        assert train_again("name=stopped") == 75
    run = Path("outputs/stopped")
    captured = capfd.readouterr()
    assert "SIGUSR1" in captured.err and "the same command goes on" in captured.out
    assert (run / "checkpoints" / "last.ckpt").exists() and not (run / "evaluation.json").exists()
    assert train_again("name=stopped") == 0
    assert differences(whole, run) == []


CUTS = {
    "before any checkpoint": step(0, 1),
    "before metrics.csv is written": end_of("on_validation_epoch_end", 1),
    "before the checkpoint of an epoch": (RunFiles, "on_train_epoch_end", lambda self, trainer, _: True),
    "before the best epochs are copied": (Checkpoints, "_save", lambda self, trainer: trainer.current_epoch == 0),
    "before the very last is copied": (Checkpoints, "_save", lambda self, trainer: trainer.current_epoch == 1),
}


@pytest.mark.parametrize("place", CUTS)
def test_a_run_that_was_cut(place: str, whole: Path, train_again: Program) -> None:
    with pytest.MonkeyPatch.context() as patched, pytest.raises(PowerCut):
        at(patched, *CUTS[place], cut)
        train_again("name=cut")
    run = Path("outputs/cut")
    (run / "checkpoints").mkdir(exist_ok=True)
    leftovers = [run / ".curve.png.tmp", run / "checkpoints" / ".best_raw.ckpt.tmp"]
    for path in leftovers:
        path.write_bytes(b"half")
    assert train_again("name=cut") == 0
    assert differences(whole, run) == []
    assert not any(path.exists() for path in leftovers)


def test_an_evaluation_that_was_cut_adds_no_row_twice(
    whole: Path, train_again: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    append = run_module.append_result

    def cut_at_the_last(path: Any, name: str, data: str, evaluation: dict[str, Any], **options: Any) -> None:
        if evaluation["selection"] == "last":
            raise PowerCut
        append(path, name, data, evaluation, **options)

    with monkeypatch.context() as patched, pytest.raises(PowerCut):
        patched.setattr(run_module, "append_result", cut_at_the_last)
        train_again("name=cut")
    assert train_again("name=cut") == 0
    assert differences(whole, Path("outputs/cut")) == []
    with open("results/results.csv", newline="") as file:
        assert [row["selection"] for row in csv.DictReader(file)] == ["best_ema", "last"]


# -- the same order in other parts -------------------------------------------------------------------------------------


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """(epoch, position) of every image that this process trains on, in order."""
    found: list[tuple[int, int]] = []
    original = ImageClassifier.training_step

    def spy(self: ImageClassifier, batch: Any, batch_idx: int) -> Any:
        found.extend((self.current_epoch, position) for position in batch[2].tolist())
        return original(self, batch, batch_idx)

    monkeypatch.setattr(ImageClassifier, "training_step", spy)
    return found


def stopped_at(run: Path) -> tuple[int, int]:
    """(epoch, images of it) that the checkpoint of a run stands at."""
    checkpoint = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    return checkpoint["epoch"], int(checkpoint["train_sums"][:, 1].sum())


EVERYTHING = [(epoch, position) for epoch in range(2) for position in range(40)]


def test_steps_in_other_parts_go_on_with_the_same_images(train_tiny: Program, seen: list[tuple[int, int]]) -> None:
    for name, parts in (("more", (1, 2)), ("fewer", (4, 1))):
        seen.clear()
        with pytest.MonkeyPatch.context() as patched:
            # accumulate=4 does not divide what the 2 of `within an epoch` is: a signal waits for the end of a step
            at(patched, ImageClassifier, "training_step", lambda self, *_: len(seen) >= 60, interrupt)
            assert train_tiny(f"name={name}", f"accumulate={parts[0]}", "recipe.augment.erase=null") == 75
        assert stopped_at(Path(f"outputs/{name}")) == (1, 24)
        assert train_tiny(f"name={name}", f"accumulate={parts[1]}", "recipe.augment.erase=null") == 0
        assert seen == EVERYTHING


def test_another_recipe_is_refused(train_tiny: Program, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.MonkeyPatch.context() as patched:
        at(patched, *step(0, 0), interrupt)
        assert train_tiny("name=a") == 75
    capsys.readouterr()
    for wrong in ("batch_size=16", "recipe.momentum=0.8", "seed=1", "recipe.augment.flip=0.4"):
        assert train_tiny("name=a", wrong) == 2
        line = capsys.readouterr().err.strip()
        key, _, value = wrong.partition("=")
        assert f"begun with {key}=" in line and f"this command says {value}" in line, line
        assert len(line.splitlines()) == 1


# -- processes ---------------------------------------------------------------------------------------------------------


class Process:
    """train.py as a user starts it, in a session of its own."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        self.log = folder / "log"
        with open(self.log, "w") as log:
            self._process = subprocess.Popen(
                [sys.executable, str(ROOT / "train.py"), *TINY, *arguments],
                cwd=folder, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip

    @property
    def said(self) -> str:
        return self.log.read_text()

    def until(self, condition: Callable[[], bool]) -> None:
        """Waits."""
        while not condition():
            assert self._process.poll() is None, self.said
            time.sleep(0.01)

    def signal(self, number: int) -> None:
        self._process.send_signal(number)

    def signal_all(self, number: int) -> None:
        """As Ctrl-C does: to the program and everything that it started."""
        os.killpg(self._process.pid, number)

    def children(self) -> list[int]:
        """Processes that it started and that are left."""
        path = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children")
        return [int(pid) for pid in path.read_text().split()]

    def ends(self, within: float = 60) -> int:
        """The exit code, once every process of the session has ended."""
        code = self._process.wait(within)
        until = time.monotonic() + within
        while _session_lives(self._process.pid):
            assert time.monotonic() < until, f"a process is left:\n{self.said}"
            time.sleep(0.05)
        return code


def _session_lives(leader: int) -> bool:
    try:
        os.killpg(leader, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.fixture
def process(tmp_path: Path, shards: Path) -> Iterator[Callable[..., Process]]:
    """Starts train.py; what is left of it at the end of the test is killed."""
    started: list[Process] = []

    def start(*arguments: str) -> Process:
        started.append(Process(tmp_path, f"data.root={shards}", *arguments))
        return started[-1]

    yield start
    for each in started:
        if _session_lives(each._process.pid):
            each.signal_all(signal.SIGKILL)


Start = Callable[..., Process]


def test_a_run_that_was_killed(whole: Path, process: Start, tmp_path: Path) -> None:
    last = tmp_path / "outputs" / "killed" / "checkpoints" / "last.ckpt"
    killed = process(*FIRST_IS_BEST, "name=killed", "checkpoint.minutes=1e-6")
    killed.until(lambda: last.exists() and stopped_at(last.parents[1]) >= (0, 24))
    killed.signal(signal.SIGKILL)
    assert killed.ends() == -signal.SIGKILL
    resumed = process(*FIRST_IS_BEST, "name=killed", "checkpoint.minutes=1e-6")
    assert resumed.ends() == 0 and "resumed" in resumed.said
    assert differences(whole, tmp_path / "outputs" / "killed") == []
