"""Checkpoints: whole or not at all, damage is found, foreign files are named, and nothing in a file is executed."""

import io
import os
import pickle
import resource
import shutil
import struct
import tarfile
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.kill import differences
from repghost.errors import DISK_FULL, UserError, user_message
from repghost.files import atomic_write, remove_leftovers
from repghost.run import read_config
from repghost.training import checkpoint
from repghost.training.checkpoint import FORMAT, LAST, PREVIOUS, AtomicCheckpointIO, resume_point
from repghost.weights import read_checkpoint, read_weights

Program = Callable[..., int]


def content(step: int) -> dict[str, Any]:
    """What a small checkpoint may hold."""
    generator = torch.Generator().manual_seed(step)
    tensors = {f"layer{i}.weight": torch.randn(50, 20, generator=generator) for i in range(5)}
    return {"state_dict": tensors, "history": [{"epoch": step, "top1": 1 / 3}], "pytorch-lightning_version": "2.6.6"}


def equal(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return a["history"] == b["history"] and all(
        torch.equal(tensor, b["state_dict"][name]) for name, tensor in a["state_dict"].items()
    )


def save(folder: Path, *steps: int) -> Path:
    for step in steps:
        AtomicCheckpointIO().save_checkpoint(content(step), folder / LAST)
    return folder / LAST


@contextmanager
def files_end_at(size: int) -> Iterator[None]:
    """A limit on the size of files stands for a full disk: the write fails in the same place."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


# -- writing -----------------------------------------------------------------------------------------------------------


def test_a_disk_that_fills_up_at_any_byte_leaves_the_checkpoint_before(tmp_path: Path) -> None:
    path = save(tmp_path, 0, 1)
    size = path.stat().st_size
    for offset in np.linspace(0, size - 1, 20).astype(int).tolist():
        with files_end_at(offset), pytest.raises(OSError) as caught:
            save(tmp_path, 2)
        assert caught.value.errno in DISK_FULL
        line = user_message(caught.value)
        assert line is not None and str(path) in line and "\n" not in line
        assert {file.name for file in tmp_path.iterdir()} == {LAST, PREVIOUS}
        assert equal(read_checkpoint(path), content(1)) and equal(read_checkpoint(tmp_path / PREVIOUS), content(0))
    save(tmp_path, 2)
    assert equal(read_checkpoint(path), content(2))


@pytest.mark.usefixtures("no_evaluation")
@pytest.mark.parametrize("background", ["false", "true"])
def test_a_run_on_a_full_disk_ends_in_one_line_and_goes_on_later(
    train_tiny: Program, capsys: pytest.CaptureFixture[str], background: str
) -> None:
    with files_end_at(100_000):
        assert train_tiny("name=a", "epochs=1", f"checkpoint.background={background}") == 2
    line = capsys.readouterr().err.strip()
    assert line.startswith("error: outputs/a/checkpoints/best_raw.ckpt: File too large"), line
    assert len(line.splitlines()) == 1 and not list(Path("outputs").rglob("*.ckpt"))
    assert train_tiny("name=a", "epochs=1") == 0


def test_a_write_that_is_cut_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with pytest.raises(KeyboardInterrupt), atomic_write(path) as file:
        file.write(b"half")
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())
    with atomic_write(path) as file:
        file.write(b"whole")
    (tmp_path / ".file.tmp").write_bytes(b"left by a process that was killed")
    with atomic_write(path) as file:
        file.write(b"whole again")
    assert [f.name for f in tmp_path.iterdir()] == ["file"] and path.read_bytes() == b"whole again"
    (tmp_path / "inside").mkdir()
    (tmp_path / "inside" / ".best_ema.ckpt.tmp").write_bytes(b"left")
    remove_leftovers(tmp_path)
    assert not list((tmp_path / "inside").iterdir())


def test_a_disk_without_room_for_two_checkpoints_is_found_before_the_training(
    train_tiny: Program, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=2**20))
    assert train_tiny("name=a", "epochs=1") == 2
    out, err = capsys.readouterr()
    assert err.startswith("error: outputs/a/checkpoints: 1 MiB are free") and "epoch   1" not in out
    assert not Path("outputs").exists(), "a refused command leaves nothing behind"


def test_files_of_writers_that_live_are_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with atomic_write(path) as first:
        first.write(b"first")
        first.flush()
        with atomic_write(path) as second:
            second.write(b"second")
            remove_leftovers(tmp_path)
        assert path.read_bytes() == b"second"
    assert path.read_bytes() == b"first"
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


# -- in the background -------------------------------------------------------------------------------------------------


def background() -> AtomicCheckpointIO:
    files = AtomicCheckpointIO()
    files.background = True
    return files


def test_a_thread_writes_what_the_state_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    go_on, files, saved = threading.Event(), background(), content(1)
    write = checkpoint._write
    monkeypatch.setattr(checkpoint, "_write", lambda *arguments: go_on.wait(60) and write(*arguments))
    files.save_checkpoint(saved, tmp_path / "best_raw.ckpt", ["best_ema.ckpt", LAST])
    files.wait(at_most_look=True)
    saved["state_dict"]["layer0.weight"].zero_()  # the training goes on
    saved["history"].append({"epoch": 2})
    assert not list(tmp_path.iterdir())
    go_on.set()
    files.wait()
    for name in ("best_raw.ckpt", "best_ema.ckpt", LAST):
        assert equal(read_checkpoint(tmp_path / name), content(1))
    files.save_checkpoint(content(2), tmp_path / LAST)
    files.save_checkpoint(content(3), tmp_path / LAST)  # after the one before
    files.wait()
    assert equal(read_checkpoint(tmp_path / LAST), content(3))
    assert equal(read_checkpoint(tmp_path / PREVIOUS), content(2))


@pytest.mark.parametrize("next_call", ["look", "save"])
def test_a_thread_that_cannot_write_is_heard_of(tmp_path: Path, next_call: str) -> None:
    path, files = save(tmp_path, 0), background()
    with files_end_at(100):
        files.save_checkpoint(content(1), tmp_path / "best_ema.ckpt", [LAST])
        while files._write is not None and not files._write.done():
            time.sleep(0.01)
    with pytest.raises(OSError) as caught:
        if next_call == "look":
            files.wait(at_most_look=True)
        else:
            files.save_checkpoint(content(2), path)
    assert caught.value.errno in DISK_FULL and "best_ema.ckpt" in str(user_message(caught.value))
    files.wait()
    assert equal(read_checkpoint(path), content(0)) and [file.name for file in tmp_path.iterdir()] == [LAST]


@pytest.mark.slow
def test_a_run_whose_checkpoints_a_thread_writes_comes_to_the_same(train_tiny: Program) -> None:
    for value in ("false", "true"):
        assert train_tiny(f"name={value}", "checkpoint.minutes=1e-6", f"checkpoint.background={value}") == 0
    assert differences(Path("outputs/false"), Path("outputs/true")) == []


# -- damage ------------------------------------------------------------------------------------------------------------


def flip(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 0x10
    path.write_bytes(data)


def test_a_flipped_bit_is_found_or_changes_nothing(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    whole = path.read_bytes()
    found = 0
    for offset in np.random.default_rng(0).integers(0, len(whole), 200).tolist():
        flip(path, offset)
        try:
            assert equal(read_checkpoint(path), content(1)), f"byte {offset}"  # padding between records
        except UserError as error:
            assert str(path) in str(error) and "\n" not in str(error)
            found += 1
        path.write_bytes(whole)
    assert found > 150


@pytest.mark.parametrize("harm", ["cut", "empty", "flip", "text"])
def test_a_damaged_checkpoint_falls_back_to_the_one_before(tmp_path: Path, harm: str) -> None:
    path = save(tmp_path, 0, 1)
    data = path.read_bytes()
    if harm == "flip":
        flip(path, data.index(content(1)["state_dict"]["layer3.weight"].numpy().tobytes()))
    else:
        path.write_bytes({"cut": data[: len(data) // 2], "empty": b"", "text": b"no zip" * 100}[harm])
    with pytest.warns(UserWarning, match=r"last\.ckpt is damaged .*going on from the one before"):
        assert resume_point(tmp_path) == tmp_path / PREVIOUS
    flip(tmp_path / PREVIOUS, data.index(b"layer0"))
    with pytest.warns(UserWarning), pytest.raises(UserError, match="no checkpoint in it is undamaged"):
        resume_point(tmp_path)


def test_a_death_between_the_two_renames_leaves_the_one_before(tmp_path: Path) -> None:
    assert resume_point(tmp_path) is None
    save(tmp_path, 0, 1)
    os.replace(tmp_path / LAST, tmp_path / PREVIOUS)
    assert resume_point(tmp_path) == tmp_path / PREVIOUS


def test_a_run_whose_last_checkpoint_is_damaged_comes_to_the_same(
    train_tiny: Program, recwarn: pytest.WarningsRecorder
) -> None:
    assert train_tiny("name=a") == 0
    run = Path("outputs/a")
    expected = (run / "metrics.csv").read_text(), (run / "model.safetensors").read_bytes()
    for path in run.glob("evaluation*.json"):
        path.unlink()
    last = run / "checkpoints" / LAST
    weight = torch.load(last, weights_only=True)["state_dict"]["model.classifier.weight"]
    flip(last, last.read_bytes().index(weight.numpy().tobytes()))
    assert train_tiny("name=a") == 0
    assert any("is damaged" in str(warning.message) for warning in recwarn)
    assert expected == ((run / "metrics.csv").read_text(), (run / "model.safetensors").read_bytes())


# -- files of others ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("saved", [[1, 2], {"state_dict": {}}, {"ema": {}, "history": [], "format": FORMAT - 1}])
def test_a_foreign_checkpoint_is_refused(tmp_path: Path, saved: Any) -> None:
    torch.save(saved, tmp_path / LAST)
    with pytest.raises(UserError, match=r"last\.ckpt: no checkpoint of this version of train.py"):
        AtomicCheckpointIO().load_checkpoint(tmp_path / LAST)


def test_the_checkpoint_of_another_run_is_refused(
    finished_run: Path, train_tiny: Program, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, wrong in (("wide", "width=0.2"), ("large", "batch_size=16")):
        Path(f"outputs/{name}/checkpoints").mkdir(parents=True)
        os.link(finished_run / "checkpoints/last.ckpt", f"outputs/{name}/checkpoints/last.ckpt")
        capsys.readouterr()
        assert train_tiny(f"name={name}", "epochs=1", wrong) == 2
        line = capsys.readouterr().err.strip()
        assert wrong in line and len(line.splitlines()) == 1, line


# -- malice ------------------------------------------------------------------------------------------------------------


class Call:
    """Pickles as a call of `function`."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self._call = function, arguments

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self._call


def saved(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def zipped(opcodes: bytes) -> bytes:
    """A file in the format of torch.save around a pickle that is given as such."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("archive/data.pkl", opcodes)
        archive.writestr("archive/version", "3\n")
        archive.writestr("archive/byteorder", "little")
    return buffer.getvalue()


def old_tar(data: bytes) -> bytes:
    """A file in the format that torch had before its version 0.1.11."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:") as archive:
        for name in ("sys_info", "storages", "tensors", "pickle"):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


def object_array(value: Any) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.array([value], dtype=object), allow_pickle=True)
    return buffer.getvalue()


def malicious(folder: Path) -> dict[str, bytes]:
    """Files of different kinds; each makes the file `folder`/executed when what it holds is executed."""
    shell = f"touch {folder}/executed"
    line, code = f"V{shell}\n".encode(), f"open({f'{folder}/executed'!r}, 'w').close()"
    system, weights = Call(os.system, shell), {"classifier.weight": torch.zeros(3, 4)}
    (folder / "inner").write_bytes(pickle.dumps(system))
    return {
        "os.system": saved(system),
        "eval among weights": saved({**weights, "x": Call(eval, code)}),
        "exec in the optimizer": saved({"ema": weights, "optimizer_states": [{"state": {0: Call(exec, code)}}]}),
        "torch.load of another file": saved({"a": Call(partial(torch.load, weights_only=False), f"{folder}/inner")}),
        "array of objects among weights": saved({**weights, "x": np.array([system], dtype=object)}),
        "array of objects": object_array(system),
        "pickle": pickle.dumps(system),
        "GLOBAL": zipped(b"cposix\nsystem\n(" + line + b"tR."),
        "STACK_GLOBAL": zipped(b"\x80\x04\x8c\x05posix\x8c\x06system\x93(" + line + b"tR."),
        "INST": zipped(b"(" + line + b"iposix\nsystem\n."),
        "getattr": zipped(b"cbuiltins\ngetattr\n(cbuiltins\n__import__\n(Vos\ntRVsystem\ntR(" + line + b"tR."),
        "old tar": old_tar(pickle.dumps(system)),
    }


KINDS = (
    "os.system", "eval among weights", "exec in the optimizer", "torch.load of another file",
    "array of objects among weights", "array of objects", "pickle", "GLOBAL", "STACK_GLOBAL", "INST",
    "getattr", "old tar",
)  # fmt: skip


@pytest.mark.filterwarnings("ignore:Detected pickle protocol 4:UserWarning")
@pytest.mark.parametrize("kind", KINDS)
def test_nothing_in_a_file_is_executed(tmp_path: Path, kind: str) -> None:
    path, executed = tmp_path / "x.ckpt", tmp_path / "executed"
    path.write_bytes(malicious(tmp_path)[kind])
    for read in (read_checkpoint, read_weights, AtomicCheckpointIO().load_checkpoint):
        with pytest.raises(UserError) as caught:
            read(path)
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)
        assert not executed.exists()
    # The file is what it claims to be: readers that trust it execute it.
    for trusting in (partial(torch.load, weights_only=False), partial(np.load, allow_pickle=True)):
        with suppress(Exception):
            trusting(path)
    assert executed.exists()


def test_safetensors_that_are_none(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    header = b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4000000000]}}'
    for harm in (
        b"",
        struct.pack("<Q", 2**62) + header,
        struct.pack("<Q", len(header)) + header,
        struct.pack("<Q", 4) + b"\x80\x04." + b"x",
        pickle.dumps(Call(os.system, f"touch {tmp_path}/executed")),
    ):
        path.write_bytes(harm)
        with pytest.raises(UserError, match="not a safetensors file"):
            read_weights(path)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("text", ["a: !!python/object/apply:os.system ['touch executed']", "a: [", "\x00", "- a list"])
def test_a_config_that_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(UserError, match=r"config\.yaml: not a config") as caught:
        read_config(tmp_path)
    assert "\n" not in str(caught.value) and not (tmp_path / "executed").exists()
