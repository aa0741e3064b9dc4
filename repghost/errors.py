"""What a command says to the person who started it: one line for a mistake or a signal, with its exit code.

A mistake of the user (a UserError, a key that Hydra or OmegaConf refuses, a file that cannot be written, a full disk)
ends every command in one line on stderr and exit code 2. SIGINT (Ctrl-C) and SIGTERM end it in one line with 130 and
143, wherever the program is; a reader that closes the pipe (`| head`) ends it without a word, with 141. Anything else
is a defect of ours and keeps its traceback. Check: `pytest tests/test_commands.py`.
"""

import atexit
import errno
import io
import os
import select
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any, TextIO
from unicodedata import category

from repghost.extras import how_to_install

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

_SECONDS_TO_END = 15  # after a signal; the kernel ends a program that is stuck
_ended_by: int | None = None  # the signal that ends this process, once one came


class UserError(ValueError):
    """A mistake in a command, a file or a data set. One line: what is wrong, where, and what to do."""


class StoppedTogether(SystemExit):
    """The end of one of several ranks that all of them agreed on, between the same two batches."""


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
    """Calls `command` and returns the program's exit code: its own (None is 0), or one of those above."""
    _prepare_streams()
    with ended_by_signals():
        try:
            try:
                code = command() or 0
            finally:
                sys.stdout.flush()
        except BaseException as error:
            if _ended_by is None:  # else, what goes wrong while a program ends is a consequence
                code = _code_of(error)
        return code if _ended_by is None else 128 + _ended_by


def _code_of(error: BaseException) -> int:
    """Tells the user what went wrong; returns the exit code. Raises `error` again if it is a defect."""
    if isinstance(error, KeyboardInterrupt):
        line, code = "interrupted", 128 + signal.SIGINT
    elif isinstance(error, BrokenPipeError) and _leave_closed_pipes():
        return 128 + signal.SIGPIPE
    elif isinstance(error, Exception) and (message := user_message(error)) is not None:
        line, code = f"error: {printable(message)}", 2
    else:
        raise error
    with suppress(OSError):  # nobody may be left to read it
        print(line, file=sys.stderr, flush=True)
    _leave_full_disks()
    return code


@contextmanager
def ended_by_signals(quiet: bool = False) -> Iterator[None]:
    """A context in which SIGINT and SIGTERM raise SystemExit wherever the program is, after one line unless `quiet`.

    More of them change nothing then, and a program that is stuck is ended by the kernel. Signals that are ignored, as
    nohup wants, or that have another handler already are left alone.
    """
    global _ended_by
    process = os.getpid()

    def end(number: int, frame: FrameType | None) -> None:
        global _ended_by
        if os.getpid() != process:  # a forked worker inherits the handler
            os._exit(128 + number)
        if _ended_by is None:
            _ended_by = number
            signal.alarm(_SECONDS_TO_END)
            sys.unraisablehook = lambda _: None  # what is interrupted in a destructor or callback
            if not quiet:
                _say_signal(number)
            raise SystemExit(128 + number)

    before = _replace_default_handlers(end)
    if before:
        _ended_by = None
    try:
        yield
    finally:
        if _ended_by is None:
            for number, handler in before.items():
                signal.signal(number, handler)
        if before:
            atexit.register(_replace_default_handlers, _end_at_once)


def _replace_default_handlers(handler: Callable[[int, FrameType | None], None]) -> dict[int, Any]:
    """Lets `handler` have SIGINT and SIGTERM where nobody else handles them; returns the handlers before."""
    if threading.current_thread() is not threading.main_thread():
        return {}  # signals are the main thread's
    default = (signal.SIG_DFL, signal.default_int_handler, _end_at_once)
    numbers = [number for number in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(number) in default]
    return {number: signal.signal(number, handler) for number in numbers}


def end_at_once_on_signals() -> None:
    """SIGINT and SIGTERM end the program in one line from now on, until `run_command` takes over.

    For programs whose modules take a moment to import, in which Ctrl-C would be a traceback.
    """
    _replace_default_handlers(_end_at_once)


def _end_at_once(number: int, frame: FrameType | None) -> None:
    """For the time in which Python starts or ends, and has nothing that could be interrupted."""
    _say_signal(number)
    os._exit(128 + number)


def _say_signal(number: int) -> None:
    line = "interrupted" if number == signal.SIGINT else f"ended by {signal.Signals(number).name}"
    with suppress(OSError):
        os.write(2, f"{line}\n".encode())  # not by print, since what the signal interrupted may be a print


def _prepare_streams() -> None:
    """Lets any text be printed in any locale, and streams that the caller closed lead nowhere.

    The next file that is opened would take the descriptor of a closed stream, and what is printed.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115  # as long as the program
        elif mode == "w" and isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _leave_closed_pipes() -> bool:
    """Whether nobody reads stdout or stderr any more: they lead nowhere then, since Python flushes them at the end."""
    poll = select.poll()
    for descriptor in (1, 2):
        poll.register(descriptor, 0)  # errors are always reported
    closed = [descriptor for descriptor, event in poll.poll(0) if event & select.POLLERR]
    for descriptor in closed:
        os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)
    return bool(closed)


def _leave_full_disks() -> None:
    """Lets stdout and stderr lead nowhere if they take no more: Python flushes them at the end, and its code is 120."""
    for stream, descriptor in ((sys.stdout, 1), (sys.stderr, 2)):
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)


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
        if isinstance(link, ModuleNotFoundError) and (line := how_to_install(link.name or "")):
            return line
        if isinstance(link, OSError) and link.errno in DISK_FULL:
            return (
                f"{link.filename or 'a file'}: {link.strerror}: free some space, start again; nothing is half written"
            )
        if isinstance(link, RuntimeError) and str(link).startswith("DataLoader worker (pid"):
            # Raised by torch's handler of a signal, wherever the program is.
            return (
                f"{_first_line(link)} Was it killed for memory? Fewer data.workers or a smaller data.prefetch take less"
            )
        if isinstance(link, RuntimeError) and "determine home directory" in str(link):  # of Path.expanduser
            return "this user has no home folder, which ~ stands for: set HOME, or give data.cache=FOLDER"
        if type(link).__name__ == "MissingMandatoryValue" and _of_the_config(link):
            return f"{_first_line(link)} (give it on the command line: KEY=VALUE)"
    if _of_the_config(error) and (_of_the_config(links[-1]) or isinstance(links[-1], TypeError)):
        hint = "; --cfg job lists all keys" if "override" in str(error) else ""
        return " ".join(dict.fromkeys(map(_first_line, (error, links[-1])))).strip() + hint
    # What Hydra instantiates may open files.
    found = links if _of_the_config(error) else [error]
    for link in found:
        if isinstance(link, OSError) and link.strerror:
            return f"{link.filename}: {link.strerror}" if link.filename else link.strerror
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
