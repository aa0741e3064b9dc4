"""Parquet files as on the Hugging Face hub."""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from data.write_shards.source import SPLITS, Listing, Source, _check_classes, _source
from repghost.errors import UserError


def list_parquet(root: str | Path) -> Listing:
    """The hub's layout: data/train-*.parquet, data/validation-*.parquet with the columns image and label."""
    root = Path(root)
    if not root.is_dir():
        raise UserError(f"{root}: no such folder")
    folder = root / "data" if (root / "data").is_dir() else root
    files = {split: sorted(map(str, folder.glob(f"{split}*.parquet"))) for split in SPLITS}  # "validation-" too
    for split in SPLITS:
        if not files[split]:
            raise UserError(f"{folder}: no {split}*.parquet in it")
    named = _parquet_class_names(root, files["train"][0])
    sources = tuple(_list_parquet_files(split, files[split]) for split in SPLITS)
    highest = int(sources[0].table["label"].max())
    classes = named or tuple(str(label) for label in range(highest + 1))
    _check_classes(folder, classes)
    for source in sources:
        i = int(source.table["label"].argmax())
        if source.table["label"][i] >= len(classes):
            path = source.files[source.table["file"][i]]
            raise UserError(f"{path}: label {source.table['label'][i]}, but there are {len(classes)} classes")
    return Listing(classes, sources)


def _list_parquet_files(split: str, files: list[str]) -> Source:
    rows: list[tuple[int, ...]] = []
    names: list[str] = []
    groups = 0
    for number, path in enumerate(files):
        with open_parquet(path) as file:
            has_paths = _image_has_paths(path, file.schema_arrow)
            row = 0
            for group in range(file.num_row_groups):
                columns = file.read_row_group(group, columns=["label", "image.path"] if has_paths else ["label"])
                labels = columns["label"].to_pylist()
                images = columns["image"].to_pylist() if has_paths else [{"path": None}] * len(labels)
                for label, image in zip(labels, images, strict=True):
                    if not isinstance(label, int) or label < 0:
                        raise UserError(f"{path}: the label of row {row} is {label}, not a class number")
                    rows.append((number, row, 0, label, groups))
                    names.append(_row_name(path, row, image["path"]))
                    row += 1
                groups += 1
    if not rows:
        raise UserError(f"{files[0]}: no rows")
    return _source(split, "parquet", files, rows, names)


def _row_name(path: str, row: int, image_path: str | None) -> str:
    return PurePosixPath(image_path).name if image_path else f"{Path(path).stem}_{row:06d}"


def _image_has_paths(path: str, schema: Any) -> bool:
    import pyarrow as pa

    if not {"image", "label"} <= set(schema.names):
        raise UserError(f"{path}: has the columns {', '.join(schema.names)}; image and label are needed")
    image = schema.field("image").type
    if pa.types.is_struct(image) and image.get_field_index("bytes") >= 0:
        return image.get_field_index("path") >= 0
    if pa.types.is_binary(image) or pa.types.is_large_binary(image):
        return False
    raise UserError(f"{path}: the column image is {image}, neither bytes nor a struct of them")


@contextmanager
def open_parquet(path: str) -> Iterator[Any]:
    """A pyarrow.parquet.ParquetFile; damaged files are a UserError."""
    import pyarrow as pa  # slow to import, and only this layout needs it
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            yield file
    except pa.ArrowException as error:
        raise UserError(f"{path}: damaged or not Parquet ({' '.join(str(error).split())}): copy it again") from None


def _parquet_class_names(root: Path, path: str) -> tuple[str, ...] | None:
    """Names of the ClassLabel `label`: from the file's metadata, dataset_info.json or the data set's card."""
    with open_parquet(path) as file:
        metadata = file.schema_arrow.metadata or {}
    places = []
    if b"huggingface" in metadata:
        places.append(json.loads(metadata[b"huggingface"]).get("info", {}))
    if (root / "dataset_info.json").exists():
        info = json.loads((root / "dataset_info.json").read_text(encoding="utf-8"))
        places += [info, *(config for config in info.values() if isinstance(config, dict))]
    if (root / "README.md").exists():
        front_matter = re.match(r"---\n(.*?)\n---", (root / "README.md").read_text(encoding="utf-8"), re.DOTALL)
        info = (yaml.safe_load(front_matter[1]) or {}).get("dataset_info", {}) if front_matter else {}
        places += info if isinstance(info, list) else [info]
    for place in places:
        names = _class_label_names(place.get("features"))
        if names is not None:
            return names
    return None


def _class_label_names(features: Any) -> tuple[str, ...] | None:
    """The names in either form of `features`: {"label": {"names": [...]}}, or the list of a card."""
    if isinstance(features, dict):
        names = (features.get("label") or {}).get("names")
        return tuple(names) if names else None
    for feature in features or []:
        if feature.get("name") == "label" and isinstance(feature.get("dtype"), dict):
            names = feature["dtype"].get("class_label", {}).get("names", {})
            return tuple(names[number] for number in sorted(names, key=int)) or None
    return None
