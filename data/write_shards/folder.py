"""Class folders: SRC/{train,val}/CLASS/*.jpg, or those of one split. Check: `pytest tests/test_write_shards.py`."""

import os
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path

from data.write_shards.source import SPLITS, Entry, Listing, Source, check_classes, unique_keys, with_class
from repghost.errors import UserError
from repghost.images import EXTENSIONS, is_image, walk_files


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
    first = next(iter(folders.values()))
    classes = subfolders(first)
    check_classes(first, classes)
    sources = (list_class_folders(name, folder, classes) for name, folder in folders.items())
    return Listing(tuple(classes), tuple(sources))


def subfolders(folder: Path) -> list[str]:
    """Names of the folders in `folder`, sorted, without hidden ones."""
    return sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith("."))


def list_class_folders(split: str, folder: Path, classes: Sequence[str]) -> Source:
    """The images of `folder`/CLASS, which may lack some of the `classes`."""
    label_of = {name: label for label, name in enumerate(classes)}
    entries: list[Entry] = []
    ignored = 0
    names = subfolders(folder)
    if not names:
        raise UserError(f"{folder}: no class folders in it")
    for name in names:
        if name not in label_of:
            raise UserError(f"{folder / name}: a class in {split} that is not in train")
        images, others = list_images(folder / name)
        if not images:
            raise UserError(f"{folder / name}: no image in this class folder ({' '.join(EXTENSIONS)})")
        for path, size in images:
            entries.append(Entry(with_class(name, os.path.relpath(path, folder / name)), path, label_of[name], size))
        ignored += others
    return Source(split, unique_keys(entries), read_files, ignored)


def list_images(folder: Path) -> tuple[list[tuple[str, int]], int]:
    """(path, bytes) of every image below `folder`, sorted, and how many other files there are."""
    statuses = ((path, os.stat(path)) for path in walk_files(folder))
    files = [(path, status.st_size) for path, status in statuses if stat.S_ISREG(status.st_mode)]  # a pipe would block
    images = [file for file in files if is_image(file[0])]
    return images, len(files) - len(images)


def read_files(entries: Sequence[Entry]) -> Iterator[bytes]:
    """The bytes of images that are files of their own."""
    for entry in entries:
        yield Path(entry.file).read_bytes()
