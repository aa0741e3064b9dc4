"""A JPEG is cut without decoding it, and what is left has the pixels of the whole, for every window and sampling."""

import io
import os
import pickle
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from sklearn.datasets import load_sample_images
from webdataset import TarWriter

from data.crops import CenterCrops, RandomCrops
from data.dali_loader import DaliLoader, dali_installed
from data.image_sizes import ImageSizes
from data.index import Index, load_index
from data.reader import LoaderOptions, ShardReader, decode
from data.regions import REGION, Changed, Regions, describe
from data.sampling import RankSampler
from data.tars import SAMPLE
from data.torch_loader import TorchLoader
from repghost.dataset import Batch
from repghost.errors import UserError

SAMPLINGS = {"4:4:4": "1x1", "4:2:2": "2x1", "4:2:0": "2x2", "4:4:0": "1x2", "4:1:1": "4x1", "grey": "1x1"}
MCU = {"4:4:4": (8, 8), "4:2:2": (8, 16), "4:2:0": (16, 16), "4:4:0": (16, 8), "4:1:1": (8, 32), "grey": (8, 8)}
OF_PIL = ("4:4:4", "4:2:2", "4:2:0", "grey")
AVAILABLE = tuple(SAMPLINGS) if shutil.which("cjpeg") else OF_PIL


@cache
def photograph() -> Image.Image:
    return Image.fromarray(load_sample_images().images[0])


def segment_interval(width: int, sampling: str) -> int:
    """The divisor of the MCUs in a row that is nearest to 4."""
    count = -(-width // MCU[sampling][1])
    return min((n for n in range(1, count + 1) if count % n == 0), key=lambda n: abs(n - 4))


def jpeg(height: int, width: int, sampling: str = "4:2:0", interval: int | None = None, **options: Any) -> bytes:
    """A photograph of this size with restart markers."""
    image = photograph().resize((width, height), box=(0, 0, min(640, 8 * width), min(427, 8 * height)))
    interval = segment_interval(width, sampling) if interval is None else interval
    if sampling not in OF_PIL:
        pixels = io.BytesIO()
        image.save(pixels, "PPM")
        command = ["cjpeg", "-quality", "90", "-sample", SAMPLINGS[sampling], "-restart", f"{interval}B"]
        return subprocess.run(command, input=pixels.getvalue(), capture_output=True, check=True).stdout
    buffer = io.BytesIO()
    if sampling != "grey":
        options["subsampling"] = sampling
    image.convert("L" if sampling == "grey" else "RGB").save(
        buffer, "JPEG", quality=90, restart_marker_blocks=interval, **options
    )
    return buffer.getvalue()


def regions_of(folder: Path, *files: bytes) -> Regions:
    """The regions of these files; those that cannot be cut have none."""
    rows, numbers = np.zeros(len(files), REGION), [np.zeros(0, "<u2")]
    for number, file in enumerate(files):
        if described := describe(file):
            rows[number] = described[0]
            rows[number]["start"] = sum(map(len, numbers))
            numbers.append(described[1])
    np.save(folder / "rows.npy", rows)
    np.save(folder / "segments.npy", np.concatenate(numbers))
    return Regions(str(folder / "rows.npy"), str(folder / "segments.npy"))


def cut(regions: Regions, row: int, file: bytes, height: int, width: int, window: tuple[int, ...]) -> Any:
    """(uint8 [3, h, w] of the window, the file that was cut out)."""
    found = regions.cut(row, height, width, window)
    assert found is not None
    made = found.make(file[: found.header], file[found.offset : found.offset + found.size])
    pixels = decode(made)
    assert pixels.shape == (3, *found.window[2:])
    top, left = window[0] - found.window[0], window[1] - found.window[1]
    return pixels[:, top : top + window[2], left : left + window[3]], made


@st.composite
def windows(draw: st.DrawFn, longest: int = 70) -> tuple[int, int, tuple[int, ...]]:
    """Height, width and a window, often at an edge or in a corner."""
    height, width = draw(st.integers(1, longest)), draw(st.integers(1, longest))
    sides = [draw(st.one_of(st.just(1), st.integers(1, side))) for side in (height, width)]
    ends = [side - taken for side, taken in zip((height, width), sides, strict=True)]
    corner = [draw(st.one_of(st.just(0), st.just(end), st.integers(0, end))) for end in ends]
    return height, width, (*corner, *sides)


@pytest.mark.parametrize("sampling", AVAILABLE)
@given(case=windows())
def test_a_cut_has_the_pixels_of_the_whole(
    sampling: str, case: tuple[int, int, tuple[int, ...]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    height, width, window = case
    file = jpeg(height, width, sampling)
    regions = regions_of(tmp_path_factory.mktemp("regions"), file)
    pixels, _ = cut(regions, 0, file, height, width, window)
    top, left, h, w = window
    assert torch.equal(pixels, decode(file)[:, top : top + h, left : left + w])


@pytest.mark.parametrize("sampling", AVAILABLE)
@pytest.mark.parametrize(("height", "width"), [(375, 500), (333, 592), (427, 640)])  # 592: 37 MCUs of 16 pixels
def test_photographs(sampling: str, height: int, width: int, tmp_path: Path) -> None:
    file = jpeg(height, width, sampling)
    regions, whole, draw = regions_of(tmp_path, file), decode(file), np.random.default_rng(0)
    for _ in range(20):
        h, w = (int(draw.integers(1, side + 1)) for side in (height, width))
        top, left = int(draw.integers(0, height - h + 1)), int(draw.integers(0, width - w + 1))
        pixels, made = cut(regions, 0, file, height, width, (top, left, h, w))
        assert torch.equal(pixels, whole[:, top : top + h, left : left + w])
        by_pil = np.asarray(Image.open(io.BytesIO(made)).convert("RGB"))
        assert torch.equal(decode(made), torch.from_numpy(by_pil.copy()).permute(2, 0, 1))
    _, small = cut(regions, 0, file, height, width, (100, 100, 64, 64))
    assert len(small) < len(file) / 4


@pytest.mark.parametrize("sampling", AVAILABLE)
@pytest.mark.parametrize("width", [97, 98, 99, 100, 101])
def test_the_last_pixels_of_a_row(sampling: str, width: int, tmp_path: Path) -> None:
    """In an image of up to four pixels, decoders do not interpolate chroma: such a cut would have other pixels."""
    file = jpeg(20, width, sampling, interval=1)
    regions, whole = regions_of(tmp_path, file), decode(file)
    for left in range(width - 6, width):
        pixels, _ = cut(regions, 0, file, 20, width, (0, left, 20, width - left))
        assert torch.equal(pixels, whole[:, :, left:])


def test_what_stands_before_the_scan_may_look_like_markers(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x010E] = "\xff\xd8\xff\xd0\xff\xda\xff\xd9".encode("latin-1").decode("latin-1")
    thumbnail = jpeg(32, 32)
    file = jpeg(64, 96, exif=exif, comment=b"\xff\xd8\xff\xd0\xff\xda" + thumbnail, icc_profile=thumbnail)
    regions = regions_of(tmp_path, file)
    assert regions.rows[0]["interval"]
    pixels, _ = cut(regions, 0, file, 64, 96, (30, 30, 20, 20))
    assert torch.equal(pixels, decode(file)[:, 30:50, 30:50])


def stays_whole() -> dict[str, Callable[[], bytes]]:
    buffer = io.BytesIO()

    def saved(mode: str = "RGB", **options: Any) -> bytes:
        buffer.seek(0)
        buffer.truncate()
        photograph().resize((96, 64)).convert(mode).save(buffer, **{"format": "JPEG"} | options)
        return buffer.getvalue()

    good = jpeg(64, 96)
    scan = good.index(b"\xff\xd0")
    return {
        "no restart markers": saved,
        "progressive": lambda: saved(progressive=True, restart_marker_blocks=2),
        "CMYK": lambda: saved("CMYK", restart_marker_blocks=2),
        "segments that cross a row": lambda: jpeg(64, 96, interval=4),
        "PNG": lambda: saved(format="PNG"),
        "empty": lambda: b"",
        "only a marker": lambda: b"\xff\xd8",
        "cut in the header": lambda: good[:300],
        "cut in the scan": lambda: good[:-40],
        "without its end": lambda: good[:-2],
        "more behind its end": lambda: good + b"\0",
        "a marker that is lost": lambda: good[:scan] + good[scan + 2 :],
        "a marker out of turn": lambda: good[:scan] + b"\xff\xd3" + good[scan + 2 :],
        "a fill byte in the scan": lambda: good[:scan] + b"\xff" + good[scan:],
        "two images": lambda: good + good,
    }


@pytest.mark.parametrize("name", stays_whole())
def test_a_file_that_cannot_be_cut_has_no_regions(name: str) -> None:
    assert describe(stays_whole()[name]()) is None


def test_fill_bytes_before_a_header_are_passed_over(tmp_path: Path) -> None:
    good = jpeg(64, 96)
    at = good.index(b"\xff\xdb")
    filled = good[:at] + b"\xff\xff" + good[at:]
    pixels, _ = cut(regions_of(tmp_path, filled), 0, filled, 64, 96, (0, 0, 20, 20))
    assert torch.equal(pixels, decode(good)[:, :20, :20])


@given(data=st.data())
def test_a_changed_byte_is_found_or_was_not_needed(data: st.DataObject, tmp_path_factory: Any) -> None:
    file = jpeg(64, 96)
    regions = regions_of(tmp_path_factory.mktemp("regions"), file)
    height, width, window = 64, 96, (20, 20, 20, 40)
    before, _ = cut(regions, 0, file, height, width, window)
    at, value = data.draw(st.integers(0, len(file) - 1)), data.draw(st.integers(1, 255))
    changed = bytearray(file)
    changed[at] ^= value
    try:
        after, _ = cut(regions, 0, bytes(changed), height, width, window)
    except Changed:
        return
    assert torch.equal(before, after)


@given(data=st.data())
def test_a_changed_description_is_found_or_was_not_needed(data: st.DataObject, tmp_path_factory: Any) -> None:
    file, folder = jpeg(64, 96), tmp_path_factory.mktemp("regions")
    regions = regions_of(folder, file)
    window = (20, 20, 20, 40)
    before, _ = cut(regions, 0, file, 64, 96, window)
    numbers = np.array(regions.segments)
    first, second = data.draw(st.integers(0, len(numbers) - 1)), data.draw(st.integers(0, len(numbers) - 1))
    by = data.draw(st.integers(1, 300))
    for place, change in ((first, by), (second, -by)):  # lengths that add up to the same
        numbers[place] = (int(numbers[place]) + change) % 2**16
    np.save(folder / "segments.npy", numbers)
    try:
        after, _ = cut(Regions(regions.rows_file, regions.segments_file), 0, file, 64, 96, window)
    except Changed:
        return
    assert torch.equal(before, after)


def test_processes_map_the_files_instead_of_getting_a_copy(tmp_path: Path) -> None:
    regions = regions_of(tmp_path, jpeg(375, 500))
    assert isinstance(regions.rows.base, np.memmap) and isinstance(regions.segments.base, np.memmap)
    content = pickle.dumps(regions)
    assert len(content) < 1000
    again = pickle.loads(content)
    assert isinstance(again.segments.base, np.memmap) and np.array_equal(again.segments, regions.segments)


@pytest.mark.parametrize("change", ["rows", "start", "header", "frame", "mcu_width", "segments", "dtype", "cut"])
def test_regions_that_do_not_fit_their_index_are_refused(change: str, tmp_path: Path) -> None:
    file = jpeg(64, 96)
    regions = regions_of(tmp_path, file)
    samples = np.zeros(1, SAMPLE)
    samples["size"], samples["height"], samples["width"] = len(file), 64, 96
    regions.require(samples)
    rows, segments = np.array(regions.rows), np.array(regions.segments)
    path = tmp_path / "rows.npy"
    if change == "rows":
        rows = np.repeat(rows, 2)
    elif change in ("start", "header", "frame"):
        rows[change] = 2**31
    elif change == "mcu_width":
        rows[change] = 0
    elif change == "dtype":
        rows = rows["start"]
    np.save(path, rows)
    if change == "segments":
        np.save(tmp_path / "segments.npy", segments[:-1])
    if change == "cut":
        path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(UserError, match=r"rows\.npy"):
        Regions(str(path), str(tmp_path / "segments.npy")).require(samples)


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Index:
    """A shard whose images can be cut, most of them."""
    folder = tmp_path_factory.mktemp("shards")
    sizes = [(375, 500), (500, 375), (64, 96), (41, 300), (300, 41), (1, 1), (9, 17), (224, 224)]
    files = [jpeg(h, w, s) for (h, w), s in zip(sizes, OF_PIL * 2, strict=True)]
    files += [jpeg(120, 90, interval=5), jpeg(120, 90, progressive=True), stays_whole()["PNG"]()]
    with TarWriter(str(folder / "train.tar"), encoder=False) as tar:
        for label, content in enumerate(files):
            extension = "png" if content.startswith(b"\x89PNG") else "jpg"
            tar.write({"__key__": f"image{label}", extension: content, "cls": b"%d" % label})
    plain = load_index(folder, "train", folder)
    index = replace(plain, regions=regions_of(folder, *files))
    assert (index.regions.rows["interval"] > 0).sum() == 8
    return index


LOADERS = {
    "torch": lambda crops: TorchLoader(crops, LoaderOptions(workers=0, prefetch=2)),
    "torch, workers": lambda crops: TorchLoader(crops, LoaderOptions(workers=2, prefetch=2)),
    "dali": lambda crops: DaliLoader(crops, LoaderOptions(workers=2, prefetch=1)),
    "dali, readers": lambda crops: DaliLoader(crops, LoaderOptions(workers=1, prefetch=1, readers=1)),
}


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("loader", LOADERS)
def test_batches_are_those_of_files_that_are_decoded_whole(loader: str, training: bool, index: Index) -> None:
    if loader.startswith("dali") and not dali_installed():
        pytest.skip("nvidia-dali is made for Linux on x86-64")

    def batches(index: Index, made: Callable[[Any], Any]) -> list[Batch]:
        sampler = RankSampler(len(index), 4, drop_last=training)
        crops = RandomCrops(index, sampler, ImageSizes(64), 3, (0.08, 1.0), (3 / 4, 4 / 3))
        found = made(crops if training else CenterCrops(index, sampler, 64, 0.875))
        return [batch for _ in range(2) for batch in found]

    whole, cut = batches(replace(index, regions=None), LOADERS["torch"]), batches(index, LOADERS[loader])
    assert len(whole) == len(cut) == (4 if training else 6)
    for one, other in zip(whole, cut, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one[:4], other[:4], strict=True))


def test_less_is_read_of_a_file_that_is_cut(index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []

    def pread(file: int, size: int, offset: int) -> bytes:
        read.append(size)
        return before(file, size, offset)

    before = os.pread
    monkeypatch.setattr(os, "pread", pread)
    crops = RandomCrops(index, RankSampler(len(index), len(index)), ImageSizes(64), 0, (0.08, 0.3), (3 / 4, 4 / 3))(
        0, 0
    )
    ShardReader(index).load(crops, lambda *_: None, None)
    assert sum(read) < 0.8 * index.samples["size"].sum()


def test_a_changed_file_is_one_bad_image(index: Index, tmp_path: Path) -> None:
    shard = Path(index.shards[0])
    copy = tmp_path / shard.name
    content = bytearray(shard.read_bytes())
    first = index.samples[0]
    content[int(first["offset"]) + int(first["size"]) // 2] ^= 1
    copy.write_bytes(content)
    changed = replace(index, shards=(str(copy),))
    crops = CenterCrops(changed, RankSampler(len(index), len(index)), 64, 0.875)(0, 0)
    _, labels, errors = ShardReader(changed).load(crops, lambda *_: None, None)
    assert labels.tolist() == [-1, *range(1, len(index))]
    assert errors == ["train.tar: image0.jpg: its bytes changed since it was indexed (checksum differs)"]
