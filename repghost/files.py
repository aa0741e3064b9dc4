"""How files are read (with a limit), locked, and written (whole or not at all), and tables as CSV.

Check: `pytest tests/test_checkpoint.py tests/test_faults.py`.
"""

import codecs
import csv
import errno
import fcntl
import hashlib
import io
import logging
import math
import os
import stat
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO
from unicodedata import category

from filelock import FileLock, Timeout

from repghost.errors import DISK_FULL, UserError, chain

log = logging.getLogger(__name__)

TEMPORARY = ".tmp"  # ending of files that are being written
CLASS_NAMES_BYTES = 10_000_000  # of a file of class names; WordNet's 117,659 synsets with all their words take 4
TABLE_BYTES = 100_000_000  # of a CSV file
LOCK_NOTICE = 5.0  # seconds of waiting for a lock after which a line says so
UTF_16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


@contextmanager
def atomic_write(path: str | Path, keep: str | None = None) -> Iterator[BinaryIO]:
    """Opens a temporary file beside `path`; a block that ends well leaves it at `path`, synced to the disk.

    A block that raises, or a process that dies at any moment, leaves what was at `path` before. Of several processes
    that write `path` at once the last one wins. keep: a name in the
    same folder under which what was at `path` before is kept (a death between the two renames leaves only that one).
    Raises OSError that names `path` when the disk is full.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary, file = _open_temporary(path)
    try:
        with file:
            yield file
            file.flush()
            os.fsync(file.fileno())
            # Before the file is closed, which ends its lock.
            if keep and path.exists():
                os.replace(path, path.with_name(keep))
            os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        for link in chain(error):  # torch.save raises an error of its own over that of the write
            if isinstance(link, OSError) and link.errno in DISK_FULL:
                raise OSError(link.errno, link.strerror, str(path)) from None  # a failed write does not say where
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the rename itself
    finally:
        os.close(folder)


def _open_temporary(path: Path) -> tuple[Path, BinaryIO]:
    """An empty, locked file beside `path`, with a name of its own if another process is writing the usual one."""
    for name in (path.name, f"{path.name}.{os.getpid()}"):
        temporary = path.with_name(f".{name}{TEMPORARY}")
        # Not truncated before it is known to be nobody's.
        file = open(temporary, "wb", opener=lambda name, flags: os.open(name, flags & ~os.O_TRUNC, 0o666))  # noqa: SIM115
        if _is_nobodys(file, temporary):
            file.truncate(0)
            return temporary, file
        file.close()
    raise OSError(errno.EBUSY, "other processes write it", str(path))


def _is_nobodys(file: BinaryIO, path: Path) -> bool:
    """Locks an open temporary file; False if its writer lives or has renamed it. A file system without locks trusts."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except OSError as error:
        return error.errno not in (errno.EAGAIN, errno.EACCES, errno.ENOENT)


@contextmanager
def locked(path: str | Path, what: str, limit: float, cancelled: Callable[[], bool] | None = None) -> Iterator[None]:
    """Holds the lock file `path`, so that one process at a time is `what` ("indexing the same shards").

    The lock of a process that died is free. One that is held is waited for, which a line says after LOCK_NOTICE
    seconds, for `limit` seconds at most. Raises UserError then and where a file system has no locks, and filelock's
    Timeout once `cancelled`.
    """
    lock = FileLock(path)
    try:
        try:
            lock.acquire(min(LOCK_NOTICE, limit), cancel_check=cancelled)
        except Timeout:
            if limit > LOCK_NOTICE and not (cancelled and cancelled()):
                log.warning("waiting for another process, which is %s (it holds %s)", what, path)
            lock.acquire(max(0.0, limit - LOCK_NOTICE), cancel_check=cancelled)
    except Timeout:
        if cancelled and cancelled():
            raise
        raise UserError(f"{path}: held for {limit:,.0f} s by another process, which is {what}: end it first") from None
    except OSError as error:
        if error.filename is not None:
            raise
        raise UserError(f"{path}: cannot be locked ({error.strerror}): use a folder of another file system") from None
    try:
        yield
    finally:
        lock.release()


def remove_leftovers(folder: str | Path) -> None:
    """Removes what writers that were killed left under `folder`."""
    for path in Path(folder).rglob(f".*{TEMPORARY}"):
        with suppress(OSError), open(path, "r+b") as file:
            if _is_nobodys(file, path):
                path.unlink()


def require_writable(path: str | Path, key: str) -> None:
    """Raises UserError that names `key` unless a file can be written at `path`; leaves nothing behind.

    For the beginning of a command, so that what cannot be written is found before the work.
    """
    path = Path(path)
    made: list[Path] = []
    try:
        made += [folder for folder in path.parents if not folder.exists()]
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, "is a folder")
        for attempt in range(10):
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                with tempfile.TemporaryFile(dir=path.parent):
                    break
            except FileNotFoundError:  # another command that finds out the same has removed the folder again
                if attempt == 9:
                    raise
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}): give another {key}=...") from None
    finally:
        for folder in made:
            with suppress(OSError):
                folder.rmdir()


def write_text(path: str | Path, text: str) -> None:
    """Writes `text` (UTF-8) by `atomic_write`."""
    with atomic_write(path) as file:
        file.write(text.encode())


def file_sha256(path: str | Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def regular_file(path: str | os.PathLike[str]) -> os.stat_result:
    """The status of a regular file.

    Raises OSError for anything else: opening a pipe or reading a device may wait or go on for ever.
    """
    status = os.stat(path)
    if stat.S_ISDIR(status.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), os.fspath(path))
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "not a regular file", os.fspath(path))
    return status


def read_file(path: str | os.PathLike[str], limit: int) -> bytes:
    """The content of a regular file of at most `limit` bytes. Raises OSError for what cannot be read or is more."""
    size = regular_file(path).st_size
    if size > limit:
        raise OSError(errno.EINVAL, f"larger than {limit / 1e6:,.0f} MB", os.fspath(path))
    with open(path, "rb") as file:
        return file.read(size)


def read_class_names(path: Path) -> list[str]:
    """The class names in a text file, one a line; spaces around them and blank lines do not count.

    The file is UTF-8, or UTF-16 with a byte order mark. Two classes may have the same name, as in lists of ImageNet's,
    with its two cranes. Raises UserError for a file that cannot be read, and a name that does not fit on a line.
    """
    try:
        content = read_file(path.expanduser(), CLASS_NAMES_BYTES)
        text = content.decode("utf-16" if content.startswith(UTF_16) else "utf-8-sig")
    except UnicodeDecodeError:
        raise UserError(f"{path}: not UTF-8 text with a class name on each line") from None
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    names = []
    for number, line in enumerate(text.replace("\r\n", "\n").replace("\r", "\n").split("\n"), 1):
        if name := line.strip():
            if any(category(c) in ("Cc", "Zl", "Zp") for c in name):  # control characters, separators of lines
                raise UserError(f"{path}: line {number} is {name[:40]!a}, not a name that can be printed")
            names.append(name)
    return names


def read_table(path: str | Path, columns: Collection[str], what: str) -> list[dict[str, str]]:
    """The rows of a CSV file, none when there is no such file; a cell that a row lacks is empty.

    Raises UserError for a file that is no table, or lacks one of `columns`.
    """
    if not Path(path).exists():
        return []
    try:
        text = read_file(path, TABLE_BYTES).decode("utf-8-sig")
        reader = csv.DictReader(io.StringIO(text, newline=""), restval="", strict=True)
        if missing := set(columns) - set(reader.fieldnames or ()):
            raise UserError(f"{path}: not a table of {what}, it has no column {min(missing)}")
        return list(reader)
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: not a table of {what} in UTF-8 ({error})") from None


def require_number(cell: str, where: str, number: Callable[[str], float] = float) -> None:
    """Raises UserError that says where for a cell of a table that is no finite number."""
    try:
        finite = math.isfinite(number(cell))
    except (ValueError, OverflowError):
        finite = False
    if not finite:
        raise UserError(f"{where} is {cell!r}, not {'a number' if number is float else 'a whole number'}")


def rows_as_csv(rows: Sequence[Mapping[str, Any]], columns: Sequence[str] | None = None) -> str:
    """CSV text with a header of `columns`, by default the keys of the first row; a cell that a row lacks is empty.

    Floats are written in full, so that equal files mean equal runs.
    """
    text = io.StringIO()
    writer = csv.DictWriter(text, columns or list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
