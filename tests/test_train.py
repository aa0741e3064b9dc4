"""The command line as a user meets it: train, resume, evaluate, and one clear line for every mistake."""

import csv
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from images import make_class_folders, make_images
from PIL import Image
from runs import PowerCut, cut_after

from data.write_shards.write import write_folder
from repghost.model import repghostnet
from repghost.training.loggers import duration
from repghost.weights import read_weights

Program = Callable[..., int]
FILES = {
    "config.yaml", "checkpoints", "metrics.csv", "timing.csv", "model.safetensors", "model_fused.safetensors",
    "evaluation.json", "curve.png", "classes.txt",
}  # fmt: skip


def rows(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.usefixtures("no_shortcuts")
def test_one_command_trains_averages_fuses_and_evaluates(
    train_tiny: Program, evaluate_with: Program, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train_tiny() == 0
    printed = capsys.readouterr().out
    assert "45 training and 15 validation images in 3 classes" in printed
    (directory,) = Path("outputs").iterdir()
    assert {path.name for path in directory.iterdir()} >= FILES
    with Image.open(directory / "curve.png") as curve:
        assert curve.width > 1000
    assert {path.name for path in (directory / "checkpoints").iterdir()} == {
        "last.ckpt", "previous.ckpt", "best_raw.ckpt", "best_ema.ckpt",
    }  # fmt: skip

    metrics = rows(directory / "metrics.csv")
    assert [row["epoch"] for row in metrics] == ["0", "1"]
    evaluation = json.loads((directory / "evaluation.json").read_text())
    assert evaluation["images"] == 15 and evaluation["selection"] == "last" and evaluation["weights"] == "ema"
    assert evaluation["top1"] == float(metrics[-1]["ema_top1"])
    assert evaluation["loss"] == pytest.approx(float(metrics[-1]["ema_loss"]), rel=1e-12)
    assert evaluation["fused"]["top1"] == evaluation["top1"] and evaluation["fused"]["top1_flips"] == 0
    assert evaluation["fused"]["max_rel_logit_diff"] < 1e-5
    assert [row["selection"] for row in rows(Path("results/results.csv"))] == ["best_ema", "last"]

    # Asking again does nothing.
    before = {path: path.stat().st_mtime_ns for path in directory.rglob("*")}
    assert train_tiny() == 0
    assert "finished" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in directory.rglob("*")}

    # evaluate.py says the same of the run and of its weight files.
    assert evaluate_with(f"run={directory}", "trainer=cpu") == 0
    root = yaml.safe_load((directory / "config.yaml").read_text())["data"]["root"]
    files = ("model.safetensors", "model_fused.safetensors", "checkpoints/last.ckpt")
    for file in files:
        options = (f"data.root={root}", "width=0.1", "image_size=32", "trainer=cpu", "data.workers=0")
        assert evaluate_with(f"weights={directory / file}", *options) == 0
    measured = rows(Path("results/results.csv"))
    assert len(measured) == 3 + len(files)
    assert len({(row["images"], row["top1"], row["fused_top1"]) for row in measured[1:]}) == 1
    assert evaluate_with(f"weights={directory / files[0]}", *options[:1], "width=0.3", *options[2:]) == 2
    assert "width=0.3" in capsys.readouterr().err


def test_a_run_that_was_cut_is_resumed_to_the_same_bits(train_tiny: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    assert train_tiny("name=whole") == 0

    # checkpoint.minutes: a checkpoint after every step
    with monkeypatch.context() as patched, pytest.raises(PowerCut):
        cut_after(patched, epoch=1, batch=2)
        train_tiny("name=cut", "checkpoint.minutes=1e-6")
    saved = torch.load("outputs/cut/checkpoints/last.ckpt", weights_only=True)
    assert saved["global_step"] == 5 + 2 and len(saved["history"]) == 1
    assert train_tiny("name=cut") == 0

    whole, resumed = Path("outputs/whole"), Path("outputs/cut")
    assert (whole / "metrics.csv").read_text() == (resumed / "metrics.csv").read_text()
    for file in ("model.safetensors", "model_fused.safetensors"):
        assert (whole / file).read_bytes() == (resumed / file).read_bytes()
    a, b = (torch.load(d / "checkpoints/last.ckpt", weights_only=True) for d in (whole, resumed))
    for key in ("state_dict", "ema"):
        assert all(torch.equal(a[key][name], b[key][name]) for name in a[key])
    for x, y in zip(
        a["optimizer_states"][0]["state"].values(), b["optimizer_states"][0]["state"].values(), strict=True
    ):
        assert torch.equal(x["momentum_buffer"], y["momentum_buffer"])


@pytest.mark.usefixtures("no_evaluation")
def test_accumulated_batches_see_the_same_images(train_tiny: Program) -> None:
    assert train_tiny("name=whole", "recipe.augment.erase=null") == 0
    assert train_tiny("name=parts", "recipe.augment.erase=null", "accumulate=2") == 0
    steps = [torch.load(f"outputs/{n}/checkpoints/last.ckpt", weights_only=True) for n in ("whole", "parts")]
    assert steps[0]["global_step"] == steps[1]["global_step"] == 10


@pytest.mark.usefixtures("no_evaluation")
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_other_precisions_train(train_tiny: Program, precision: str) -> None:
    assert train_tiny(f"precision={precision}", "epochs=1") == (0 if precision == "bf16" else 2)


@pytest.mark.usefixtures("fresh_wandb")
def test_loggers_write_beside_metrics_csv(train_tiny: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    assert train_tiny("epochs=1", "name=a", "logger=wandb", "logger.offline=true") == 0
    assert list(Path("outputs/a/wandb").glob("offline-run-*/*.wandb"))
    assert train_tiny("epochs=1", "name=b", "logger=tensorboard") == 0
    (events,) = {path.parent for path in Path("outputs/b").rglob("events.out.tfevents.*")}
    for path in (*events.glob("events*"), *Path("outputs/a/wandb").glob("offline-run-*/*.wandb")):
        assert all(name in path.read_bytes() for name in (b"confusion", b"worst", b"ema_top1")), path
    assert {path.name for path in Path("outputs/a").glob("*.png")} == {"confusion.png", "worst.png", "curve.png"}
    assert (Path("outputs/a/metrics.csv").read_text()) == Path("outputs/b/metrics.csv").read_text()


def test_folders_of_grey_images_need_no_code(train_tiny: Program, tmp_path: Path) -> None:
    source = make_images(tmp_path / "grey", ("0", "1"), train=12, val=4)
    for path in source.rglob("*.*"):
        with Image.open(path) as image:
            image.convert("L").resize((28, 28)).save(path)
    write_folder(source, tmp_path / "shards", workers=1, quiet=True)
    assert train_tiny(f"data.root={tmp_path / 'shards'}") == 0


MISTAKES = [
    (["width=0"], "width=0"),
    (["width=many"], "width=many"),
    (["epochs=few"], "epochs=few"),
    (["wdith=1.0"], "wdith"),
    (["data.rot=x"], "rot"),
    (["batch_size=64"], "batch_size=64 is larger than the 45 training images"),
    (["batch_size=9", "accumulate=2"], "batch_size=9"),
    (["precision=int3"], "precision=int3"),
    (["trainer=gpu"], "no GPU"),
    (["trainer.devices=0"], "trainer.devices=0"),
    (["epochs=0"], "epochs=0"),
    (["image_size=8"], "image_size=8"),
    (["seed=-1"], "seed=-1"),
    (["loader=fast"], "loader=fast"),
    (["recipe.label_smoothing=2"], "label_smoothing=2"),
    (["recipe=unknown"], "unknown"),
    (["recipe.augment.jitter.hue=0.1"], "hue"),
    (["data.root=no/such/folder"], "no/such/folder"),
    (["data.root=empty"], "empty"),
]


@pytest.mark.parametrize(("arguments", "named"), MISTAKES, ids=lambda value: "".join(value)[:30])
def test_mistakes_end_in_one_line(
    arguments: list[str],
    named: str,
    train_tiny: Program,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)  # on any machine
    Path("empty").mkdir()
    assert train_tiny(*arguments) == 2
    line = capsys.readouterr().err.strip().splitlines()
    assert len(line) == 1 and line[0].startswith("error: ") and named in line[0], line
    assert not Path("outputs").exists() or not list(Path("outputs").rglob("*.ckpt"))


def test_data_root_must_be_given(run: Program, capsys: pytest.CaptureFixture[str]) -> None:
    import train

    assert run(train.main, "trainer=cpu") == 2
    assert "data.root" in capsys.readouterr().err


def test_one_class_only(tmp_path: Path, train_tiny: Program, capsys: pytest.CaptureFixture[str]) -> None:
    from data.write_shards.__main__ import main

    make_class_folders(tmp_path / "one" / "train", ("cat",))
    make_class_folders(tmp_path / "one" / "val", ("cat",))
    assert main(["folder", str(tmp_path / "one"), str(tmp_path / "shards")]) == 2
    assert "class" in capsys.readouterr().err


def test_a_shard_cut_in_half(
    shards: Path, tmp_path: Path, train_tiny: Program, capsys: pytest.CaptureFixture[str]
) -> None:
    import shutil

    shutil.copytree(shards, tmp_path / "cut")
    victim = tmp_path / "cut" / "train-000001.tar"
    victim.write_bytes(victim.read_bytes()[: victim.stat().st_size // 2])
    assert train_tiny(f"data.root={tmp_path / 'cut'}") == 2
    error = capsys.readouterr().err.strip()
    assert "train-000001.tar" in error and len(error.splitlines()) == 1


@pytest.mark.usefixtures("finished_run")
def test_another_recipe_in_the_same_folder(train_tiny: Program, capsys: pytest.CaptureFixture[str]) -> None:
    assert train_tiny("name=a", "epochs=2") == 2
    assert "epochs=1" in capsys.readouterr().err
    assert train_tiny("name=a", "epochs=1", "recipe.momentum=0.8") == 2
    assert "momentum" in capsys.readouterr().err


def test_a_run_of_an_earlier_version_is_the_same_run(
    finished_run: Path, train_tiny: Program, capsys: pytest.CaptureFixture[str]
) -> None:
    file = finished_run / "config.yaml"
    config = yaml.safe_load(file.read_text())
    config["classifier"] |= {"_target_": "repghost.classifier.ImageClassifier", "learning_rate": 7.0}
    config["trainer"] |= {"_target_": "repghost.trainer.make_trainer", "log_every_n_steps": 50}
    config["data"] |= {"_target_": "data.old.ImageNetData", "gone": 1}
    file.write_text(yaml.safe_dump(config))
    assert train_tiny("name=a", "epochs=1") == 0 and "finished" in capsys.readouterr().out
    for wrong, key in (
        ("width=1.3", "width"),
        ("recipe.augment.erase=null", "recipe.augment.erase"),
        ("data.crop_fraction=1", "data.crop_fraction"),
    ):
        assert train_tiny("name=a", "epochs=1", wrong) == 2
        assert f"was begun with {key}=" in capsys.readouterr().err


def test_an_evaluation_takes_the_normalization_of_the_run(
    train_tiny: Program, evaluate_with: Program, shards: Path
) -> None:
    assert train_tiny("name=a", "epochs=1", "recipe.augment.mean=[0.1,0.2,0.3]", "recipe.augment.std=[1,1,1]") == 0
    losses = [json.loads(Path("outputs/a/evaluation.json").read_text())["loss"]]
    for name, options in (
        ("evaluation.json", ()),
        ("evaluation.json", ("data=imagenet", f"data.root={shards}")),
        ("evaluation_std_0.01_0.01_0.01.json", ("data.augment.std=[0.01,0.01,0.01]",)),
    ):
        assert evaluate_with("run=outputs/a", "trainer=cpu", "data.workers=0", *options) == 0
        losses.append(json.loads(Path("outputs/a", name).read_text())["loss"])
    trained, same, named, other = losses
    assert same == pytest.approx(trained, rel=1e-6) and named == pytest.approx(trained, rel=1e-6)
    assert other != pytest.approx(trained, rel=1e-5)


@pytest.mark.usefixtures("no_evaluation")
def test_a_mistake_leaves_no_run_behind(train_tiny: Program, capsys: pytest.CaptureFixture[str]) -> None:
    assert train_tiny("name=a", "epochs=1", "batch_size=9", "accumulate=2") == 2
    assert "batch_size=9" in capsys.readouterr().err
    assert train_tiny("name=a", "epochs=1") == 0
    assert "batch_size: 8" in Path("outputs/a/config.yaml").read_text()


def test_weights_that_are_none(evaluate_with: Program, shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("noise.safetensors").write_bytes(b"noise")
    Path("noise.ckpt").write_bytes(b"noise")
    torch.save({"a": torch.zeros(1)}, "other.ckpt")
    torch.save(repghostnet(0.1, 7).state_dict(), "seven.ckpt")
    for weights in ("noise.safetensors", "noise.ckpt", "other.ckpt", "missing.ckpt", "seven.ckpt"):
        options = ("width=0.1", f"data.root={shards}", "image_size=32", "trainer=cpu")
        assert evaluate_with(f"weights={weights}", *options) == 2
        error = capsys.readouterr().err.strip()
        assert len(error.splitlines()) == 1, error
    assert evaluate_with() == 2 and "run=" in capsys.readouterr().err
    assert read_weights("seven.ckpt")["classifier.weight"].shape[0] == 7


@pytest.mark.usefixtures("no_evaluation")
def test_a_run_says_when_it_will_be_finished(
    train_tiny: Program, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert train_tiny("epochs=3", "name=x") == 0
    out, bar = capsys.readouterr()
    lines = re.findall(r"epoch +[0-9]/3 .*", out)
    assert [bool(re.search(r"images/s  [0-9]+ (s|min) left", line)) for line in lines] == [True, True, False]
    assert re.search(r"images/s=[0-9,]+, left=[0-9]+ (s|min)", out + bar)


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        (0.2, "0 s"), (29, "29 s"), (59.6, "1 min"), (3569, "59 min"), (3599, "1 h 0 min"), (15_120, "4 h 12 min"),
        (86_399, "1 d 0 h"), (200_000, "2 d 7 h"),
    ],
)  # fmt: skip
def test_times_are_read_at_a_glance(seconds: float, shown: str) -> None:
    assert duration(seconds) == shown
