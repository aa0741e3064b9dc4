"""What `train.py --help` and `evaluate.py --help` print: examples, groups with their choices, every key.

Check: `pytest tests/test_schema.py -k help`.
"""

from collections.abc import Iterator
from pathlib import Path

import yaml
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from repghost.schema.check import keys, shown

_COLUMN = 40  # where sentences begin


def help_text(program: str, description: str, conf: Path) -> str:
    """description: of the program, with examples. conf: the folder of its configs."""
    command = program.partition("_")[0]
    return "\n".join(
        [
            f"usage: python {command}.py [KEY=VALUE ...]",
            f"       python {command}.py -m KEY=VALUE,VALUE ...      a sweep: one after the other, over any keys",
            f"       python {command}.py --cfg job [KEY=VALUE ...]   prints the whole config; --hydra-help: more flags",
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
    chosen = {group: choice for entry in defaults if isinstance(entry, dict) for group, choice in entry.items()}
    for group in sorted(chosen.keys() & keys(program).keys()):
        for file in sorted((conf / group).glob("*.yaml")):
            text = file.read_text()
            if not is_meant_for(program, group, text):
                continue
            comments = [line for line in text.splitlines() if line.startswith("# ") and "@" not in line]
            by_default = " (default)" if file.stem == chosen[group] else ""
            yield f"  {f'{group}={file.stem}':<{_COLUMN}}  {comments[0].removeprefix('# ')}{by_default}"


def is_meant_for(program: str, group: str, choice: str) -> bool:
    """Whether a choice of a group, the text of its file, is for the command and the task of `program`."""
    if "\ntest_set:" in choice and "test_set" not in keys(program):
        return False
    return group not in ("data", "recipe") or ("\ntask: detection" in choice) == program.endswith("_detection")


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
