"""Where weights come from and in which form they are written."""

from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from repghost.atomic import atomic_write
from repghost.checkpoint import read_checkpoint
from repghost.errors import UserError
from repghost.model import Reparam, RepGhostNet, repghostnet

StateDict = dict[str, Tensor]


def save_weights(model: RepGhostNet, path: str | Path) -> None:
    """Writes the state dict of `model` as safetensors."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    with atomic_write(path) as file:
        file.write(safetensors.torch.save(tensors))


def read_weights(path: str | Path) -> StateDict:
    """The state dict in a file: safetensors, a run's checkpoint (its averaged weights), or a plain state dict."""
    path = Path(path)
    if path.suffix == ".safetensors":
        try:
            return safetensors.torch.load_file(path)
        except FileNotFoundError:
            raise UserError(f"{path}: no such file") from None
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path}: not a safetensors file ({error})") from None
    content = read_checkpoint(path)
    state = content.get("ema", content) if isinstance(content, dict) else None
    if not isinstance(state, dict) or not state or not all(isinstance(v, Tensor) for v in state.values()):
        raise UserError(f"{path}: holds no state dict of a RepGhostNet")
    return state


def start_from(model: RepGhostNet, source: str) -> None:
    """Gives `model` the weights in the file `source`, all but the classifier, which keeps its initial ones."""
    state = read_weights(source)
    model_from_state(state, source, model.width)
    if "conv_stem.bias" in state:
        raise UserError(f"{source}: these weights are fused and cannot be trained; take those in training form")
    own = model.state_dict()
    model.load_state_dict({k: own[k] if k.startswith("classifier.") else v for k, v in state.items()})


def model_from_state(state: StateDict, source: str, width: float) -> RepGhostNet:
    """The RepGhostNet that `state` belongs to, in training or fused form, in evaluation mode.

    Number of classes, input channels and form are read off the tensors; the width is the caller's word and is
    checked. Raises UserError that names `source` and what does not fit.
    """
    if "classifier.weight" not in state or "conv_stem.weight" not in state:
        raise UserError(f"{source}: these are not the weights of a RepGhostNet")
    fused = "conv_stem.bias" in state
    branch = "blocks.0.0.ghost1.fusion_bn.0"
    reparam: Reparam = "bn" if fused or f"{branch}.weight" in state else "none"
    with torch.device("meta"):
        model = repghostnet(
            width,
            num_classes=len(state["classifier.weight"]),
            in_channels=state["conv_stem.weight"].shape[1],
            reparam=reparam,
            fused=fused,
        )
    expected = model.state_dict()
    if missing := sorted(expected.keys() - state.keys()):
        raise UserError(f"{source}: {len(missing)} tensors are missing, the first is {missing[0]}")
    if unknown := sorted(state.keys() - expected.keys()):
        raise UserError(f"{source}: {len(unknown)} tensors do not belong to a RepGhostNet, the first is {unknown[0]}")
    for name, tensor in state.items():
        if tensor.shape != expected[name].shape:
            raise UserError(
                f"{source}: these are not the weights of width={width:g}: {name} is {tuple(tensor.shape)}, "
                f"not {tuple(expected[name].shape)}"
            )
    model.load_state_dict(state, assign=True)
    return model.eval()
