"""Shards that exist, to be written again with what --regions adds. Check: `pytest tests/test_write_regions.py`."""

from collections import Counter
from contextlib import suppress
from pathlib import Path

from data.index import Index, load_indexes
from data.parallel import run_parallel
from data.shards import MANIFEST, find_shards, load_manifest
from data.tars import member_names
from data.write_shards.source import SPLITS, Entry, Listing, Source, read_parts
from repghost.errors import UserError, printable
from repghost.machine import available_cpus

_CARRIED_OVER = ("shuffle", "images_per_shard", "seed", "resize", "quality")  # from a manifest
_FEW_IMAGES = 50_000  # whose tar headers are read within a few seconds


def list_shards(
    root: str | Path,
    class_names: str | Path | None = None,
    cache: str | Path = "~/.cache/repghost",
    workers: int | None = None,
) -> Listing:
    """A folder of shards, which --regions makes such that parts of images can be decoded.

    The images, keys, labels, classes and their order stay, and so does which images are in a shard. SRC is a folder
    that this program wrote, or one of webdataset tars with jpg and cls members that have train or val in their names;
    other members are left out. Checksums of the images are verified as they are read.
    """
    root = Path(root).expanduser()
    if not root.is_dir():
        raise UserError(f"{root}: no such folder")
    manifest = load_manifest(root) if (root / MANIFEST).exists() else None
    if manifest and "category_ids" in manifest:
        raise UserError(f"{root}: shards of detection, whose images are decoded whole: there is nothing to upgrade")
    splits = [split for split in SPLITS if split in manifest["splits"]] if manifest else _splits_in(root)
    indexes = load_indexes(root, splits, cache, class_names=class_names)
    sources = [_source(index, workers or available_cpus()) for index in indexes.values()]
    if manifest:
        written = {name: manifest[name] for name in _CARRIED_OVER if name in manifest}
    else:
        counts = Counter((source.split, entry.group) for source in sources for entry in source.entries)
        written = {"images_per_shard": max(counts.values())}
    return Listing(root, list(indexes[splits[0]].classes), sources, written=written)


def _splits_in(root: Path) -> list[str]:
    """The splits of which there are shards in a folder without a manifest."""
    found = []
    for split in SPLITS:
        with suppress(UserError):
            find_shards(root, split, None)
            found.append(split)
    return found or list(SPLITS)  # which then raises that there are none


def _source(index: Index, workers: int) -> Source:
    if len(index) < _FEW_IMAGES:
        workers = 1  # processes take seconds to start
    names = dict(run_parallel(member_names, index.shards, min(workers, len(index.shards))))
    entries = []
    columns = (index.samples[name].tolist() for name in ("shard", "offset", "label", "size", "crc32"))
    for shard, offset, label, size, checksum in zip(*columns, strict=True):
        if offset not in names[shard]:
            raise UserError(f"{index.shards[shard]}: no tar header before byte {offset}: copy it again")
        key = printable(names[shard][offset]).rpartition(".")[0]
        entries.append(Entry(key, index.shards[shard], label, size, offset, shard, checksum))
    return Source(index.split, entries, read_parts, shuffle="kept")
