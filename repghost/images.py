"""Image files outside of shards: finding them, reading them, and what evaluation does to their pixels.

The preprocessing is that of evaluation, by torchvision's own transforms. Like there, the EXIF orientation is not
applied, transparency is dropped and grey becomes RGB with three equal channels; 16 bits become 8.
Check: `pytest tests/test_predict.py`, which compares pixels with the validation loader's.
"""

import io
import os
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from urllib.request import Request, urlopen

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torchvision.transforms import v2

from repghost.errors import UserError
from repghost.reference import IMAGENET_MEAN, IMAGENET_STD

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
SCHEMES = ("http://", "https://", "file://")  # what is read as a URL
TIMEOUT = 30  # seconds without a byte from a server


@dataclass(frozen=True)
class Preprocessing:
    """What evaluation does to an image: shorter side resized (bicubic, antialiased), centre cut out, normalized.

    image_size: side of the crop, in pixels. crop_fraction: its share of the shorter side. mean, std: of each channel
    (RGB), for pixels in [0, 1]. The defaults are those of the published weights.
    """

    image_size: int = 224
    crop_fraction: float = 0.875
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD

    @property
    def shorter_side(self) -> int:
        """Of the resized image, in pixels."""
        return int(self.image_size / self.crop_fraction)

    def transform(self) -> v2.Compose:
        """PIL image or uint8 [..., 3, H, W] to normalized float32 [..., 3, image_size, image_size]."""
        resized = (v2.ToImage(), v2.Resize(self.shorter_side, v2.InterpolationMode.BICUBIC, antialias=True))
        normalized = (v2.ToDtype(torch.float32, scale=True), v2.Normalize(self.mean, self.std))
        return v2.Compose([*resized, v2.CenterCrop(self.image_size), *normalized, v2.ToPureTensor()])


def image_files(paths: Iterable[str | os.PathLike[str]]) -> Iterator[str]:
    """The image files that `paths` (files, folders, URLs) stand for, in their order; nothing is opened.

    A folder gives all files below it that have an image's extension, sorted by name within each folder, without hidden
    ones. Files and URLs are taken whatever their names.
    """
    for path in (os.fspath(path) for path in paths):
        yield from filter(is_image, walk_files(path)) if os.path.isdir(path) else [path]


def is_url(path: str) -> bool:
    return path.startswith(SCHEMES)


def read_image(path: str) -> Image.Image:
    """The image in a file or at a URL, in RGB. Raises OSError or what PIL raises for content that is no image."""
    if is_url(path):
        # Some servers refuse clients without a name.
        with urlopen(Request(path, headers={"User-Agent": "repghost"}), timeout=TIMEOUT) as answer:
            return decode(answer.read())
    return decode(Path(path).read_bytes())


def decode(content: bytes) -> Image.Image:
    """The image in the content of a file, in RGB."""
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


def calibration_images(source: Path, count: int) -> list[Image.Image]:
    """Up to `count` images, in RGB, from a folder or from one tar file (a shard).

    Those of a folder are spread evenly over all of it, because it is sorted by class; those of a shard are its first,
    because shards are shuffled. Raises UserError for a source without images, and for an image that cannot be read.
    """
    if not source.exists():
        raise UserError(f"{source}: no such folder or shard")
    images = []
    for name, content in islice(_contents(source, count), count):
        try:
            images.append(decode(content))
        except (OSError, ValueError, Image.DecompressionBombError) as error:
            raise UserError(f"{name}: cannot be read as an image ({error})") from None
    if not images:
        raise UserError(f"{source}: no images in it; give a folder of images or a shard, which is a tar file")
    return images


def _contents(source: Path, count: int) -> Iterator[tuple[str, bytes]]:
    """Names and contents of `count` images of a folder, or of all images of a shard."""
    if source.is_dir():
        files = list(image_files([source]))
        for i in np.linspace(0, len(files) - 1, min(count, len(files))).astype(int):
            yield files[i], Path(files[i]).read_bytes()
        return
    try:
        with tarfile.open(source, "r|*") as tar:
            for member in tar:
                if member.isfile() and is_image(member.name) and (file := tar.extractfile(member)):
                    yield f"{source}: {member.name}", file.read()
    except tarfile.TarError as error:
        raise UserError(f"{source}: not a shard, which is a tar file ({error})") from None


def sample_images(count: int) -> list[Image.Image]:
    """`count` different crops of scikit-learn's two photographs, in RGB. Raises UserError where it is not installed."""
    try:
        from sklearn.datasets import load_sample_images
    except ImportError:
        raise UserError("no images to check the export with: give check=FOLDER or check=SHARD.tar") from None
    photographs, rng, crops = load_sample_images().images, np.random.default_rng(0), []
    for i in range(count):
        pixels = photographs[i % len(photographs)]
        height, width = (int(rng.integers(length // 3, length + 1)) for length in pixels.shape[:2])
        top, left = (int(rng.integers(0, pixels.shape[axis] - side + 1)) for axis, side in enumerate((height, width)))
        crops.append(Image.fromarray(pixels[top : top + height, left : left + width]))
    return crops
