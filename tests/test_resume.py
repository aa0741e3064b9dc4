"""Wherever a run is stopped, cut or killed, the same command comes to the same bits as a run that was not."""

import csv
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import train_in
from runs import PowerCut, StartTrain, images_trained_on, processes, stopped_at

from benchmarks.kill import differences
from repghost.evaluation import outcome
from repghost.evaluation.evaluate import Evaluation
from repghost.training import checkpoint
from repghost.training.checkpoint import Checkpoints
from repghost.training.classifier import ImageClassifier
from repghost.training.loggers import RunFiles

ROOT = Path(__file__).parents[1]
Program = Callable[..., int]


def let_the_first_epoch_be_best(patched: pytest.MonkeyPatch) -> None:
    """Gives the epochs made-up accuracies, on any machine: the first one is missed if it was not saved."""
    validated = ImageClassifier.on_validation_epoch_end

    def on_validation_epoch_end(self: ImageClassifier) -> None:
        validated(self)
        self.history[-1] |= dict.fromkeys(("val_top1", "ema_top1"), 50.0 - self.current_epoch)

    patched.setattr(ImageClassifier, "on_validation_epoch_end", on_validation_epoch_end)


@pytest.fixture(scope="module")
def whole(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patched:
        let_the_first_epoch_be_best(patched)
        train_in(folder, f"data.root={shards}", "name=whole")
    return folder / "outputs" / "whole"


@pytest.fixture
def train_again(train_tiny: Program, monkeypatch: pytest.MonkeyPatch) -> Program:
    """The same run in the folder of the test."""
    let_the_first_epoch_be_best(monkeypatch)
    return train_tiny


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


# In the order in which they come: 5 batches of training and 2 of validation in each of 2 epochs, then the evaluation.
STOPS = {
    "first batch": step(0, 0),
    "last batch but one": step(0, 3),
    "last batch": step(0, 4),
    "first batch of a validation": validation(0, 0),
    "last batch of a validation": validation(0, 1),
    "end of a validation": end_of("on_validation_epoch_end", 0),
    "within an epoch": step(1, 2),
    "last validation": validation(1, 0),
    "very end": end_of("on_validation_epoch_end", 1),
    "evaluation": (Evaluation, "validation_step", lambda self, _, b: b == 0),
}


SOME = ["last batch", "end of a validation", "within an epoch", "evaluation"]


@pytest.mark.parametrize("places", [SOME, pytest.param(list(STOPS), marks=pytest.mark.slow)], ids=["some", "all"])
def test_a_run_that_a_signal_stops_anywhere(
    places: list[str], whole: Path, train_again: Program, capfd: pytest.CaptureFixture[str]
) -> None:
    run = Path("outputs/stopped")
    for place in places:
        moment = STOPS[place]
        with pytest.MonkeyPatch.context() as patched:
            at(patched, *moment, interrupt)
            assert train_again("name=stopped") == 75, place
        captured = capfd.readouterr()
        assert "SIGUSR1" in captured.err and "the same command goes on" in captured.out, place
        assert (run / "checkpoints" / "last.ckpt").exists() and not (run / "evaluation.json").exists()
    assert train_again("name=stopped") == 0
    assert differences(whole, run) == []


def test_a_quantization_aware_run_goes_on_to_the_bit(whole: Path, train_again: Program) -> None:
    aware = ("recipe=qat", f"weights={whole}", "epochs=2")
    assert train_again("name=aware", *aware) == 0
    with pytest.MonkeyPatch.context() as patched:
        at(patched, *STOPS["within an epoch"], interrupt)
        assert train_again("name=stopped_aware", *aware) == 75
    assert train_again("name=stopped_aware", *aware) == 0
    assert differences(Path("outputs/aware"), Path("outputs/stopped_aware")) == []


CUTS = {
    "before any checkpoint": step(0, 1),
    "before the checkpoint of an epoch": (RunFiles, "on_train_epoch_end", lambda *_: True),
    "between the best epochs and the last": (checkpoint, "_copy", lambda _, path: path.name == "best_ema.ckpt"),
    "before metrics.csv is written": end_of("on_validation_epoch_end", 1),
    "after the very last": (Checkpoints, "_save", lambda _, trainer, *names: trainer.current_epoch == 1),
}


def test_a_run_that_is_cut_anywhere(whole: Path, train_again: Program) -> None:
    run = Path("outputs/cut")
    for moment in CUTS.values():
        with pytest.MonkeyPatch.context() as patched, pytest.raises(PowerCut):
            at(patched, *moment, cut)
            train_again("name=cut")
    leftovers = [run / ".curve.png.tmp", run / "checkpoints" / ".best_raw.ckpt.tmp"]
    for path in leftovers:
        path.write_bytes(b"half")

    append = outcome.append_result

    def cut_at_the_last(path: Any, name: str, data: str, evaluation: dict[str, Any], **options: Any) -> None:
        if evaluation["selection"] == "last":
            raise PowerCut
        append(path, name, data, evaluation, **options)

    with pytest.MonkeyPatch.context() as patched, pytest.raises(PowerCut):
        patched.setattr(outcome, "append_result", cut_at_the_last)
        train_again("name=cut")
    assert train_again("name=cut") == 0
    assert differences(whole, run) == []
    assert not any(path.exists() for path in leftovers)
    with open("results/results.csv", newline="") as file:
        assert [row["selection"] for row in csv.DictReader(file)] == ["best_ema", "last"], "no row twice"


# -- the same order in other parts -------------------------------------------------------------------------------------


def test_steps_in_other_parts_go_on_with_the_same_images(train_tiny: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = images_trained_on(monkeypatch)
    # In parts of 2 images the signal comes within a step of 8, and waits for its end.
    for parts, images, stops in ((4, 12, (0, 16)), (1, 60, (1, 24))):
        with pytest.MonkeyPatch.context() as patched:
            at(patched, ImageClassifier, "training_step", lambda self, *_, n=images: len(seen) >= n, interrupt)
            assert train_tiny("name=parts", f"accumulate={parts}") == 75
        assert stopped_at(Path("outputs/parts")) == stops
    assert train_tiny("name=parts", "accumulate=2") == 0
    assert seen == [(epoch, position) for epoch in range(2) for position in range(40)]


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


# -- a process ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def process(tmp_path: Path, shards: Path, all_blocks: None) -> Iterator[StartTrain]:
    with processes(tmp_path, shards) as start:
        yield start


@pytest.mark.slow
def test_a_run_that_was_killed(train_tiny: Program, process: StartTrain, tmp_path: Path) -> None:
    assert train_tiny("name=whole", "epochs=6") == 0
    last = tmp_path / "outputs" / "killed" / "checkpoints" / "last.ckpt"
    killed = process("name=killed", "epochs=6", "checkpoint.minutes=1e-6")
    killed.until(lambda: last.exists() and stopped_at(last.parents[1]) >= (0, 24))
    killed.signal(signal.SIGKILL)
    assert killed.ends() == -signal.SIGKILL
    resumed = process("name=killed", "epochs=6", "checkpoint.minutes=1e-6")
    assert resumed.ends() == 0 and "resumed" in resumed.said
    assert differences(tmp_path / "outputs" / "whole", tmp_path / "outputs" / "killed") == []
