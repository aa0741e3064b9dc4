"""Image files outside of shards: finding them, reading them, and what evaluation does to their pixels.

The preprocessing is that of evaluation, by torchvision's own transforms: shorter side resized (bicubic, with
antialiasing), centre crop, ImageNet's mean and standard deviation. Like there, the EXIF orientation is not applied,
transparency is dropped and grey becomes RGB with three equal channels; 16 bits become 8.
Check: `pytest tests/test_predict.py`, which compares pixels with the validation loader's.
"""

import io
import os
from collections.abc import Iterable, Iterator
from urllib.request import Request, urlopen

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torchvision.transforms import v2

from repghost.errors import UserError

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
SCHEMES = ("http://", "https://", "file://")  # what is read as a URL
TIMEOUT = 30  # seconds without a byte from a server
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def evaluation_transform(image_size: int, crop_fraction: float) -> v2.Compose:
    """From a PIL image or uint8 [..., 3, H, W] to normalized float32 [..., 3, image_size, image_size].

    The shorter side becomes floor(image_size / crop_fraction), the centre is cut out. Raises UserError for sizes and
    fractions that no image has.
    """
    if image_size < 1:
        raise UserError(f"image_size={image_size}: give the side of the images in pixels")
    if not 0 < crop_fraction <= 1:
        raise UserError(f"crop_fraction={crop_fraction} is not in (0, 1]")
    return v2.Compose(
        [
            v2.ToImage(),
            v2.Resize(int(image_size / crop_fraction), v2.InterpolationMode.BICUBIC, antialias=True),
            v2.CenterCrop(image_size),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(MEAN, STD),
            v2.ToPureTensor(),
        ]
    )


def image_files(paths: Iterable[str | os.PathLike[str]]) -> Iterator[str]:
    """The image files that `paths` (files, folders, URLs) stand for, in their order; nothing is opened.

    A folder gives the files below it that have an image's extension, sorted by name within every folder; hidden ones
    are left out. Files and URLs come as they are, whatever their names. One folder's names at a time are in memory.
    """
    for path in (os.fspath(path) for path in paths):
        if not is_url(path) and os.path.isdir(path):
            yield from _walk(path)
        else:
            yield path


def is_url(path: str) -> bool:
    return path.startswith(SCHEMES)


def read_image(path: str) -> Image.Image:
    """The image in a file or at a URL, in RGB. Raises OSError or what PIL raises for content that is no image."""
    if is_url(path):
        # Some servers refuse clients without a name.
        with urlopen(Request(path, headers={"User-Agent": "repghost"}), timeout=TIMEOUT) as answer:
            content = answer.read()
    else:
        with open(path, "rb") as file:
            content = file.read()
    try:
        with Image.open(io.BytesIO(content)) as image:
            return to_rgb(image)
    except UnidentifiedImageError:  # PIL's message names the buffer
        raise UnidentifiedImageError("in no image format that PIL knows") from None


def to_rgb(image: Image.Image) -> Image.Image:
    """PIL's conversion to RGB, but 16 bits are scaled to 8, where PIL clips: most of such an image would be white."""
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image) // 257).astype(np.uint8)).convert("RGB")
    return image.convert("RGB")


def _walk(folder: str) -> Iterator[str]:
    entered: set[str] = set()  # links may lead in circles

    def stop(error: OSError) -> None:
        raise UserError(f"{error.filename}: {error.strerror}")

    for path, folders, names in os.walk(folder, onerror=stop, followlinks=True):
        if (real := os.path.realpath(path)) in entered:
            folders.clear()
            continue
        entered.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            if name.lower().endswith(EXTENSIONS) and not name.startswith("."):
                yield os.path.join(path, name)
