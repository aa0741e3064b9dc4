"""Whether a command's config has values that can be meant: the first that has not, in one line.

Check: `pytest tests/test_schema.py`.
"""

import difflib
import pkgutil
from collections.abc import Collection, Iterable, Iterator, Mapping
from functools import cache
from typing import Any, NamedTuple

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from repghost.errors import UserError, printable
from repghost.schema.classification import Evaluate, Teach, Train
from repghost.schema.detection import EvaluateDetection, TrainDetection
from repghost.schema.values import Part

# The config of a command for each task, in conf/NAME.yaml.
PROGRAMS: dict[str, type[Part]] = {
    "train": Train,
    "evaluate": Evaluate,
    "train_detection": TrainDetection,
    "evaluate_detection": EvaluateDetection,
    "teach": Teach,
}
_BOUNDS = {"exclusiveMinimum": "above", "minimum": "at least", "exclusiveMaximum": "below", "maximum": "at most"}
_TYPES = {"integer": "a whole number", "number": "a number"}


class Key(NamedTuple):
    """What the schema says of a key, or of a part with keys of its own (`is_part`).

    words: which values it takes. format: "path" or "text" where the value is what was typed, whatever it looks like.
    """

    sentence: str
    words: str
    format: str | None = None
    is_part: bool = False
    is_open: bool = False  # takes other keys, too


@cache
def keys(program: str) -> dict[str, Key]:
    """Every key of `program`, one of PROGRAMS, and every part, by its name on the command line."""
    schema = PROGRAMS[program].model_json_schema()
    return dict(_keys(schema, schema.get("$defs", {}), ""))


def _keys(part: dict[str, Any], parts: dict[str, Any], prefix: str) -> Iterator[tuple[str, Key]]:
    for name, entry in part["properties"].items():
        if entry.get("unread"):
            continue
        variants = entry.get("anyOf", [entry])
        reference = next((variant["$ref"] for variant in variants if "$ref" in variant), None)
        sentence = entry.get("description", "")
        if reference is None:
            formats = [variant["format"] for variant in variants if "format" in variant]
            yield prefix + name, Key(sentence, _words(entry), formats[0] if formats else None)
        else:
            inner = parts[reference.rpartition("/")[2]]
            words = f"{'null, or ' if len(variants) > 1 else ''}{prefix}{name}.KEY=VALUE"
            yield prefix + name, Key(sentence, words, is_part=True, is_open=bool(inner["additionalProperties"]))
            yield from _keys(inner, parts, f"{prefix}{name}.")


def _words(entry: Mapping[str, Any]) -> str:
    """Which values the JSON schema of a key admits."""
    if "words" in entry:
        return str(entry["words"])
    if "anyOf" in entry:
        variants = [variant for variant in entry["anyOf"] if variant.get("type") != "object"]
        if all(_choices(variant) for variant in variants):
            return "one of " + ", ".join(choice for variant in variants for choice in _choices(variant))
        return ", or ".join(map(_words, variants))
    if choices := _choices(entry):
        return " or ".join(choices) if len(choices) < 3 else "one of " + ", ".join(choices)
    if entry.get("type") == "array":
        return f"{entry['shape']}, each {_words(entry['items'])}" if "shape" in entry else f"[{_words(entry['items'])}]"
    if entry.get("type") == "string":
        return "a path" if entry.get("format") == "path" else "text"
    if "type" not in entry:
        return ""
    if "minimum" in entry and "maximum" in entry:
        return f"{_TYPES[entry['type']]} from {entry['minimum']} to {entry['maximum']}"
    bounds = [f"{word} {entry[bound]:.10g}" for bound, word in _BOUNDS.items() if bound in entry]
    return " ".join([_TYPES[entry["type"]], ", ".join(bounds)]).strip()


def _choices(entry: Mapping[str, Any]) -> list[str]:
    """The values of a key that takes only some."""
    if entry.get("type") in ("boolean", "null"):
        return ["true", "false"] if entry["type"] == "boolean" else ["null"]
    return list(entry["enum"]) if "enum" in entry else [str(entry["const"]).lower()] if "const" in entry else []


def command_of(program: str) -> str:
    """What is typed after `python` to start `program`, one of PROGRAMS."""
    return "-m repghost.teach" if program == "teach" else f"{program.partition('_')[0]}.py"


def check_values(program: str, values: Mapping[str, Any], given: Collection[str]) -> None:
    """Raises UserError for the first value of a composed and resolved config that cannot be meant, by its key.

    values: without the keys that have the value of another one. given: the keys on the command line. "???" stands for a
    value that is still missing.
    """
    for name in given:
        if name.endswith("._target_"):
            _require_importable(name, values)
    try:
        PROGRAMS[program].model_validate(values, context=given)
    except ValidationError as error:
        raise UserError(_message(program, error.errors()[0], values, given)) from None


def _message(program: str, error: ErrorDetails, values: Mapping[str, Any], given: Collection[str]) -> str:
    known, name = keys(program), ""
    for step in error["loc"]:  # ends with the branch of a union, or the place in a list
        name = f"{name}.{step}".lstrip(".")
        if error["type"] == "extra_forbidden" or (name in known and known[name].is_part):
            continue
        break
    if not name:  # several keys together
        return str(error["ctx"]["error"])
    if error["type"] == "missing":
        return f"{name} has no value: give {known[name].words}" if name in known else f"{name} has no value"
    if error["type"] == "extra_forbidden":
        argument = f"{name}={shown(_value(values, name))}"
        if any(f"{name}.".startswith(f"{each}.") or each.startswith(f"{name}.") for each in given):
            return unknown_key(argument, name, known)
        return f"{argument}: no key of {command_of(program)}; a choice that sets it is for another command or task"
    words = known[name].words if name in known else "what conf/ has"
    return f"{name}={shown(_value(values, name))}: give {words}"


def unknown_key(argument: str, name: str, known: Iterable[str]) -> str:
    """The line for a key that does not exist, or not for this task."""
    if any(name in keys(program) for program in PROGRAMS):
        return f"{argument}: another task or command has this key, this one does not read it"
    near = difflib.get_close_matches(name, list(known), n=1) or [k for k in known if k.endswith(f".{name}")][:1]
    hint = f"did you mean {near[0]}? " if near else ""
    return f"{argument}: no such key; {hint}--help lists all keys"


def _value(values: Any, name: str) -> Any:
    for step in name.split("."):
        values = values[step] if isinstance(values, Mapping) else values
    return values


def shown(value: Any) -> str:
    """`value` as on a command line, on one line."""
    if isinstance(value, list):
        return f"[{','.join(map(shown, value))}]"
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{key}:{shown(inner)}" for key, inner in value.items()) + "}"
    text = "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
    return printable(text)


def _require_importable(name: str, values: Mapping[str, Any]) -> None:
    target = _value(values, name)
    try:
        importable = callable(pkgutil.resolve_name(target))
    except Exception:
        importable = False
    if not importable:
        raise UserError(f"{name}={shown(target)}: not a class or function that can be imported")
