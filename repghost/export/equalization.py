"""The same network with channels of a size that INT8 keeps: cross-layer equalization.

INT8 has one scale for all channels of a tensor. Where BatchNorm has left some of them a hundred times larger than
others, the small ones are rounded away. Between two convolutions, with at most a ReLU in between, a channel can be made
larger in the first and smaller in the second, and nothing else changes (Nagel et al., arXiv 1906.04721, section 4.1).
Where the second is depthwise, with a scale for each channel, that costs it nothing, and all channels are given the same
size. A dense one has a scale for each output, of all its channels: what the activations gain its weights lose. Of
several compromises (those of SmoothQuant, arXiv 2211.10438, and no change) the one with the least error is taken.
Factors are powers of 2, so that float32 gives the same bits as before.

The size of a channel is that of what its layers write, before a ReLU. Behind it, a channel that few images let through
looks small, and made larger it would be cut off for those that do.
Check: `pytest tests/test_quantize.py`; `python benchmarks/int8.py` measures what it gains.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from repghost.model import RepGhostNet, SqueezeExcite
from repghost.rounding import rounded_input, rounded_weight

LARGEST = 2.0**14  # ratio of two factors; a channel that is smaller still says nothing
SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)  # of the differences between channels that dense weights take over
PIXELS = 32  # of every image that the error is measured on


Layer = nn.Conv2d | nn.Linear


class Link(NamedTuple):
    """Channels that may be rescaled: every layer that writes them, and every layer that reads them."""

    writers: Sequence[Layer]
    readers: Sequence[Layer]


def links(model: RepGhostNet) -> Iterator[Link]:
    """All of a fused network, from its input to its output.

    A shortcut without a convolution adds a block's input to its output: blocks in such a chain share their channels.
    """
    writers, readers = [model.conv_stem], list[nn.Conv2d]()
    *stages, end = model.blocks
    for block in (block for stage in stages for block in _children(stage)):
        yield from _links_of_block(block)
        readers.append(block.ghost1.primary_conv[0])
        if isinstance(block.shortcut, nn.Identity):
            writers.append(block.ghost2.cheap_operation[0])
            continue
        if block.shortcut is not None:
            readers.append(block.shortcut[0])
        yield Link(writers, readers)
        writers, readers = [block.ghost2.cheap_operation[0]], []
        if block.shortcut is not None:
            writers.append(block.shortcut[2])
    last: nn.Conv2d = _children(end)[0].conv
    yield Link(writers, [*readers, last])
    yield Link([last], [model.conv_head])
    yield Link([model.conv_head], [model.classifier])


def _children(stage: nn.Module) -> list[Any]:
    return [*stage.children()]


def _links_of_block(block: Any) -> Iterator[Link]:
    """Those that do not leave a RepGhostBottleneck."""
    inner = [block.ghost1.primary_conv[0], block.ghost1.cheap_operation[0]]
    if isinstance(block.conv_dw, nn.Conv2d):
        inner.append(block.conv_dw)
    second, third = block.ghost2.primary_conv[0], block.ghost2.cheap_operation[0]
    for writer, reader in pairwise(inner):
        yield Link([writer], [reader])
    if isinstance(block.se, SqueezeExcite):
        yield Link([inner[-1]], [second, block.se.conv_reduce])
        yield Link([block.se.conv_reduce], [block.se.conv_expand])
    else:
        yield Link([inner[-1]], [second])
    yield Link([second], [third])
    if isinstance(block.shortcut, nn.Sequential):
        first, _, last, _ = _children(block.shortcut)
        yield Link([first], [last])


class Inputs:
    """What a layer gets: the range of every channel, [C] each, and some of its pixels, [N, C]."""

    def __init__(self, x: Tensor) -> None:
        flat = x.transpose(0, 1).flatten(1)
        self.low, self.high = flat.amin(1), flat.amax(1)
        step = max(1, flat.shape[1] // (PIXELS * len(x)))
        self.pixels = flat[:, ::step].T

    def add(self, other: "Inputs") -> None:
        self.low, self.high = torch.minimum(self.low, other.low), torch.maximum(self.high, other.high)
        self.pixels = torch.cat([self.pixels, other.pixels])


@torch.no_grad()
def equalize(model: RepGhostNet, batches: Sequence[Tensor]) -> RepGhostNet:
    """A copy of the fused `model` with equalized channels, and the same logits to the bit.

    batches: of images, float32 [N, 3, H, W], that show which range each channel has.
    """
    model = copy.deepcopy(model)
    found = list(links(model))
    inputs, written = _seen(model, found, batches)
    for link in found:
        largest = torch.stack([written[writer] for writer in link.writers]).amax(0)
        rescale(link, _factors(link.readers, [inputs[reader] for reader in link.readers], largest))
    return model


@torch.no_grad()
def rescale(link: Link, factors: Tensor) -> None:
    """Multiplies every channel of a link by its factor, [C], and divides by it where it is read."""
    for writer in link.writers:
        writer.weight.mul_(factors.view(-1, *[1] * (writer.weight.ndim - 1)))
        if writer.bias is not None:  # it has one, fused
            writer.bias.mul_(factors)
    for reader in link.readers:
        behind = reader.weight.ndim - (1 if _is_depthwise(reader) else 2)  # axes behind that of the inputs
        reader.weight.div_(factors.view(-1, *[1] * behind))


def _seen(
    model: RepGhostNet, found: Sequence[Link], batches: Sequence[Tensor]
) -> tuple[dict[Layer, Inputs], dict[Layer, Tensor]]:
    """What each reader gets, and the largest size of every channel that a writer writes, [C]."""
    inputs: dict[Layer, Inputs] = {}
    written: dict[Layer, Tensor] = {}

    def read(layer: Any, arguments: tuple[Tensor, ...]) -> None:
        seen = Inputs(arguments[0])
        if layer in inputs:
            inputs[layer].add(seen)
        else:
            inputs[layer] = seen

    def write(layer: Any, _: tuple[Tensor, ...], output: Tensor) -> None:
        largest = output.abs().transpose(0, 1).flatten(1).amax(1)
        written[layer] = torch.maximum(written.get(layer, largest), largest)

    hooks = [reader.register_forward_pre_hook(read) for reader in {reader for link in found for reader in link.readers}]
    hooks += [writer.register_forward_hook(write) for link in found for writer in link.writers]
    for images in batches:
        model(images)
    for hook in hooks:
        hook.remove()
    return inputs, written


def _factors(readers: Sequence[Layer], inputs: Sequence[Inputs], written: Tensor) -> Tensor:
    """What to multiply each channel by, [C], powers of 2. written: its largest size before a ReLU, [C]."""
    both = list(zip(readers, inputs, strict=True))
    # What is read may be larger: a sum with a block's input.
    largest = torch.stack([written, *(torch.maximum(-one.low, one.high) for one in inputs)]).amax(0)
    dense = [reader.weight.flatten(1).abs().amax(0) for reader in readers if not _is_depthwise(reader)]
    if not dense:
        # Rounded down: the largest channel, which decides the scale, stays as it is, and none gets a coarser one.
        return _powers(1 / largest, torch.floor)
    weights = torch.stack(dense).amax(0)
    candidates = [torch.ones_like(largest)]
    candidates += [_powers(weights ** (1 - share) / largest**share, torch.round, weights) for share in SHARES]
    return min(candidates, key=lambda factors: sum(_error(reader, one, factors) for reader, one in both))


def _powers(wanted: Tensor, whole: Callable[[Tensor], Tensor], weights: Tensor | None = None) -> Tensor:
    """Powers of 2 near `wanted`, as `whole` rounds the exponents, at most LARGEST apart.

    Where it is no number, nothing is known of a channel but its weights in dense layers: those become as large as the
    others' on average, so that they do not widen the range.
    """
    known = wanted.isfinite() & (wanted > 0)
    if not known.any():
        return torch.ones_like(wanted)
    if weights is not None:
        wanted = torch.where(known, wanted, weights / (weights[known] / wanted[known]).median())
        known = wanted.isfinite() & (wanted > 0)
    powers = whole((wanted / wanted[known].min()).log2()).exp2().clamp(1, LARGEST)
    return torch.where(known, powers, torch.ones_like(powers))


def _error(reader: Layer, inputs: Inputs, factors: Tensor) -> float:
    """Of the outputs of a layer in INT8, squared, as a share of their variance, the mean over the outputs.

    A depthwise layer is taken for the identity: its weights have a scale for each channel anyway.
    """
    seen = torch.cat([inputs.low * factors, inputs.high * factors])
    exact, rounded = inputs.pixels, rounded_input(inputs.pixels * factors, seen) / factors
    if not _is_depthwise(reader):
        weight = reader.weight.flatten(1)
        exact, rounded = exact @ weight.T, rounded @ (rounded_weight(weight / factors) * factors).T
    error, variance = (exact - rounded).square().mean(0), exact.var(0)
    return float((error / variance.clamp_min(torch.finfo(variance.dtype).tiny)).clamp_max(1).mean())


def _is_depthwise(layer: Layer) -> bool:
    return isinstance(layer, nn.Conv2d) and layer.groups > 1
