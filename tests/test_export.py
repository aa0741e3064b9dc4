"""Exports run in their own runtimes as torch runs the fused network; mistakes leave one line and no file."""

import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import timm
import torch
from helpers import photographs as normalized
from helpers import randomize_batchnorm
from huggingface_hub import ModelCard
from images import make_class_folders, patch
from onnxruntime import InferenceSession
from PIL import Image
from test_evaluation import random_network, rows, validation_shards
from test_predict import make_run

from repghost import reparameterize, repghostnet
from repghost.errors import UserError, run_command
from repghost.export import __main__ as export
from repghost.export import check as export_check
from repghost.export.deployable import Preprocess
from repghost.export.options import FORMATS as ALL_FORMATS
from repghost.export.photographs import sample_photographs
from repghost.export.runtimes import open_as, open_exported
from repghost.images import Preprocessing
from repghost.model import WIDTHS
from repghost.reference import timm_name
from repghost.weights import load_model, save_weights

pytestmark = pytest.mark.usefixtures("few_blocks")

Program = Callable[..., int]
NETWORK_FORMATS = ("onnx", "executorch", "torchscript", "coreml", "safetensors")


@pytest.fixture(scope="module")
def saved_half(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    path = tmp_path_factory.mktemp("half") / "w.safetensors"
    return random_network(0.5, 10, path), path


@pytest.fixture
def half(saved_half: tuple[Any, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A network of width 0.5 with 10 classes, saved in training form as w.safetensors in the current folder."""
    monkeypatch.chdir(tmp_path)
    model, path = saved_half
    shutil.copy(path, tmp_path)
    return model


def command(*arguments: str) -> int:
    return run_command(lambda: export.run(arguments))


def exported(*arguments: str, width: float = 0.5) -> int:
    return command("weights=w.safetensors", f"width={width:g}", *arguments)


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image)[None]


def assert_nothing_is_left_to_fold(path: Path) -> None:
    graph = onnx.load(path).graph
    kinds = {node.op_type for node in graph.node}
    assert "Conv" in kinds and not kinds & {"BatchNormalization", "Identity", "Dropout", "Constant"}
    constants = {tensor.name for tensor in graph.initializer}
    for node in graph.node:
        assert not {name for name in node.input if name} <= constants, f"{node.op_type} {node.name} is a constant"


@torch.no_grad()
def test_onnx_gives_torchs_logits_for_any_batch(half: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert exported("format=onnx", "image_size=64", "opset=20", "out=model.onnx") == 0
    said = capsys.readouterr().out
    assert "largest difference from torch in the logits" in said and "16 crops of photographs" in said
    assert_nothing_is_left_to_fold(Path("model.onnx"))
    assert onnx.load("model.onnx").opset_import[0].version == 20
    session = InferenceSession("model.onnx")
    for count in (1, 3, 7):
        images = normalized(count, 64)
        logits = session.run(["logits"], {"image": images.numpy()})[0]
        assert np.abs(logits - reparameterize(half)(images).numpy()).max() < 1e-4


@torch.no_grad()
def test_onnx_preprocesses_as_torchvision(half: Any) -> None:
    assert exported("format=onnx", "image_size=64", "preprocess=true", "softmax=true", "out=model.onnx") == 0
    assert_nothing_is_left_to_fold(Path("model.onnx"))
    session = InferenceSession("model.onnx")
    transform = Preprocessing(64).transform()
    for image, _ in sample_photographs(12):
        expected = half(transform(image)[None]).softmax(1).numpy()
        found = session.run(["probabilities"], {"image": pixels(image)})[0]
        assert np.abs(found - expected).max() < 2e-3
        assert expected[0, found.argmax()] > expected.max() - 1e-3, "the same Top-1, but for ties"


@pytest.mark.parametrize("size", [(97, 130), (64, 64), (75, 73), (40, 31), (401, 223), (1, 9)])
def test_preprocessing_is_torchvisions_to_one_level(size: tuple[int, int]) -> None:
    photo = sample_photographs(2)[1].image.resize(size[::-1])
    tensor = torch.from_numpy(pixels(photo).copy())
    one, other = (Preprocess(Preprocessing(64), fixed)(tensor) for fixed in (None, size))
    assert torch.equal(one, other)
    levels = 255 * 0.225 * (one[0] - Preprocessing(64).transform()(photo)).abs()
    assert levels.max() < 2.1 and (levels > 0.5).float().mean() < 0.05


@pytest.mark.slow
def test_safetensors_are_the_fused_weights_of_a_run(train_tiny: Program) -> None:
    assert train_tiny("name=tiny", "epochs=1") == 0
    assert command("run=outputs/tiny", "format=safetensors") == 0
    fused, written = (load_model(f"outputs/tiny/{name}.safetensors", 0.1) for name in ("model_fused", "fused"))
    assert written.fused
    for name, tensor in written.state_dict().items():
        assert torch.equal(tensor, fused.state_dict()[name]), name
    # Which takes no weights in channels_last, as a run's are.
    assert command("run=outputs/tiny", "format=executorch") == 0
    assert Path("outputs/tiny/fused.pte").exists()


@torch.no_grad()
def test_the_preprocessing_of_a_run_goes_into_the_file(tmp_path: Path) -> None:
    mean, std = (0.1, 0.5, 0.9), (0.5, 0.25, 0.75)
    model = make_run(tmp_path, mean=list(mean), std=list(std))
    photograph = sample_photographs(1)[0].image
    size = f"input_size={photograph.height}x{photograph.width}"
    assert command(f"run={tmp_path}", "format=torchscript", "preprocess=true", size) == 0
    deployed = open_as("torchscript", tmp_path / "fused.pt")
    expected = model(Preprocessing(32, 1.0, mean, std).transform()(photograph)[None]).numpy()
    found = deployed(torch.tensor(pixels(photograph))).numpy()
    other = model(Preprocessing(32, 1.0).transform()(photograph)[None]).numpy()
    assert np.abs(found - expected).max() < 0.1 * np.abs(other - expected).max()
    assert command(f"run={tmp_path}", "format=onnx") == 0
    normalization = {"mean": mean, "std": std}
    metadata = open_exported(tmp_path / "fused.onnx", 32, "float32", normalization).metadata
    assert (metadata["mean"], metadata["std"], metadata["crop_fraction"]) == (mean, std, 1.0)
    with pytest.raises(UserError, match=r"another std: data\.augment\.std=\[0\.5,0\.25,0\.75\]"):
        open_exported(tmp_path / "fused.onnx", 32, "float32", normalization | {"std": (0.229, 0.224, 0.225)})


MISTAKES = (
    ("opset=0", "opset=0: give a whole number"),
    ("opset=-1", "opset=-1: give a whole number"),
    ("opset=17", "write 18 to"),
    ("opset=1000", "write 18 to"),
    ("image_size=0", "image_size=0"),
    ("batch=0", "batch=0"),
    ("batch=many", "batch=many"),
    ("preprocess=maybe", "give true or false"),
    ("dtype=int4", "float32, float16"),
    ("int8=true", "calibration="),
    ("calibration=.", "int8=true"),
    ("crop_fraction=1.5", "at most 1"),
    ("check=nowhere", "nowhere: no such"),
    ("check=w.safetensors", "not a shard"),
    ("check=.", "no images in it"),
    ("out=model.pt", "ends in .onnx"),
    ("input_size=9x9", "input_size: format=onnx does not read"),
    ("colour=red", "colour is not a key"),
    ("opset", "opset has no value"),
    ("width=0.5", "width is given twice"),
    ("run=outputs/x", "either run="),
    ("selection=last", "goes with run="),
)


@pytest.mark.parametrize(("argument", "said"), MISTAKES)
def test_mistakes_end_in_one_line(half: Any, argument: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(Path().iterdir())
    assert exported("format=onnx", argument) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1 and sorted(Path().iterdir()) == before


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("format=executorch", "batch=dynamic"), "plans its memory"),
        (("format=openvino", "image_size=64", "int8=true", "calibration=."), "processors with AMX"),
        (("format=executorch", "preprocess=true"), "input_size=HEIGHTxWIDTH"),
        (("format=torchscript", "input_size=9by9"), "such as 480x640"),
        (("format=safetensors", "opset=18"), "does not read"),
        (("format=hub",), "weights: format=hub does not read"),
        (("format=wings",), "format=wings: give one of onnx"),
        (("w.pt",), "w.pt: options are given as KEY=VALUE"),
        ((), "format is missing"),
    ],
)
def test_what_a_format_cannot_do(
    half: Any, arguments: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert exported(*arguments) == 2
    assert said in capsys.readouterr().err


def test_an_export_that_differs_from_torch_is_not_written(
    half: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(export_check, "TOLERANCE", -1.0)
    assert exported("format=torchscript", "image_size=64", "out=model.pt") == 2
    assert "the export is wrong, nothing was written" in capsys.readouterr().err
    assert [path.name for path in Path().iterdir()] == ["w.safetensors"]


def test_a_missing_package_names_the_extra(half: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    assert exported("format=onnx") == 2
    assert "onnxscript is not installed: pip install '.[onnx]'" in capsys.readouterr().err
    monkeypatch.setitem(ALL_FORMATS, "onnx", ALL_FORMATS["onnx"]._replace(packages=("onnx_of_tomorrow",)))
    assert exported("format=onnx") == 2
    assert "onnx_of_tomorrow cannot be imported" in capsys.readouterr().err


def test_evaluate_counts_every_image_with_the_exported_file(half: Any, evaluate_with: Program, tmp_path: Path) -> None:
    data = validation_shards(tmp_path, tuple("abcdefghij"), 25, 64, 128)
    common = (f"data.root={data}", "image_size=64", "report=predictions", "trainer=cpu", "data.workers=0")
    assert evaluate_with("weights=w.safetensors", "width=0.5", *common) == 0
    assert exported("format=onnx", "image_size=64", "batch=4", "out=model.onnx") == 0
    assert evaluate_with("weights=model.onnx", *common) == 0
    torchs, onnxs = rows("results/results.csv")
    assert onnxs["images"] == "25" and onnxs["width"] == "0.5" and onnxs["top1_flips"] == ""
    assert onnxs["top1"] == torchs["top1"] and float(onnxs["loss"]) == pytest.approx(float(torchs["loss"]), abs=1e-5)
    first, second = (rows(f"results/{name}/predictions.csv") for name in ("w-0.5", "model.onnx"))
    assert [r["predicted_1"] for r in first] == [r["predicted_1"] for r in second]


@pytest.mark.slow
def test_evaluate_says_what_it_cannot_evaluate(
    half: Any, evaluate_with: Program, shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert exported("format=onnx", "image_size=64", "softmax=true", "out=model.onnx") == 0
    graph = onnx.load("model.onnx")
    del graph.metadata_props[:]
    onnx.save(graph, "other.onnx")
    Path("broken.onnx").write_bytes(b"no")
    for file, size, said in (
        ("model.onnx", 64, "gives probabilities"),
        ("other.onnx", 64, "not written by repghost.export"),
        ("broken.onnx", 64, "its runtime cannot load it"),
        ("none.onnx", 64, "no such file"),
    ):
        assert evaluate_with(f"weights={file}", f"image_size={size}", f"data.root={shards}", "trainer=cpu") == 2
        assert said in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("form", NETWORK_FORMATS)
def test_every_format(half: Any, form: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert exported(f"format={form}", "image_size=64") == 0
    said = capsys.readouterr().out
    assert Path(f"repghostnet_0.5{ALL_FORMATS[form].ending}").exists()
    assert ("not run: Core ML runs on macOS only" if form == "coreml" else "largest difference from torch") in said


@pytest.mark.slow
@pytest.mark.parametrize("form", ["executorch", "torchscript", "coreml"])
def test_every_format_preprocesses(half: Any, form: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        exported(f"format={form}", "image_size=64", "preprocess=true", "input_size=120x160", "softmax=true", "batch=3")
        == 0
    )
    assert "written" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("form", ["onnx", "executorch", "torchscript", "coreml"])
def test_float16(half: Any, form: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert exported(f"format={form}", "image_size=96", "dtype=float16") == 0
    assert exported("format=safetensors", "image_size=96") == 0
    small = Path(f"repghostnet_0.5_float16{ALL_FORMATS[form].ending}")
    size = sum(path.stat().st_size for path in [small, *small.rglob("*")])
    # XNNPACK keeps the weights in float32 and rounds them when it loads them.
    assert form == "executorch" or size < 0.7 * Path("repghostnet_0.5.safetensors").stat().st_size


@pytest.mark.slow
def test_evaluate_with_executorch(half: Any, evaluate_with: Program, tmp_path: Path) -> None:
    data = validation_shards(tmp_path, tuple("abcdefghij"), 25, 64, 128)
    assert exported("format=executorch", "image_size=64", "batch=4", "out=model.pte") == 0
    common = (f"data.root={data}", "image_size=64", "trainer=cpu", "data.workers=0")
    assert evaluate_with("weights=model.pte", *common) == 0
    assert evaluate_with("weights=w.safetensors", "width=0.5", *common) == 0
    mine, torchs = rows("results/results.csv")
    assert mine["images"] == "25" and mine["top1"] == torchs["top1"]


@pytest.mark.usefixtures("all_blocks")
@pytest.mark.slow
@pytest.mark.parametrize("width", WIDTHS)
@torch.no_grad()
def test_onnx_agrees_in_every_top1_of_200_photographs(width: float, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    model = repghostnet(width)
    randomize_batchnorm(model, 0)
    save_weights(model, "w.safetensors")
    assert exported("format=onnx", "image_size=128", "out=model.onnx", width=width) == 0
    assert_nothing_is_left_to_fold(Path("model.onnx"))
    session, transform = InferenceSession("model.onnx"), Preprocessing(128).transform()
    images = torch.stack([transform(patch(number, 60, 290)) for number in range(200)])
    for batch in images.split(20):
        logits = session.run(None, {"image": batch.numpy()})[0]
        assert (logits.argmax(1) == model.eval()(batch).argmax(1).numpy()).all()


@pytest.mark.slow
def test_check_takes_the_users_photographs(half: Any, shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_class_folders(Path("photos"), per_class=4)
    for source in ("photos", str(next(shards.glob("*.tar")))):
        assert exported("format=torchscript", "image_size=64", f"check={source}") == 0
        assert f"images of {source}" in capsys.readouterr().out


@pytest.mark.usefixtures("all_blocks")
def test_timm_loads_what_is_exported_for_the_hub(train_tiny: Program, capsys: pytest.CaptureFixture[str]) -> None:
    normalization = ("recipe.augment.mean=[0.1,0.5,0.9]", "recipe.augment.std=[0.5,0.25,0.75]")
    assert train_tiny("name=half", "width=0.5", "epochs=1", *normalization) == 0
    assert command("run=outputs/half", "format=hub", "selection=best_ema", "out=hub") == 0
    model = timm.create_model("local-dir:hub", pretrained=True).eval()
    assert model.num_classes == 3 and tuple(model.pretrained_cfg["input_size"]) == (3, 32, 32)
    assert model.pretrained_cfg["label_names"] == Path("outputs/half/classes.txt").read_text().split()
    data = timm.data.resolve_data_config(model=model)
    assert (
        data["crop_pct"] == 0.875 and list(data["mean"]) == [0.1, 0.5, 0.9] and list(data["std"]) == [0.5, 0.25, 0.75]
    )
    ours = load_model("outputs/half/checkpoints/best_ema.ckpt", 0.5)
    with torch.no_grad():
        images = normalized(2, 32)
        assert torch.allclose(model(images), ours(images), atol=1e-5)
    card = Path("hub/README.md").read_text()
    result = json.loads(Path("outputs/half/evaluation_best_ema.json").read_text())
    assert f"| 15 | {result['top1']:.2f} |" in card and "(curve.png)" in card and Path("hub/curve.png").exists()
    assert re.search(r"learning_rate: 0?\.?\d", card) and "{" not in card.partition("## Recipe")[0]
    top1, top5 = ModelCard.load("hub/README.md").data.eval_results or ()
    assert (top1.metric_type, top1.metric_value) == ("accuracy", round(result["top1"], 2))
    assert top1.dataset_name in card and top5.metric_value == round(result["top5"], 2)
    assert load_model("hub", 0.5).classifier.out_features == 3
    assert command("run=outputs/none", "format=hub") == 2
    assert "outputs/none" in capsys.readouterr().err


def test_timms_names() -> None:
    assert [timm_name(width) for width in (0.5, 0.58, 2.0)] == [f"repghostnet_{n}.in1k" for n in ("050", "058", "200")]
    with pytest.raises(UserError, match=r"width=0\.1"):
        timm_name(0.1)
