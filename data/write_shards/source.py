"""What every layout tells before a shard is written: where the images of each split lie, and their labels.

Labels follow the sorted class names (sorted WordNet ids for ImageNet), as in torchvision and timm; Parquet files state
their own. Check: `pytest tests/test_write_shards.py`.
"""

import hashlib
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from isal.isal_zlib import crc32

from repghost.errors import UserError

SPLITS = ("train", "val")
IMAGES_PER_SHARD = 1252  # ImageNet: 1,024 training shards of about 137 MB and 40 for validation


class Entry(NamedTuple):
    """One image: all of `file`, or, with an offset, a part of it. As a string it is the image's name in a message."""

    key: str  # in the shard; the image's file name before `unique_keys`
    file: str
    label: int
    size: int = 0  # bytes; not known in Parquet files
    offset: int | None = None  # the first byte in an archive, the row in a Parquet file
    group: int = 0  # of rows, counted over all Parquet files of the split; the number of a shard
    crc32: int | None = None  # of the bytes, where it is known
    annotations: bytes = b""  # JSON that is stored instead of the label; for detection

    def __str__(self) -> str:
        return self.file if self.offset is None else f"{self.file}: {self.key}"


@dataclass(frozen=True)
class Source:
    """All images of one split in a fixed order, with unique keys.

    read: yields the bytes of the given images in their order. Worker processes call it, so it is a module's function.
    ignored: files that are not images by their extension. shuffle: "global"; "row-groups" where images cannot be read
    one by one (see `data.write_shards.write`); "kept" for shards, whose images stay in their order and in their shard.
    remarks: what else was left out.
    """

    split: str
    entries: list[Entry]
    read: Callable[[Sequence[Entry]], Iterator[bytes]]
    ignored: int = 0
    shuffle: str = "global"
    remarks: Sequence[str] = ()

    def digest(self) -> str:
        """Hex digest of what decides the order and the labels, wherever the files lie."""
        digest = hashlib.sha256("\n".join(entry.key for entry in self.entries).encode())
        digest.update(np.array([entry.label for entry in self.entries], "<i8").tobytes())
        digest.update(np.array([entry.group for entry in self.entries], "<i8").tobytes())
        for entry in self.entries:
            digest.update(entry.annotations)
        return digest.hexdigest()


@dataclass(frozen=True)
class Listing:
    """A data set before it is written: where it lies, class names in label order, and a source for each split.

    written: of shards, the options that they were written with, as far as they are known. category_ids: COCO's id of
    each class, for detection; its images have annotations and no label. Raises UserError for a single class where
    images have labels, and for two of one name.
    """

    root: str | Path
    classes: list[str]
    sources: list[Source]
    written: dict[str, Any] = field(default_factory=dict)
    category_ids: Sequence[int] = ()

    def __post_init__(self) -> None:
        if len(self.classes) < 2 and not self.category_ids:
            raise UserError(f"{self.root}: only one class ({''.join(self.classes)}), so there is nothing to learn")
        if twice := [name for name, count in Counter(self.classes).items() if count > 1]:
            raise UserError(f"{self.root}: several classes are called {twice[0]}: give them names that differ")


def read_parts(entries: Sequence[Entry]) -> Iterator[bytes]:
    """The bytes of images that are parts of one file, and need not be near each other.

    Raises UserError for one that is not what was indexed, where its checksum is known.
    """
    with open(entries[0].file, "rb") as file:
        if hasattr(os, "posix_fadvise"):  # lets the disk sort the scattered reads
            for entry in entries:
                os.posix_fadvise(file.fileno(), entry.offset or 0, entry.size, os.POSIX_FADV_WILLNEED)
        for entry in entries:
            content = os.pread(file.fileno(), entry.size, entry.offset or 0)
            if entry.crc32 is not None and crc32(content) != entry.crc32:
                raise UserError(f"{entry}: its bytes changed since it was indexed (checksum differs): copy it again")
            yield content


def with_class(class_name: str, path: str) -> str:
    """ "n01440764_10026.JPEG" stays itself in class n01440764; 1.jpg in class cat becomes "cat_1.jpg"."""
    return path if path.startswith(f"{class_name}_") else f"{class_name}_{path}"


def unique_keys(entries: Sequence[Entry]) -> list[Entry]:
    """The entries with keys in place of names: "cat/a.b.jpg" becomes "cat_a_b", since a key ends at the first dot.

    Names that differ only in their extension keep it ("cat_a_b_png"); those that still collide are numbered.
    """
    parts = [os.path.splitext(entry.key) for entry in entries]
    stems = [re.sub(r"[^\w-]", "_", stem) for stem, _ in parts]
    count = Counter(stems)
    keys: dict[str, Entry] = {}
    for entry, stem, (_, extension) in zip(entries, stems, parts, strict=True):
        key = base = stem + (f"_{extension[1:].lower()}" if count[stem] > 1 else "")
        number = 2
        while key in keys:
            key, number = f"{base}_{number}", number + 1
        keys[key] = entry._replace(key=key)
    return list(keys.values())
