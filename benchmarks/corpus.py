"""JPEG files with ImageNet's statistics, made of the photographs that scikit-image and scikit-learn ship.

Most files are 500 x 375 pixels, some upright, some of any size. Each is a random crop, at a random scale, of a
photograph continued by its mirror images, in the JPEG quality that brings it to a size drawn from 80 to 115 kB. What
decoding costs depends on exactly these: pixels, bytes and chroma subsampling.
Check: `python benchmarks/corpus.py FOLDER` prints the means.
"""

import argparse
import io
import multiprocessing
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from functools import cache, partial
from pathlib import Path

import numpy as np
from PIL import Image
from skimage import data as photographs
from sklearn.datasets import load_sample_images
from tqdm import tqdm

if not __package__:  # started as a file
    sys.path.insert(0, str(Path(__file__).parents[1]))

from repghost.machine import available_cpus

CLASSES = 10
TRAIN = "train"
CHUNK = 50  # images that a process makes at a time


def corpus(root: Path, images: int) -> Path:
    """`root`/images-N/train/CLASS/NUMBER.jpg with `images` files, written on the first call; returns images-N."""
    folder = root / f"images-{images}"
    finished = folder / "finished"
    if not finished.exists():
        make, numbers = partial(_make, folder / TRAIN), range(images)
        with ExitStack() as stack:
            made: Iterator[None] = map(make, numbers)
            if images > CHUNK:  # processes take seconds to start
                spawn = multiprocessing.get_context("spawn")
                processes = stack.enter_context(ProcessPoolExecutor(available_cpus(), spawn))
                made = processes.map(make, numbers, chunksize=CHUNK)
            for _ in tqdm(made, total=images, unit="images", desc="making the corpus"):
                pass
        finished.touch()
    return folder


def _make(folder: Path, number: int) -> None:
    path = folder / f"class{number % CLASSES}" / f"{number:06d}.jpg"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(_jpeg(_sources(), np.random.default_rng(number)))


@cache
def _sources() -> list[Image.Image]:
    shipped = [photographs.astronaut(), photographs.coffee(), photographs.chelsea(), photographs.rocket()]
    shipped += [*load_sample_images().images, np.stack([photographs.camera()] * 3, axis=2)]
    return [Image.fromarray(np.pad(p, ((0, p.shape[0]), (0, p.shape[1]), (0, 0)), "symmetric")) for p in shipped]


def _jpeg(sources: list[Image.Image], draw: np.random.Generator) -> bytes:
    kind = draw.random()
    width, height = (500, 375) if kind < 0.6 else (375, 500) if kind < 0.8 else draw.integers(300, 640, 2).tolist()
    source = sources[draw.integers(len(sources))]
    zoom = max(0.6, width / source.width, height / source.height) * draw.uniform(1, 1.5)
    crop_width, crop_height = width / zoom, height / zoom
    left, top = draw.uniform(0, source.width - crop_width), draw.uniform(0, source.height - crop_height)
    box = (left, top, left + crop_width, top + crop_height)
    image = source.resize((width, height), Image.Resampling.BICUBIC, box=box)
    wanted = draw.uniform(80_000, 115_000)
    low, high = 40, 98
    while low < high:  # the first quality that reaches the size
        middle = (low + high) // 2
        if len(_encoded(image, middle)) < wanted:
            low = middle + 1
        else:
            high = middle
    return _encoded(image, low)


def _encoded(image: Image.Image, quality: int) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality, subsampling="4:2:0")
    return buffer.getvalue()


def main() -> None:
    parser = argparse.ArgumentParser(description="Makes the corpus and prints its means.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--images", type=int, default=1500)
    options = parser.parse_args()
    files = sorted(corpus(options.folder, options.images).rglob("*.jpg"))
    sizes = [Image.open(file).size for file in files]
    width, height = np.mean(sizes, axis=0)
    kilobytes = np.array([file.stat().st_size for file in files]) / 1000
    print(
        f"{len(files)} files of {width:.0f} x {height:.0f} pixels and {kilobytes.mean():.0f} kB on average "
        f"({np.quantile(kilobytes, 0.05):.0f} to {np.quantile(kilobytes, 0.95):.0f} kB for nine of ten)"
    )


if __name__ == "__main__":
    main()
