"""The recipe against timm's, which the paper was trained with; every knob; the official curves; numerics."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from helpers import needs_compiler
from omegaconf import OmegaConf
from test_classifier import classifier_of
from timm.loss import LabelSmoothingCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from timm.utils import ModelEmaV2
from torch import Tensor

from repghost.figures import draw_curve
from repghost.model import WIDTHS, repghostnet
from repghost.reference import EPOCHS, IMAGENET, reference_curve, standing
from repghost.run import resolve_recipe
from repghost.training.classifier import ImageClassifier, smoothed_cross_entropy
from repghost.training.recipe import deviations

PAPER = OmegaConf.create((Path(__file__).parents[1] / "conf/recipe/paper.yaml").read_text())
Program = Callable[..., int]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-6), (torch.float32, 1e-4)])
def test_ten_steps_equal_timm_s(dtype: torch.dtype, tolerance: float) -> None:
    torch.manual_seed(0)
    mine = repghostnet(0.5, num_classes=10, dropout=0.0).to(dtype)
    theirs = timm.create_model("repghostnet_050", num_classes=10, drop_rate=0.0).to(dtype)
    theirs.load_state_dict(mine.state_dict())
    initial = mine.classifier.weight.detach().clone()
    batches = [(torch.randn(16, 3, 32, 32, dtype=dtype), torch.randint(10, (16,))) for _ in range(10)]

    classifier = classifier_of(mine, ema_decay=0.9, learning_rate=2e-3)
    optimizer = classifier.configure_optimizers()
    for epoch, (images, labels) in enumerate(batches):  # each step at the rate of another epoch, over the warm-up
        for group in optimizer.param_groups:
            group["lr"] = classifier.epoch_learning_rate(epoch)
        optimizer.zero_grad()
        smoothed_cross_entropy(mine(images), labels, 0.1).backward()
        optimizer.step()
        classifier.ema.update(mine)

    other = create_optimizer_v2(theirs, opt="sgd", lr=2e-3, momentum=0.9, weight_decay=1e-5)
    schedule = CosineLRScheduler(other, t_initial=300, lr_min=1e-5, warmup_t=5, warmup_lr_init=1e-4)
    average, loss = ModelEmaV2(theirs, decay=0.9), LabelSmoothingCrossEntropy(0.1)
    for epoch, (images, labels) in enumerate(batches):
        schedule.step(epoch)
        other.zero_grad()
        loss(theirs(images), labels).backward()
        other.step()
        average.update(theirs)

    assert (mine.classifier.weight - initial).abs().max() > 0.01 * initial.abs().max()
    for a, b in ((mine, theirs), (classifier.ema.model, average.module)):
        for (name, x), y in zip(a.state_dict().items(), b.state_dict().values(), strict=True):
            if x.is_floating_point():
                assert (x - y).abs().max() <= tolerance * y.abs().max(), name


def logged(name: str) -> str:
    return Path(f"outputs/{name}/metrics.csv").read_text()


@pytest.mark.parametrize("width", WIDTHS)
def test_the_widths_choose_their_augmentation(width: float) -> None:
    config = OmegaConf.merge(PAPER, {"width": width})
    resolve_recipe(config)  # type: ignore[arg-type]
    assert (config.recipe.augment.rand_augment is not None) == (width >= 1.3)
    assert (config.recipe.augment.jitter is not None) == (width <= 1.11)


def test_deviations_from_the_paper_are_named() -> None:
    config = OmegaConf.merge(PAPER, {"width": 1.0, "accumulate": 1, "weights": None})
    resolve_recipe(config)  # type: ignore[arg-type]
    assert deviations(config, PAPER, 8, "16-mixed") == ["BatchNorm statistics averaged over the devices"]  # type: ignore[arg-type]
    config.batch_size, config.recipe.momentum = 512, 0.8
    found = "; ".join(deviations(config, PAPER, 1, "32-true"))  # type: ignore[arg-type]
    for named in ("batch_size 512 instead of 1024", "momentum 0.8", "BatchNorm over 512 images", "float32"):
        assert named in found


def test_reference_curves_are_for_the_official_setting_only() -> None:
    for width in WIDTHS:
        curve = reference_curve(width, EPOCHS, IMAGENET)
        assert curve is not None and curve[50]["ema_top1"] > 50
        row = {"epoch": 50.0, "val_top1": curve[50]["val_top1"] + 1.5, "ema_top1": curve[50]["ema_top1"] - 0.25}
        assert standing(row, curve) == "against the official run raw +1.50, EMA -0.25 points"
    assert reference_curve(0.9, EPOCHS, IMAGENET) is None
    assert reference_curve(1.0, 100, IMAGENET) is None
    assert reference_curve(1.0, EPOCHS, (1498, 299)) is None
    assert "ended" in standing(
        {"epoch": 299.0, "val_top1": 0, "ema_top1": 0}, reference_curve(2.0, EPOCHS, IMAGENET) or {}
    )


def test_the_curve_is_drawn_with_and_without_the_official_one(tmp_path: Path) -> None:
    official = reference_curve(1.0, EPOCHS, IMAGENET)
    assert official is not None
    history = [official[e] for e in range(40)]
    sizes = []
    for curve in (None, official):
        with open(tmp_path / "curve.png", "wb") as file:
            draw_curve(history, curve, file)
        sizes.append((tmp_path / "curve.png").stat().st_size)
    assert sizes[0] < sizes[1]


@pytest.mark.usefixtures("no_evaluation")
def test_a_run_shows_where_it_stands(train_tiny: Program, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    official = partial(reference_curve, 1.0, EPOCHS, IMAGENET)
    monkeypatch.setattr("repghost.training.recipe.reference_curve", lambda *_: official())
    assert train_tiny("name=x", "logger=tensorboard") == 0
    printed = capsys.readouterr().out
    assert printed.count("against the official run raw ") == 2
    assert "every epoch is compared with the official run" in printed


@pytest.mark.usefixtures("no_evaluation")
def test_other_data_have_no_official_run(train_tiny: Program, capsys: Any) -> None:
    assert train_tiny("epochs=1") == 0
    printed = capsys.readouterr().out
    assert "no run to compare with" in printed and "epochs 1 instead of 300" in printed


def test_a_loss_that_is_not_a_number_stops_at_once(train_tiny: Program, capsys: Any) -> None:
    assert (
        train_tiny("name=x", "recipe.learning_rate=1e30", "recipe.warmup_epochs=0", "recipe.start_learning_rate=1") == 2
    )
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "not finite in epoch 0, batch" in error and "positions" in error
    assert not Path("outputs/x/checkpoints").exists()


def test_the_last_good_checkpoint_survives(train_tiny: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    step = ImageClassifier.optimizer_step

    def poisoned(self: ImageClassifier, epoch: int, batch_idx: int, *arguments: Any) -> None:
        step(self, epoch, batch_idx, *arguments)
        if (epoch, batch_idx) == (1, 1):
            torch.nn.init.constant_(self.model.classifier.bias, float("nan"))

    monkeypatch.setattr(ImageClassifier, "optimizer_step", poisoned)
    assert train_tiny("name=x") == 2
    saved = torch.load("outputs/x/checkpoints/last.ckpt", weights_only=True)
    assert saved["global_step"] == 5 and all(t.isfinite().all() for t in saved["state_dict"].values())


@pytest.mark.usefixtures("no_evaluation")
def test_deterministic_and_channels_last_do_not_change_the_data(
    train_tiny: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[Tensor, ...]] = []
    step = ImageClassifier.training_step

    def training_step(self: ImageClassifier, batch: Any, batch_idx: int) -> Any:
        loss = step(self, batch, batch_idx)
        seen.append((batch.images.clone(), batch.labels, batch.positions, loss.detach()))
        return loss

    monkeypatch.setattr(ImageClassifier, "training_step", training_step)
    assert train_tiny("name=a", "deterministic=true") == 0
    assert train_tiny("name=b", "channels_last=false") == 0
    one, other = seen[:10], seen[10:]
    for a, b in zip(one, other, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a[:-1], b[:-1], strict=True))
    torch.testing.assert_close(one[0][-1], other[0][-1], rtol=1e-3, atol=0)  # later steps amplify what was rounded
    assert not torch.are_deterministic_algorithms_enabled() or torch.use_deterministic_algorithms(False) is None


@pytest.mark.usefixtures("no_evaluation")
def test_finetune_starts_from_weights_and_freezes_the_backbone(finished_run: Path, train_tiny: Program) -> None:
    weights = finished_run / "model.safetensors"
    options = ["recipe=finetune", f"weights={weights}", "recipe.ema_span=null", "recipe.ema_decay=0"]
    assert train_tiny("name=frozen", *options, "epochs=1", "freeze_epochs=1") == 0
    assert train_tiny("name=free", *options, "epochs=1", "freeze_epochs=0") == 0
    before, frozen, free = (
        torch.load(f"outputs/{n}/checkpoints/last.ckpt", weights_only=True)["ema"] for n in ("a", "frozen", "free")
    )
    backbone = [name for name in before if not name.startswith("classifier") and "num_batches" not in name]
    assert all(torch.equal(before[name], frozen[name]) for name in backbone)
    assert not torch.equal(before["classifier.weight"], frozen["classifier.weight"])
    assert not torch.equal(before["conv_stem.weight"], free["conv_stem.weight"])
    assert train_tiny("name=fused", *options, f"weights={weights.with_name('model_fused.safetensors')}") == 2


@needs_compiler
@pytest.mark.slow
def test_compiled_training_keeps_the_keys(train_tiny: Program) -> None:
    # Of one step, as later ones amplify what was rounded, without dropout, which is drawn in another way.
    one_step = ("epochs=1", "batch_size=40", "recipe.dropout=0")
    assert train_tiny("name=eager", *one_step) == 0
    assert train_tiny("name=compiled", *one_step, "compile=true") == 0
    saved = [torch.load(f"outputs/{n}/checkpoints/last.ckpt", weights_only=True) for n in ("eager", "compiled")]
    assert list(saved[0]["state_dict"]) == list(saved[1]["state_dict"])
    eager, compiled = (s["history"][0]["train_loss"] for s in saved)
    assert eager == pytest.approx(compiled, rel=1e-3)
