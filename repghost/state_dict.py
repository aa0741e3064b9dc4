"""State dicts of a RepGhostNet: which network their tensors belong to, and whether they are fit for use.

Wrappers (torch.compile, DistributedDataParallel, averages, modules around the network) put prefixes before the names;
files may hold other floating point types. Check: `pytest tests/test_weights.py`.
"""

import torch
from torch import Tensor

from repghost.errors import UserError
from repghost.model import WIDTHS, Reparam, RepGhostNet, round_channels

StateDict = dict[str, Tensor]

_STEM, _HEAD = "conv_stem.weight", "conv_head.weight"
_COUNTERS = {"n_averaged"}  # what torch's AveragedModel keeps beside the weights


def unwrapped(state: StateDict) -> StateDict:
    """The state dict without the prefix that a wrapper gave its names, such as "module._orig_mod.".

    Of several networks the averaged one is taken ("ema"). Names without the prefix stay, and do not fit later.
    """
    prefixes = [name.removesuffix(_STEM) for name in state if f".{name}".endswith(f".{_STEM}")]
    averaged = [prefix for prefix in prefixes if "ema" in prefix.replace("_", ".").split(".")]
    prefix = next(iter(averaged or prefixes), "")
    others = {name for name in state if any(name.startswith(other) for other in prefixes if other and other != prefix)}
    kept = state.keys() - _COUNTERS - (others if averaged else set())
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name in kept}


def width_of(state: StateDict) -> float | None:
    """The width that the shapes of the tensors tell: a published one, or one of two decimals; else None."""
    head = state.get(_HEAD)
    if head is None or head.ndim < 2:
        return None
    widths = [width for width in WIDTHS if round_channels(960 * width) == head.shape[1]]
    widths += [n / 100 for n in range(1, 1001) if round_channels(9.6 * n) == head.shape[1]]
    for width in widths:
        if width in WIDTHS:
            return width
        expected = network_of(state, "", width).state_dict()
        if all(tensor.shape == expected[name].shape for name, tensor in state.items() if name in expected):
            return width
    return None


def form_of(state: StateDict) -> str:
    return "fused" if "conv_stem.bias" in state else "training"


def network_of(state: StateDict, source: str, width: float | None) -> RepGhostNet:
    """A network without storage with the classes, input channels and form that the tensors of a state dict tell.

    width: None for the one that the shapes tell. Raises UserError that names `source` when there is none.
    """
    classifier, stem = (state.get(f"{name}.weight") for name in ("classifier", "conv_stem"))
    if classifier is None or stem is None or min(classifier.ndim, stem.ndim) < 2 or not stem.shape[1]:
        unknown = f"; the first of its tensors is {min(state)}" if state else ""
        raise UserError(f"{source}: these are not the weights of a RepGhostNet{unknown}")
    if width is None and (width := width_of(state)) is None:
        raise UserError(f"{source}: its tensors do not tell which width it has: give width=")
    fused = form_of(state) == "fused"
    reparam: Reparam = "bn" if fused or "blocks.0.0.ghost1.fusion_bn.0.weight" in state else "none"
    with torch.device("meta"):
        return RepGhostNet(width, len(classifier), stem.shape[1], reparam=reparam, fused=fused)


def fitted(state: StateDict, model: RepGhostNet, source: str) -> StateDict:
    """The tensors in the types of `model`.

    Raises UserError that names `source` and the first tensor for other names, shapes or kinds than those of `model`,
    and for values that no trained network has: NaN, infinities, negative variances.
    """
    expected = model.state_dict()
    missing, others = expected.keys() - state.keys(), state.keys() - expected.keys()
    if names := missing or others:
        what = "are missing" if missing else "do not belong"
        raise UserError(f"{source}: {len(names)} tensors of a RepGhostNet {what}, the first is {min(names)}")
    for name, tensor in state.items():
        if tensor.shape != expected[name].shape:
            head = state[_HEAD].shape[1:2]
            (other,) = [w for w in WIDTHS if head == (round_channels(960 * w),)] or (model.width,)
            found = f" but of width={other:g}" if other != model.width else ""
            shapes = f"{name} is {tuple(tensor.shape)}, not {tuple(expected[name].shape)}"
            raise UserError(f"{source}: these are not the weights of width={model.width:g}{found}: {shapes}")
    return {name: _usable(tensor, expected[name].dtype, f"{source}: {name}") for name, tensor in state.items()}


def _usable(tensor: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """`tensor` in `dtype`; it is not copied where it has it."""
    plain = tensor.layout == torch.strided and not tensor.is_meta and not tensor.is_quantized
    if not plain or tensor.is_complex() or (dtype.is_floating_point and not tensor.is_floating_point()):
        raise UserError(f"{name} is {tensor.dtype}, {tensor.layout}: weights are stored in floating point numbers")
    converted = tensor.to(dtype)
    if not bool(converted.isfinite().all()):
        raise UserError(f"{name} holds NaN or infinity: these weights are of no use")
    if name.endswith(".running_var") and bool((converted < 0).any()):
        raise UserError(f"{name} holds negative variances: these weights are of no use")
    return converted
