"""What a command says to the person who started it: the one line for a mistake, with its exit code.

A mistake of the user (a UserError, a key that Hydra or OmegaConf refuses, a file that cannot be written, a full disk)
ends every command in one line on stderr and exit code 2. Anything else is a defect of ours and keeps its traceback.
"""

import errno
import sys
from collections.abc import Callable, Iterator
from typing import TextIO
from unicodedata import category

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class UserError(ValueError):
    """A mistake in a command, a file or a data set. One line: what is wrong, where, and what to do."""


def printable(text: str, stream: TextIO | None = None) -> str:
    """`text` on one line, in characters that a terminal shows and does not obey.

    All others (line breaks, escape sequences, the surrogates of file names that are no UTF-8) are escaped as in a
    Python string. stream: where the text goes, whose encoding may lack more; by default any stream of UTF-8.
    """
    if not text.isprintable():
        text = "".join(c if c.isprintable() or category(c) == "Zs" else ascii(c)[1:-1] for c in text)
    encoding = (stream and stream.encoding) or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


def run_command(command: Callable[[], int | None]) -> int:
    """Calls `command` and returns the program's exit code: its own (None is 0), 2 for a mistake, 130 for Ctrl-C."""
    try:
        return command() or 0
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        return 130
    except Exception as error:
        line = user_message(error)
        if line is None:
            raise
        print(f"error: {printable(line)}", file=sys.stderr, flush=True)
        return 2


def print_rank_zero(text: str) -> None:
    """Prints on the first rank only."""
    from pytorch_lightning.utilities.rank_zero import rank_zero_only  # which commands without ranks do not need

    rank_zero_only(print)(text, flush=True)


def user_message(error: BaseException) -> str | None:
    """The one line for a mistake of the user, None for a defect."""
    links = list(chain(error))
    for link in links:
        if isinstance(link, UserError):
            return str(link)
        if isinstance(link, OSError) and link.errno in DISK_FULL:
            return (
                f"{link.filename or 'a file'}: {link.strerror}: free some space, start again; nothing is half written"
            )
        if isinstance(link, RuntimeError) and str(link).startswith("DataLoader worker (pid"):
            # Raised by torch's handler of a signal, wherever the program is.
            return (
                f"{_first_line(link)} Was it killed for memory? Fewer data.workers or a smaller data.prefetch take less"
            )
        if type(link).__name__ == "MissingMandatoryValue" and _of_the_config(link):
            return f"{_first_line(link)} (give it on the command line: KEY=VALUE)"
    if _of_the_config(error) and (_of_the_config(links[-1]) or isinstance(links[-1], TypeError)):
        hint = "; --cfg job lists all keys" if "override" in str(error) else ""
        return f"{_first_line(error)} {_first_line(links[-1])}".strip() + hint
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return None


def chain(error: BaseException) -> Iterator[BaseException]:
    """`error`, what it came from, and so on."""
    link: BaseException | None = error
    while link is not None:
        yield link
        link = link.__cause__ or link.__context__


def _of_the_config(error: BaseException) -> bool:
    """Whether Hydra or OmegaConf raised it; told by name, since most commands need neither."""
    return type(error).__module__.partition(".")[0] in ("hydra", "omegaconf")


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), "")


def first_sentence(error: BaseException) -> str:
    """What other libraries' errors begin with, on one line."""
    return " ".join(str(error).split()).split(". ")[0] or type(error).__name__
