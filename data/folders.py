"""data.root=IMAGES: class folders, written as shards into the cache folder when they are first used.

A copy belongs to the paths, sizes and times of the images: images that were added, removed or changed make another.
Check: `pytest tests/test_folders.py`.
"""

import hashlib
import math
import os
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from data.shards import MANIFEST, load_manifest, split_folders, tars_in
from data.write_shards.folder import list_folder
from data.write_shards.source import SPLITS, Listing
from data.write_shards.write import write_shards
from repghost.errors import UserError, print_rank_zero
from repghost.files import locked

_FORMAT = 1  # of the copies


def holds_images(root: Path) -> bool:
    """Whether the folder `root` has folders, but neither a manifest nor tars, in it or in those of its splits."""
    if (root / MANIFEST).exists():
        return False
    folders = [folder for split in SPLITS for folder in split_folders(root, split)]
    return any(entry.is_dir() for entry in os.scandir(root)) and not any(map(tars_in, [root, *folders]))


def shards_of_images(root: Path, cache: Path, splits: Sequence[str]) -> Path:
    """The folder in `cache` with the class folders of `root` as shards, of `splits` at least.

    Where a single split is asked for and `root` has neither train/ nor val/, its own folders are the classes. What is
    missing is written while other processes wait. Raises UserError and OSError as data.write_shards does.
    """
    try:
        listing = _listing(root, splits)
        name = re.sub(r"[^A-Za-z0-9._-]+", "_", root.resolve().name)[:50]
        out = cache / "folders" / f"{name}-{_digest(root, listing)}"
        if not _holds(out, splits):
            out.parent.mkdir(parents=True, exist_ok=True)
            with locked(f"{out}.lock", f"writing the images of {root} as shards", limit=math.inf):
                if not _holds(out, splits):
                    print(f"{root}: writing its images as shards, once, to {out}", flush=True)
                    sources = [source for source in listing.sources if source.split in splits]
                    write_shards(replace(listing, sources=sources), out)
        return out
    except UserError as error:
        if " --" not in str(error):  # an option, which only the command has
            raise
        raise UserError(f"{error}: python -m data.write_shards folder {root} SHARDS, then data.root=SHARDS") from None


def _listing(root: Path, splits: Sequence[str]) -> Listing:
    """Those of both splits in `root`, wherever there are both, since the classes are those of train."""
    folders = {split: split_folders(root, split) for split in SPLITS}
    if len(splits) == 1:
        split = splits[0]
        if not any(folders.values()):
            print_rank_zero(f"{root}: neither train/ nor val/ in it, so its folders are the classes of {split}")
            return list_folder(root, split)
        if len(folders[split]) == 1 and not all(folders.values()):
            return list_folder(folders[split][0], split)
    return list_folder(root)


def _digest(root: Path, listing: Listing) -> str:
    """Hex digest of where the images lie, what they are called and labelled, their sizes and times."""
    digest = hashlib.sha256(ascii((_FORMAT, root.resolve(), listing.classes)).encode())
    for source in listing.sources:
        for entry in source.entries:
            status = os.stat(entry.file)
            row = source.split, entry.key, entry.label, entry.file, status.st_size, status.st_mtime_ns
            digest.update(ascii(row).encode())
    return digest.hexdigest()[:16]


def _holds(folder: Path, splits: Sequence[str]) -> bool:
    return (folder / MANIFEST).exists() and set(splits) <= load_manifest(folder)["splits"].keys()
