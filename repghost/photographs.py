"""Some photographs to calibrate or to check an export with: the user's, from a folder or a shard, or two that
scikit-learn brings along. Check: `pytest tests/test_quantize.py -k photographs`.
"""

import io
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

from repghost.errors import UserError
from repghost.images import EXTENSIONS, image_files, read_image, to_rgb


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
