"""A shard folder at a URL (s3://, gs://, https:// and whatever else fsspec knows), downloaded into the cache folder.

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
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

from fsspec.callbacks import Callback
from fsspec.config import conf
from fsspec.core import url_to_fs
from tqdm import tqdm

from data.shards import MANIFEST_BYTES, parse_manifest, split_entry
from repghost.errors import DISK_FULL, UserError, chain, printable
from repghost.extras import how_to_install
from repghost.files import TEMPORARY, atomic_write, file_sha256, locked

T = TypeVar("T")
File = dict[str, Any]  # as in the manifest: file (its name), sha256 and, for a shard, bytes

INDEX_BYTES = 2_000_000_000  # of an index, 32 for each image
_BUCKETS = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs"}  # object stores, and fsspec's packages for them
_TRANSIENT = (408, 425, 429)  # HTTP: time-out, too early, too many requests; any other 4xx is final


@dataclass(frozen=True)
class Limits:
    """How files are fetched.

    The waits between the attempts are `backoff` * 1, 2, 4, 8, 16: half a minute in all, and three and a half with a
    server that stalls each time. A server that is too slow is given up at once.
    """

    connections: int = 8  # files at once in each process
    timeout: float = 30.0  # seconds without a byte (HTTP)
    slowest: float = 20_000.0  # bytes a second, on average, once `timeout` is over
    attempts: int = 6  # downloads of a file before it is given up
    backoff: float = 1.0  # seconds

    def longest(self, size: int) -> float:
        """Seconds after which a file of that many bytes is there or given up."""
        return self.attempts * (self.timeout + size / max(self.slowest, 1)) + self.backoff * 2**self.attempts


class _Stopped(Exception):
    """Another file failed or the user interrupted: this one is no longer wanted."""


class ChecksumError(Exception):
    """A download is not what the manifest says, or larger."""


def is_remote(root: object) -> bool:
    """Whether `root` is a URL and not a folder of this machine."""
    return isinstance(root, str) and "://" in root


def download_shards(url: str, cache: str | Path, splits: Sequence[str], limits: Limits | None = None) -> Path:
    """The local folder that holds the manifest, indexes and shards of `splits` of the shard folder at `url`.

    Only the manifest is fetched when all of them are there. Raises UserError for a URL without a manifest, a file that
    cannot be fetched or is not what the manifest describes, and a disk that is too small; OSError when a file cannot be
    written.
    """
    remote = _Remote(url.rstrip("/"), limits or Limits())
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
    files += [file for entry in entries for file in (entry["index"], *entry["shards"])]
    if any("sha256" not in file for file in files):
        raise UserError(f"{where}: no checksums (sha256) of the shards: write the shards again")
    folder = Path(cache).expanduser() / "staged" / f"{remote.url.rpartition('/')[2] or 'shards'}-{digest[:16]}"
    (folder / "locks").mkdir(parents=True, exist_ok=True)
    _download_missing(remote, folder, files)
    return folder


def _size(path: Path) -> int | None:
    """Bytes of a file; None where there is none, or no longer."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return None


def _is_there(folder: Path, file: File) -> bool:
    """Whether `folder` has the file. A shard, which is large and was checked on arrival, is known by its size."""
    path = folder / file["file"]
    size = _size(path)
    return size == file["bytes"] if "bytes" in file else size is not None and file_sha256(path) == file["sha256"]


def _download_missing(remote: "_Remote", folder: Path, files: Sequence[File]) -> None:
    """Downloads what is not in `folder`, several files at a time."""
    free = shutil.disk_usage(folder).free  # before what is missing is counted: others may be writing
    missing = [file for file in files if not _is_there(folder, file)]
    total = sum(file.get("bytes", 0) for file in missing)
    needed = total - sum(_size(folder / f".{file['file']}{TEMPORARY}") or 0 for file in missing)
    if needed > free:
        sizes = f"{needed / 1e9:,.1f} GB are needed for {remote.url}, {free / 1e9:,.1f} GB are free"
        raise UserError(f"{folder}: {sizes}: make room, or set data.cache to a larger disk")
    random.Random().shuffle(missing)  # processes that download the same folder begin with different files
    local_rank = os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0"))
    hidden = local_rank != "0" or not missing  # one bar a machine
    bar = tqdm(total=total, unit="B", unit_scale=True, desc=f"downloading {remote.url}", disable=hidden)
    with bar, ThreadPoolExecutor(remote.limits.connections) as pool:
        futures = {pool.submit(remote.download, file, folder): file for file in missing}
        try:
            for future in as_completed(futures):
                future.result()
                bar.update(futures[future].get("bytes", 0))
        finally:
            remote.stop.set()


class _Remote:
    """Files below a URL, fetched with patience."""

    def __init__(self, url: str, limits: Limits) -> None:
        self.url = url
        self.limits = limits
        self.stop = threading.Event()
        self._protocol = url.partition("://")[0]
        try:
            self.storage, self._root = url_to_fs(url, **self._options())
        except (ImportError, ValueError) as error:  # a package that is not installed, a protocol that nobody knows
            package = _BUCKETS.get(self._protocol) if isinstance(error, ImportError) else None
            raise UserError(f"{url}: {how_to_install(package) if package else error}") from None
        if hasattr(self.storage, "retries"):  # s3fs's own, beside `Limits.attempts`
            self.storage.retries = 1

    def _options(self) -> dict[str, Any]:
        """What fsspec leaves to its caller: limits for silence, no retries beside ours, the environment's proxies."""
        seconds, configured = self.limits.timeout, conf.get(self._protocol, {})
        if self._protocol in ("http", "https"):
            from aiohttp import ClientTimeout  # what fsspec reads HTTP with

            limit = ClientTimeout(total=None, sock_connect=seconds, sock_read=seconds)
            # Passwords come from ~/.netrc.
            return {"client_kwargs": {"trust_env": True, **configured.get("client_kwargs", {}), "timeout": limit}}
        if self._protocol in ("s3", "s3a"):
            limits = {"connect_timeout": seconds, "read_timeout": seconds, "retries": {"max_attempts": 0}}
            return {"config_kwargs": {**limits, **configured.get("config_kwargs", {})}}
        return {}

    def download(self, file: File, folder: Path) -> None:
        """Brings one file to its place, verified, unless another process did so in the meantime."""

        size = file.get("bytes", INDEX_BYTES)

        def download(path: str) -> None:
            with atomic_write(folder / file["file"]) as output:
                self.get(path, output.name, size)
                if file_sha256(output.name) != file["sha256"]:
                    raise ChecksumError("not what manifest.json there describes: upload both again")

        lock, limit = folder / "locks" / f"{file['file']}.lock", self.limits.longest(size)
        with locked(lock, f"downloading {file['file']}", limit, self.stop.is_set):
            if not _is_there(folder, file):
                self.fetch(file["file"], "not there, but the manifest lists it: upload it again", download)

    def get(self, path: str, target: str | Path, size: int) -> None:
        """Copies one file of the storage, which ends early at more than `size` bytes and at fewer than `slowest`."""
        limits, start = self.limits, time.monotonic()

        def check(_: object, received: int) -> None:
            """Called for every piece of the file that arrives."""
            if self.stop.is_set():
                raise _Stopped
            if received > size:
                raise ChecksumError(f"more than the {size:,} bytes that are expected")
            if received < limits.slowest * (time.monotonic() - start - limits.timeout):
                raise UserError(f"slower than {limits.slowest / 1000:,.0f} kB/s: start again to resume")

        self.storage.get_file(path, str(target), callback=Callback(hooks={"check": check}))

    def fetch(self, name: str, missing: str, action: Callable[[str], T]) -> T:
        """What `action` makes of a file's path in the storage, at the first attempt that succeeds."""
        url = f"{self.url}/{name}"
        for attempt in range(self.limits.attempts):
            if self.stop.wait(self.limits.backoff * 2 ** (attempt - 1) if attempt else 0):
                raise _Stopped
            try:
                return action(f"{self._root}/{name}")
            except FileNotFoundError:
                raise UserError(f"{url}: {self._no_bucket() or missing}") from None
            except Exception as error:  # every storage has exceptions of its own
                if isinstance(error, UserError):
                    raise UserError(f"{url}: {error}") from None
                if isinstance(error, _Stopped) or getattr(error, "errno", None) in DISK_FULL:
                    raise
                reason = printable(" ".join(f"{type(error).__name__} {error}".split()))[:300]
                if _is_final(error):
                    raise UserError(f"{url}: refused ({reason})") from None
        raise UserError(f"{url}: {reason} (given up after {self.limits.attempts} attempts): start again to resume")

    def _no_bucket(self) -> str | None:
        """What is missing of an object store if not even the bucket is there."""
        bucket = self._root.partition("/")[0]
        if self._protocol in _BUCKETS and not self.storage.exists(bucket):
            return f"there is no bucket {bucket}, or these credentials do not see it"
        return None


def _is_final(error: Exception) -> bool:
    """Whether another attempt cannot help: no permission, no or wrong credentials, no such host, most of HTTP's 4xx."""
    status = getattr(error, "status", 0)
    if isinstance(error, PermissionError) or (400 <= status < 500 and status not in _TRANSIENT):
        return True
    names = {type(link).__name__ for link in chain(error)}
    return bool(names & {"gaierror", "NoCredentialsError", "PartialCredentialsError", "DefaultCredentialsError"})
