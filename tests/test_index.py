import gzip
import hashlib
import io
import json
import multiprocessing
import os
import shutil
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import run_script
from images import encoded, make_images, patch
from PIL import Image

from data.index import Index, load_index, load_indexes, main
from data.shards import find_shards, numbered_classes
from data.tars import SAMPLE, member_name, member_names
from data.write_shards.write import write_folder
from repghost.errors import UserError


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """Shards that the writer made; tests that change them take a copy."""
    root = tmp_path_factory.mktemp("prepared")
    write_folder(make_images(root / "images"), root / "shards", images_per_shard=8, workers=1, quiet=True)
    return root / "shards"


@pytest.fixture
def copy(prepared, tmp_path):
    return Path(shutil.copytree(prepared, tmp_path / "shards"))


def sample(key: str, label: int | str, number: int = 0, extension: str = "jpg") -> list[tuple[str, bytes]]:
    return [(f"{key}.{extension}", encoded(patch(number), extension)), (f"{key}.cls", str(label).encode())]


def write_tar(path: Path, members: list[tuple[str, bytes]], format: int = tarfile.USTAR_FORMAT) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=format) as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def foreign(root: Path) -> Path:
    """Shards as on the hub: no manifest, other member names and orders, members that nobody reads."""
    for shard in range(2):
        members = []
        for i in range(3):
            number = 3 * shard + i
            members += sample(f"sub.dir/{number:04d}", number % 3, number, ("jpg", "JPEG", "png")[i])[
                :: 1 - 2 * (i % 2)
            ]
            members.append((f"sub.dir/{number:04d}.json", b"{}"))
        write_tar(root / f"set-train-{shard:04d}.tar", members)
    write_tar(root / "set-validation-00.tar", sample("a", 0, 10) + sample("b", 2, 11, "webp"))
    return root


# --- prepared shards ------------------------------------------------------------------------------


def test_prepared_shards(prepared, tmp_path):
    index = load_index(prepared, "train", tmp_path)
    assert index.samples.dtype == SAMPLE and SAMPLE.itemsize == 32
    assert (len(index), len(index.classes), index.classes) == (30, 3, ("cat", "dog", "owl"))
    assert [Path(shard).name for shard in index.shards] == [f"train-{i:06d}.tar" for i in range(4)]
    assert np.bincount(index.samples["shard"]).tolist() == [8, 8, 8, 6]
    for i, row in enumerate(index.samples):
        content = Path(index.shards[row["shard"]]).read_bytes()[row["offset"] :][: row["size"]]
        assert zlib.crc32(content) == row["crc32"]
        assert Image.open(io.BytesIO(content)).size == (row["width"], row["height"])
        shard, _, member = index.name(i).partition(": ")
        assert shard == f"train-{row['shard']:06d}.tar"
        assert member.startswith(index.classes[row["label"]])
    assert not list(tmp_path.iterdir()), "nothing to cache"


def test_the_fingerprint_tells_data_sets_apart_wherever_they_lie(prepared, copy, tmp_path):
    index = load_index(prepared, "train", tmp_path)
    assert index.fingerprint == load_index(copy, "train", tmp_path).fingerprint
    assert index.fingerprint != load_index(prepared, "val", tmp_path).fingerprint
    relabelled = index.samples.copy()
    relabelled["label"][0] ^= 1
    assert index.fingerprint != Index("train", index.shards, relabelled, index.classes).fingerprint
    assert index.fingerprint != Index("train", index.shards, index.samples, ("cat", "dog", "pig")).fingerprint


def missing_shard(root: Path) -> str:
    (root / "train-000001.tar").unlink()
    return "train-000001.tar: missing"


def truncated_shard(root: Path) -> str:
    size = (root / "train-000002.tar").stat().st_size
    os.truncate(root / "train-000002.tar", 1234)
    return f"train-000002.tar has 1234 bytes, the manifest says {size}: copy it again"


def missing_index(root: Path) -> str:
    (root / "train.index.npy").unlink()
    return "train.index.npy: missing"


def stale_index(root: Path) -> str:
    rows = np.load(root / "train.index.npy")
    rows["label"][0] ^= 1
    np.save(root / "train.index.npy", rows)
    return "train.index.npy: not the file that manifest.json describes"


def no_json(root: Path) -> str:
    os.truncate(root / "manifest.json", 100)
    return "manifest.json: not a manifest of format 1"


def other_format(root: Path) -> str:
    manifest = json.loads((root / "manifest.json").read_text())
    (root / "manifest.json").write_text(json.dumps({**manifest, "format": 2}))
    return "manifest.json: not a manifest of format 1"


def other_json(root: Path) -> str:
    (root / "manifest.json").write_text("[]")
    return "manifest.json: not a manifest of format 1"


def fewer_classes(root: Path) -> str:
    manifest = json.loads((root / "manifest.json").read_text())
    (root / "manifest.json").write_text(json.dumps({**manifest, "classes": ["cat", "dog"]}))
    return "label 2, but there are 2 class names"


def no_split(root: Path) -> str:
    manifest = json.loads((root / "manifest.json").read_text())
    del manifest["splits"]["train"]
    (root / "manifest.json").write_text(json.dumps(manifest))
    return "manifest.json: no split train, only val"


@pytest.mark.parametrize(
    "spoil",
    [
        missing_shard,
        truncated_shard,
        missing_index,
        stale_index,
        no_json,
        other_format,
        other_json,
        fewer_classes,
        no_split,
    ],
)
def test_what_does_not_fit_the_manifest_is_named(copy, tmp_path, capsys, spoil):
    message = spoil(copy)
    with pytest.raises(UserError) as error:
        load_index(copy, "train", tmp_path)
    assert message in str(error.value)
    assert main([str(copy), "--split", "train", "--cache", str(tmp_path / "cache")]) == 2
    assert message in capsys.readouterr().err


def test_verify(copy, tmp_path, capsys):
    arguments = [str(copy), "--cache", str(tmp_path / "cache"), "--workers", "1", "--verify"]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert "train: 30 images in 4 shards, 3 classes" in printed and "no damaged images" in printed

    index = load_index(copy, "train", tmp_path)
    row = index.samples[11]
    with open(index.shards[1], "r+b") as file:
        file.seek(int(row["offset"]) + int(row["size"]) // 2)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))
    with open(copy / "val-000000.tar", "r+b") as file:  # a label
        content = file.read()
        file.seek(content.index(b".cls\0"))
        file.write(b".clx\0")
    assert main(arguments) == 1
    lines = capsys.readouterr().out.splitlines()
    assert f"{copy}/{index.name(11)}: its bytes have changed (checksum)" in lines
    assert f"{copy / 'val-000000.tar'}: its labels or tar headers have changed (checksum): copy it again" in lines
    assert lines[-1] == "2 damaged"


def test_verify_decodes_shards_of_others(tmp_path, capsys):
    """Only the header is parsed when they are indexed."""
    broken = encoded(patch(3, 150, 160))
    members = [*sample("a", 0), ("b.jpg", broken[: len(broken) * 2 // 3]), ("b.cls", b"1")]
    path = write_tar(tmp_path / "in" / "x.tar", members)
    arguments = [str(path.parent), "--split", "val", "--pattern", "*.tar", "--cache", str(tmp_path / "cache")]
    assert main(arguments) == 0
    assert main([*arguments, "--workers", "1", "--verify"]) == 1
    printed = capsys.readouterr().out
    assert f"{path}: b.jpg: OSError: image file is truncated" in printed and printed.endswith("1 damaged\n")


def test_a_million_samples(tmp_path):
    """Rows are loaded as one array: as many as in ImageNet, in 1,024 shards that are only looked at."""
    count, shards = 1_281_167, 1024
    rows = np.zeros(count, SAMPLE)
    rows["shard"] = np.arange(count) * shards // count
    rows["height"] = rows["width"] = 1
    rows["label"] = np.arange(count) % 1000
    np.save(tmp_path / "train.index.npy", rows)
    for i in range(shards):
        (tmp_path / f"train-{i:06d}.tar").touch()
    digest = hashlib.sha256((tmp_path / "train.index.npy").read_bytes()).hexdigest()
    entry = {
        "index": {"file": "train.index.npy", "sha256": digest},
        "shards": [{"file": f"train-{i:06d}.tar", "bytes": 0} for i in range(shards)],
    }
    manifest = {"format": 1, "classes": [str(i) for i in range(1000)], "splits": {"train": entry}}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    index = load_index(tmp_path, "train", tmp_path)
    assert np.array_equal(index.samples, rows) and len(index.shards) == shards


def spoil_manifest(root: Path, change: Callable[[dict[str, Any]], object]) -> None:
    manifest = json.loads((root / "manifest.json").read_text())
    change(manifest)
    (root / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m["splits"]["train"].update(images=31), "30 images, but manifest.json says 31"),
        (lambda m: m["splits"]["train"].update(images="30"), "30 images, but manifest.json says '30'"),
        (lambda m: m["splits"]["train"]["images_per_class"].reverse(), ""),
        (
            lambda m: m["splits"]["train"].update(images_per_class=[11, 9, 10]),
            "10 images of class cat, but manifest.json says 11",
        ),
        (lambda m: m["splits"]["train"].update(images_per_class=[30]), "images_per_class is no list of 3 counts"),
        (lambda m: m["splits"]["train"].update(images_per_class=3), "images_per_class is no list of 3 counts"),
        (
            lambda m: m["splits"]["train"]["shards"][3].update(images=8),
            "6 images in train-000003.tar, but manifest.json says 8",
        ),
        (lambda m: m["splits"]["train"]["shards"].pop(), "lies outside of its shard"),
        (lambda m: m["splits"]["train"]["shards"][1].update(file="train-000000.tar"), "'train-000000.tar' is there 2"),
        (lambda m: m["splits"]["val"]["shards"][0].update(file="train-000000.tar"), "'train-000000.tar' is there 2"),
        (lambda m: m.update(classes=["cat", "cat", "owl"]), "'cat' is there 2 times"),
        (lambda m: m.update(classes=["cat", 1, "owl"]), "1 is no name"),
        (lambda m: m.update(classes=["cat", ["dog"], "owl"]), "['dog'] is no name"),
        (lambda m: m.update(classes=["cat", "dog", "owl", "pig"]), "images_per_class is no list of 4 counts"),
        (lambda m: m["splits"]["train"].update(skipped=3), "its skipped is no list"),
    ],
)
def test_a_manifest_that_contradicts_the_shards(copy, tmp_path, change, message):
    spoil_manifest(copy, change)
    if not message:
        assert len(load_index(copy, "train", tmp_path)) == 30
        return
    with pytest.raises(UserError) as error:
        load_index(copy, "train", tmp_path)
    assert message in str(error.value) and str(copy) in str(error.value) and "\n" not in str(error.value)


# --- shards of others -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "pattern", [None, "*train*.tar", "set-train-{0000..0001}.tar", "*-{0000,0001}.tar", "absolute"]
)
def test_shards_of_others(tmp_path, pattern):
    root = foreign(tmp_path / "a[b]")  # a folder name that a glob would misread
    if pattern == "absolute":
        pattern = f"{foreign(tmp_path / 'plain')}/*train*.tar"
    index = load_index(root, "train", tmp_path / "cache", pattern)
    assert index.samples["label"].tolist() == [0, 1, 2, 0, 1, 2]
    assert index.samples["shard"].tolist() == [0, 0, 0, 1, 1, 1]
    assert index.classes == ("0", "1", "2")
    assert index.name(4) == "set-train-0001.tar: sub.dir/0004.JPEG"
    for i, row in enumerate(index.samples):
        with open(index.shards[row["shard"]], "rb") as file:
            content = os.pread(file.fileno(), row["size"], row["offset"])
        assert content == encoded(patch(i), ("jpg", "jpg", "png")[i % 3])
        assert (row["width"], row["height"]) == patch(i).size and row["crc32"] == zlib.crc32(content)


def test_default_patterns_and_class_names(tmp_path):
    root = foreign(tmp_path / "in")
    (tmp_path / "names.txt").write_text("cat\ndog\nowl\n")
    val = load_index(root, "val", tmp_path / "cache", class_names=tmp_path / "names.txt")
    assert val.classes == ("cat", "dog", "owl") and val.samples["label"].tolist() == [0, 2]
    write_tar(tmp_path / "two" / "train" / "0.tar", sample("a", 1))
    write_tar(tmp_path / "two" / "val" / "0.tar", sample("a", 0))
    assert load_index(tmp_path / "two", "train", tmp_path / "cache").classes == ("0", "1")
    assert load_index(tmp_path / "two", "val", tmp_path / "cache").classes == ("0", "1"), "of both splits"


def test_the_classes_are_those_of_both_splits(tmp_path):
    """The validation images of `foreign` have the labels 0 and 2, its training images 0 to 2."""
    write_tar(tmp_path / "a" / "train-0.tar", sample("a", 0) + sample("b", 2))
    write_tar(tmp_path / "a" / "val-0.tar", sample("a", 1))
    indexes = load_indexes(tmp_path / "a", ["train", "val"], tmp_path / "cache")
    assert [indexes[split].classes for split in ("train", "val")] == [("0", "1", "2")] * 2
    alone = load_index(tmp_path / "a", "val", tmp_path / "cache")
    assert (alone.classes, alone.fingerprint) == (indexes["val"].classes, indexes["val"].fingerprint)
    patterns = {"train": "*train*.tar", "val": "val-{0..0}.tar"}
    assert load_indexes(tmp_path / "a", ["val"], tmp_path / "cache", patterns)["val"].classes == ("0", "1", "2")
    (tmp_path / "a" / "train-0.tar").unlink()
    assert load_index(tmp_path / "a", "val", tmp_path / "cache").classes == ("0", "1"), "all that is known"
    assert load_indexes(tmp_path / "a", ["val"], tmp_path / "cache", patterns)["val"].classes == ("0", "1")


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("train-0000.tar", "train"),
        ("retrieval-train-0000.tar", "train"),
        ("retrieval-val-0000.tar", "val"),
        ("pretrained-val-0000.tar", "val"),
        ("imagenet1k-validation-00.tar", "val"),
        ("valid0000.tar", "val"),
        ("Set_TRAIN_0.tar", "train"),
        ("train/0.tar", "train"),
        ("train/retrieval-val.tar", "train"),
        ("Validation/train.tar", "val"),
        ("valid/0.tar", "val"),
        ("retrieval-0000.tar", None),
        ("trainval.tar", None),
        (".train.tar", None),
        ("train.tar.gz", None),
        ("other/train.tar", None),
    ],
)
def test_the_split_that_a_name_stands_for(tmp_path, name, split):
    write_tar(tmp_path / "in" / name, GOOD)
    for each in ("train", "val"):
        if each == split:
            assert find_shards(tmp_path / "in", each, None) == (str(tmp_path / "in" / name),)
        else:
            with pytest.raises(UserError, match="neither a"):
                find_shards(tmp_path / "in", each, None)


def test_no_shard_is_in_both_splits(tmp_path):
    both = write_tar(tmp_path / "in" / "val_of_train.tar", GOOD)
    message = f"{both}: both a shard of train and of val: name those of each with data.train and data.val"
    for splits in (["train", "val"], ["val"]):
        with pytest.raises(UserError) as error:
            load_indexes(tmp_path / "in", splits, tmp_path / "cache")
        assert str(error.value) == message
    for pattern in ("val*", "../in/val*", f"{tmp_path}/*/val*"):
        with pytest.raises(UserError, match="both a shard of train and of val"):
            load_indexes(tmp_path / "in", ["train", "val"], tmp_path / "cache", {"train": "*", "val": pattern})
    alone = load_indexes(tmp_path / "in", ["val"], tmp_path / "cache", {"train": None, "val": "val*.tar"})
    assert len(alone["val"]) == 1, "the training images may be evaluated"


def test_a_pattern_may_name_some_shards_of_a_manifest(copy, tmp_path):
    patterns = {"train": "train-00000{0..1}.tar", "val": None}
    indexes = load_indexes(copy, ["train", "val"], tmp_path / "cache", patterns)
    assert [len(index) for index in indexes.values()] == [16, 12]
    assert {index.classes for index in indexes.values()} == {("cat", "dog", "owl")}
    with pytest.raises(UserError, match=r"data\.train=train-\{0: "):
        load_index(copy, "train", tmp_path / "cache", "train-{0")


def test_labels_that_are_ids(tmp_path, capsys):
    write_tar(tmp_path / "in" / "train-0.tar", sample("a", 4_000_000) + sample("b", 4_000_001))
    write_tar(tmp_path / "in" / "val-0.tar", sample("a", 4_000_000))
    assert main([str(tmp_path / "in"), "--cache", str(tmp_path / "cache")]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert f"{tmp_path / 'in'}: labels up to 4,000,001 for 3 images of 2 classes look like ids" in error
    (tmp_path / "names.txt").write_text("cat\ndog\n")
    with pytest.raises(UserError, match="label 4000000, but there are 2 class names"):
        load_index(tmp_path / "in", "train", tmp_path / "cache", class_names=tmp_path / "names.txt")


@pytest.mark.parametrize(
    ("labels", "sane"),
    [
        ([0, 1], True),
        ([5, 999], True),
        ([0, 1000], False),
        (range(0, 21_841, 15), True),  # a few shards of ImageNet-21k
        (range(21_841), True),
        ([21_840] * 100, False),
        ([1_440_764 + 13_000 * i for i in range(1000)] * 10, False),  # numbers of WordNet
        ([*range(1000), 5_000], True),
    ],
)
def test_which_labels_are_taken_for_ids(labels, sane):
    labels = np.array(labels)
    if sane:
        assert len(numbered_classes(labels, "x")) == labels.max() + 1
    else:
        with pytest.raises(UserError, match="look like ids"):
            numbered_classes(labels, "x")


def test_a_tilde_is_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    foreign(tmp_path / "in")
    assert len(load_index("~/in", "train", "~/cache")) == 6
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cache", "in"]


def test_the_index_of_others_is_kept_and_follows_the_shards(tmp_path):
    root = foreign(tmp_path / "in")
    first = load_index(root, "train", tmp_path / "cache")
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache" / "index").glob("*.npy")}
    assert len(kept) == 2, "one for each split"
    assert load_index(root, "train", tmp_path / "cache").fingerprint == first.fingerprint
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    write_tar(root / "set-train-0001.tar", sample("new", 2, 8))
    assert len(load_index(root, "train", tmp_path / "cache")) == 4


def test_shards_of_others_may_be_read_only(tmp_path):
    root = foreign(tmp_path / "in")
    before = {path: path.stat().st_mtime_ns for path in [root, *root.iterdir()]}
    root.chmod(0o555)
    try:
        load_index(root, "train", tmp_path / "cache")
    finally:
        root.chmod(0o755)
    assert {path: path.stat().st_mtime_ns for path in [root, *root.iterdir()]} == before


def test_processes_that_need_the_index_at_once_share_it(tmp_path):
    root = foreign(tmp_path / "in")
    processes = [
        multiprocessing.get_context("spawn").Process(target=load_index, args=(root, "train", tmp_path / "cache"))
        for _ in range(2)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    assert len(list((tmp_path / "cache" / "index").glob("*.npy"))) == 2, "one for each split"


@pytest.mark.parametrize(
    ("format", "length"),
    [(tarfile.USTAR_FORMAT, 44), (tarfile.USTAR_FORMAT, 100)]
    + [(f, n) for f in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT) for n in (44, 99, 100, 101, 130, 250, 3000)],
)
def test_member_name(tmp_path, format, length):
    name = "d/" * 20 + "k" * (length - 44) + ".jpg"
    assert len(name) == length
    names = ["first.jpg", name, "last.jpg"] + ["é" + name[1:]] * (format != tarfile.USTAR_FORMAT)
    path = write_tar(tmp_path / "x.tar", [(n, encoded(patch(i))) for i, n in enumerate(names)], format)
    found = member_names(path)
    with tarfile.open(path) as tar:
        assert [member_name(found, member.offset_data) for member in tar] == names
    assert "no tar header" in member_name(found, 5)


GOOD = sample("good", 0)
BAD_TARS = {
    "no label": ([*GOOD, sample("k1", 0)[0]], "key k1 has an image but no .cls"),
    "no image": ([*GOOD, sample("k1", 0)[1]], "key k1 has a .cls but no image"),
    "text": (sample("k1", "cat"), "k1.cls is b'cat', not a class number"),
    "fraction": (sample("k1", "1.5"), "k1.cls is b'1.5', not a class number"),
    "empty label": (sample("k1", ""), "k1.cls is b'', not a class number"),
    "huge": (sample("k1", 2**40), "not a class number"),
    "negative": (sample("k1", -1), "k1.cls is b'-1', not a class number"),
    "too large": (sample("k1", 3), "x.tar: k1.jpg: label 3, but there are 3 class names"),
    "twice": (GOOD + sample("k1", 0) + sample("k1", 1), "key k1 is there twice"),
    "two images": ([*GOOD, ("good.png", encoded(patch(1), "png"))], "key good is there twice"),
    "no picture": ([("k1.jpg", b"<html>"), ("k1.cls", b"0")], "k1.jpg: not an image in a known format"),
    "empty picture": ([("k1.jpg", b""), ("k1.cls", b"0")], "k1.jpg: not an image in a known format"),
    "nothing": ([], "holds no samples"),
    "other members": ([("readme.txt", b"text"), ("k1.npy", b"array")], "holds no samples"),
}


@pytest.mark.parametrize("case", BAD_TARS)
def test_bad_samples_are_named(tmp_path, case):
    members, message = BAD_TARS[case]
    path = write_tar(tmp_path / "in" / "x.tar", members)
    (tmp_path / "names.txt").write_text("cat\ndog\nowl\n")
    with pytest.raises(UserError) as error:
        load_index(path.parent, "train", tmp_path / "cache", "*.tar", tmp_path / "names.txt")
    assert message in str(error.value) and "x.tar" in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tar: tar[:700], "copy it again"),
        (lambda tar: tar[:1024], "copy it again"),
        (lambda tar: tar.rstrip(b"\0"), "copy it again"),
        (lambda tar: tar[:1024] + b"garbage!" * 64 + tar[1536:], "copy it again"),
        (lambda tar: b"", "damaged or not a tar"),
        (lambda tar: b"not a tar" * 1000, "damaged or not a tar"),
        (gzip.compress, "compressed, so samples cannot be read by offset"),
    ],
    ids=["in data", "in a label", "no end", "garbage", "empty file", "text", "gzip"],
)
def test_bad_tars_are_named(tmp_path, change, message):
    members = [("k.cls", b"0"), ("k.jpg", encoded(patch(0))), *sample("last", 1, 1)]
    path = write_tar(tmp_path / "in" / "x.tar", members)
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(UserError, match=message) as error:
        load_index(path.parent, "train", tmp_path / "cache", "*.tar")
    assert str(path) in str(error.value)


def test_every_way_to_cut_a_tar_is_found(tmp_path):
    path = write_tar(tmp_path / "in" / "x.tar", sample("a", 0) + sample("b", 1, 1))
    content = path.read_bytes()
    end = len(content.rstrip(b"\0"))
    for size in range(0, end, 173):
        path.write_bytes(content[:size])
        with pytest.raises(UserError, match=r"x\.tar"):
            load_index(path.parent, "train", tmp_path / "cache", "*.tar")


def test_keys_of_two_shards_must_differ(tmp_path):
    for number in range(2):
        write_tar(tmp_path / "in" / f"{number}.tar", sample("k1", 0) + sample(f"own{number}", 1))
    with pytest.raises(UserError, match=r"1\.tar: key k1 is also in 0\.tar|0\.tar: key k1 is also in 1\.tar"):
        load_index(tmp_path / "in", "train", tmp_path / "cache", "*.tar")


def test_shards_that_are_not_there(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        load_index(tmp_path / "nowhere", "train", tmp_path / "cache")
    (tmp_path / "in").mkdir()
    with pytest.raises(UserError, match="nor shards whose names have train as a word: name them"):
        load_index(tmp_path / "in", "train", tmp_path / "cache")
    with pytest.raises(UserError, match=r"no shard matches x-\*\.tar"):
        load_index(tmp_path / "in", "train", tmp_path / "cache", "x-*.tar")
    write_tar(tmp_path / "in" / "x-0.tar", GOOD)
    with pytest.raises(UserError, match=r"no shard matches x-1\.tar"):
        load_index(tmp_path / "in", "train", tmp_path / "cache", "x-{0..1}.tar")


def test_help_needs_no_torch():
    assert run_script("import sys, data.index; print('torch' in sys.modules)") == "False\n"


@pytest.mark.parametrize("value", ["0", "-1", "two"])
def test_workers_is_a_count(tmp_path, capsys, value):
    with pytest.raises(SystemExit) as end:
        main([str(tmp_path), "--verify", f"--workers={value}"])
    assert end.value.code == 2 and f"{value} is not a whole number from 1 on" in capsys.readouterr().err
