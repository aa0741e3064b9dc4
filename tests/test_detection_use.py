"""What a trained detector is for: predictions, and ONNX."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from faster_coco_eval.core import mask
from omegaconf import OmegaConf
from onnxruntime import InferenceSession
from PIL import Image
from test_detectors import SMALL, conf, images, randomize, small

from repghost import reparameterize
from repghost.detection.masks import run_lengths
from repghost.detection.run import load_detector
from repghost.errors import UserError, run_command
from repghost.export import __main__ as export
from repghost.export import detector as export_detector
from repghost.export.photographs import sample_photographs
from repghost.predict import __main__ as predict
from repghost.weights import load_model, save_weights

pytestmark = pytest.mark.usefixtures("few_blocks")

SLOW = ("retinanet", "fcos", "faster_rcnn", "mask_rcnn")
NAMES = ["cat", "traffic light", "Z\u00fcge"]


def make_run(folder: Path, name: str, **values: Any) -> Any:
    """A run's folder as train.py leaves it, with a detector whose scores differ; returns the detector."""
    values |= {"score_threshold": 0.01, "width": 0.1}
    model = small(name, **values).eval()
    randomize(model)
    spread(model)
    size = {"image_size": [96] if name == "ssdlite" else [96, 128]}
    config = {"task": "detection", "width": 0.1, "detector": conf(name) | SMALL | size | values}
    (folder / "checkpoints").mkdir(parents=True)
    OmegaConf.save(OmegaConf.create(config), folder / "config.yaml")
    (folder / "data.json").write_text(json.dumps({"classes": NAMES, "fingerprints": {}}))
    checkpoint = {"ema": model.state_dict(), "history": [{"epoch": 4}], "run": {"width": 0.1}}
    torch.save(checkpoint, folder / "checkpoints" / "last.ckpt")
    save_weights(model, folder / "model.safetensors")
    return model


@torch.no_grad()
def spread(model: Any) -> None:
    """Larger weights in the classification, so that no two scores are the same but for rounding."""
    if hasattr(model, "rpn"):
        layers = [model.rpn.head.cls_logits]
        model.roi_heads.box_predictor.cls_score.weight.mul_(3)
    else:
        logits = [m for m in model.head.classification_head.modules() if isinstance(m, torch.nn.Conv2d)]
        layers = [m for m in logits if m.kernel_size == (1, 1)] or logits[-1:]
    for layer in layers:
        layer.weight.normal_(0, 0.3, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for number, image in enumerate(photograph.image for photograph in sample_photographs(2)):
        image.thumbnail((160, 160))
        image.save(folder / f"{number}.png")
    (folder / "broken.jpg").write_bytes(b"no image")
    return folder


@pytest.mark.parametrize("name", ["mask_rcnn", "ssdlite"])
def test_predictions_are_drawn_and_written(
    name: str, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    model = make_run(tmp_path / "run", name)
    fused = reparameterize(model)
    assert predict.run([str(photos), "run=run", "score=0.2"]) == 0
    captured = capsys.readouterr()
    assert "broken.jpg: skipped" in captured.err and "2 images predicted, 1 skipped" in captured.err
    written = (tmp_path / "predictions" / "predictions.jsonl").read_text()
    rows = [json.loads(line) for line in written.splitlines()]
    assert [row["file"] for row in rows] == [str(photos / "0.png"), str(photos / "1.png")]
    for row in rows:
        image = Image.open(row["file"])
        pixels = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1) / 255
        with torch.inference_mode():
            (expected,) = fused([pixels])
        kept = expected["scores"] >= 0.2
        assert row["scores"] == pytest.approx(expected["scores"][kept].tolist(), abs=1e-5) and len(row["scores"]) > 0
        np.testing.assert_allclose(row["boxes"], expected["boxes"][kept].numpy(), atol=1e-2)
        assert row["labels"] == [NAMES[label - 1] for label in expected["labels"][kept].tolist()]
        assert ("masks" in row) == (name == "mask_rcnn")
        for rle, pixels in zip(row.get("masks", []), expected.get("masks", [])[: len(row["scores"])], strict=True):
            assert rle["size"] == [image.height, image.width]
            assert np.array_equal(mask.decode(rle), pixels[0].numpy() >= 0.5)
        drawn = np.asarray(Image.open(tmp_path / "predictions" / Path(row["file"]).name))
        assert drawn.shape == np.asarray(image).shape and (drawn != np.asarray(image)).any()
    assert predict.run([str(photos), "run=run", "score=0.2", "format=jsonl"]) == 0
    assert capsys.readouterr().out == written


def test_an_image_without_objects(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_run(tmp_path / "run", "ssdlite")
    out = tmp_path / "out"
    assert predict.run([str(photos / "0.png"), f"run={tmp_path / 'run'}", "score=1", f"out={out}"]) == 0
    assert json.loads((out / "predictions.jsonl").read_text())["boxes"] == []
    same = [np.asarray(Image.open(folder / "0.png")) for folder in (photos, out)]
    assert np.array_equal(*same)


def test_a_run_gives_its_detector(tmp_path: Path) -> None:
    model = make_run(tmp_path / "run", "retinanet")
    found, classes, epoch = load_detector(tmp_path / "run", "last")
    assert list(classes) == NAMES and epoch == 4 and not found.training and type(found) is type(model)
    assert all(torch.equal(tensor, found.state_dict()[key]) for key, tensor in model.state_dict().items())
    config = OmegaConf.load(tmp_path / "run" / "config.yaml")
    config.detector.channels *= 2
    OmegaConf.save(config, tmp_path / "run" / "config.yaml")
    with pytest.raises(UserError, match=r"not of the detector in config.yaml"):
        load_detector(tmp_path / "run", "last")
    (tmp_path / "run" / "data.json").unlink()
    with pytest.raises(UserError, match=r"no data\.json"):
        load_detector(tmp_path / "run", "last")
    with pytest.raises(UserError, match="weights of a detector"):
        load_model(tmp_path / "run")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["top=3"], "top: a detector does not read this key"),
        (["image_size=64"], "image_size: a detector"),
        (["format=csv"], "format=csv: what a detector finds"),
        (["score=0"], "score=0: give a number above 0"),
        (["selection=best_ema"], "best_ema.ckpt"),
    ],
)
def test_what_a_detector_does_not_read(
    arguments: list[str], said: str, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_run(tmp_path / "run", "ssdlite")
    given = [str(photos), f"run={tmp_path / 'run'}", f"out={tmp_path / 'out'}", *arguments]
    assert run_command(lambda: predict.run(given)) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_classifier_has_no_score(photos: Path) -> None:
    with pytest.raises(UserError, match="score: a classifier does not read this key"):
        predict.run([str(photos), "weights=timm", "width=1.0", "score=0.3"])


def test_run_lengths() -> None:
    masks = torch.rand(3, 1, 7, 5, generator=torch.Generator().manual_seed(0))
    for counts, pixels in zip(run_lengths(masks), masks, strict=True):
        assert np.array_equal(mask.decode({"size": [7, 5], "counts": counts}), pixels[0].numpy() >= 0.5)
    assert run_lengths(masks[:0]) == []


# -- ONNX --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ssdlite", *(pytest.param(n, marks=pytest.mark.slow) for n in SLOW)])
def test_onnx_finds_what_torch_finds(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = make_run(tmp_path / "run", name)
    assert run_command(lambda: export.run([f"run={tmp_path / 'run'}", "format=onnx"])) == 0
    said = capsys.readouterr().out
    assert "found by one of both alone; largest difference of scores" in said and "16 images" in said
    session = InferenceSession(tmp_path / "run" / "fused.onnx")
    described = json.loads(session.get_modelmeta().custom_metadata_map["repghost"])
    assert described["classes"] == NAMES and described["form"] == "fused"
    fused = reparameterize(model)
    for image in images():
        with torch.no_grad():
            (expected,) = fused([image])
        names = [output.name for output in session.get_outputs()]
        found = dict(zip(names, session.run(names, {"image": image.numpy()}), strict=True))
        assert len(expected["scores"]) > 3
        np.testing.assert_allclose(found["scores"], expected["scores"].numpy(), atol=1e-4)
        assert ("masks" in found) == (name == "mask_rcnn")
        if "masks" in found:
            assert found["masks"].shape == expected["masks"].shape


def test_an_export_that_differs_is_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make_run(tmp_path / "run", "ssdlite")
    write = export_detector._write

    def wrong(module: Any, *arguments: Any) -> None:
        logits = module.detector.head.classification_head.module_list[0][1]
        with torch.no_grad():
            logits.bias[::4] += 0.5
            write(module, *arguments)
            logits.bias[::4] -= 0.5

    monkeypatch.setattr(export_detector, "_write", wrong)
    assert run_command(lambda: export.run([f"run={tmp_path / 'run'}", "format=onnx"])) == 2
    assert "the export is wrong, nothing was written" in capsys.readouterr().err
    assert not list((tmp_path / "run").glob("*.onnx"))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["format=executorch"], "format=executorch: a detector is exported to onnx"),
        (["format=safetensors"], "model_fused.safetensors"),
        (["format=onnx", "softmax=true"], "softmax: format=onnx does not read this key"),
        (["format=onnx", "batch=4"], "batch: format=onnx does not read this key"),
    ],
)
def test_what_no_detector_is_exported_as(
    arguments: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.yaml").write_text("task: detection\n")
    assert run_command(lambda: export.run([f"run={tmp_path}", *arguments])) == 2
    assert said in capsys.readouterr().err
