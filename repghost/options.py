"""Options of a command, declared as the fields of a dataclass and given as KEY=VALUE.

    @dataclass
    class Options:
        top: Annotated[int, Option("classes of an image", above=0)] = 5

    paths, options = parse(Options, sys.argv[1:])

`--help` prints the docstring of the module that declares the options, and all of them. A path that could be read as an
option is written ./KEY=VALUE. Check: `pytest tests/test_options.py`.
"""

import math
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import fields
from types import NoneType
from typing import Any, NamedTuple, TypeVar, cast, get_args, get_type_hints

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from repghost.errors import UserError

T = TypeVar("T")


class Option(NamedTuple):
    """What --help says of an option, and which values it takes.

    A number is greater than `above` and at most `most`; text is one of `choices` or matches `pattern` as `form` says.
    """

    sentence: str
    choices: tuple[str, ...] = ()
    above: float = -math.inf
    most: float = math.inf
    pattern: str = ""
    form: str = ""

    def takes(self, value: object) -> bool:
        if isinstance(value, int | float):
            return math.isfinite(value) and self.above < value <= self.most
        return bool(re.fullmatch(self.pattern or ".*", str(value))) and (not self.choices or value in self.choices)

    def values(self, kind: type) -> str:
        """What `takes` accepts, in words."""
        if self.choices:
            return f"one of {', '.join(self.choices)}"
        words = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}.get(kind, "a path")
        above = f" above {self.above:g}" if math.isfinite(self.above) else ""
        return self.form or words + above + (f", at most {self.most:g}" if math.isfinite(self.most) else "")


def parse(kind: type[T], arguments: Sequence[str]) -> tuple[list[str], T]:
    """The paths among the arguments, and the options; an option that is not given has its default.

    Raises UserError that names the key for one that is unknown, has no value or is given twice, and for a value of
    another type or outside of its range. `--help` ends the program.
    """
    declared = _declared(kind)
    if {"-h", "--help"} & set(arguments):
        print(_help(kind))
        sys.exit(0)
    config, paths, given = OmegaConf.structured(kind), list[str](), set[str]()
    for argument in arguments:
        key, equals, text = argument.partition("=")
        is_path = not key.isidentifier() or os.path.exists(argument)
        if key not in declared and equals and not is_path:
            raise UserError(f"{key} is not a key; the keys are {', '.join(declared)}, given as KEY=VALUE")
        if key not in declared or (is_path and not equals):
            paths.append(argument)
            continue
        if not text:
            raise UserError(f"{key} has no value: {key}=VALUE")
        if key in given:
            raise UserError(f"{key} is given twice")
        given.add(key)
        scalar, option = declared[key]
        try:
            config[key] = text
            taken = option.takes(config[key])
        except OmegaConfBaseException:
            taken = False
        if not taken:
            raise UserError(f"{argument}: give {option.values(scalar)}")
    return paths, cast(T, OmegaConf.to_object(config))


def _declared(kind: type) -> dict[str, tuple[Any, Option]]:
    """{key: (its type without None, its Option)}"""
    found = {}
    for key, hint in get_type_hints(kind, include_extras=True).items():
        declared, option = get_args(hint)
        (scalar,) = set(get_args(declared) or (declared,)) - {NoneType}
        found[key] = scalar, option
    return found


def _help(kind: type) -> str:
    lines = [(sys.modules[kind.__module__].__doc__ or "").strip(), "", "Options, given as KEY=VALUE:"]
    defaults = {field.name: field.default for field in fields(cast(Any, kind))}
    for key, (scalar, option) in _declared(kind).items():
        default = "" if defaults[key] is None else f" (default: {str(defaults[key]).lower()})"
        lines.append(f"  {key:<20}{option.sentence}: {option.values(scalar)}{default}")
    return "\n".join(lines)
