"""The embedded data set: scikit-learn's 1,797 handwritten digits as shards of JPEG files, without a download.

Ten classes of about 180 grey 8 x 8 images, enlarged to 32 x 32 and written by `data.write_shards` like any
other data set, so that a demo runs through the same files and the same code as ImageNet. Every sixth image is
for validation. Check: `pytest tests/test_write_shards.py -k digits`.
"""

import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from data.write_shards.write import write_folder
from repghost.files import locked, require_writable

VALIDATION_EVERY = 6
PIXELS = 32


def prepare_digits(cache: Path) -> Path:
    """The folder of shards `cache`/digits, written on first use while other processes wait."""

    def write(images: Path, shards: Path) -> None:
        _write_images(images)
        write_folder(images, shards, images_per_shard=512, workers=1, quiet=True)

    return prepare(cache, "digits", write)


def prepare(cache: Path, name: str, write: Callable[[Path, Path], None]) -> Path:
    """The folder of shards `cache`/`name`; on first use `write` makes it while other processes wait.

    write: called with an empty folder for images, which is removed afterwards, and the folder of the shards.
    """
    shards = Path(cache).expanduser() / name
    require_writable(shards.with_suffix(".lock"), "data.cache")
    shards.parent.mkdir(parents=True, exist_ok=True)
    with locked(shards.with_suffix(".lock"), f"writing the {name}", limit=600):
        if not (shards / "manifest.json").exists():
            with tempfile.TemporaryDirectory(dir=shards.parent) as images:
                write(Path(images), shards)
    return shards


def _write_images(root: Path) -> None:
    """`root`/{train,val}/DIGIT/NUMBER.jpg"""
    from sklearn.datasets import load_digits  # slow to import, and used once

    digits = load_digits()
    for number, (ink, digit) in enumerate(zip(digits.images, digits.target, strict=True)):
        split = "val" if number % VALIDATION_EVERY == VALIDATION_EVERY - 1 else "train"
        folder = root / split / str(digit)
        folder.mkdir(parents=True, exist_ok=True)
        small = Image.fromarray(np.rint(ink * (255 / 16)).astype(np.uint8))  # ink is counted from 0 to 16
        large = small.resize((PIXELS, PIXELS), Image.Resampling.BICUBIC)
        large.save(folder / f"{number:04d}.jpg", quality=95)
