"""Top-1, Top-5 and loss of a model and of its fused twin over the validation images, and how far the two differ.

Every image counts once on any number of devices: sums are reduced, never means. Intervals are Wilson's for a binomial
share (Wilson 1927, JASA 22), at 95%. Reports are CSV files: `classes` (accuracy of every class, and the pairs that are
confused most) and `predictions` (the five likeliest classes of every image). Check: `pytest tests/test_evaluation.py`.
"""

import csv
import io
import json
import math
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from repghost.dataset import Batch, DataModule, SplitIndex
from repghost.errors import UserError, print_rank_zero
from repghost.export.runtimes import ExportedModel
from repghost.files import write_text
from repghost.metrics import scores
from repghost.model import RepGhostNet, count_macs, count_parameters, repghostnet
from repghost.reparameterize import reparameterize
from repghost.results import append_result
from repghost.run import SELECTIONS, data_name, load_run, read_config
from repghost.test_sets import ScoredLabels, scored_labels
from repghost.weights import save_weights

REPORTS = ("classes", "predictions")
CONFUSED_PAIRS = 100  # rows of confusions.csv
_Z = 1.959963984540054  # 95% of a normal distribution lie within so many standard deviations


class Evaluation(pl.LightningModule):
    """Evaluates `model` and `reparameterize(model)` side by side, and keeps what the reports need of the former.

    A model that is no RepGhostNet, such as an exported file, has no other form and stands for both.
    scored: what counts as right. autocast: compute in the trainer's precision; otherwise in float32 whatever that is.
    """

    def __init__(
        self,
        model: nn.Module,
        scored: ScoredLabels | None = None,
        autocast: bool = False,
        report: Sequence[str] = (),
        num_classes: int = 0,
    ) -> None:
        super().__init__()
        self.model = model.eval()
        self.fused = reparameterize(model) if isinstance(model, RepGhostNet) else self.model
        self._scored = scored or ScoredLabels()
        self._autocast = autocast
        self._report = report
        self._num_classes = num_classes  # of the data set; for the reports

    def on_validation_epoch_start(self) -> None:
        self._scored = self._scored.to(self.device)
        self._sums = torch.zeros(2, 4, dtype=torch.float64, device=self.device)  # unfused, fused
        self._flips = torch.zeros((), dtype=torch.int64, device=self.device)
        self._extremes = torch.zeros(2, device=self.device)  # largest difference, largest logit
        shape = (self._num_classes, self._num_classes) if "classes" in self._report else (0, 0)
        self._confusion = torch.zeros(shape, dtype=torch.int64, device=self.device)  # label, prediction
        self._top5_hits = torch.zeros(shape[0], dtype=torch.int64, device=self.device)
        self._predictions: list[tuple[Tensor, ...]] = []

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        images, labels, positions, _ = batch
        with nullcontext() if self._autocast else torch.autocast(self.device.type, enabled=False):
            logits = self.model(images)
            fused = logits if self.fused is self.model else self.fused(images)
        logits, fused = (self._scored.select(x.float()) for x in (logits, fused))
        self._sums += torch.stack([self._scored.sums(x, labels, positions) for x in (logits, fused)])
        counted = (labels >= 0)[:, None]
        self._flips += ((logits.argmax(1) != fused.argmax(1)) & counted[:, 0]).sum()
        extremes = torch.stack([((logits - fused).abs() * counted).max(), (logits.abs() * counted).max()])
        self._extremes = torch.maximum(self._extremes, extremes)
        if self._report:
            self._keep(logits, labels, positions)

    def _keep(self, logits: Tensor, labels: Tensor, positions: Tensor) -> None:
        probabilities, top = logits.softmax(1).topk(min(5, logits.shape[1]), dim=1)
        if "classes" in self._report:
            real = labels >= 0
            pairs = labels[real] * self._num_classes + top[real, 0]
            self._confusion += torch.bincount(pairs, minlength=self._num_classes**2).view_as(self._confusion)
            hits = labels[real][(top == labels[:, None]).any(1)[real]]
            self._top5_hits += torch.bincount(hits, minlength=self._num_classes)
        if "predictions" in self._report:
            self._predictions.append((positions, labels, top, probabilities))

    def on_validation_epoch_end(self) -> None:
        reduce = self.trainer.strategy.reduce
        self._sums, self._flips = reduce(self._sums, reduce_op="sum"), reduce(self._flips, reduce_op="sum")
        self._extremes = reduce(self._extremes, reduce_op="max")
        if "classes" in self._report:
            self._confusion = reduce(self._confusion, reduce_op="sum")
            self._top5_hits = reduce(self._top5_hits, reduce_op="sum")
        if "predictions" in self._report:
            # All ranks have equally many rows; those without an image go after the gathering.
            kept = (torch.cat(parts) for parts in zip(*self._predictions, strict=True))
            rows = [self._from_all_ranks(x) for x in kept]
            real = rows[1] >= 0
            order = rows[0][real].argsort()
            self._predictions = [tuple(x[real][order].cpu() for x in rows)]

    def _from_all_ranks(self, rows: Tensor) -> Tensor:
        """[N, ...] of every rank as [N * ranks, ...]."""
        gathered = self.all_gather(rows)  # with a new first dimension where there are several ranks
        assert isinstance(gathered, Tensor)
        return gathered.flatten(0, 1) if self.trainer.world_size > 1 else gathered

    def results(self) -> dict[str, Any]:
        """The figures of `evaluation.json`; accuracies and their intervals in percent."""
        unfused, fused = (scores(s) for s in self._sums)
        difference, largest = self._extremes.tolist()
        return {
            "images": unfused.images,
            "top1": unfused.top1,
            "top5": unfused.top5,
            "loss": unfused.loss,
            "top1_interval": interval(unfused.top1, unfused.images),
            "top5_interval": interval(unfused.top5, unfused.images),
            "fused": {
                "top1": fused.top1,
                "top5": fused.top5,
                "loss": fused.loss,
                "top1_interval": interval(fused.top1, fused.images),
                "top5_interval": interval(fused.top5, fused.images),
                "max_abs_logit_diff": difference,
                "max_rel_logit_diff": difference / largest,
                "top1_flips": int(self._flips),
            },
        }

    def write_reports(self, folder: Path, index: SplitIndex) -> list[Path]:
        """Writes classes.csv and confusions.csv, predictions.csv, or both, for the images of `index`."""
        written = []
        if "classes" in self._report:
            written.append(_write_csv(folder / "classes.csv", self._class_rows(index.classes)))
            written.append(_write_csv(folder / "confusions.csv", self._confusion_rows(index.classes)))
        if "predictions" in self._report:
            written.append(_write_csv(folder / "predictions.csv", self._prediction_rows(index.keys())))
        return written

    def _class_rows(self, classes: Sequence[str]) -> list[list[Any]]:
        rows: list[list[Any]] = [["label", "class", "images", "top1", "top5"]]
        counts, right = self._confusion.sum(1).tolist(), self._confusion.diagonal().tolist()
        for label, (name, images) in enumerate(zip(classes, counts, strict=True)):
            shares = [100 * hits / images if images else "" for hits in (right[label], int(self._top5_hits[label]))]
            rows.append([label, name, images, *shares])
        return rows

    def _confusion_rows(self, classes: Sequence[str]) -> list[list[Any]]:
        rows: list[list[Any]] = [["label", "class", "predicted_label", "predicted_class", "images", "share"]]
        images = self._confusion.sum(1)
        wrong = self._confusion.clone().fill_diagonal_(0).flatten()
        for pair in wrong.argsort(descending=True, stable=True)[:CONFUSED_PAIRS].tolist():
            label, predicted = divmod(pair, len(classes))
            if count := int(wrong[pair]):
                share = 100 * count / int(images[label])
                rows.append([label, classes[label], predicted, classes[predicted], count, share])
        return rows

    def _prediction_rows(self, keys: Sequence[str]) -> list[list[Any]]:
        positions, labels, top, probabilities = (x.tolist() for x in self._predictions[0])
        ranks = range(1, len(top[0]) + 1)
        header = ["key", "label", *(f"predicted_{k}" for k in ranks), *(f"probability_{k}" for k in ranks)]
        rows = zip(positions, labels, top, probabilities, strict=True)
        return [header, *([keys[i], label, *t, *(f"{p:.6g}" for p in ps)] for i, label, t, ps in rows)]


def interval(percent: float, images: int) -> list[float]:
    """Wilson's 95% interval of an accuracy, in percent: [low, high]."""
    share, spread = percent / 100, _Z**2 / images
    middle = (share + spread / 2) / (1 + spread)
    half = _Z / (1 + spread) * math.sqrt(share * (1 - share) / images + spread / (4 * images))
    return [100 * max(0.0, middle - half), 100 * min(1.0, middle + half)]


def evaluate(
    trainer: pl.Trainer,
    model: nn.Module,
    data: DataModule,
    *,
    scored: ScoredLabels | None = None,
    autocast: bool = False,
    report: Sequence[str] = (),
    folder: Path | None = None,
) -> dict[str, Any]:
    """Evaluates `model` on the validation images of `data` with the devices of `trainer`.

    The arguments are those of `Evaluation`; `folder` is where the reports go. Raises UserError when not every image
    was counted exactly once.
    """
    if unknown := set(report) - set(REPORTS):
        raise UserError(f"report={min(unknown)} is not one of {', '.join(REPORTS)}")
    index = data.index("val")
    evaluation = Evaluation(model, scored, autocast, report, num_classes=len(index.classes))
    trainer.validate(evaluation, datamodule=data, verbose=False)
    results = evaluation.results()
    expected = (scored or ScoredLabels()).images(len(index))
    if results["images"] != expected:
        raise UserError(f"evaluated {results['images']} images, but the data set has {expected}")
    if report and trainer.is_global_zero:
        assert folder is not None, "reports need a folder"
        evaluation.write_reports(folder, index)
    return results


def _write_csv(path: Path, rows: Sequence[Sequence[Any]]) -> Path:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    write_text(path, text.getvalue())
    return path


def evaluate_run(directory: Path, trainer: pl.Trainer, data: DataModule, results: Path) -> None:
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
        print_rank_zero(table(evaluation, f"EMA, {selection.replace('_', ' ')} epoch"))
    trainer.strategy.barrier()


def write_evaluation(directory: Path, evaluation: dict[str, Any]) -> None:
    """Writes the evaluation of a run's last epoch as evaluation.json, that of its best as evaluation_best_ema.json."""
    write_text(_evaluation_file(directory, evaluation), json.dumps(evaluation, indent=2) + "\n")


def _evaluation_file(directory: Path, evaluation: dict[str, Any]) -> Path:
    suffix = "" if evaluation["selection"] == "last" else f"_{evaluation['selection']}"
    return directory / f"evaluation{suffix}.json"


def evaluate_selection(
    directory: Path, selection: str, trainer: pl.Trainer, data: DataModule, image_size: int, **options: Any
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
    data: DataModule,
    width: float,
    image_size: int,
    test_set: str | None = None,
    real_labels: str | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Figures of a model and its fused twin over the validation images of `data`.

    test_set, real_labels: what counts as right (see `repghost.test_sets`). `options` are those of `evaluate`.
    """
    scored = scored_labels(test_set, real_labels, data.index("val"), model.classifier.out_features)
    return {
        **evaluate(trainer, model, data, scored=scored, **options),
        "width": float(width),
        "params_m": count_parameters(model) / 1e6,
        "macs_m": count_macs(model, image_size) / 1e6,
        "image_size": image_size,
    }


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


def evaluate_exported(
    model: ExportedModel,
    trainer: pl.Trainer,
    data: DataModule,
    test_set: str | None = None,
    real_labels: str | None = None,
    **options: Any,
) -> dict[str, Any]:
    """As `repghost.run.evaluate_model`, for an exported file, which has no training form to differ from."""
    facts = model.metadata
    scored = scored_labels(test_set, real_labels, data.index("val"), facts["num_classes"])
    result = evaluate(trainer, model, data, scored=scored, **options)
    result["fused"] |= {"top1_flips": None, "max_abs_logit_diff": None, "max_rel_logit_diff": None}
    with torch.device("meta"):
        network = repghostnet(facts["width"], facts["num_classes"], fused=True)
    return {
        **result,
        "width": facts["width"],
        "params_m": count_parameters(network) / 1e6,
        "macs_m": count_macs(network, facts["image_size"]) / 1e6,
        "image_size": facts["image_size"],
        "precision": facts["precision"],
    }


def summary(evaluation: dict[str, Any], title: str) -> str:
    """The result for a person, with 95% intervals, as `repghost.run.table`."""
    shares = []
    for label, key in (("Top-1", "top1"), ("Top-5", "top5")):
        low, high = evaluation[f"{key}_interval"]
        shares.append(f"{label} {evaluation[key]:6.2f}% [{low:.2f}, {high:.2f}]")
    return (
        f"\n{title}, {evaluation['images']:,} images\n"
        f"  {evaluation['precision']:<13} {'   '.join(shares)}   loss {evaluation['loss']:.4f}\n"
        "  an exported file is the fused network; in brackets: 95% intervals"
    )
