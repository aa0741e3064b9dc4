"""The command line of train.py and evaluate.py, before Hydra reads it.

Paths and names are what was typed: Hydra's grammar, to which `(`, `=`, `~` or an umlaut mean something, gets them in
quotes. A value in quotes is Hydra's own string, null is none, and ${...} is an interpolation, as everywhere in Hydra. A
key that does not exist, and a value that Hydra could not read, end in one line before anything is composed.
Check: `pytest tests/test_schema.py -k command_line`.
"""

import os
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import reduce
from operator import getitem
from pathlib import Path
from typing import Any, NoReturn

import yaml
from hydra import compose, initialize_config_dir
from hydra._internal.utils import get_args_parser
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, Override, Quote, QuotedString
from hydra.errors import HydraException, MissingConfigException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import InterpolationKeyError

from repghost.errors import UserError
from repghost.schema.check import PROGRAMS, Key, check_values, keys, shown, unknown_key
from repghost.schema.help import task_of, task_of_choice

CONF = Path(__file__).parents[1] / "conf"

_OVERRIDE = re.compile(r"(\+{0,2})([^+~=@][^=@]*)=(.*)", re.DOTALL)  # prefix, key, value
_REFERENCE = re.compile(r"\$\{([\w.]+)\}")  # a key whose value is that of another one
_COMMA = re.compile(r",(?![^{\[(]*[}\])])")  # outside of brackets


def program_of(command: str, arguments: Sequence[str]) -> str:
    """The config, one of PROGRAMS, for a command line of train.py or evaluate.py: that of its task, or of its run's."""
    values = dict(argument.lstrip("-").partition("=")[::2] for argument in arguments)
    task = values.get("task", "")
    if command == "evaluate" and (run := values.get("run")):
        with suppress(OSError, UnicodeDecodeError, yaml.YAMLError, AttributeError):  # whoever opens the run says so
            config = yaml.safe_load((Path(run.strip("'\"")).expanduser() / "config.yaml").read_text(encoding="utf-8"))
            task = config.get("task", "")
    if "," in task:
        raise UserError(f"task={shown(task)}: a sweep is of one task")
    program = f"{command}_{task}"
    return program if program in PROGRAMS else command


def read_command_line(program: str, arguments: Sequence[str]) -> tuple[list[str], list[str], bool]:
    """Hydra's flags and the overrides, as Hydra takes them, and whether they ask for a sweep.

    --KEY=VALUE of a key that exists is KEY=VALUE: so the agents of sweeps, such as that of W&B, write it. Raises
    UserError for a mistake.
    """
    parser = get_args_parser()
    parser.error = _refuse  # type: ignore[method-assign]  # argparse would print its usage, too
    arguments = [_without_dashes(argument, keys(program)) for argument in arguments]
    found = parser.parse_intermixed_args(arguments)
    flags = [argument for argument in arguments if argument not in found.overrides]
    sweeping = found.multirun or any(o.lower() == "hydra.mode=multirun" for o in found.overrides)
    overrides = [read_override(override, program, sweeping) for override in found.overrides]
    return flags, overrides, sweeping


def _without_dashes(argument: str, known: Mapping[str, Key]) -> str:
    name, equals, _ = argument.removeprefix("--").partition("=")
    is_key = argument.startswith("--") and equals and (name in known or _is_open(name, known))
    return argument[2:] if is_key else argument


def _refuse(message: str) -> NoReturn:
    raise UserError(f"{shown(message)}; --help and --hydra-help list what there is")


def read_override(argument: str, program: str, sweeping: bool) -> str:
    """One override as Hydra takes it. Raises UserError for one that Hydra cannot read, or whose key does not exist."""
    known = keys(program)
    try:
        argument.encode()
    except UnicodeEncodeError:
        raise UserError(f"{shown(argument)}: not UTF-8, rename it") from None
    name = argument.lstrip("+~").partition("=")[0]
    is_known = name in known or _is_open(name, known) or name.startswith("hydra") or "/" in name
    if not is_known and (source := _sources(program).get(name)):
        raise UserError(f"{name} has the value of {source}: give {source}=VALUE")
    if match := _OVERRIDE.fullmatch(argument):
        prefix, name, value = match.groups()
        if name in known and known[name].format:
            argument = f"{prefix}{name}={_as_typed(value, known[name].format == 'path', sweeping)}"
        elif not (prefix or is_known):
            raise UserError(unknown_key(shown(argument), name, known))
    elif "=" not in argument and not argument.startswith("~"):
        raise UserError(f"{shown(argument)}: neither KEY=VALUE nor a flag; --help lists all keys")
    override = _parse(argument)
    if override is None:
        quoted = f"\"{argument.partition('=')[0]}='...'\""
        raise UserError(
            f"{shown(argument)}: close brackets and quotes, or put what is meant as text in quotes, {quoted}"
        )
    if override.is_sweep_override() and not sweeping:
        raise UserError(f"{shown(argument)}: several values are a sweep: give -m, too; a list is KEY=[A,B]")
    choices = sorted(file.stem for file in (CONF / override.key_or_group).glob("*.yaml"))
    if choices and not (override.is_sweep_override() or isinstance(override.value(), str | list | dict)):
        raise UserError(f"{shown(argument)}: give one of {', '.join(choices)}")
    return argument


def _is_open(name: str, known: Mapping[str, Key]) -> bool:
    return any(name.startswith(f"{part}.") for part, key in known.items() if key.is_open)


def _as_typed(value: str, is_path: bool, sweeping: bool) -> str:
    """`value` of a path or name so that Hydra takes it for text; in a sweep each of several."""
    override = _parse(f"x={value}")
    several = _COMMA.split(value)
    if sweeping and override is not None and override.is_sweep_override():
        choice = override.value()
        simple = isinstance(choice, ChoiceSweep) and choice.simple_form
        if not simple or any(isinstance(each, QuotedString) for each in choice.list):  # type: ignore[union-attr]
            return value
        return ",".join(_as_typed(each, is_path, sweeping=False) for each in several)
    if sweeping and override is None and len(several) > 1:
        return ",".join(_as_typed(each, is_path, sweeping=False) for each in several)
    if override is not None and not override.is_sweep_override():
        quoted = len(value) > 1 and value[0] == value[-1] and value[0] in "'\""
        if value == "null" or (isinstance(override.value(), str) and (quoted or override.value() == value)):
            return value
    text = os.path.expanduser(value) if is_path else value
    return QuotedString(text=text, quote=Quote.single).with_quotes()


def _parse(argument: str) -> Override | None:
    try:
        return OverridesParser.create().parse_override(argument)
    except (HydraException, ValueError):  # a number of more digits than Python reads is a ValueError
        return None


def compose_config(program: str, overrides: Sequence[str]) -> DictConfig:
    """The config of `program`, checked, for other commands that take its overrides. Raises UserError for a mistake."""
    taken = [read_override(override, program, sweeping=False) for override in overrides]
    with initialize_config_dir(str(CONF), version_base="1.3"), choices_listed():
        config = compose(program, taken)
    check_config(program, config, taken)
    return config


@contextmanager
def choices_listed() -> Iterator[None]:
    """For Hydra's error about GROUP=CHOICE without a file in conf/ a UserError with the choices that there are."""
    try:
        yield
    except MissingConfigException as error:
        if not error.options:
            raise
        group, _, choice = str(error.missing_cfg_file).rpartition("/")
        raise UserError(f"{group}={shown(choice)}: give one of {', '.join(error.options)}") from None


def _sources(program: str) -> dict[str, str]:
    """The keys that have the value of another one by conf/, and of which one."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose(program)
    return dict(_references(OmegaConf.to_container(config), ""))


def _references(values: Any, prefix: str) -> Iterator[tuple[str, str]]:
    """Arguments of what is built (`_target_`) that are other keys, and which."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _references(value, f"{prefix}{name}.")
        elif "_target_" in values and isinstance(value, str) and (match := _REFERENCE.fullmatch(value)):
            yield prefix + name, match[1]


def own_values(program: str, config: DictConfig, given: Collection[str] = ()) -> dict[str, Any]:
    """The values of a composed config, resolved, without those keys that only have the value of another one.

    given: the keys on the command line, which stay.
    """
    values: Any = OmegaConf.to_container(config, resolve=True)
    for name, _ in _references(OmegaConf.to_container(config), ""):
        if name not in keys(program) and name not in given:
            *parts, last = name.split(".")
            del reduce(getitem, parts, values)[last]
    return dict(values)


def check_config(program: str, config: DictConfig, overrides: Sequence[str]) -> None:
    """Raises UserError for the first value of a composed config that cannot be meant, or that a training lacks.

    A training that starts from weights has their width, unless another one is given, which the weights then refuse.
    """
    # Not Hydra's own part, which the config of a sweep's job has.
    checked = OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"])
    given = [override.lstrip("+~").partition("=")[0] for override in overrides]
    for argument in overrides:
        group, _, choice = argument.partition("=")
        if (task := task_of_choice(group, choice, CONF)) and task != task_of(program):
            raise UserError(f"{shown(argument)}: for task={task}, not for task={task_of(program)}")
    try:
        check_values(program, own_values(program, checked, given), given)
    except InterpolationKeyError as error:
        problem = str(error.msg).partition("\n")[0]
        raise UserError(f"{error.full_key}: {problem}: a choice of the command is for another task") from None
    if program.startswith("evaluate"):  # an evaluation may take from its run what is missing here
        return
    if missing := sorted(OmegaConf.missing_keys(checked)):
        raise UserError(f"{missing[0]} is missing: give it on the command line, {missing[0]}=...")
    if config.weights and "width" not in given:
        from repghost.weights import read_description

        config.width = read_description(config.weights).width or config.width
