"""A shard folder at a URL (s3://, gs://, https:// and whatever else fsspec knows), staged into the cache folder.

`stage` downloads what the manifest lists for the splits that are needed, checks every file against the manifest's
sha256 and gives it its name only then: a file that is there is whole. What was begun is gone on with, by this process
or by another. A staged folder is named after the content of its manifest, so that a data set that was changed, or
one that lies elsewhere, never mixes with it.

Any number of processes may stage the same folder: each takes the files that no other has taken, and returns when all
are there. Options of a storage (credentials, endpoints, anonymous access) are fsspec's own, from its configuration
files or the environment, such as FSSPEC_S3_ANON=true. Check: `pytest tests/test_remote.py`.
"""

import errno
import hashlib
import os
import shutil
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from fsspec.asyn import AsyncFileSystem
from fsspec.config import conf
from fsspec.core import url_to_fs
from tqdm import tqdm

from data.manifest import parse_manifest, split_entry
from repghost.errors import UserError
from repghost.files import atomic_write, file_sha256

_PARTS = "parts"  # folder of unfinished files and of locks
_TEMPORARY_REFUSALS = (408, 425, 429)  # HTTP: time-out, too early, too many requests; all other 4xx are final


@dataclass(frozen=True)
class Limits:
    """How files are fetched.

    The waits between the `attempts` requests are `backoff` * 1, 2, 4, 8, 16: half a minute, and with a server that
    stalls each time three and a half. A block that arrives starts the count again.
    """

    connections: int = 8  # files at once in each process
    block: int = 16 * 2**20  # bytes of a request
    timeout: float = 30.0  # seconds without a byte (HTTP)
    slowest: float = 600.0  # seconds for a whole request
    attempts: int = 6  # requests for a block before it is given up
    backoff: float = 1.0  # seconds
    downloads: int = 3  # of a file whose checksum is wrong


@dataclass(frozen=True)
class _File:
    """A file as the manifest describes it; it does not say how many bytes an index has."""

    name: str
    sha256: str
    bytes: int | None


class _Missing(UserError):
    """There is no such file at the URL."""


class _Stopped(Exception):
    """Another file failed or the user interrupted: nobody wants this one any more."""


def is_url(root: object) -> bool:
    """Whether `root` is a URL and not a folder of this machine."""
    return isinstance(root, str) and "://" in root


def stage(url: str, cache: str | Path, splits: Sequence[str], limits: Limits | None = None) -> Path:
    """The local folder that holds the manifest, indexes and shards of `splits` of the shard folder at `url`.

    Only the manifest is fetched when all of them are there. Raises UserError for a URL without a manifest, a file that
    cannot be fetched or is not what the manifest describes, and a disk that is too small.
    """
    source = _Source(url.rstrip("/"), limits or Limits())
    content = source.read_manifest()
    where = f"{source.url}/manifest.json"
    manifest = parse_manifest(content, where)
    files = [file for split in splits for file in _listed(split_entry(manifest, split, where), where)]
    name = source.url.rpartition("/")[2] or "shards"
    folder = Path(cache).expanduser() / "staged" / f"{name}-{hashlib.sha256(content).hexdigest()[:16]}"
    try:
        (folder / _PARTS).mkdir(parents=True, exist_ok=True)
        with FileLock(folder / _PARTS / "manifest.lock"):
            if not (folder / "manifest.json").exists():
                with atomic_write(folder / "manifest.json") as file:
                    file.write(content)
        _stage_files(source, folder, files)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise UserError(f"{folder}: {error.strerror}: make room, or set data.cache to a larger disk") from None
        raise UserError(f"{error.filename or folder}: {error.strerror or error}") from None
    return folder


def _listed(entry: dict[str, Any], where: str) -> list[_File]:
    """The index and the shards of one split of the manifest."""
    try:
        shards = [_File(shard["file"], shard["sha256"], shard["bytes"]) for shard in entry["shards"]]
    except KeyError:
        raise UserError(f"{where}: no checksums (sha256) of the shards: write the shards again") from None
    return [_File(entry["index"]["file"], entry["index"]["sha256"], None), *shards]


def _is_staged(path: Path, file: _File) -> bool:
    if not path.exists():
        return False
    return file_sha256(path) == file.sha256 if file.bytes is None else path.stat().st_size == file.bytes


def _begun(folder: Path, file: _File) -> int:
    """Bytes of an unfinished file."""
    try:
        return (folder / _PARTS / f"{file.name}.part").stat().st_size
    except FileNotFoundError:  # not begun, or another process just finished it
        return 0


def _stage_files(source: "_Source", folder: Path, files: Iterable[_File]) -> None:
    free = shutil.disk_usage(folder).free  # before what is missing is counted: others may be writing
    missing = [file for file in files if not _is_staged(folder / file.name, file)]
    total = sum(file.bytes or 0 for file in missing)
    needed = total - sum(_begun(folder, file) for file in missing)
    if needed > free:
        raise UserError(
            f"{folder}: {needed / 1e9:,.1f} GB are needed for {source.url}, {free / 1e9:,.1f} GB are free: "
            "make room, or set data.cache to a larger disk"
        )
    if not missing:
        return
    with tqdm(
        total=total,
        unit="B",
        unit_scale=True,
        desc=f"staging {source.url}",
        disable=os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0")) != "0",  # one bar a machine
    ) as bar:

        def advance(count: int) -> None:
            with bar.get_lock():  # several threads
                bar.update(count)

        # First whatever nobody is fetching; then what others had taken, in case they do not finish it.
        wait = 0.0
        while missing:
            missing = _each(source, missing, partial(_stage_file, source, folder, advance, wait))
            wait = 1.0


def _each(source: "_Source", files: Sequence[_File], task: Callable[[_File], bool]) -> list[_File]:
    """Runs `task` on all files side by side; those for which it returned False."""
    with ThreadPoolExecutor(source.limits.connections) as pool:
        try:
            futures = {pool.submit(task, file): file for file in files}
            return [futures[future] for future in as_completed(futures) if not future.result()]
        except BaseException:
            source.stop.set()
            pool.shutdown(cancel_futures=True)
            raise


def _stage_file(source: "_Source", folder: Path, advance: Callable[[int], None], wait: float, file: _File) -> bool:
    """Puts one file in its place, verified. False if another process is still at it after `wait` seconds."""
    path, part = folder / file.name, folder / _PARTS / f"{file.name}.part"
    try:
        with FileLock(folder / _PARTS / f"{file.name}.lock", timeout=wait):
            if _is_staged(path, file):
                advance(file.bytes or 0)
                return True
            for _ in range(source.limits.downloads):
                _download(source, file, part, advance)
                if file_sha256(part) == file.sha256:
                    os.replace(part, path)
                    return True
                advance(-(file.bytes or 0))
                part.unlink()
    except Timeout:
        return False
    raise UserError(
        f"{source.url}/{file.name}: not the file that manifest.json there describes (checksum differs, also after "
        f"{source.limits.downloads} downloads): upload both again"
    )


def _download(source: "_Source", file: _File, part: Path, advance: Callable[[int], None]) -> None:
    """Brings `part` to its full length, from where it stands."""
    with open(part, "ab") as output:
        if file.bytes is None:
            output.truncate(0)
            output.write(source.read(file.name))
        else:
            if output.tell() > file.bytes:
                output.truncate(0)
                output.seek(0)
            advance(output.tell())
            while (have := output.tell()) < file.bytes:
                advance(output.write(source.read(file.name, have, file.bytes)))
        output.flush()
        os.fsync(output.fileno())


class _Source:
    """Files below a URL, read in blocks and with patience."""

    def __init__(self, url: str, limits: Limits) -> None:
        self.url = url
        self.limits = limits
        self.stop = threading.Event()
        protocol = url.partition("://")[0]
        options: dict[str, Any] = {}
        if protocol in ("http", "https"):
            import aiohttp  # what fsspec reads HTTP with

            timeout = aiohttp.ClientTimeout(total=None, sock_connect=limits.timeout, sock_read=limits.timeout)
            configured = conf.get(protocol, {}).get("client_kwargs", {})
            options["client_kwargs"] = {
                "trust_env": True,  # proxies of the environment, passwords of ~/.netrc
                "headers": {"Accept-Encoding": "identity"},  # ranges count the stored bytes
                **configured,
                "timeout": timeout,
            }
        try:
            self._files, self._root = url_to_fs(url, **options)
        except (ImportError, ValueError) as error:  # a package that is not installed, a protocol that nobody knows
            raise UserError(f"{url}: {error}") from None
        self._options = {"timeout": limits.slowest} if isinstance(self._files, AsyncFileSystem) else {}

    def read_manifest(self) -> bytes:
        """The bytes of manifest.json, without which nothing can be checked."""
        try:
            return self.read("manifest.json")
        except _Missing:
            raise UserError(
                f"{self.url}: no manifest.json there: a folder at a URL must be one that python -m data.write_shards "
                "wrote; copy shards of others to a local folder"
            ) from None

    def read(self, name: str, start: int | None = None, size: int | None = None) -> bytes:
        """The next block from `start` of a file of `size` bytes, or, without them, a whole file.

        A server that does not know ranges sends the whole file; then all that is left of it is returned at once.
        """
        url = f"{self.url}/{name}"
        end = None if start is None or size is None else min(start + self.limits.block, size)
        for attempt in range(self.limits.attempts):
            if self.stop.wait(self.limits.backoff * 2 ** (attempt - 1) if attempt else 0):
                raise _Stopped
            try:
                content = self._files.cat_file(f"{self._root}/{name}", start, end, **self._options)
            except Exception as error:  # every storage has exceptions of its own
                status = getattr(error, "status", 0)
                reason = " ".join(f"{type(error).__name__} {error}".split())
                if isinstance(error, FileNotFoundError):
                    raise _Missing(f"{url}: not there, but the manifest lists it: upload it again") from None
                if isinstance(error, PermissionError) or status in (401, 403):
                    raise UserError(f"{url}: access denied ({reason})") from None
                if status == 416:
                    reason = f"ends before byte {start}, the manifest says {size} bytes"
                elif 400 <= status < 500 and status not in _TEMPORARY_REFUSALS:
                    raise UserError(f"{url}: refused ({reason})") from None
            else:
                if start is None or size is None or end is None:
                    return content
                if len(content) == size:
                    return content[start:]
                if len(content) == end - start:
                    return content
                reason = f"{len(content)} bytes came instead of {end - start}"
        raise UserError(f"{url}: {reason} (given up after {self.limits.attempts} attempts): start again to go on")
