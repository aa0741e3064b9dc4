"""The loss, the parameter groups, and that every knob of the step does something."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from repghost.metrics import score_sums, scores
from repghost.model import RepGhostNet, repghostnet
from repghost.training.classifier import ImageClassifier, parameter_groups, smoothed_cross_entropy

RECIPE: dict[str, Any] = {
    "reference_batch_size": 1024,
    "learning_rate": 0.6,
    "start_learning_rate": 1e-4,
    "final_learning_rate": 1e-5,
    "warmup_epochs": 5,
    "momentum": 0.9,
    "weight_decay": 1e-5,
    "label_smoothing": 0.1,
    "ema_decay": 0.9999,
    "ema_span": None,
}
RUN: dict[str, Any] = {
    "epochs": 300,
    "batch_size": 1024,
    "steps_per_epoch": 1251,
    "freeze_epochs": 0,
    "channels_last": False,
    "compile": False,
    "compile_mode": "default",
    "seed": 0,
}


def classifier_of(model: RepGhostNet, **options: Any) -> ImageClassifier:
    """A classifier by the paper's recipe; options: keys of RECIPE or RUN."""
    recipe, run = ({key: options.get(key, value) for key, value in all.items()} for all in (RECIPE, RUN))
    assert options.keys() <= recipe.keys() | run.keys()
    return ImageClassifier(model, recipe, **run)


def test_loss_equals_torch_and_ignores_masked_rows() -> None:
    logits, labels = torch.randn(6, 5), torch.tensor([0, 4, 2, -1, 1, -1])
    kept = labels >= 0
    expected = F.cross_entropy(logits[kept], labels[kept], label_smoothing=0.1)
    torch.testing.assert_close(smoothed_cross_entropy(logits, labels, 0.1), expected)
    assert smoothed_cross_entropy(logits, torch.full((6,), -1), 0.1) == 0


def test_scores_count_rows_with_a_label_only() -> None:
    logits = torch.eye(7)[[0, 1, 2, 3]] * 10
    labels = torch.tensor([0, 1, 5, -1])
    result = scores(score_sums(logits, labels) + score_sums(logits[:1], labels[:1]))
    assert result.images == 4
    assert result.top1 == pytest.approx(75)
    expected = F.cross_entropy(logits[[0, 1, 2, 0]], labels[[0, 1, 2, 0]]).item()
    assert result.loss == pytest.approx(expected, rel=1e-6)


def test_top5_with_fewer_than_five_classes() -> None:
    assert scores(score_sums(torch.randn(9, 2), torch.ones(9, dtype=torch.int64))).top5 == 100


def test_weight_decay_spares_biases_and_vectors() -> None:
    model = repghostnet(0.5)
    spared, decayed = parameter_groups(model, 1e-5)
    assert spared["weight_decay"] == 0 and decayed["weight_decay"] == 1e-5
    assert all(p.ndim > 1 for p in decayed["params"]) and all(p.ndim == 1 for p in spared["params"])
    biases = {id(p) for name, p in model.named_parameters() if name.endswith("bias")}
    assert biases <= {id(p) for p in spared["params"]}
    assert len(spared["params"]) + len(decayed["params"]) == len(list(model.parameters()))


def test_the_rate_is_scaled_to_the_global_batch() -> None:
    classifier = classifier_of(repghostnet(0.1, 3), batch_size=256)
    assert [round(classifier.epoch_learning_rate(e), 6) for e in (0, 1, 150)] == [2.5e-5, 0.030020, 0.075001]


def test_the_average_spans_a_share_of_the_run() -> None:
    options = {"ema_decay": None, "ema_span": 0.1, "epochs": 10, "steps_per_epoch": 20}
    assert classifier_of(repghostnet(0.1, 3), **options).ema.decay == pytest.approx(1 - 1 / 20)
