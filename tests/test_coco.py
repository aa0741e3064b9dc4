"""Data sets in COCO's format: what is imported, what is refused, and the index of the shards."""

import copy
import io
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from coco_files import CATEGORIES, decoded, make_coco
from PIL import Image

from data import scenes
from data.coco import load_coco
from data.datamodule import ImageNetData
from data.remote import download_shards
from data.scenes import prepare_scenes
from data.write_shards.__main__ import main
from data.write_shards.coco import list_coco
from data.write_shards.write import write_shards
from repghost.errors import UserError

QUIET = {"workers": 1, "quiet": True, "images_per_shard": 8}
Content = dict[str, Any]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_coco(tmp_path_factory.mktemp("coco"))


@pytest.fixture(scope="module")
def imported(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("shards") / "coco"
    write_shards(list_coco(source), out, **QUIET)
    return out


def annotations(root: Path, split: str = "train") -> Path:
    return root / "annotations" / f"instances_{split}2017.json"


# -- what is imported --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", ["train", "val"])
def test_everything_arrives_as_it_was(split: str, source: Path, imported: Path) -> None:
    index = load_coco(imported, [split], imported)[split]
    given, found = json.loads(annotations(source, split).read_text()), index.annotations()
    by_id = {image["id"]: image for image in given["images"]}
    assert found["images"] == [by_id[i] for i in index.image_ids.tolist()] and len(index) == len(by_id)
    assert sorted(found["annotations"], key=lambda a: a["id"]) == sorted(given["annotations"], key=lambda a: a["id"])
    assert found["categories"] == sorted(CATEGORIES, key=lambda c: c["id"])
    assert index.classes == ("wedge", "box", "blob") and index.category_ids == (3, 7, 90)
    for row, image in enumerate(found["images"]):
        at = index.samples[row]
        stored = Path(index.shards[at["shard"]]).read_bytes()[at["offset"] : at["offset"] + at["size"]]
        assert stored == (source / f"{split}2017" / image["file_name"]).read_bytes()


def test_arrays_are_those_of_the_annotations(imported: Path) -> None:
    index = load_coco(imported, ["train"], imported)["train"]
    found = index.annotations()
    rows = {image["id"]: row for row, image in enumerate(found["images"])}
    assert index.objects["image"].tolist() == [rows[a["image_id"]] for a in found["annotations"]]
    assert index.labels.tolist() == [1 + [3, 7, 90].index(a["category_id"]) for a in found["annotations"]]
    assert index.learned.tolist() == [not a["iscrowd"] for a in found["annotations"]]
    corners = [[x, y, x + w, y + h] for x, y, w, h in (a["bbox"] for a in found["annotations"])]
    assert index.boxes.tolist() == corners
    assert index.bounds[-1] == len(corners) and (np.diff(index.bounds) == 0).sum() == 4


def test_shards_are_plain_webdataset(imported: Path) -> None:
    import webdataset

    samples = [
        s
        for shard in sorted(imported.glob("train*.tar"))
        for s in webdataset.WebDataset(str(shard), shardshuffle=False)
    ]
    assert len(samples) == 20
    for sample in samples:
        record = json.loads(sample["json"])
        image = Image.open(io.BytesIO(sample.get("jpg") or sample["png"]))
        assert image.size == (record["width"], record["height"])
        assert sample["__key__"] == record["file_name"].partition(".")[0]
        for annotation in record["annotations"]:
            assert decoded(annotation, record["height"], record["width"]).sum() == annotation["area"]


def test_shards_are_the_same_for_any_number_of_workers_and_after_a_restart(
    source: Path, imported: Path, tmp_path: Path
) -> None:
    def digests(folder: Path) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}

    write_shards(list_coco(source), tmp_path, **{**QUIET, "workers": 2})
    assert digests(tmp_path) == digests(imported)
    (tmp_path / "train-000001.tar").unlink()
    write_shards(list_coco(source), tmp_path, **QUIET)
    assert digests(tmp_path) == digests(imported)


def test_a_restart_with_other_annotations_is_refused(tmp_path: Path) -> None:
    make_coco(tmp_path / "a")
    write_shards(list_coco(tmp_path / "a"), tmp_path / "out", **QUIET)
    edit(tmp_path / "a", lambda content: content["annotations"][0].update(area=1.5))
    with pytest.raises(UserError, match=r"begun with other images in train"):
        write_shards(list_coco(tmp_path / "a"), tmp_path / "out", **QUIET)


def test_a_split_may_be_alone_and_have_any_name(tmp_path: Path) -> None:
    make_coco(tmp_path / "a")
    annotations(tmp_path / "a").unlink()
    other = annotations(tmp_path / "a", "val").rename(tmp_path / "a/annotations/mine.json")
    (tmp_path / "a/val2017").rename(tmp_path / "a/images")
    for name in ("mine.json", str(other)):
        (found,) = list_coco(tmp_path / "a", val=name).sources
        assert found.split == "val" and len(found.entries) == 7
    with pytest.raises(UserError, match=r"annotations/instances_train\*"):
        list_coco(tmp_path / "a")
    with pytest.raises(UserError, match=r"missing.json: no such file, which --train names"):
        list_coco(tmp_path / "a", train="missing.json")


# -- what is refused, and what is counted ------------------------------------------------------------------------------


def edit(root: Path, change: Callable[[Content], object], split: str = "train") -> None:
    path = annotations(root, split)
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def image(**values: Any) -> Callable[[Content], object]:
    """Changes the first image, whose id is 10; None removes a key."""
    return lambda content: _change(content["images"][0], values)


def annotation(**values: Any) -> Callable[[Content], object]:
    """Changes the first annotation, whose id is 1."""
    return lambda content: _change(content["annotations"][0], values)


def category(**values: Any) -> Callable[[Content], object]:
    return lambda content: _change(content["categories"][0], values)


def _change(entry: Content, values: Content) -> None:
    for name, value in values.items():
        if value is None:
            del entry[name]
        else:
            entry[name] = value


def again(kind: str) -> Callable[[Content], object]:
    return lambda content: content[kind].append(copy.deepcopy(content[kind][0]))


# What is wrong with the file, its categories or its images: a change, and words of the line.
REFUSED: dict[str, tuple[Callable[[Content], object] | bytes, str]] = {
    "cut": (b'{"images": [{"id": 1', "damaged or not JSON"),
    "empty": (b"", "damaged or not JSON"),
    "not UTF-8": (b'{"images": "\xff"}', "damaged or not JSON"),
    "nested without an end": (b"[" * 100_000, "damaged or not JSON"),
    "a list": (b"[]", "not COCO's format"),
    "no key images": (lambda content: content.pop("images"), "its images are missing or no list"),
    "annotations are no list": (lambda content: content.update(annotations={}), "its annotations are missing or no"),
    "categories are no objects": (lambda content: content.update(categories=["cat"]), "its categories are missing"),
    "no images": (lambda content: content.update(images=[]), "no images in it"),
    "no categories": (lambda content: content.update(categories=[]), "no categories in it"),
    "duplicate category id": (category(id=3), "two categories have the id 3"),
    "duplicate category name": (category(name="blob"), "two categories have the name blob"),
    "category id is text": (category(id="7"), "the id of a category is '7', not a whole number"),
    "category id is true": (category(id=True), "the id of a category is True, not a whole number"),
    "category without a name": (category(name=None), "the name of category 7 is None"),
    "duplicate image id": (again("images"), "image 10: another image has the same id"),
    "image id is text": (image(id="a"), "image 'a': its id is not a whole number"),
    "image without a height": (image(height=None), "image 10: its width and height are"),
    "image of no width": (image(width=0), "image 10: its width and height are 0 and"),
    "height is a fraction": (image(height=50.5), "image 10: its width and height are"),
    "size beyond all memory": (image(height=10**6, width=10**6), "image 10: its width and height are 1000000"),
    "no file_name": (image(file_name=None), "image 10: its file_name is None"),
    "file_name leads out": (image(file_name="../../a.jpg"), "image 10: its file_name ../../a.jpg leads out"),
    "file_name is absolute": (image(file_name="/etc/passwd"), "image 10: its file_name /etc/passwd leads out"),
    "file_name with a line break": (image(file_name="a\n.jpg"), r"image 10: its file_name is 'a\\n.jpg'"),
}  # fmt: skip

# What is left out with --skip-bad: a change, words of the line, and which image and annotations are then missing.
COUNTED: dict[str, tuple[Callable[[Content], object], str]] = {
    "missing key": (annotation(bbox=None), "annotation 1 of image 10: it has no bbox"),
    "missing area": (annotation(area=None), "annotation 1 of image 10: it has no area"),
    "duplicate annotation id": (again("annotations"), "annotation 1 of image 10: its id is that of another"),
    "annotation id is text": (annotation(id="1"), "annotation '1' of image 10: its id is not a whole number"),
    "no such image": (annotation(image_id=999), "annotation 1 of image 999: there is no such image"),
    "image id is a fraction": (annotation(image_id=10.5), "annotation 1 of image 10.5: there is no such image"),
    "unknown category": (annotation(category_id=4), "annotation 1 of image 10: there is no category 4"),
    "category is a list": (annotation(category_id=[7]), r"annotation 1 of image 10: there is no category \[7\]"),
    "iscrowd is 2": (annotation(iscrowd=2), "its iscrowd is 2, neither 0 nor 1"),
    "iscrowd is text": (annotation(iscrowd="0"), "its iscrowd is '0', neither 0 nor 1"),
    "NaN in the box": (annotation(bbox=[math.nan, 1, 2, 3]), r"its bbox is \[nan, 1, 2, 3\]"),
    "infinite box": (annotation(bbox=[0, 0, math.inf, 3]), r"its bbox is \[0, 0, inf, 3\]"),
    "three numbers": (annotation(bbox=[1, 2, 3]), r"its bbox is \[1, 2, 3\], not \[left, top, width, height\]"),
    "box of text": (annotation(bbox=["1", "2", "3", "4"]), "its bbox is"),
    "negative width": (annotation(bbox=[10, 10, -5, 5]), r"its bbox is \[10, 10, -5, 5\]"),
    "box outside": (annotation(bbox=[500, 10, 5, 5]), "lies outside of the image's"),
    "box left of the image": (annotation(bbox=[-20, 10, 5, 5]), "lies outside of the image's"),
    "area is NaN": (annotation(area=math.nan), "its area is nan"),
    "negative area": (annotation(area=-1), "its area is -1"),
    "polygon of four numbers": (annotation(segmentation=[[1, 2, 3, 4]]), "a polygon of 4 numbers"),
    "odd polygon": (annotation(segmentation=[[1, 2, 3, 4, 5, 6, 7]]), "a polygon of 7 numbers"),
    "polygon of text": (annotation(segmentation=[["1"] * 6]), "a polygon that is not a list of coordinates"),
    "flat polygon": (annotation(segmentation=[1, 2, 3, 4, 5, 6]), "a polygon that is not a list of coordinates"),
    "infinite polygon": (annotation(segmentation=[[1, 2, 3, 4, 5, math.inf]]), "a polygon that is not a list of coord"),
    "polygon far outside": (annotation(segmentation=[[1, 2, 3, 4, 5, 1e7]]), "a polygon that is not a list of coord"),
    "number of 500 digits": (annotation(bbox=[1, 2, 3, 10**500]), r"its bbox is \[1, 2, 3, 1000"),
    "segmentation is text": (annotation(segmentation="RLE"), "neither a list of polygons nor an RLE"),
    "RLE without counts": (annotation(segmentation={"size": [1, 1]}), "neither a list of polygons nor an RLE"),
    "RLE of another size": (annotation(segmentation={"size": [2, 2], "counts": [4]}), r"size of its RLE is \[2, 2\]"),
    "RLE that does not add up": (lambda c: _rle(c, [5]), "the counts of its RLE add up to 5"),
    "RLE with a negative run": (lambda c: _rle(c, [-5, 5]), "neither whole numbers from 0 on nor a string"),
    "RLE of fractions": (lambda c: _rle(c, [0.5]), "neither whole numbers from 0 on nor a string"),
    "damaged compressed RLE": (lambda c: _rle(c, "abc"), "the counts of its RLE are damaged"),
    "compressed RLE that is not ASCII": (lambda c: _rle(c, "ä\u2028"), "the counts of its RLE are damaged"),
    "file is missing": (image(file_name="gone.jpg"), "image 10: there is no .*gone.jpg"),
}  # fmt: skip


def _rle(content: Content, counts: Any) -> None:
    size = [content["images"][0]["height"], content["images"][0]["width"]]
    content["annotations"][0]["segmentation"] = {"size": size, "counts": counts}


@pytest.fixture
def files(source: Path, tmp_path: Path) -> Path:
    """A copy of the data set whose annotations a test may change."""
    (tmp_path / "annotations").mkdir()
    for split in ("train", "val"):
        (tmp_path / f"{split}2017").symlink_to(source / f"{split}2017")
        annotations(tmp_path, split).write_bytes(annotations(source, split).read_bytes())
    return tmp_path


def import_in(files: Path, *options: str) -> int:
    return main(["coco", str(files), str(files / "out"), "--workers", "1", *options])


@pytest.mark.parametrize("case", REFUSED)
def test_a_file_is_refused_in_one_line(case: str, files: Path, capfd: pytest.CaptureFixture[str]) -> None:
    change, words = REFUSED[case]
    if isinstance(change, bytes):
        annotations(files).write_bytes(change)
    else:
        edit(files, change)
    assert import_in(files, "--skip-bad", "5") == 2
    said = capfd.readouterr().err
    assert said.count("\n") == 1 and said.startswith(f"error: {annotations(files)}: ")
    assert re.search(words, said), said


@pytest.mark.parametrize("case", COUNTED)
def test_an_entry_is_refused_or_left_out(case: str, files: Path, capfd: pytest.CaptureFixture[str]) -> None:
    change, words = COUNTED[case]
    edit(files, change)
    given = json.loads(annotations(files).read_text())
    line = f"^{annotations(files)}: .*{words}.*: correct it, or leave it out with --skip-bad$"
    with pytest.raises(UserError, match=line):
        list_coco(files)
    assert import_in(files, "--skip-bad", "1") == 0
    said = capfd.readouterr()
    assert said.err.count("skipped") == 1 and "left out" in said.out
    found = load_coco(files / "out", ["train"], files)["train"]
    assert len(found) == 20 - (case == "file is missing")
    rest = given["annotations"][1:]  # a duplicate of the first is the last
    rest = [a["id"] for a in rest if case != "file is missing" or a["image_id"] != 10]
    assert sorted(a["id"] for a in found.annotations()["annotations"]) == sorted(rest)


def test_sizes_are_those_of_the_files(files: Path, capfd: pytest.CaptureFixture[str]) -> None:
    edit(files, lambda content: content["images"][4].update(width=1000))  # which has no object
    assert import_in(files) == 2
    said = capfd.readouterr().err
    line = r"000000000004.jpg: \d+ x \d+ pixels, but its annotations \(image 14\) say 1000 x \d+ .*--skip-bad"
    assert re.search(line, said), said
    assert import_in(files, "--skip-bad", "1") == 0
    assert len(load_coco(files / "out", ["train"], files)["train"]) == 19


def test_odd_boxes_are_kept_and_counted(files: Path, capfd: pytest.CaptureFixture[str]) -> None:
    def change(content: Content) -> None:
        first, second, third = content["annotations"][:3]
        first["bbox"][2], second["bbox"] = 0, [-5.0, 3.0, 10.0, 200.0]
        del third["segmentation"]
        content["annotations"][3]["bbox"][0] -= 0.5

    edit(files, change)
    assert import_in(files) == 0
    said = capfd.readouterr().out
    assert "train: 1 boxes without area, which training leaves out\n" in said
    assert "train: 1 boxes that reach more than a pixel beyond their image, which training clips\n" in said
    assert "train: 4 images without annotations\n" in said
    index = load_coco(files / "out", ["train"], files)["train"]
    content = json.loads(annotations(files).read_text())
    first, second, third = content["annotations"][:3]
    found = {a["id"]: (a, i) for i, a in enumerate(index.annotations()["annotations"])}
    assert all(found[a["id"]][0] == a for a in (first, second, third))
    assert not index.learned[found[first["id"]][1]] and not index.objects["segmented"][found[third["id"]][1]]
    height = next(i["height"] for i in content["images"] if i["id"] == second["image_id"])
    assert index.boxes[found[second["id"]][1]].tolist() == [0, 3, 5, min(203, height)]


def test_the_evaluation_sees_no_annotation_with_the_id_0(files: Path) -> None:
    edit(files, annotation(id=0))
    write_shards(list_coco(files), files / "out", **QUIET)
    given = json.loads(annotations(files).read_text())["annotations"]
    found = load_coco(files / "out", ["train"], files)["train"].annotations()["annotations"]
    assert {a["id"] for a in found} - {a["id"] for a in given} == {1 + max(a["id"] for a in given)}
    assert min(a["id"] for a in found) > 0 and len({a["id"] for a in found}) == len(given)


def test_categories_differ(files: Path) -> None:
    edit(files, category(name="crate"), "val")
    with pytest.raises(UserError, match=r"val2017.json: its categories are not those of train \(category 7 box\)"):
        list_coco(files)


def test_two_files_of_one_split(files: Path) -> None:
    annotations(files).with_name("instances_train2014.json").write_text("{}")
    with pytest.raises(UserError, match=r"instances_train2014.json and instances_train2017.json both look like train"):
        list_coco(files)
    assert len(list_coco(files, train="instances_train2017.json").sources) == 2


# -- shards that are not what is needed --------------------------------------------------------------------------------


def test_each_task_refuses_the_shards_of_the_other(imported: Path, shards: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"shards without annotations: detection needs those of .* coco"):
        load_coco(shards, ["train"], tmp_path)
    options = dict.fromkeys(("train", "val", "class_names", "readers", "hw_decoder_load", "thread_affinity", "augment"))
    data = ImageNetData(
        root=imported, cache=tmp_path, workers=0, prefetch=2, loader="torch", eval_batch_size=1, image_size=32,
        crop_fraction=1.0, **options,
    )  # type: ignore[arg-type]  # fmt: skip
    with pytest.raises(UserError, match=r"shards for detection, .*: give task=detection data=coco"):
        data.setup("validate")
    with pytest.raises(UserError, match=r"no manifest.json in it: python -m data.write_shards coco"):
        load_coco(tmp_path, ["train"], tmp_path)


@pytest.fixture
def copied(imported: Path, tmp_path: Path) -> Path:
    for path in imported.iterdir():
        if path.is_file():
            (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def test_objects_that_changed_are_refused(copied: Path) -> None:
    path = copied / "train.objects.npz"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"train.objects.npz: not the file that manifest.json describes"):
        load_coco(copied, ["train"], copied)
    path.unlink()
    with pytest.raises(UserError, match=r"train.objects.npz: missing"):
        load_coco(copied, ["train"], copied)


@pytest.mark.parametrize(
    "ids", [[3, 7], [3, 3, 90], [7, 3, 90], ["3", "7", "90"], 3, [True, 7, 90], [2**70, 2**71, 2**72]]
)
def test_a_damaged_manifest_is_refused(copied: Path, ids: object) -> None:
    manifest = json.loads((copied / "manifest.json").read_text())
    (copied / "manifest.json").write_text(json.dumps({**manifest, "category_ids": ids}))
    with pytest.raises(UserError, match=r"manifest.json: not a manifest of format 1"):
        load_coco(copied, ["train"], copied)


def test_annotations_that_changed_are_refused(copied: Path) -> None:
    index = load_coco(copied, ["val"], copied)["val"]
    shard = Path(index.shards[0])
    shard.write_bytes(shard.read_bytes().replace(b'"category_id": 3,', b'"category_id": 7,'))
    with pytest.raises(UserError, match=r"val-000000.tar: \d+.json: its bytes changed since it was indexed"):
        index.annotations()


def test_fingerprints_tell_annotations_apart(copied: Path, files: Path) -> None:
    before = load_coco(copied, ["train", "val"], copied)
    edit(files, lambda content: content["annotations"][0]["segmentation"][0].extend([5.0, 5.0]))
    assert import_in(files, "--images-per-shard", "8") == 0
    after = load_coco(files / "out", ["train", "val"], files)
    assert before["train"].fingerprint != after["train"].fingerprint
    assert before["val"].fingerprint == after["val"].fingerprint


def test_a_download_brings_the_objects(copied: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    cache = tmp_path_factory.mktemp("cache")
    folder = download_shards(f"file://{copied}", cache, ["val"])
    assert len(load_coco(folder, ["val"], cache)["val"].annotations()["images"]) == 7


# -- the embedded scenes -----------------------------------------------------------------------------------------------


def test_scenes_are_the_same_every_time_and_their_boxes_hold_their_masks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scenes, "SCENES", {"train": 6, "val": 6})
    folders = [prepare_scenes(tmp_path / name) for name in ("a", "b")]
    first, second = (load_coco(folder, ["train", "val"], folder) for folder in folders)
    assert prepare_scenes(tmp_path / "a") == folders[0] and sorted(p.name for p in (tmp_path / "a").iterdir()) == [
        "digits_scenes",
        "digits_scenes.lock",
    ]
    for split in ("train", "val"):
        assert first[split].fingerprint == second[split].fingerprint
        assert first[split].classes == tuple("0123456789") and len(first[split]) == 6
        found = first[split].annotations()
        sizes = {i["id"]: (i["height"], i["width"]) for i in found["images"]}
        assert all(96 <= side <= 128 for size in sizes.values() for side in size)
        for a in found["annotations"]:
            mask = decoded(a, *sizes[a["image_id"]])
            rows, columns = np.nonzero(mask)
            left, top, width, height = a["bbox"]
            assert (left, top) == (columns.min(), rows.min()) and mask.sum() == a["area"]
            assert (left + width, top + height) == (columns.max() + 1, rows.max() + 1)
    assert first["train"].fingerprint != first["val"].fingerprint
