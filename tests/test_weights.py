"""Weights from timm's repositories, the authors' files, runs and plain state dicts: the same logits from all."""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
from helpers import photographs, randomize_batchnorm

from repghost import reparameterize, repghostnet
from repghost.errors import UserError
from repghost.reference import timm_name
from repghost.weights import load_model, read_weights, save_weights, start_from

WIDTH = 0.5


@pytest.fixture(scope="module")
def theirs() -> Any:
    model = timm.create_model("repghostnet_050").eval()
    randomize_batchnorm(model, 0)
    return model


@pytest.fixture(scope="module")
def cache(theirs: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The hub's cache after a download of timm's repository of width 0.5."""
    folder = tmp_path_factory.mktemp("hub")
    repository = folder / f"models--timm--{timm_name(WIDTH)}"
    commit = "0123456789abcdef0123456789abcdef01234567"
    for name in ("blobs", "refs", f"snapshots/{commit}"):
        (repository / name).mkdir(parents=True)
    safetensors.torch.save_file(theirs.state_dict(), repository / "blobs" / "weights")
    (repository / "refs" / "main").write_text(commit)
    (repository / "snapshots" / commit / "model.safetensors").symlink_to("../../blobs/weights")
    return folder


def same_logits(model: torch.nn.Module, theirs: torch.nn.Module) -> bool:
    images = photographs(4, 64)
    with torch.no_grad():
        a, b = model.eval()(images), theirs(images)
    return bool((a - b).abs().max() < 1e-5 * b.abs().max())


def test_timm_repositories_are_found_in_the_cache_without_network(cache: Path, theirs: Any, tmp_path: Path) -> None:
    # The hub's client reads its variables when it is imported, so this is a process of its own.
    code = (
        "import sys, torch, repghost, repghost.weights\n"
        "model = repghost.repghostnet(0.5, weights='timm')\n"
        "repghost.weights.save_weights(model, sys.argv[1])\n"
        "try:\n    repghost.repghostnet(0.8, weights='timm')\n"
        "except repghost.errors.UserError as error:\n    print(error)\n"
    )
    environment = {**os.environ, "HF_HUB_CACHE": str(cache), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", code, str(tmp_path / "x.safetensors")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert done.returncode == 0, done.stderr
    assert "timm/repghostnet_080.in1k" in done.stdout and len(done.stdout.splitlines()) == 1
    assert same_logits(load_model(tmp_path / "x.safetensors", WIDTH), theirs)


def test_a_folder_or_a_file_does_as_well(cache: Path, theirs: Any) -> None:
    (snapshot,) = cache.glob("models--*/snapshots/*")
    assert same_logits(load_model(snapshot, WIDTH), theirs)
    (blob,) = cache.glob("models--*/blobs/*")  # no suffix: told by its content
    assert same_logits(repghostnet(WIDTH, weights=blob), theirs)


def test_official_files_with_their_namespace(theirs: Any, tmp_path: Path) -> None:
    path = tmp_path / "repghostnet_0_5x.pth.tar"
    averaged = {f"module.{k}": v for k, v in theirs.state_dict().items()}
    raw = {k: torch.zeros_like(v) for k, v in averaged.items()}
    arguments = argparse.Namespace(model="repghostnet_050", lr=0.6, opt_betas=None)
    torch.save({"epoch": 296, "arch": "x", "state_dict": raw, "state_dict_ema": averaged, "args": arguments}, path)
    for source in (str(path), f"official:{path}"):
        assert same_logits(load_model(source, WIDTH), theirs)
    torch.save({"state_dict": averaged, "args": arguments}, path, _use_new_zipfile_serialization=False)
    assert same_logits(load_model(path, WIDTH), theirs)


class Trap:
    """Runs a command when it is unpickled by a careless reader."""

    def __init__(self, target: Path) -> None:
        self._target = target

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self._target),)


def test_nothing_in_a_file_is_executed(theirs: Any, tmp_path: Path) -> None:
    path = tmp_path / "official.pth.tar"
    torch.save({"state_dict": theirs.state_dict(), "args": argparse.Namespace(a=Trap(tmp_path / "sprung"))}, path)
    with pytest.raises(UserError, match=r"official\.pth\.tar"):
        read_weights(path)
    assert not (tmp_path / "sprung").exists()


def test_fused_files_and_what_does_not_fit(theirs: Any, tmp_path: Path) -> None:
    trained, fused = tmp_path / "trained.safetensors", tmp_path / "fused.pt"
    model = repghostnet(WIDTH)
    model.load_state_dict(theirs.state_dict())
    save_weights(model.eval(), trained)
    torch.save(reparameterize(model).state_dict(), fused)
    assert load_model(fused, WIDTH).fused
    assert same_logits(load_model(fused, WIDTH), theirs)
    assert same_logits(repghostnet(WIDTH, fused=True, weights=fused), theirs)
    for network, source, said in (
        ({"width": 0.8}, trained, "not the weights of width=0.8 but of width=0.5"),
        ({"width": 0.8, "fused": True}, fused, "not the weights of width=0.8 but of width=0.5"),
        ({"width": WIDTH, "num_classes": 10}, trained, "weights of 1000 classes, but the network has 10"),
        ({"width": WIDTH}, fused, "these weights are fused, the network is in training form"),
        ({"width": WIDTH, "fused": True}, trained, "these weights are in training form, the network is fused"),
        ({"width": WIDTH, "reparam": "none"}, trained, "do not belong"),
    ):
        with pytest.raises(UserError, match=said) as error:
            repghostnet(**network, weights=source)  # type: ignore[arg-type]
        assert str(source) in str(error.value)
    with pytest.raises(UserError, match="cannot be trained"):
        start_from(repghostnet(WIDTH, 10), str(fused))
    finetuned = repghostnet(WIDTH, 10)
    start_from(finetuned, str(trained))
    assert torch.equal(finetuned.conv_head.weight, model.conv_head.weight)


def test_what_is_no_source_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({}))
    for source, said in (
        ("official", "official:FILE"),
        (str(tmp_path), "model.safetensors: no such file"),
        (str(tmp_path / "config.json"), "config.json"),
    ):
        with pytest.raises(UserError, match=said):
            read_weights(source, WIDTH)
    with pytest.raises(UserError, match=r"width=0\.7 is not published"):
        read_weights("timm", 0.7)


ONLY_TORCH = """
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in sys.argv[2].split(","):
            raise ModuleNotFoundError(f"forbidden: {name}", name=name)

sys.meta_path.insert(0, Refuse())
import repghost
model = repghost.repghostnet(0.5, weights=sys.argv[1])
assert not repghost.reparameterize(model).training
try:
    repghost.repghostnet(0.7, weights="timm")
except ValueError as error:
    print(error)
"""


def test_the_network_and_its_weights_need_torch_safetensors_and_the_hub_only(theirs: Any, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    safetensors.torch.save_file(theirs.state_dict(), path)
    refused = "pytorch_lightning,lightning,hydra,omegaconf,matplotlib,torchvision,PIL,torchmetrics,data,webdataset"
    command = [sys.executable, "-c", ONLY_TORCH, str(path), refused]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert done.returncode == 0, done.stderr
    assert "width=0.7 is not published" in done.stdout
