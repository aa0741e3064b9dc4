"""Names of classes, files and runs as text: on one line, and in the cell of a table.

Check: `pytest tests/test_run_data.py`.
"""

from repghost.errors import printable

FORMULA = ("=", "+", "-", "@")  # what a spreadsheet takes for the beginning of one


def one_line(name: str) -> str:
    """A name as it is printed: on one line of valid text, whatever a folder may be called.

    Characters that are not printed, bytes that were no text and blanks at either end are escaped as in a Python string.
    """
    inner = name.strip()
    start = name.find(inner) if inner else len(name)
    before, after = name[:start], name[start + len(inner) :]
    return "".join([*map(_escaped, before), printable(inner), *map(_escaped, after)])


def _escaped(character: str) -> str:
    return "\\x20" if character == " " else ascii(character)[1:-1]


def as_cell(name: str) -> str:
    """A name as a cell of a CSV file that a spreadsheet may open: one line, and no formula."""
    shown = one_line(name)
    return f"'{shown}" if shown.startswith(FORMULA) else shown


def from_cell(cell: str) -> str:
    """The name that `as_cell` was given, as `one_line` shows it."""
    return cell[1:] if cell.startswith("'") and cell[1:].startswith(FORMULA) else cell
