"""Image files outside of shards: finding them, reading them, and what evaluation does to their pixels.

The preprocessing is that of evaluation, by torchvision's own transforms: shorter side resized (bicubic, with
antialiasing), centre crop, ImageNet's mean and standard deviation. Like there, the EXIF orientation is not applied,
transparency is dropped and grey becomes RGB with three equal channels; 16 bits become 8.
Check: `pytest tests/test_predict.py`, which compares pixels with the validation loader's.
"""

import io
import os
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path
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
            yield from filter(is_image, walk_files(path))
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


def is_image(path: str) -> bool:
    """Whether a file has an image's extension and is not hidden; macOS writes a "._a.jpg" beside a.jpg."""
    name = os.path.basename(path)
    return name.lower().endswith(EXTENSIONS) and not name.startswith(".")


def walk_files(folder: str | os.PathLike[str]) -> Iterator[str]:
    """Every file below `folder`, sorted by name within every folder, without those in hidden folders.

    Links are followed, except to a folder that was visited before or that contains `folder`. Raises UserError for a
    folder that cannot be read.
    """
    visited = {str(parent) for parent in Path(folder).resolve().parents}

    def stop(error: OSError) -> None:
        raise UserError(f"{error.filename}: {error.strerror}")

    for path, folders, names in os.walk(folder, onerror=stop, followlinks=True):
        if (real := os.path.realpath(path)) in visited:
            folders.clear()
            continue
        visited.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            yield os.path.join(path, name)


def photographs(source: str | Path, count: int) -> list[Image.Image]:
    """Up to `count` images, in RGB, from a folder or from one tar file (a shard).

    A folder's are taken evenly from all of it, because it is sorted by class; a shard's are its first, because shards
    are shuffled. Raises UserError for a source without images, and for the first image that cannot be read.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        files = list(image_files([path]))
        chosen = [files[i] for i in np.linspace(0, len(files) - 1, min(count, len(files))).astype(int)]
        images = [_read(name, name) for name in chosen]
    elif path.is_file():
        images = _from_shard(path, count)
    else:
        raise UserError(f"{path}: no such folder or shard")
    if not images:
        raise UserError(f"{path}: no images in it; give a folder of images or a shard, which is a tar file")
    return images


def sample_photographs(count: int) -> tuple[list[Image.Image], str]:
    """`count` different crops of scikit-learn's two photographs, in RGB, and what they are in words.

    Raises UserError where scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_sample_images
    except ImportError:
        raise UserError("no photographs to check the export with: give check=FOLDER or check=SHARD.tar") from None
    photos = load_sample_images().images
    rng, crops = np.random.default_rng(0), []
    for i in range(count):
        photo = photos[i % len(photos)]
        height, width = (int(rng.integers(length // 3, length + 1)) for length in photo.shape[:2])
        top, left = (int(rng.integers(0, photo.shape[axis] - side + 1)) for axis, side in enumerate((height, width)))
        crops.append(Image.fromarray(photo[top : top + height, left : left + width]))
    return crops, f"{count} crops of {len(photos)} photographs"


def _from_shard(path: Path, count: int) -> list[Image.Image]:
    images: list[Image.Image] = []
    try:
        with tarfile.open(path, "r|*") as tar:
            for member in tar:
                if len(images) == count:
                    break
                if member.isfile() and member.name.lower().endswith(EXTENSIONS):
                    content = tar.extractfile(member)
                    assert content is not None
                    images.append(_read(io.BytesIO(content.read()), f"{path}: {member.name}"))
    except tarfile.TarError as error:
        raise UserError(f"{path}: not a shard, which is a tar file ({error})") from None
    return images


def _read(file: str | io.BytesIO, name: str) -> Image.Image:
    try:
        if isinstance(file, str):
            return read_image(file)
        with Image.open(file) as image:
            return to_rgb(image)
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"{name}: cannot be read as an image ({error})") from None
