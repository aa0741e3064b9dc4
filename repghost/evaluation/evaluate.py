"""Top-1, Top-5 and loss of a network and of its fused form over the validation images, and how far the two differ.

Every image counts once on any number of devices: sums are reduced, never means. `evaluate` serves train.py and
evaluate.py; what it returns is the content of evaluation.json. Check: `pytest tests/test_evaluation.py`.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from omegaconf import DictConfig
from torch import Tensor, nn

from repghost.dataset import Batch, DataModule
from repghost.errors import UserError
from repghost.evaluation.finish import Subject, finish_run, record_evaluation
from repghost.evaluation.outcome import changes, interval, reports_folder, table
from repghost.evaluation.reports import PICTURES, Predictions, report_names, write_reports
from repghost.evaluation.test_sets import LabelMap, label_map
from repghost.metrics import Scores, scores
from repghost.model import RepGhostNet, count_macs, count_parameters, repghostnet
from repghost.reference import published_accuracy, synsets
from repghost.reparameterization import reparameterize
from repghost.run import load_run
from repghost.run_data import recorded_data
from repghost.weights import load_model, read_description


class Evaluation(pl.LightningModule):
    """Evaluates `network` and `reparameterize(network)` side by side.

    A network that is no RepGhostNet, such as an exported file, stands for both forms. labels: which outputs and labels
    count. autocast: compute in the trainer's precision instead of float32. keep_predictions: for the reports.
    """

    def __init__(self, network: nn.Module, labels: LabelMap, autocast: bool, keep_predictions: bool) -> None:
        super().__init__()
        self.model = network.eval()
        self.fused = reparameterize(network) if isinstance(network, RepGhostNet) else self.model
        self._labels = labels
        self._autocast = autocast
        self._keep_predictions = keep_predictions

    def on_validation_epoch_start(self) -> None:
        self._labels = self._labels.to(self.device)
        self._sums = torch.zeros(2, 4, dtype=torch.float64, device=self.device)  # trained form, fused
        self._flips = torch.zeros((), dtype=torch.int64, device=self.device)
        self._extremes = torch.zeros(2, device=self.device)  # largest difference, largest logit
        self._batches: list[tuple[Tensor, ...]] = []  # the columns of Predictions

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        images, labels, positions = batch[:3]
        with nullcontext() if self._autocast else torch.autocast(self.device.type, enabled=False):
            logits = self.model(images)
            fused = logits if self.fused is self.model else self.fused(images)
        logits, fused = (self._labels.select(x.float()) for x in (logits, fused))
        self._sums += torch.stack([self._labels.sums(x, labels, positions) for x in (logits, fused)])
        counted = (labels >= 0)[:, None]
        self._flips += ((logits.argmax(1) != fused.argmax(1)) & counted[:, 0]).sum()
        extremes = torch.stack([((logits - fused).abs() * counted).max(), (logits.abs() * counted).max()])
        self._extremes = torch.maximum(self._extremes, extremes)
        if self._keep_predictions:
            probabilities, top = logits.softmax(1).topk(min(5, logits.shape[1]), dim=1)
            self._batches.append((positions, labels, top, probabilities))

    def on_validation_epoch_end(self) -> None:
        reduce = self.trainer.strategy.reduce
        self._sums, self._flips = reduce(self._sums, reduce_op="sum"), reduce(self._flips, reduce_op="sum")
        self._extremes = reduce(self._extremes, reduce_op="max")
        if self._keep_predictions:
            columns = [self._from_all_ranks(torch.cat(parts)) for parts in zip(*self._batches, strict=True)]
            order = columns[0].argsort()  # that of the index
            order = order[columns[1][order] >= 0]  # without padding
            self.predictions = Predictions(*(column[order].cpu().numpy() for column in columns))

    def _from_all_ranks(self, rows: Tensor) -> Tensor:
        """[N, ...] of every rank as [N * ranks, ...]; all ranks have the same N, padding included."""
        gathered = self.all_gather(rows)  # with a new first dimension where there are several ranks
        assert isinstance(gathered, Tensor)
        return gathered.flatten(0, 1) if self.trainer.world_size > 1 else gathered

    def results(self) -> dict[str, Any]:
        """The figures of evaluation.json; accuracies and their intervals in percent."""
        trained, fused = (scores(s) for s in self._sums)
        difference, largest = self._extremes.tolist()
        changes = {
            "max_abs_logit_diff": difference,
            "max_rel_logit_diff": difference / largest,
            "top1_flips": int(self._flips),
        }
        if self.fused is self.model:
            changes = dict.fromkeys(changes)
        return {"images": trained.images, **_figures(trained), "fused": {**_figures(fused), **changes}}


def _figures(of: Scores) -> dict[str, Any]:
    intervals = {f"{name}_interval": interval(getattr(of, name), of.images) for name in ("top1", "top5")}
    return {"top1": of.top1, "top5": of.top5, "loss": of.loss, **intervals}


def subject_of_run(directory: Path, selection: str) -> Subject:
    """The averaged network of the last or the best epoch of a run."""
    network, epoch = load_run(directory, selection)
    data = recorded_data(directory)
    return Subject.of_run(directory, selection, network, epoch, data.classes if data else None)


def subject_of(config: DictConfig, exported: nn.Module | None) -> Subject:
    """What a command of evaluate.py is about: a run, an exported file that was opened, or weights of a given width."""
    if config.run is not None:
        return subject_of_run(Path(config.run), config.selection)
    weights, results = str(config.weights), Path(config.results).parent
    path = Path(weights.removeprefix("official:"))
    if exported is not None:
        subject = Subject(exported, path.name, weights, results / path.name, weights)
    else:
        name, title = f"{path.stem}-{config.width:g}", f"{weights}, width {config.width:g}"
        subject = Subject(load_model(weights, config.width), name, title, results / name, weights)
    published = weights == "timm" or weights.startswith("official:")
    return replace(subject, classes=synsets() if published else read_description(weights).classes)


def evaluate(
    subject: Subject,
    trainer: pl.Trainer,
    data: DataModule,
    config: DictConfig,
    reports: Sequence[str] = (),
    autocast: bool = False,
) -> dict[str, Any]:
    """Evaluates a network on the validation images of `data` with the devices of `trainer`.

    config: of train.py or evaluate.py; the latter's test_set and real_labels say what counts as right. autocast:
    compute in the trainer's precision instead of float32. reports: which of `repghost.evaluation.reports` are written,
    beside those of the config. Returns the content of evaluation.json. Raises UserError when network and data do not
    fit, or when not every image was counted exactly once.
    """
    reports = [*report_names(config.get("report")), *reports]
    index, metadata = data.index("val"), getattr(subject.network, "metadata", {})
    network = subject.network
    if not isinstance(network, RepGhostNet):
        with torch.device("meta"):
            network = repghostnet(metadata["width"], metadata["num_classes"], fused=True)
    outputs, test_set = network.classifier.out_features, config.get("test_set")
    labels = label_map(test_set, config.get("real_labels"), index, outputs, subject.classes)
    evaluation = Evaluation(subject.network, labels, autocast, keep_predictions=bool(reports))
    trainer.validate(evaluation, datamodule=data, verbose=False)
    results = evaluation.results()
    if results["images"] != (expected := labels.images(len(index))):
        raise UserError(f"evaluated {results['images']} images, but the data set has {expected}")
    precision = metadata.get("precision") or (str(trainer.precision) if autocast else "32-true")
    found = {
        **results,
        "width": float(network.width),
        "params_m": count_parameters(network) / 1e6,
        "macs_m": count_macs(network, config.image_size) / 1e6,
        "image_size": config.image_size,
        "weights": subject.weights,
        "epoch": subject.epoch,
        "selection": subject.selection,
        "crop_fraction": config.data.crop_fraction,
        "precision": precision,
        "scored": labels.note,
        "changes": changes(subject.run, config, index.fingerprint, precision) if subject.run else {},
    }
    if reports and trainer.is_global_zero:
        write_reports(reports, evaluation.predictions, data, subject.folder / reports_folder(found, test_set))
    return found


# For the end of a training.
evaluate_run = partial(finish_run, subject_of_run=subject_of_run, evaluate=evaluate, table=table, pictures=PICTURES)


def record(config: DictConfig, subject: Subject, evaluation: dict[str, Any]) -> None:
    """Prints what evaluate.py found, beside what is published of a test set, and keeps it. On one rank only."""
    printed = table(evaluation, subject.title)
    if config.test_set and (expected := published_accuracy(config.test_set, evaluation["width"])):
        published = f"Top-1 {expected[0]:6.2f}%   Top-5 {expected[1]:6.2f}%"
        printed += f"\n  timm, published weights of this width: {published}"
    record_evaluation(config, subject, evaluation, printed)
