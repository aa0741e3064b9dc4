"""Shards whose JPEGs can be cut. What only jpegtran can do is skipped where it is not installed."""

import hashlib
import io
import json
import os
import shutil
import subprocess
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from images import encoded, make_images, patch
from PIL import Image, ImageCms

from data.index import load_index
from data.index import main as show_index
from data.reader import decode
from data.regions import Regions, describe
from data.remote import download_shards
from data.write_shards import regions, shard, write
from data.write_shards.__main__ import main
from data.write_shards.regions import Rewritten, region_arrays, restart_interval, rewrite, write_regions
from data.write_shards.shards import list_shards
from data.write_shards.write import write_folder, write_shards
from repghost.errors import UserError
from repghost.images import open_image

QUIET = {"workers": 1, "quiet": True, "images_per_shard": 8}
needs_jpegtran = pytest.mark.skipif(
    shutil.which("jpegtran") is None, reason="jpegtran is not installed (Debian: libjpeg-turbo-progs)"
)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return make_images(tmp_path_factory.mktemp("images"))


@pytest.fixture
def without_jpegtran(monkeypatch):
    """PIL in its place, which writes restart markers, too, but other pixels."""

    def rewrite(content: bytes) -> Rewritten | str:
        image = open_image(content, decode=True)
        if image.format != "JPEG":
            return image.format
        made = with_restarts(image)
        return Rewritten(made, describe(made))

    monkeypatch.setattr(shard, "rewrite", rewrite)
    monkeypatch.setattr(write, "transcoder", lambda: "stand-in 1")
    monkeypatch.setattr("data.write_shards.__main__.transcoder", lambda: "stand-in 1")


def with_restarts(image: Image.Image, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", restart_marker_blocks=1, **options)
    return buffer.getvalue()


def saved(image: Image.Image, image_format: str = "JPEG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, image_format, **options)
    return buffer.getvalue()


def file_digests(out: Path) -> dict[str, str]:
    """{file name: sha256} of everything that is not there only to go on."""
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in out.iterdir() if p.is_file()}


def stored(out: Path, split: str) -> dict[str, tuple[bytes, int, int]]:
    """{key: (image bytes, label, shard)} in the order of the index."""
    index = load_index(out, split, out.parent / "cache")
    found = {}
    for key, row in zip(index.keys(), index.samples, strict=True):
        with open(index.shards[row["shard"]], "rb") as file:
            found[key] = os.pread(file.fileno(), row["size"], row["offset"]), int(row["label"]), int(row["shard"])
    return found


def one_line(capsys) -> str:
    """What a failed command printed on stderr."""
    (error,) = capsys.readouterr().err.strip().splitlines()
    assert error.startswith("error: ")
    return error


def tool(folder: Path, monkeypatch, script: str) -> None:
    """Another program in the place of jpegtran."""
    folder.mkdir()
    (folder / "jpegtran").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "jpegtran").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")


# --- what is rewritten ----------------------------------------------------------------------------

EXIF = Image.Exif()
EXIF[0x0112] = 6  # orientation


def cut_kinds() -> dict[str, bytes]:
    """Files that can be rewritten, by their names."""
    photo, grey = patch(1, 60, 90), patch(2, 60, 90).convert("L")
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    # A thumbnail, as cameras put it into EXIF: its markers look like those of an image.
    with_thumbnail = EXIF.tobytes() + b"\xff\xd8\xff\xd0\xff\xc0" + saved(patch(3, 8, 12))
    return {
        "baseline": saved(photo),
        "grey": saved(grey),
        "progressive": saved(photo, progressive=True),
        "grey_progressive": saved(grey, progressive=True),
        "optimized": saved(photo, optimize=True, quality=95),
        "444": saved(photo, subsampling="4:4:4"),
        "422": saved(photo, subsampling="4:2:2"),
        "rgb": saved(photo, keep_rgb=True),
        "pixel": saved(photo.crop((0, 0, 1, 1))),
        "narrow": saved(photo.crop((0, 0, 3, 60))),
        "restarts": saved(photo, restart_marker_rows=1),
        "trailing": saved(photo) + b"more",
        "thumbnail": saved(photo, exif=with_thumbnail),
        "profile": saved(photo, icc_profile=profile, comment=b"a comment"),
    }


def whole_kinds() -> dict[str, tuple[bytes, str]]:
    """(a file that stays as it is, why) by its name."""
    photo = patch(1, 60, 90)
    baseline = saved(photo)
    damaged = baseline[:-200] + baseline[-100:]  # it still decodes
    return {
        "png": (saved(photo, "PNG"), "PNG"),
        "webp": (saved(photo, "WEBP"), "WebP"),
        "gif": (saved(photo, "GIF"), "PNG"),  # which it becomes
        "mpo": (saved(photo, "MPO", save_all=True, append_images=[patch(2)]), "MPO"),
        "cmyk": (saved(photo.convert("CMYK")), "CMYK"),
        "damaged": (damaged, "damaged"),
        "arithmetic": (
            subprocess.run(["jpegtran", "-arithmetic"], input=baseline, capture_output=True, check=True).stdout,
            "arithmetic coding",
        ),
    }


@needs_jpegtran
def test_every_kind_of_file(tmp_path, capsys):
    cut, whole = cut_kinds(), whole_kinds()
    for split in ("train", "val"):
        for name, content in {**cut, **{name: content for name, (content, _) in whole.items()}}.items():
            path = tmp_path / "images" / split / "ab"[name in whole] / f"{name}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
    out = tmp_path / "out"
    assert main(["folder", str(tmp_path / "images"), str(out), "--regions", "--images-per-shard", "7"]) == 0
    reasons = Counter(reason for _, reason in whole.values())
    entry = json.loads((out / "manifest.json").read_text())["splits"]["train"]
    assert entry["regions"]["whole"] == reasons
    printed = capsys.readouterr().out
    assert f"train: {len(cut)} images can be cut, {len(whole)} stay whole: 1 CMYK, 1 MPO, 2 PNG" in printed
    index = load_index(out, "train", tmp_path)
    for i, (key, (content, _, _)) in enumerate(stored(out, "train").items()):
        name = key.partition("_")[2]
        if name in whole:
            assert content == whole[name][0] or name == "gif", name
            assert not index.regions.rows[i]["interval"], name
        else:
            row, segments = describe(content)
            start = int(index.regions.rows[i]["start"])
            assert {n: index.regions.rows[i][n] for n in row.dtype.names[1:]} == {
                n: row[n] for n in row.dtype.names[1:]
            }
            assert (index.regions.segments[start : start + len(segments)] == segments).all(), name
            same_picture(content, cut[name])
    assert show_index([str(out)]) == 0
    assert f"\n  {len(cut)} images can be cut" in capsys.readouterr().out


def same_picture(content: bytes, original: bytes) -> None:
    """Asserts that a file has the pixels and metadata of another."""
    assert (decode(content) == decode(original)).all()
    one, other = (Image.open(io.BytesIO(each)) for each in (content, original))
    assert one.info.get("exif") == other.info.get("exif")
    assert one.info.get("icc_profile") == other.info.get("icc_profile")
    assert one.info.get("comment") == other.info.get("comment")
    assert one.quantization == other.quantization and one.layer == other.layer
    assert "progressive" not in one.info


@needs_jpegtran
def test_size_of_files(tmp_path):
    files = [saved(patch(number, 200, 300), quality=90) for number in range(8)]
    rewritten = [rewrite(content) for content in files]
    assert sum(len(file.content) for file in rewritten) <= 1.03 * sum(map(len, files))


def test_what_the_header_rules_out():
    baseline = saved(patch(1))
    frame = baseline.index(b"\xff\xc0")
    for marker, reason in ((0xC3, "lossless JPEG"), (0xC9, "arithmetic coding"), (0xC5, "JPEG of another kind")):
        changed = baseline[: frame + 1] + bytes([marker]) + baseline[frame + 2 :]
        assert rewrite(changed) == reason


@pytest.mark.parametrize(
    ("columns", "interval"),
    [(1, 1), (2, 2), (3, 3), (4, 4), (5, 5), (6, 3), (7, 1), (10, 5), (15, 3), (22, 2), (31, 1), (32, 4)],
)
def test_restart_interval(columns, interval):
    assert restart_interval(columns) == interval


def test_regions_of_several_shards_in_two_files(tmp_path):
    """With files that PIL made, so without jpegtran."""
    photos = [patch(number, 40, 70) for number in range(5)]
    files = [with_restarts(photo, subsampling="4:4:4") for photo in photos]
    records = []
    for number, some in enumerate((files[:2], [], files[2:])):
        described = [each for content in some for each in (describe(content), "PNG")]
        records.append(tmp_path / f"{number}.npz")
        np.savez(records[-1], **region_arrays(described))
    entry = write_regions(tmp_path, "train", records, [{"PNG": 2}, {}, {"PNG": 3}])
    assert entry["whole"] == {"PNG": 5}
    for file in entry["files"]:
        content = (tmp_path / file["file"]).read_bytes()
        assert (file["bytes"], file["sha256"]) == (len(content), hashlib.sha256(content).hexdigest())
    found = Regions(*(str(tmp_path / file["file"]) for file in entry["files"]))
    assert (found.rows["interval"] > 0).tolist() == [True, False] * 5
    for number, (content, photo) in enumerate(zip(files, photos, strict=True)):
        top, left, height, width = 17, 20, 9, 6
        cut = found.cut(2 * number, photo.height, photo.width, (top, left, height, width))
        part = decode(cut.make(content[: cut.header], content[cut.offset : cut.offset + cut.size]))
        top, left = top - cut.window[0], left - cut.window[1]
        window = decode(content)[:, 17 : 17 + height, 20 : 20 + width]
        assert (part[:, top : top + height, left : left + width] == window).all()


@needs_jpegtran
def test_resized_images_can_be_cut(images, tmp_path):
    write_folder(images, tmp_path / "plain", resize=30, **QUIET)
    manifest = write_folder(images, tmp_path / "out", resize=30, regions=True, **QUIET)
    assert manifest["splits"]["train"]["regions"]["whole"] == {}, "PNGs became JPEGs"
    plain, made = stored(tmp_path / "plain", "train"), stored(tmp_path / "out", "train")
    assert list(plain) == list(made)
    for key in plain:
        assert describe(made[key][0]) is not None
        assert (decode(plain[key][0]) == decode(made[key][0])).all()


# --- restarts -------------------------------------------------------------------------------------


def test_a_restart_writes_only_what_is_missing(images, tmp_path, without_jpegtran):
    write_folder(images, tmp_path, regions=True, **QUIET)
    before = file_digests(tmp_path)
    assert {"train.regions.npy", "val.segments.npy"} < set(before)
    for path in tmp_path.glob("*.tar"):
        os.utime(path, (0, 0))
    for name in ("manifest.json", "train-000001.tar", "train.segments.npy"):
        (tmp_path / name).unlink()
    write_folder(images, tmp_path, regions=True, **QUIET)
    assert file_digests(tmp_path) == before
    assert {p.name for p in tmp_path.glob("*.tar") if p.stat().st_mtime != 0} == {"train-000001.tar"}
    with pytest.raises(UserError, match="begun with regions stand-in 1, now None"):
        write_folder(images, tmp_path, **QUIET)


def test_what_an_earlier_version_began_is_finished(images, tmp_path, without_jpegtran):
    write_folder(images, tmp_path, **QUIET)
    plan = json.loads((tmp_path / "parts" / "plan.json").read_text())
    assert plan["options"].pop("regions") is None
    (tmp_path / "parts" / "plan.json").write_text(json.dumps(plan))
    for path in (tmp_path / "parts").glob("*.npz"):
        with np.load(path) as record:
            kept = {name: record[name] for name in record if name not in ("whole", "regions", "segments")}
        np.savez(path, **kept)
    before = file_digests(tmp_path)
    for path in tmp_path.glob("*.tar"):
        os.utime(path, (0, 0))
    with pytest.raises(UserError, match="begun with regions None, now stand-in 1"):
        write_folder(images, tmp_path, regions=True, **QUIET)
    write_folder(images, tmp_path, **QUIET)
    assert file_digests(tmp_path) == before
    assert not [p for p in tmp_path.glob("*.tar") if p.stat().st_mtime != 0]


@needs_jpegtran
@pytest.mark.slow
def test_bytes_do_not_depend_on_the_number_of_processes(images, tmp_path):
    write_folder(images, tmp_path / "one", regions=True, **QUIET)
    write_folder(images, tmp_path / "two", regions=True, **{**QUIET, "workers": 2})
    assert file_digests(tmp_path / "one") == file_digests(tmp_path / "two")


# --- shards of one's own --------------------------------------------------------------------------


@needs_jpegtran
def test_shards_become_what_an_import_would_have_written(images, tmp_path):
    write_folder(images, tmp_path / "plain", **QUIET, seed=3)
    write_folder(images, tmp_path / "imported", regions=True, **QUIET, seed=3)
    arguments = ["shards", str(tmp_path / "plain"), str(tmp_path / "out"), "--regions", "--workers", "1"]
    assert main(arguments) == 0
    assert file_digests(tmp_path / "out") == file_digests(tmp_path / "imported")


def test_order_keys_labels_and_shards_stay(images, tmp_path, without_jpegtran):
    write_folder(images, tmp_path / "plain", **{**QUIET, "images_per_shard": 7}, seed=3)
    (tmp_path / "plain" / "parts" / "plan.json").unlink()  # which only a restart reads
    manifest = write_shards(list_shards(tmp_path / "plain"), tmp_path / "out", regions=True, workers=1, quiet=True)
    before = json.loads((tmp_path / "plain" / "manifest.json").read_text())
    for name in ("classes", "seed", "shuffle", "images_per_shard", "resize"):
        assert manifest[name] == before[name], name
    for split in ("train", "val"):
        one, other = (stored(tmp_path / name, split) for name in ("plain", "out"))
        assert [(key, *row[1:]) for key, row in one.items()] == [(key, *row[1:]) for key, row in other.items()]
        assert [s["images"] for s in manifest["splits"][split]["shards"]] == [
            s["images"] for s in before["splits"][split]["shards"]
        ]


def write_tar(path: Path, members: dict[str, bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def test_shards_of_others(tmp_path, without_jpegtran, capsys):
    source, out = tmp_path / "source", tmp_path / "out"
    write_tar(
        source / "set-train-7.tar",
        {
            "b/é.jpeg": encoded(patch(1)), "b/é.cls": b"1\n", "b/é.json": b"{}",
            "a.png": encoded(patch(2), "png"), "a.cls": b"0",
        },
    )  # fmt: skip
    write_tar(source / "set-train-9.tar", {"z.cls": b"2", "z.jpg": encoded(patch(3))})
    write_tar(source / "set-val-0.tar", {"v.jpg": encoded(patch(4)), "v.cls": b"0"})
    (tmp_path / "names").write_text("cat\ndog\nowl\n")
    arguments = ["shards", str(source), str(out), "--regions", "--workers", "1", "--cache", str(tmp_path / "cache")]
    assert main([*arguments, "--class-names", str(tmp_path / "names")]) == 0
    assert "train: 2 images can be cut, 1 stay whole: 1 PNG" in capsys.readouterr().out
    found = stored(out, "train")
    assert [(key, *row[1:]) for key, row in found.items()] == [("b/é", 1, 0), ("a", 0, 0), ("z", 2, 1)]
    assert list(stored(out, "val")) == ["v"]
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["classes"] == ["cat", "dog", "owl"]
    assert (manifest["shuffle"], manifest["images_per_shard"]) == ("kept", 2)
    assert found["a"][0] == encoded(patch(2), "png")


def test_changed_bytes_are_found(images, tmp_path, without_jpegtran):
    write_folder(images, tmp_path / "plain", **QUIET)
    index = load_index(tmp_path / "plain", "val", tmp_path)
    row = index.samples[3]
    with open(index.shards[row["shard"]], "r+b") as file:
        file.seek(int(row["offset"]) + 300)
        byte = file.read(1)
        file.seek(-1, 1)
        file.write(bytes([byte[0] ^ 1]))
    with pytest.raises(UserError, match=rf"{index.keys()[3]}: its bytes changed since it was indexed"):
        write_shards(list_shards(tmp_path / "plain"), tmp_path / "out", regions=True, workers=1, quiet=True)
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_refused_in_a_line(images, tmp_path, capsys, without_jpegtran, monkeypatch):
    monkeypatch.setattr("data.write_shards.__main__.transcoder", lambda: "stand-in 1")
    plain, empty = tmp_path / "plain", tmp_path / "empty"
    write_folder(images, plain, **QUIET)
    empty.mkdir()
    for arguments, expected in (
        ([str(plain), str(tmp_path / "out")], "shards would only be copied: give --regions"),
        ([str(plain), str(plain), "--regions"], "begun with regions None, now stand-in 1"),
        ([str(tmp_path / "nowhere"), str(tmp_path / "out"), "--regions"], "nowhere: no such folder"),
        ([str(empty), str(tmp_path / "out"), "--regions"], "neither a manifest.json nor shards whose names have"),
    ):
        assert main(["shards", *arguments]) == 2
        assert expected in one_line(capsys)
    assert not (tmp_path / "out").exists()


def test_downloads_and_checks_of_the_files(images, tmp_path, capsys, without_jpegtran):
    write_folder(images, tmp_path / "out", regions=True, **QUIET)
    folder = download_shards(f"file://{tmp_path}/out", tmp_path / "cache", ["val"])
    assert {"val.regions.npy", "val.segments.npy"} == {path.name for path in folder.glob("*.npy")} - {"val.index.npy"}
    assert load_index(folder, "val", tmp_path).regions is not None
    arguments = [str(folder), "--split", "val", "--verify", "--workers", "1"]
    assert show_index(arguments) == 0
    path = folder / "val.segments.npy"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert show_index(arguments) == 1
    assert "val.segments.npy: not the file that manifest.json describes" in capsys.readouterr().out


# --- the program ----------------------------------------------------------------------------------


def test_without_the_program_nothing_is_written(images, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(["folder", str(images), str(tmp_path / "out"), "--regions"]) == 2
    error = one_line(capsys)
    assert "jpegtran, which is not installed: apt-get install libjpeg-turbo-progs (Debian, Ubuntu)" in error
    with pytest.raises(UserError, match="not installed"):
        write_folder(images, tmp_path / "out", regions=True, **QUIET)
    assert not (tmp_path / "out").exists()


def test_another_program_of_that_name(images, tmp_path, capsys, monkeypatch):
    tool(tmp_path / "bin", monkeypatch, "echo mozjpeg version 4.1.1 >&2")
    assert main(["folder", str(images), str(tmp_path / "out"), "--regions"]) == 2
    assert "not the jpegtran of libjpeg-turbo" in one_line(capsys)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("script", "ends"),
    [("kill -TERM $$", "was ended by SIGTERM"), ("exec sleep 600", "did not rewrite it within 0.3 s")],
)
def test_a_program_that_is_stopped_is_no_damaged_image(images, tmp_path, monkeypatch, script, ends):
    monkeypatch.setattr(write, "transcoder", lambda: "stand-in 1")
    monkeypatch.setattr(regions, "_SECONDS", 0.3 if "sleep" in script else 60)
    tool(tmp_path / "bin", monkeypatch, script)
    with pytest.raises(UserError, match=rf"images\d*/train/.*: jpegtran {ends}: start the same command again"):
        write_folder(images, tmp_path / "out", regions=True, **QUIET)


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("cat; echo Corrupt JPEG data >&2", "damaged"),
        ("exit 1", "damaged"),
        ("cat", "JPEG of another kind"),  # it has no restart markers
    ],
)
def test_what_the_program_does_not_do_stays_whole(tmp_path, monkeypatch, script, reason):
    tool(tmp_path / "bin", monkeypatch, script)
    assert rewrite(encoded(patch(1))) == reason


def test_other_pixels_stay_whole(tmp_path, monkeypatch):
    (tmp_path / "other.jpg").write_bytes(with_restarts(patch(1).rotate(180)))
    tool(tmp_path / "bin", monkeypatch, f"cat > /dev/null; cat {tmp_path / 'other.jpg'}")
    assert rewrite(saved(patch(1))) == "other pixels when rewritten"
