"""COCO's figures of a detector and of its fused form over the validation images, and how far the two differ.

Every image counts once on any number of devices, which is checked; the figures are computed on one rank, from the
detections of all. `evaluate` serves train.py and evaluate.py; what it returns is the content of evaluation.json.
Check: `pytest tests/test_detection_evaluation.py`.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from omegaconf import DictConfig
from torch import nn

from repghost.dataset import DataModule, DetectionBatch, DetectionIndex
from repghost.detection.detections import Detections, difference
from repghost.detection.figures import NOTHING, Truth
from repghost.detection.module import WITH_MASKS
from repghost.detection.reports import PICTURES, REPORTS, write_reports
from repghost.detection.run import load_detector
from repghost.errors import UserError
from repghost.evaluation.finish import Subject, finish_run, record_evaluation
from repghost.evaluation.outcome import changes, reports_folder
from repghost.evaluation.reports import report_names
from repghost.model import count_parameters
from repghost.reparameterization import reparameterize
from repghost.run import read_config

_AS_TRAINED = "32-true"


class DetectorEvaluation(pl.LightningModule):
    """Evaluates `detector` and its fused form side by side; `found` is what each found, None but on the first rank.

    autocast: compute in the trainer's precision instead of float32.
    """

    found: tuple[Detections, Detections] | None = None

    def __init__(self, detector: nn.Module, autocast: bool) -> None:
        super().__init__()
        self.forms = nn.ModuleList([detector.eval(), reparameterize(detector)])
        self._autocast = autocast

    def on_validation_epoch_start(self) -> None:
        self._batches: list[list[Detections]] = [[], []]

    def validation_step(self, batch: DetectionBatch, batch_idx: int) -> None:
        with nullcontext() if self._autocast else torch.autocast(self.device.type, enabled=False):
            for model, batches in zip(self.forms, self._batches, strict=True):
                batches.append(Detections.of(model(batch.images), batch.positions))

    def on_validation_epoch_end(self) -> None:
        trained, fused = (Detections.joined(batches) for batches in self._batches)
        self.found = (trained, fused) if trained is not None and fused is not None else None


def subject_of_run(directory: Path, selection: str) -> Subject:
    """The averaged detector of the last or the best epoch of a run."""
    network, classes, epoch = load_detector(directory, selection)
    return Subject.of_run(directory, selection, network, epoch, classes)


def subject_of(config: DictConfig, exported: nn.Module | None) -> Subject:
    """What a command of evaluate.py is about: a run."""
    return subject_of_run(Path(config.run), config.selection)


def evaluate(
    subject: Subject,
    trainer: pl.Trainer,
    data: DataModule,
    config: DictConfig,
    reports: Sequence[str] = (),
    autocast: bool = False,
) -> dict[str, Any]:
    """Evaluates the detector of a run on the validation images of `data` with the devices of `trainer`.

    config: of train.py or evaluate.py. autocast: compute in the trainer's precision instead of float32. reports: which
    of `repghost.detection.reports` are written, beside those of the config. Returns the content of evaluation.json,
    with figures in [0, 1] and None for those of objects that the data set does not have; the same on every rank. Raises
    UserError when detector and data have other classes, or when not every image was looked at exactly once.
    """
    assert subject.run is not None
    index: DetectionIndex = data.index("val")  # type: ignore[assignment]
    if subject.classes is not None and tuple(subject.classes) != tuple(index.classes):
        raise UserError(f"{subject.folder}: its detector was trained on other classes than those of {config.data.root}")
    reports = [*report_names(config.get("report"), REPORTS), *reports]
    evaluation = DetectorEvaluation(subject.network, autocast)
    trainer.validate(evaluation, datamodule=data, verbose=False)
    precision = str(trainer.precision) if autocast else _AS_TRAINED
    trained = read_config(subject.run)
    about = {
        "detector": trained.detector.name,
        "width": float(trained.width),
        "params_m": count_parameters(subject.network) / 1e6,
        "weights": subject.weights,
        "epoch": subject.epoch,
        "selection": subject.selection,
        "precision": precision,
        "changes": changes(subject.run, config, index.fingerprint, precision),
    }
    found: dict[str, Any] = {}
    if evaluation.found is not None:
        truth = Truth(index.annotations(), index.category_ids)
        found = figures_of(*evaluation.found, truth, about["detector"] == WITH_MASKS) | about
        if reports:
            folder = subject.folder / reports_folder(found, None)
            write_reports(reports, evaluation.found[0], truth, index.classes, data, folder)
    return dict(trainer.strategy.broadcast(found))


def figures_of(trained: Detections, fused: Detections, truth: Truth, masks: bool) -> dict[str, Any]:
    """The figures of both forms. Raises UserError unless both looked at every image exactly once."""
    for detections in (trained, fused):
        detections.require_all(len(truth.images))
    of_forms = [
        {name: None if value == NOTHING else value for name, value in truth.figures(detections, masks).items()}
        for detections in (trained, fused)
    ]
    if of_forms[0]["map"] is None:
        raise UserError("the validation images have no objects: there is nothing to evaluate")
    return {"images": len(trained.images), **of_forms[0], "fused": {**of_forms[1], **difference(trained, fused)}}


def table(evaluation: dict[str, Any], title: str) -> str:
    """The result for a person, in hundredths, as detectors are published: both forms of the detector."""
    fused = evaluation["fused"]
    lines = [f"\n{title}, {evaluation['images']:,} images"]
    shown = {"mAP": "map", "mAP50": "map50", "mAP75": "map75", "small": "map_small", "medium": "map_medium"}
    shown |= {"large": "map_large", "recall": "mar100"}
    for prefix, kind in (("", "boxes"), ("mask_", "masks")):
        for form, row in (("trained form", evaluation), ("fused", fused)):
            if f"{prefix}map" in row:
                figures = ((name, row[f"{prefix}{key}"]) for name, key in shown.items())
                words = (f"{name} {'  -' if value is None else f'{100 * value:5.1f}'}" for name, value in figures)
                lines.append(f"  {kind}, {form:<13} {'   '.join(words)}")
    unmatched = f", {fused['unmatched']} detections have no counterpart" if fused["unmatched"] else ""
    return "\n".join([*lines, f"  fusing changes scores by at most {fused['max_score_diff']:.1e}{unmatched}"])


# For the end of a training.
evaluate_run = partial(finish_run, subject_of_run=subject_of_run, evaluate=evaluate, table=table, pictures=PICTURES)


def record(config: DictConfig, subject: Subject, evaluation: dict[str, Any]) -> None:
    """Prints what evaluate.py found, appends it to the table of results and writes it into the run's folder."""
    record_evaluation(config, subject, evaluation, table(evaluation, subject.title))
