"""The folder of a run: how it is named, opened again, described, and what evaluating it leaves there."""

import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pytorch_lightning.utilities.rank_zero import rank_zero_only

from repghost.errors import UserError
from repghost.files import read_class_names, write_text
from repghost.model import RepGhostNet
from repghost.reference import class_words, synsets
from repghost.weights import model_from_state, read_checkpoint

_FILE = "classes.txt"

# Overrides that change where and how fast a run happens, but not which run it is.
_NOT_PART_OF_THE_NAME = ("name", "output", "results", "trainer", "logger", "checkpoint", "curve_seconds", "profile",
                         "data.workers", "data.prefetch", "data.cache", "data.eval_batch_size")  # fmt: skip
_NAMED_ALREADY = ("data", "data.root", "recipe", "width", "seed")

SELECTIONS = {"last": "last.ckpt", "best_ema": "best_ema.ckpt"}

# Keys that may change between the start of a run and its resumption: where and how fast, not what.
_MAY_CHANGE = ("name", "output", "results", "trainer", "logger", "checkpoint", "curve_seconds", "profile", "accumulate",
               "data.workers", "data.prefetch", "data.cache", "data.root", "data.eval_batch_size",
               "classifier")  # fmt: skip  # which repeats the values of other keys


def open_run(config: DictConfig) -> tuple[Path, DictConfig]:
    """The run's folder and its resolved config, which is written there as config.yaml.

    Raises UserError when the folder holds a run of another config, with the first key that differs. A command that was
    refused, or died before it saved anything, is no run: what it wrote is replaced.
    """
    require_numbers(config)
    resolve_recipe(config)
    config.name = config.name or run_name(config)
    directory = folder_of(config)
    OmegaConf.resolve(config)
    require_values(config)
    written = directory / "config.yaml"
    begun = is_finished(directory) or any((directory / "checkpoints").glob("*.ckpt"))
    if begun and written.exists():
        before, now = flat(read_config(directory)), flat(config)
        # Those keys last whose values come from others, which are what the user knows.
        for key in sorted(before.keys() | now.keys(), key=lambda key: (key.startswith(("classifier.", "data.")), key)):
            if before.get(key) != now.get(key) and not _starts_with(key, _MAY_CHANGE):
                raise UserError(
                    f"{directory} was begun with {key}={before.get(key)}, this command says {now.get(key)}: "
                    "go on with the old value, or give the new run a name=..."
                )
    elif rank_zero_only.rank == 0:  # type: ignore[attr-defined]
        write_text(written, OmegaConf.to_yaml(config))
    return directory, config


def read_config(directory: Path) -> DictConfig:
    """The resolved config that a run was started with."""
    try:
        config = OmegaConf.load(directory / "config.yaml")
    except FileNotFoundError:
        raise UserError(f"{directory}: no run is in this folder (it has no config.yaml)") from None
    except (yaml.YAMLError, UnicodeDecodeError, OmegaConfBaseException) as error:
        raise UserError(f"{directory / 'config.yaml'}: not a config ({' '.join(str(error).split())})") from None
    if not isinstance(config, DictConfig):
        raise UserError(f"{directory / 'config.yaml'}: not a config")
    return config


def resolved_for_evaluation(config: DictConfig) -> DictConfig:
    """The config of evaluate.py; with run=, its data and image size are the run's where the command names no others."""
    from hydra.core.hydra_config import HydraConfig  # predict and export do not need Hydra

    overrides = HydraConfig.get().overrides.task
    if config.run is not None:
        trained = read_config(Path(config.run))
        named = [o.lstrip("+~").partition("=")[0] for o in overrides]
        if "image_size" not in named:
            config.image_size = trained.image_size
        if "data" not in named:
            mine = {k.removeprefix("data."): OmegaConf.select(config, k) for k in named if k.startswith("data.")}
            config.data = OmegaConf.merge(trained.data, mine, {"image_size": config.image_size})
    OmegaConf.resolve(config)
    require_values(config)
    return config


def require_values(config: DictConfig) -> None:
    """Raises UserError for a key that was left open (???)."""
    if missing := sorted(OmegaConf.missing_keys(config)):
        raise UserError(f"{missing[0]} is missing: give it on the command line, {missing[0]}=...")


def require_numbers(config: DictConfig) -> None:
    """Raises UserError for a word where a number belongs."""
    for key in ("epochs", "batch_size", "image_size", "seed", "accumulate"):
        if not isinstance(config[key], int):
            raise UserError(f"{key}={config[key]}: a whole number is needed")
    if not isinstance(config.width, int | float):
        raise UserError(f"width={config.width}: a number is needed, such as 1.0")


def is_finished(directory: Path) -> bool:
    """Whether the run in `directory` was trained to its end and evaluated."""
    return (directory / "evaluation.json").exists()


def load_run(directory: Path, selection: str) -> tuple[RepGhostNet, int]:
    """The averaged model of a run's last or best epoch, and the number of that epoch, counted from 0."""
    if selection not in SELECTIONS:
        raise UserError(f"selection={selection} is not one of {', '.join(SELECTIONS)}")
    path = directory / "checkpoints" / SELECTIONS[selection]
    content = read_checkpoint(path)
    if "ema" not in content or "history" not in content:
        raise UserError(f"{path}: not a checkpoint of train.py")
    width = read_config(directory).width
    return model_from_state(content["ema"], str(path), width), int(content["history"][-1]["epoch"])


def data_name(config: Any) -> str:
    """A short name of the data set of a run's config: its folder's, or `digits`."""
    root = config.data.root
    return Path(root.rstrip("/")).name if isinstance(root, str) else root["_target_"].rpartition("_")[2]


def _starts_with(key: str, prefixes: tuple[str, ...]) -> bool:
    return any(key == prefix or key.startswith(f"{prefix}.") for prefix in prefixes)


def flat(config: Any, prefix: str = "") -> dict[str, Any]:
    """{"a.b": value} of a nested config; an empty mapping keeps its key."""
    if not OmegaConf.is_dict(config) or not config:
        return {prefix.rstrip("."): config}
    return {k: v for key, value in config.items_ex(resolve=True) for k, v in flat(value, f"{prefix}{key}.").items()}


def folder_of(config: DictConfig) -> Path:
    """The folder of the run that a config of train.py or evaluate.py is about, under the HydraConfig that is set.

    For evaluate.py with weights=FILE, which is no run, FILE without its ending.
    """
    if "output" in config:
        return Path(config.output) / (config.name or run_name(config))
    return Path(config.run) if config.run else Path(config.weights or "weights").with_suffix("")


def top1(folder: Path) -> float | None:
    """What a job of a sweep returns to Hydra: its run's Top-1 in percent (evaluation.json), None if it has none."""
    file = folder / "evaluation.json"
    return float(json.loads(file.read_text())["top1"]) if file.exists() else None


def run_name(config: DictConfig) -> str:
    """What tells runs apart: data set, recipe, width, seed and any other override of this command line."""
    from hydra.core.hydra_config import HydraConfig

    hydra_config: Any = HydraConfig.get()
    root = config.data.root if isinstance(config.data.root, str) else hydra_config.runtime.choices.data
    width = f"{config.width:g}" if isinstance(config.width, int | float) else config.width
    parts = [Path(root.rstrip("/")).name, str(config.recipe.name), f"w{width}", f"s{config.seed}"]
    for override in sorted(hydra_config.overrides.task):
        key, _, value = override.lstrip("+~").partition("=")
        inside = any(key == k or key.startswith(f"{k}.") for k in _NOT_PART_OF_THE_NAME)
        if key not in _NAMED_ALREADY and not inside:
            parts.append(f"{key}_{value}")
    # Nothing that a shell or Hydra's command line would take apart.
    return "-".join(re.sub(r"[^A-Za-z0-9._]+", "_", part).strip("_") for part in parts)


@rank_zero_only
def write_class_names(directory: Path, names: Sequence[str]) -> None:
    """Writes the class names of the run in `directory`."""
    write_text(directory / _FILE, "".join(f"{name}\n" for name in names))


def class_names_of(directory: Path) -> list[str] | None:
    """The class names of the run in `directory`; None, and a line on stderr, when it has none."""
    if not (directory / _FILE).exists():
        print(f"{directory / _FILE}: missing, showing numbers (class_names=FILE names them)", file=sys.stderr)
        return None
    of_imagenet = dict(zip(synsets(), class_words(), strict=True))
    return [of_imagenet.get(name, name) for name in read_class_names(directory / _FILE)]


def resolve_recipe(config: DictConfig) -> None:
    """Leaves the one colour augmentation that the recipe gives to `config.width`, in place.

    Networks of `recipe.rand_augment_from_width` or wider get RandAugment, the others the jitter; null: every width the
    jitter. The paper draws the line between 1.11 and 1.3.
    """
    threshold = config.recipe.rand_augment_from_width
    wide = threshold is not None and config.width >= threshold
    config.recipe.augment["jitter" if wide else "rand_augment"] = None
