"""Images to shards: webdataset tars in a random order, with an index and a manifest.

    python -m data.write_shards folder IMAGES SHARDS [--val-share 0.1]
    python -m data.write_shards archives ILSVRC2012_img_{train,val}.tar ILSVRC2012_devkit_t12.tar.gz SHARDS
    python -m data.write_shards kaggle KAGGLE SHARDS
    python -m data.write_shards parquet IMAGENET-1K SHARDS
    python -m data.write_shards coco COCO SHARDS

Shard i holds the images permutation[i * S : (i + 1) * S] of one permutation drawn from the seed. Each shard is a task
of its own, so the bytes are the same for any number of processes. Images are stored as they are, and each is decoded
once, so that a damaged file is found here and not in training. The same command started again keeps the finished shards
and writes those that are missing or truncated. SHARDS then holds train-000000.tar ..., train.index.npy, the same for
val, manifest.json, and parts/ with a record of each shard, which only a restart reads.
Every option is explained by `python -m data.write_shards FORMAT --help`.

Check: `pytest tests/test_write_shards.py`.
"""

import json
import re
from collections.abc import Iterable, Sequence
from contextlib import closing
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout
from numpy.random import Philox
from tqdm import tqdm

from data.parallel import run_parallel
from data.shards import FORMAT
from data.tars import SAMPLE
from data.write_shards.folder import list_folder
from data.write_shards.shard import Options, Shard, Task, finished_shard, write_shard
from data.write_shards.source import IMAGES_PER_SHARD, SPLITS, Listing, Source
from repghost.errors import UserError
from repghost.files import atomic_write, file_sha256, remove_leftovers, write_text
from repghost.machine import available_cpus
from repghost.reference import IMAGENET

_SHARD_STREAM = 2  # Philox counter's highest word; 0 and 1 belong to data.sampling


def write_folder(
    source: str | Path, out: str | Path, split: str | None = None, val_share: float | None = None, **options: Any
) -> dict[str, Any]:
    """Writes class folders to shards.

    split, val_share: as in `list_folder`. options, and the manifest that is returned: as in `write_shards`.
    """
    return write_shards(list_folder(source, split, val_share, options.get("seed", 0)), out, **options)


def write_shards(
    listing: Listing,
    out: str | Path,
    *,
    images_per_shard: int = IMAGES_PER_SHARD,
    seed: int = 0,
    resize: int | None = None,
    quality: int = 90,
    workers: int | None = None,
    skip_bad: int = 0,
    quiet: bool = False,
) -> dict[str, Any]:
    """Writes the images of `listing` to shards in `out` and returns the manifest.

    resize: images with a longer shorter side are reduced to this one in pixels (bicubic) and stored as JPEG of
    `quality`; smaller ones stay as they are. workers: processes, None for one a core, or one for few images. skip_bad:
    how many images that do not decode may be left out; one more ends the run. Raises UserError, and OSError when a file
    cannot be read or written.
    """
    out = Path(out)
    options = Options(listing.sources[0].shuffle, images_per_shard, seed, resize, quality if resize else None)
    parts = out / "parts"
    if not parts.exists() and out.exists() and any(out.iterdir()):
        raise UserError(f"{out}: not empty, and not begun by this program: choose a new folder")
    parts.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(parts / "lock", timeout=0):
            _check_plan(out, listing, options)
            remove_leftovers(out)
            tasks = {source.split: _tasks(source, out, options, skip_bad) for source in listing.sources}
            shards = _write_missing(tasks, workers, skip_bad, quiet)
            manifest = _write_manifest(out, listing, options, shards)
    except Timeout:
        raise UserError(f"{out}: another process is writing there") from None
    if not quiet:
        _report(listing, manifest, shards)
    return manifest


def _check_plan(out: Path, listing: Listing, options: Options) -> None:
    """Records what decides the order of the images, so that shards of different runs never mix."""
    path = out / "parts" / "plan.json"
    sources = {source.split: source.digest() for source in listing.sources}
    plan = {"options": asdict(options), "classes": listing.classes, "sources": sources}
    if path.exists():
        plan = json.loads(path.read_text(encoding="utf-8"))
        for name, earlier in plan["options"].items():
            if earlier != (now := getattr(options, name)):
                raise UserError(f"{out}: begun with {name} {earlier}, now {now}: keep it or use a new OUT")
        if plan["classes"] != listing.classes:
            differing = sorted(set(plan["classes"]) ^ set(listing.classes)) or ["their order"]
            raise UserError(f"{out}: begun with other classes (differing: {differing[0]}): use a new folder")
        for split, digest in sources.items():
            if plan["sources"].setdefault(split, digest) != digest:
                raise UserError(
                    f"{out}: begun with other images in {split}: restore them (and --val-share), or use a new folder"
                )
    write_text(path, json.dumps(plan))


def _order(source: Source, options: Options) -> np.ndarray:
    """int64 [N]: the order in which the images of a split are stored.

    "global": one permutation of all images. "row-groups": the rows of Parquet files cannot be read one by one, so the
    row groups are permuted, the rows inside each, and then the images of each shard, which so reads few row groups and
    yet mixes several.
    """
    count = len(source.entries)
    philox = Philox(key=[options.seed, SPLITS.index(source.split)], counter=[0, 0, 0, _SHARD_STREAM])
    image_draw, group_draw, second_draw = philox.random_raw(3 * count).reshape(3, count)
    if options.shuffle == "global":
        return np.argsort(image_draw, kind="stable")
    groups = np.array([entry.group for entry in source.entries])
    order = np.lexsort((image_draw, group_draw[groups]))
    return order[np.lexsort((second_draw, np.arange(count) // options.images_per_shard))]


def _tasks(source: Source, out: Path, options: Options, skip_bad: int) -> list[Task]:
    order = _order(source, options).tolist()
    tasks: list[Task] = []
    for start in range(0, len(order), options.images_per_shard):
        name = f"{source.split}-{len(tasks):06d}"
        entries = [source.entries[i] for i in order[start : start + options.images_per_shard]]
        record = out / "parts" / f"{name}.npz"
        tasks.append(Task(out / f"{name}.tar", record, entries, source.read, options, skip_bad))
    return tasks


def _write_missing(
    tasks: dict[str, list[Task]], workers: int | None, skip_bad: int, quiet: bool
) -> dict[str, list[Shard]]:
    """The shards of every split, in order; those that are finished are not written again."""
    everything = list(chain(*tasks.values()))
    shards = {task.path: shard for task in everything if (shard := finished_shard(task)) is not None}
    missing = [task for task in everything if task.path not in shards]
    _check_budget(shards.values(), skip_bad)
    images = sum(len(task.entries) for task in missing)
    if workers is None:  # processes take seconds to start
        workers = available_cpus() if images > IMAGES_PER_SHARD else 1
    results = run_parallel(write_shard, missing, min(workers, len(missing)))
    with tqdm(total=images, unit="images", desc="writing shards", disable=quiet) as bar, closing(results):
        for number, shard in results:
            shards[missing[number].path] = shard
            bar.update(len(missing[number].entries))
            _check_budget(shards.values(), skip_bad)
    return {split: [shards[task.path] for task in tasks[split]] for split in tasks}


def _check_budget(shards: Iterable[Shard], skip_bad: int) -> None:
    skipped = [key for shard in shards for key in shard.skipped]
    if len(skipped) > skip_bad:
        raise UserError(f"{len(skipped)} images do not decode, more than --skip-bad {skip_bad}: {', '.join(skipped)}")


def _write_manifest(out: Path, listing: Listing, options: Options, written: dict[str, list[Shard]]) -> dict[str, Any]:
    """Writes the index of each split and, last of all, the manifest."""
    path = out / "manifest.json"
    splits = json.loads(path.read_text(encoding="utf-8"))["splits"] if path.exists() else {}
    for split, shards in written.items():
        splits[split] = _write_index(out, split, shards, listing)
    splits = {split: splits[split] for split in SPLITS if split in splits}
    categories = {"category_ids": list(listing.category_ids)} if listing.category_ids else {}
    manifest = {"format": FORMAT, **asdict(options), "classes": listing.classes, **categories, "splits": splits}
    write_text(path, json.dumps(manifest, indent=1))
    return manifest


def _write_index(out: Path, split: str, shards: list[Shard], listing: Listing) -> dict[str, Any]:
    """Writes the index of a split, and its objects for detection; returns the split's part of the manifest."""
    rows = np.concatenate([shard.rows for shard in shards])
    rows["shard"] = np.repeat(np.arange(len(shards)), [len(shard.rows) for shard in shards])
    assert rows.dtype == SAMPLE, rows.dtype
    name = f"{split}.index.npy"
    with atomic_write(out / name) as file:
        np.save(file, rows)
    if listing.category_ids:
        of_classes = _write_objects(out / f"{split}.objects.npz", shards, rows["shard"], listing.category_ids)
    else:
        of_classes = {"images_per_class": np.bincount(rows["label"], minlength=len(listing.classes)).tolist()}
    return {
        "images": len(rows),
        **of_classes,
        "skipped": [key for shard in shards for key in shard.skipped],
        "index": {"file": name, "sha256": file_sha256(out / name)},
        "shards": [
            {"file": f"{split}-{i:06d}.tar", "images": len(s.rows), "bytes": s.bytes, "sha256": s.sha256}
            for i, s in enumerate(shards)
        ],
    }


def _write_objects(path: Path, shards: list[Shard], shard_of: np.ndarray, ids: Sequence[int]) -> dict[str, Any]:
    """Writes the arrays that `data.coco` reads; returns what the manifest says of them.

    shard_of: int [N], the shard of each image. ids: of the categories.
    """
    records, objects = (np.concatenate([getattr(s, name) for s in shards]) for name in ("records", "objects"))
    records["shard"] = shard_of
    first = np.cumsum([0] + [len(shard.rows) for shard in shards[:-1]])
    objects["image"] += np.repeat(first, [len(shard.objects) for shard in shards])
    with atomic_write(path) as file:
        np.savez(file, records=records, ids=np.concatenate([shard.ids for shard in shards]), objects=objects)
    counts = np.bincount(np.searchsorted(ids, objects["category_id"]), minlength=len(ids)).tolist()
    return {"objects_per_class": counts, "objects": {"file": path.name, "sha256": file_sha256(path)}}


def _report(listing: Listing, manifest: dict[str, Any], written: dict[str, list[Shard]]) -> None:
    imagenet = len(listing.classes) == 1000 and all(re.fullmatch(r"n\d{8}", name) for name in listing.classes)
    for source in listing.sources:
        split, shards = source.split, written[source.split]
        entry = manifest["splits"][split]
        images, what = entry["images"], "objects" if listing.category_ids else "images"
        counts = entry[f"{what}_per_class"]
        print(
            f"{split}: {images:,} images in {len(shards):,} shards, {sum(s.bytes for s in shards) / 1e9:,.3f} GB; "
            f"{len(counts):,} classes of {min(counts):,} to {max(counts):,} {what} (median {np.median(counts):,.0f})"
        )
        for number, what in (
            (source.ignored, "files without an image's extension ignored"),
            (sum(len(shard.skipped) for shard in shards), "images skipped because they do not decode"),
            (sum(shard.converted for shard in shards), "images of other formats converted to PNG"),
        ):
            if number:
                print(f"{split}: {number:,} {what}")
        for remark in source.remarks:
            print(f"{split}: {remark}")
        if imagenet:
            more = images - (expected := IMAGENET[SPLITS.index(split)])
            verdict = f"{abs(more):,} {'more' if more > 0 else 'fewer'}" if more else "equal"
            print(f"{split}: ImageNet has {expected:,} images: {verdict}")
