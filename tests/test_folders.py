"""data.root=IMAGES: class folders instead of shards, written into the cache folder."""

import os
import shutil
from pathlib import Path

import pytest
from conftest import Program
from images import encoded, make_class_folders, make_images, patch

from data.folders import holds_images, shards_of_images
from data.index import load_index
from data.show import main as show
from data.write_shards.write import write_folder
from repghost.errors import UserError
from repghost.run import read_config

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def images(tmp_path: Path) -> Path:
    return make_images(tmp_path / "photos", train=4, val=2)


def copies(cache: Path) -> list[str]:
    return sorted(path.name for path in (cache / "folders").iterdir() if path.is_dir())


def test_class_folders_become_the_shards_that_the_command_writes(images: Path, tmp_path: Path) -> None:
    images = images.rename(images.parent / "Meine Käfer")
    out = shards_of_images(images, tmp_path / "cache", ["train", "val"])
    assert out.parent == tmp_path / "cache" / "folders" and out.name.startswith("Meine_K_fer-")
    write_folder(images, tmp_path / "shards", workers=1, quiet=True)
    for split in ("train", "val"):
        written, expected = (load_index(root, split, tmp_path) for root in (out, tmp_path / "shards"))
        assert written.fingerprint == expected.fingerprint and written.classes == ("cat", "dog", "owl")


def test_they_are_written_once_and_again_when_images_change(images: Path, tmp_path: Path, capsys: Capture) -> None:
    cache = tmp_path / "cache"
    first = shards_of_images(images, cache, ["train", "val"])
    assert f"{images}: writing its images as shards, once, to {first}" in capsys.readouterr().out
    assert shards_of_images(images, cache, ["train", "val"]) == first
    assert capsys.readouterr().out == ""
    (images / "train" / "cat" / "new.jpg").write_bytes(encoded(patch(77)))
    second = shards_of_images(images, cache, ["train", "val"])
    changed = next((images / "val" / "owl").iterdir())
    os.utime(changed, (1, 1))
    third = shards_of_images(images, cache, ["train", "val"])
    (images / "train" / "cat" / "new.jpg").unlink()
    os.utime(changed, (2, 2))
    assert copies(cache) == sorted(path.name for path in (first, second, third))
    again = shards_of_images(images, cache, ["train", "val"])
    assert again not in (first, second, third), "another time"
    assert load_index(again, "train", cache).fingerprint == load_index(first, "train", cache).fingerprint


def test_one_split_at_a_time_is_the_same_copy(images: Path, tmp_path: Path) -> None:
    shutil.rmtree(images / "val" / "dog")  # its classes are those of train all the same
    out = shards_of_images(images, tmp_path / "cache", ["val"])
    assert not list(out.glob("train-*"))
    assert load_index(out, "val", tmp_path).classes == ("cat", "dog", "owl")
    assert shards_of_images(images, tmp_path / "cache", ["train"]) == out
    assert len(load_index(out, "train", tmp_path)) == 12 and len(load_index(out, "val", tmp_path)) == 4


@pytest.mark.parametrize("name", ["val", "validation", "valid", "Valid"])
def test_what_validation_may_be_called(images: Path, tmp_path: Path, name: str) -> None:
    (images / "val").rename(images / name)
    assert len(load_index(shards_of_images(images, tmp_path / "cache", ["train", "val"]), "val", tmp_path)) == 6


def test_a_folder_of_one_split(images: Path, tmp_path: Path, capsys: Capture) -> None:
    """For evaluate.py; which of the images of a training are for validation is not for us to say."""
    flat = images / "val"
    out = shards_of_images(flat, tmp_path / "cache", ["val"])
    assert f"{flat}: neither train/ nor val/ in it, so its folders are the classes of val" in capsys.readouterr().out
    assert len(load_index(out, "val", tmp_path)) == 6
    with pytest.raises(UserError) as error:
        shards_of_images(flat, tmp_path / "cache", ["train", "val"])
    assert "no train/ and val/ in it" in str(error.value) and "--val-share 0.1" in str(error.value)
    assert f"python -m data.write_shards folder {flat} SHARDS, then data.root=SHARDS" in str(error.value)
    shutil.rmtree(images / "train")
    assert len(load_index(shards_of_images(images, tmp_path / "cache", ["val"]), "val", tmp_path)) == 6
    with pytest.raises(UserError, match="no train/ and val/ in it"):
        shards_of_images(images, tmp_path / "cache", ["train"])


def test_a_bad_image_is_named_with_the_way_on(images: Path, tmp_path: Path) -> None:
    bad = images / "train" / "dog" / "bad.jpg"
    bad.write_bytes(b"<html>")
    with pytest.raises(UserError) as error:
        shards_of_images(images, tmp_path / "cache", ["train", "val"])
    assert str(error.value).startswith(f"{bad}: not an image")
    assert "--skip-bad" in str(error.value) and str(error.value).endswith("then data.root=SHARDS")
    bad.unlink()
    shards_of_images(images, tmp_path / "cache", ["train", "val"])


def test_what_is_no_folder_of_images(images: Path, tmp_path: Path) -> None:
    assert holds_images(images) and holds_images(images / "train") and not holds_images(images / "train" / "cat")
    write_folder(images, tmp_path / "shards", workers=1, quiet=True)
    assert not holds_images(tmp_path / "shards")
    (tmp_path / "shards" / "manifest.json").unlink()
    assert not holds_images(tmp_path / "shards")
    with pytest.raises(UserError, match=r"shards are unfinished: run the same python -m data\.write_shards again"):
        load_index(tmp_path / "shards", "train", tmp_path)
    (images / "val" / "0.tar").write_bytes(b"")
    assert not holds_images(images)


def test_train_evaluate_and_show(train_tiny: Program, evaluate_with: Program, images: Path, capsys: Capture) -> None:
    arguments = ("data.cache=cache", "name=run", "epochs=1", "recipe.warmup_epochs=0", "batch_size=4")
    assert train_tiny(f"data.root={images}", *arguments) == 0
    assert read_config(Path("outputs/run")).data.root == str(images)
    assert Path("outputs/run/classes.txt").read_text() == "cat\ndog\nowl\n"
    capsys.readouterr()
    weights = ("weights=outputs/run/model.safetensors", "width=0.1", "image_size=32", "trainer=cpu", "data.workers=0")
    for root in (images, images / "val"):
        assert evaluate_with(*weights, f"data.root={root}", "data.cache=cache") == 0
        assert "6 images" in capsys.readouterr().out
    overrides = ["recipe=quick", "image_size=32", f"data.root={images}", "data.cache=cache"]
    assert show(["--out", "grid.png", "--samples", "2", "--epochs", "1", *overrides]) == 0
    assert len(copies(Path("cache"))) == 2


def test_the_cache_cannot_be_written(train_tiny: Program, images: Path, tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "file").write_text("")
    assert train_tiny(f"data.root={images}", f"data.cache={tmp_path / 'file'}") == 2
    (line,) = capsys.readouterr().err.strip().splitlines()[-1:]
    assert line.startswith("error: ") and str(tmp_path / "file") in line


@pytest.mark.slow
def test_two_ranks_share_what_one_of_them_writes(train_tiny: Program, images: Path) -> None:
    arguments = ("data.cache=cache", "name=run", "epochs=1", "recipe.warmup_epochs=0", "trainer.devices=2")
    assert train_tiny(f"data.root={images}", *arguments, "batch_size=4", "data.eval_batch_size=4") == 0
    assert len(copies(Path("cache"))) == 1


def test_class_folders_alone_are_not_trained_on(train_tiny: Program, tmp_path: Path, capsys: Capture) -> None:
    flat = make_class_folders(tmp_path / "photos", per_class=2)
    assert train_tiny(f"data.root={flat}") == 2
    assert f"error: {flat}: no train/ and val/ in it" in capsys.readouterr().err
