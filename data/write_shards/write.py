"""Images to shards: webdataset tars in a random order, with an index and a manifest.

    python -m data.write_shards folder IMAGES SHARDS
    python -m data.write_shards archives ILSVRC2012_img_{train,val}.tar ILSVRC2012_devkit_t12.tar.gz SHARDS
    python -m data.write_shards kaggle KAGGLE SHARDS
    python -m data.write_shards parquet IMAGENET-1K SHARDS

Shard i holds the images permutation[i * S : (i + 1) * S] of one permutation drawn from the seed, one task a
shard, so the bytes are the same for any number of processes. Images are stored as they are and each one is
decoded once, so that a damaged file is found here and not in training. Started again, the same command goes
on: finished shards are kept, missing or truncated ones are written again. SHARDS then holds train-000000.tar
..., train.index.npy, the same for val, manifest.json and parts/ (one record for each shard, needed only to go
on). Every option's meaning: `python -m data.write_shards FORMAT --help`.

Check: `pytest tests/test_write_shards.py`.
"""

import json
import re
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout
from numpy.random import Philox
from tqdm import tqdm

from data.manifest import FORMAT
from data.parallel import available_cpus, run_parallel
from data.tars import SAMPLE
from data.write_shards.folder import list_folder
from data.write_shards.shard import Options, Shard, Task, finished_shard, write_shard
from data.write_shards.source import SPLITS, Listing, Source
from repghost.errors import UserError
from repghost.files import TEMPORARY, atomic_write, file_sha256, write_text

IMAGES_PER_SHARD = 1252  # ImageNet: 1,024 training shards of about 137 MB and 40 for validation
IMAGENET_IMAGES = {"train": 1_281_167, "val": 50_000}

_SHARD_STREAM = 2  # Philox counter's highest word; 0 and 1 belong to data.sampling


def write_folder(source: str | Path, out: str | Path, split: str | None = None, **options: Any) -> dict[str, Any]:
    """Shards from class folders: `split` as in `list_folder`, `options` and result as in `write_shards`."""
    return write_shards(list_folder(source, split), out, **options)


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

    resize: length in pixels to which a longer shorter side is brought (bicubic), stored as JPEG of `quality`;
    smaller images stay as they are. skip_bad: how many images that do not decode may be left out; the one
    after ends the run. Raises UserError, and OSError when a file cannot be read or written.
    """
    out = Path(out)
    options = Options(images_per_shard, seed, resize, quality if resize else None)
    parts = out / "parts"
    if not parts.exists() and out.exists() and next(out.iterdir(), None) is not None:
        raise UserError(f"{out}: not empty, and not begun by this program: choose a new folder")
    parts.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(parts / "lock", timeout=0):
            _check_plan(out, listing, options)
            for leftover in out.rglob(f".*{TEMPORARY}"):  # of a run that was killed
                leftover.unlink()
            written = _write_all(listing, out, options, workers or available_cpus(), skip_bad, quiet)
            manifest = _finish(listing, out, options, written)
    except Timeout:
        raise UserError(f"{out}: another process is writing there") from None
    if not quiet:
        _report(listing, manifest, written)
    return manifest


def _check_plan(out: Path, listing: Listing, options: Options) -> None:
    """Shards of different runs must not mix: what decides their order is written down first."""
    path = out / "parts" / "plan.json"
    sources = {source.split: source.digest() for source in listing.sources}
    now = {"shuffle": listing.shuffle, **asdict(options)}
    plan = {"options": now, "classes": list(listing.classes), "sources": sources}
    if path.exists():
        plan = json.loads(path.read_text(encoding="utf-8"))
        for name, earlier in plan["options"].items():
            if earlier != now[name]:
                raise UserError(f"{out}: begun with {name} {earlier}, now {now[name]}: keep it or use a new OUT")
        if plan["classes"] != list(listing.classes):
            differing = sorted(set(plan["classes"]) ^ set(listing.classes)) or ["their order"]
            raise UserError(f"{out}: begun with other classes (differing: {differing[0]}): use a new folder")
        for split, digest in sources.items():
            if plan["sources"].setdefault(split, digest) != digest:
                raise UserError(f"{out}: begun with other images in {split}: restore them or use a new folder")
    write_text(path, json.dumps(plan))


def _order(source: Source, split_number: int, options: Options) -> np.ndarray:
    """int64 [N]: the order in which the images of a split are stored.

    A permutation of all images. Rows of Parquet files cannot be read one by one, so there the row groups are
    permuted, the rows inside each, and then the images of each shard; a shard reads few row groups and yet
    mixes several.
    """
    count = len(source)
    draws = Philox(key=[options.seed, split_number], counter=[0, 0, 0, _SHARD_STREAM]).random_raw(3 * count)
    image_draw, group_draw, second_draw = draws.reshape(3, count)
    if source.kind != "parquet":
        return np.argsort(image_draw, kind="stable")
    order = np.lexsort((image_draw, group_draw[source.table["group"]]))
    return order[np.lexsort((second_draw, np.arange(count) // options.images_per_shard))]


def _tasks(source: Source, split_number: int, out: Path, options: Options, skip_bad: int) -> Iterator[Task]:
    order = _order(source, split_number, options)
    for shard, start in enumerate(range(0, len(order), options.images_per_shard)):
        chosen = order[start : start + options.images_per_shard]
        rows = source.table[chosen]
        name = f"{source.split}-{shard:06d}"
        yield Task(
            path=out / f"{name}.tar",
            record=out / "parts" / f"{name}.npz",
            kind=source.kind,
            files=[source.files[i] for i in rows["file"]],
            offsets=rows["offset"].tolist(),
            sizes=rows["size"].tolist(),
            labels=rows["label"].tolist(),
            keys=[source.keys[i] for i in chosen],
            options=options,
            skip_bad=skip_bad,
        )


def _write_all(
    listing: Listing, out: Path, options: Options, workers: int, skip_bad: int, quiet: bool
) -> dict[str, list[Shard]]:
    """The shards of every split, in order; those that are already there are not written again."""
    tasks = {
        source.split: list(_tasks(source, SPLITS.index(source.split), out, options, skip_bad))
        for source in listing.sources
    }
    shards: dict[Path, Shard] = {}
    todo: list[Task] = []
    for task in (task for tasks_of_split in tasks.values() for task in tasks_of_split):
        if (shard := finished_shard(task)) is None:
            todo.append(task)
        else:
            shards[task.path] = shard
    total = sum(len(source) for source in listing.sources)
    done = total - sum(len(task.keys) for task in todo)
    _check_budget(shards.values(), skip_bad)
    with (
        tqdm(total=total, initial=done, unit="images", desc="writing shards", disable=quiet) as bar,
        closing(run_parallel(write_shard, todo, min(workers, len(todo)))) as results,
    ):
        for number, shard in results:
            shards[todo[number].path] = shard
            bar.update(len(todo[number].keys))
            _check_budget(shards.values(), skip_bad)
    return {split: [shards[task.path] for task in tasks[split]] for split in tasks}


def _check_budget(shards: Iterable[Shard], skip_bad: int) -> None:
    skipped = [key for shard in shards for key in shard.skipped]
    if len(skipped) > skip_bad:
        raise UserError(f"{len(skipped)} images do not decode, more than --skip-bad {skip_bad}: {', '.join(skipped)}")


def _finish(listing: Listing, out: Path, options: Options, written: dict[str, list[Shard]]) -> dict[str, Any]:
    """Writes the index of each split and, last of all, the manifest."""
    path = out / "manifest.json"
    splits = json.loads(path.read_text(encoding="utf-8"))["splits"] if path.exists() else {}
    for split, shards in written.items():
        rows = np.concatenate([shard.rows for shard in shards])
        rows["shard"] = np.repeat(np.arange(len(shards)), [len(shard.rows) for shard in shards])
        assert rows.dtype == SAMPLE, rows.dtype
        name = f"{split}.index.npy"
        with atomic_write(out / name) as file:
            np.save(file, rows)
        splits[split] = {
            "images": len(rows),
            "images_per_class": np.bincount(rows["label"], minlength=len(listing.classes)).tolist(),
            "skipped": [key for shard in shards for key in shard.skipped],
            "index": {"file": name, "sha256": file_sha256(out / name)},
            "shards": [
                {"file": f"{split}-{i:06d}.tar", "images": len(s.rows), "bytes": s.bytes, "sha256": s.sha256}
                for i, s in enumerate(shards)
            ],
        }
    manifest = {
        "format": FORMAT,
        "shuffle": listing.shuffle,
        **asdict(options),
        "classes": list(listing.classes),
        "splits": {split: splits[split] for split in SPLITS if split in splits},
    }
    write_text(path, json.dumps(manifest, indent=1))
    return manifest


def _report(listing: Listing, manifest: dict[str, Any], written: dict[str, list[Shard]]) -> None:
    imagenet = len(listing.classes) == 1000 and all(re.fullmatch(r"n\d{8}", name) for name in listing.classes)
    for source in listing.sources:
        split = source.split
        entry = manifest["splits"][split]
        counts = np.array(entry["images_per_class"])
        size = sum(shard["bytes"] for shard in entry["shards"])
        print(
            f"{split}: {entry['images']:,} images in {len(entry['shards']):,} shards, {size / 1e9:,.3f} GB; "
            f"{len(counts):,} classes of {counts.min():,} to {counts.max():,} images "
            f"(median {np.median(counts):,.0f})"
        )
        for number, what in (
            (source.ignored, "files without an image's extension ignored"),
            (len(entry["skipped"]), "images skipped because they do not decode"),
            (sum(shard.converted for shard in written[split]), "images of other formats converted to PNG"),
        ):
            if number:
                print(f"{split}: {number:,} {what}")
        if imagenet:
            difference = entry["images"] - IMAGENET_IMAGES[split]
            verdict = f"{abs(difference):,} {'more' if difference > 0 else 'fewer'}" if difference else "equal"
            print(f"{split}: ImageNet has {IMAGENET_IMAGES[split]:,} images: {verdict}")
