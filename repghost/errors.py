"""The one exception that means: the user can fix this."""

import errno
import sys
from collections.abc import Callable, Iterator

from pytorch_lightning.utilities.rank_zero import rank_zero_only

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class UserError(ValueError):
    """A mistake in a command, a file or a data set. One line: what is wrong, where, and what to do.

    The command-line programs print the line and exit with a code that is not 0; everything else keeps its traceback.
    """


def chain(error: BaseException) -> Iterator[BaseException]:
    """`error`, what it came from, and so on."""
    seen: set[int] = set()
    link: BaseException | None = error
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        yield link
        link = link.__cause__ or link.__context__


def run_command(command: Callable[[], int]) -> int:
    """Runs a command-line program; what its user can mend becomes one line on stderr and exit code 2."""
    try:
        return command()
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def fail(line: str) -> int:
    """Prints the one line that a user gets and returns the exit code for it."""
    print(f"error: {line}", file=sys.stderr, flush=True)
    return 2


@rank_zero_only
def say(text: str) -> None:
    """Prints for the person who started the program; on one rank only."""
    print(text, flush=True)
