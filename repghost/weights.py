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
import json
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from huggingface_hub import hf_hub_download
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from repghost.description import KEY, Description, described_beside
from repghost.errors import UserError, first_sentence
from repghost.export.runtimes import EXPORTED, open_file
from repghost.files import atomic_write
from repghost.model import RepGhostNet
from repghost.reference import IMAGENET_MEAN, IMAGENET_STD, synsets, timm_name
from repghost.reparameterization import reparameterize
from repghost.rounding import round_layers
from repghost.state_dict import StateDict, fitted, form_of, network_of, unwrapped, width_of

WEIGHTS_FILE = "model.safetensors"
# Where files keep the state dict: runs of train.py, the authors' averaged and raw weights. The averaged come first.
_STATE_KEYS = ("ema", "state_dict_ema", "state_dict", "model")


def repghostnet(
    width: float | None = None, num_classes: int | None = None, *, weights: str | Path | None = None, **kwargs: Any
) -> RepGhostNet:
    """A RepGhostNet with new weights or with those of a source.

    width, num_classes: those of the weights if not given; of new ones, and of "timm", 1.0 and 1000.
    kwargs: in_channels, dropout, reparam, shortcut and fused, as in RepGhostNet.
    weights: "timm" for the published weights of the width, or a file or folder (see the module).

    Raises UserError for arguments that no network has and for weights that do not fit.
    """
    if weights is None:
        return RepGhostNet(1.0 if width is None else width, 1000 if num_classes is None else num_classes, **kwargs)
    if weights == "timm" and width is None:
        width = 1.0
    state, description = read_source(weights, width)
    found = network_of(state, str(weights), description.width if width is None else width)
    model = RepGhostNet(found.width, found.classifier.out_features if num_classes is None else num_classes, **kwargs)
    _load(model, state, str(weights))
    return model


def load_weights(model: RepGhostNet, source: str | Path) -> None:
    """Gives `model` all weights of `source`. Raises UserError for another width, number of classes or form."""
    _load(model, read_weights(source, model.width), str(source))


def _load(model: RepGhostNet, state: StateDict, source: str) -> None:
    found = network_of(state, source, model.width)
    if found.fused != model.fused:
        forms = ["fused" if network.fused else "in training form" for network in (found, model)]
        raise UserError(f"{source}: these weights are {forms[0]}, the network is {forms[1]}")
    theirs, ours = found.classifier.out_features, model.classifier.out_features
    if theirs != ours:
        raise UserError(f"{source}: weights of {theirs} classes, but the network has {ours}")
    model.load_state_dict(fitted(state, model, source))


def load_model(source: str | Path, width: float | None = None) -> RepGhostNet:
    """The network with the weights of `source`, in their form, in evaluation mode.

    width: None for the one that the file tells; "timm" needs it. Raises UserError for weights of another width.
    """
    return load_described(source, width)[0]


def load_described(source: str | Path, width: float | None = None) -> tuple[RepGhostNet, Description]:
    """As `load_model`, with what the file says of itself."""
    state, description = read_source(source, width)
    return model_from_state(state, str(source), description.width if width is None else width), description


def model_from_state(state: StateDict, source: str, width: float | None) -> RepGhostNet:
    """The RepGhostNet of `width` that `state` belongs to, in training or fused form, in evaluation mode.

    Number of classes, input channels and form are read off the tensors; the width is checked, or read off them too
    where it is None. Raises UserError that names `source` and what does not fit.
    """
    model = network_of(state, source, width)
    model.load_state_dict(fitted(state, model, source), assign=True)
    return model.eval()


def start_from(model: RepGhostNet, source: str) -> None:
    """Gives `model` the weights of `source`, all but the classifier, which keeps its initial ones.

    model: a RepGhostNet in training form, or the body of a detector, which has no classifier.
    """
    found = model_from_state(read_weights(source, model.width), source, model.width)
    if found.fused:
        raise UserError(f"{source}: these weights are fused and cannot be trained; take those in training form")
    own, weights = model.state_dict(), found.state_dict()
    model.load_state_dict({name: own[name] if name.startswith("classifier.") else weights[name] for name in own})


def to_quantize(source: str, width: float, num_classes: int) -> RepGhostNet:
    """The fused network of `source` for a quantization-aware training: every layer of it is rounded in training mode.

    Raises UserError for weights of another width or number of classes.
    """
    model = reparameterize(load_model(source, width))
    if (found := model.classifier.out_features) != num_classes:
        raise UserError(f"weights={source}: of {found} classes, but the data has {num_classes}")
    round_layers(model)
    return model.requires_grad_(True).train()


def save_weights(model: nn.Module, path: str | Path, description: Description | None = None) -> None:
    """Writes the state dict of `model`, a RepGhostNet or a detector, as safetensors, with what is known of it.

    description: width and form are those of `model` in any case.
    """
    network = next(module for module in model.modules() if isinstance(module, RepGhostNet))
    form = "fused" if network.fused else "training"
    described = replace(description or Description(), width=float(network.width), form=form)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    with atomic_write(path) as file:
        file.write(_safetensors(tensors, {"format": "pt", KEY: described.to_json()}))


def _safetensors(tensors: StateDict, metadata: dict[str, str]) -> bytes:
    """The content of a file. Its library writes the metadata in any order; here equal weights make equal files."""
    content = safetensors.torch.save(tensors, metadata)
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end]) | {"__metadata__": metadata}
    text = json.dumps(header, separators=(",", ":")).encode()
    return content[:8] + text.ljust(end - 8) + content[end:]


# -- reading -----------------------------------------------------------------------------------------------------------


def read_description(source: str | Path) -> Description:
    """What `source` says of itself: a file of any kind that this project writes, a folder, a run's file, "timm".

    Files that were written before they said so are described by the run's folder that they lie in, the published
    weights by ImageNet. Of files of strangers only form and width are known, the latter where the shapes tell it.
    Raises UserError for what is no such source and for a file whose tensors contradict what it says.
    """
    if str(source) == "timm":
        return _published()
    path = _path(str(source), None)
    if path.suffix in EXPORTED and path.is_file():
        return open_file(path).description
    if text := _in_torchscript(path):
        return Description.from_json(text, str(path))
    return read_source(source)[1]


def read_weights(source: str | Path, width: float | None = None) -> StateDict:
    """The state dict that `source` stands for (see the module); `timm` needs the width.

    A run's checkpoint and an official file give their averaged weights. Raises UserError that names the source.
    """
    return read_source(source, width)[0]


def read_source(source: str | Path, width: float | None = None) -> tuple[StateDict, Description]:
    """The state dict that `source` stands for, and what the source says of itself (see `read_description`)."""
    path = _path(str(source), width)
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    if path.suffix in EXPORTED:
        raise UserError(f"{path}: an exported file; give the weights that it was exported from")
    with open(path, "rb") as file:
        start = file.read(9)
    # Safetensors: the length of the header, little endian, and the header, which is JSON.
    if path.suffix == ".safetensors" or (len(start) == 9 and start[8:] == b"{" and start[:2] != b"PK"):
        try:
            state: Any = safetensors.torch.load_file(path)
            with safe_open(path, "pt") as opened:
                said = (opened.metadata() or {}).get(KEY)
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path}: not a safetensors file ({error})") from None
    else:
        # The official files hold the command line of their training as a plain namespace.
        with torch.serialization.safe_globals([argparse.Namespace]):
            state = read_checkpoint(path)
        said = state.get(KEY) if isinstance(state, dict) else None
        while isinstance(state, dict) and (inner := [k for k in _STATE_KEYS if isinstance(state.get(k), dict)]):
            state = state[inner[0]]
    if not isinstance(state, dict) or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items()):
        raise UserError(f"{path}: holds no state dict of a RepGhostNet")
    if any(name.startswith("backbone.body.") for name in state):
        raise UserError(f"{path}: weights of a detector, which only its run's folder tells how to build: run=FOLDER")
    if isinstance(said, str):
        description = Description.from_json(said, str(path))
    else:
        published = str(source) == "timm" or str(source).startswith("official:")
        description = _published() if published else described_beside(path)
    state = unwrapped(state)
    return state, _of_tensors(description, state, str(path))


def _published() -> Description:
    return Description(classes=synsets(), image_size=224, crop_fraction=0.875, mean=IMAGENET_MEAN, std=IMAGENET_STD)


def _of_tensors(description: Description, state: StateDict, source: str) -> Description:
    """`description` with what the tensors tell. Raises UserError where the two contradict each other."""
    form, classifier = form_of(state), state.get("classifier.weight")
    outputs = len(classifier) if classifier is not None and classifier.ndim else None
    if description.classes is not None and outputs not in (None, len(description.classes)):
        raise UserError(
            f"{source}: says that it has {len(description.classes)} classes, but its tensors have {outputs}"
        )
    if description.form not in (None, form):
        raise UserError(f"{source}: says that it is in {description.form} form, but its tensors are in {form} form")
    told = width_of(state) if classifier is not None and "conv_stem.weight" in state else None
    return replace(description, form=form, width=told if description.width is None else description.width)


def _in_torchscript(path: Path) -> str | None:
    """What a TorchScript file of `repghost.export` says of itself; None for any other file."""
    if not path.is_file() or not zipfile.is_zipfile(path):
        return None
    try:
        with zipfile.ZipFile(path) as archive:
            names = [name for name in archive.namelist() if name.endswith(f"/extra/{KEY}")]
            return archive.read(names[0]).decode() if names else None
    except (OSError, ValueError, zipfile.BadZipFile):
        return None


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
