"""The shards of a split: those that manifest.json lists, or webdataset tars of others, scanned on first use.

Claim: whatever does not fit the manifest is an error that names the file.
Check: `pytest tests/test_index.py tests/test_faults.py`.
"""

import glob
import hashlib
import json
import os
import zlib
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
from braceexpand import braceexpand
from filelock import FileLock
from tqdm import tqdm

from data.parallel import available_cpus, check_stop, run_parallel
from data.tars import DecodeError, member_name, member_names, open_image, read_rows, scan_shard
from repghost.errors import UserError
from repghost.files import atomic_write, file_sha256, require_writable

FORMAT = 1  # of manifests
MANIFEST = "manifest.json"
DEFAULT_PATTERNS = {"train": ("*train*.tar", "train/*.tar"), "val": ("*val*.tar", "val/*.tar")}

_FORMAT = 1  # of the cached indexes of others' shards


# -- shards that data.write_shards wrote -------------------------------------------------------------------------------


def load_manifest(root: Path) -> dict[str, Any]:
    """manifest.json of a folder that data.write_shards wrote."""
    return parse_manifest((root / MANIFEST).read_bytes(), root / MANIFEST)


def parse_manifest(content: bytes, where: object) -> dict[str, Any]:
    """The manifest in `content`, which was read from `where`, with the keys that are used.

    Raises UserError otherwise, also for a file name that leads out of the folder.
    """
    try:
        manifest = json.loads(content)
        if manifest["format"] != FORMAT:
            raise ValueError(f"its format is {str(manifest['format'])[:20]}")
        _require(manifest, classes=list, splits=dict)
        for entry in manifest["splits"].values():
            _require(entry, index=dict, shards=list)
            _require(entry["index"], file=str, sha256=str)
            for shard in entry["shards"]:
                _require(shard, file=str, bytes=int)
                if shard["bytes"] < 0:
                    raise ValueError(f"{shard['file']} has {shard['bytes']} bytes")
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


def split_entry(manifest: dict[str, Any], split: str, where: object) -> dict[str, Any]:
    """What the manifest that was read from `where` says of one split."""
    if split not in manifest["splits"]:
        raise UserError(f"{where}: no split {split}, only {', '.join(manifest['splits'])}")
    return manifest["splits"][split]


def prepared_split(root: Path, manifest: dict[str, Any], split: str) -> tuple[tuple[str, ...], np.ndarray]:
    """Shards and samples ([N] of SAMPLE) of a split, once the files are known to be those that the manifest lists."""
    entry = split_entry(manifest, split, root / MANIFEST)
    for file in [*entry["shards"], entry["index"]]:
        path = root / file["file"]
        if not path.is_file():
            raise UserError(f"{path}: missing or not a regular file, but the manifest lists it: copy it again")
        if "bytes" in file and (size := path.stat().st_size) != file["bytes"]:
            raise UserError(f"{path} has {size} bytes, the manifest says {file['bytes']}: copy it again")
    if file_sha256(path) != entry["index"]["sha256"]:
        raise UserError(f"{path}: not the file that manifest.json describes: copy both again")
    samples = read_rows(path, [shard["bytes"] for shard in entry["shards"]])
    if entry.get("images", len(samples)) != len(samples):
        raise UserError(f"{path}: {len(samples)} images, but manifest.json says {entry['images']}: copy both again")
    return tuple(str(root / shard["file"]) for shard in entry["shards"]), samples


# -- shards of others --------------------------------------------------------------------------------------------------


def find_shards(root: Path, split: str, pattern: str | None) -> tuple[str, ...]:
    """Paths of the shards of a split; pattern: a glob or webdataset's {0000..1023}, None for DEFAULT_PATTERNS."""
    shards: list[str] = []
    for expanded in braceexpand(pattern) if pattern else DEFAULT_PATTERNS[split]:
        found = sorted(glob.glob(os.path.join(glob.escape(str(root)), expanded)))
        if pattern and not found:
            raise UserError(f"{root}: no shard matches {expanded} for the split {split}")
        shards += found
    if not shards:
        what = f"neither a {MANIFEST} nor shards named {' or '.join(DEFAULT_PATTERNS[split])}"
        raise UserError(f"{root}: {what}: run python -m data.write_shards, or name your shards with data.{split}")
    return tuple(dict.fromkeys(shards))


def scanned_samples(shards: Sequence[str], cache: Path) -> np.ndarray:
    """[N] of SAMPLE: read from `cache`, or scanned and kept there, while other processes wait."""
    states = [os.stat(shard) for shard in shards]
    if irregular := [shard for shard in shards if not os.path.isfile(shard)]:
        raise UserError(f"{irregular[0]}: not a regular file")  # opening a pipe would wait for ever
    key = [(os.path.realpath(s), st.st_size, st.st_mtime_ns) for s, st in zip(shards, states, strict=True)]
    path = cache / "index" / f"{hashlib.sha256(repr((_FORMAT, key)).encode()).hexdigest()[:32]}.npy"
    require_writable(path, "data.cache")
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_suffix(".lock")):
        if not path.exists():
            samples = _scan(shards)
            with atomic_write(path) as file:
                np.save(file, samples)
        return read_rows(path, [state.st_size for state in states])


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
    return np.concatenate([rows[number] for number in range(len(shards))])


# -- damage, for python -m data.index SHARDS --verify ------------------------------------------------------------------


def verify(shards: Sequence[str], samples: np.ndarray, checksums: Sequence[str | None], workers: int) -> list[str]:
    """A line for each shard or image that is not what it was.

    samples: [N] of SAMPLE, in the order of the shards. checksums: the sha256 of each shard, where there is one.
    """
    bounds = np.searchsorted(samples["shard"], np.arange(1, len(shards)))
    tasks = list(zip(shards, np.split(samples, bounds), checksums, strict=True))
    damaged: dict[int, list[str]] = {}
    with closing(run_parallel(_verify_shard, tasks, min(workers, len(tasks)))) as results:
        for number, lines in tqdm(results, total=len(tasks), desc="verifying", unit="shard"):
            damaged[number] = lines
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
                if zlib.crc32(data) != sample["crc32"]:
                    raise DecodeError("its bytes have changed (checksum)")
                open_image(data, decode=True)
            except DecodeError as error:
                lines.append(f"{path}: {member_name(names, int(sample['offset']))}: {error}")
    if checksum is not None and not lines and file_sha256(path) != checksum:
        lines.append(f"{path}: its labels or tar headers have changed (checksum): copy it again")
    return lines
