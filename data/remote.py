"""A shard folder at a URL (s3://, gs://, hf://, https:// and more, see data/storage.py), downloaded into the cache.

`download_shards` fetches what the manifest lists for the splits that are needed. A file gets its name only when its
sha256 is the manifest's, so a file that is there is whole, and an interrupted download resumes with the files that are
missing. The folder is named after the content of its manifest: a data set that was changed, or one that lies
elsewhere, never mixes with it.

Any number of processes may download the same folder: they share the files among them, and each returns when all are
there. Options of a storage (credentials, endpoints, anonymous access) are fsspec's own, from its configuration
files or the environment, such as FSSPEC_S3_ANON=true. Check: `pytest tests/test_remote.py`.
"""

import hashlib
import os
import random
import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tqdm import tqdm

from data.shards import MANIFEST_BYTES, array_files, parse_manifest, split_entry
from data.storage import ChecksumError, Limits, Storage, size_on_disk
from repghost.errors import UserError
from repghost.files import TEMPORARY, atomic_write, file_sha256, locked

File = dict[str, Any]  # as in the manifest: file (its name), sha256 and, for a shard, bytes

INDEX_BYTES = 2_000_000_000  # of an index, 32 for each image


def is_remote(root: object) -> bool:
    """Whether `root` is a URL and not a folder of this machine."""
    return isinstance(root, str) and "://" in root


def download_shards(url: str, cache: str | Path, splits: Sequence[str], limits: Limits | None = None) -> Path:
    """The local folder that holds the manifest, indexes and shards of `splits` of the shard folder at `url`.

    Only the manifest is fetched when all of them are there. Raises UserError for a URL without a manifest, a file that
    cannot be fetched or is not what the manifest describes, and a disk that is too small; OSError when a file cannot be
    written.
    """
    remote = Storage(url.rstrip("/"), limits or Limits())
    missing = "not there: a URL needs shards that python -m data.write_shards wrote; copy others to a local folder"
    with TemporaryDirectory() as temporary:
        local = Path(temporary, "manifest.json")
        remote.fetch("manifest.json", missing, lambda path: remote.get(path, local, MANIFEST_BYTES))
        content = local.read_bytes()
    where = f"{remote.url}/manifest.json"
    manifest = parse_manifest(content, where)
    digest = hashlib.sha256(content).hexdigest()
    entries = [split_entry(manifest, split, where) for split in splits]
    files: list[File] = [{"file": "manifest.json", "sha256": digest}]
    files += [file for entry in entries for file in (*array_files(entry), *entry["shards"])]
    if any("sha256" not in file for file in files):
        raise UserError(f"{where}: no checksums (sha256) of the shards: write the shards again")
    folder = Path(cache).expanduser() / "staged" / f"{remote.url.rpartition('/')[2] or 'shards'}-{digest[:16]}"
    (folder / "locks").mkdir(parents=True, exist_ok=True)
    _download_missing(remote, folder, files)
    return folder


def _is_there(folder: Path, file: File) -> bool:
    """Whether `folder` has the file. A shard, which is large and was checked on arrival, is known by its size."""
    path = folder / file["file"]
    size = size_on_disk(path)
    return size == file["bytes"] if "bytes" in file else size is not None and file_sha256(path) == file["sha256"]


def _download_missing(remote: Storage, folder: Path, files: Sequence[File]) -> None:
    """Downloads what is not in `folder`, several files at a time."""
    free = shutil.disk_usage(folder).free  # before what is missing is counted: others may be writing
    missing = [file for file in files if not _is_there(folder, file)]
    total = sum(file.get("bytes", 0) for file in missing)
    needed = total - sum(size_on_disk(folder / f".{file['file']}{TEMPORARY}") or 0 for file in missing)
    if needed > free:
        sizes = f"{needed / 1e9:,.1f} GB are needed for {remote.url}, {free / 1e9:,.1f} GB are free"
        raise UserError(f"{folder}: {sizes}: make room, or set data.cache to a larger disk")
    random.Random().shuffle(missing)  # processes that download the same folder begin with different files
    local_rank = os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0"))
    hidden = local_rank != "0" or not missing  # one bar a machine
    bar = tqdm(total=total, unit="B", unit_scale=True, desc=f"downloading {remote.url}", disable=hidden)
    with bar, ThreadPoolExecutor(remote.limits.connections) as pool, remote:
        futures = {pool.submit(_download, remote, file, folder): file for file in missing}
        for future in as_completed(futures):
            future.result()
            bar.update(futures[future].get("bytes", 0))


def _download(remote: Storage, file: File, folder: Path) -> None:
    """Brings one file to its place, verified, unless another process did so in the meantime."""
    size = file.get("bytes", INDEX_BYTES)

    def download(path: str) -> None:
        with atomic_write(folder / file["file"]) as output:
            remote.get(path, output.name, size)
            if file_sha256(output.name) != file["sha256"]:
                raise ChecksumError("not what manifest.json there describes: upload both again")

    lock, limit = folder / "locks" / f"{file['file']}.lock", remote.limits.longest(size)
    with locked(lock, f"downloading {file['file']}", limit, remote.stop.is_set):
        if not _is_there(folder, file):
            remote.fetch(file["file"], "not there, but the manifest lists it: upload it again", download)
