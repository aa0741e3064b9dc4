"""Logits that are stored once: the same training as with the teacher in every step, and nothing wrong unnoticed."""

import os
import re
import resource
import shutil
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TINY
from runs import PowerCut, cut_after
from safetensors.torch import load_file

from repghost import teach
from repghost.dataset import TeacherLogits
from repghost.distillation.store import LogitsStore, top_logits
from repghost.distillation.write import LogitsWriter
from repghost.errors import UserError, run_command

pytestmark = pytest.mark.usefixtures("few_blocks")

Program = Callable[..., int]
TEACHER = ("teacher=outputs/a", "recipe.augment.erase.probability=0.5")
TAUGHT = ("recipe.teacher_weight=0.5", "recipe.teacher_temperature=2", "recipe.augment.erase.probability=0.5")


def write(shards: Path, *arguments: str) -> int:
    """Calls python -m repghost.teach; outputs/a is the teacher."""
    return run_command(lambda: teach.main([*TINY, f"data.root={shards}", *TEACHER, *arguments]))


@pytest.fixture
def store(finished_run: Path, shards: Path) -> Program:
    """Calls python -m repghost.teach with a teacher that is there."""
    return partial(write, shards)


def relative(one: Path, other: Path) -> float:
    """The largest difference of the weights of two runs, relative to the largest weight of a tensor."""
    a, b = (load_file(folder / "model.safetensors") for folder in (one, other))
    return max(
        float((a[k] - b[k]).abs().max() / a[k].abs().max().clamp(min=1e-3)) for k in a if a[k].is_floating_point()
    )


def test_stored_logits_train_to_the_weights_of_the_teacher_in_the_step(store: Program, train_tiny: Program) -> None:
    mixed = ("recipe.mix.mixup=0.2", "recipe.mix.cutmix=1", "epochs=1")
    assert store(*mixed, "top=3", "dtype=float32", "kept") == 0
    assert train_tiny(*mixed, *TAUGHT, "teacher=outputs/a", "name=online") == 0
    assert train_tiny(*mixed, *TAUGHT, "recipe.teacher_logits=kept", "name=stored") == 0
    assert train_tiny(*mixed, "recipe.augment.erase.probability=0.5", "name=plain") == 0
    assert relative(Path("outputs/online"), Path("outputs/stored")) == 0
    assert relative(Path("outputs/online"), Path("outputs/plain")) > 1e-3


def test_float16_and_few_classes_change_the_loss_little(store: Program, train_tiny: Program) -> None:
    assert store("epochs=1", "top=3", "dtype=float16", "kept") == 0
    losses = []
    still = ("recipe.learning_rate=1e-12", "recipe.start_learning_rate=0", "recipe.final_learning_rate=0")
    for source in ("teacher=outputs/a", "recipe.teacher_logits=kept"):
        assert train_tiny("epochs=1", *TAUGHT, *still, source, f"name={len(losses)}") == 0
        table = Path(f"outputs/{len(losses)}/metrics.csv").read_text().splitlines()
        losses.append(float(dict(zip(table[0].split(","), table[1].split(","), strict=True))["train_loss"]))
    assert abs(losses[0] - losses[1]) < 1e-3


def files(folder: str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path(folder).glob("*.*")}


def test_any_number_of_devices_writes_the_same(train_tiny: Program, shards: Path, forked_ranks: None) -> None:
    assert train_tiny("name=a", "epochs=1") == 0
    assert write(shards, "top=3", "one") == 0
    assert write(shards, "top=3", "trainer.devices=2", "trainer.threads=1", "two") == 0
    one, two = (LogitsStore.open(folder) for folder in ("one", "two"))
    assert one.seen == two.seen and one.written == two.written == 2
    for epoch in range(2):
        a, b = (each.read(epoch, torch.arange(40)) for each in (one, two))
        assert torch.allclose(a.values.float(), b.values.float(), atol=2e-3) and (a.classes == b.classes).all()


def test_a_store_that_was_stopped_or_cut_goes_on_to_the_same_bits(store: Program, capfd: Any) -> None:
    often = ("top=2", "checkpoint.minutes=1e-9")
    assert store(*often, "whole") == 0
    said = capfd.readouterr().out
    assert "2 epochs of 40 images, 2 classes of each in float16" in said
    held = LogitsStore.open("whole").read(1, torch.arange(40)).values.float().exp().sum(1).mean()
    assert f"epoch 2/2  2 classes hold {held:.1%} of the probability" in said
    for place in ((0, 2), (1, 1), (1, 3)):
        with pytest.MonkeyPatch.context() as patched, pytest.raises(PowerCut):
            cut_after(patched, *place, LogitsWriter)
            store(*often, "cut")
    with pytest.MonkeyPatch.context() as patched:
        step = LogitsWriter.training_step
        patched.setattr(LogitsWriter, "training_step", lambda *a: (os.kill(os.getpid(), signal.SIGTERM), step(*a))[1])
        with pytest.raises(SystemExit) as end:
            store(*often, "cut")
    assert end.value.code == 75
    with pytest.raises(UserError, match="1 epochs so far, of 2"):
        LogitsStore.open("cut").require(LogitsStore.open("cut").seen, 2, 40)
    assert store(*often, "cut") == 0 and files("cut") == files("whole")
    capfd.readouterr()
    assert store(*often, "cut") == 0 and "cut is complete" in capfd.readouterr().out


def test_another_store_is_not_mixed_in(store: Program, capfd: Any) -> None:
    assert store("top=2", "epochs=1", "kept") == 0
    for arguments, message in (
        (("top=3", "epochs=1"), "was begun with top=2"),
        (("top=2", "epochs=1", "seed=1"), "seed=0, this command says 1"),
        (("top=2", "epochs=2"), "was begun with epochs=1"),
    ):
        capfd.readouterr()
        assert store(*arguments, "kept") == 2
        said = capfd.readouterr().err
        assert message in said and said.count("\n") == 1


DIFFERENT = {
    "seed=1": "seed=0, this command says 1",
    "recipe.scale=[0.5,1]": "recipe.scale=[0.7, 1.0], this command says [0.5, 1]",
    "recipe.augment.flip=0": "recipe.augment.flip=0.5",
    "image_size=64": "train_image_size=32, this command says 64",
    "train_image_size=64": "train_image_size=32, this command says 64",
    "recipe.mix.mixup=1": "recipe.mix.mixup=0.0",
    "epochs=3": "has logits of 2 epochs, this training reads 3: write more",
    "batch_size=9": "has logits of 40 images of an epoch, this training visits 45",
    "width=1.3": "recipe.augment.rand_augment",
    "data=digits": "data.root=",
}


def test_a_training_on_other_images_is_refused_with_the_key(store: Program, train_tiny: Program, capfd: Any) -> None:
    assert store("top=2", "kept") == 0
    for argument, message in DIFFERENT.items():
        capfd.readouterr()
        assert train_tiny(*TAUGHT, "recipe.teacher_logits=kept", "epochs=2", argument) == 2, argument
        said = capfd.readouterr().err
        assert "kept: " in said and message in said and said.count("\n") == 1, said
    assert train_tiny(*TAUGHT, "recipe.teacher_logits=kept", "epochs=2", "width=0.2", "recipe.learning_rate=0.1") == 0


def test_fewer_epochs_are_repeated_if_the_key_says_so(store: Program, train_tiny: Program, monkeypatch: Any) -> None:
    assert store("top=2", "epochs=1", "kept") == 0
    read, asked = LogitsStore.read, []

    def spy(self: LogitsStore, epoch: int, positions: torch.Tensor) -> TeacherLogits:
        asked.append(epoch)
        return read(self, epoch, positions)

    monkeypatch.setattr(LogitsStore, "read", spy)
    assert train_tiny(*TAUGHT, "recipe.teacher_logits=kept", "recipe.cycle_epochs=1", "epochs=2") == 0
    assert asked == [0] * 10


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGED = {
    "cut": (cut, r"epoch-0000.logits: has 479 bytes instead of 480"),
    "flipped": (flip, r"epoch-0000.logits: position 20 is damaged"),
    "gone": (Path.unlink, r"epoch-0000.logits: has 0 bytes"),
    "zeros": (lambda path: path.write_bytes(bytes(480)), r"position 0 is damaged or was never written"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_store(case: str, store: Program, train_tiny: Program, capfd: Any) -> None:
    harm, message = DAMAGED[case]
    assert store("top=2", "epochs=1", "kept") == 0
    harm(Path("kept/epoch-0000.logits"))
    capfd.readouterr()
    assert train_tiny(*TAUGHT, "recipe.teacher_logits=kept", "epochs=1") == 2
    said = capfd.readouterr().err
    assert re.search(message, said) and said.count("\n") == 1


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": 1, "more": 2}', '{"format": 2}'])
def test_a_description_that_is_none(text: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no logits are stored there"):
        LogitsStore.open(tmp_path)
    (tmp_path / "store.json").write_text(text)
    with pytest.raises(UserError, match=r"store.json: .*write the logits again"):
        LogitsStore.open(tmp_path)


def test_a_disk_without_room(store: Program, monkeypatch: Any, capfd: Any) -> None:
    usage = shutil.disk_usage(".")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=100))
    assert store("kept") == 2
    assert "0.00 GB are free on this disk, and the logits take" in capfd.readouterr().err
    assert not Path("kept/store.json").exists()


def test_a_disk_that_fills_up_says_which_file_and_goes_on_later(store: Program, capfd: Any) -> None:
    """A limit on the size of files stands for a full disk: the write fails in the same place."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    often = ("top=3", "epochs=1", "batch_size=20")
    assert store(*often, "whole") == 0
    store_size = Path("whole/epoch-0000.logits").stat().st_size
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    record = LogitsStore.open("whole")
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (store_size // 2 + 5, before[1]))
        logits = record.read(0, torch.arange(40))
        with pytest.raises(OSError, match=r"epoch-0000\.logits"):
            LogitsStore.write(record, 0, 20, TeacherLogits(logits.values[20:], logits.classes[20:]))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def test_what_is_written_is_what_is_read(tmp_path: Path) -> None:
    for classes, top, dtype in ((3, 3, "float32"), (1000, 10, "float16"), (70_000, 10, "float16")):
        folder = tmp_path / str(classes)
        folder.mkdir()
        store = LogitsStore(folder, "it", "0", classes, top, dtype, 50, 2, {"seed": 0})
        logits = torch.randn(50, classes, generator=torch.Generator().manual_seed(0))
        for start in (30, 0, 15):
            end = {30: 50, 0: 15, 15: 30}[start]
            store.write(1, start, top_logits(logits[start:end], top, dtype))
        store.save()
        found = LogitsStore.open(folder).read(1, torch.arange(7, 41))
        expected = top_logits(logits[7:41], top, dtype)
        assert torch.equal(found.values, expected.values) and torch.equal(found.classes, expected.classes)
        assert store.path(1).stat().st_size == 50 * store.record.itemsize
        assert store.bytes == 2 * 50 * store.record.itemsize
        assert np.diff(found.values.float().numpy()).max() <= 0


def test_the_size_of_a_store_of_imagenet() -> None:
    store = LogitsStore(Path(), "it", "0", 1000, 10, "float16", 1_281_167, 300, {})
    assert store.bytes == 1_281_167 * 300 * (10 * (2 + 2) + 4)
