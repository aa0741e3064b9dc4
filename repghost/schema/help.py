"""What `train.py --help` and `evaluate.py --help` print: examples, groups with their choices, every key.

Check: `pytest tests/test_schema.py -k help`.
"""

from collections.abc import Iterator
from pathlib import Path

import yaml
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from repghost.schema.check import command_of, keys, shown

_COLUMN = 40  # where sentences begin


def help_text(program: str, description: str, conf: Path) -> str:
    """description: of the program, with examples. conf: the folder of its configs."""
    command = command_of(program)
    usage = [
        f"usage: python {command} [KEY=VALUE ...]",
        f"       python {command} -m KEY=VALUE,VALUE ...      a sweep: one after the other, over any keys",
        f"       python {command} --cfg job [KEY=VALUE ...]   prints the whole config; --hydra-help: more flags",
    ]
    return "\n".join(
        [
            *(usage if command.endswith(".py") else [f"{usage[0]} OUT"]),
            f"\n{description}",
            "\nGroups of values, in conf/GROUP/CHOICE.yaml:",
            *_group_rows(program, conf),
            "\nKeys, with their values by default:",
            *key_rows(program, conf),
        ]
    )


def _group_rows(program: str, conf: Path) -> Iterator[str]:
    """GROUP=CHOICE and what the file says first of itself."""
    defaults = yaml.safe_load((conf / f"{program}.yaml").read_text())["defaults"]
    if "train" in defaults:
        defaults = yaml.safe_load((conf / "train.yaml").read_text())["defaults"]
    chosen = {group: choice for entry in defaults if isinstance(entry, dict) for group, choice in entry.items()}
    for group in sorted(chosen.keys() & keys(program).keys()):
        for file in sorted((conf / group).glob("*.yaml")):
            text = file.read_text()
            if "\ntest_set:" in text and "test_set" not in keys(program):
                continue
            if task_of_choice(group, file.stem, conf) not in (None, task_of(program)):
                continue
            comments = [line for line in text.splitlines() if line.startswith("# ") and "@" not in line]
            by_default = " (default)" if file.stem == chosen[group] else ""
            yield f"  {f'{group}={file.stem}':<{_COLUMN}}  {comments[0].removeprefix('# ')}{by_default}"


def task_of(program: str) -> str:
    """The task that `program`, one of PROGRAMS, is for."""
    return program.partition("_")[2] or "classification"


def task_of_choice(group: str, choice: str, conf: Path) -> str | None:
    """The task that a data set or recipe is for, by its file in the folder `conf`; None for what is no such file."""
    path = conf / group / f"{choice}.yaml"
    if group not in ("data", "recipe") or not path.is_file():
        return None
    return "detection" if "\ntask: detection" in path.read_text() else "classification"


def key_rows(program: str, conf: Path) -> Iterator[str]:
    """KEY=DEFAULT, what the key means and which values it takes, for every key that can be given."""
    with initialize_config_dir(str(conf), version_base="1.3"):
        config = compose(program)
    for name, key in keys(program).items():
        if key.sentence and not key.is_part:
            value = OmegaConf.select(config, name, default="???", throw_on_missing=False)
            value = OmegaConf.to_container(value) if OmegaConf.is_config(value) else value
            left = name if value == "???" else f"{name}={shown(value)}"
            yield f"  {left:<{_COLUMN}}  {key.sentence} ({key.words})"
