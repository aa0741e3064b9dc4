"""The images that an export is calibrated, checked and scored on. Check: `pytest tests/test_quantize.py`."""

import json
import os
import tarfile
from collections.abc import Iterator, Sequence
from itertools import groupby, islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from repghost.errors import UserError, printable
from repghost.files import read_file
from repghost.images import FILE_BYTES, DecodeError, decode, image_files, is_image


class Photograph(NamedTuple):
    """An image in RGB, and the name of its class where its place says it."""

    image: Image.Image
    class_name: str | None = None


def read_photographs(source: Path, count: int) -> list[Photograph]:
    """Up to `count` images from a folder, or from one tar file (a shard).

    Those of a folder are spread evenly over all of it, because it is sorted by class; those of a shard are its first,
    because shards are shuffled. An image's class is the name of its folder, or that of the label in a shard, by the
    manifest.json beside it. Raises UserError for a source without images, and for an image that cannot be read.
    """
    if not source.is_dir() and not source.is_file():  # a pipe would be waited for
        raise UserError(f"{source}: no such folder or shard")
    found = []
    for name, content, class_name in islice(_of_folder(source, count) if source.is_dir() else _of_shard(source), count):
        try:
            found.append(Photograph(decode(content), class_name))
        except DecodeError as error:
            raise UserError(f"{printable(name)}: cannot be read as an image ({error})") from None
    if not found:
        raise UserError(f"{source}: no images in it; give a folder of images or a shard, which is a tar file")
    return found


def _of_folder(source: Path, count: int) -> Iterator[tuple[str, bytes, str | None]]:
    files = list(image_files([source]))
    for i in np.linspace(0, len(files) - 1, min(count, len(files))).astype(int):
        yield files[i], read_file(files[i], FILE_BYTES), os.path.basename(os.path.dirname(files[i]))


def _of_shard(source: Path) -> Iterator[tuple[str, bytes, str | None]]:
    names = _class_names(source)
    try:
        with tarfile.open(source, "r|*") as tar:
            members = (member for member in tar if member.isfile())
            for _, sample in groupby(members, key=lambda member: member.name.partition(".")[0]):
                image, label = None, None
                for member in sample:
                    wanted = is_image(member.name) or member.name.endswith(".cls")
                    if not wanted or (file := tar.extractfile(member)) is None:
                        continue
                    if member.size > FILE_BYTES:
                        raise UserError(f"{source}: {printable(member.name)}: larger than {FILE_BYTES / 1e6:,.0f} MB")
                    if is_image(member.name):
                        image = (f"{source}: {member.name}", file.read())
                    else:
                        label = file.read().decode("ascii", "replace").strip()
                if image:
                    yield *image, names[int(label)] if label and label.isdecimal() and int(label) < len(names) else None
    except tarfile.TarError as error:
        raise UserError(f"{source}: not a shard, which is a tar file ({error})") from None


def _class_names(shard: Path) -> Sequence[str]:
    """The names of the labels in a shard, none where nothing beside it says them."""
    try:
        return [str(name) for name in json.loads((shard.parent / "manifest.json").read_text())["classes"]]
    except (OSError, ValueError, KeyError, TypeError):
        return []


def sample_photographs(count: int) -> list[Photograph]:
    """`count` different crops of scikit-learn's two photographs. Raises UserError where it is not installed."""
    try:
        from sklearn.datasets import load_sample_images
    except ImportError:
        raise UserError("no images to check the export with: give check=FOLDER or check=SHARD.tar") from None
    pictures, rng, crops = load_sample_images().images, np.random.default_rng(0), []
    for i in range(count):
        pixels = pictures[i % len(pictures)]
        height, width = (int(rng.integers(length // 3, length + 1)) for length in pixels.shape[:2])
        top, left = (int(rng.integers(0, pixels.shape[axis] - side + 1)) for axis, side in enumerate((height, width)))
        crops.append(Photograph(Image.fromarray(pixels[top : top + height, left : left + width])))
    return crops
