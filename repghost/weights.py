"""Where weights come from and in which form they are written.

A source is one of
    timm                the published weights of a width, from timm's repository on the Hugging Face hub
    FILE                safetensors, a checkpoint of train.py, an official .pth.tar or a plain state dict; the content
                        decides which
    official:FILE       the same; says that the file is one of the authors'
    FOLDER              one that holds model.safetensors: a run's, an exported one, or a downloaded repository
Weights are in training or in fused form. Nothing in a file is executed. Check: `pytest tests/test_weights.py`.
"""

import argparse
import zipfile
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from huggingface_hub import hf_hub_download
from safetensors import SafetensorError
from torch import Tensor

from repghost.description import Description
from repghost.errors import UserError
from repghost.files import atomic_write
from repghost.model import WIDTHS, Reparam, RepGhostNet, round_channels
from repghost.reference import timm_name

StateDict = dict[str, Tensor]

WEIGHTS_FILE = "model.safetensors"
# Where files keep the state dict: runs of train.py, the authors' averaged and raw weights. The averaged come first.
_STATE_KEYS = ("ema", "state_dict_ema", "state_dict", "model")


def repghostnet(
    width: float = 1.0, num_classes: int = 1000, *, weights: str | Path | None = None, **kwargs: Any
) -> RepGhostNet:
    """A RepGhostNet with new weights or with those of a source.

    kwargs: in_channels, dropout, reparam, shortcut and fused, as in RepGhostNet.
    weights: "timm" for the published weights of the width, or a file or folder (see the module).

    Raises UserError for arguments that no network has and for weights that do not fit.
    """
    model = RepGhostNet(width, num_classes, **kwargs)
    if weights is not None:
        load_weights(model, weights)
    return model


def load_weights(model: RepGhostNet, source: str | Path) -> None:
    """Gives `model` all weights of `source`. Raises UserError for another width, number of classes or form."""
    state = read_weights(source, model.width)
    found = _network_of(state, str(source), model.width)
    if found.fused != model.fused:
        forms = ["fused" if network.fused else "in training form" for network in (found, model)]
        raise UserError(f"{source}: these weights are {forms[0]}, the network is {forms[1]}")
    theirs, ours = found.classifier.out_features, model.classifier.out_features
    if theirs != ours:
        raise UserError(f"{source}: weights of {theirs} classes, but the network has {ours}")
    _require_fit(state, model, str(source))
    model.load_state_dict(state)


def load_model(source: str | Path, width: float) -> RepGhostNet:
    """The network of `width` with the weights of `source`, in their form, in evaluation mode."""
    return model_from_state(read_weights(source, width), str(source), width)


def model_from_state(state: StateDict, source: str, width: float) -> RepGhostNet:
    """The RepGhostNet of `width` that `state` belongs to, in training or fused form, in evaluation mode.

    Number of classes, input channels and form are read off the tensors; the width is checked. Raises UserError that
    names `source` and what does not fit.
    """
    model = _network_of(state, source, width)
    _require_fit(state, model, source)
    model.load_state_dict(state, assign=True)
    return model.eval()


def start_from(model: RepGhostNet, source: str) -> None:
    """Gives `model` the weights of `source`, all but the classifier, which keeps its initial ones."""
    state = read_weights(source, model.width)
    if model_from_state(state, source, model.width).fused:
        raise UserError(f"{source}: these weights are fused and cannot be trained; take those in training form")
    classifier = {f"classifier.{name}": tensor for name, tensor in model.classifier.state_dict().items()}
    model.load_state_dict(state | classifier)


def save_weights(model: RepGhostNet, path: str | Path) -> None:
    """Writes the state dict of `model` as safetensors."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    with atomic_write(path) as file:
        file.write(safetensors.torch.save(tensors))


def _network_of(state: StateDict, source: str, width: float) -> RepGhostNet:
    """A network without storage with the classes, input channels and form that the tensors of a state dict tell."""
    classifier, stem = (state.get(f"{name}.weight") for name in ("classifier", "conv_stem"))
    if classifier is None or stem is None or min(classifier.ndim, stem.ndim) < 2:
        raise UserError(f"{source}: these are not the weights of a RepGhostNet")
    fused = "conv_stem.bias" in state
    reparam: Reparam = "bn" if fused or "blocks.0.0.ghost1.fusion_bn.0.weight" in state else "none"
    with torch.device("meta"):
        return RepGhostNet(width, len(classifier), stem.shape[1], reparam=reparam, fused=fused)


def _require_fit(state: StateDict, model: RepGhostNet, source: str) -> None:
    """Raises UserError that says in what the names or shapes of `state` are not those of `model`."""
    expected = model.state_dict()
    for names, what in (
        (expected.keys() - state.keys(), "are missing"),
        (state.keys() - expected.keys(), "do not belong"),
    ):
        if names:
            raise UserError(f"{source}: {len(names)} tensors of a RepGhostNet {what}, the first is {min(names)}")
    for name, tensor in state.items():
        if tensor.shape != expected[name].shape:
            head = state["conv_head.weight"].shape[1:2]
            (other,) = [w for w in WIDTHS if head == (round_channels(960 * w),)] or (model.width,)
            found = f" but of width={other:g}" if other != model.width else ""
            shapes = f"{name} is {tuple(tensor.shape)}, not {tuple(expected[name].shape)}"
            raise UserError(f"{source}: these are not the weights of width={model.width:g}{found}: {shapes}")


def read_weights(source: str | Path, width: float | None = None) -> StateDict:
    """The state dict that `source` stands for (see the module); `timm` needs the width.

    A run's checkpoint and an official file give their averaged weights. Raises UserError that names the source.
    """
    path = _path(str(source), width)
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    with open(path, "rb") as file:
        start = file.read(9)
    # Safetensors: the length of the header, little endian, and the header, which is JSON.
    if path.suffix == ".safetensors" or (len(start) == 9 and start[8:] == b"{" and start[:2] != b"PK"):
        try:
            return safetensors.torch.load_file(path)
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path}: not a safetensors file ({error})") from None
    # The official files hold the command line of their training as a plain namespace.
    with torch.serialization.safe_globals([argparse.Namespace]):
        content = read_checkpoint(path)
    state = content
    if isinstance(content, dict):
        state = next((content[key] for key in _STATE_KEYS if isinstance(content.get(key), dict)), content)
    if not isinstance(state, dict) or not state or not all(isinstance(v, Tensor) for v in state.values()):
        raise UserError(f"{path}: holds no state dict of a RepGhostNet")
    return {name.removeprefix("module."): tensor for name, tensor in state.items()}


def _path(source: str, width: float | None) -> Path:
    """The local file of a source; published weights are downloaded into the hub's cache, or found there."""
    if source == "official":
        raise UserError("weights=official needs the file: weights=official:FILE, a .pth.tar of the authors' releases")
    if source == "timm":
        if width is None:
            raise UserError("weights=timm: say which width")
        repository = f"timm/{timm_name(width)}"
        try:
            return Path(hf_hub_download(repository, WEIGHTS_FILE))
        except OSError as error:  # all that the hub's client and the network raise
            what = f"{repository}: cannot be fetched and is not in the hub's cache (HF_HOME): {first_sentence(error)}"
            raise UserError(f"{what}. A folder that holds its {WEIGHTS_FILE} does as well: weights=FOLDER") from None
    path = Path(source.removeprefix("official:")).expanduser()
    return path / WEIGHTS_FILE if path.is_dir() else path


def read_checkpoint(path: str | Path) -> Any:
    """The content of a file written by `torch.save`, on the CPU, without executing anything in it.

    Raises UserError for a damaged file, and for one that holds more than tensors and plain values.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    if zipfile.is_zipfile(path) and (problem := damage(path)):
        raise UserError(f"{path}: damaged ({problem})")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # which the bytes of another file or of a damaged one decide
        raise UserError(f"{path}: not a checkpoint of tensors and plain values ({first_sentence(error)})") from None


def damage(path: Path) -> str | None:
    """What is wrong with the file of a checkpoint, None when every record has its checksum."""
    try:
        with zipfile.ZipFile(path) as archive:
            record = archive.testzip()
    except (OSError, zipfile.BadZipFile, ValueError, NotImplementedError, EOFError) as error:
        return str(error)
    return f"record {record} has a wrong checksum" if record else None


def read_description(source: str | Path) -> Description:
    """What the file at `source` says of itself."""
    return Description()


def first_sentence(error: BaseException) -> str:
    """What other libraries' errors begin with, on one line."""
    return " ".join(str(error).split()).split(". ")[0] or type(error).__name__
