"""Shards of others: webdataset tars without a manifest, scanned on first use.

Check: `pytest tests/test_index.py tests/test_faults.py`.
"""

import glob
import hashlib
import os
import stat
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import numpy as np
from braceexpand import braceexpand
from filelock import FileLock
from tqdm import tqdm

from data.parallel import available_cpus, run_parallel
from data.tars import read_rows, scan_shard
from repghost.errors import UserError
from repghost.files import atomic_write

DEFAULT_PATTERNS = {"train": ("*train*.tar", "train/*.tar"), "val": ("*val*.tar", "val/*.tar")}

_FORMAT = 1  # of the cached indexes


def find_shards(root: Path, split: str, pattern: str | None) -> tuple[str, ...]:
    """Paths of the shards of a split; pattern: a glob or webdataset's {0000..1023}, None for DEFAULT_PATTERNS."""
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


def scanned_samples(shards: Sequence[str], cache: Path) -> np.ndarray:
    """[N] of SAMPLE: read from `cache`, or scanned and kept there, while other processes wait."""
    states = [os.stat(shard) for shard in shards]
    for shard, state in zip(shards, states, strict=True):
        if not stat.S_ISREG(state.st_mode):
            raise UserError(f"{shard}: not a regular file")  # opening a pipe would wait for ever
    key = [(os.path.realpath(s), st.st_size, st.st_mtime_ns) for s, st in zip(shards, states, strict=True)]
    path = cache / "index" / f"{hashlib.sha256(repr((_FORMAT, key)).encode()).hexdigest()[:32]}.npy"
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
