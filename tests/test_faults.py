"""What can be wrong with the input, as tables: each fault is one error that names the file, or a counted skip.

Never a hang (every test here has a time limit), a bare KeyError or the like, or other images in silence.
"""

import bz2
import gzip
import hashlib
import io
import json
import lzma
import os
import pickle
import re
import shutil
import signal
import struct
import subprocess
import sys
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import time_limit
from images import encoded, make_images, patch
from PIL import Image

from data.crops import CenterCrops, RandomCrops
from data.dali_loader import DaliLoader, dali_installed
from data.image_sizes import ImageSizes
from data.index import Index, load_index
from data.reader import BadImage, LoaderOptions
from data.sampling import RankSampler
from data.shards import verify
from data.tars import scan_shard
from data.torch_loader import TorchLoader
from data.write_shards.__main__ import main as write_shards
from repghost.errors import UserError, user_message

LOADERS = {"torch": TorchLoader, **({"dali": DaliLoader} if dali_installed() else {})}
SECONDS = 600  # of any test here: far more than the slowest machine needs

Damage = Callable[[Path], object]


@pytest.fixture(autouse=True)
def limited() -> Iterator[None]:
    with time_limit(SECONDS):
        yield


@pytest.fixture
def copy(shards: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(shards, tmp_path / "shards", ignore=shutil.ignore_patterns("parts")))


def one_line(error: pytest.ExceptionInfo) -> str:
    """What a command says, which any stream can print, on one line."""
    line = user_message(error.value)
    assert line is not None and len(line.splitlines()) == 1 and line.encode()
    return line


# --- prepared shards that cannot be loaded ------------------------------------------------------------------------


def manifest(change: Callable[[dict], object]) -> Damage:
    """Edits manifest.json by hand."""

    def damage(root: Path) -> None:
        content = json.loads((root / "manifest.json").read_text())
        change(content)
        (root / "manifest.json").write_text(json.dumps(content))

    return damage


def train(change: Callable[[dict], object]) -> Damage:
    return manifest(lambda content: change(content["splits"]["train"]))


def content(name: str, change: Callable[[bytes], bytes]) -> Damage:
    return lambda root: (root / name).write_bytes(change((root / name).read_bytes()))


def signed(change: Callable[[np.ndarray], np.ndarray | bytes | None]) -> Damage:
    """Another training index, with its own checksum in the manifest."""

    def damage(root: Path) -> None:
        path = root / "train.index.npy"
        rows = np.load(path)
        changed = change(rows)
        if isinstance(changed, bytes):
            path.write_bytes(changed)
        else:
            np.save(path, rows if changed is None else changed)
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        train(lambda entry: entry["index"].update(sha256=digest))(root)

    return damage


def put(column: str, value: int) -> Damage:
    """One wrong value in row 5 of the index."""

    def change(rows: np.ndarray) -> None:
        rows[column][5] = value

    return signed(change)


def replaced(name: str, make: Callable[[Path], object]) -> Damage:
    def damage(root: Path) -> None:
        (root / name).unlink()
        make(root / name)

    return damage


def cut(data: bytes) -> bytes:
    return data[: len(data) // 2]


NOT_A_MANIFEST = r"manifest\.json: not a manifest of format 1 "
SHARD = "train-000001.tar"
PREPARED: dict[str, tuple[Damage, str]] = {
    "shard missing": (lambda root: (root / SHARD).unlink(), f"{SHARD}: missing or .*, but the manifest lists it"),
    "shard cut": (content(SHARD, cut), rf"{SHARD} has \d+ bytes, the manifest says \d+: copy it again"),
    "shard too long": (content(SHARD, lambda data: data + b"\0"), rf"{SHARD} has \d+ bytes, the manifest says"),
    "shard empty": (content(SHARD, lambda data: b""), f"{SHARD} has 0 bytes, the manifest says"),
    "shard a folder": (replaced(SHARD, Path.mkdir), f"{SHARD}: missing or not a regular file"),
    "shard a pipe": (replaced(SHARD, os.mkfifo), f"{SHARD}: missing or not a regular file"),
    "shard a broken link": (replaced(SHARD, lambda path: path.symlink_to("nowhere")), f"{SHARD}: missing"),
    "manifest cut": (content("manifest.json", cut), NOT_A_MANIFEST),
    "manifest empty": (content("manifest.json", lambda data: b""), NOT_A_MANIFEST),
    "manifest of zeros": (content("manifest.json", lambda data: bytes(len(data))), NOT_A_MANIFEST),
    "manifest not UTF-8": (content("manifest.json", lambda data: b'{"\xff' + data[2:]), NOT_A_MANIFEST),
    "manifest a list": (content("manifest.json", lambda data: b"[%b]" % data), NOT_A_MANIFEST),
    "manifest too deep": (content("manifest.json", lambda data: b"[" * 100_000), NOT_A_MANIFEST),
    "manifest a folder": (replaced("manifest.json", Path.mkdir), r"manifest\.json: Is a directory"),
    "manifest a pipe": (replaced("manifest.json", os.mkfifo), r"manifest\.json: not a regular file"),
    "manifest too large": (
        lambda root: os.truncate(root / "manifest.json", 10**12),
        r"manifest\.json: larger than 20 MB",
    ),
    "manifest of another format": (manifest(lambda m: m.update(format=2)), NOT_A_MANIFEST + r"\(its format is 2\)"),
    "manifest without format": (manifest(lambda m: m.pop("format")), NOT_A_MANIFEST + r"\(no key 'format'\)"),
    "manifest without classes": (manifest(lambda m: m.pop("classes")), NOT_A_MANIFEST + r"\(no key 'classes'\)"),
    "manifest without splits": (manifest(lambda m: m.pop("splits")), NOT_A_MANIFEST + r"\(no key 'splits'\)"),
    "manifest without this split": (manifest(lambda m: m["splits"].pop("train")), "no split train, only val"),
    "split not described": (manifest(lambda m: m["splits"].update(train=3)), NOT_A_MANIFEST),
    "split without index": (train(lambda e: e.pop("index")), NOT_A_MANIFEST + r"\(no key 'index'\)"),
    "split without shards": (train(lambda e: e.pop("shards")), NOT_A_MANIFEST + r"\(no key 'shards'\)"),
    "split of no shards": (
        train(lambda e: e.update(shards=[])),
        r"npy: image 0 .*lies outside of its shard",
    ),
    "shard without bytes": (train(lambda e: e["shards"][0].pop("bytes")), NOT_A_MANIFEST + r"\(no key 'bytes'\)"),
    "shard of text bytes": (train(lambda e: e["shards"][0].update(bytes="9")), NOT_A_MANIFEST + r"\(its bytes is no"),
    "shard elsewhere": (train(lambda e: e["shards"][0].update(file="../x.tar")), NOT_A_MANIFEST + r"\('\.\./x\.tar'"),
    "other count of images": (train(lambda e: e.update(images=44)), r"npy: 45 images, but manifest\.json says 44"),
    "too few classes": (manifest(lambda m: m["classes"].pop()), r"tar: owl_\w+\.\w+: label 2, but there are 2 class"),
    "index missing": (lambda root: (root / "train.index.npy").unlink(), r"train\.index\.npy: missing"),
    "index a folder": (replaced("train.index.npy", Path.mkdir), r"train\.index\.npy: missing or not a regular file"),
    "index cut": (content("train.index.npy", cut), r"train\.index\.npy: not the file that manifest\.json describes"),
    "index of another split": (
        lambda root: shutil.copy(root / "val.index.npy", root / "train.index.npy"),
        r"train\.index\.npy: not the file that manifest\.json describes",
    ),
    "index of text": (signed(lambda rows: b"offset,shard"), r"train\.index\.npy: damaged \(.*: remove it and make"),
    "index of nothing": (signed(lambda rows: b""), r"train\.index\.npy: damaged \("),
    "index of fewer bytes": (signed(lambda rows: cut(rows.tobytes())), r"train\.index\.npy: damaged \("),
    "index of pickled objects": (signed(lambda rows: rows.astype(object)), r"train\.index\.npy: damaged \(.*pickle"),
    "index a bare pickle": (signed(lambda rows: pickle.dumps(rows)), r"train\.index\.npy: damaged \("),
    "index of another type": (signed(lambda rows: rows["label"]), "npy: not an index of images, but int32"),
    "index of two dimensions": (signed(lambda rows: rows[None]), r"npy: not an index of images, but .*\[1, 45\]"),
    "index without images": (signed(lambda rows: rows[:0]), r"npy: not an index of images, but .*\[0\]"),
    "index of fewer images": (signed(lambda rows: rows[:-1]), r"npy: 44 images, but manifest\.json says 45"),
    "index of more shards": (put("shard", 9), "npy: image 5 .*lies outside of its shard"),
    "index beyond the shard": (put("size", 10**6), "npy: image 5 .*lies outside of its shard"),
    "index far beyond the shard": (put("offset", 2**63 - 1), "npy: image 5 .*lies outside of its shard"),
    "index before the shard": (put("offset", -512), "npy: image 5 .*lies outside of its shard"),
    "index without height": (put("height", 0), "npy: image 5 has no pixels"),
    "index of a higher label": (put("label", 3), r"train-\d+\.tar: \w+\.\w+: label 3, but there are 3 class names"),
    "index of a negative label": (put("label", -1), r"train-\d+\.tar: \w+\.\w+: label -1, but there are 3"),
}


@pytest.mark.parametrize("case", PREPARED)
def test_prepared_shards_that_cannot_be_loaded(copy: Path, tmp_path: Path, case: str) -> None:
    damage, message = PREPARED[case]
    damage(copy)
    with pytest.raises((UserError, OSError)) as error:
        load_index(copy, "train", tmp_path / "cache")
    assert re.search(message, one_line(error))
    assert str(copy) in one_line(error) or SHARD[:6] in one_line(error)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: path.write_text("cat\ndog\n"), "label 2, but there are 2 class names"),
        (lambda path: path.write_text(""), "but there are 0 class names"),
        (lambda path: path.write_bytes(b"cat\ndog\nowl\xff\n"), r"names\.txt: not UTF-8 text"),
        (lambda path: path.mkdir(), r"names\.txt: Is a directory"),
        (lambda path: None, r"names\.txt: No such file or directory"),
    ],
    ids=["too few", "none", "not UTF-8", "a folder", "missing"],
)
def test_class_names_that_cannot_be_used(copy: Path, tmp_path: Path, make: Damage, message: str) -> None:
    make(tmp_path / "names.txt")
    with pytest.raises(UserError, match=message) as error:
        load_index(copy, "train", tmp_path / "cache", class_names=tmp_path / "names.txt")
    one_line(error)


# --- shards of others that cannot be loaded -----------------------------------------------------------------------

Member = tuple[str | tarfile.TarInfo, bytes]


def tar(*members: Member, format: int = tarfile.GNU_FORMAT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=format) as archive:
        for name, data in members:
            member = tarfile.TarInfo(name) if isinstance(name, str) else name
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


def sample(key: str, label: object = 0, number: int = 0) -> list[Member]:
    return [(f"{key}.jpg", encoded(patch(number))), (f"{key}.cls", str(label).encode())]


def special(kind: bytes, name: str = "k1.jpg") -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, "good.jpg"
    return member


def header(name: str, size: int, kind: bytes = tarfile.REGTYPE) -> bytes:
    """A tar header that declares any size, with the checksum that belongs to it."""
    block = bytearray(tarfile.TarInfo(name).tobuf(tarfile.GNU_FORMAT))
    block[156:157] = kind
    block[124:136] = (b"\x80" if size >= 0 else b"\xff") + (size % 2**88).to_bytes(11, "big")
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def png_header(width: int, height: int) -> bytes:
    """A PNG of a few bytes that declares itself that large."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    shape = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", shape) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def jpeg_of_size(width: int, height: int) -> bytes:
    """A JPEG whose frame header says another size."""
    data = bytearray(encoded(patch(0)))
    frame = data.index(b"\xff\xc0")
    data[frame + 5 : frame + 9] = struct.pack(">HH", height, width)
    return bytes(data)


def zipped(data: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("k1.jpg", data)
    return buffer.getvalue()


GOOD = sample("good")
WHOLE = tar(*GOOD, *sample("k1", 1, 1))
AGAIN = r"x\.tar: .*copy it again"
COMPRESSED = r"x\.tar: compressed, so samples cannot be read by offset"
NO_TAR = r"x\.tar: damaged or not a tar"
MORE = r"x\.tar: its tar ends at byte \d+, but there is more"
FOREIGN: dict[str, tuple[bytes | Damage, str]] = {
    "no cls": (tar(*GOOD, sample("k1")[0]), r"x\.tar: key k1 has an image but no \.cls"),
    "no jpg": (tar(*GOOD, sample("k1")[1]), r"x\.tar: key k1 has a \.cls but no image"),
    "only cls": (tar(sample("k1")[1]), r"x\.tar: key k1 has a \.cls but no image"),
    "cls a word": (tar(*sample("k1", "cat")), r"x\.tar: k1\.cls is b'cat', not a class number"),
    "cls a fraction": (tar(*sample("k1", 1.5)), r"x\.tar: k1\.cls is b'1\.5'"),
    "cls empty": (tar(*sample("k1", "")), r"x\.tar: k1\.cls is b''"),
    "cls two numbers": (tar(*sample("k1", "1 2")), r"x\.tar: k1\.cls is b'1 2'"),
    "cls underscored": (tar(*sample("k1", "1_0")), r"x\.tar: k1\.cls is b'1_0'"),
    "cls in other digits": (tar(*sample("k1", "\u0661")), r"x\.tar: k1\.cls is b'\\xd9"),
    "cls negative": (tar(*sample("k1", -1)), r"x\.tar: k1\.cls is b'-1', not a class number \(0, 1, 2"),
    "cls huge": (tar(*sample("k1", 10**30)), r"x\.tar: k1\.cls is b'1000.*, not a class number"),
    "cls long": (tar(("k1.jpg", b""), ("k1.cls", b"1" * 10**6)), r"x\.tar: k1\.cls has 1,000,000 bytes: too large"),
    "no image at all": (
        tar(("a.jpg", b"<html>"), ("a.cls", b"0"), ("k1.jpg", b""), ("k1.cls", b"1")),
        r"x\.tar: a\.jpg: not an image in a known format; nor is there any other image that can be opened",
    ),
    "cls above the class names": (tar(*sample("k1", 3)), r"x\.tar: k1\.jpg: label 3, but there are 3 class names"),
    "key twice": (tar(*GOOD, *GOOD), r"x\.tar: key good is there twice"),
    "cls twice": (tar(*GOOD, GOOD[1]), r"x\.tar: key good is there twice"),
    "two images": (tar(*GOOD, ("good.png", encoded(patch(1), "png"))), r"x\.tar: key good is there twice"),
    "gzip": (gzip.compress(WHOLE), COMPRESSED),
    "bzip2": (bz2.compress(WHOLE), COMPRESSED),
    "xz": (lzma.compress(WHOLE), COMPRESSED),
    "zip": (zipped(encoded(patch(0))), NO_TAR),
    "web page": (b"<html>404</html>" * 100, NO_TAR),
    "empty file": (b"", NO_TAR),
    "zeros": (bytes(10_240), r"x\.tar: holds no samples"),
    "empty tar": (tar(), r"x\.tar: holds no samples"),
    "other members": (tar(("readme.txt", b"text"), ("k1.npy", b"array")), r"x\.tar: holds no samples"),
    "names without ending": (tar(("jpg", b"x"), ("k1", b"x"), (".jpg", b"x")), r"x\.tar: holds no samples"),
    "cut in an image": (WHOLE[:900], AGAIN),
    "cut in a header": (WHOLE[:100], NO_TAR),
    "cut in a later header": (WHOLE[: WHOLE.index(b"good.cls") + 100], AGAIN),
    "cut between members": (WHOLE[: WHOLE.index(b"k1.jpg")], AGAIN),
    "no end": (WHOLE.rstrip(b"\0"), AGAIN),
    "garbage inside": (WHOLE.replace(b"k1.jpg", b"garbag"), AGAIN),
    "hole inside": (WHOLE[: WHOLE.index(b"k1.jpg")] + bytes(512) + WHOLE[WHOLE.index(b"k1.jpg") + 512 :], MORE),
    "two tars in one file": (WHOLE + tar(*sample("k2")), MORE),
    "negative size": (WHOLE[: WHOLE.index(b"k1.jpg")] + header("notes.txt", -512), r"damaged in notes\.txt"),
    "endless size": (header("k1.jpg", 2**80) + bytes(10_240), AGAIN),
    "size beyond the end": (header("k1.jpg", 10**12) + bytes(10_240), r"truncated or damaged in k1\.jpg: copy"),
    "endless name": (header("long", 2**80, tarfile.GNUTYPE_LONGNAME) + bytes(10_240), NO_TAR),
    "endless attributes": (header("pax", 2**62, tarfile.XHDTYPE) + bytes(10_240), NO_TAR),
    "attributes of words": (
        header("pax", 512, tarfile.XHDTYPE) + b"25 GNU.sparse.map=one,two\n".ljust(512, b"\0") + WHOLE,
        NO_TAR,
    ),
    "image a folder": (tar(*GOOD, (special(tarfile.DIRTYPE), b""), ("k1.cls", b"1")), r"k1 has a \.cls but no image"),
    "image a link": (tar(*GOOD, (special(tarfile.SYMTYPE), b""), ("k1.cls", b"1")), r"k1 has a \.cls but no image"),
    "image a hard link": (tar(*GOOD, (special(tarfile.LNKTYPE), b""), ("k1.cls", b"1")), r"k1 has a \.cls but no imag"),
    "image a device": (tar(*GOOD, (special(tarfile.CHRTYPE), b""), ("k1.cls", b"1")), r"k1 has a \.cls but no image"),
    "key not UTF-8": (tar(("k\udcff.cls", b"1")), r"x\.tar: key k\\udcff has a \.cls but no image"),
    "key of two lines": (tar(("a\nb/k1.cls", b"1")), r"x\.tar: key a\\nb/k1 has a \.cls but no image"),
    "key with a terminal's code": (tar(("k\x1b[2J.cls", b"1")), r"x\.tar: key k\\x1b\[2J has a \.cls but no image"),
    "no shards": (lambda path: None, r"in: no shard matches \*\.tar for the split train"),
    "shard a folder": (lambda path: path.mkdir(), r"x\.tar: not a regular file"),
    "shard a pipe": (lambda path: os.mkfifo(path), r"x\.tar: not a regular file"),
    "shard a broken link": (lambda path: path.symlink_to("nowhere"), r"x\.tar: No such file or directory"),
    "shard a link to itself": (lambda path: path.symlink_to(path.name), r"x\.tar: Too many levels of symbolic links"),
}


@pytest.fixture
def foreign(tmp_path: Path) -> Callable[[bytes | Damage], Index]:
    """Loads the training split of a folder with one shard of the given bytes, and three class names."""

    def load(shard: bytes | Damage) -> Index:
        (tmp_path / "in").mkdir(exist_ok=True)
        (tmp_path / "names.txt").write_text("cat\ndog\nowl\n")
        if isinstance(shard, bytes):
            (tmp_path / "in" / "x.tar").write_bytes(shard)
        else:
            shard(tmp_path / "in" / "x.tar")
        return load_index(tmp_path / "in", "train", tmp_path / "cache", "*.tar", tmp_path / "names.txt")

    return load


@pytest.mark.parametrize("case", FOREIGN)
def test_shards_of_others_that_cannot_be_loaded(foreign: Callable[[bytes | Damage], Index], case: str) -> None:
    shard, message = FOREIGN[case]
    with pytest.raises((UserError, OSError)) as error:
        foreign(shard)
    assert re.search(message, one_line(error)) and len(one_line(error)) < 500


@pytest.mark.parametrize("damage", [cut, lambda data: b"", lambda data: b"text"], ids=["cut", "empty", "text"])
def test_a_kept_index_that_is_damaged(
    foreign: Callable[[bytes | Damage], Index], tmp_path: Path, damage: Callable[[bytes], bytes]
) -> None:
    foreign(WHOLE)
    (kept,) = tmp_path.glob("cache/index/*.npy")
    kept.write_bytes(damage(kept.read_bytes()))
    with pytest.raises(UserError, match=rf"{kept.name}: damaged .*remove it and make it again"):
        load_index(tmp_path / "in", "train", tmp_path / "cache", "*.tar")


ACCEPTED = {
    "nested names": sample("a/b/k1"),
    "same name in two folders": [*sample("a/k1"), *sample("b/k1")],
    "long name": sample("k" * 300),
    "folder and other members": [(special(tarfile.DIRTYPE, "d/"), b""), ("notes.txt", b""), *sample("k1")],
    "not UTF-8": sample("k\udcff"),
    "two lines": sample("a\nb"),
    "upper case": [("k1.JPEG", encoded(patch(0))), ("k1.CLS", b"0")],
    "label first": sample("k1")[::-1],
    "spaces around the label": sample("k1", " 2\n"),
    "attributes that nobody knows": [(special(tarfile.XHDTYPE, "pax"), b"9" * 512), *sample("k1")],
    "PNG named jpg": [("k1.jpg", encoded(patch(0), "png")), ("k1.cls", b"1")],
}


@pytest.mark.parametrize("case", ACCEPTED)
def test_unusual_shards_that_are_sound(foreign: Callable[[bytes | Damage], Index], case: str) -> None:
    index = foreign(tar(*ACCEPTED[case]))
    images, labels, *_ = next(iter(evaluation(TorchLoader, index)))
    assert (labels[: len(index)] >= 0).all() and images[: len(index)].float().std() > 0
    assert index.name(0).isprintable() and index.name(0).encode()


def test_any_damage_to_a_tar_is_a_user_error_or_leaves_it_sound(tmp_path: Path) -> None:
    """Blocks of headers and images with other bytes, at random: 600 shards."""
    draws = np.random.default_rng(0)
    shards = (WHOLE, tar(*sample("d/" * 60 + "k", 1), *GOOD, format=tarfile.PAX_FORMAT), tar(*sample("k" * 120), *GOOD))
    path = tmp_path / "x.tar"
    refused = 0
    for _ in range(600):
        data = bytearray(shards[draws.integers(len(shards))])
        start = int(draws.choice([m for m in range(0, len(data), 512) if data[m + 257 : m + 262] == b"ustar"]))
        for _ in range(draws.integers(1, 4)):
            data[start + draws.integers(512)] = draws.integers(256)
        if draws.random() < 0.7:  # with a header that is sound in itself
            data[start + 148 : start + 156] = b" " * 8
            data[start + 148 : start + 156] = b"%06o\0 " % sum(data[start : start + 512])
        path.write_bytes(data)
        try:
            rows, keys = scan_shard(str(path))
        except UserError as error:
            refused += 1
            assert str(path) in str(error) and len(str(error).splitlines()) == 1
        else:
            assert len(rows) == len(keys)
            for row in rows:
                content = data[row["offset"] :][: row["size"]]
                assert len(content) == row["size"] and zlib.crc32(content) == row["crc32"]
    assert 100 < refused < 500


# --- faults that are met while images are read --------------------------------------------------------------------


def training(loader: type, index: Index, skip_bad: int, rows: int = 9, workers: int = 0) -> TorchLoader:
    crops = RandomCrops(
        index, RankSampler(len(index), rows), ImageSizes(32), seed=0, scale=(0.08, 1.0), ratio=(3 / 4, 4 / 3)
    )
    return loader(crops, LoaderOptions(workers=workers, prefetch=2, skip_bad=skip_bad))


def evaluation(loader: type, index: Index) -> TorchLoader:
    crops = CenterCrops(index, RankSampler(len(index), 16, drop_last=False), 32, crop_fraction=0.875)
    return loader(crops, LoaderOptions(workers=0, prefetch=2))


def flip(where: float) -> Callable[[Path, Index], int]:
    """One bit of one image, at this share of its bytes."""

    def damage(root: Path, index: Index) -> int:
        row = index.samples[20]
        with open(index.shards[row["shard"]], "r+b") as file:
            file.seek(int(row["offset"]) + int(where * (int(row["size"]) - 1)))
            byte = file.read(1)[0]
            file.seek(-1, io.SEEK_CUR)
            file.write(bytes([byte ^ 1]))
        return 1

    return damage


def shard_becomes(make: Callable[[Path], object]) -> Callable[[Path, Index], int]:
    """Another thing lies where the second shard was when the index was loaded."""

    def damage(root: Path, index: Index) -> int:
        data = (root / SHARD).read_bytes()
        replaced(SHARD, make)(root)
        if (root / SHARD).is_file() and (kept := (root / SHARD).read_bytes()):
            rows = index.samples[index.samples["shard"] == 1]
            return sum(kept[r["offset"] :][: r["size"]] != data[r["offset"] :][: r["size"]] for r in rows)
        return 16

    return damage


def exchanged(root: Path, index: Index) -> int:
    """The bytes of another shard under this one's name, at the same length."""
    other = (root / "train-000000.tar").read_bytes()
    size = (root / SHARD).stat().st_size
    (root / SHARD).write_bytes(other.ljust(size, b"\0")[:size])
    return 16


READING: dict[str, tuple[Callable[[Path, Index], int], str]] = {
    "first byte flipped": (flip(0), r"train-000001\.tar: \w+\.\w+: its bytes changed"),
    "middle byte flipped": (flip(0.5), r"train-000001\.tar: \w+\.\w+: its bytes changed"),
    "last byte flipped": (flip(1), r"train-000001\.tar: \w+\.\w+: its bytes changed"),
    "shard exchanged": (exchanged, r"train-000001\.tar: .*: its bytes changed"),
    "shard gone": (shard_becomes(lambda path: None), r"train-000001\.tar: .*No such file"),
    "shard a folder": (shard_becomes(Path.mkdir), r"train-000001\.tar: .*Is a directory"),
    "shard emptied": (shard_becomes(Path.touch), r"train-000001\.tar: .*: the shard ends inside this image"),
    "shard of zeros": (
        shard_becomes(lambda path: path.write_bytes(bytes(200_000))),
        r"train-000001\.tar: .*: its bytes changed",
    ),
}


@pytest.mark.parametrize("name", LOADERS)
@pytest.mark.parametrize("case", READING)
def test_damage_that_is_met_while_reading(copy: Path, tmp_path: Path, case: str, name: str) -> None:
    loader = LOADERS[name]
    index = load_index(copy, "train", tmp_path / "cache")
    sound = list(training(loader, index, skip_bad=0))
    damage, message = READING[case]
    check_faults(loader, index, damage(copy, index), message, sound)


def check_faults(loader: type, index: Index, bad: int, message: str, sound: list | None) -> None:
    """`bad` images are refused: counted and masked in training, an error in validation and above the budget."""
    assert bad > 0
    with pytest.raises(BadImage, match=message) as error:
        list(evaluation(loader, index))
    one_line(error)
    with pytest.raises(BadImage, match=message + r".*data\.skip_budget allows"):
        list(training(loader, index, skip_bad=bad - 1, rows=len(index) // 5))
    masked = list(training(loader, index, skip_bad=bad, rows=len(index) // 5))
    labels = torch.cat([batch[1] for batch in masked])
    assert (labels < 0).sum() == bad
    for mine, theirs in zip(masked, sound or (), strict=False):
        whole = mine[1] >= 0
        assert torch.equal(mine[0][whole], theirs[0][whole]) and torch.equal(mine[1][whole], theirs[1][whole])
        assert not mine[0][~whole].any()


def broken_png() -> bytes:
    data = bytearray(encoded(patch(3), "png"))
    data[data.index(b"IDAT") + 40] ^= 0xFF
    return bytes(data)


JPEG, PNG, WEBP = (encoded(patch(3, 100, 120), extension) for extension in ("jpg", "png", "webp"))
UNREADABLE = {  # known from the header, when shards are indexed
    "no bytes": (b"", "jpg"),
    "a web page": (b"<html>404</html>", "jpg"),
    "only a marker": (b"\xff\xd8\xff", "jpg"),
    "png header cut": (PNG[:20], "png"),
    "png bomb": (png_header(60_000, 60_000), "png"),
    "png bomb named jpg": (png_header(60_000, 60_000), "jpg"),
    "jpeg bomb": (jpeg_of_size(65_000, 65_000), "jpg"),
    "png without width": (png_header(0, 9), "png"),
    "PostScript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n", "jpg"),
    "a float image": (encoded(Image.new("F", (40, 40)), "tif"), "jpg"),
}
UNDECODABLE = {
    "jpeg cut in half": (cut(JPEG), "jpg"),
    "jpeg without its last bytes": (JPEG[:-40], "jpg"),
    "jpeg cut in half, with an end": (cut(JPEG) + b"\xff\xd9", "jpg"),
    "jpeg of a header": (JPEG[: JPEG.index(b"\xff\xda")], "jpg"),
    "jpeg of a header and an end": (JPEG[: JPEG.index(b"\xff\xda")] + b"\xff\xd9", "jpg"),
    "png cut in half": (cut(PNG), "png"),
    "png of a header": (PNG[:33], "png"),
    "png of wrong bytes": (broken_png(), "png"),
    "png without pixels": (png_header(40, 40), "png"),
    "png named jpg, cut": (cut(PNG), "jpg"),
    "webp cut": (cut(WEBP), "webp"),
    "gif named jpg, cut": (encoded(patch(3, 100, 120), "gif")[:500], "jpg"),
}


@pytest.mark.parametrize("name", LOADERS)
@pytest.mark.parametrize("case", [*UNREADABLE, *UNDECODABLE])
def test_images_of_others_that_do_not_decode(
    foreign: Callable[[bytes | Damage], Index], caplog: pytest.LogCaptureFixture, case: str, name: str
) -> None:
    data, extension = {**UNREADABLE, **UNDECODABLE}[case]
    members = [member for i in range(4) for member in sample(f"good{i}", i % 3, i)]
    index = foreign(tar(*members, (f"k1.{extension}", data), ("k1.cls", b"1")))
    said = re.search(rf"1 of 5 images cannot be opened, the first is .*/x\.tar: k1\.{extension}$", caplog.text, re.M)
    assert bool(said) == (index.samples["height"][4] == 0) and (said or case in UNDECODABLE)
    check_faults(LOADERS[name], index, 1, rf"x\.tar: k1\.{extension}: ", None)
    (line,) = verify(index.shards, index.samples, [None], workers=1)
    assert line.startswith(f"{index.shards[0]}: k1.{extension}: ")


def test_a_header_that_changed_costs_no_image(copy: Path, tmp_path: Path) -> None:
    """Images are read by offset: names and labels in the tar are looked at once, and --verify finds the change."""
    index = load_index(copy, "train", tmp_path / "cache")
    sound = list(evaluation(TorchLoader, index))
    start = int(index.samples["offset"][16])
    content(SHARD, lambda data: data[: start - 512] + b"\xff" + data[start - 511 :])(copy)
    again = load_index(copy, "train", tmp_path / "cache")
    for mine, theirs in zip(evaluation(TorchLoader, again), sound, strict=True):
        assert torch.equal(mine[0], theirs[0]) and torch.equal(mine[1], theirs[1])
    assert again.name(16) == f"{SHARD}: (no tar header before byte {start})"


def test_a_fault_in_a_worker_process_is_the_same_line(copy: Path, tmp_path: Path) -> None:
    index = load_index(copy, "train", tmp_path / "cache")
    (copy / SHARD).unlink()
    loader = training(TorchLoader, index, skip_bad=2, workers=1)
    with pytest.raises(BadImage, match=rf"^{SHARD}: .*No such file") as error:
        list(loader)
    one_line(error)
    del error  # whose traceback holds the iterator
    loader.close()


def test_a_process_ends_though_its_workers_ignore_signals(shards: Path, tmp_path: Path) -> None:
    """Something, usually the traceback of an error, still holds the iterator when the process ends."""
    script = """
import sys
from data.crops import CenterCrops
from data.index import load_index
from data.reader import LoaderOptions
from data.sampling import RankSampler
from data.torch_loader import TorchLoader
index = load_index(sys.argv[1], "train", sys.argv[2])
crops = CenterCrops(index, RankSampler(len(index), 1, drop_last=False), 32, crop_fraction=0.875)
held = iter(TorchLoader(crops, LoaderOptions(workers=1, prefetch=2)))
next(held)
sys.exit(3)
"""
    command = [sys.executable, "-c", script, str(shards), str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(command, env=environment, timeout=SECONDS, capture_output=True, text=True)
    assert done.returncode == 3 and "Error" not in done.stderr, done.stderr


def test_a_killed_worker_ends_the_epoch_with_its_cause(shards: Path, tmp_path: Path) -> None:
    loader = training(TorchLoader, load_index(shards, "train", tmp_path), skip_bad=0, rows=1, workers=2)
    batches = iter(loader)
    next(batches)
    said = r"DataLoader worker \(pid.*(killed|exited unexpectedly)"
    with pytest.raises(RuntimeError, match=said) as error:
        os.kill(loader._iterator._workers[0].pid, signal.SIGKILL)
        list(batches)
    assert "fewer data.workers" in str(user_message(error.value)).lower()


# --- sources of write_shards --------------------------------------------------------------------------------------


def file(name: str, data: bytes) -> Damage:
    return lambda root: (root / "train" / "dog" / name).write_bytes(data)


def bitmap_bomb() -> bytes:
    buffer = io.BytesIO()
    Image.new("1", (20_000, 10_000)).save(buffer, "PNG")
    return buffer.getvalue()


SOURCES: dict[str, tuple[Damage, str]] = {
    "text": (file("x.jpg", b"<html>404</html>"), r"dog/x\.jpg: not an image in a known format"),
    "nothing": (file("x.jpg", b""), r"dog/x\.jpg: not an image in a known format"),
    "zeros": (file("x.jpg", bytes(5000)), r"dog/x\.jpg: not an image in a known format"),
    "jpeg cut": (file("x.jpg", cut(JPEG)), r"dog/x\.jpg: .*[Tt]runcated"),
    "jpeg without its end": (file("x.jpg", JPEG[:-40]), r"dog/x\.jpg: .*truncated"),
    "jpeg of another size": (file("x.jpg", jpeg_of_size(65_000, 65_000)), r"dog/x\.jpg: DecompressionBomb"),
    "png cut": (file("x.png", cut(PNG)), r"dog/x\.png: "),
    "png of wrong bytes": (file("x.png", broken_png()), r"dog/x\.png: "),
    "png bomb": (file("x.png", bitmap_bomb()), r"dog/x\.png: DecompressionBomb"),
    "png bomb of few bytes": (file("x.png", png_header(60_000, 60_000)), r"dog/x\.png: DecompressionBomb"),
    "gif cut": (file("x.gif", encoded(patch(3), "gif")[:60]), r"dog/x\.gif: "),
    "broken link": (lambda root: (root / "train" / "dog" / "x.jpg").symlink_to("nowhere"), r"dog/x\.jpg: No such file"),
    "link to itself": (lambda root: (root / "train" / "dog" / "x.jpg").symlink_to("x.jpg"), r"dog/x\.jpg: Too many"),
    "no images": (lambda root: (root / "train" / "elk").mkdir(), r"train/elk: no image in this class folder"),
    "class of val only": (lambda root: (root / "train" / "dog").rename(root / "train" / "dot"), "dog: a class in val"),
    "no val": (lambda root: shutil.rmtree(root / "val"), r"no val/ beside train/: add one"),
    "nothing at all": (shutil.rmtree, "in: no such folder"),
}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_images(tmp_path_factory.mktemp("images"), train=2, val=1)


@pytest.mark.parametrize("case", SOURCES)
def test_sources_that_cannot_be_written(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], case: str
) -> None:
    root = Path(shutil.copytree(images, tmp_path / "in"))
    damage, message = SOURCES[case]
    damage(root)
    code = write_shards(["folder", str(root), str(tmp_path / "out"), "--workers", "1"])
    printed = capsys.readouterr().err.strip().splitlines()[-1]
    assert code == 2 and printed.startswith("error: "), printed
    assert re.search(message, printed), printed
    assert not (tmp_path / "out" / "manifest.json").exists()
