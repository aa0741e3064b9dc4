"""Parquet files as on the Hugging Face hub. Check: `pytest tests/test_write_shards.py -k parquet`."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from data.parallel import check_stop
from data.write_shards.source import SPLITS, Entry, Listing, Source, check_classes, unique_keys
from repghost.errors import UserError

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq


def list_parquet(root: str | Path) -> Listing:
    """A copy of a data set's repository on the Hugging Face hub.

    SRC holds data/train-*.parquet and data/validation-*.parquet (or val-*) with the columns image and label. Row groups
    are shuffled, then the images of each shard, instead of all images at once. Class names come from the metadata that
    Hugging Face's datasets library writes; without it they are the label numbers.
    """
    root = Path(root)
    if not root.is_dir():
        raise UserError(f"{root}: no such folder")
    folder = root / "data" if (root / "data").is_dir() else root
    files = {split: sorted(map(str, folder.glob(f"{split}*.parquet"))) for split in SPLITS}  # "validation-" too
    for split in SPLITS:
        if not files[split]:
            raise UserError(f"{folder}: no {split}*.parquet in it")
    with _open_parquet(files["train"][0]) as file:
        named = _class_names(file.schema_arrow)
    train, val = (_list_split(split, files[split]) for split in SPLITS)
    classes = named or tuple(str(label) for label in range(max(entry.label for entry in train.entries) + 1))
    check_classes(folder, classes)
    for entry in (*train.entries, *val.entries):
        if entry.label >= len(classes):
            raise UserError(f"{entry.file}: label {entry.label}, but there are {len(classes)} classes")
    return Listing(classes, (train, val))


def _class_names(schema: "pa.Schema") -> tuple[str, ...] | None:
    try:
        return tuple(json.loads(schema.metadata[b"huggingface"])["info"]["features"]["label"]["names"])
    except (KeyError, TypeError, ValueError):  # written by another program, or without names
        return None


def _list_split(split: str, files: Sequence[str]) -> Source:
    entries: list[Entry] = []
    groups = 0
    for path in files:
        row = 0
        with _open_parquet(path) as file:
            columns = _columns_of_labels(path, file.schema_arrow)
            for group in range(file.num_row_groups):
                for record in file.read_row_group(group, columns=columns).to_pylist():
                    label, image = record["label"], record.get("image") or {}
                    if not isinstance(label, int) or label < 0:
                        raise UserError(f"{path}: the label of row {row} is {label}, not a class number")
                    name = PurePosixPath(image.get("path") or f"{Path(path).stem}_{row:06d}").name
                    entries.append(Entry(name, path, label, offset=row, group=groups + group))
                    row += 1
            groups += file.num_row_groups
    if not entries:
        raise UserError(f"{files[0]}: no rows")
    return Source(split, unique_keys(entries), read_rows, shuffle="row-groups")


def _columns_of_labels(path: str, schema: "pa.Schema") -> list[str]:
    """The label and, where it is stored, the image's file name. Raises UserError unless images are bytes."""
    import pyarrow as pa

    if not {"image", "label"} <= set(schema.names):
        raise UserError(f"{path}: has the columns {', '.join(schema.names)}; image and label are needed")
    image = schema.field("image").type
    if pa.types.is_struct(image) and image.get_field_index("bytes") >= 0:
        return ["label", "image.path"] if image.get_field_index("path") >= 0 else ["label"]
    if pa.types.is_binary(image) or pa.types.is_large_binary(image):
        return ["label"]
    raise UserError(f"{path}: the column image is {image}, neither bytes nor a struct of them")


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
def _open_parquet(path: str) -> Iterator["pq.ParquetFile"]:
    """Opens a Parquet file; damage, also in what is read from it later, is a UserError."""
    import pyarrow as pa  # slow to import, and only this layout needs it
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            yield file
    except pa.ArrowException as error:
        raise UserError(f"{path}: damaged or not Parquet ({' '.join(str(error).split())}): copy it again") from None
