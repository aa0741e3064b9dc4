"""The shards of a split: those that manifest.json lists, or webdataset tars of others, scanned on first use.

Claim: whatever does not fit the manifest is an error that names the file.
Check: `pytest tests/test_index.py tests/test_faults.py`.
"""

import glob
import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
from braceexpand import braceexpand
from isal.isal_zlib import crc32
from tqdm import tqdm

from data.parallel import check_stop, run_parallel
from data.regions import Regions
from data.tars import member_name, member_names, read_rows, report_unreadable, scan_shard
from repghost.errors import UserError, printable
from repghost.files import atomic_write, file_sha256, locked, read_file, require_writable
from repghost.images import DecodeError, open_image
from repghost.machine import available_cpus

FORMAT = 1  # of manifests
MANIFEST = "manifest.json"
MANIFEST_BYTES = 20_000_000  # ImageNet's has 0.2 million
# What others call the splits: a word in the names of their shards, or a folder of shards or of images.
SPLIT_NAMES = {"train": ("train",), "val": ("val", "validation", "valid")}

LONGEST_SCAN = 6 * 3600  # seconds that another process may take for an index: 10 million images on a slow disk
_FORMAT = 2  # of the cached indexes of others' shards


# -- shards that data.write_shards wrote -------------------------------------------------------------------------------


def load_manifest(root: Path) -> dict[str, Any]:
    """manifest.json of a folder that data.write_shards wrote."""
    return parse_manifest(read_file(root / MANIFEST, MANIFEST_BYTES), root / MANIFEST)


def parse_manifest(content: bytes, where: object) -> dict[str, Any]:
    """The manifest in `content`, which was read from `where`, with the keys that are used.

    Raises UserError otherwise, also for a file name that leads out of the folder.
    """
    try:
        manifest = json.loads(content)
        if manifest["format"] != FORMAT:
            raise ValueError(f"its format is {str(manifest['format'])[:20]}")
        _require(manifest, classes=list, splits=dict)
        _require_different(manifest["classes"])
        _require_category_ids(manifest)
        for entry in manifest["splits"].values():
            _require(entry, index=dict, shards=list)
            if "regions" in entry:
                _require(entry["regions"], files=list)
                if len(entry["regions"]["files"]) != 2:
                    raise ValueError("its regions are not two files")
            for array in array_files(entry):
                _require(array, file=str, sha256=str)
            if not isinstance(entry.get("skipped", []), list):
                raise TypeError("its skipped is no list")
            for shard in entry["shards"]:
                _require(shard, file=str, bytes=int)
                if shard["bytes"] < 0:
                    raise ValueError(f"{shard['file']} has {shard['bytes']} bytes")
        _require_different([shard["file"] for entry in manifest["splits"].values() for shard in entry["shards"]])
    except (ValueError, TypeError, AttributeError, RecursionError, KeyError) as error:
        reason = f"no key {error}" if isinstance(error, KeyError) else str(error)
        what = f"not a manifest of format {FORMAT} ({reason})"
        raise UserError(f"{where}: {what}: copy it again or write the shards again") from None
    return manifest


def _require(value: dict[str, Any], **types: type) -> None:
    for key, kind in types.items():
        if not isinstance(value[key], kind):
            raise TypeError(f"its {key} is no {kind.__name__}")
        if key == "file" and (value[key] != os.path.basename(value[key]) or value[key] in ("", ".", "..")):
            raise ValueError(f"{value[key]!r} is not the name of a file in its folder")


def _require_different(names: Sequence[object]) -> None:
    if wrong := [name for name in names if not isinstance(name, str)]:
        raise TypeError(f"{wrong[0]!r} is no name")
    name, count = max(Counter(names).items(), key=lambda item: item[1], default=("", 0))
    if count > 1:
        raise ValueError(f"{name!r} is there {count} times")


def _require_category_ids(manifest: dict[str, Any]) -> None:
    """Ids that rise, one for each class, where the shards are for detection; their splits have a file of objects."""
    if "category_ids" not in manifest:
        return
    _require(manifest, category_ids=list)
    ids = manifest["category_ids"]
    whole = all(type(i) is int and abs(i) < 2**63 for i in ids)
    if not whole or ids != sorted(set(ids)) or len(ids) != len(manifest["classes"]):
        raise ValueError("its category_ids are not whole numbers that rise, one for each class")
    for entry in manifest["splits"].values():
        _require(entry, objects=dict)


def array_files(entry: dict[str, Any]) -> list[dict[str, Any]]:
    """The files beside the shards of a split: its regions, where it has any, objects, if it is for detection, index."""
    objects = [entry["objects"]] if "objects" in entry else []
    return [*entry.get("regions", {}).get("files", []), *objects, entry["index"]]


def split_entry(manifest: dict[str, Any], split: str, where: object) -> dict[str, Any]:
    """What the manifest that was read from `where` says of one split."""
    if split not in manifest["splits"]:
        raise UserError(f"{where}: no split {split}, only {', '.join(manifest['splits'])}")
    return manifest["splits"][split]


def prepared_split(root: Path, manifest: dict[str, Any], split: str) -> tuple[tuple[str, ...], np.ndarray]:
    """Shards and samples ([N] of SAMPLE) of a split, once the files are known to be those that the manifest lists."""
    entry = split_entry(manifest, split, root / MANIFEST)
    for file in [*entry["shards"], *array_files(entry)]:
        path = root / file["file"]
        if not path.is_file():
            raise UserError(f"{path}: missing or not a regular file, but the manifest lists it: copy it again")
        if "bytes" in file and (size := path.stat().st_size) != file["bytes"]:
            raise UserError(f"{path} has {size} bytes, the manifest says {file['bytes']}: copy it again")
        if "bytes" not in file and file_sha256(path) != file["sha256"]:
            raise UserError(f"{path}: not the file that manifest.json describes: copy both again")
    samples = read_rows(path, [shard["bytes"] for shard in entry["shards"]])
    _require_counts(entry, samples, manifest["classes"], path)
    return tuple(str(root / shard["file"]) for shard in entry["shards"]), samples


def prepared_regions(root: Path, manifest: dict[str, Any], split: str) -> Regions | None:
    """The regions of a split; None for shards without any."""
    entry = split_entry(manifest, split, root / MANIFEST)
    return Regions(*(str(root / file["file"]) for file in entry["regions"]["files"])) if "regions" in entry else None


def _require_counts(entry: dict[str, Any], samples: np.ndarray, classes: Sequence[str], path: Path) -> None:
    """Raises UserError where a count that the manifest states is not that of the index at `path`."""
    labels, shards = samples["label"], entry["shards"]
    in_shards = np.bincount(samples["shard"], minlength=len(shards)).tolist()
    counts = [("", entry.get("images"), len(samples))]
    counts += [(f" in {s['file']}", s.get("images"), n) for s, n in zip(shards, in_shards, strict=True)]
    stated = entry.get("images_per_class")
    if stated is not None and labels.min() >= 0 and labels.max() < len(classes):  # load_indexes names other labels
        if not isinstance(stated, list) or len(stated) != len(classes):
            what = f"its images_per_class is no list of {len(classes)} counts"
            raise UserError(f"{path.parent / MANIFEST}: {what}: copy it again or write the shards again")
        of_classes = np.bincount(labels, minlength=len(classes)).tolist()
        counts += [(f" of class {name}", says, n) for name, says, n in zip(classes, stated, of_classes, strict=True)]
    for where, says, count in counts:
        if says is not None and says != count:
            raise UserError(f"{path}: {count} images{where}, but {MANIFEST} says {says!r}: copy both again")


# -- shards of others --------------------------------------------------------------------------------------------------


def find_shards(root: Path, split: str, pattern: str | None) -> tuple[str, ...]:
    """Paths of the shards of a split.

    pattern: a glob or webdataset's {0000..1023}; None for tars in `root` that have one of the split's SPLIT_NAMES as a
    word of their names, and all tars in a folder of such a name. Raises UserError where there are none.
    """
    shards: list[str] = []
    for expanded in _expand(split, pattern) if pattern else ():
        found = sorted(glob.glob(os.path.join(glob.escape(str(root)), os.path.expanduser(expanded))))
        if not found:
            raise UserError(f"{root}: no shard matches {expanded} for the split {split}")
        shards += found
    if pattern is None:
        words = {name: re.findall(r"[^\W\d_]+", name.casefold()) for name in tars_in(root)}
        shards += [str(root / name) for name in words if not set(SPLIT_NAMES[split]).isdisjoint(words[name])]
        for folder in split_folders(root, split):
            shards += [str(folder / name) for name in tars_in(folder)]
    if not shards:
        names = " or ".join(SPLIT_NAMES[split])
        what = f"neither a {MANIFEST} nor shards whose names have {names} as a word: name them with data.{split}"
        raise UserError(f"{root}: {what}; images become shards by python -m data.write_shards folder {root} SHARDS")
    return tuple(dict.fromkeys(shards))


def _expand(split: str, pattern: str) -> Iterator[str]:
    try:
        yield from braceexpand(pattern)
    except ValueError as error:
        raise UserError(f"data.{split}={pattern}: {error}") from None


def tars_in(folder: Path) -> list[str]:
    """Names of the tars in a folder, sorted, without hidden ones."""
    return sorted(name for name in os.listdir(folder) if name.endswith(".tar") and not name.startswith("."))


def split_folders(root: Path, split: str) -> list[Path]:
    """The folders in `root` that are called like a split, in any case of letters."""
    return sorted(root / e.name for e in os.scandir(root) if e.name.casefold() in SPLIT_NAMES[split] and e.is_dir())


def require_disjoint(shards: Mapping[str, Sequence[str]]) -> None:
    """Raises UserError for a shard that is in two of the splits; shards: paths by split."""
    split_of: dict[str, str] = {}
    for split, paths in shards.items():
        for path in paths:
            if (other := split_of.setdefault(os.path.abspath(path), split)) != split:
                what = f"both a shard of {other} and of {split}"
                raise UserError(f"{path}: {what}: name those of each with data.{other} and data.{split}")


def numbered_classes(labels: np.ndarray, where: object) -> list[str]:
    """A number for each class, from 0 to the largest of the labels, int [N] of all images at `where`.

    Raises UserError for labels that are ids: more than 1,000 classes and than images, 19 in 20 of them without any.
    """
    classes, used = int(labels.max()) + 1, len(np.unique(labels))
    if classes > max(1000, len(labels)) and classes > 20 * used:
        what = f"labels up to {classes - 1:,} for {len(labels):,} images of {used:,} classes look like ids"
        raise UserError(
            f"{where}: {what}: number the classes 0, 1, 2 ... (data.class_names=FILE names as many as there are)"
        )
    return [str(label) for label in range(classes)]


def scanned_samples(shards: Sequence[str], cache: Path) -> np.ndarray:
    """[N] of SAMPLE: read from `cache`, or scanned and kept there, while other processes wait."""
    states = [os.stat(shard) for shard in shards]
    if irregular := [shard for shard in shards if not os.path.isfile(shard)]:
        raise UserError(f"{irregular[0]}: not a regular file")  # opening a pipe would wait for ever
    key = [(os.path.realpath(s), st.st_size, st.st_mtime_ns) for s, st in zip(shards, states, strict=True)]
    path = cache / "index" / f"{hashlib.sha256(repr((_FORMAT, key)).encode()).hexdigest()[:32]}.npy"
    require_writable(path, "data.cache")
    path.parent.mkdir(parents=True, exist_ok=True)
    with locked(path.with_suffix(".lock"), "indexing the same shards", LONGEST_SCAN):
        if not path.exists():
            samples = _scan(shards)
            with atomic_write(path) as file:
                np.save(file, samples)
        return read_rows(path, [state.st_size for state in states], scanned=True)


def _scan(shards: Sequence[str]) -> np.ndarray:
    rows: dict[int, np.ndarray] = {}
    shard_of: dict[str, int] = {}
    with closing(run_parallel(scan_shard, shards, min(available_cpus(), len(shards)))) as results:
        for number, (found, keys) in tqdm(results, total=len(shards), desc="indexing", unit="shard"):
            if not keys:
                raise UserError(f"{shards[number]}: holds no samples (KEY.jpg and KEY.cls)")
            for key in keys:
                if shard_of.setdefault(key, number) != number:
                    raise UserError(f"{shards[number]}: key {key} is also in {Path(shards[shard_of[key]]).name}")
            found["shard"] = number
            rows[number] = found
    samples = np.concatenate([rows[number] for number in range(len(shards))])
    report_unreadable(shards, samples)
    return samples


# -- damage, for python -m data.index SHARDS --verify ------------------------------------------------------------------


def verify(shards: Sequence[str], samples: np.ndarray, checksums: Sequence[str | None], workers: int) -> list[str]:
    """A line for each shard or image that is not what it was.

    samples: [N] of SAMPLE, in the order of the shards. checksums: the sha256 of each shard, where there is one.
    """
    bounds = np.searchsorted(samples["shard"], np.arange(1, len(shards)))
    tasks = list(zip(shards, np.split(samples, bounds), checksums, strict=True))
    with closing(run_parallel(_verify_shard, tasks, min(workers, len(tasks)))) as results:
        damaged = dict(tqdm(results, total=len(tasks), desc="verifying", unit="shard"))
    return [line for number in sorted(damaged) for line in damaged[number]]


def _verify_shard(task: tuple[str, np.ndarray, str | None]) -> list[str]:
    path, samples, checksum = task
    lines = []
    names = member_names(path)
    with open(path, "rb") as file:
        for sample in samples:
            check_stop()
            data = os.pread(file.fileno(), int(sample["size"]), int(sample["offset"]))
            try:
                if crc32(data) != sample["crc32"]:
                    raise DecodeError("its bytes have changed (checksum)")
                open_image(data, decode=True)
            except DecodeError as error:
                lines.append(f"{printable(path)}: {member_name(names, int(sample['offset']))}: {error}")
    if checksum is not None and not lines and file_sha256(path) != checksum:
        lines.append(f"{path}: its labels or tar headers have changed (checksum): copy it again")
    return lines
