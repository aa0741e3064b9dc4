"""Small real images for tests: patches of photographs, as files in class folders."""

import io
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image
from skimage import data as photographs


@cache
def _photographs() -> tuple[np.ndarray, ...]:
    return (photographs.astronaut(), photographs.coffee(), photographs.chelsea(), photographs.rocket())


def patch(number: int, smallest: int = 32, largest: int = 64) -> Image.Image:
    """A patch of a photograph, its sides within the two bounds; what it shows follows from the number."""
    draw = np.random.default_rng(number)
    photograph = _photographs()[number % 4]
    height, width = draw.integers(smallest, largest + 1, 2)
    top = draw.integers(photograph.shape[0] - height)
    left = draw.integers(photograph.shape[1] - width)
    return Image.fromarray(photograph[top : top + height, left : left + width])


def encoded(image: Image.Image, extension: str = "jpg") -> bytes:
    """The bytes of an image file in the format of the extension."""
    buffer = io.BytesIO()
    image.save(buffer, Image.registered_extensions()[f".{extension.lower()}"])
    return buffer.getvalue()


def make_class_folders(
    root: Path, classes: tuple[str, ...] = ("cat", "dog", "owl"), per_class: int = 10, first: int = 0
) -> Path:
    """`root`/CLASS/CLASS_NUMBER.jpg with `per_class` images in each class; every tenth of them is a PNG."""
    for label, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for i in range(per_class):
            extension = "png" if i % 10 == 9 else "jpg"
            number = first + label * per_class + i
            (root / name / f"{name}_{number}.{extension}").write_bytes(encoded(patch(number), extension))
    return root


def make_images(root: Path, classes: tuple[str, ...] = ("cat", "dog", "owl"), train: int = 10, val: int = 4) -> Path:
    """`root`/{train,val}/CLASS/..., with that many images in each class."""
    make_class_folders(root / "train", classes, train)
    make_class_folders(root / "val", classes, val, first=train * len(classes))
    return root
