"""The loss, the parameter groups, the optimizer and its state, the counters, and the steps that are not taken."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from runs import PowerCut, cut_after
from torch import nn
from torch.optim import SGD

from repghost.dataset import Batch
from repghost.metrics import score_sums, scores
from repghost.model import RepGhostNet, repghostnet
from repghost.training.classifier import ImageClassifier, smoothed_cross_entropy
from repghost.training.module import parameter_groups, prepare_optimizer, seed_step

Program = Callable[..., int]
RECIPE: dict[str, Any] = {
    "reference_batch_size": 1024,
    "learning_rate": 0.6,
    "start_learning_rate": 1e-4,
    "final_learning_rate": 1e-5,
    "warmup_epochs": 5,
    "momentum": 0.9,
    "weight_decay": 1e-5,
    "gradient_clip": None,
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


# -- the optimizer -----------------------------------------------------------------------------------------------------


def linear(fused: bool | None) -> tuple[nn.Linear, SGD]:
    """A layer whose weights are the same at every call, and SGD with the recipe's momentum."""
    torch.manual_seed(0)
    layer = nn.Linear(3, 2)
    return layer, SGD(layer.parameters(), lr=0.1, momentum=0.9, nesterov=True, fused=fused)


def test_fused_sgd_passes_a_first_step_that_amp_skips() -> None:
    layer, optimizer = linear(fused=True)
    expected, plain = linear(fused=None)
    before = copy.deepcopy(layer.state_dict())
    prepare_optimizer(optimizer, fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    images = torch.arange(6.0).reshape(2, 3)
    for factor in (float("inf"), 1.0):
        optimizer.zero_grad()
        scaler.scale(layer(images).square().mean()).backward()
        layer.weight.grad *= factor  # type: ignore[operator]
        scaler.step(optimizer)
        scaler.update()
        if factor != 1:
            assert all(torch.equal(tensor, before[name]) for name, tensor in layer.state_dict().items())
    expected(images).square().mean().backward()
    plain.step()
    for mine, theirs in zip(layer.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize(("before", "now"), [(None, True), (True, None)])
def test_sgd_is_the_device_s_whatever_its_state_is_of(before: bool | None, now: bool | None) -> None:
    layer, optimizer = linear(before)
    layer.weight.grad = torch.ones(2, 3)  # the bias was frozen
    optimizer.step()
    other, resumed = linear(now)
    other.load_state_dict(layer.state_dict())
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    prepare_optimizer(resumed, now)
    assert [group["fused"] for group in resumed.param_groups] == [now]
    assert torch.equal(resumed.state[other.weight]["momentum_buffer"], torch.ones(2, 3))
    for each, sgd in ((layer, optimizer), (other, resumed)):
        each.weight.grad, each.bias.grad = torch.ones(2, 3), None if each is layer else torch.ones(2)
        sgd.step()
    torch.testing.assert_close(other.weight, layer.weight)


@pytest.mark.usefixtures("no_evaluation")
def test_a_finetuning_with_fused_sgd_passes_its_unfreezing_and_a_resume(
    train_tiny: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.save(repghostnet(0.1, 5).state_dict(), "start.pt")
    options = ("name=a", "recipe=finetune", "weights=start.pt", "freeze_epochs=1")
    with monkeypatch.context() as patched, pytest.raises(PowerCut):
        cut_after(patched, epoch=1, batch=0)
        train_tiny(*options)  # not fused, as on a CPU
    monkeypatch.setattr(ImageClassifier, "_fused", True)
    assert train_tiny(*options) == 0
    resumed = torch.load("outputs/a/checkpoints/last.ckpt", weights_only=True)
    state = resumed["optimizer_states"][0]
    assert all(group["fused"] for group in state["param_groups"])
    assert all("momentum_buffer" in state["state"][i] for group in state["param_groups"] for i in group["params"])
    assert train_tiny(*options[1:], "name=b") == 0
    assert torch.load("outputs/b/checkpoints/last.ckpt", weights_only=True)["global_step"] == resumed["global_step"]


@pytest.mark.usefixtures("no_evaluation")
def test_gradients_are_clipped_before_each_step(train_tiny: Program) -> None:
    norms = []
    for name, clip in (("clipped", 1e-3), ("free", None)):
        command = (f"name={name}", f"recipe.gradient_clip={'null' if clip is None else clip}", "recipe.weight_decay=0")
        assert train_tiny(*command) == 0
        state = torch.load(f"outputs/{name}/checkpoints/last.ckpt", weights_only=True)["optimizer_states"][0]["state"]
        norms.append(torch.cat([values["momentum_buffer"].flatten() for values in state.values()]).norm().item())
    clipped, free = norms  # of gradients whose weights, powers of the momentum, add up to at most 10
    assert 0 < clipped <= 10 * 1e-3 < free


@pytest.mark.parametrize(("clip", "fused"), [(None, True), (1.0, None)])
def test_an_optimizer_is_not_fused_where_gradients_are_clipped(
    clip: float | None, fused: bool | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ImageClassifier, "device", torch.device("cuda"))
    optimizer = classifier_of(RepGhostNet(0.1), gradient_clip=clip).configure_optimizers()
    assert optimizer.param_groups[0]["fused"] is fused


def test_dropout_s_seed_is_torch_s() -> None:
    torch.manual_seed(2**62 + 1)
    expected = torch.rand(5)
    seed_step(2**62 + 1, torch.device("cpu"))
    assert torch.equal(torch.rand(5), expected)


# -- the counters of BatchNorm -----------------------------------------------------------------------------------------


def test_batches_are_counted_once_for_all_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    classifier = classifier_of(repghostnet(0.1, 3), ema_decay=0.5)
    counter = classifier.model.bn1.num_batches_tracked
    for norm in (m for m in classifier.model.modules() if isinstance(m, nn.BatchNorm2d)):
        norm.num_batches_tracked.fill_(7)  # loaded
    expected = {name: tensor.shape for name, tensor in classifier.state_dict().items()}
    assert classifier.model.bn1.num_batches_tracked is counter, "a state dict takes nothing out"
    classifier.on_fit_start()
    assert not any("num_batches" in name for name, _ in classifier.model.named_buffers())
    batch = Batch(torch.randn(2, 3, 32, 32), torch.tensor([0, 1]), torch.arange(2), torch.zeros(2, 0))
    for training in (True, False, True):  # False: frozen
        classifier.model.train(training)
        classifier.training_step(batch, 0)
        classifier.ema.update(classifier.model)
    saved: dict[str, Any] = {}
    monkeypatch.setattr(classifier, "all_gather", lambda sums: sums)
    for _ in range(2):
        state = classifier.state_dict()
        assert [(name, tensor.shape) for name, tensor in state.items()] == list(expected.items())
        classifier.on_save_checkpoint(saved)
        for states in (state, saved["ema"]):
            assert {int(tensor) for name, tensor in states.items() if name.endswith("num_batches_tracked")} == {9}
    assert classifier.model.bn1.num_batches_tracked is None
    classifier.on_train_end()
    assert classifier.model.bn1.num_batches_tracked == classifier.ema.model.bn1.num_batches_tracked == 9
