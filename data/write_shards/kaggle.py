"""The tree of Kaggle's ImageNet Object Localization Challenge."""

import csv
import os
from collections.abc import Sequence
from pathlib import Path

from data.write_shards.folder import _list_class_folders, _subfolders, _walk
from data.write_shards.source import Listing, Source, _check_classes, _is_image, _source
from repghost.errors import UserError


def list_kaggle(root: str | Path) -> Listing:
    """Kaggle's tree: ILSVRC/Data/CLS-LOC/{train/WNID,val} and LOC_val_solution.csv beside ILSVRC."""
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
    _check_classes(images / "train", classes)
    train = _list_class_folders("train", images / "train", classes, classes)
    return Listing(tuple(classes), (train, _list_kaggle_val(images / "val", solution, classes)))


def _list_kaggle_val(folder: Path, solution: Path, classes: Sequence[str]) -> Source:
    label_of = {wnid: label for label, wnid in enumerate(classes)}
    with open(solution, newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        if not {"ImageId", "PredictionString"} <= set(reader.fieldnames or ()):
            raise UserError(f"{solution}: no columns ImageId and PredictionString")
        # "n01751748 111 108 230 366 ...": the class, then boxes.
        wnid_of = {row["ImageId"]: row["PredictionString"].partition(" ")[0] for row in reader}
    files: list[str] = []
    rows: list[tuple[int, ...]] = []
    ignored = 0
    for path, size in _walk(folder):
        name = os.path.basename(path)
        if not _is_image(name):
            ignored += 1
            continue
        wnid = wnid_of.pop(os.path.splitext(name)[0], None)
        if wnid is None:
            raise UserError(f"{path}: {solution} has no row for this image")
        if wnid not in label_of:
            raise UserError(f"{solution}: {name} has the class {wnid}, which is not in train")
        rows.append((len(files), 0, size, label_of[wnid], 0))
        files.append(path)
    if wnid_of:
        raise UserError(f"{folder}: {next(iter(wnid_of))} is missing ({len(wnid_of)} images that {solution} lists)")
    return _source("val", "file", files, rows, [os.path.basename(path) for path in files], ignored)
