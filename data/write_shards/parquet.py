"""Parquet files as on the Hugging Face hub. Check: `pytest tests/test_write_shards.py -k parquet`."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

import pyarrow as pa
import pyarrow.parquet as pq

from data.parallel import check_stop
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
    classes = classes or [str(label) for label in range(max(entry.label for entry in train.entries) + 1)]
    for entry in (*train.entries, *val.entries):
        if entry.label >= len(classes):
            raise UserError(f"{entry.file}: label {entry.label}, but there are {len(classes)} classes")
    return Listing(folder, classes, [train, val])


def _class_names(schema: pa.Schema) -> list[str] | None:
    try:
        return list(json.loads(schema.metadata[b"huggingface"])["info"]["features"]["label"]["names"])
    except (KeyError, TypeError, ValueError):  # written by another program, or without names
        return None


def _list_split(split: str, folder: Path) -> Source:
    entries: list[Entry] = []
    groups = 0
    for path in sorted(map(str, folder.glob(f"{split}*.parquet"))):  # "validation-" too
        row = 0
        with _open_parquet(path) as file:
            if not {"image", "label"} <= set(names := file.schema_arrow.names):
                raise UserError(f"{path}: has the columns {', '.join(names)}; image and label are needed")
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
    except pa.ArrowException as error:
        raise UserError(f"{path}: damaged or not Parquet ({' '.join(str(error).split())}): copy it again") from None
