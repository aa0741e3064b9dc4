"""What PIL does to images, on batches of tensors: blends with a degenerate image, and the affine map.

Blends work on float32 that holds the integers 0 to 255; they are exact, as sums stay below 2^24.
Claim: blends equal PIL's bit for bit; the affine map is at most 1 off, where rounding decides.
Check: `pytest tests/test_rand_augment.py tests/test_augment.py`.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def blend(degenerate: Tensor | float, pixels: Tensor, factor: Tensor | float, out: Tensor | None = None) -> Tensor:
    """PIL.Image.blend: from the degenerate image (factor 0) to the image (1) and beyond, clipped, truncated.

    degenerate: float32, broadcastable to pixels, float32 [N, 3, H, W], or 0.0 for black; factor: a number or float32
    [N, 1, 1, 1]; out: what to write to, which may be `pixels`.
    """
    if isinstance(degenerate, float):  # black, which adds nothing
        return torch.mul(pixels, factor, out=out).clamp_(0.0, 255.0).floor_()
    return torch.sub(pixels, degenerate, out=out).mul_(factor).add_(degenerate).clamp_(0.0, 255.0).floor_()


def black(pixels: Tensor) -> Tensor:
    """float32 [N, 1, 1, 1]: what a brightness of 0 leaves."""
    return torch.zeros_like(pixels[:, :1, :1, :1])


def grey(pixels: Tensor) -> Tensor:
    """float32 [N, 1, H, W]: PIL's conversion to "L", ITU-R 601-2 luma in 16-bit fixed point; no sum is rounded."""
    red, green, blue = pixels.split(1, dim=1)
    weighted = (red * (19595 / 65536)).add_(green, alpha=38470 / 65536).add_(blue, alpha=7471 / 65536)
    return weighted.add_(0.5).floor_()


def mean_grey(pixels: Tensor) -> Tensor:
    """float32 [N, 1, 1, 1]: the rounded mean of `grey`, what a contrast of 0 leaves."""
    luma = grey(pixels)  # sums of rows are exact in float32
    total = luma.sum(3, keepdim=True).double().sum(2, keepdim=True)
    return (total / (luma.shape[2] * luma.shape[3]) + 0.5).floor().float()


def smooth(pixels: Tensor) -> Tensor:
    """PIL.ImageFilter.SMOOTH: the mean of 3 x 3 pixels, the middle one counted five times; borders stay."""
    rows = pixels[..., :-2] + pixels[..., 1:-1] + pixels[..., 2:]
    total = rows[..., :-2, :] + rows[..., 1:-1, :] + rows[..., 2:, :] + 4 * pixels[..., 1:-1, 1:-1]
    smoothed = pixels.clone()
    smoothed[..., 1:-1, 1:-1] = ((total + 6.5) / 13).floor()
    return smoothed


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
