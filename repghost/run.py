"""The folder of a run: how it is named, opened again, described, and what evaluating it leaves there."""

import json
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import yaml
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pytorch_lightning.loggers import Logger
from pytorch_lightning.utilities.rank_zero import rank_zero_only

from repghost.atomic import write_text
from repghost.checkpoint import read_checkpoint
from repghost.cli import say
from repghost.errors import UserError
from repghost.evaluation import evaluate
from repghost.imagenet import scored_labels
from repghost.loggers import GuardedLogger
from repghost.model import RepGhostNet, count_macs, count_parameters
from repghost.naming import folder_of, run_name
from repghost.recipe import deviations, flat, resolve_recipe
from repghost.reparameterize import reparameterize
from repghost.results import append_result
from repghost.schedule import linear_scale
from repghost.weights import model_from_state, save_weights

SELECTIONS = {"last": "last.ckpt", "best_ema": "best_ema.ckpt"}

# Keys that may change between the start of a run and its resumption: where and how fast, not what.
_MAY_CHANGE = ("name", "output", "results", "trainer", "logger", "checkpoint", "curve_seconds", "profile", "accumulate",
               "data.workers", "data.prefetch", "data.cache", "data.root", "data.eval_batch_size")  # fmt: skip


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


def make_logger(config: DictConfig | None, directory: Path) -> Logger | None:
    """The logger of conf/logger beside the CSV files that every run writes; None for `logger=csv`."""
    if not config:
        return None
    logger = instantiate(config, save_dir=str(directory.resolve()), name=directory.name)
    return GuardedLogger(logger, directory / "config.yaml")


def describe(
    config: DictConfig, paper: Path, trainer: pl.Trainer, data: Any, model: RepGhostNet, official: bool
) -> None:
    """Prints what is about to be trained, on what, and in what it deviates from the recipe in the file `paper`."""
    recipe, ranks = config.recipe, trainer.world_size
    rate = linear_scale(
        recipe.learning_rate, batch_size=config.batch_size, reference_batch_size=recipe.reference_batch_size
    )
    params, macs = count_parameters(model) / 1e6, count_macs(model, config.image_size) / 1e6
    train, val = data.counts
    differences = deviations(config, OmegaConf.load(paper), ranks, str(trainer.precision))
    say(
        f"run        {Path(config.output) / config.name}\n"
        f"network    RepGhostNet {config.width:g}x, {params:.2f}M parameters, {macs:.1f}M multiply-accumulates "
        f"at {config.image_size} pixels\n"
        f"data       {train:,} training and {val:,} validation images in {data.num_classes} classes\n"
        f"recipe     {recipe.name}: {config.epochs} epochs, global batch {config.batch_size} on {ranks} device(s), "
        f"precision {trainer.precision}\n"
        f"rate       {recipe.learning_rate:g} at batch {recipe.reference_batch_size}, scaled linearly to {rate:g} "
        f"at batch {config.batch_size}\n"
        f"paper      {f'{chr(10)}           '.join(differences) or 'as in the paper'}\n"
        + (
            "official   every epoch is compared with the official run of this width"
            if official
            else "official   no run to compare with: those are of the published widths, on ImageNet, for 300 epochs"
        )
    )


def evaluate_run(directory: Path, trainer: pl.Trainer, data: Any, results: Path) -> None:
    """Evaluates the averaged weights of the last and of the best epoch, writes them and prints the table."""
    config = read_config(directory)
    evaluations = {
        selection: evaluate_selection(directory, selection, trainer, data, config.image_size)
        | {"crop_fraction": config.data.crop_fraction, "precision": "32-true"}  # whatever the training's was
        for selection in SELECTIONS
    }
    last = load_run(directory, "last")[0]
    if trainer.is_global_zero:
        save_weights(last, directory / "model.safetensors")
        save_weights(reparameterize(last), directory / "model_fused.safetensors")
        # The last epoch's comes last: its file says that the run is finished.
        for evaluation in reversed(evaluations.values()):
            if not _evaluation_file(
                directory, evaluation
            ).exists():  # a run that died between the two adds no row twice
                append_result(results, directory.name, data_name(config), evaluation)
                write_evaluation(directory, evaluation)
    for selection, evaluation in evaluations.items():
        say(table(evaluation, f"EMA, {selection.replace('_', ' ')} epoch"))
    trainer.strategy.barrier()


def write_evaluation(directory: Path, evaluation: dict[str, Any]) -> None:
    """Writes the evaluation of a run's last epoch as evaluation.json, that of its best as evaluation_best_ema.json."""
    write_text(_evaluation_file(directory, evaluation), json.dumps(evaluation, indent=2) + "\n")


def _evaluation_file(directory: Path, evaluation: dict[str, Any]) -> Path:
    suffix = "" if evaluation["selection"] == "last" else f"_{evaluation['selection']}"
    return directory / f"evaluation{suffix}.json"


def evaluate_selection(
    directory: Path, selection: str, trainer: pl.Trainer, data: Any, image_size: int, **options: Any
) -> dict[str, Any]:
    """The content of evaluation.json for the averaged weights of one epoch of a run; `options` of `evaluate_model`."""
    model, epoch = load_run(directory, selection)
    return {
        **evaluate_model(model, trainer, data, model.width, image_size, **options),
        "weights": "ema",
        "epoch": epoch,
        "selection": selection,
    }


def evaluate_model(
    model: RepGhostNet,
    trainer: pl.Trainer,
    data: Any,
    width: float,
    image_size: int,
    test_set: str | None = None,
    real_labels: str | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Figures of a model and its fused twin over the validation images of `data`.

    test_set, real_labels: what counts as right (see `repghost.imagenet`). `options` are those of `evaluate`.
    """
    scored = scored_labels(test_set, real_labels, data.index("val"), model.classifier.out_features)
    return {
        **evaluate(trainer, model, data, scored=scored, **options),
        "width": float(width),
        "params_m": count_parameters(model) / 1e6,
        "macs_m": count_macs(model, image_size) / 1e6,
        "image_size": image_size,
    }


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


def table(evaluation: dict[str, Any], title: str) -> str:
    """The result for a person: unfused and fused side by side, with 95% intervals."""
    fused = evaluation["fused"]
    lines = [f"\n{title}, {evaluation['images']:,} images"]
    for name, row in (("trained form", evaluation), ("fused", fused)):
        shares = [
            f"{label} {row[key]:6.2f}% [{row[f'{key}_interval'][0]:.2f}, {row[f'{key}_interval'][1]:.2f}]"
            for label, key in (("Top-1", "top1"), ("Top-5", "top5"))
        ]
        lines.append(f"  {name:<13} {'   '.join(shares)}   loss {row['loss']:.4f}")
    lines.append(
        f"  fusing changes {fused['top1_flips']} Top-1, and the logits by at most {fused['max_rel_logit_diff']:.1e} of "
        "the largest; in brackets: 95% intervals"
    )
    return "\n".join(lines)


def _starts_with(key: str, prefixes: tuple[str, ...]) -> bool:
    return any(key == prefix or key.startswith(f"{prefix}.") for prefix in prefixes)
