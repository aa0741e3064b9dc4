"""manifest.json: what `data.write_shards` says of the shards that it wrote, and the indexes beside it.

Claim: whatever does not fit the manifest is an error that names the file.
Check: `pytest tests/test_index.py tests/test_faults.py`.
"""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from data.tars import read_rows
from repghost.errors import UserError
from repghost.files import file_sha256

FORMAT = 1
MANIFEST = "manifest.json"


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
            for name in (entry["index"]["file"], *(shard["file"] for shard in entry["shards"])):
                if name != os.path.basename(name) or name in ("", ".", ".."):
                    raise ValueError(f"{name!r} is not the name of a file in its folder")
    except (ValueError, TypeError, AttributeError, RecursionError, KeyError) as error:
        reason = f"no key {error}" if isinstance(error, KeyError) else str(error)
        raise UserError(
            f"{where}: not a manifest of format {FORMAT} ({reason}): copy it again or write the shards again"
        ) from None
    return manifest


def _require(value: dict[str, Any], **types: type) -> None:
    for key, kind in types.items():
        if not isinstance(value[key], kind):
            raise TypeError(f"its {key} is no {kind.__name__}")


def split_entry(manifest: dict[str, Any], split: str, where: object) -> dict[str, Any]:
    """What the manifest that was read from `where` says of one split."""
    if split not in manifest["splits"]:
        raise UserError(f"{where}: no split {split}, only {', '.join(manifest['splits'])}")
    return manifest["splits"][split]


def prepared_split(root: Path, manifest: dict[str, Any], split: str) -> tuple[tuple[str, ...], np.ndarray]:
    """Shards and samples ([N] of SAMPLE) of a split, once the files are known to be those that the manifest lists."""
    entry = split_entry(manifest, split, root / MANIFEST)
    index = root / entry["index"]["file"]
    for path in (*(root / shard["file"] for shard in entry["shards"]), index):
        if not path.exists():
            raise UserError(f"{path}: missing, but the manifest lists it: copy it again")
    for shard in entry["shards"]:
        path = root / shard["file"]
        if not path.is_file():
            raise UserError(f"{path}: not a regular file")
        if (size := path.stat().st_size) != shard["bytes"]:
            raise UserError(f"{path} has {size} bytes, the manifest says {shard['bytes']}: copy it again")
    if file_sha256(index) != entry["index"]["sha256"]:
        raise UserError(f"{index}: not the file that manifest.json describes: copy both again")
    samples = read_rows(index, [shard["bytes"] for shard in entry["shards"]])
    if entry.get("images", len(samples)) != len(samples):
        raise UserError(f"{index}: {len(samples)} images, but manifest.json says {entry['images']}: copy both again")
    return tuple(str(root / shard["file"]) for shard in entry["shards"]), samples
