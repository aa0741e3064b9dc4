"""From decoded, cropped images to the network: flip, colour, RandAugment, normalize, erase, on batches.

One implementation for both loaders, on the training device. Every decision, and the noise of erased pixels, comes from
the uniforms of `data.sampling`. Two paths give the same bits: one takes the whole batch and never waits for the device
(GPUs, torch.compile), where the host has chosen the rows for each operation of RandAugment; the other takes the samples
one by one, which a CPU's cache holds.
Claim: colour jitter equals torchvision's on PIL images bit for bit; RandAugment: see `data.rand_augment`.
Check: `pytest tests/test_augment.py`.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import Any, TypeVar

import torch
from torch import Tensor

from data import sampling
from data.erase import Erase, erase, erase_in_place, normal_quantiles
from data.pil_ops import black, blend, channels, grey, mean_grey
from data.rand_augment import FAMILIES, RandAugment
from data.row_plan import RowPlan, every_row
from data.sampling import between
from repghost.errors import UserError, run_command

Colour = tuple[Tensor, Tensor]  # factors and order of `jitter`

BRIGHTNESS, CONTRAST, SATURATION = range(3)
DEGENERATES = (black, mean_grey, grey)  # what a factor of 0 leaves
ORDERS = tuple(permutations(range(3)))  # lexicographic, which `_mixed_order` computes with

# Each product and sum rounded by itself and divisions rounded correctly, as without torch.compile: contracted to fused
# multiply-adds, some values fall on the other side of the floor that makes them integers again.
_AS_EAGER: dict[str, Any] = {"emulate_precision_casts": True, "eager_numerics.division_rounding": True}


@dataclass(frozen=True)
class Jitter:
    """Colour jitter: for each strength s a factor uniform in [1 - s, 1 + s], never below 0; s = 0 is off."""

    brightness: float
    contrast: float
    saturation: float

    def draw(self, uniforms: Tensor) -> tuple[Tensor, Tensor]:
        """Factors float32 [N, 3] and orders int64 [N] of `jitter`, from float32 [N, NUM_UNIFORMS]."""
        strengths = (self.brightness, self.contrast, self.saturation)
        shares = uniforms[:, sampling.JITTER].unbind(1)
        factors = [between(u, max(0.0, 1 - s), 1 + s) for u, s in zip(shares, strengths, strict=True)]
        order = (uniforms[:, sampling.JITTER_ORDER].double() * len(ORDERS)).floor().long()
        return torch.stack(factors, dim=1), order


class Normalize:
    """uint8 [N, 3, H, W] to normalized float32 [N, 3, H, W]; mean, std: of each channel, of pixels in [0, 1]."""

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        self.mean = tuple(255.0 * value for value in mean)
        self.std = tuple(255.0 * value for value in std)

    def evaluate(self, images: Tensor, out: Tensor | None = None) -> Tensor:
        """Normalizes uint8 [N, 3, H, W], or float32 of the same values, and does nothing else: float32, into `out`."""
        pixels = images.float()
        return torch.sub(pixels, channels(self.mean, pixels), out=out).div_(channels(self.std, pixels))


class Augment(Normalize):
    """uint8 [N, 3, H, W] to normalized float32 [N, 3, H, W], for training and for evaluation.

    flip: probability of a horizontal flip; jitter, rand_augment, erase: the values of `Jitter`, `RandAugment` and
    `Erase`, or None for without; mean, std: of each channel, of pixels scaled to [0, 1]. A key that is missing or
    unknown is an error.
    """

    def __init__(
        self,
        flip: float,
        jitter: Mapping[str, Any] | None,
        rand_augment: Mapping[str, Any] | None,
        erase: Mapping[str, Any] | None,
        mean: Sequence[float],
        std: Sequence[float],
    ) -> None:
        super().__init__(mean, std)
        self.flip = flip
        self.jitter = _options(Jitter, "jitter", jitter)
        self.rand_augment = _options(RandAugment, "rand_augment", rand_augment)
        self.erase = _options(Erase, "erase", erase)
        self._quantiles = None if self.erase is None else normal_quantiles()
        self._output: dict[str, Any] = {"dtype": torch.float32}

    def match_step(self, device: torch.device, precision: str, channels_last: bool) -> None:
        """Makes `train` return images as the network's first convolution reads them, which saves the step a copy.

        device: of the training; precision: Lightning's name of it; channels_last: whether the network's weights are.
        On a GPU with bf16-mixed, images become bfloat16 in channels_last. That is exact: nothing but that convolution
        reads the images, and autocast would round them to bfloat16 for it in the same way. All other trainings get
        float32, and so does evaluation, which runs without autocast.
        """
        if device.type == "cuda" and precision == "bf16-mixed" and channels_last:
            self._output = {"dtype": torch.bfloat16, "memory_format": torch.channels_last}

    def plan(self, uniforms: Tensor) -> RowPlan:
        """The rows for each operation of RandAugment in `train`; uniforms: float32 [N, NUM_UNIFORMS] on a CPU."""
        if self.rand_augment is None:
            return every_row(0, len(uniforms), uniforms.device)
        return self.rand_augment.plan(uniforms)

    def train(self, images: Tensor, uniforms: Tensor, plan: RowPlan | None = None) -> Tensor:
        """Augment and normalize: float32 [N, 3, H, W], or what `match_step` asks for.

        images: uint8 [N, 3, H, W]; uniforms: float32 [N, NUM_UNIFORMS] on the same device; plan: what `plan` returned
        for these uniforms. Without one, a CPU takes the samples one by one and a GPU computes everything for all rows.
        """
        if plan is None:
            if images.device.type == "cpu" and not torch.compiler.is_compiling():
                return self._train_one_by_one(images, uniforms)
            lists = 0 if self.rand_augment is None else self.rand_augment.operations * len(FAMILIES)
            plan = every_row(lists, len(images), images.device)
        plan = plan._replace(order=plan.order.to(images.device, non_blocking=True))
        if self._quantiles is not None:
            self._quantiles = self._quantiles.to(images.device)
        return self._train_batch(images, uniforms, plan, self._quantiles)

    def compile(self) -> None:
        """Compiles the path that takes the whole batch; batches of another shape are compiled anew."""
        self._train_batch = torch.compile(  # type: ignore[method-assign]
            self._train_batch, fullgraph=True, dynamic=False, options=_AS_EAGER
        )

    def _train_batch(self, images: Tensor, uniforms: Tensor, plan: RowPlan, quantiles: Tensor | None) -> Tensor:
        colour, boxes = self._draw(images, uniforms)
        pixels = self._pixels(images, uniforms, colour, plan.rows())
        if boxes is not None and quantiles is not None:
            pixels = erase(pixels, boxes, uniforms[:, sampling.ERASE_NOISE], quantiles)
        return pixels.to(**self._output)

    def _train_one_by_one(self, images: Tensor, uniforms: Tensor) -> Tensor:
        colour, boxes = self._draw(images, uniforms)  # once: drawing for every sample would cost more
        result = torch.empty_like(images, dtype=torch.float32)
        for sample in map(slice, range(len(images)), range(1, len(images) + 1)):  # one fits a core's cache
            part = colour and (colour[0][sample], colour[1][sample])
            self._pixels(images[sample], uniforms[sample], part, None, out=result[sample])
            if boxes is not None and self._quantiles is not None:
                keys = uniforms[sample, sampling.ERASE_NOISE]
                erase_in_place(result[sample], boxes[sample], keys, self._quantiles)
        return result

    def _draw(self, images: Tensor, uniforms: Tensor) -> tuple[Colour | None, Tensor | None]:
        """What `jitter` does, and the boxes to erase."""
        boxes = None if self.erase is None else self.erase.boxes(uniforms, *images.shape[2:])
        return None if self.jitter is None else self.jitter.draw(uniforms), boxes

    def _pixels(
        self,
        images: Tensor,
        uniforms: Tensor,
        colour: Colour | None,
        rows: Sequence[Tensor] | None,
        out: Tensor | None = None,
    ) -> Tensor:
        """All but the erasing, into `out`; rows: of a plan, or None if the values may be read on the host."""
        grouped = rows is None
        pixels = flip(images, uniforms[:, sampling.FLIP] < self.flip, grouped)
        if self.rand_augment is not None:
            pixels = self.rand_augment(pixels, uniforms, rows)
        return self.evaluate(pixels if colour is None else jitter(pixels, *colour, grouped), out)


def flip(images: Tensor, flipped: Tensor, grouped: bool) -> Tensor:
    """uint8 [N, 3, H, W], mirrored left to right where bool [N] says so."""
    if grouped and flipped.all() == flipped.any():  # as for a single sample
        return images.flip(3) if flipped.all() else images
    return torch.where(flipped.view(-1, 1, 1, 1), images.flip(3), images)


def jitter(images: Tensor, factors: Tensor, order: Tensor, grouped: bool) -> Tensor:
    """Brightness, contrast and saturation by factors float32 [N, 3], in the order ORDERS[order] (int64 [N]).

    images: uint8 [N, 3, H, W]; float32 of the integers 0 to 255, equal to torchvision's ColorJitter on PIL images.
    """
    pixels = images.float()
    if not grouped:
        for knob in _mixed_order(order):
            factor = factors.gather(1, knob.unsqueeze(1)).view(-1, 1, 1, 1)
            knob = knob.view(-1, 1, 1, 1)
            degenerate = torch.where(knob == SATURATION, grey(pixels), 0.0)
            degenerate = torch.where(knob == CONTRAST, mean_grey(pixels), degenerate)
            pixels = blend(degenerate, pixels, factor)
        return pixels

    for image, image_factors, sequence in zip(pixels.split(1), factors.tolist(), order.tolist(), strict=True):
        for knob in ORDERS[sequence]:
            blend(0.0 if knob == BRIGHTNESS else DEGENERATES[knob](image), image, image_factors[knob], out=image)
    return pixels


def _mixed_order(order: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """int64 [N] each: first, second and third entry of ORDERS[order], without a table on the device."""
    first = order // 2
    lower, upper = (first == 0).long(), 2 - (first == 2).long()  # the other two, ascending
    second = torch.where(order % 2 == 0, lower, upper)
    return first, second, 3 - first - second


T = TypeVar("T")


def _options(kind: Callable[..., T], name: str, values: Mapping[str, Any] | None) -> T | None:
    """A `kind` of exactly its own keys."""
    if values is None:
        return None
    try:  # plain tuples instead of the configuration's own lists, which torch.compile could not follow
        return kind(**{key: tuple(v) if isinstance(v, Sequence) else v for key, v in values.items()})
    except TypeError as error:
        raise UserError(f"{name}: {error}") from None


if __name__ == "__main__":  # python -m data.augment --show, the older name of python -m data.show
    from data.show import main

    sys.exit(run_command(lambda: main([argument for argument in sys.argv[1:] if argument != "--show"])))
