"""Class folders: SRC/{train,val}/CLASS/*.jpg, or those of one split."""

import os
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path

from data.write_shards.source import (
    IMAGE_EXTENSIONS,
    SPLITS,
    Listing,
    Source,
    _check_classes,
    _is_image,
    _name,
    _source,
)
from repghost.errors import UserError


def list_folder(root: str | Path, split: str | None = None) -> Listing:
    """Class folders, below `root`/train and `root`/val or, with `split`, directly below `root`."""
    root = Path(root)
    if not root.is_dir():
        raise UserError(f"{root}: no such folder")
    if split is None:
        if not all((root / name).is_dir() for name in SPLITS):
            raise UserError(f"{root}: no train/ and val/ in it: say with --split train (or val) what its folders are")
        folders = {name: root / name for name in SPLITS}
    else:
        folders = {split: root}
    class_folders = {name: _subfolders(folder) for name, folder in folders.items()}
    classes = next(iter(class_folders.values()))
    _check_classes(next(iter(folders.values())), classes)
    return Listing(
        tuple(classes),
        tuple(_list_class_folders(name, folder, class_folders[name], classes) for name, folder in folders.items()),
    )


def _subfolders(folder: Path) -> list[str]:
    return sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith("."))


def _list_class_folders(split: str, folder: Path, names: Sequence[str], classes: Sequence[str]) -> Source:
    label_of = {name: label for label, name in enumerate(classes)}
    files: list[str] = []
    rows: list[tuple[int, ...]] = []
    keys: list[str] = []
    ignored = 0
    if not names:
        raise UserError(f"{folder}: no class folders in it")
    for name in names:
        if name not in label_of:
            raise UserError(f"{folder / name}: a class in {split} that is not in train")
        before = len(files)
        for path, size in _walk(folder / name):
            if not _is_image(os.path.basename(path)):
                ignored += 1
                continue
            rows.append((len(files), 0, size, label_of[name], 0))
            keys.append(_name(name, os.path.relpath(path, folder / name)))
            files.append(path)
        if len(files) == before:
            raise UserError(f"{folder / name}: no image in this class folder ({' '.join(IMAGE_EXTENSIONS)})")
    return _source(split, "file", files, rows, keys, ignored)


def _walk(folder: Path) -> Iterator[tuple[str, int]]:
    """(path, bytes) of every file below `folder`, sorted. A folder without permission is an error."""

    def stop(error: OSError) -> None:
        raise error

    entered: set[str] = set()  # links may lead in circles
    for path, folders, names in os.walk(folder, onerror=stop, followlinks=True):
        if (real := os.path.realpath(path)) in entered:
            folders.clear()
            continue
        entered.add(real)
        folders.sort()
        for name in sorted(names):
            full = os.path.join(path, name)
            status = os.stat(full)
            if stat.S_ISREG(status.st_mode):  # a pipe would be waited for
                yield full, status.st_size
