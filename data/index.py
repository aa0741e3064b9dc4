"""A folder of shards as arrays: shard, offset, bytes, height, width, checksum and label of every sample.

A shard is an ordinary webdataset tar (members KEY.jpg and KEY.cls). `load_index` reads the index that
`data.write_shards` wrote beside the shards and checks it against manifest.json; shards of others are scanned
once and their index is kept in the cache folder. Nothing here extracts a file.

    python -m data.index SHARDS                 what is in there
    python -m data.index SHARDS --verify        read, checksum and decode every image

Check: `pytest tests/test_index.py`.
"""

import argparse
import glob
import hashlib
import json
import os
import stat
import sys
import tarfile
import zlib
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from braceexpand import braceexpand
from filelock import FileLock
from tqdm import tqdm

from data.parallel import available_cpus, check_stop, run_parallel
from data.tars import SAMPLE, DecodeError, member_name, open_image, printable, scan_shard
from repghost.errors import UserError, run_command
from repghost.files import atomic_write, file_sha256

FORMAT = 1
DEFAULT_PATTERNS = {"train": ("*train*.tar", "train/*.tar"), "val": ("*val*.tar", "val/*.tar")}


@dataclass(frozen=True)
class Index:
    """The samples of one split. `samples`: [N] of SAMPLE, in the order of the shards and of their members."""

    split: str
    shards: tuple[str, ...]
    samples: np.ndarray
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.samples)

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    def name(self, i: int) -> str:
        """Sample i for a message: "train-000003.tar: n01440764_10026.jpg"."""
        row = self.samples[i]
        shard = self.shards[row["shard"]]
        return f"{Path(shard).name}: {member_name(shard, int(row['offset']))}"

    def keys(self) -> list[str]:
        """The key (member name without extension) of every image. Reads all tar headers."""
        keys: dict[tuple[int, int], str] = {}
        for number, shard in enumerate(self.shards):
            with tarfile.open(shard, "r:") as tar:
                keys |= {(number, m.offset_data): m.name.rpartition(".")[0] for m in tar}
        return [keys[int(row["shard"]), int(row["offset"])] for row in self.samples]

    @cached_property
    def fingerprint(self) -> str:
        """Hex digest of the samples and the class names: tells data sets apart, wherever they lie."""
        digest = hashlib.sha256(json.dumps(self.classes).encode())
        digest.update(np.ascontiguousarray(self.samples).view(np.uint8).data)
        return digest.hexdigest()


def load_index(
    root: str | Path,
    split: str,
    cache: str | Path,
    pattern: str | None = None,
    class_names: str | Path | None = None,
) -> Index:
    """The index of one split ("train" or "val") of the shards in `root`.

    Without `pattern`, a manifest.json in `root` decides. Otherwise the shards are those of `pattern` (a glob,
    or webdataset's {0000..1023}; relative to `root`) or of DEFAULT_PATTERNS, scanned on first use into
    `cache` while other processes wait. `class_names` is a text file with a name on each line; without it
    names come from the manifest or are the label numbers. Raises UserError for whatever is missing, damaged,
    unreadable or does not fit.
    """
    root, cache = Path(root).expanduser(), Path(cache).expanduser()  # they may come from a file, not a shell
    try:
        return _load_index(root, split, cache, pattern, class_names)
    except OSError as error:
        raise UserError(f"{error.filename or root}: {error.strerror or error}") from None


def _load_index(root: Path, split: str, cache: Path, pattern: str | None, class_names: str | Path | None) -> Index:
    if not root.is_dir():
        raise UserError(f"{root}: no such folder: set data.root to the folder that holds the shards")
    classes: tuple[str, ...] | None = None
    if pattern is None and (root / "manifest.json").exists():
        manifest = load_manifest(root)
        shards, samples = _prepared(root, manifest, split)
        classes = tuple(manifest["classes"])
    else:
        shards = find_shards(root, split, pattern)
        samples = _scanned(shards, cache)
    if class_names is not None:
        classes = _read_class_names(Path(class_names).expanduser())
    if classes is None:
        classes = tuple(str(label) for label in range(int(samples["label"].max()) + 1))
    index = Index(split, shards, samples, classes)
    wrong = (samples["label"] < 0) | (samples["label"] >= len(classes))
    if wrong.any():
        i = int(wrong.argmax())
        raise UserError(f"{index.name(i)}: label {samples[i]['label']}, but there are {len(classes)} class names")
    return index


def _read_class_names(path: Path) -> tuple[str, ...]:
    try:
        return tuple(path.read_text(encoding="utf-8").splitlines())
    except UnicodeDecodeError:
        raise UserError(f"{path}: not UTF-8 text with a class name on each line") from None


def load_manifest(root: Path) -> dict[str, Any]:
    """manifest.json of a folder that data.write_shards wrote."""
    path = root / "manifest.json"
    return parse_manifest(path.read_bytes(), path)


def parse_manifest(content: bytes, where: object) -> dict[str, Any]:
    """The manifest in `content`, which came from `where`. What the readers use of it is there and of its type."""
    try:
        manifest = json.loads(content)
        if manifest["format"] != FORMAT:
            raise ValueError(f"its format is {str(manifest['format'])[:20]}")
        _expect(manifest, classes=list, splits=dict)
        for entry in manifest["splits"].values():
            _expect(entry, index=dict, shards=list)
            _expect(entry["index"], file=str, sha256=str)
            for shard in entry["shards"]:
                _expect(shard, file=str, bytes=int)
                if shard["bytes"] < 0:
                    raise ValueError(f"{shard['file']} has {shard['bytes']} bytes")
            for name in (entry["index"]["file"], *(shard["file"] for shard in entry["shards"])):
                if name != os.path.basename(name) or name in ("", ".", ".."):  # nothing may lead out of the folder
                    raise ValueError(f"{name!r} is not the name of a file in its folder")
    except (ValueError, TypeError, AttributeError, RecursionError, KeyError) as error:
        reason = f"no key {error}" if isinstance(error, KeyError) else str(error)
        raise UserError(
            f"{where}: not a manifest of format {FORMAT} ({reason}): copy it again or write the shards again"
        ) from None
    return manifest


def _expect(value: dict[str, Any], **types: type) -> None:
    for key, kind in types.items():
        if not isinstance(value[key], kind):
            raise TypeError(f"its {key} is no {kind.__name__}")


def split_entry(manifest: dict[str, Any], split: str, where: object) -> dict[str, Any]:
    """What the manifest that came from `where` says of one split."""
    if split not in manifest["splits"]:
        raise UserError(f"{where}: no split {split}, only {', '.join(manifest['splits'])}")
    return manifest["splits"][split]


def _prepared(root: Path, manifest: dict[str, Any], split: str) -> tuple[tuple[str, ...], np.ndarray]:
    """Shards and samples as the manifest lists them, once they are known to be what it describes."""
    entry = split_entry(manifest, split, root / "manifest.json")
    for shard in entry["shards"]:
        path = root / shard["file"]
        if not path.exists():
            raise UserError(f"{path}: missing, but the manifest lists it: copy it again")
        if not path.is_file():
            raise UserError(f"{path}: not a regular file")
        if path.stat().st_size != shard["bytes"]:
            raise UserError(
                f"{path} has {path.stat().st_size} bytes, the manifest says {shard['bytes']}: copy it again"
            )
    path = root / entry["index"]["file"]
    if not path.exists():
        raise UserError(f"{path}: missing, but the manifest lists it: copy it again")
    if file_sha256(path) != entry["index"]["sha256"]:
        raise UserError(f"{path}: not the file that manifest.json describes: copy both again")
    rows = _read_rows(path, [shard["bytes"] for shard in entry["shards"]])
    if entry.get("images", len(rows)) != len(rows):
        raise UserError(f"{path}: {len(rows)} images, but manifest.json says {entry['images']}: copy both again")
    return tuple(str(root / shard["file"]) for shard in entry["shards"]), rows


def _read_rows(path: Path, sizes: Sequence[int]) -> np.ndarray:
    """[N] of SAMPLE from a file; each lies within its shard. `sizes`: bytes of the shards."""
    try:
        with open(path, "rb") as file:
            rows = np.lib.format.read_array(file)
    except ValueError as error:
        raise UserError(f"{path}: damaged ({printable(str(error))}): remove it and make it again") from None
    if rows.dtype != SAMPLE or rows.ndim != 1:
        raise UserError(f"{path}: not an index of this format, but {rows.ndim}-dimensional {rows.dtype}")
    if not len(rows):
        raise UserError(f"{path}: lists no images")
    if (rows["shard"] >= len(sizes)).any():
        raise UserError(f"{path}: names shard {rows['shard'].max()}, but there are {len(sizes)} shards")
    outside = (rows["offset"] < 0) | (rows["offset"] > np.array(sizes)[rows["shard"]] - rows["size"])
    for wrong, what in (
        (outside, "lies outside of its shard"),
        ((rows["height"] == 0) | (rows["width"] == 0), "has no pixels"),
    ):
        if wrong.any():
            raise UserError(f"{path}: image {wrong.argmax()} {what}: remove it and make it again")
    return rows


def find_shards(root: Path, split: str, pattern: str | None) -> tuple[str, ...]:
    """Paths of the shards of a split that has no manifest."""
    shards: list[str] = []
    for expanded in braceexpand(pattern) if pattern else DEFAULT_PATTERNS[split]:
        found = sorted(glob.glob(os.path.join(glob.escape(str(root)), expanded)))
        if pattern and not found:
            raise UserError(f"{root}: no shard matches {expanded} for the split {split}")
        shards += found
    if not shards:
        raise UserError(
            f"{root}: neither a manifest.json nor shards named {' or '.join(DEFAULT_PATTERNS[split])}: "
            f"prepare shards with python -m data.write_shards, or name yours with data.{split}"
        )
    return tuple(dict.fromkeys(shards))


def _scanned(shards: Sequence[str], cache: Path) -> np.ndarray:
    """The samples of shards without a manifest, from the cache or by scanning them."""
    stats = [os.stat(shard) for shard in shards]
    for shard, status in zip(shards, stats, strict=True):
        if not stat.S_ISREG(status.st_mode):
            raise UserError(f"{shard}: not a regular file")  # opening a pipe would wait for ever
    state = [(os.path.realpath(s), st.st_size, st.st_mtime_ns) for s, st in zip(shards, stats, strict=True)]
    path = cache / "index" / f"{hashlib.sha256(repr((FORMAT, state)).encode()).hexdigest()[:32]}.npy"
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_suffix(".lock")):
        if not path.exists():
            samples = _scan(shards)
            with atomic_write(path) as file:
                np.save(file, samples)
        return _read_rows(path, [status.st_size for status in stats])


def _scan(shards: Sequence[str]) -> np.ndarray:
    rows: list[np.ndarray] = [np.empty(0, SAMPLE)] * len(shards)
    shard_of: dict[str, int] = {}
    with closing(run_parallel(scan_shard, shards, min(available_cpus(), len(shards)))) as results:
        for number, (found, keys) in tqdm(results, total=len(shards), desc="indexing", unit="shard"):
            if not keys:
                raise UserError(f"{shards[number]}: holds no samples (KEY.jpg and KEY.cls)")
            for key in keys:
                if key in shard_of:
                    raise UserError(f"{shards[number]}: key {key} is also in {Path(shards[shard_of[key]]).name}")
                shard_of[key] = number
            found["shard"] = number
            rows[number] = found
    return np.concatenate(rows)


def verify(index: Index, checksums: Sequence[str | None] | None, workers: int) -> list[str]:
    """A line for each shard or image of `index` that is not what it was; [] if all are well.

    `checksums` are the sha256 of the shards, where a manifest has them.
    """
    bounds = np.searchsorted(index.samples["shard"], np.arange(len(index.shards) + 1))
    tasks = [
        (shard, index.samples[bounds[i] : bounds[i + 1]], checksums[i] if checksums else None)
        for i, shard in enumerate(index.shards)
    ]
    damaged: list[tuple[int, list[str]]] = []
    with (
        tqdm(total=len(index), desc=f"verifying {index.split}", unit="images") as bar,
        closing(run_parallel(_verify_shard, tasks, min(workers, len(tasks)))) as results,
    ):
        for number, lines in results:
            damaged.append((number, lines))
            bar.update(len(tasks[number][1]))
    return [line for _, lines in sorted(damaged) for line in lines]


def _verify_shard(task: tuple[str, np.ndarray, str | None]) -> list[str]:
    path, rows, checksum = task
    lines = []
    with open(path, "rb") as file:
        for row in rows:
            check_stop()
            data = os.pread(file.fileno(), int(row["size"]), int(row["offset"]))
            if zlib.crc32(data) != row["crc32"]:
                reason = "its bytes have changed (checksum)"
            else:
                try:
                    open_image(data, decode=True)
                    continue
                except DecodeError as error:
                    reason = str(error)
            lines.append(f"{path}: {member_name(path, int(row['offset']))}: {reason}")
    if checksum is not None and not lines and file_sha256(path) != checksum:
        lines.append(f"{path}: its labels or tar headers have changed (checksum): copy it again")
    return lines


def _summary(index: Index) -> str:
    rows = index.samples
    return (
        f"{index.split}: {len(index):,} images in {len(index.shards):,} shards, "
        f"{index.num_classes:,} classes, {rows['size'].sum(dtype=np.int64) / 1e9:,.3f} GB\n"
        f"  median image {np.median(rows['size']) / 1e3:,.1f} kB, "
        f"{np.median(rows['width']):.0f} x {np.median(rows['height']):.0f} pixels; "
        f"sides from {min(rows['width'].min(), rows['height'].min())} "
        f"to {max(rows['width'].max(), rows['height'].max())} pixels"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code: 0 all well, 1 damage found, 2 a mistake of the user, 130 interrupted."""
    parser = argparse.ArgumentParser(prog="python -m data.index", description="What is in a folder of shards.")
    parser.add_argument("root", type=Path, help="folder of shards")
    parser.add_argument("--split", choices=["train", "val"], help="this split only (default: both)")
    parser.add_argument("--pattern", help="shards of others: glob or name-{0000..0063}.tar, with --split")
    parser.add_argument("--class-names", type=Path, help="text file with a class name on each line")
    parser.add_argument("--cache", type=Path, default=Path("cache"), help="where indices of others' shards are kept")
    parser.add_argument("--verify", action="store_true", help="read, checksum and decode every image")
    parser.add_argument("--workers", type=int, default=available_cpus(), help="processes for --verify (%(default)s)")
    options = parser.parse_args(arguments)
    if options.pattern and not options.split:
        parser.error("--pattern needs --split")
    return run_command(lambda: _main(options))


def _main(options: argparse.Namespace) -> int:
    prepared = options.pattern is None and (options.root / "manifest.json").exists()
    manifest = load_manifest(options.root) if prepared else None
    splits = [options.split] if options.split else list(manifest["splits"] if manifest else DEFAULT_PATTERNS)
    damaged = []
    for split in splits:
        index = load_index(options.root, split, options.cache, options.pattern, options.class_names)
        print(_summary(index))
        if options.verify:
            checksums = [s.get("sha256") for s in manifest["splits"][split]["shards"]] if manifest else None
            damaged += verify(index, checksums, options.workers)
    for line in damaged:
        print(line)
    if options.verify:
        print(f"{len(damaged)} damaged" if damaged else "every image is well")
    return 1 if damaged else 0


if __name__ == "__main__":
    sys.exit(main())
