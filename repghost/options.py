"""The options of predict and export: fields of a dataclass, given as KEY=VALUE.

    @dataclass
    class Options(NetworkOptions):
        top: int = option("classes of an image", WHOLE, 5)

    paths, options = parse(Options, sys.argv[1:])

`--help` prints the docstring of the module that declares the options, and all of them. A path that could be read as an
option is written ./KEY=VALUE. Nothing here takes long to import: a command is understood before its work begins.
Check: `pytest tests/test_options.py`.
"""

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, cast

from repghost.errors import UserError

T = TypeVar("T")


class Values(NamedTuple):
    """Which values an option takes, in words, and what reads one; it raises ValueError or KeyError for any other."""

    words: str
    read: Callable[[str], Any]


def above_zero(words: str, number: Callable[[str], float], most: float = sys.float_info.max) -> Values:
    """Numbers above 0 and at most `most`."""

    def read(text: str) -> float:
        if not 0 < (value := number(text)) <= most:
            raise ValueError
        return value

    return Values(words, read)


def one_of(*names: str) -> Values:
    return Values(f"one of {', '.join(names)}", dict(zip(names, names, strict=True)).__getitem__)


WHOLE, NUMBER = above_zero("a whole number above 0", int), above_zero("a number above 0", float)
SHARE = above_zero("a number above 0, at most 1", float, most=1)
SWITCH = Values("true or false", {"true": True, "false": False}.__getitem__)
TEXT, PATH = Values("text", str), Values("a path", lambda text: Path(text).expanduser())


def option(sentence: str, values: Values, default: object = None) -> Any:
    """A field of the options: what --help says of it, which values it takes, and its value when it is not given."""
    return field(default=default, metadata={"sentence": sentence, "values": values})


def parse(kind: type[T], arguments: Sequence[str]) -> tuple[list[str], T]:
    """The paths among the arguments, and the options; an option that is not given has its default.

    Raises UserError that names the key for one that is unknown, has no value or is given twice, and for a value that it
    does not take. `--help` ends the program.
    """
    declared = {entry.name: entry for entry in fields(cast(Any, kind))}
    if {"-h", "--help"} & set(arguments):
        print((sys.modules[kind.__module__].__doc__ or "").strip(), "\nOptions, given as KEY=VALUE:", sep="\n")
        for key, entry in declared.items():
            default = "" if entry.default in (None, "") else f" (default: {str(entry.default).lower()})"
            print(f"  {key:<20}{entry.metadata['sentence']}: {entry.metadata['values'].words}{default}")
        sys.exit(0)
    paths, given = list[str](), dict[str, Any]()
    for argument in arguments:
        key, equals, text = argument.partition("=")
        is_path = not key.isidentifier() or os.path.exists(argument)
        if key not in declared and equals and not is_path:
            raise UserError(f"{key} is not a key; the keys are {', '.join(declared)}, given as KEY=VALUE")
        if key not in declared or (is_path and not equals):
            paths.append(argument)
            continue
        if not text or key in given:
            raise UserError(f"{key} is given twice" if text else f"{key} has no value: {key}=VALUE")
        values = declared[key].metadata["values"]
        try:
            given[key] = values.read(text)
        except (ValueError, KeyError):
            raise UserError(f"{argument}: give {values.words}") from None
    return paths, kind(**given)


@dataclass
class NetworkOptions:
    """Which network, and which images it sees."""

    run: Path | None = option("a run's folder, outputs/NAME: its averaged weights", PATH)
    selection: str | None = option("which epoch of the run, by default last", one_of("last", "best_ema"))
    weights: str | None = option("instead of a run: timm, official:FILE, a file or a folder", TEXT)
    width: float | None = option("width multiplier, for timm and for files that do not tell it", NUMBER)
    image_size: int | None = option("side of what the network sees in pixels, by default that of its training", WHOLE)
    crop_fraction: float | None = option("share of the shorter side that the centre crop takes, as trained", SHARE)

    @property
    def of_detector(self) -> bool:
        """Whether `run` is the run of a detector, as the config.yaml in it says."""
        if self.run is None or not (self.run / "config.yaml").is_file():
            return False
        return (
            "task: detection" in (self.run / "config.yaml").read_text(encoding="utf-8", errors="replace").splitlines()
        )

    def require_network(self) -> None:
        """Raises UserError unless the options name one network, and only with keys that go together."""
        if (self.run is None) == (self.weights is None):
            raise UserError("give either run=outputs/NAME or weights=timm, weights=FILE")
        if self.run is not None and self.width is not None:
            raise UserError("width: a run knows its own; the key goes with weights=")
        if self.run is None and self.selection is not None:
            raise UserError("selection: the key goes with run=")
        if self.weights == "timm" and self.width is None:
            raise UserError("weights=timm: say which width, width=1.0")
