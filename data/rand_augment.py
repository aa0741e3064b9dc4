"""RandAugment (arXiv 1909.13719) as timm's `rand-m9-mstd0.5` does it with PIL, for a batch of tensors.

The 15 operations are three families, and every operation outside a family is that family's identity: a table
of 256 entries per channel (AutoContrast, Equalize, Invert, Posterize, Solarize, SolarizeAdd), a blend with a
degenerate image (Color, Contrast, Brightness, Sharpness), an affine map (Rotate, ShearX/Y, TranslateX/YRel).
So a batch with any mixture of operations is one table look-up, one blend and one resampling with per-sample
parameters, which needs no decision on the host: the path for GPUs and for torch.compile. On a CPU the samples
are grouped by operation instead, so that the cost is that of the operations that were drawn; both paths give
the same bits.
Claim: tables and blends equal PIL's bit for bit; affine maps are at most 1 off, where rounding decides.
Check: `pytest tests/test_rand_augment.py`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from data.sampling import RAND_AUGMENT
from repghost.errors import UserError

# timm.data.auto_augment's non-increasing set, in its order. NONE: drawn, but not applied.
OPERATIONS = (
    "AutoContrast", "Equalize", "Invert", "Rotate", "Posterize", "Solarize", "SolarizeAdd", "Color",
    "Contrast", "Brightness", "Sharpness", "ShearX", "ShearY", "TranslateXRel", "TranslateYRel",
)  # fmt: skip
(
    AUTO_CONTRAST, EQUALIZE, INVERT, ROTATE, POSTERIZE, SOLARIZE, SOLARIZE_ADD, COLOR, CONTRAST,
    BRIGHTNESS, SHARPNESS, SHEAR_X, SHEAR_Y, TRANSLATE_X, TRANSLATE_Y, NONE,
) = range(len(OPERATIONS) + 1)  # fmt: skip

MAX_LEVEL = 10.0
_COLUMNS = 5  # of one operation: choice, apply, magnitude, sign, interpolation
MAX_OPERATIONS = (RAND_AUGMENT.stop - RAND_AUGMENT.start) // _COLUMNS


@dataclass(frozen=True)
class RandAugment:
    """The values of a policy.

    operations: how many a sample draws; magnitude, magnitude_std: of the normal distribution of levels, which
    is cut to 0 to 10; probability: that a drawn operation is applied; fill: the value (0 to 255) of each
    channel in what an affine map uncovers.
    """

    operations: int
    magnitude: float
    magnitude_std: float
    probability: float
    fill: Sequence[float]

    def __post_init__(self) -> None:
        if not 0 <= self.operations <= MAX_OPERATIONS:
            raise UserError(f"rand_augment.operations is {self.operations}; choose 0 to {MAX_OPERATIONS}")

    def __call__(self, images: Tensor, uniforms: Tensor, grouped: bool) -> Tensor:
        """uint8 [N, 3, H, W] -> the same, augmented by the draws float32 [N, DRAWS]."""
        for step in range(self.operations):
            images = apply_operations(images, *self.draw(uniforms, step), self.fill, grouped)
        return images

    def draw(self, uniforms: Tensor, step: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The `step`-th operation, level, negative and bicubic of every sample, see `apply_operations`."""
        first = RAND_AUGMENT.start + step * _COLUMNS
        draws = uniforms[:, first : first + _COLUMNS].double()
        choice, apply, magnitude, sign, interpolation = draws.unbind(1)
        operation = (choice * len(OPERATIONS)).floor().long()
        operation = torch.where(apply < self.probability, operation, NONE)
        # Draws are multiples of 2^-24 from 0 on: the centres of their cells keep it finite and symmetric.
        normal = torch.special.ndtri(magnitude + 2.0**-25)
        level = (self.magnitude + self.magnitude_std * normal).clamp(0.0, MAX_LEVEL)
        return operation, level, sign < 0.5, interpolation >= 0.5


def apply_operations(
    images: Tensor,
    operation: Tensor,
    level: Tensor,
    negative: Tensor,
    bicubic: Tensor,
    fill: Sequence[float],
    grouped: bool,
) -> Tensor:
    """Apply one operation to every sample.

    images: uint8 [N, 3, H, W]; operation: int64 [N], an index into OPERATIONS or NONE; level: float64 [N], 0
    to 10; negative: bool [N], the sign of a rotation, shear or translation; bicubic: bool [N], its
    interpolation; fill: the value of each channel outside the image; grouped: by operation, which needs the
    values on the host, or all samples alike, without a host synchronisation; the bits are the same.
    Returns uint8 [N, 3, H, W].
    """
    if not grouped:
        images = look_up(images, tables(images, operation, level))
        images = enhance(images, operation, level)
        matrix = matrices(operation, level, negative, images.shape[2], images.shape[3])
        return affine(images, matrix, bicubic, fill)

    output = images.clone()
    for index, name, cubic in _groups(operation, bicubic):
        chosen, strength = images[index], level[index]
        if name in _TABLES:
            output[index] = look_up(chosen, _TABLES[name](chosen, strength))
        elif name in _DEGENERATES:
            pixels = chosen.float()
            output[index] = blend(_DEGENERATES[name](pixels), pixels, _factor(strength)).byte()
        elif name != NONE:
            matrix = matrices(operation[index], strength, negative[index], images.shape[2], images.shape[3])
            output[index] = affine(chosen, matrix, cubic, fill)
    return output


def _groups(operation: Tensor, bicubic: Tensor) -> list[tuple[Tensor, int, bool]]:
    """Indices int64 [n] of the samples that share an operation and an interpolation, with both."""
    keys = 2 * operation + bicubic
    return [((keys == key).nonzero().flatten(), key // 2, key % 2 == 1) for key in keys.unique().tolist()]


# Tables: int64 [N, 3 or 1, 256], the new value of every old one. Formulas: PIL.ImageOps, levels: timm.


def _values(like: Tensor) -> Tensor:
    return torch.arange(256, device=like.device).view(1, 1, 256)


def _rounded_down(level: Tensor, scale: float, most: float) -> Tensor:
    """int64 [N, 1, 1]: the integer argument int(level / 10 * scale) of an operation."""
    return (level / MAX_LEVEL * scale).floor().clamp(max=most).long().view(-1, 1, 1)


def _auto_contrast(images: Tensor, level: Tensor) -> Tensor:
    values = images.flatten(2).int()  # compiled for a CPU, torch 2.14's amin of uint8 begins at 0
    low = values.amin(2, keepdim=True).double()
    high = values.amax(2, keepdim=True).double()
    span = (high - low).clamp(min=1.0)
    scale = torch.full_like(span, 255.0) / span  # torch makes `255.0 / span` a product, which rounds twice
    stretched = (_values(images) * scale - low * scale).clamp(0.0, 255.0).long()
    return torch.where(high > low, stretched, _values(images))


def _equalize(images: Tensor, level: Tensor) -> Tensor:
    count = _histograms(images)
    last = (_values(images) * (count > 0)).amax(2, keepdim=True)
    step = (count.sum(2, keepdim=True) - count.gather(2, last)) // 255
    below = count.cumsum(2) - count
    equalized = ((step // 2 + below) // step.clamp(min=1)).clamp(max=255)
    return torch.where(step > 0, equalized, _values(images))


def _histograms(images: Tensor) -> Tensor:
    """int64 [N, 3, 256]: how many pixels of uint8 [N, 3, H, W] have each value."""
    values = images.flatten(2).long()
    zeros = torch.zeros(*values.shape[:2], 256, dtype=torch.int32, device=images.device)
    return zeros.scatter_add_(2, values, torch.ones_like(values, dtype=torch.int32)).long()


def _invert(images: Tensor, level: Tensor) -> Tensor:
    return 255 - _values(images)


def _posterize(images: Tensor, level: Tensor) -> Tensor:
    dropped = 8 - _rounded_down(level, 4, 4)
    return _values(images) >> dropped << dropped


def _solarize(images: Tensor, level: Tensor) -> Tensor:
    values = _values(images)
    return torch.where(values < _rounded_down(level, 256, 256), values, 255 - values)


def _solarize_add(images: Tensor, level: Tensor) -> Tensor:
    values = _values(images)
    return torch.where(values < 128, (values + _rounded_down(level, 110, 128)).clamp(max=255), values)


_TABLES: dict[int, Callable[[Tensor, Tensor], Tensor]] = {
    AUTO_CONTRAST: _auto_contrast,
    EQUALIZE: _equalize,
    INVERT: _invert,
    POSTERIZE: _posterize,
    SOLARIZE: _solarize,
    SOLARIZE_ADD: _solarize_add,
}


def tables(images: Tensor, operation: Tensor, level: Tensor) -> Tensor:
    """int64 [N, 3, 256]: the table of every sample's operation, the identity where it has none."""
    selected = _values(images).expand(len(images), 3, 256)
    for name, table in _TABLES.items():
        selected = torch.where((operation == name).view(-1, 1, 1), table(images, level), selected)
    return selected


def look_up(images: Tensor, table: Tensor) -> Tensor:
    """uint8 [N, 3, H, W] through the tables int64 [N or 1, 3 or 1, 256]."""
    table = table.byte().expand(len(images), 3, 256)
    return table.gather(2, images.flatten(2).long()).view(images.shape)


# Blends (PIL.ImageEnhance), on float32 that holds the integers 0 to 255: exact, as sums stay below 2^24.


def blend(degenerate: Tensor, pixels: Tensor, factor: Tensor) -> Tensor:
    """PIL.Image.blend: from the degenerate image (factor 0) to the image (1) and beyond, clipped, truncated.

    degenerate: float32, broadcastable to pixels, float32 [N, 3, H, W]; factor: float32 [N, 1, 1, 1].
    """
    return (pixels - degenerate).mul_(factor).add_(degenerate).clamp_(0.0, 255.0).floor_()


def grey(pixels: Tensor) -> Tensor:
    """float32 [N, 1, H, W]: PIL's conversion to "L", ITU-R 601-2 luma in 16-bit fixed point; no sum is rounded."""
    red, green, blue = pixels.split(1, dim=1)
    weighted = (red * (19595 / 65536)).add_(green, alpha=38470 / 65536).add_(blue, alpha=7471 / 65536)
    return weighted.add_(0.5).floor_()


def mean_grey(luma: Tensor) -> Tensor:
    """float32 [N, 1, 1, 1]: the rounded mean of float32 [N, 1, H, W]; sums of rows are exact in float32."""
    total = luma.sum(3, keepdim=True).double().sum(2, keepdim=True)
    return (total / (luma.shape[2] * luma.shape[3]) + 0.5).floor().float()


def smooth(pixels: Tensor) -> Tensor:
    """PIL.ImageFilter.SMOOTH: the mean of 3 x 3 pixels, the middle one counted five times; borders stay."""
    rows = pixels[..., :-2] + pixels[..., 1:-1] + pixels[..., 2:]
    total = rows[..., :-2, :] + rows[..., 1:-1, :] + rows[..., 2:, :] + 4 * pixels[..., 1:-1, 1:-1]
    smoothed = pixels.clone()
    smoothed[..., 1:-1, 1:-1] = ((total + 6.5) / 13).floor()
    return smoothed


def _factor(level: Tensor) -> Tensor:
    """float32 [N, 1, 1, 1] in 0.1 to 1.9: timm's strength of an enhancement."""
    return (level / MAX_LEVEL * 1.8 + 0.1).float().view(-1, 1, 1, 1)


_DEGENERATES: dict[int, Callable[[Tensor], Tensor]] = {
    COLOR: grey,
    CONTRAST: lambda pixels: mean_grey(grey(pixels)),
    BRIGHTNESS: lambda pixels: torch.zeros_like(pixels[:, :1, :1, :1]),
    SHARPNESS: smooth,
}


def enhance(images: Tensor, operation: Tensor, level: Tensor) -> Tensor:
    """uint8 [N, 3, H, W]: the blend of every sample's operation, a factor of 1 where it has none."""
    operation = operation.view(-1, 1, 1, 1)
    pixels = images.float()
    degenerate, factor = torch.zeros_like(pixels), torch.ones_like(level).float().view(-1, 1, 1, 1)
    for name, function in _DEGENERATES.items():
        degenerate = torch.where(operation == name, function(pixels), degenerate)
        factor = torch.where(operation == name, _factor(level), factor)
    return blend(degenerate, pixels, factor).byte()


# Affine maps, as PIL.Image.transform(AFFINE) and PIL.Image.rotate.


def matrices(operation: Tensor, level: Tensor, negative: Tensor, height: int, width: int) -> Tensor:
    """float64 [N, 6], (a, b, c, d, e, f): what is at (ax + by + c, dx + ey + f) comes to (x, y).

    Rotations are about the centre of the image; the identity where an operation is of another family.
    """
    signed = torch.where(negative, -level, level) / MAX_LEVEL
    zero = torch.zeros_like(signed)

    def amount(name: int, most: float) -> Tensor:
        return torch.where(operation == name, signed * most, zero)

    angle = torch.deg2rad(-amount(ROTATE, 30.0))
    cosine, sine = angle.cos(), angle.sin()
    x, y = width / 2, height / 2
    return torch.stack(
        [
            cosine,
            sine + amount(SHEAR_X, 0.3),
            x - (cosine * x + sine * y) + amount(TRANSLATE_X, 0.45) * width,
            -sine + amount(SHEAR_Y, 0.3),
            cosine,
            y - (cosine * y - sine * x) + amount(TRANSLATE_Y, 0.45) * height,
        ],
        dim=1,
    )


def affine(images: Tensor, matrix: Tensor, bicubic: Tensor | bool, fill: Sequence[float]) -> Tensor:
    """Resample uint8 [N, 3, H, W] at the points that float64 [N, 6] gives for the centres of its pixels.

    As PIL does it: values beyond the border repeat it, a point outside the image becomes `fill`, results are
    cut to integers. bicubic: bool [N], or one bool for all, which saves the outer taps of a bilinear batch.
    """
    height, width = images.shape[2:]
    a, b, c, d, e, f = matrix.view(-1, 6, 1, 1).unbind(1)
    x = torch.arange(width, device=images.device).double() + 0.5
    y = torch.arange(height, device=images.device).double().unsqueeze(1) + 0.5
    x, y = a * x + (b * y + c), d * x + (e * y + f)  # [N, H, W]
    inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
    x, y = x - 0.5, y - 0.5
    left, top = x.floor(), y.floor()
    right_share, lower_share = (x - left).float().unsqueeze(1), (y - top).float().unsqueeze(1)
    left, top = left.long(), top.long()

    pixels = images.float()
    flat = pixels.flatten(2)
    taps = (0, 1) if bicubic is False else (-1, 0, 1, 2)
    columns = [(left + tap).clamp(0, width - 1) for tap in taps]
    rows = []
    for tap in taps:
        start = (top + tap).clamp(0, height - 1) * width
        indices = [(start + column).view(-1, 1, height * width).expand_as(flat) for column in columns]
        gathered = [flat.gather(2, index).view(pixels.shape) for index in indices]
        rows.append(_interpolate(gathered, right_share, bicubic))
    values = _interpolate(rows, lower_share, bicubic).clamp(0.0, 255.0).floor()
    # A selection by weights 0 and 1, which are exact: on a CPU ten times as fast as torch.where.
    return torch.lerp(channels(fill, values), values, inside.unsqueeze(1).float()).byte()


def _interpolate(taps: Sequence[Tensor], share: Tensor, bicubic: Tensor | bool) -> Tensor:
    """Between the two middle taps at `share` of their distance: a line or PIL's cubic (a = -1).

    The cubic is first + s (p + s (q + s r)) with p = second - before, q = 2 (before - first) + (second -
    after) and r = -(before - first) - (second - after); integer taps keep p, q and r exact.
    """
    if bicubic is False:
        return torch.lerp(taps[0], taps[1], share)
    before, first, second, after = taps
    rise, fall = before - first, second - after
    both = rise + fall
    curve = torch.addcmul(rise + both, both, share, value=-1)
    curve = torch.addcmul(second - before, curve, share)
    curve = torch.addcmul(first, curve, share)
    if bicubic is True:
        return curve
    return torch.where(bicubic.view(-1, 1, 1, 1), curve, torch.lerp(first, second, share))


def channels(values: Sequence[float], like: Tensor) -> Tensor:
    """[1, C, 1, 1] of like's dtype and device, by fills: a copy from the host would wait for the device."""
    return torch.stack([like.new_full((), float(value)) for value in values]).view(1, -1, 1, 1)
