"""The end of a training: its last and its best epoch are evaluated, and the averaged weights written, for every task.

Check: `pytest tests/test_evaluation.py tests/test_train.py`.
"""

import filecmp
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from omegaconf import DictConfig
from torch import nn

from repghost.dataset import DataModule
from repghost.description import describe_run
from repghost.errors import print_rank_zero
from repghost.evaluation.outcome import append_row, is_recorded, reports_folder, write_evaluation
from repghost.reparameterization import reparameterize
from repghost.run import SELECTIONS
from repghost.training.loggers import GuardedLogger
from repghost.weights import save_weights

Evaluate = Callable[["Subject", pl.Trainer, DataModule, DictConfig, Sequence[str]], dict[str, Any]]


@dataclass(frozen=True)
class Subject:
    """A network to evaluate: a RepGhostNet, a detector, or an exported file, which says of itself what it is
    (`metadata`).

    name, title and folder: its row in the table of results, the line above its figures, where its reports go; run: the
    folder of a run. weights (`ema` for a run's average), epoch and selection (of a run) are those of evaluation.json.
    classes: the names of its outputs, None where nobody knows them.
    """

    network: nn.Module
    name: str
    title: str
    folder: Path
    weights: str
    epoch: int | None = None
    selection: str | None = None
    run: Path | None = None
    classes: Sequence[str] | None = None

    @classmethod
    def of_run(
        cls, run: Path, selection: str, network: nn.Module, epoch: int, classes: Sequence[str] | None
    ) -> "Subject":
        """The averaged network of a run's last or best epoch."""
        title = f"{run}, EMA, {selection.replace('_', ' ')} epoch"
        return cls(network, run.name, title, run, "ema", epoch, selection, run, classes)


def record_evaluation(config: DictConfig, subject: Subject, evaluation: dict[str, Any], printed: str) -> None:
    """Prints what evaluate.py found, appends it to the table of results and writes it into a run's folder.

    To be called on one rank only. printed: the figures for a person.
    """
    print(printed)
    if config.report:
        print(f"  reports in {subject.folder / reports_folder(evaluation, config.get('test_set'))}")
    append_row(config, subject.name, evaluation, subject.run)
    if subject.run is not None:
        print(f"  written to {write_evaluation(subject.run, evaluation)}")


def finish_run(
    directory: Path,
    config: DictConfig,
    trainer: pl.Trainer,
    data: DataModule,
    *,
    subject_of_run: Callable[[Path, str], Subject],
    evaluate: Evaluate,
    table: Callable[[dict[str, Any], str], str],
    pictures: Sequence[str],
) -> None:
    """Evaluates the averaged weights of the last and of the best epoch of a run, writes and prints the results.

    The loggers of `trainer` get the pictures of the last epoch's, and are closed. pictures: names of reports that are
    pictures. table: of an evaluation and its title, for a person.
    """
    evaluations: dict[str, dict[str, Any]] = {}
    pictures = pictures if trainer.loggers else ()
    checkpoints = {selection: directory / "checkpoints" / name for selection, name in SELECTIONS.items()}
    for selection, path in checkpoints.items():
        # Often the best epoch is the last one: then this is a copy, byte for byte, of what was just evaluated.
        if selection != "last" and path.exists() and filecmp.cmp(path, checkpoints["last"], shallow=False):
            evaluations[selection] = evaluations["last"] | {"selection": selection}
            continue
        subject = subject_of_run(directory, selection)
        if selection == "last" and trainer.is_global_zero:
            description = describe_run(config, data.index("train").classes, data.index("train").fingerprint)
            network: Any = subject.network
            save_weights(network, directory / "model.safetensors", description)
            save_weights(reparameterize(network), directory / "model_fused.safetensors", description)
        if selection != "last" and subject.epoch == evaluations["last"]["epoch"]:  # the same weights
            evaluations[selection] = evaluations["last"] | {"selection": selection}
        else:
            reports = pictures if selection == "last" else ()
            evaluations[selection] = evaluate(subject, trainer, data, config, reports)
    if trainer.is_global_zero:
        # The last epoch's comes last: its file says that the run is finished.
        for evaluation in reversed(evaluations.values()):
            # A run that died between the two adds no row twice.
            if not is_recorded(directory, evaluation):
                append_row(config, directory.name, evaluation, directory)
                write_evaluation(directory, evaluation)
    for selection, evaluation in evaluations.items():
        print_rank_zero(table(evaluation, f"EMA, {selection.replace('_', ' ')} epoch"))
    for logger in trainer.loggers:
        if isinstance(logger, GuardedLogger):
            logger.close([directory / f"{name}.png" for name in pictures])
    trainer.strategy.barrier()
