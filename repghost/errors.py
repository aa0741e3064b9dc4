"""The one exception that means: the user can fix this."""

from collections.abc import Iterator


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
