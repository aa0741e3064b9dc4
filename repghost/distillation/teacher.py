"""The teacher of a training: any classifier of timm, or a network of this project.

Check: `pytest tests/test_teacher.py`.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from repghost.dataset import SplitIndex
from repghost.description import describe_run
from repghost.errors import UserError, first_sentence
from repghost.files import read_class_names
from repghost.model import RepGhostNet, count_parameters
from repghost.reparameterization import reparameterize
from repghost.run import CONFIG, load_run, read_config
from repghost.run_data import CLASSES_FILE
from repghost.weights import WEIGHTS_FILE, load_described

TIMM = "timm:"


class Inputs(NamedTuple):
    """Images as a network takes them: their side in pixels, and the mean and std of pixels in [0, 1]."""

    size: int | None  # None: any
    mean: Sequence[float]
    std: Sequence[float]


class Teacher:
    """A frozen classifier that tells the logits of a training's images.

    It is no part of the network that is trained: neither of its checkpoints, nor of its average, nor of what the ranks
    exchange. network: in evaluation mode. theirs: the images that it was trained with, ours: those of the training.
    """

    def __init__(self, network: nn.Module, name: str, theirs: Inputs, ours: Inputs) -> None:
        self._network = network.eval().requires_grad_(False)
        self.name = name
        self.weights = _digest(network)
        self._size = theirs.size
        mean, std, our_mean, our_std = (torch.tensor(v) for v in (theirs.mean, theirs.std, ours.mean, ours.std))
        self._scale, self._shift = ((each.view(-1, 1, 1)) for each in (our_std / std, (our_mean - mean) / std))
        self._renormalizes = (tuple(theirs.mean), tuple(theirs.std)) != (tuple(ours.mean), tuple(ours.std))

    def __str__(self) -> str:
        pixels = f", at {self._size} pixels" if self._size else ""
        return f"{self.name}, {count_parameters(self._network) / 1e6:.2f}M parameters{pixels}"

    def to(self, device: torch.device, channels_last: bool) -> None:
        """Moves it to the device of the training."""
        self._network.to(device).to(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
        self._scale, self._shift = self._scale.to(device), self._shift.to(device)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Floats [N, C]; images: float [N, 3, H, W], normalized and augmented as the training's."""
        if self._renormalizes:
            images = images.float() * self._scale + self._shift
        if self._size and images.shape[2:] != (self._size, self._size):
            images = F.interpolate(images.float(), (self._size,) * 2, mode="bicubic", antialias=True)
        return self._network(images)


def open_teacher(source: str, image_size: int | None, ours: Inputs, index: SplitIndex) -> Teacher:
    """The teacher that `source` names, on the CPU.

    source: `timm:NAME` for timm's weights of a network, where NAME may be `hf-hub:ORGANISATION/NAME` or
    `local-dir:FOLDER`; `timm:NAME@FILE` for a file of weights for a network of timm's; else the folder of a run or a
    file of this project (`repghost.weights`). image_size: side of the images that it gets; None: of its training.
    index: of the training images. Raises UserError for one of other classes.
    """
    if source.startswith(TIMM):
        network, theirs = _of_timm(source.removeprefix(TIMM), len(index.classes))
        outputs, names = int(network.num_classes), None  # type: ignore[arg-type]
    else:
        network, theirs, names = _of_this_project(source.removeprefix("run="), ours)
        outputs = network.classifier.out_features
    if outputs != len(index.classes):
        raise UserError(f"teacher={source}: has {outputs} classes, the training images have {len(index.classes)}")
    if names is not None and list(names) != list(index.classes):
        different = next(pair for pair in zip(names, index.classes, strict=True) if pair[0] != pair[1])
        raise UserError(
            f"teacher={source}: its class {different[0]!r} is {different[1]!r} in the training images: give a teacher "
            "of the same classes in the same order"
        )
    assumed = "" if names is not None else "; its classes are taken to be in the order of the training images'"
    theirs = theirs._replace(size=image_size or theirs.size)
    return Teacher(network, source + assumed, theirs, ours)


def _of_this_project(source: str, ours: Inputs) -> tuple[RepGhostNet, Inputs, Sequence[str] | None]:
    folder = Path(source).expanduser()
    if (folder / CONFIG).is_file() and not (folder / WEIGHTS_FILE).exists():  # a run that goes on
        model, names = load_run(folder, "last")[0], read_class_names(folder / CLASSES_FILE)
        known = describe_run(read_config(folder), names, None)
    else:
        model, known = load_described(source)
    inputs = Inputs(known.image_size, known.mean or ours.mean, known.std or ours.std)
    return model if model.fused else reparameterize(model), inputs, known.classes


def _of_timm(name: str, num_classes: int) -> tuple[nn.Module, Inputs]:
    import timm  # of an extra, and slow

    name, _, file = name.partition("@")
    options: dict[str, Any] = {"pretrained": True}
    if file:
        options = {"checkpoint_path": str(Path(file).expanduser()), "num_classes": num_classes}
    try:
        network = timm.create_model(name, **options)
    except Exception as error:  # of timm, of the hub's client or of torch, for the name, the file or the network
        raise UserError(f"teacher={TIMM}{name}{'@' * bool(file)}{file}: {first_sentence(error)}") from None
    config = timm.data.resolve_model_data_config(network)
    return network, Inputs(config["input_size"][1], config["mean"], config["std"])


def _digest(network: nn.Module) -> str:
    """SHA-256 of all tensors of a network by name."""
    digest = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
