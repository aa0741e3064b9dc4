"""Whatever a user types gives a result or one line: every row of tests/outcomes.py, by the program itself.

Never a traceback, a hang (each row has a time limit), several lines, a folder that a refused command leaves behind, or
the wrong exit code.
"""

import io
import os
import re
import runpy
import shlex
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from conftest import take_shortcuts, train_in
from helpers import time_limit, use_blocks
from images import encoded, make_class_folders, make_images, patch
from outcomes import REFUSED, SLOW, WORKS
from safetensors.torch import save_file

from data.write_shards.write import write_folder
from repghost import repghostnet

pytestmark = pytest.mark.usefixtures("few_blocks")

ROOT = Path(__file__).parents[1]
PROGRESS = re.compile(r"\d+%\|")
SECONDS = 300  # of any row: far more than the slowest machine needs


@pytest.fixture(scope="session")
def places(tmp_path_factory: pytest.TempPathFactory, shards: Path) -> dict[str, str]:
    """The files and folders that rows name in braces."""
    base = tmp_path_factory.mktemp("places")
    train_in(base, f"data.root={shards}", "epochs=1", "name=done", f"output={base}/runs")
    found = {
        name: base / name for name in ("empty", "folder", "full", "flat", "images", "valid", "one_class", "broken")
    }
    for name in ("empty", "folder", "full"):
        found[name].mkdir()
    (found["folder"] / "notes.txt").write_text("no shards\n")
    (found["full"] / "letter.txt").write_text("mine\n")
    make_images(found["images"], train=15, val=5)
    make_images(found["valid"], train=15, val=5)
    (found["valid"] / "val").rename(found["valid"] / "validation")
    make_images(found["one_class"], classes=("cat",), train=3, val=3)
    make_class_folders(found["flat"])
    make_images(found["broken"], train=5, val=3)
    (found["broken"] / "train" / "cat" / "broken.jpg").write_bytes(b"<html>404</html>")
    with pytest.MonkeyPatch.context() as patched:
        use_blocks(patched)
        found |= _weights(base)
    found |= _files(base) | _shards(base, shards)
    found["shards"] = shards
    found["run"], found["model"] = base / "runs" / "done", base / "runs" / "done" / "model.safetensors"
    found["fused"] = base / "runs" / "done" / "model_fused.safetensors"
    return {name: str(path) for name, path in found.items()} | {"long": "x" * 300}


def _files(base: Path) -> dict[str, Path]:
    os.mkfifo(base / "pipe.jpg")
    files = {
        "file": b"just text\n", "binary": bytes(range(256)), "image.jpg": encoded(patch(0)),
        "ü #1 (a=b),[c].jpg": encoded(patch(1)), "two_names": b"a\nb\n", "three_names": b"a\nb\nc\n",
        "ten_names": b"".join(b"name %d\n" % i for i in range(10)),
    }  # fmt: skip
    for name, content in files.items():
        (base / name).write_bytes(content)
    names = {"image": "image.jpg", "odd_image": "ü #1 (a=b),[c].jpg", "fifo": "pipe.jpg"}
    return {name: base / names.get(name, name) for name in [*names, *files]}


def _weights(base: Path) -> dict[str, Path]:
    """Files of strangers, which say nothing of themselves."""
    state = repghostnet(0.1, 3).state_dict()
    broken = state | {"classifier.weight": state["classifier.weight"] * torch.nan}
    files = {
        "nan": broken, "half": {name: x.half() if x.is_floating_point() else x for name, x in state.items()},
        "wrapped": {f"module._orig_mod.{name}": x for name, x in state.items()},
        "stranger": repghostnet(0.5, 10).state_dict(), "other_width": repghostnet(0.5, 3).state_dict(),
        "five": repghostnet(0.1, 5).state_dict(),
    }  # fmt: skip
    for name, tensors in files.items():
        save_file(tensors, base / f"{name}.safetensors")
    return {name: base / f"{name}.safetensors" for name in files}


def _shards(base: Path, shards: Path) -> dict[str, Path]:
    names = ("other_shards", "reordered", "overlapping", "huge_labels", "missing_class", "ü (a=b), [c] #{d}")
    folders = {name: base / name for name in names}
    odd = folders.pop(names[-1])
    odd.symlink_to(shards)
    for name, classes in (("other_shards", ("dog", "eel", "owl")), ("reordered", ("owl", "dog"))):
        images = make_images(base / f"{name}_images", classes=classes, train=8, val=5)
        if name == "reordered":  # fewer classes of the network's
            images = make_images(base / f"{name}_five", classes=("dog", "cat", "owl"), train=8, val=5)
        write_folder(images, folders[name], workers=1, quiet=True)
    rows = {
        "overlapping": {"retrieval-train-0": [0, 1] * 3, "retrieval-val-0": [0, 1, 1]},
        "huge_labels": {"train-0": [0, 4_000_000], "val-0": [0, 1]},
        "missing_class": {"train-0": [0, 1, 2] * 2, "val-0": [0, 1]},
    }
    for name, tars in rows.items():
        folders[name].mkdir()
        for tar, labels in tars.items():
            _tar(folders[name] / f"{tar}.tar", tar, labels)
    return folders | {"odd_shards": odd}


def _tar(path: Path, prefix: str, labels: list[int]) -> None:
    with tarfile.open(path, "w") as tar:
        for number, label in enumerate(labels):
            for ending, content in (("jpg", encoded(patch(number))), ("cls", str(label).encode())):
                member = tarfile.TarInfo(f"{prefix}{number}.{ending}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


@pytest.fixture(autouse=True)
def limited() -> Iterator[None]:
    with time_limit(SECONDS):
        yield


class Outcome(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture
def outcome(places: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]):  # type: ignore[no-untyped-def]
    """Runs a program in this process, in an empty folder, and returns what came of it."""
    take_shortcuts(monkeypatch)
    known = places | {"out": str(tmp_path / "out"), "new": str(tmp_path / "new"), "cache": str(tmp_path / "cache")}

    def filled(text: str, escape: bool = False) -> str:
        for name, place in known.items():
            text = text.replace(f"{{{name}}}", re.escape(place) if escape else place)
        return text

    def run(program: str, line: str, pattern: str) -> tuple[Outcome, str]:
        (tmp_path / "here").mkdir()
        monkeypatch.chdir(tmp_path / "here")
        words = [filled(word) for word in shlex.split(line)]
        monkeypatch.setattr(sys, "argv", [program, *words])
        capfd.readouterr()
        try:
            if program.endswith(".py"):
                runpy.run_path(str(ROOT / program), run_name="__main__")
            else:
                runpy.run_module(program, run_name="__main__", alter_sys=True)
            code: object = 0
        except SystemExit as end:
            code = end.code or 0
        assert isinstance(code, int), code
        return Outcome(code, *capfd.readouterr()), filled(pattern, escape=True)

    return run


def rows(table: dict) -> list:  # type: ignore[type-arg]
    return [
        pytest.param(
            program, f"{always} {words}", pattern,
            id=f"{program} {words}", marks=pytest.mark.slow if words in SLOW else (),
        )
        for program, (always, group) in table.items()
        for words, pattern in group.items()
    ]  # fmt: skip


def test_enough_was_tried() -> None:
    assert len(rows(REFUSED) + rows(WORKS)) >= 250


@pytest.mark.parametrize(("program", "line", "pattern"), rows(REFUSED))
def test_refused_in_one_line(outcome, tmp_path: Path, program: str, line: str, pattern: str) -> None:  # type: ignore[no-untyped-def]
    (code, out, err), pattern = outcome(program, line, pattern)
    assert code == 2, f"exit code {code}\n{out}\n{err}"
    said = [line for line in err.strip().splitlines() if line and not PROGRESS.search(line)]
    usage = said and said[0].startswith("usage: ")  # argparse's
    assert usage or len(said) == 1, err
    assert re.search(pattern, said[-1]), said[-1]
    assert not list((tmp_path / "here").iterdir()), "left behind"
    assert not list((tmp_path / "out").glob("*/*")), "left behind"


@pytest.mark.parametrize(("program", "line", "pattern"), rows(WORKS))
def test_works(outcome, program: str, line: str, pattern: str) -> None:  # type: ignore[no-untyped-def]
    (code, out, err), pattern = outcome(program, line, pattern)
    assert code == 0, f"exit code {code}\n{out}\n{err}"
    assert "Traceback" not in err
    assert re.search(pattern, out + err, re.MULTILINE), f"{out}\n{err}"
