"""Class folders, SRC/{train,val}/CLASS/*.jpg, and the tree of Kaggle's ImageNet Object Localization Challenge.

Check: `pytest tests/test_write_shards.py -k "folder or kaggle"`.
"""

import csv
import os
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path

from data.write_shards.source import SPLITS, Entry, Listing, Source, unique_keys, with_class
from repghost.errors import UserError
from repghost.files import read_file
from repghost.images import EXTENSIONS, FILE_BYTES, is_image, walk_files


def list_folder(root: str | Path, split: str | None = None) -> Listing:
    """Class folders in SRC/train and SRC/val, or those of one split in SRC, named by --split.

    A second run with the other split and the same OUT adds that one. Labels follow the sorted names of the class
    folders.
    """
    root = Path(root)
    if not root.is_dir():
        raise UserError(f"{root}: no such folder")
    folders = {split: root} if split else {name: root / name for name in SPLITS}
    if not all(folder.is_dir() for folder in folders.values()):
        raise UserError(f"{root}: no train/ and val/ in it: say with --split train (or val) what its folders are")
    classes = _subfolders(next(iter(folders.values())))
    return Listing(root, classes, [_list_classes(name, folder, classes) for name, folder in folders.items()])


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
    classes = _subfolders(images / "train")
    train = _list_classes("train", images / "train", classes)
    return Listing(root, classes, [train, _list_solution(images / "val", solution, classes)])


def _subfolders(folder: Path) -> list[str]:
    """Names of the folders in `folder`, sorted, without hidden ones."""
    names = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith("."))
    if not names:
        raise UserError(f"{folder}: no class folders in it: expected one folder of images for each class")
    return names


def _list_classes(split: str, folder: Path, classes: Sequence[str]) -> Source:
    """The images of `folder`/CLASS, which may lack some of the `classes`."""
    entries: list[Entry] = []
    ignored = 0
    for name in _subfolders(folder):
        if name not in classes:
            raise UserError(f"{folder / name}: a class in {split} that is not in train")
        images, others = _list_images(folder / name)
        if not images:
            raise UserError(f"{folder / name}: no image in this class folder ({' '.join(EXTENSIONS)})")
        for path, size in images:
            key = with_class(name, os.path.relpath(path, folder / name))
            entries.append(Entry(key, path, classes.index(name), size))
        ignored += others
    return Source(split, unique_keys(entries), read_files, ignored)


def _list_solution(folder: Path, solution: Path, classes: Sequence[str]) -> Source:
    """The validation images of Kaggle, whose rows are "IMAGE,n01751748 111 108 230 366 ...": the class, then boxes."""
    with open(solution, newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        if not {"ImageId", "PredictionString"} <= set(reader.fieldnames or ()):
            raise UserError(f"{solution}: no columns ImageId and PredictionString")
        wnid_of = {row["ImageId"]: row["PredictionString"].partition(" ")[0] for row in reader}
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
