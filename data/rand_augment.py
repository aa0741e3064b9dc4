"""RandAugment (arXiv 1909.13719) as timm's `rand-m9-mstd0.5` does it with PIL, for a batch of tensors.

The 15 operations are three families, and every operation outside a family is that family's identity: a table
of 256 entries per channel (AutoContrast, Equalize, Invert, Posterize, Solarize, SolarizeAdd), a blend with a
degenerate image (Color, Contrast, Brightness, Sharpness), an affine map (Rotate, ShearX/Y, TranslateX/YRel).
So rows with any mixture of operations take one table look-up, one blend and one resampling with parameters for each
row: the path for GPUs and for torch.compile, where the host decides beforehand which rows a family is computed for
(`data.row_plan`). On a CPU the samples are grouped by operation instead. Both paths give the same bits.
Claim: tables and blends equal PIL's bit for bit; affine maps are at most 1 off, where rounding decides.
Check: `pytest tests/test_rand_augment.py`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from data.pil_ops import affine, black, blend, grey, mean_grey, smooth
from data.row_plan import RowPlan, plan_rows
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

# A list of rows is made for each of these. Equalize has its own, as counting pixels costs more than all other tables.
FAMILIES = (
    (EQUALIZE,),
    (AUTO_CONTRAST, INVERT, POSTERIZE, SOLARIZE, SOLARIZE_ADD),
    (COLOR, CONTRAST, BRIGHTNESS, SHARPNESS),
    (ROTATE, SHEAR_X, SHEAR_Y, TRANSLATE_X, TRANSLATE_Y),
)
_BLENDS, _AFFINE = FAMILIES[2:]
_FAMILY_OF = [next((i for i, family in enumerate(FAMILIES) if name in family), -1) for name in range(NONE + 1)]

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

    def __call__(self, images: Tensor, uniforms: Tensor, rows: Sequence[Tensor] | None) -> Tensor:
        """uint8 [N, 3, H, W] -> the same, augmented as float32 [N, NUM_UNIFORMS] says.

        rows: of `plan`, a list for each step and family, or None, see `apply`.
        """
        for step in range(self.operations):
            lists = None if rows is None else rows[step * len(FAMILIES) :][: len(FAMILIES)]
            images = self.apply(images, *self.draw(uniforms, step), lists)
        return images

    def plan(self, uniforms: Tensor) -> RowPlan:
        """The rows that draw an operation of each family, in every step; uniforms: float32 [N, NUM_UNIFORMS] on a CPU.

        In pinned memory if the uniforms are, so that the copy to the device does not wait.
        """
        columns = uniforms[:, RAND_AUGMENT].double().unflatten(1, (MAX_OPERATIONS, _COLUMNS))[:, : self.operations]
        family = torch.tensor(_FAMILY_OF)[self._operation(columns[..., 0], columns[..., 1])]  # [N, operations]
        needed = (family.T.unsqueeze(1) == torch.arange(len(FAMILIES)).unsqueeze(1)).flatten(0, 1)
        shares = [self.probability * len(family) / len(OPERATIONS) for family in FAMILIES] * self.operations
        order, counts = plan_rows(needed, shares)
        return RowPlan(order.pin_memory() if uniforms.is_pinned() else order, counts)

    def _operation(self, choice: Tensor, apply: Tensor) -> Tensor:
        """int64: what is drawn by two uniforms, as float64."""
        return torch.where(apply < self.probability, (choice * len(OPERATIONS)).floor().long(), NONE)

    def draw(self, uniforms: Tensor, step: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The `step`-th operation, level, negative and bicubic of every sample, see `apply`."""
        first = RAND_AUGMENT.start + step * _COLUMNS
        columns = uniforms[:, first : first + _COLUMNS].double()
        choice, apply, magnitude, sign, interpolation = columns.unbind(1)
        # Uniforms are multiples of 2^-24 from 0 on: the centres of their cells keep it finite and symmetric.
        normal = torch.special.ndtri(magnitude + 2.0**-25)
        level = (self.magnitude + self.magnitude_std * normal).clamp(0.0, MAX_LEVEL)
        return self._operation(choice, apply), level, sign < 0.5, interpolation >= 0.5

    def apply(
        self,
        images: Tensor,
        operation: Tensor,
        level: Tensor,
        negative: Tensor,
        bicubic: Tensor,
        rows: Sequence[Tensor] | None,
    ) -> Tensor:
        """Applies one operation to every sample.

        images: uint8 [N, 3, H, W]; operation: int64 [N], an index into OPERATIONS or NONE; level: float64 [N], 0
        to 10; negative: bool [N], the sign of a rotation, shear or translation; bicubic: bool [N], its
        interpolation; rows: for each of FAMILIES int64 [any], all rows whose operation is of the family and any others,
        none of them twice, which takes no host synchronisation; None: the samples are grouped by operation, which needs
        the values on the host. The bits are the same. Returns uint8 [N, 3, H, W].
        """
        output = images.clone()
        if rows is not None:
            for family, index in zip(FAMILIES, rows, strict=True):
                chosen, name, strength = output[index], operation[index], level[index]
                if family == _AFFINE:
                    matrix = matrices(name, strength, negative[index], *images.shape[2:])
                    chosen = affine(chosen, matrix, bicubic[index], self.fill)
                elif family == _BLENDS:
                    chosen = enhance(chosen, name, strength)
                else:
                    chosen = look_up(chosen, tables(chosen, name, strength, family))
                output.index_copy_(0, index, chosen)
            return output

        keys = 2 * operation + bicubic
        for key in keys.unique().tolist():
            index, name, cubic = (keys == key).nonzero().flatten(), key // 2, key % 2 == 1
            chosen, strength = images[index], level[index]
            if name in _TABLES:
                output[index] = look_up(chosen, _TABLES[name](chosen, strength))
            elif name in _DEGENERATES:
                pixels = chosen.float()
                output[index] = blend(_DEGENERATES[name](pixels), pixels, _factor(strength)).byte()
            elif name != NONE:
                matrix = matrices(operation[index], strength, negative[index], *images.shape[2:])
                output[index] = affine(chosen, matrix, cubic, self.fill)
        return output


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
    old = images.flatten(2).long()
    count = torch.zeros(*old.shape[:2], 256, dtype=torch.int32, device=images.device)
    count = count.scatter_add_(2, old, torch.ones_like(old, dtype=torch.int32)).long()  # pixels of each value
    last = (_values(images) * (count > 0)).amax(2, keepdim=True)
    step = (count.sum(2, keepdim=True) - count.gather(2, last)) // 255
    below = count.cumsum(2) - count
    equalized = ((step // 2 + below) // step.clamp(min=1)).clamp(max=255)
    return torch.where(step > 0, equalized, _values(images))


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
    INVERT: lambda images, level: 255 - _values(images),
    POSTERIZE: _posterize,
    SOLARIZE: _solarize,
    SOLARIZE_ADD: _solarize_add,
}


def tables(images: Tensor, operation: Tensor, level: Tensor, family: Sequence[int]) -> Tensor:
    """int64 [N, 3, 256]: the table of every sample's operation, the identity where that is not one of `family`."""
    selected = _values(images).expand(len(images), 3, 256)
    for name in family:
        selected = torch.where((operation == name).view(-1, 1, 1), _TABLES[name](images, level), selected)
    return selected


def look_up(images: Tensor, table: Tensor) -> Tensor:
    """uint8 [N, 3, H, W] through the tables int64 [N or 1, 3 or 1, 256]."""
    table = table.byte().expand(len(images), 3, 256)
    return table.gather(2, images.flatten(2).long()).view(images.shape)


# Blends (PIL.ImageEnhance) with a degenerate image, by a factor.


def _factor(level: Tensor) -> Tensor:
    """float32 [N, 1, 1, 1] in 0.1 to 1.9: timm's strength of an enhancement."""
    return (level / MAX_LEVEL * 1.8 + 0.1).float().view(-1, 1, 1, 1)


_DEGENERATES = {COLOR: grey, CONTRAST: mean_grey, BRIGHTNESS: black, SHARPNESS: smooth}


def enhance(images: Tensor, operation: Tensor, level: Tensor) -> Tensor:
    """uint8 [N, 3, H, W]: the blend of every sample's operation, a factor of 1 where it has none."""
    operation = operation.view(-1, 1, 1, 1)
    pixels = images.float()
    degenerate, factor = torch.zeros_like(pixels), torch.ones_like(level).float().view(-1, 1, 1, 1)
    for name, function in _DEGENERATES.items():
        degenerate = torch.where(operation == name, function(pixels), degenerate)
        factor = torch.where(operation == name, _factor(level), factor)
    return blend(degenerate, pixels, factor).byte()


# Affine maps (PIL.Image.transform and PIL.Image.rotate).


def matrices(operation: Tensor, level: Tensor, negative: Tensor, height: int, width: int) -> Tensor:
    """float64 [N, 6], (a, b, c, d, e, f): what is at (ax + by + c, dx + ey + f) comes to (x, y).

    Rotations are about the centre of the image; the identity where an operation is of another family.
    """
    signed = torch.where(negative, -level, level) / MAX_LEVEL

    def amount(name: int, most: float) -> Tensor:
        return torch.where(operation == name, signed * most, 0.0)

    angle = torch.deg2rad(-amount(ROTATE, 30.0))
    cosine, sine = angle.cos(), angle.sin()
    x, y = width / 2, height / 2
    b, d = sine + amount(SHEAR_X, 0.3), -sine + amount(SHEAR_Y, 0.3)
    c = x - (cosine * x + sine * y) + amount(TRANSLATE_X, 0.45) * width
    f = y - (cosine * y - sine * x) + amount(TRANSLATE_Y, 0.45) * height
    return torch.stack([cosine, b, c, d, cosine, f], dim=1)
