"""Runs with task=detection: rates, files, resuming to the bit, several ranks, and evaluate.py on what they left."""

import contextlib
import copy
import csv
import io
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from coco_files import make_coco
from hydra.utils import instantiate
from runs import PowerCut, cut_after, processes

import evaluate
import train
from data.coco import load_coco
from data.write_shards.coco import list_coco
from data.write_shards.write import write_shards
from repghost.command_line import compose_config
from repghost.detection.detectors import detector
from repghost.detection.figures import FIGURES
from repghost.detection.module import DetectorTraining, peak_rate
from repghost.run import objective, read_config
from repghost.training.module import parameter_groups
from repghost.training.schedule import step_learning_rate

pytestmark = pytest.mark.usefixtures("few_blocks")

ROOT = Path(__file__).parents[1]
Program = Callable[..., int]
TINY = [
    "task=detection", "recipe=quick_detection", "detector=ssdlite", "width=0.1", "detector.image_size=[64]",
    "detector.channels=16", "detector.candidates=50", "detector.detections=20", "batch_size=4", "epochs=2",
    "trainer=cpu", "trainer.threads=1", "data.workers=0", "data.eval_batch_size=2", "recipe.warmup_steps=2",
    "curve_seconds=1e9",
]  # fmt: skip


@pytest.fixture(scope="module")
def coco(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards with 20 training images and 7 for validation, crowd regions and images without objects among them."""
    folder = tmp_path_factory.mktemp("coco")
    write_shards(list_coco(make_coco(folder / "src")), folder / "shards", images_per_shard=8, workers=1, quiet=True)
    return folder / "shards"


def train_in(folder: Path, *arguments: str) -> None:
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(folder)
        patched.setattr(sys, "argv", ["train.py", *TINY, *arguments])
        train.main()


@pytest.fixture(scope="module")
def trained(coco: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nobody disturbed."""
    folder = tmp_path_factory.mktemp("detection")
    train_in(folder, f"data.root={coco}", "name=run")
    return folder / "outputs" / "run"


# -- rates and parameters ----------------------------------------------------------------------------------------------


def recipe(*overrides: str) -> Any:
    return compose_config("train_detection", ["data.root=x", "weights=timm", *overrides]).recipe


def test_rates_of_coco_1x() -> None:
    found = recipe()
    rates = {name: peak_rate(found, name, 16) for name in ("retinanet", "fcos", "faster_rcnn", "mask_rcnn")}
    assert rates == {"retinanet": 0.01, "fcos": 0.01, "faster_rcnn": 0.02, "mask_rcnn": 0.02}
    assert peak_rate(found, "mask_rcnn", 8) == 0.01

    def rate(step: int) -> float:
        return step_learning_rate(found, step, epochs=12, steps_per_epoch=7330, peak=0.02)

    assert [rate(step) for step in (0, 250, 500)] == pytest.approx([2e-5, 0.5005 * 0.02, 0.02])
    last_of_epochs = [rate(epoch * 7330 - 1) for epoch in (8, 9, 11, 12)]
    assert last_of_epochs == pytest.approx([0.02, 0.002, 0.002, 0.0002])


def test_rates_of_a_cosine() -> None:
    found = recipe("recipe=quick_detection", "recipe.warmup_steps=0")
    rates = [step_learning_rate(found, step, epochs=2, steps_per_epoch=10, peak=1.0) for step in (0, 10, 20)]
    assert rates == pytest.approx([1.0, 0.5, 0.0], abs=1e-12)


def test_what_does_not_learn_is_not_in_the_optimizer() -> None:
    config = compose_config("train_detection", ["data.root=x", "weights=timm", "width=0.1"])
    settings = {key: value for key, value in config.detector.items() if not str(key).startswith("_")}
    model = detector(num_classes=3, **settings)
    groups = parameter_groups(model, 1e-4)
    grouped = {id(parameter) for group in groups for parameter in group["params"]}
    assert grouped == {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    assert id(model.backbone.body.conv_stem.weight) not in grouped


def test_steps_are_fused_on_cpus_too() -> None:
    config = compose_config("train_detection", ["data.root=x", "weights=timm", "width=0.1"])
    module = instantiate(config.module)(
        instantiate(config.detector)(num_classes=3), config.recipe, steps_per_epoch=1, classes=3
    )
    assert all(group["fused"] for group in module.configure_optimizers().param_groups)


def built(*overrides: str) -> str:
    """What a command makes before it sees data: the detector, its optimizer, its rates."""
    config = compose_config("train_detection", ["data.root=x", "weights=timm", "width=0.1", *overrides])
    torch.manual_seed(0)
    model = instantiate(config.detector)(num_classes=3)
    module = instantiate(config.module)(model, config.recipe, steps_per_epoch=100, classes=3)
    groups = module.configure_optimizers().param_groups
    about = [{key: value for key, value in group.items() if key != "params"} for group in groups]
    settings = {key: value for key, value in vars(model).items() if not key.startswith("_")}
    learning = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    rates = [module.learning_rate(step) for step in range(0, 1200, 90)]
    sizes = [vars(part) for part in model.modules() if "Anchor" in type(part).__name__]
    clipped: list[dict[str, Any]] = []
    module.clip_gradients = lambda *_, **options: clipped.append(options)
    module.configure_gradient_clipping(None)
    found = (model, settings, vars(model.transform), learning, about, rates, module.ema.decay, sizes, clipped)
    return re.sub(" at 0x[0-9a-f]+", "", str(found))


VALUES = {
    "width": "0.2", "epochs": "8", "batch_size": "8", "recipe.learning_rate": "0.1", "recipe.one_stage_factor": "0.7",
    "recipe.reference_batch_size": "32", "recipe.warmup_steps": "10", "recipe.warmup_factor": "0.5",
    "recipe.schedule": "cosine", "recipe.milestones": "[1]", "recipe.decay": "0.5", "recipe.momentum": "0.5",
    "recipe.weight_decay": "1e-3", "recipe.gradient_clip": "1", "recipe.ema_decay": "0.5", "detector": "fcos",
    "detector.image_size": "[320,640]",
    "detector.trainable_layers": "1", "detector.norm": "trained", "detector.channels": "64",
    "detector.anchor_sizes": "[9,20,30,40,50]", "detector.score_threshold": "0.3", "detector.nms_threshold": "0.3",
    "detector.candidates": "7", "detector.detections": "9",
}  # fmt: skip


def test_every_key_changes_what_is_built() -> None:
    base = built("recipe.ema_decay=0.999")
    assert built("recipe.ema_decay=0.999") == base
    for key, value in VALUES.items():
        # Of the cosine, the length of the run; of the steps, it changes nothing before its end.
        more = ["recipe.schedule=cosine"] if key == "epochs" else []
        before = built("recipe.ema_decay=0.999", *more) if more else base
        assert built("recipe.ema_decay=0.999", *more, f"{key}={value}") != before, key
    assert built("recipe.ema_decay=null", "recipe.ema_span=0.5") != built(
        "recipe.ema_decay=null", "recipe.ema_span=0.1"
    )


# -- a run -------------------------------------------------------------------------------------------------------------


def test_files_of_a_run(trained: Path, coco: Path) -> None:
    with open(trained / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["epoch", "lr", "train_loss", "val_map", "val_map50", "ema_map", "ema_map50"]
    assert len(rows) == 2
    names = {"config.yaml", "data.json", "classes.txt", "timing.csv", "curve.png", "model.safetensors"}
    assert names | {"model_fused.safetensors"} <= {path.name for path in trained.iterdir()}
    assert (trained / "classes.txt").read_text().split() == list(load_coco(coco, ["val"], coco)["val"].classes)
    evaluation = json.loads((trained / "evaluation.json").read_text())
    assert evaluation["images"] == 7 and evaluation["detector"] == "ssdlite" and evaluation["epoch"] == 1
    assert evaluation["fused"]["map"] == pytest.approx(evaluation["map"], abs=1e-3)
    assert evaluation["fused"]["max_score_diff"] < 1e-4
    assert objective(trained) == evaluation["map"] == float(rows[-1]["ema_map"])
    with open(trained.parents[1] / "results" / "detection.csv", newline="") as file:
        assert [(row["name"], row["selection"]) for row in csv.DictReader(file)] == [
            ("run", "best_ema"), ("run", "last"),
        ]  # fmt: skip
    checkpoint = torch.load(trained / "checkpoints" / "last.ckpt", weights_only=True)
    assert checkpoint["run"]["detector"] == "ssdlite" and checkpoint["run"]["classes"] == 3


def test_a_finished_run_does_nothing(trained: Path, coco: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (trained / "metrics.csv").stat().st_mtime_ns
    train_in(trained.parents[1], f"data.root={coco}", "name=run")
    assert "is finished" in capsys.readouterr().out
    assert (trained / "metrics.csv").stat().st_mtime_ns == before


def test_another_detector_is_another_run(trained: Path, coco: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        train_in(trained.parents[1], f"data.root={coco}", "name=run", "detector.nms_threshold=0.5")
    assert "was begun with detector.nms_threshold=0.55, this command says 0.5" in capsys.readouterr().err


def test_an_evaluation_of_a_run(trained: Path, coco: Path, run: Program, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(evaluate.main, f"run={trained}", "trainer=cpu", "report=[classes,predictions,pictures]") == 0
    printed = capsys.readouterr().out
    assert "boxes, trained form" in printed and "fusing changes scores by at most" in printed
    evaluation = json.loads((trained / "evaluation.json").read_text())
    index = load_coco(coco, ["val"], coco)["val"]
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = copy.deepcopy(index.annotations())
        truth.createIndex()
        found = COCOeval(truth, truth.loadRes(str(trained / "predictions.json")), "bbox")
        found.evaluate()
        found.accumulate()
        found.summarize()
    expected = [-1.0 if evaluation[name] is None else evaluation[name] for name in FIGURES]
    assert found.stats.tolist() == pytest.approx(expected, abs=1e-12)
    with open(trained / "classes.csv", newline="") as file:
        assert [row["class"] for row in csv.DictReader(file)] == list(index.classes)
    assert (trained / "pictures.png").stat().st_size > 10_000


def test_an_evaluation_on_other_data_stands_beside_the_run_s(
    trained: Path, run: Program, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (trained / "evaluation.json").read_bytes()
    write_shards(
        list_coco(make_coco(tmp_path / "src", train=5, val=5)),
        tmp_path / "out",
        images_per_shard=8,
        workers=1,
        quiet=True,
    )
    assert run(evaluate.main, f"run={trained}", "trainer=cpu", "data=coco", f"data.root={tmp_path}/out") == 0
    assert (trained / "evaluation.json").read_bytes() == before
    assert len(list(trained.glob("evaluation_out-*.json"))) == 1
    capsys.readouterr()
    assert run(evaluate.main, f"run={trained}", "trainer=cpu", "image_size=64") == 2
    assert "another task or command has this key" in capsys.readouterr().err


def test_a_loss_that_is_not_finite_ends_the_run(
    coco: Path, run: Program, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    step = DetectorTraining.training_step

    def poisoned(self: DetectorTraining, batch: Any, batch_idx: int) -> Any:
        if batch_idx == 1:
            batch = batch._replace(images=[image * float("nan") for image in batch.images])
        return step(self, batch, batch_idx)

    monkeypatch.setattr(DetectorTraining, "training_step", poisoned)
    assert run(train.main, *TINY, f"data.root={coco}", "name=poisoned", "epochs=1") == 2
    assert "the loss is not finite in epoch 0, batch 1" in capsys.readouterr().err


# -- resuming ----------------------------------------------------------------------------------------------------------


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from leaves(inner, f"{path}.{key}")
    else:
        yield path, value


def assert_same(one: Path, other: Path) -> None:
    """Two runs came to the same, to the bit."""
    for name in ("metrics.csv", "evaluation.json", "evaluation_best_ema.json", "model_fused.safetensors"):
        assert (one / name).read_bytes() == (other / name).read_bytes(), name
    keys = ("state_dict", "ema", "optimizer_states", "history", "train_sums")
    contents = [torch.load(run / "checkpoints" / "last.ckpt", weights_only=True) for run in (one, other)]
    for (path, a), (_, b) in zip(*(leaves({key: c[key] for key in keys}) for c in contents), strict=True):
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b, path


def cut(patched: pytest.MonkeyPatch, epoch: int, batch: int) -> None:
    cut_after(patched, epoch, batch, DetectorTraining)


def test_a_run_that_lost_its_power_comes_to_the_same(trained: Path, coco: Path, tmp_path: Path) -> None:
    arguments = [f"data.root={coco}", "name=run", "checkpoint.minutes=1e-6"]
    with pytest.MonkeyPatch.context() as patched, pytest.raises(PowerCut):
        cut(patched, 1, 2)
        train_in(tmp_path, *arguments)
    train_in(tmp_path, *arguments)
    assert_same(trained, tmp_path / "outputs" / "run")


@pytest.fixture
def trained_whole(coco: Path, tmp_path_factory: pytest.TempPathFactory, all_blocks: None) -> Path:
    """As `trained`, with all blocks: what processes of their own train and read."""
    folder = tmp_path_factory.mktemp("whole")
    train_in(folder, f"data.root={coco}", "name=run")
    return folder / "outputs" / "run"


@pytest.mark.slow
def test_a_signal_stops_a_run_which_then_comes_to_the_same(trained_whole: Path, coco: Path, tmp_path: Path) -> None:
    with processes(tmp_path, coco, TINY) as start:
        process = start("name=run")
        process.until(lambda: "epoch   1/2" in process.said)
        process.signal(signal.SIGTERM)
        assert process.ends() == 75
        assert start("name=run").ends() == 0
    assert_same(trained_whole, tmp_path / "outputs" / "run")


@pytest.mark.slow
def test_two_ranks_evaluate_to_the_same_figures(trained_whole: Path, tmp_path: Path) -> None:
    before = json.loads((trained_whole / "evaluation.json").read_text())
    for ranks in (2, 3):
        command = [sys.executable, str(ROOT / "evaluate.py"), f"run={trained_whole}", "trainer=cpu"]
        done = subprocess.run(
            [*command, "trainer.threads=1", f"trainer.devices={ranks}"],
            cwd=tmp_path, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=600,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        assert json.loads((trained_whole / "evaluation.json").read_text()) == before


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mask_rcnn", "retinanet", "fcos"])
def test_every_kind_of_detector_trains_on_two_ranks(name: str, coco: Path, tmp_path: Path) -> None:
    of_pyramids = ["detector.anchor_sizes=[16,32,48,64,96]", "detector.channels=64", "batch_size=4", "epochs=1"]
    command = [sys.executable, str(ROOT / "train.py"), *TINY, f"detector={name}", *of_pyramids, "name=two"]
    done = subprocess.run(
        [*command, f"data.root={coco}", "trainer.devices=2", "data.eval_batch_size=3"],
        cwd=tmp_path, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    evaluation = json.loads((tmp_path / "outputs" / "two" / "evaluation.json").read_text())
    assert evaluation["images"] == 7 and ("mask_map" in evaluation) == (name == "mask_rcnn")
    assert read_config(tmp_path / "outputs" / "two").data.masks == (name == "mask_rcnn")
