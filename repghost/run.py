"""The folder of a run: its name, config.yaml, whether a command may resume it, class names, the network in it.

Reading a folder needs OmegaConf only, neither Hydra nor Lightning.
Check: `pytest tests/test_train.py tests/test_resume.py tests/test_config.py`.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from repghost.errors import UserError
from repghost.files import read_class_names
from repghost.model import RepGhostNet
from repghost.reference import class_words, synsets
from repghost.results import require_writable_results
from repghost.run_data import CLASSES_FILE, record_data, require_equal, require_same_data, write_on_rank_zero
from repghost.run_name import WHERE_AND_HOW_FAST, folder_of, key_of, run_name, starts_with
from repghost.weights import WEIGHTS_FILE, model_from_state, read_checkpoint, read_description

if TYPE_CHECKING:
    from repghost.dataset import DataModule  # which needs Lightning

# Besides: images are compared by their fingerprint, a step may be cut into other parts, and the module's arguments
# are the recipe's values under other names.
_MAY_CHANGE = (*WHERE_AND_HOW_FAST, "data.root", "accumulate", "classifier", "module")
COLOUR = ("recipe.augment.jitter", "recipe.augment.rand_augment")  # one of them is null: see resolve_recipe

SELECTIONS = {"last": "last.ckpt", "best_ema": "best_ema.ckpt"}
CONFIG, EVALUATION = "config.yaml", "evaluation.json"
METRICS = ("top1", "map")  # the figure of an evaluation that says how good it is: of a classifier, of a detector


def open_run(config: DictConfig) -> tuple[Path, DictConfig]:
    """The run's folder and its resolved config; nothing is written.

    Raises UserError when the folder holds a run of another config, with the first key that differs, or of other data. A
    command that died before it saved anything is no run.
    """
    resolve_recipe(config)
    config.name = config.name or run_name(config)
    directory = folder_of(config)
    # Reported last where they differ: the user set the keys that they come from.
    derived = [key for key, value in flat(OmegaConf.to_container(config)).items() if str(value).startswith("${")]
    OmegaConf.resolve(config)
    require_writable_results(config.results, config.task)
    if _has_begun(directory):
        _require_same_run(directory, config, (*derived, *COLOUR))
        require_same_data(directory, config, read_config(directory).data.root, is_finished(directory))
    return directory, config


def record_run(directory: Path, config: DictConfig, data: "DataModule") -> None:
    """Writes config.yaml and what the data are into the folder of a run whose training is about to begin or go on.

    To be called once nothing is wrong with the command, so that one that is refused leaves nothing behind. Raises
    UserError when the run was begun with other data.
    """
    if _has_begun(directory):
        require_equal(directory, data, read_config(directory).data.root)
    else:
        write_on_rank_zero(directory / CONFIG, OmegaConf.to_yaml(config))
    record_data(directory, data)


def _require_same_run(directory: Path, config: DictConfig, derived: tuple[str, ...]) -> None:
    """Keys that only one of the configs has are those of another version of this project, as its classes' names are."""
    before = read_config(directory)
    found: list[tuple[bool, str, Any, Any]] = []
    for key in flat(before).keys() | flat(config).keys():
        old, new = (OmegaConf.select(each, key, default=...) for each in (before, config))
        if old != new and ... not in (old, new) and not starts_with(key, _MAY_CHANGE) and not key.endswith("_target_"):
            found.append((starts_with(key, derived), key, old, new))
    if found:
        _, key, old, new = min(found, key=lambda difference: difference[:2])
        raise UserError(
            f"{directory} was begun with {key}={old}, this command says {new}: "
            "go on with the old value, or give the new run a name=..."
        )


def _has_begun(directory: Path) -> bool:
    saved = (directory / EVALUATION).exists() or any((directory / "checkpoints").glob("*.ckpt"))
    return saved and (directory / CONFIG).exists()


def read_config(directory: Path) -> DictConfig:
    """The resolved config that a run was started with."""
    try:
        config = OmegaConf.load(directory / CONFIG)
    except FileNotFoundError:
        raise UserError(f"{directory}: no run is in this folder (it has no config.yaml)") from None
    except (yaml.YAMLError, UnicodeDecodeError, OmegaConfBaseException) as error:
        raise UserError(f"{directory / CONFIG}: not a config ({' '.join(str(error).split())})") from None
    if not isinstance(config, DictConfig):
        raise UserError(f"{directory / CONFIG}: not a config")
    return config


def resolved_for_evaluation(config: DictConfig) -> DictConfig:
    """The config of evaluate.py; what the command does not name is the run's or what the weights' file says of itself.

    Of a run that is its data, image size, loader and normalization; with another data=, its image size and
    normalization. Of a file it is width, image size, crop and normalization.
    """
    from hydra.core.hydra_config import HydraConfig

    named = {key_of(override) for override in HydraConfig.get().overrides.task}
    require_writable_results(config.results, config.get("task", "classification"))
    if config.run is not None:
        taken: list[tuple[str, Sequence[str]]] = [("", ("image_size", "loader")), ("data.augment.", ("mean", "std"))]
        if "data" not in named:
            read = [key for key in config.data if not key.startswith("_") and key != "augment"]
            taken.append(("data.", [key for key in read if not OmegaConf.is_interpolation(config.data, key)]))
        trained = read_config(Path(config.run))
        for key in (prefix + name for prefix, names in taken for name in names):
            if key not in named and OmegaConf.select(trained, key) is not None:
                OmegaConf.update(config, key, OmegaConf.select(trained, key), merge=False)
    else:
        given = {key: OmegaConf.select(config, key) for key in named}
        known = read_description(config.weights).settings(config.weights, given)
        for key, value in known.items():
            OmegaConf.update(config, key, list(value) if isinstance(value, tuple) else value, merge=False)
    OmegaConf.resolve(config)
    if missing := sorted(OmegaConf.missing_keys(config)):
        raise UserError(f"{missing[0]} is missing: give it on the command line, {missing[0]}=...")
    return config


def is_finished(directory: Path) -> bool:
    """Whether the run in `directory` was trained to its end and evaluated.

    A run that was interrupted may have been evaluated as well, and one that lost its process at the very end may have
    been evaluated by evaluate.py alone: what else the end of a run writes is then missing.
    """
    evaluation = read_evaluation(directory / EVALUATION)
    if evaluation is None:
        return False
    if not (directory / CONFIG).exists() or evaluation.get("epoch") is None:  # nothing says otherwise
        return True
    if evaluation["epoch"] + 1 < read_config(directory).get("epochs", 0):
        return False
    complete = all((directory / name).exists() for name in (evaluation_name("best_ema"), WEIGHTS_FILE))
    return complete or not (directory / "checkpoints" / SELECTIONS["last"]).exists()


def evaluation_name(selection: str) -> str:
    """The name of the file that holds a run's own evaluation of its last or best epoch."""
    return EVALUATION if selection == "last" else f"evaluation_{selection}.json"


def read_evaluation(path: Path) -> dict[str, Any] | None:
    """The evaluation in a file of a run's folder, None where there is none."""
    if not path.exists():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        metric = next((name for name in METRICS if name in content), METRICS[0])
        return {**content, metric: float(content[metric])}
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path}: not an evaluation ({error}): delete it and evaluate again") from None


def load_run(directory: Path, selection: str) -> tuple[RepGhostNet, int]:
    """The averaged network of a run's last or best epoch, and the number of that epoch, counted from 0."""
    content = read_selected(directory, selection)
    path = directory / "checkpoints" / SELECTIONS[selection]
    return model_from_state(content["ema"], str(path), content["run"]["width"]), int(content["history"][-1]["epoch"])


def read_selected(directory: Path, selection: str) -> dict[str, Any]:
    """The checkpoint of a run's last or best epoch. Raises UserError where there is none, or no epoch is complete."""
    if selection not in SELECTIONS:
        raise UserError(f"selection={selection} is not one of {', '.join(SELECTIONS)}")
    path = directory / "checkpoints" / SELECTIONS[selection]
    content = read_checkpoint(path)
    if not content.keys() >= {"ema", "history", "run"}:
        raise UserError(f"{path}: not a checkpoint of train.py")
    if not content["history"]:
        raise UserError(f"{directory}: no epoch of this run is complete yet; the command that began it goes on")
    return content


def data_name(config: Any) -> str:
    """A short name of the data set of a run's config: its folder's, or `digits`."""
    root = config.data.root
    return Path(root.rstrip("/")).name if isinstance(root, str) else root["_target_"].rpartition("_")[2]


def flat(config: Any, prefix: str = "") -> dict[str, Any]:
    """{"a.b": value} of a nested config; an empty mapping keeps its key."""
    if not isinstance(config, Mapping) or not config:
        return {prefix.rstrip("."): config}
    return {k: v for key, value in config.items() for k, v in flat(value, f"{prefix}{key}.").items()}


def objective(folder: Path) -> float | None:
    """What a job of a sweep returns to Hydra: its run's Top-1 in percent or mAP, None if the run is not finished."""
    evaluation = read_evaluation(folder / EVALUATION) if is_finished(folder) else None
    return next((evaluation[name] for name in METRICS if name in evaluation), None) if evaluation else None


def class_names_of(directory: Path) -> list[str] | None:
    """The class names of the run in `directory`; None, and a line on stderr, when it has none."""
    if not (directory / CLASSES_FILE).exists():
        print(f"{directory / CLASSES_FILE}: missing, showing numbers (class_names=FILE names them)", file=sys.stderr)
        return None
    of_imagenet = dict(zip(synsets(), class_words(), strict=True))
    return [of_imagenet.get(name, name) for name in read_class_names(directory / CLASSES_FILE)]


def resolve_recipe(config: DictConfig) -> None:
    """Leaves the one colour augmentation that the recipe gives to `config.width`, in place.

    Networks of `recipe.rand_augment_from_width` or wider get RandAugment, the others the jitter; null: every width the
    jitter. The paper draws the line between 1.11 and 1.3. The recipes of other tasks are left as they are.
    """
    if "rand_augment_from_width" not in config.recipe:
        return
    threshold = config.recipe.rand_augment_from_width
    wide = threshold is not None and config.width >= threshold
    config.recipe.augment["jitter" if wide else "rand_augment"] = None
