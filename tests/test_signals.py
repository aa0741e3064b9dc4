"""Signals stop a run between two batches, on all ranks; ranks end together, and the cause is what is shown last."""

import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from runs import Process, StartTrain, images_trained_on, processes, stopped_at

from benchmarks.kill import differences
from data.index import load_index
from repghost.evaluation.evaluate import Evaluation
from repghost.model import repghostnet
from repghost.training.signals import SIGNALS, StopSignals
from repghost.weights import save_weights

Program = Callable[..., int]


# -- in one process ----------------------------------------------------------------------------------------------------


@pytest.fixture
def handlers(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """Those of the signals before a test, after which this process is not going to end as one that got a signal is."""
    before = [signal.getsignal(number) for number in SIGNALS]
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
    yield before
    signal.alarm(0)
    for number, handler in zip(SIGNALS, before, strict=True):
        signal.signal(number, handler)


def test_signals_are_remembered_once_they_are_deferred(handlers: list[Any]) -> None:
    with StopSignals(exit_code=75):
        pass
    assert handlers == [signal.getsignal(number) for number in SIGNALS]
    with StopSignals(exit_code=75) as signals:
        signals.deferred = True
        assert not signals.received
        for number in (*SIGNALS, *SIGNALS):
            os.kill(os.getpid(), number)
            assert signals.received
        with pytest.raises(SystemExit) as end:
            signals.stop()
    assert end.value.code == 75
    for number in SIGNALS:
        os.kill(os.getpid(), number)  # while the process ends


def test_the_line_about_a_signal(handlers: list[Any], capfd: pytest.CaptureFixture[str]) -> None:
    for quiet, deferred, line in (
        (False, True, "SIGTERM: stopping after this batch\n"),
        (False, False, "SIGTERM: stopped before the first batch\n"),
        (True, True, ""),
    ):
        with suppress(SystemExit), StopSignals(exit_code=75, quiet=quiet) as signals:
            signals.deferred = deferred
            os.kill(os.getpid(), signal.SIGTERM)
        assert capfd.readouterr().err == line


def test_before_that_a_signal_ends_the_process_at_once(handlers: list[Any]) -> None:
    with pytest.raises(SystemExit) as end, StopSignals(exit_code=3):
        os.kill(os.getpid(), signal.SIGTERM)
    assert end.value.code == 3


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_evaluation_ends_within_a_batch(
    number: signal.Signals, handlers: list[Any], evaluate_with: Program, shards: Path,
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Lightning would make a success of it, and wait for other ranks."""
    save_weights(repghostnet(width=0.1, num_classes=3), Path("weights.safetensors"))
    monkeypatch.setattr(Evaluation, "validation_step", lambda *_: os.kill(os.getpid(), number))
    options = ("width=0.1", "image_size=32", f"data.root={shards}", "trainer=cpu", "data.workers=1", "loader=torch")
    assert evaluate_with("weights=weights.safetensors", *options) == 128 + number
    out, err = capfd.readouterr()
    assert err == ("interrupted\n" if number == signal.SIGINT else "ended by SIGTERM\n")
    assert out.startswith("loader ") and out.count("\n") == 1
    assert not Path("results").exists()


@pytest.mark.parametrize("wrong", ["exit_code=0", "exit_code=256", "minutes=0"])
def test_values_that_make_no_sense(wrong: str, train_tiny: Program, capsys: pytest.CaptureFixture[str]) -> None:
    assert train_tiny(f"checkpoint.{wrong}") == 2
    assert f"checkpoint.{wrong}" in capsys.readouterr().err


def test_ctrl_c_reaches_every_process(process: StartTrain, tmp_path: Path) -> None:
    """With a DataLoader's worker, which gets the signal too and must go on until the run ends it."""
    running = process("epochs=1000", "data.workers=1", "loader=torch", "checkpoint.exit_code=77", "name=a")
    running.until(lambda: "epoch   2" in running.said)
    assert running.children(), "no worker"
    running.signal_all(signal.SIGINT)
    assert running.ends() == 77
    assert "Traceback" not in running.said and "KeyboardInterrupt" not in running.said
    assert stopped_at(tmp_path / "outputs" / "a")[0] >= 2


# -- on two ranks ------------------------------------------------------------------------------------------------------


@pytest.fixture
def process(tmp_path: Path, shards: Path, all_blocks: None) -> Iterator[StartTrain]:
    with processes(tmp_path, shards) as start:
        yield start


RANKS = ("trainer.devices=2", "epochs=4", "checkpoint.minutes=1e-6", "name=run")


def trained(running: Process, epoch: int) -> Process:
    """The process, once it has trained so many epochs."""
    running.until(lambda: f"epoch   {epoch}/4" in running.said)
    return running


@pytest.mark.slow
def test_two_ranks(process: StartTrain, tmp_path: Path, train_tiny: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    """One run that is stopped, loses rank 1, and is finished, beside one that is left alone."""
    run = tmp_path / "outputs" / "run"
    whole = process(*RANKS, "name=whole")
    assert whole.ends() == 0, whole.said

    running = trained(process(*RANKS), 1)
    running.signal(signal.SIGTERM)
    running.signal(signal.SIGINT)
    assert running.ends() == 75, running.said
    assert "SIG" in running.said and "Traceback" not in running.said
    epoch, images = stopped_at(run)
    shutil.copytree(run, tmp_path / "outputs" / "on_one_rank")

    running = trained(process(*RANKS), 2)
    os.kill(running.ranks()[1], signal.SIGKILL)
    assert running.ends() == 2
    assert running.said.splitlines()[-1].startswith("error: rank 1 was ended by SIGKILL")

    running = process(*RANKS)
    assert running.ends() == 0, running.said
    assert differences(tmp_path / "outputs" / "whole", run) == []

    seen = images_trained_on(monkeypatch)
    assert train_tiny(*RANKS[1:3], "name=on_one_rank") == 0
    assert seen == [(e, position) for e in range(4) for position in range(40)][epoch * 40 + images % 40 :]


@pytest.mark.slow
def test_the_process_that_started_the_ranks_is_killed(process: StartTrain, tmp_path: Path) -> None:
    running = trained(process(*RANKS), 1)
    running.signal(signal.SIGKILL)
    assert running.ends() == -signal.SIGKILL
    assert "Traceback" not in running.said
    assert stopped_at(tmp_path / "outputs" / "run")[0] >= 1


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_one_rank_is_signalled(process: StartTrain, rank: int) -> None:
    running = trained(process(*RANKS), 1)
    os.kill(running.ranks()[rank], signal.SIGUSR1)
    assert running.ends() == 75, running.said
    assert "Traceback" not in running.said and "error" not in running.said


def test_a_mistake_is_one_line(train_tiny: Program, capfd: pytest.CaptureFixture[str]) -> None:
    """It is found before the ranks are started, where it can be."""
    assert train_tiny("trainer.devices=3") == 2
    out, err = capfd.readouterr()
    assert out == "" and len(err.splitlines()) == 1 and "batch_size=8 (global) does not divide by 3" in err


@pytest.mark.slow
def test_a_mistake_that_every_rank_finds_is_said_once(process: StartTrain) -> None:
    running = process("data.root=nowhere", "trainer.devices=2")
    assert running.ends() == 2
    assert running.said.count("error: ") == 1 and "nowhere" in running.said.splitlines()[-1]


def damaged_for_rank_1(shards: Path, tmp_path: Path) -> tuple[list[str], str]:
    """The keys of a run in whose validation rank 1 finds a damaged image, and the name of that."""
    shutil.copytree(shards, tmp_path / "damaged")
    index = load_index(tmp_path / "damaged", "val", tmp_path / "cache")
    sample = index.samples[5]  # in batches of 4, rank 1 has 4 to 7
    path = tmp_path / "damaged" / Path(index.shards[sample["shard"]]).name
    data = bytearray(path.read_bytes())
    data[int(sample["offset"]) + int(sample["size"]) // 2] ^= 1
    path.write_bytes(data)
    return [f"data.root={tmp_path / 'damaged'}", "trainer.devices=2", "data.eval_batch_size=4"], index.name(5)


@pytest.mark.usefixtures("forked_ranks")
def test_the_cause_is_shown_last(
    shards: Path, tmp_path: Path, train_tiny: Program, capfd: pytest.CaptureFixture[str]
) -> None:
    """Rank 0 only finds that it is alone."""
    keys, name = damaged_for_rank_1(shards, tmp_path)
    assert train_tiny(*keys) == 2
    last = capfd.readouterr().err.splitlines()[-1]
    assert last.startswith("error: ") and name in last


@pytest.mark.slow
def test_the_cause_is_shown_last_by_new_processes(process: StartTrain, shards: Path, tmp_path: Path) -> None:
    keys, name = damaged_for_rank_1(shards, tmp_path)
    running = process(*keys)
    assert running.ends() == 2
    last = running.said.splitlines()[-1]
    assert last.startswith("error: ") and name in last, running.said
