import gzip
import hashlib
import io
import itertools
import json
import multiprocessing
import os
import resource
import shutil
import subprocess
import sys
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset
from filelock import FileLock
from images import encoded, make_class_folders, make_images, patch
from PIL import Image
from scipy.io import savemat

from data.digits import prepare_digits
from data.index import load_index
from data.write_shards.__main__ import main
from data.write_shards.archives import list_archives
from data.write_shards.folder import list_folder, list_kaggle
from data.write_shards.parquet import list_parquet
from data.write_shards.write import write_folder, write_shards
from repghost.errors import UserError

ROOT = Path(__file__).parents[1]
QUIET = {"workers": 1, "quiet": True, "images_per_shard": 8}


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return make_images(tmp_path_factory.mktemp("images"))


def shard_bytes(out: Path) -> dict[str, str]:
    """{file name: sha256} of everything that is not there only to go on."""
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in out.iterdir() if p.is_file()}


def stored(out: Path, split: str) -> dict[str, tuple[bytes, int]]:
    """{key: (image bytes, label)} as the index says."""
    index = load_index(out, split, out / "unused")
    found = {}
    for i, row in enumerate(index.samples):
        shard, _, member = index.name(i).partition(": ")
        content = (out / shard).read_bytes()[row["offset"] : row["offset"] + row["size"]]
        assert zlib.crc32(content) == row["crc32"]
        assert Image.open(io.BytesIO(content)).size == (row["width"], row["height"])
        found[member.partition(".")[0]] = (content, int(row["label"]))
    assert len(found) == len(index)
    return found


def originals(folder: Path) -> dict[str, tuple[bytes, int]]:
    """The same, read from class folders whose file stems begin with the class name."""
    classes = sorted(path.name for path in folder.iterdir())
    return {p.stem: (p.read_bytes(), classes.index(p.parent.name)) for p in folder.glob("*/*")}


def one_line(capsys) -> str:
    """What a failed command printed last on stderr."""
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ")
    return error


# --- folder ---------------------------------------------------------------------------------------


def test_folder_stores_every_image_unchanged(images, tmp_path):
    manifest = write_folder(images, tmp_path, **QUIET)
    for split, count in (("train", 30), ("val", 12)):
        assert stored(tmp_path, split) == originals(images / split)
        entry = manifest["splits"][split]
        assert entry["images"] == count == sum(shard["images"] for shard in entry["shards"])
        assert entry["images_per_class"] == [count // 3] * 3
        for shard in entry["shards"]:
            content = (tmp_path / shard["file"]).read_bytes()
            assert (len(content), hashlib.sha256(content).hexdigest()) == (shard["bytes"], shard["sha256"])
    assert manifest == json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["classes"] == ["cat", "dog", "owl"] and manifest["shuffle"] == "global"
    assert load_index(tmp_path, "train", tmp_path).samples["label"].tolist() != sorted([0, 1, 2] * 10), "shuffled"


def test_webdataset_reads_the_shards(images, tmp_path):
    write_folder(images, tmp_path, **QUIET)
    shards = sorted(map(str, tmp_path.glob("train-*.tar")))
    samples = list(webdataset.WebDataset(shards, shardshuffle=False))
    found = {s["__key__"]: (s.get("jpg") or s["png"], int(s["cls"])) for s in samples}
    assert found == originals(images / "train")
    index = load_index(tmp_path, "train", tmp_path)
    assert [int(s["cls"]) for s in samples] == index.samples["label"].tolist()
    decoded = next(iter(webdataset.WebDataset(shards, shardshuffle=False).decode("pil")))
    assert (decoded["jpg"] if "jpg" in decoded else decoded["png"]).mode == "RGB"


def test_bytes_depend_on_the_seed_alone(images, tmp_path):
    write_folder(images, tmp_path / "one", **QUIET)
    write_folder(images, tmp_path / "two", **{**QUIET, "workers": 2})
    assert shard_bytes(tmp_path / "one") == shard_bytes(tmp_path / "two")
    write_folder(images, tmp_path / "other", **QUIET, seed=1)
    assert shard_bytes(tmp_path / "one")["train-000000.tar"] != shard_bytes(tmp_path / "other")["train-000000.tar"]


def test_a_restart_writes_only_what_is_missing(images, tmp_path):
    write_folder(images, tmp_path, **QUIET)
    before = shard_bytes(tmp_path)
    for path in tmp_path.glob("*.tar"):
        os.utime(path, (0, 0))  # which no new file has, however coarse the times of the file system are
    (tmp_path / "manifest.json").unlink()
    (tmp_path / "train-000001.tar").unlink()
    os.truncate(tmp_path / "val-000000.tar", 1000)
    (tmp_path / ".train-000001.tar.x.tmp").write_bytes(b"what a killed run leaves")
    write_folder(images, tmp_path, **QUIET)
    assert shard_bytes(tmp_path) == before
    rewritten = {p.name for p in tmp_path.glob("*.tar") if p.stat().st_mtime != 0}
    assert rewritten == {"train-000001.tar", "val-000000.tar"}


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"seed": 1}, "seed 0"),
        ({"images_per_shard": 9}, "images_per_shard 8"),
        ({"resize": 16}, "resize None"),
    ],
)
def test_a_restart_with_other_options_is_refused(images, tmp_path, change, named):
    write_folder(images, tmp_path, **QUIET)
    with pytest.raises(UserError, match=named):
        write_folder(images, tmp_path, **{**QUIET, **change})


def test_a_restart_with_other_images_is_refused(images, tmp_path):
    write_folder(images, tmp_path / "out", **QUIET)
    fewer = make_images(tmp_path / "fewer", train=9)
    with pytest.raises(UserError, match="other images in train"):
        write_folder(fewer, tmp_path / "out", **QUIET)
    renamed = make_images(tmp_path / "renamed", classes=("cat", "dog", "pig"))
    with pytest.raises(UserError, match=r"other classes \(differing: owl\)"):
        write_folder(renamed, tmp_path / "out", **QUIET)
    with pytest.raises(UserError, match="not empty"):
        write_folder(images, fewer, **QUIET)


def test_splits_one_by_one_equal_both_at_once(images, tmp_path):
    write_folder(images, tmp_path / "both", **QUIET)
    write_folder(images / "train", tmp_path / "one", "train", **QUIET)
    with pytest.raises(UserError, match="no split val"):
        load_index(tmp_path / "one", "val", tmp_path)
    write_folder(images / "val", tmp_path / "one", "val", **QUIET)
    assert shard_bytes(tmp_path / "one") == shard_bytes(tmp_path / "both")


def test_command_line(images, tmp_path, capsys):
    (images / "train" / "cat" / "notes.txt").write_text("no image")
    try:
        arguments = ["folder", str(images), str(tmp_path / "out"), "--workers", "1"]
        assert main([*arguments, "--images-per-shard", "8"]) == 0
    finally:
        (images / "train" / "cat" / "notes.txt").unlink()
    printed = capsys.readouterr().out
    assert "train: 30 images in 4 shards" in printed and "val: 12 images in 2 shards" in printed
    assert "3 classes of 10 to 10 images (median 10)" in printed
    assert "train: 1 files without an image's extension ignored" in printed
    assert main(["folder", str(images / "train"), str(tmp_path / "x")]) == 2
    assert "say with --split train (or val)" in one_line(capsys)
    assert not (tmp_path / "x").exists()


def test_imagenet_is_compared_with_its_size(tmp_path, capsys):
    for label in range(1000):
        path = tmp_path / "in" / f"n{label:08d}" / "0.png"
        path.parent.mkdir(parents=True)
        path.write_bytes(encoded(patch(0, 4, 8), "png"))
    write_shards(list_folder(tmp_path / "in", "val"), tmp_path / "out", workers=1)
    assert "val: ImageNet has 50,000 images: 49,000 fewer" in capsys.readouterr().out


def test_unlike_names_that_give_one_key_stay_apart(tmp_path):
    names = [
        "a.jpg",
        "a.png",
        "a.b.jpg",
        "a_b.jpg",
        "cat_a.jpg",
        "sub/a.jpg",
        "sub_a.jpg",
        "c d.jpg",
        "é.jpg",
    ]
    for number, (label, name) in enumerate(itertools.product(("cat", "dog"), names)):
        path = tmp_path / "in" / label / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(patch(number), path.suffix[1:]))
    write_folder(tmp_path / "in", tmp_path / "out", "train", **QUIET)
    found = stored(tmp_path / "out", "train")
    assert len(found) == 18 and not any(c in key for key in found for c in "./ ")
    assert {"cat_a_jpg", "cat_a_png", "cat_c_d", "cat_é"} <= set(found)
    shards = sorted(map(str, tmp_path.glob("out/*.tar")))
    assert {sample["__key__"] for sample in webdataset.WebDataset(shards, shardshuffle=False)} == set(found)
    assert {content for content, _ in found.values()} == {p.read_bytes() for p in tmp_path.glob("in/*/**/*.*")}


def test_formats_that_loaders_do_not_read_become_png(tmp_path, capsys):
    folder = make_class_folders(tmp_path / "in", per_class=1)
    for extension in ("bmp", "tiff", "gif", "webp"):
        (folder / "cat" / f"{extension}.{extension}").write_bytes(encoded(patch(1), extension))
    patch(2).convert("CMYK").save(folder / "cat" / "cmyk.jpg")
    patch(3).convert("CMYK").save(folder / "cat" / "cmyk.tiff")
    write_shards(list_folder(folder, "train"), tmp_path / "out", workers=1)
    assert "4 images of other formats converted to PNG" in capsys.readouterr().out
    found = {key: content for key, (content, _) in stored(tmp_path / "out", "train").items()}
    for key in ("cat_bmp", "cat_tiff"):
        image = Image.open(io.BytesIO(found[key]))
        assert image.format == "PNG" and np.array_equal(np.asarray(image), np.asarray(patch(1)))
    gif = Image.open(folder / "cat" / "gif.gif").convert("RGB")
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(found["cat_gif"])).convert("RGB")), np.asarray(gif))
    assert found["cat_webp"] == (folder / "cat" / "webp.webp").read_bytes()
    assert found["cat_cmyk_jpg"] == (folder / "cat" / "cmyk.jpg").read_bytes()
    assert Image.open(io.BytesIO(found["cat_cmyk_tiff"])).mode == "RGB"


def test_resize_shrinks_and_never_enlarges(tmp_path):
    folder = make_class_folders(tmp_path / "in", per_class=1)
    large = patch(5, 90, 150)
    large.save(folder / "cat" / "large.png")
    manifest = write_folder(folder, tmp_path / "out", "train", **QUIET, resize=72, quality=80)
    assert (manifest["resize"], manifest["quality"]) == (72, 80)
    found = {key: content for key, (content, _) in stored(tmp_path / "out", "train").items()}
    resized = Image.open(io.BytesIO(found["cat_large"]))
    size = tuple(72 * side // min(large.size) for side in large.size)
    assert resized.format == "JPEG" and resized.size == size
    expected = np.asarray(large.resize(size, Image.Resampling.BICUBIC), np.float32)
    assert np.abs(np.asarray(resized, np.float32) - expected).mean() < 8
    assert found["cat_cat_0" if "cat_cat_0" in found else "cat_0"] == (folder / "cat" / "cat_0.jpg").read_bytes()


def counts(manifest: dict) -> dict[str, list[int]]:
    return {split: entry["images_per_class"] for split, entry in manifest["splits"].items()}


def test_val_share_draws_from_each_class(tmp_path, capsys):
    folder = make_class_folders(tmp_path / "in", ("ant", "bee"), 10)
    make_class_folders(folder, ("fly",), 2, first=20)
    make_class_folders(folder, ("owl",), 1, first=22)
    (folder / "beside.jpg").write_bytes(encoded(patch(0)))
    arguments = ["folder", str(folder), str(tmp_path / "out"), "--workers", "1", "--val-share", "0.2"]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert "train: 1 images beside the class folders left out" in printed
    assert "val: 1 classes of a single image are in train only: owl ..." in printed
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert counts(manifest) == {"train": [8, 8, 1, 1], "val": [2, 2, 1, 0]}
    train, val = (stored(tmp_path / "out", split) for split in ("train", "val"))
    (folder / "beside.jpg").unlink()
    assert train | val == originals(folder) and not train.keys() & val.keys()
    before = shard_bytes(tmp_path / "out")
    assert main(arguments) == 0 and shard_bytes(tmp_path / "out") == before, "the same draw"
    assert main([*arguments[:-1], "0.3"]) == 2
    assert "begun with other images in train: restore them (and --val-share)" in one_line(capsys)


def test_val_share_depends_on_the_seed_and_on_no_other_class(tmp_path):
    folder = make_class_folders(tmp_path / "in", ("ant", "bee"), 20)

    def validated(seed: int) -> set[str]:
        return {entry.key for entry in list_folder(folder, val_share=0.25, seed=seed).sources[1].entries}

    first = validated(0)
    assert len(first) == 10 and first != validated(1)
    (folder / "ant" / "zzz.jpg").write_bytes(encoded(patch(90)))
    assert {key for key in validated(0) if key.startswith("bee")} == {key for key in first if key.startswith("bee")}


@pytest.mark.parametrize("value", ["0", "1", "-0.1", "1.5", "nan", "inf", "ten", ""])
def test_val_share_is_a_share(tmp_path, capsys, value):
    with pytest.raises(SystemExit) as end:
        main(["folder", str(tmp_path), str(tmp_path / "out"), f"--val-share={value}"])
    assert end.value.code == 2 and "is not a number between 0 and 1, such as 0.1" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["folder", str(tmp_path), str(tmp_path / "out"), "--val-share", "0.1", "--split", "val"])


@pytest.mark.parametrize("option", ["--seed", "--workers", "--images-per-shard", "--resize", "--quality", "--skip-bad"])
@pytest.mark.parametrize("value", ["-1", "1.5", "many", "9" * 30])
def test_numbers_of_the_command_line(tmp_path, capsys, option, value):
    with pytest.raises(SystemExit) as end:
        main(["folder", str(tmp_path), str(tmp_path / "out"), f"{option}={value}"])
    assert end.value.code == 2 and f"{value} is not a whole number from" in capsys.readouterr().err


def test_class_folders_in_place_of_splits_are_explained(images, tmp_path, capsys):
    def refused(*arguments: object) -> str:
        assert main(["folder", *map(str, arguments), "--workers", "1"]) == 2
        return one_line(capsys)

    assert "with --val-share 0.1 a tenth of each is for validation" in refused(images / "train", tmp_path / "out")
    both = f"{images / 'train'}: a split and no class: leave --val-share out, or give the folder of its classes"
    assert both in refused(images, tmp_path / "out", "--val-share", "0.1")
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "train").symlink_to(images / "train")
    assert f"no val/ beside train/: add one, or give {tmp_path / 'in' / 'train'} with --val-share 0.1" in refused(
        tmp_path / "in", tmp_path / "out"
    )
    for name in ("val", "validation"):
        (tmp_path / "in" / name).symlink_to(images / "val")
    assert "val and validation both look like val: keep one of them" in refused(tmp_path / "in", tmp_path / "out")
    one = make_class_folders(tmp_path / "one", per_class=1)
    assert f"{one}: one image in each class" in refused(one, tmp_path / "out", "--val-share", "0.5")


# --- names of class folders -----------------------------------------------------------------------


def test_folders_that_are_no_classes(tmp_path):
    folder = make_class_folders(tmp_path / "in", ("ant", "bee"), 2)
    for name in (".ipynb_checkpoints", "@eaDir", "__MACOSX", "lost+found", "System Volume Information"):
        shutil.copytree(folder / "ant", folder / name)
    (folder / "up").symlink_to("..")
    (folder / "itself").symlink_to(".")
    (folder / "Thumbs.db").write_bytes(b"")
    listing = list_folder(folder, "train")
    assert listing.classes == ["ant", "bee"] and len(listing.sources[0].entries) == 4
    (folder / "wasp").symlink_to("bee")
    with pytest.raises(UserError, match="wasp: the same folder as bee: its images would have two classes"):
        list_folder(folder, "train")


def test_names_that_classes_may_have(tmp_path):
    names = ("Käfer, groß", "日本語", "#1", "a=b", "it's", "'quoted' (2) {x} [y]", "👩‍🚀", "=1+1", "a  b")
    names += ("a\nb", "a\x1b[31m", "a\u2028b", " a ", "caf\udce9")  # the last is Latin-1
    folder = make_class_folders(tmp_path / "in", names, 2)
    manifest = write_folder(folder, tmp_path / "out", val_share=0.5, **QUIET)
    assert manifest["classes"] == sorted(names) == list(load_index(tmp_path / "out", "val", tmp_path).classes)
    assert counts(manifest) == {"train": [1] * 14, "val": [1] * 14}


def test_files_may_have_any_name(tmp_path):
    folder = make_class_folders(tmp_path / "in", ("ant", "bee"), 1)
    odd = [b"caf\xe9.jpg", b"a\nb.jpg", b"\x1b[31m.jpg", b"100%.jpg", "Käfer.jpg".encode(), b"'.jpg", b"..jpg.jpg"]
    for number, name in enumerate(odd[:-1]):
        Path(os.fsdecode(os.fsencode(folder / "ant") + b"/" + name)).write_bytes(encoded(patch(number)))
    manifest = write_folder(folder, tmp_path / "out", "train", **QUIET)
    assert counts(manifest) == {"train": [1 + len(odd) - 1, 1]}
    assert len(stored(tmp_path / "out", "train")) == len(odd) + 1


def test_one_name_in_two_ways_of_unicode(tmp_path):
    composed, apart = "K\u00e4fer", "Ka\u0308fer"
    make_class_folders(tmp_path / "in" / "train", (composed, "ant"), 1)
    make_class_folders(tmp_path / "in" / "val", (apart, "ant"), 1, first=2)
    listing = list_folder(tmp_path / "in")
    assert listing.classes == [composed, "ant"]
    assert [entry.label for entry in listing.sources[1].entries] == [0, 1]
    shutil.copytree(tmp_path / "in" / "val" / apart, tmp_path / "in" / "train" / apart)
    with pytest.raises(UserError, match=r"'Ka\\u0308fer' and 'K\\xe4fer' are one name in Unicode: rename one"):
        list_folder(tmp_path / "in")


# --- bad input ------------------------------------------------------------------------------------


def bad_images() -> dict[str, bytes]:
    whole, png = encoded(patch(7, 60, 64)), encoded(patch(7), "png")
    bomb = io.BytesIO()
    Image.new("1", (20_000, 10_000)).save(bomb, "PNG")
    flipped = bytearray(png)
    flipped[len(png) // 2] ^= 0xFF
    return {
        "truncated.jpg": whole[: len(whole) // 2],
        "text.jpg": b"<html>not found</html>",
        "nothing.jpg": b"",
        "flipped.png": bytes(flipped),
        "bomb.png": bomb.getvalue(),
    }


@pytest.mark.parametrize("name", bad_images())
def test_an_image_that_does_not_decode_stops_the_run(tmp_path, capsys, name):
    folder = make_class_folders(tmp_path / "in", per_class=2)
    (folder / "dog" / name).write_bytes(bad_images()[name])
    assert main(["folder", str(folder), str(tmp_path / "out"), "--split", "train", "--workers", "1"]) == 2
    assert str(folder / "dog" / name) in one_line(capsys)
    assert not list(tmp_path.glob("out/*.tar")) and not (tmp_path / "out" / "manifest.json").exists()
    # Replaced by a sound image, the same command goes on.
    (folder / "dog" / name).write_bytes(encoded(patch(1)))
    assert main(["folder", str(folder), str(tmp_path / "out"), "--split", "train", "--workers", "1"]) == 0


def test_skip_bad_leaves_out_that_many(tmp_path, capsys):
    folder = make_class_folders(tmp_path / "in", per_class=6)
    for name, content in bad_images().items():
        (folder / "dog" / name).write_bytes(content)
    listing = list_folder(folder, "train")
    with pytest.raises(UserError, match="5 images do not decode, more than --skip-bad 4"):
        write_shards(listing, tmp_path / "out", **{**QUIET, "images_per_shard": 5}, skip_bad=4)
    manifest = write_shards(listing, tmp_path / "out", **{**QUIET, "images_per_shard": 5}, skip_bad=5)
    keys = {f"dog_{Path(name).stem}" for name in bad_images()}
    entry = manifest["splits"]["train"]
    assert set(entry["skipped"]) == keys and entry["images_per_class"] == [6, 6, 6]
    assert set(stored(tmp_path / "out", "train")) == {p.stem for p in folder.glob("*/*")} - {
        Path(name).stem for name in bad_images()
    }
    assert f"skipped {folder / 'dog' / 'text.jpg'}: not an image" in capsys.readouterr().err
    with pytest.raises(UserError, match="--skip-bad 0"):
        write_shards(listing, tmp_path / "out", **{**QUIET, "images_per_shard": 5})


def test_a_jpeg_whose_end_mark_is_overwritten_is_kept(tmp_path):
    """PIL decodes it, to the same pixels; where the file ends before the mark, PIL calls it truncated."""
    folder = make_class_folders(tmp_path / "in", per_class=2)
    whole = encoded(patch(9))
    content = whole.removesuffix(b"\xff\xd9") + bytes(16)
    assert len(content) == len(whole) + 14
    (folder / "cat" / "open.jpg").write_bytes(content)
    write_folder(folder, tmp_path / "out", "train", **QUIET)
    assert stored(tmp_path / "out", "train")["cat_open"] == (content, 0)


def empty_class(root: Path) -> str:
    (root / "train" / "emu").mkdir()
    return f"{root / 'train' / 'emu'}: no image"


def empty_folder(root: Path) -> str:
    for path in (root / "train").glob("*/*"):
        path.unlink()
    for path in (root / "train").iterdir():
        path.rmdir()
    return "no class folders"


def one_class(root: Path) -> str:
    for path in root.glob("*/[do]*"):
        path.rename(root / f"{path.parent.name}_{path.name}")
    return "only one class (cat)"


def unknown_class(root: Path) -> str:
    (root / "val" / "owl").rename(root / "val" / "pig")
    return f"{root / 'val' / 'pig'}: a class in val that is not in train"


def broken_link(root: Path) -> str:
    (root / "train" / "cat" / "gone.jpg").symlink_to(root / "nowhere.jpg")
    return f"{root / 'train' / 'cat' / 'gone.jpg'}: No such file or directory"


def missing_folder(root: Path) -> str:
    root.rename(root.with_name("elsewhere"))
    return f"{root}: no such folder"


@pytest.mark.parametrize("spoil", [empty_class, empty_folder, one_class, unknown_class, broken_link, missing_folder])
def test_folders_that_make_no_data_set(tmp_path, capsys, spoil):
    root = make_images(tmp_path / "in", train=1, val=1)
    message = spoil(root)
    assert main(["folder", str(root), str(tmp_path / "out"), "--workers", "1"]) == 2
    assert message in one_line(capsys)


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is forbidden to root")
def test_no_permission(tmp_path, capsys):
    root = make_images(tmp_path / "in", train=1, val=1)
    (root / "train" / "cat").chmod(0)
    try:
        assert main(["folder", str(root), str(tmp_path / "out"), "--workers", "1"]) == 2
    finally:
        (root / "train" / "cat").chmod(0o755)
    assert f"{root / 'train' / 'cat'}: Permission denied" in one_line(capsys)


def test_a_shard_that_cannot_be_written_is_one_line(images, tmp_path):
    """A limit on the size of files stands for a full disk: the write fails in the same place."""
    run = subprocess.run(
        [sys.executable, "-m", "data.write_shards", "folder", images, tmp_path / "out", "--workers", "1"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000)),
    )
    assert run.returncode == 2
    assert run.stderr.splitlines()[-1].startswith(f"error: {tmp_path}/out/train-000000.tar: File too large: ")
    assert "train-000000.tar" in run.stderr and "Traceback" not in run.stderr
    assert not [p for p in (tmp_path / "out").iterdir() if p.is_file()]


def test_two_writers_do_not_share_a_folder(images, tmp_path):
    (tmp_path / "parts").mkdir()
    with FileLock(tmp_path / "parts" / "lock"), pytest.raises(UserError, match="another process is writing"):
        write_folder(images, tmp_path, **QUIET)


def test_hidden_folders_and_links_to_a_parent_hold_no_images(tmp_path):
    folder = make_class_folders(tmp_path / "in", per_class=2)
    (folder / "cat" / ".ipynb_checkpoints").mkdir()
    (folder / "cat" / ".ipynb_checkpoints" / "cat_0.jpg").write_bytes(encoded(patch(0)))
    (folder / "cat" / "up").symlink_to("..")
    (folder / "cat" / "itself").symlink_to(".")
    (folder / "cat" / "._cat_0.jpg").write_bytes(b"what macOS leaves")
    source = list_folder(folder, "train").sources[0]
    assert [entry.key for entry in source.entries if entry.label == 0] == ["cat_0", "cat_1"]
    assert source.ignored == 1


# --- archives -------------------------------------------------------------------------------------

WNIDS = ("n01440764", "n01443537", "n02084071")
NUMBERS = {
    "n01440764": 3,
    "n01443537": 1,
    "n02084071": 2,
}  # ILSVRC2012_ID is not the order of the WordNet ids
VAL_WNIDS = ("n02084071", "n01440764", "n01443537", "n02084071")


def tar_bytes(members: dict[str, bytes] | list[tuple[tarfile.TarInfo, bytes]]) -> bytes:
    if isinstance(members, dict):
        members = [(tarfile.TarInfo(name), content) for name, content in members.items()]
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for member, content in members:
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def class_tar(wnid: str, count: int = 5) -> bytes:
    start = 100 * WNIDS.index(wnid)
    return tar_bytes({f"{wnid}_{start + i}.JPEG": encoded(patch(start + i)) for i in range(count)})


def devkit() -> bytes:
    # As in the official file: leaf classes first, then those that have children.
    fields = [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O"), ("num_children", "O")]
    rows = [(NUMBERS[wnid], wnid, f"words of {wnid}", 0) for wnid in WNIDS] + [(4, "n00001740", "entity", 3)]
    buffer = io.BytesIO()
    savemat(buffer, {"synsets": np.array(rows, fields).reshape(-1, 1)})
    root = "ILSVRC2012_devkit_t12"
    plain = tar_bytes(
        {
            f"{root}/readme.txt": b"a development kit",
            f"{root}/data/meta.mat": buffer.getvalue(),
            f"{root}/data/ILSVRC2012_validation_ground_truth.txt": "".join(
                f"{NUMBERS[wnid]}\n" for wnid in VAL_WNIDS
            ).encode(),
        }
    )
    return gzip.compress(plain)


def val_images() -> dict[str, bytes]:
    return {f"ILSVRC2012_val_{i + 1:08d}.JPEG": encoded(patch(900 + i)) for i in range(4)}


@pytest.fixture
def archives(tmp_path):
    """The official trio, with three classes."""
    paths = [tmp_path / name for name in ("train.tar", "val.tar", "devkit.tar.gz")]
    paths[0].write_bytes(tar_bytes({f"{wnid}.tar": class_tar(wnid) for wnid in reversed(WNIDS)}))
    paths[1].write_bytes(tar_bytes(dict(reversed(val_images().items()))))
    paths[2].write_bytes(devkit())
    return paths


def test_archives(archives, tmp_path):
    manifest = write_shards(list_archives(archives, workers=1), tmp_path / "out", **QUIET)
    assert manifest["classes"] == list(WNIDS)
    expected = {
        f"{wnid}_{100 * label + i}": (encoded(patch(100 * label + i)), label)
        for label, wnid in enumerate(WNIDS)
        for i in range(5)
    }
    assert stored(tmp_path / "out", "train") == expected
    expected = {
        name.removesuffix(".JPEG"): (content, WNIDS.index(wnid))
        for (name, content), wnid in zip(val_images().items(), VAL_WNIDS, strict=True)
    }
    assert stored(tmp_path / "out", "val") == expected


def test_archives_from_the_command_line_in_any_order(archives, tmp_path):
    for number, order in enumerate(itertools.permutations(map(str, archives))):
        if number in (0, 5):
            assert main(["archives", *order, str(tmp_path / f"out{number}"), "--workers", "1"]) == 0
    assert shard_bytes(tmp_path / "out0") == shard_bytes(tmp_path / "out5")


def special(kind: bytes, link: str = "") -> tarfile.TarInfo:
    member = tarfile.TarInfo("n01440764_9.JPEG")
    member.type, member.linkname = kind, link
    return member


@pytest.mark.parametrize(
    "member",
    [
        tarfile.TarInfo("/etc/n01440764_9.JPEG"),
        tarfile.TarInfo("../n01440764_9.JPEG"),
        tarfile.TarInfo("a/../../n01440764_9.JPEG"),
        special(tarfile.SYMTYPE, "/etc/passwd"),
        special(tarfile.LNKTYPE, "n01440764_0.JPEG"),
        special(tarfile.CHRTYPE),
        special(tarfile.BLKTYPE),
        special(tarfile.FIFOTYPE),
    ],
    ids=["absolute", "parent", "hidden parent", "symlink", "hard link", "character", "block", "fifo"],
)
@pytest.mark.parametrize("place", ["class tar", "train", "val", "devkit"])
def test_members_that_lead_outside_are_refused(archives, place, member):
    bad = [(member, b"")]
    train = [(tarfile.TarInfo(f"{wnid}.tar"), class_tar(wnid)) for wnid in WNIDS]
    if place == "class tar":
        train[0] = (train[0][0], tar_bytes(bad))
        archives[0].write_bytes(tar_bytes(train))
    elif place == "train":
        archives[0].write_bytes(tar_bytes(train + bad))
    elif place == "val":
        archives[1].write_bytes(
            tar_bytes([(tarfile.TarInfo(name), content) for name, content in val_images().items()] + bad)
        )
    else:
        archives[2].write_bytes(gzip.compress(tar_bytes(bad)))
    with pytest.raises(UserError, match=rf"{member.name}.*refused"):
        list_archives(archives, workers=1)


def test_damaged_archives(archives, tmp_path):
    sound = [path.read_bytes() for path in archives]

    def message(which: int, content: bytes) -> str:
        archives[which].write_bytes(content)
        with pytest.raises(UserError) as error:
            list_archives(archives, workers=1)
        archives[which].write_bytes(sound[which])
        assert str(archives[which]) in str(error.value)
        return str(error.value)

    assert "copy it again" in message(0, sound[0][: len(sound[0]) // 2])
    assert "copy it again" in message(1, sound[1][: len(sound[1]) // 2])
    assert "copy it again" in message(2, sound[2][: len(sound[2]) // 2])
    assert "damaged or not a tar" in message(0, b"nothing of the kind" * 100)
    assert "n02084071.tar is missing" in message(0, tar_bytes({f"{w}.tar": class_tar(w) for w in WNIDS[:2]}))
    assert "no image in n01440764.tar" in message(
        0, tar_bytes({f"{w}.tar": class_tar(w, 5 if w != WNIDS[0] else 0) for w in WNIDS})
    )
    assert "no class of the devkit" in message(0, tar_bytes({"n99999999.tar": class_tar(WNIDS[0])}))
    few = dict(list(val_images().items())[:3])
    assert "ILSVRC2012_val_00000004.JPEG is missing" in message(1, tar_bytes(few))
    many = {**val_images(), "ILSVRC2012_val_00000005.JPEG": b""}
    assert "only 4 validation images" in message(1, tar_bytes(many))
    # A class tar whose header claims more than lies inside it.
    inner = class_tar(WNIDS[0])
    assert "copy it again" in message(
        0, tar_bytes({f"{w}.tar": class_tar(w) if w != WNIDS[0] else inner[:3000] for w in WNIDS})
    )
    with pytest.raises(UserError, match="0 of these names contain val"):
        list_archives([archives[2], archives[2], archives[0]])


# --- kaggle ---------------------------------------------------------------------------------------


@pytest.fixture
def kaggle(tmp_path):
    root = tmp_path / "kaggle"
    images = root / "ILSVRC" / "Data" / "CLS-LOC"
    make_class_folders(images / "train", WNIDS, 4)
    (images / "val").mkdir()
    rows = ["ImageId,PredictionString"]
    for (name, content), wnid in zip(val_images().items(), VAL_WNIDS, strict=True):
        (images / "val" / name).write_bytes(content)
        rows.append(f"{Path(name).stem},{wnid} 10 20 30 40 {wnid} 1 2 3 4")
    (root / "LOC_val_solution.csv").write_text("\n".join(rows) + "\n")
    return root


@pytest.mark.parametrize("part", ["", "ILSVRC", "ILSVRC/Data", "ILSVRC/Data/CLS-LOC"])
def test_kaggle(kaggle, tmp_path, part):
    write_shards(list_kaggle(kaggle / part), tmp_path / "out", **QUIET)
    assert stored(tmp_path / "out", "train") == originals(kaggle / "ILSVRC" / "Data" / "CLS-LOC" / "train")
    labels = {key: label for key, (_, label) in stored(tmp_path / "out", "val").items()}
    assert labels == {f"ILSVRC2012_val_{i + 1:08d}": WNIDS.index(wnid) for i, wnid in enumerate(VAL_WNIDS)}


def test_kaggle_labels_must_fit_the_images(kaggle):
    solution = kaggle / "LOC_val_solution.csv"
    lines = solution.read_text().splitlines()
    solution.write_text("\n".join(lines[:-1]))
    with pytest.raises(UserError, match=r"00000004\.JPEG.* no row for this image"):
        list_kaggle(kaggle)
    solution.write_text("\n".join([*lines, "ILSVRC2012_val_00000005,n01440764 1 2 3 4"]))
    with pytest.raises(UserError, match="ILSVRC2012_val_00000005 is missing"):
        list_kaggle(kaggle)
    solution.write_text("\n".join([*lines[:-1], "ILSVRC2012_val_00000004,n00000000 1 2 3 4"]))
    with pytest.raises(UserError, match="n00000000, which is not in train"):
        list_kaggle(kaggle)
    solution.unlink()
    with pytest.raises(UserError, match=r"LOC_val_solution\.csv: missing"):
        list_kaggle(kaggle)


# --- parquet --------------------------------------------------------------------------------------

NAMES = ["tabby, cat", "dog", "barn.owl"]


def write_parquet(path: Path, start: int, rows: int, metadata: object, binary: bool = False) -> None:
    contents = [encoded(patch(start + i)) for i in range(rows)]
    image = contents if binary else [{"bytes": c, "path": f"x_{start + i}.JPEG"} for i, c in enumerate(contents)]
    table = pa.table({"image": image, "label": pa.array([(start + i) % 3 for i in range(rows)], pa.int64())})
    if metadata:
        table = table.replace_schema_metadata({"huggingface": json.dumps(metadata)})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, row_group_size=4)


@pytest.fixture
def parquet(tmp_path):
    features = {"image": {"_type": "Image"}, "label": {"names": NAMES, "_type": "ClassLabel"}}
    for split, number, start, rows in (("train", 0, 0, 14), ("train", 1, 14, 13), ("validation", 0, 50, 7)):
        path = tmp_path / "hub" / "data" / f"{split}-{number:05d}-of-00002.parquet"
        write_parquet(path, start, rows, {"info": {"features": features}})
    return tmp_path / "hub"


def test_parquet(parquet, tmp_path):
    manifest = write_shards(list_parquet(parquet), tmp_path / "one", **QUIET)
    assert manifest["classes"] == NAMES and manifest["shuffle"] == "row-groups"
    assert stored(tmp_path / "one", "train") == {f"x_{i}": (encoded(patch(i)), i % 3) for i in range(27)}
    assert stored(tmp_path / "one", "val") == {f"x_{i}": (encoded(patch(i)), i % 3) for i in range(50, 57)}
    # A shard mixes row groups, and its images do not stand in the order of the file.
    index = load_index(tmp_path / "one", "train", tmp_path)
    first = [int(index.name(i).partition("x_")[2].partition(".")[0]) for i in range(8)]
    assert first != sorted(first)


def test_parquet_with_plain_bytes_and_without_names(tmp_path):
    for split, start in (("train", 0), ("val", 20)):
        write_parquet(tmp_path / "in" / f"{split}-0.parquet", start, 9, None, binary=True)
    manifest = write_shards(list_parquet(tmp_path / "in"), tmp_path / "out", **QUIET)
    assert manifest["classes"] == ["0", "1", "2"]
    assert stored(tmp_path / "out", "train")["train-0_000004"] == (encoded(patch(4)), 1)


@pytest.mark.parametrize("metadata", [{"info": {}}, {"info": {"features": {"label": {"_type": "Value"}}}}, ["info"]])
def test_parquet_whose_metadata_has_no_class_names(tmp_path, metadata):
    for split, start in (("train", 0), ("val", 20)):
        write_parquet(tmp_path / "data" / f"{split}-0.parquet", start, 9, metadata)
    assert list_parquet(tmp_path).classes == ["0", "1", "2"]


@pytest.mark.parametrize("names", [["cat", "cat", "owl"], ["cat", 1, "owl"], "cat", {"0": "cat"}, None])
def test_parquet_whose_class_names_are_none(tmp_path, capsys, names):
    for split, start in (("train", 0), ("val", 20)):
        metadata = {"info": {"features": {"label": {"names": names, "_type": "ClassLabel"}}}}
        write_parquet(tmp_path / "data" / f"{split}-0.parquet", start, 9, metadata)
    assert list_parquet(tmp_path).classes == ["0", "1", "2"]
    assert "train-0.parquet: no class names in its metadata, so the classes are numbers" in capsys.readouterr().err


@pytest.mark.parametrize(
    "image",
    [
        ["a.jpg", "b.jpg"],
        [{"path": "a.jpg"}, {"path": "b.jpg"}],
        [{"path": "a.jpg", "bytes": None}, {"path": "b.jpg", "bytes": None}],
        pa.array([{"path": "a.jpg", "bytes": None}] * 2, pa.struct({"path": pa.string(), "bytes": pa.binary()})),
        pa.array([None, None], pa.binary()),
    ],
)
def test_parquet_without_bytes(parquet, image):
    path = parquet / "data" / "train-00001-of-00002.parquet"
    pq.write_table(pa.table({"image": image, "label": [0, 1]}), path)
    with pytest.raises(UserError) as error:
        list_parquet(parquet)
    what = "its images are paths or nothing, not the bytes of image files"
    assert str(error.value) == f"{path}: {what}: export the data set with the images embedded"


def test_parquet_of_ids(tmp_path):
    for split in ("train", "val"):
        table = {"image": [encoded(patch(0))] * 2, "label": [4_000_000, 4_000_001]}
        pq.write_table(pa.table(table), tmp_path / f"{split}-0.parquet")
    with pytest.raises(UserError, match=r"labels up to 4,000,001 for 2 images of 2 classes look like ids"):
        list_parquet(tmp_path)


def test_damaged_parquet(parquet):
    path = parquet / "data" / "train-00001-of-00002.parquet"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(UserError, match=rf"{path.name}: damaged or not Parquet"):
        list_parquet(parquet)
    pq.write_table(pa.table({"picture": [b""], "label": [0]}), path)
    with pytest.raises(UserError, match=rf"{path.name}: has the columns picture, label"):
        list_parquet(parquet)
    pq.write_table(pa.table({"image": [b""] * 2, "label": [0, -1]}), path)
    with pytest.raises(UserError, match=rf"{path.name}: the label of row 1 is -1"):
        list_parquet(parquet)
    pq.write_table(pa.table({"image": [b""] * 2, "label": [0, 3]}), path)
    with pytest.raises(UserError, match=rf"{path.name}: label 3, but there are 3 classes"):
        list_parquet(parquet)
    pq.write_table(pa.table({"image": [b""] * 2, "label": [0.0, 1.0]}), path)
    with pytest.raises(UserError, match=rf"{path.name}: the label of row 0 is 0\.0, not a class number"):
        list_parquet(parquet)
    path.write_text("image,label")
    with pytest.raises(UserError, match=rf"{path.name}: damaged or not Parquet"):
        list_parquet(parquet)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(UserError, match=rf"{path.name}: not a regular file"):
        list_parquet(parquet)


# --- digits ---------------------------------------------------------------------------------------


def test_digits(tmp_path, capfd):
    shards = prepare_digits(tmp_path)
    train, val = load_index(shards, "train", tmp_path), load_index(shards, "val", tmp_path)
    assert (len(train), len(val)) == (1498, 299)
    assert train.classes == tuple("0123456789")
    assert np.bincount(train.samples["label"]).min() > 120 and np.bincount(val.samples["label"]).min() > 20
    assert set(train.samples["height"]) == set(train.samples["width"]) == {32}
    before = shard_bytes(shards)
    assert prepare_digits(tmp_path) == shards and shard_bytes(shards) == before
    assert capfd.readouterr() == ("", "")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["digits", "digits.lock"], "no images are left behind"


@pytest.mark.slow
def test_processes_that_need_the_digits_at_once_share_them(tmp_path):
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=prepare_digits, args=(tmp_path,)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    assert len(load_index(tmp_path / "digits", "train", tmp_path)) == 1498
