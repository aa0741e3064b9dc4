"""Files say of themselves what they are, and every command believes them; what contradicts itself is refused."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from images import patch
from test_predict import make_run, predict_one

from repghost import repghostnet
from repghost.description import Description, describe_run
from repghost.errors import UserError
from repghost.export import __main__ as export
from repghost.export.runtimes import open_file
from repghost.predict import __main__ as predict
from repghost.predict.predictor import classify
from repghost.reference import synsets
from repghost.weights import load_model, read_description, read_weights, save_weights

pytestmark = pytest.mark.usefixtures("few_blocks")

KNOWN = Description(
    width=0.1, form="training", classes=("ä", "=b", "c\n"), image_size=32, crop_fraction=1.0,
    mean=(0.1, 0.5, 0.9), std=(0.5, 0.25, 0.75), recipe="quick", data="abc",
)  # fmt: skip


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A network of three classes, saved with a description as w.safetensors in the current folder."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    model = repghostnet(0.1, 3)
    save_weights(model, "w.safetensors", KNOWN)
    return model.eval()


def test_it_is_the_same_after_json() -> None:
    text = KNOWN.to_json()
    assert Description.from_json(text, "x") == KNOWN and text.isascii() and "\n" not in text
    assert Description.from_json('{"colour": "red"}', "x") == Description()


@pytest.mark.parametrize(
    "text",
    ["", "[]", "1", '{"width": "wide"}', '{"width": NaN}', '{"width": -1}', '{"classes": "abc"}', '{"classes": [1]}',
     '{"image_size": 1.5}', '{"crop_fraction": 2}', '{"std": [0, 1, 1]}', '{"mean": [true]}', "[" * 100_000],
)  # fmt: skip
def test_what_is_no_description_is_one_line(text: str) -> None:
    with pytest.raises(UserError, match=r"^w\.pt: what it says of itself cannot be read") as error:
        Description.from_json(text, "w.pt")
    assert "\n" not in str(error.value)


def test_weights_carry_it_and_equal_weights_are_equal_files(tiny: Any) -> None:
    assert read_description("w.safetensors") == KNOWN
    with safetensors.safe_open("w.safetensors", "pt") as file:
        assert file.metadata()["format"] == "pt"
    save_weights(load_model("w.safetensors"), "again.safetensors", KNOWN)
    assert Path("again.safetensors").read_bytes() == Path("w.safetensors").read_bytes()
    network = repghostnet(weights="w.safetensors")
    assert (network.width, network.classifier.out_features) == (0.1, 3)
    with pytest.raises(UserError, match=r"width=0\.5"):
        repghostnet(0.5, weights="w.safetensors")
    with pytest.raises(UserError, match="weights of 3 classes, but the network has 5"):
        repghostnet(num_classes=5, weights="w.safetensors")


@pytest.mark.parametrize("width", [0.1, 0.5, 0.58, 1.11, 2.0])
def test_the_shapes_tell_the_width(width: float, tmp_path: Path) -> None:
    torch.save(repghostnet(width, 3).state_dict(), tmp_path / "w.pt")
    assert load_model(tmp_path / "w.pt").width == width
    assert read_description(tmp_path / "w.pt") == Description(width=width, form="training")


def test_a_width_that_no_shapes_tell_is_asked_for(tmp_path: Path) -> None:
    torch.save(repghostnet(0.125, 3).state_dict(), tmp_path / "w.pt")
    with pytest.raises(UserError, match="give width="):
        load_model(tmp_path / "w.pt")
    assert load_model(tmp_path / "w.pt", 0.125).width == 0.125


def test_a_run_of_before_is_described_by_its_folder(tmp_path: Path) -> None:
    model = make_run(tmp_path)
    safetensors.torch.save_file(model.state_dict(), tmp_path / "model.safetensors")
    for path in (tmp_path, tmp_path / "model.safetensors", tmp_path / "checkpoints" / "last.ckpt"):
        found = read_description(path)
        assert (found.width, found.image_size, found.crop_fraction) == (0.1, 32, 1.0)
        assert found.classes == ("cat", "dog", "owl")


def test_published_weights_are_imagenets() -> None:
    found = read_description("timm")
    assert (found.classes, found.image_size, found.crop_fraction) == (synsets(), 224, 0.875)


@pytest.mark.parametrize(
    ("change", "said"),
    [({"classes": ("a", "b")}, "says that it has 2 classes"), ({"form": "fused"}, "says that it is in fused form"),
     ({"width": 0.5}, "not the weights of width=0.5")],
)  # fmt: skip
def test_a_contradiction_is_an_error(tiny: Any, change: dict[str, Any], said: str) -> None:
    described = json.dumps(KNOWN.known() | change)
    safetensors.torch.save_file(tiny.state_dict(), "x.safetensors", {"repghost": described})
    with pytest.raises(UserError, match=said):
        load_model("x.safetensors")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_floating_point_types_are_read(tiny: Any, dtype: torch.dtype) -> None:
    stored = {k: v.to(dtype) if v.is_floating_point() else v for k, v in tiny.state_dict().items()}
    torch.save(stored, "other.pt")
    found = load_model("other.pt")
    assert {p.dtype for p in found.parameters()} == {torch.float32}
    assert torch.equal(found.classifier.weight, tiny.classifier.weight.to(dtype).float())


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("classifier.weight", float("nan"), "classifier.weight holds NaN or infinity"),
        ("blocks.0.0.ghost1.primary_conv.0.weight", float("inf"), "primary_conv.0.weight holds NaN or infinity"),
        ("bn1.running_var", -1.0, "bn1.running_var holds negative variances"),
    ],
)
def test_values_of_no_network_are_refused(tiny: Any, name: str, value: float, said: str) -> None:
    state = tiny.state_dict()
    state[name].flatten()[0] = value
    torch.save(state, "bad.pt")
    patch(0).save("a.png")
    for use in (
        lambda: load_model("bad.pt"),
        lambda: repghostnet(weights="bad.pt"),
        lambda: predict.run(["a.png", "weights=bad.pt"]),
        lambda: export.run(["weights=bad.pt", "format=safetensors"]),
    ):
        with pytest.raises(UserError, match=rf"^bad\.pt: .*{said}"):
            use()


@pytest.mark.filterwarnings("ignore:Validating sparse tensor invariants")
def test_tensors_that_are_no_weights(tiny: Any) -> None:
    state = tiny.state_dict()
    for tensor in (torch.ones(3, 1280, dtype=torch.int8), torch.ones(3, 1280).to_sparse(), torch.ones(3, 1280) * 1j):
        torch.save(state | {"classifier.weight": tensor}, "bad.pt")
        with pytest.raises(UserError, match=r"bad\.pt: classifier\.weight is torch"):
            load_model("bad.pt")


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "model.", "ema.", "module._orig_mod.", "net.backbone."])
def test_prefixes_of_wrappers_are_understood(tiny: Any, prefix: str) -> None:
    wrapped = {prefix + name: tensor for name, tensor in tiny.state_dict().items()}
    torch.save({"state_dict": wrapped}, "wrapped.pt")
    assert read_weights("wrapped.pt").keys() == tiny.state_dict().keys()
    torch.save(wrapped | {"loss.weight": torch.ones(1)}, "wrapped.pt")
    with pytest.raises(UserError, match=r"do not belong, the first is loss\.weight"):
        load_model("wrapped.pt")


def test_of_two_networks_the_averaged_one_is_taken(tiny: Any) -> None:
    both = {f"model.{k}": torch.zeros_like(v) for k, v in tiny.state_dict().items()}
    torch.save(both | {f"ema.module.{k}": v for k, v in tiny.state_dict().items()}, "both.pt")
    assert torch.equal(load_model("both.pt").classifier.weight, tiny.classifier.weight)
    averaged = torch.optim.swa_utils.AveragedModel(tiny)
    torch.save(averaged.state_dict(), "averaged.pt")
    assert torch.equal(load_model("averaged.pt").classifier.weight, tiny.classifier.weight)


def test_weights_of_a_run_predict_as_the_run_does(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, image = make_run(tmp_path, mean=[0.1, 0.5, 0.9], std=[0.5, 0.25, 0.75]), tmp_path / "owl.png"
    patch(2).save(image)
    config = {"width": 0.1, "image_size": 32, "data": {"crop_fraction": 1.0},
              "recipe": {"augment": {"mean": [0.1, 0.5, 0.9], "std": [0.5, 0.25, 0.75]}}}  # fmt: skip
    save_weights(model, tmp_path / "alone" / "w.safetensors", describe_run(config, ["cat", "dog", "owl"], "abc"))  # type: ignore[arg-type]
    save_weights(model, tmp_path / "model.safetensors")
    expected = predict_one(image, f"run={tmp_path}")
    for weights in (tmp_path / "alone" / "w.safetensors", tmp_path / "checkpoints" / "last.ckpt"):
        assert predict_one(image, f"weights={weights}") == expected
    assert not capsys.readouterr().err
    predict_one(image, f"weights={tmp_path / 'alone' / 'w.safetensors'}", "image_size=64")
    assert capsys.readouterr().err == "trained at 32 pixels, used at 64\n"


def test_csv_is_safe_for_spreadsheets_and_terminals(tiny: Any, capsys: pytest.CaptureFixture[str]) -> None:
    name = "=1+\x1b[31m\n.png"
    patch(0).save(name)
    assert predict.run(["./" + name, "weights=w.safetensors", "format=csv", "top=9"]) == 0
    header, row = capsys.readouterr().out.splitlines()
    columns = ["file", *(f"{name}_{rank}" for rank in (1, 2, 3) for name in ("label", "class", "probability"))]
    assert header.split(",") == columns
    assert row.startswith("./=1+\\x1b[31m\\n.png,")
    assert {"ä", "'=b", "c\\n"} == set(row.split(",")[2::3])
    predict.run(["./" + name, "weights=w.safetensors"])
    said = capsys.readouterr().out
    assert "\x1b" not in said and len(said.splitlines()) == 4


def test_classify_takes_files_images_and_arrays(tiny: Any) -> None:
    image = patch(1)
    image.save("a.png")
    found = classify(["a.png", Path("a.png"), image, np.asarray(image)], "w.safetensors", top=2)
    assert [p.file for p in found] == ["a.png", "a.png", "2", "3"]
    assert all(p.top == found[0].top and len(p.top) == 2 for p in found)
    assert classify(image, "w.safetensors", class_names=["x", "y", "z"])[0].top[0][1] in "xyz"
    for bad, said in (("none.png", "none.png: cannot be read"), (np.ones((3, 3)), "0: cannot be read as an image")):
        with pytest.raises(UserError, match=said):
            classify(bad, "w.safetensors")


def test_exported_files_know_themselves(tiny: Any, capsys: pytest.CaptureFixture[str]) -> None:
    patch(1).save("a.png")
    expected = predict_one(Path("a.png"), "weights=w.safetensors")
    fused = {"width": 0.1, "form": "fused"}
    for form, ending in (("onnx", "onnx"), ("torchscript", "pt"), ("safetensors", "safetensors")):
        export.run(["weights=w.safetensors", f"format={form}", f"out=x.{ending}"])
        assert read_description(f"x.{ending}").known() == KNOWN.known() | fused | {
            key: list(value) if isinstance(value, list) else value
            for key, value in KNOWN.known().items() if key not in fused
        }  # fmt: skip
    for file in ("x.onnx", "x.safetensors"):
        found = predict_one(Path("a.png"), f"weights={file}")
        assert [row[:2] for row in found.top] == [row[:2] for row in expected.top]
        assert [row[2] for row in found.top] == pytest.approx([row[2] for row in expected.top], abs=1e-5)
    assert open_file("x.onnx").metadata["num_classes"] == 3
    for key in ("image_size=64", "width=0.5"):
        with pytest.raises(UserError, match=f"{key}: x.onnx has"):
            predict.run(["a.png", "weights=x.onnx", key])
    with pytest.raises(UserError, match="exported already"):
        export.run(["weights=x.onnx", "format=onnx"])
