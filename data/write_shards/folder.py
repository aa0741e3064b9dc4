"""Class folders, SRC/{train,val}/CLASS/*.jpg or SRC/CLASS/*.jpg, and Kaggle's tree of ImageNet.

Check: `pytest tests/test_write_shards.py -k "folder or kaggle"`.
"""

import os
import stat
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.random import Philox

from data.shards import split_folders
from data.write_shards.source import SPLITS, Entry, Listing, Source, unique_keys, with_class
from repghost.errors import UserError
from repghost.files import read_file, read_table
from repghost.images import EXTENSIONS, FILE_BYTES, LEFT_OUT, is_image, walk_files

# What a NAS, macOS, a file system or Windows makes; hidden folders are left out, too.
_NO_CLASSES = (*LEFT_OUT, "lost+found", "$recycle.bin", "system volume information")

_SPLIT_STREAM = 3  # Philox counter's highest word, as in data.write_shards.write


def list_folder(root: str | Path, split: str | None = None, val_share: float | None = None, seed: int = 0) -> Listing:
    """Class folders in SRC/train and SRC/val (or validation, valid), or in SRC itself.

    For those in SRC itself, --val-share says how many of the images of each class are for validation, which are then
    drawn from --seed; or --split says which split they are, and a second run with the other one and the same OUT adds
    that. Labels follow the sorted names of the class folders.
    """
    root = Path(root)
    if not root.is_dir():
        raise UserError(f"{root}: no such folder")
    if val_share is not None:
        classes = _class_folders(root)
        return Listing(root, classes, _draw_validation(root, classes, val_share, seed))
    folders = {split: root} if split else _split_folders(root)
    classes = _class_folders(next(iter(folders.values())))
    return Listing(root, classes, [_list_classes(name, folder, classes) for name, folder in folders.items()])


def _split_folders(root: Path) -> dict[str, Path]:
    """The folders of both splits in `root`; UserError unless there is one of each."""
    found = {split: split_folders(root, split) for split in SPLITS}
    for split, folders in found.items():
        if len(folders) > 1:
            raise UserError(f"{root}: {folders[0].name} and {folders[1].name} both look like {split}: keep one of them")
    if found["train"] and not found["val"]:
        train = found["train"][0]
        raise UserError(f"{root}: no val/ beside {train.name}/: add one, or give {train} with --val-share 0.1")
    if not found["train"]:
        what = (
            "with --val-share 0.1 a tenth of each is for validation; or say with --split train (or val) what they are"
        )
        raise UserError(f"{root}: no train/ and val/ in it: if its folders are classes, {what}")
    return {split: folders[0] for split, folders in found.items()}


def list_kaggle(root: str | Path) -> Listing:
    """The tree of Kaggle's ImageNet Object Localization Challenge.

    SRC is the folder that holds ILSVRC and LOC_val_solution.csv, or ILSVRC, Data or CLS-LOC inside of it.
    """
    root = Path(root).resolve()
    candidates = [root / part for part in ("ILSVRC/Data/CLS-LOC", "Data/CLS-LOC", "CLS-LOC", ".")]
    images = next((c for c in candidates if (c / "train").is_dir() and (c / "val").is_dir()), None)
    if images is None:
        raise UserError(f"{root}: no ILSVRC/Data/CLS-LOC with train/ and val/ in it")
    solutions = [folder / "LOC_val_solution.csv" for folder in (root, *images.parents[:3])]
    solution = next((path for path in solutions if path.exists()), None)
    if solution is None:
        raise UserError(f"{solutions[-1]}: missing: it holds the labels of the validation images")
    classes = _class_folders(images / "train")
    train = _list_classes("train", images / "train", classes)
    return Listing(root, classes, [train, _list_solution(images / "val", solution, classes)])


def _class_folders(folder: Path) -> list[str]:
    """Names of the class folders in `folder`, sorted.

    Hidden ones and links to where they lie are left out. Raises UserError for two folders that would be one class, and
    when there are none.
    """
    here = folder.resolve()
    above = (here, *here.parents)
    name_of: dict[Path, str] = {}
    written: dict[str, str] = {}
    for name in sorted(entry.name for entry in os.scandir(folder) if entry.is_dir()):
        path = (folder / name).resolve()
        if name.startswith(".") or name.casefold() in _NO_CLASSES or path in above:
            continue
        if (other := name_of.setdefault(path, name)) != name:
            raise UserError(f"{folder / name}: the same folder as {other}: its images would have two classes")
        if (other := written.setdefault(_composed(name), name)) != name:
            raise UserError(f"{folder / name}: {other!a} and {name!a} are one name in Unicode: rename one")
    if not written:
        raise UserError(f"{folder}: no class folders in it: expected one folder of images for each class")
    return list(written.values())


def _composed(name: str) -> str:
    """A folder's name as most systems write it; copies from macOS have letters and accents apart."""
    return unicodedata.normalize("NFC", name)


def _list_classes(split: str, folder: Path, classes: Sequence[str]) -> Source:
    """The images of `folder`/CLASS, which may lack some of the `classes`."""
    label_of = {_composed(name): label for label, name in enumerate(classes)}
    entries: list[Entry] = []
    ignored = 0
    for name in _class_folders(folder):
        if (label := label_of.get(_composed(name))) is None:
            raise UserError(f"{folder / name}: a class in {split} that is not in train")
        images, others = _list_images(folder / name)
        if not images:
            raise UserError(f"{folder / name}: no image in this class folder ({' '.join(EXTENSIONS)})")
        for path, size in images:
            entries.append(Entry(with_class(name, os.path.relpath(path, folder / name)), path, label, size))
        ignored += others
    beside = sum(entry.is_file() and is_image(entry.name) for entry in os.scandir(folder))
    remarks = [f"{beside:,} images beside the class folders left out"] * bool(beside)
    return Source(split, unique_keys(entries), read_files, ignored, remarks=remarks)


def _draw_validation(root: Path, classes: Sequence[str], share: float, seed: int) -> list[Source]:
    """The images of `root`/CLASS in two splits: of each class that has several, at least one is in each."""
    if folders := [folder for split in SPLITS for folder in split_folders(root, split) if _holds_folders(folder)]:
        raise UserError(f"{folders[0]}: a split and no class: leave --val-share out, or give the folder of its classes")
    source = _list_classes("train", root, classes)
    labels = np.array([entry.label for entry in source.entries])
    validates = np.zeros(len(labels), bool)
    counts = np.bincount(labels)
    for label, (count, end) in enumerate(zip(counts, np.cumsum(counts), strict=True)):  # the images are sorted by class
        draws = Philox(key=[seed, label], counter=[0, 0, 0, _SPLIT_STREAM]).random_raw(count)
        drawn = np.argsort(draws, kind="stable")[: min(max(1, round(share * count)), count - 1)]
        validates[end - count + drawn] = True
    lonely = [classes[label] for label in np.flatnonzero(counts == 1).tolist()]
    if len(lonely) == len(classes):
        raise UserError(f"{root}: one image in each class: none is left for validation")
    remarks = [f"{len(lonely):,} classes of a single image are in train only: {lonely[0]} ..."] if lonely else []
    train, val = ([e for e, drawn in zip(source.entries, validates, strict=True) if drawn == v] for v in (False, True))
    return [replace(source, entries=train), Source("val", val, read_files, remarks=remarks)]


def _holds_folders(folder: Path) -> bool:
    """Whether there are folders in `folder` and no images, as in those of a split."""
    entries = [entry for entry in os.scandir(folder) if not entry.name.startswith(".")]
    return any(entry.is_dir() for entry in entries) and not any(is_image(entry.name) for entry in entries)


def _list_solution(folder: Path, solution: Path, classes: Sequence[str]) -> Source:
    """The validation images of Kaggle, whose rows are "IMAGE,n01751748 111 108 230 366 ...": the class, then boxes."""
    rows = read_table(solution, ("ImageId", "PredictionString"), "the classes of images")
    wnid_of = {row["ImageId"]: row["PredictionString"].partition(" ")[0] for row in rows}
    entries: list[Entry] = []
    images, ignored = _list_images(folder)
    for path, size in images:
        name = os.path.basename(path)
        wnid = wnid_of.pop(os.path.splitext(name)[0], None)
        if wnid is None:
            raise UserError(f"{path}: {solution} has no row for this image")
        if wnid not in classes:
            raise UserError(f"{solution}: {name} has the class {wnid}, which is not in train")
        entries.append(Entry(name, path, classes.index(wnid), size))
    if wnid_of:
        raise UserError(f"{folder}: {next(iter(wnid_of))} is missing ({len(wnid_of)} images that {solution} lists)")
    return Source("val", unique_keys(entries), read_files, ignored)


def _list_images(folder: Path) -> tuple[list[tuple[str, int]], int]:
    """(path, bytes) of every image below `folder`, sorted, and how many other files there are."""
    statuses = ((path, os.stat(path)) for path in walk_files(folder))
    files = [(path, status.st_size) for path, status in statuses if stat.S_ISREG(status.st_mode)]  # a pipe would block
    images = [file for file in files if is_image(file[0])]
    return images, len(files) - len(images)


def read_files(entries: Sequence[Entry]) -> Iterator[bytes]:
    """The bytes of images that are files of their own."""
    for entry in entries:
        yield read_file(entry.file, FILE_BYTES)
