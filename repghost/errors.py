"""The one exception that means: the user can fix this."""


class UserError(ValueError):
    """A mistake in a command, a file or a data set. One line: what is wrong, where, and what to do.

    The command-line programs print the line and exit with a code that is not 0; everything else keeps its traceback.
    """
