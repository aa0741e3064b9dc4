"""How files are written: whole or not at all, and tables as CSV. Check: `pytest tests/test_checkpoint.py`."""

import csv
import errno
import hashlib
import io
import os
import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from repghost.errors import DISK_FULL, UserError, chain

TEMPORARY = ".tmp"  # ending of files that are being written


@contextmanager
def atomic_write(path: str | Path, keep: str | None = None) -> Iterator[BinaryIO]:
    """Opens a temporary file beside `path`; a block that ends well leaves it at `path`, synced to the disk.

    A block that raises, or a process that dies at any moment, leaves what was at `path` before. keep: a name in the
    same folder under which what was at `path` before is kept (a death between the two renames leaves only that one).
    Raises OSError that names `path` when the disk is full.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}{TEMPORARY}")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
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


def remove_leftovers(folder: str | Path) -> None:
    """Removes what writers that were killed left under `folder`."""
    for path in Path(folder).rglob(f".*{TEMPORARY}"):
        path.unlink(missing_ok=True)


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
        raise UserError(f"{key}={path}: cannot be written ({error.strerror}): give another {key}=...") from None
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


def read_class_names(path: Path) -> list[str]:
    """The class names in a text file, one a line; blank lines do not count. Raises UserError for an unreadable file."""
    try:
        lines = path.expanduser().read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError:
        raise UserError(f"{path}: not UTF-8 text with a class name on each line") from None
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    return [line.strip() for line in lines if line.strip()]


def read_table(path: str | Path, columns: Collection[str], what: str) -> list[dict[str, str]]:
    """The rows of a CSV file, none when there is no such file. Raises UserError when it lacks one of `columns`."""
    if not Path(path).exists():
        return []
    with open(path, newline="") as file:
        reader = csv.DictReader(file)
        if missing := set(columns) - set(reader.fieldnames or ()):
            raise UserError(f"{path}: not a table of {what}, it has no column {min(missing)}")
        return list(reader)


def rows_as_csv(rows: Sequence[Mapping[str, Any]], columns: Sequence[str] | None = None) -> str:
    """CSV text with a header of `columns`, by default the keys of the first row; a cell that a row lacks is empty.

    Floats are written in full, so that equal files mean equal runs.
    """
    text = io.StringIO()
    writer = csv.DictWriter(text, columns or list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
