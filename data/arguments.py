"""Values of command-line arguments, for argparse. Check: `pytest tests/test_write_shards.py -k command`."""

import argparse
from collections.abc import Callable


def whole_number(low: int, high: int | None = None) -> Callable[[str], int]:
    """A `type=` for whole numbers from `low` to `high`, or from `low` on."""

    def read(text: str) -> int:
        # No number that is of use has more digits, and Python refuses to read thousands of them.
        if not (text.isascii() and text.isdigit() and len(text) < 20) or not low <= int(text) <= (high or int(text)):
            raise argparse.ArgumentTypeError(
                f"{text} is not a whole number from {low} {f'to {high}' if high else 'on'}"
            )
        return int(text)

    return read


def share(text: str) -> float:
    """A `type=` for numbers between 0 and 1, both excluded."""
    try:
        if 0 < (value := float(text)) < 1:
            return value
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"{text} is not a number between 0 and 1, such as 0.1")
