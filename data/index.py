"""The images of a split as an array: shard, offset, bytes, height, width, checksum and label of every sample.

A shard is an ordinary webdataset tar (members KEY.jpg and KEY.cls). `load_indexes` reads what
`data.write_shards` wrote beside the shards and checks it against manifest.json; shards of others are scanned once
and their index is kept in the cache folder. Nothing here extracts a file.

    python -m data.index SHARDS                 what is in there
    python -m data.index SHARDS --verify        read, checksum and decode every image

Check: `pytest tests/test_index.py`.
"""

import argparse
import hashlib
import json
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from data.arguments import whole_number
from data.shards import (
    MANIFEST,
    SPLIT_NAMES,
    find_shards,
    load_manifest,
    numbered_classes,
    prepared_split,
    require_disjoint,
    scanned_samples,
    verify,
)
from data.tars import member_name, member_names
from repghost.errors import UserError, run_command
from repghost.files import read_class_names
from repghost.machine import available_cpus

BY_NAME: Mapping[str, str | None] = dict.fromkeys(SPLIT_NAMES)  # no pattern for any split


@dataclass(frozen=True)
class Index:
    """The samples of one split. `samples`: [N] of SAMPLE, in the order of the shards and of their members."""

    split: str
    shards: tuple[str, ...]
    samples: np.ndarray
    classes: tuple[str, ...]
    category_ids: tuple[int, ...] = ()  # COCO's id of each class, where the split is for detection; labels are -1 then

    def __len__(self) -> int:
        return len(self.samples)

    def name(self, i: int) -> str:
        """Sample i for a message: "train-000003.tar: n01440764_10026.jpg"."""
        shard = self.shards[self.samples[i]["shard"]]
        return f"{Path(shard).name}: {member_name(member_names(shard), int(self.samples[i]['offset']))}"

    def keys(self) -> list[str]:
        """The key (member name without extension) of every image. Reads all tar headers."""
        names = [member_names(shard) for shard in self.shards]
        try:
            return [names[s["shard"]][int(s["offset"])].rpartition(".")[0] for s in self.samples]
        except KeyError as error:
            raise UserError(f"{self.split}: no tar header before byte {error} of a shard: copy it again") from None

    @cached_property
    def fingerprint(self) -> str:
        """Hex digest of the samples and the class names: tells data sets apart, wherever they lie."""
        digest = hashlib.sha256(json.dumps(self.classes).encode())
        digest.update(np.ascontiguousarray(self.samples).view(np.uint8).data)
        return digest.hexdigest()


def load_index(
    root: str | Path, split: str, cache: str | Path, pattern: str | None = None, class_names: str | Path | None = None
) -> Index:
    """`load_indexes` of one split ("train" or "val"); with a `pattern` the other one has no say in the classes."""
    return load_indexes(root, [split], cache, {split: pattern} if pattern else BY_NAME, class_names)[split]


def load_indexes(
    root: str | Path,
    splits: Sequence[str],
    cache: str | Path,
    patterns: Mapping[str, str | None] = BY_NAME,
    class_names: str | Path | None = None,
) -> dict[str, Index]:
    """The indexes of `splits` of the data set in `root`, each with the classes of the whole data set.

    patterns: for every split that there may be, a glob of its shards or webdataset's {0000..1023}, relative to `root`;
    None leaves it to a manifest.json in `root`, or else to the names of the shards (`find_shards`). Shards without a
    manifest are scanned on first use into `cache` while other processes wait. class_names: a text file with a name on
    each line. Without it the manifest has the names, or else the classes are the numbers up to the largest label of all
    splits. Raises UserError for whatever is missing, damaged or does not fit, and OSError for what cannot be read.
    """
    root, cache = Path(root).expanduser(), Path(cache).expanduser()  # they may come from a file, not a shell
    if not root.is_dir():
        raise UserError(f"{root}: no such folder: set data.root to the folder that holds the shards")
    manifest = None
    if None in patterns.values():
        manifest = load_manifest(root) if (root / MANIFEST).exists() else None
        if manifest is None and (root / "parts" / "plan.json").exists():
            raise UserError(f"{root}: its shards are unfinished: run the same python -m data.write_shards again")
    found: dict[str, tuple[tuple[str, ...], np.ndarray]] = {}
    others: dict[str, tuple[str, ...]] = {}
    for split, pattern in patterns.items():
        if manifest and pattern is None:
            if split in splits:
                found[split] = prepared_split(root, manifest, split)
        elif split in splits:
            others[split] = find_shards(root, split, pattern)
        elif manifest is None and class_names is None:
            with suppress(UserError):  # it counts for the classes, where it is there
                others[split] = find_shards(root, split, pattern)
    if len(splits) > 1 or patterns[splits[0]] is None:  # what is evaluated alone may well be what was trained on
        require_disjoint({split: shards for split, (shards, _) in found.items()} | others)
    found |= {split: (shards, scanned_samples(shards, cache)) for split, shards in others.items()}
    if class_names is not None:
        classes = read_class_names(Path(class_names))
    elif manifest:
        classes = manifest["classes"]
    else:
        classes = numbered_classes(np.concatenate([samples["label"] for _, samples in found.values()]), root)
    category_ids = tuple(manifest.get("category_ids", ())) if manifest else ()
    indexes = {split: Index(split, *found[split], tuple(classes), category_ids) for split in splits}
    for index in indexes.values():
        labels = index.samples["label"]
        wrong = labels != -1 if category_ids else (labels < 0) | (labels >= len(classes))
        if wrong.any():
            i = int(wrong.argmax())
            raise UserError(f"{index.name(i)}: label {labels[i]}, but there are {len(classes)} class names")
    return indexes


def _summary(index: Index) -> str:
    rows = index.samples
    opened = rows[rows["height"] > 0]
    sides = np.stack([opened["width"], opened["height"]])
    width, height = np.median(sides, axis=1)
    return (
        f"{index.split}: {len(index):,} images in {len(index.shards):,} shards, "
        f"{len(index.classes):,} classes, {rows['size'].sum(dtype=np.int64) / 1e9:,.3f} GB\n"
        f"  median image {np.median(rows['size']) / 1e3:,.1f} kB, {width:.0f} x {height:.0f} pixels; "
        f"sides from {sides.min()} to {sides.max()} pixels"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code: 0 no damage, 1 damage found, 2 a mistake of the user, 130 interrupted."""
    parser = argparse.ArgumentParser(prog="python -m data.index", description="What is in a folder of shards.")
    add = parser.add_argument
    add("root", type=Path, help="folder of shards")
    add("--split", choices=[*SPLIT_NAMES], help="this split only (default: both)")
    add("--pattern", help="shards of others: glob or name-{0000..0063}.tar, with --split")
    add("--class-names", type=Path, help="text file with a class name on each line")
    add("--cache", type=Path, default=Path("~/.cache/repghost"), help="for indexes of others' shards (%(default)s)")
    add("--verify", action="store_true", help="read, checksum and decode every image")
    add("--workers", type=whole_number(1), default=available_cpus(), help="processes for --verify (%(default)s)")
    options = parser.parse_args(arguments)
    if options.pattern and not options.split:
        parser.error("--pattern needs --split")
    return run_command(lambda: _show(options))


def _show(options: argparse.Namespace) -> int:
    root = options.root.expanduser()
    prepared = options.pattern is None and (root / MANIFEST).exists()
    described = load_manifest(root)["splits"] if prepared else {}
    splits = (
        [options.split] if options.split else [split for split in SPLIT_NAMES if split in described or not prepared]
    )
    patterns = {options.split: options.pattern} if options.pattern else BY_NAME
    damaged: list[str] = []
    for split, index in load_indexes(root, splits, options.cache, patterns, options.class_names).items():
        print(_summary(index))
        if options.verify:
            entries = described[split]["shards"] if prepared else [{}] * len(index.shards)
            checksums = [entry.get("sha256") for entry in entries]
            damaged += verify(index.shards, index.samples, checksums, options.workers)
    if options.verify:
        print(*damaged, f"{len(damaged)} damaged" if damaged else "no damaged images", sep="\n")
    return 1 if damaged else 0


if __name__ == "__main__":
    sys.exit(main())
