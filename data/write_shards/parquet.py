"""Parquet files as on the Hugging Face hub. Check: `pytest tests/test_write_shards.py -k parquet`."""

import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data.parallel import check_stop
from data.shards import numbered_classes
from data.write_shards.source import SPLITS, Entry, Listing, Source, unique_keys
from repghost.errors import UserError
from repghost.files import regular_file


def list_parquet(root: str | Path) -> Listing:
    """A copy of a data set's repository on the Hugging Face hub.

    SRC holds data/train-*.parquet and data/validation-*.parquet (or val-*) with the columns image and label. Row groups
    are shuffled, then the images of each shard, instead of all images at once. Class names come from the metadata that
    Hugging Face's datasets library writes; without it they are the label numbers.
    """
    folder = Path(root) / "data" if (Path(root) / "data").is_dir() else Path(root)
    train, val = (_list_split(split, folder) for split in SPLITS)
    with _open_parquet(train.entries[0].file) as file:
        classes = _class_names(file.schema_arrow)
    if classes is None:
        print(f"{train.entries[0].file}: no class names in its metadata, so the classes are numbers", file=sys.stderr)
        classes = numbered_classes(np.array([entry.label for entry in train.entries]), folder)
    for entry in (*train.entries, *val.entries):
        if entry.label >= len(classes):
            raise UserError(f"{entry.file}: label {entry.label}, but there are {len(classes)} classes")
    return Listing(folder, classes, [train, val])


def _class_names(schema: pa.Schema) -> list[str] | None:
    """None where there are none, or none that classes can have."""
    try:
        names = json.loads(schema.metadata[b"huggingface"])["info"]["features"]["label"]["names"]
    except (KeyError, TypeError, ValueError, RecursionError):  # written by another program, or without names
        return None
    usable = isinstance(names, list) and all(isinstance(name, str) for name in names)
    return names if usable and len(set(names)) == len(names) else None


def _list_split(split: str, folder: Path) -> Source:
    entries: list[Entry] = []
    groups = 0
    for path in sorted(map(str, folder.glob(f"{split}*.parquet"))):  # "validation-" too
        if not os.path.isfile(path):
            raise UserError(f"{path}: not a regular file")
        row = 0
        with _open_parquet(path) as file:
            if not {"image", "label"} <= set(names := file.schema_arrow.names):
                raise UserError(f"{path}: has the columns {', '.join(names)}; image and label are needed")
            if not _holds_bytes(file):
                what = "its images are paths or nothing, not the bytes of image files"
                raise UserError(f"{path}: {what}: export the data set with the images embedded")
            for group in range(file.num_row_groups):
                # The file names of the images where they are stored; pyarrow ignores a column that is not there.
                for record in file.read_row_group(group, columns=["label", "image.path"]).to_pylist():
                    label, image = record["label"], record.get("image") or {}
                    if not isinstance(label, int) or label < 0:
                        raise UserError(f"{path}: the label of row {row} is {label}, not a class number")
                    name = PurePosixPath(image.get("path") or f"{Path(path).stem}_{row:06d}").name
                    entries.append(Entry(name, path, label, offset=row, group=groups + group))
                    row += 1
            groups += file.num_row_groups
    if not entries:
        raise UserError(f"{folder}: no {split}*.parquet in it that has rows")
    return Source(split, unique_keys(entries), read_rows, shuffle="row-groups")


def _holds_bytes(file: pq.ParquetFile) -> bool:
    """Whether the column image is made of bytes, or of records with bytes, that are not all missing."""
    kind = file.schema_arrow.field("image").type
    path = "image"
    if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
        kind, path = kind.field("bytes").type, "image.bytes"
    if not (pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_fixed_size_binary(kind)):
        return False
    for group in map(file.metadata.row_group, range(file.num_row_groups)):
        for column in map(group.column, range(group.num_columns)):
            if column.path_in_schema == path:
                known = column.statistics is not None and column.statistics.has_null_count
                if not known or column.statistics.null_count < group.num_rows:
                    return True
    return not file.metadata.num_rows  # a file without rows is none of the kind


def read_rows(entries: Sequence[Entry]) -> Iterator[bytes]:
    """The bytes of images in Parquet files. All are held in memory, so that each row group is read only once."""
    found: dict[tuple[str, int | None], bytes] = {}
    for path in {entry.file for entry in entries}:
        wanted = {entry.offset for entry in entries if entry.file == path}
        row = 0
        with _open_parquet(path) as file:
            for group in range(file.num_row_groups):
                check_stop()
                rows = range(row, row + file.metadata.row_group(group).num_rows)
                row = rows.stop
                if wanted.isdisjoint(rows):
                    continue
                batches = file.iter_batches(batch_size=64, row_groups=[group], columns=["image"])
                images = (image for batch in batches for image in batch.column("image"))
                for i, image in zip(rows, images, strict=True):
                    if i in wanted:
                        value = image.as_py()
                        found[path, i] = (value["bytes"] if isinstance(value, dict) else value) or b""
    yield from (found[entry.file, entry.offset] for entry in entries)


@contextmanager
def _open_parquet(path: str) -> Iterator[pq.ParquetFile]:
    """Opens a Parquet file; damage, also in what is read from it later, is a UserError."""
    regular_file(path)
    try:
        with pq.ParquetFile(path) as file:
            yield file
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        if getattr(error, "errno", None):  # the system's, which knows the file
            raise
        raise UserError(f"{path}: damaged or not Parquet ({' '.join(str(error).split())}): copy it again") from None
