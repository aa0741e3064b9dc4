"""The tree of Kaggle's ImageNet Object Localization Challenge. Check: `pytest tests/test_write_shards.py -k kaggle`."""

import csv
import os
from collections.abc import Sequence
from pathlib import Path

from data.write_shards.folder import list_class_folders, list_images, read_files, subfolders
from data.write_shards.source import Entry, Listing, Source, check_classes, unique_keys
from repghost.errors import UserError


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
    classes = subfolders(images / "train")
    check_classes(images / "train", classes)
    train = list_class_folders("train", images / "train", classes)
    return Listing(tuple(classes), (train, _list_val(images / "val", solution, classes)))


def _list_val(folder: Path, solution: Path, classes: Sequence[str]) -> Source:
    label_of = {wnid: label for label, wnid in enumerate(classes)}
    wnid_of = _read_solution(solution)
    entries: list[Entry] = []
    images, ignored = list_images(folder)
    for path, size in images:
        name = os.path.basename(path)
        wnid = wnid_of.pop(os.path.splitext(name)[0], None)
        if wnid is None:
            raise UserError(f"{path}: {solution} has no row for this image")
        if wnid not in label_of:
            raise UserError(f"{solution}: {name} has the class {wnid}, which is not in train")
        entries.append(Entry(name, path, label_of[wnid], size))
    if wnid_of:
        raise UserError(f"{folder}: {next(iter(wnid_of))} is missing ({len(wnid_of)} images that {solution} lists)")
    return Source("val", unique_keys(entries), read_files, ignored)


def _read_solution(path: Path) -> dict[str, str]:
    """{image id: WordNet id}; a row is "n01751748 111 108 230 366 ...": the class, then boxes."""
    with open(path, newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        if not {"ImageId", "PredictionString"} <= set(reader.fieldnames or ()):
            raise UserError(f"{path}: no columns ImageId and PredictionString")
        return {row["ImageId"]: row["PredictionString"].partition(" ")[0] for row in reader}
