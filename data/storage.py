"""Files of a storage that fsspec knows (s3://, gs://, hf://, https:// and more), fetched one at a time, with patience.

A fault that may pass costs an attempt, one that cannot is told at once. Nothing waits for ever: neither for a server
that answers a byte now and then or not at all, nor once the user has asked to stop.
Check: `pytest tests/test_remote.py tests/test_object_stores.py`.
"""

import asyncio
import logging
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Self, TypeVar

from fsspec.asyn import get_loop, sync
from fsspec.callbacks import Callback
from fsspec.config import conf
from fsspec.core import url_to_fs
from fsspec.registry import register_implementation

from repghost.errors import DISK_FULL, UserError, chain, printable
from repghost.extras import how_to_install
from repghost.images import in_a_thread

T = TypeVar("T")

_BUCKETS = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs"}  # object stores, and fsspec's packages for them
# One connection a file, since there are several files at once: else a storage counts parts of many MB as they end.
_ONE_CONNECTION = {"s3fs": {"max_concurrency": 1}, "gcsfs": {"concurrency": 1}}
_TRANSIENT = (408, 425, 429)  # HTTP: time-out, too early, too many requests; any other 4xx is final
_FINAL = {
    "gaierror", "NoCredentialsError", "PartialCredentialsError", "DefaultCredentialsError", "OfflineModeIsEnabled",
    "HFValidationError",
}  # fmt: skip
_POLL = 0.1  # seconds


@dataclass(frozen=True)
class Limits:
    """How files are fetched.

    The waits between the attempts are `backoff` * 1, 2, 4, 8, 16: half a minute in all, and three and a half with a
    server that stalls each time. A server that is too slow is given up at once.
    """

    connections: int = 8  # files at once in each process
    timeout: float = 30.0  # seconds without a byte of the file
    slowest: float = 20_000.0  # bytes a second, on average, once `timeout` is over
    attempts: int = 6  # downloads of a file before it is given up
    backoff: float = 1.0  # seconds

    def longest(self, size: int) -> float:
        """Seconds after which a file of that many bytes is there or given up."""
        return self.attempts * (self.timeout + size / max(self.slowest, 1)) + self.backoff * 2**self.attempts


class Stopped(Exception):
    """Another file failed or the user interrupted: this one is no longer wanted."""


class ChecksumError(Exception):
    """A download is not what the manifest says, or larger."""


class StalledError(Exception):
    """A storage does not answer, or no longer, or too little of an answer to be one."""


class Storage:
    """Files below a URL. A context; at its end `stop` is set, so that what is being fetched is abandoned."""

    def __init__(self, url: str, limits: Limits) -> None:
        self.url = url
        self.limits = limits
        self.stop = threading.Event()
        protocol = url.partition("://")[0]
        self._package = _BUCKETS.get(protocol)
        try:
            options = _options(protocol, limits.timeout)
            self._files, self._root = url_to_fs(url, **options)
            if self._package == "gcsfs" and self._files.credentials.method == "anon":  # it would look for some again
                self._files, self._root = url_to_fs(url, **{**options, "token": "anon"})
        except (ImportError, ValueError) as error:  # a package that is not installed, a protocol that nobody knows
            package = self._package if isinstance(error, ImportError) else None
            raise UserError(f"{url}: {how_to_install(package) if package else error}") from None
        if hasattr(self._files, "retries"):  # s3fs's own, beside `Limits.attempts`
            self._files.retries = 1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop.set()

    def fetch(self, name: str, missing: str, action: Callable[[str], T]) -> T:
        """What `action` makes of a file's path in the storage, at the first attempt that succeeds.

        missing: what to say where there is no such file. Raises UserError that names the file.
        """
        url, begin = f"{self.url}/{name}", time.monotonic()
        for attempt in range(self.limits.attempts):
            if self.stop.wait(self.limits.backoff * 2 ** (attempt - 1) if attempt else 0):
                raise Stopped
            try:
                return action(f"{self._root}/{name}")
            except FileNotFoundError as error:
                raise UserError(f"{url}: {self._what_is_missing(error) or missing}") from None
            except Exception as error:  # every storage has exceptions of its own
                if isinstance(error, UserError):
                    raise UserError(f"{url}: {error}") from None
                if isinstance(error, Stopped) or getattr(error, "errno", None) in DISK_FULL:
                    raise
                reason = printable(" ".join(f"{type(error).__name__} {error}".split()))[:300]
                if _is_final(error):
                    raise UserError(f"{url}: refused ({reason})") from None
        seconds = time.monotonic() - begin
        given_up = f"given up after {self.limits.attempts} attempts in {seconds:.0f} s"
        raise UserError(f"{url}: {reason} ({given_up}): start again to resume")

    def get(self, path: str, target: str | Path, size: int) -> None:
        """Copies one file of the storage, which ends early at more than `size` bytes and at fewer than `slowest`."""
        limits, start = self.limits, time.monotonic()

        def check(_: object, received: int) -> None:
            """Called for every piece of the file that arrives."""
            if received > size:
                raise ChecksumError(f"more than the {size:,} bytes that are expected")
            if received < limits.slowest * (time.monotonic() - start - limits.timeout):
                raise UserError(f"slower than {limits.slowest / 1000:,.0f} kB/s: start again to resume")

        options = _ONE_CONNECTION.get(self._package or "", {})
        callback = Callback(hooks={"check": check})
        self._call("get_file", path, str(target), callback=callback, written=Path(target), **options)

    def _call(self, method: str, *arguments: Any, written: Path | None = None, **options: Any) -> Any:
        """What a method of the storage returns.

        It is abandoned once `stop` is set, which raises Stopped, and when the file `written` has not grown for
        `limits.timeout`, which raises StalledError.
        """

        async def watched() -> Any:
            if self._files.async_impl:
                action = asyncio.ensure_future(getattr(self._files, f"_{method}")(*arguments, **options))
            else:
                action = asyncio.wrap_future(in_a_thread(lambda: getattr(self._files, method)(*arguments, **options)))
            size, until = 0, time.monotonic() + self.limits.timeout
            try:
                while not action.done():
                    await asyncio.wait([action], timeout=_POLL)
                    if self.stop.is_set():
                        raise Stopped
                    if written and (grown := size_on_disk(written) or 0) != size:
                        size, until = grown, time.monotonic() + self.limits.timeout
                    if time.monotonic() > until and not action.done():
                        raise StalledError(f"no byte of it came for {self.limits.timeout:.0f} s")
                return action.result()
            finally:
                action.cancel()
                await asyncio.wait([action], timeout=1)  # a moment, in which it closes what it has open
                if action.done() and not action.cancelled():
                    action.exception()  # else asyncio would report it as one that nobody saw

        return sync(self._files.loop if self._files.async_impl else get_loop(), watched)

    def _what_is_missing(self, error: FileNotFoundError) -> str | None:
        """What is missing if it is more than a file: the bucket of an object store, or a hub's repository."""
        bucket = self._root.partition("/")[0]
        if self._package and not self._call("exists", bucket):
            return f"there is no bucket {bucket}, or these credentials do not see it"
        return str(error) if "repository not found" in str(error) or "revision not found" in str(error) else None


def size_on_disk(path: Path) -> int | None:
    """Bytes of a file; None where there is none, or no longer."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return None


# -- what each storage needs -------------------------------------------------------------------------------------------


def _options(protocol: str, timeout: float) -> dict[str, Any]:
    """What fsspec leaves to its caller: no limits and no retries beside ours, the environment's proxies."""
    configured = conf.get(protocol, {})
    if protocol in ("http", "https"):
        from aiohttp import ClientTimeout  # what fsspec reads HTTP with

        # Passwords come from ~/.netrc.
        client = {"trust_env": True, **configured.get("client_kwargs", {}), "timeout": ClientTimeout(total=None)}
        return {"client_kwargs": client}
    if _BUCKETS.get(protocol) == "s3fs":
        return {"config_kwargs": {"retries": {"max_attempts": 0}, **configured.get("config_kwargs", {})}}
    if _BUCKETS.get(protocol) == "gcsfs":
        return _options_of_google(configured, timeout)
    if protocol == "hf":
        from huggingface_hub.utils import logging as hub

        if "HF_HUB_VERBOSITY" not in os.environ:
            hub.set_verbosity_error()  # it warns of each of its own attempts
    return {}


def _options_of_google(configured: dict[str, Any], timeout: float) -> dict[str, Any]:
    from aiohttp import ClientTimeout

    gcsfs = import_module("gcsfs.core")
    if "endpoint_url" in configured or "STORAGE_EMULATOR_HOST" in os.environ:
        # gcsfs's other class would first ask for the kind of the bucket, by gRPC, which an emulator does not speak.
        for protocol in ("gs", "gcs"):
            register_implementation(protocol, gcsfs.GCSFileSystem, clobber=True)
    if "GCSFS_DEBUG" not in os.environ:
        logging.getLogger("gcsfs").setLevel(logging.ERROR)  # it warns for each file where it may not ask for the kind
    for name in ("_request", "_get_file_request"):  # without its decorator: six attempts, and a traceback in the log
        method = getattr(gcsfs.GCSFileSystem, name)
        setattr(gcsfs.GCSFileSystem, name, getattr(method, "__wrapped__", method))
    return {"requests_timeout": ClientTimeout(total=None), "retry_timeout": timeout / 3, **configured}


def _is_final(error: Exception) -> bool:
    """Whether another attempt cannot help: no permission, no or wrong credentials, no such host, most of HTTP's 4xx."""
    # aiohttp's, gcsfs's, and that of the hub's.
    status = getattr(error, "status", 0) or getattr(error, "code", 0)
    status = status or getattr(getattr(error, "response", None), "status_code", 0)
    by_status = isinstance(status, int) and 400 <= status < 500 and status not in _TRANSIENT
    by_words = str(error).startswith(("Forbidden:", "Bad Request:"))  # gcsfs's, an OSError and a ValueError
    by_name = any(type(link).__name__ in _FINAL for link in chain(error))
    return by_status or by_words or by_name or isinstance(error, PermissionError)
