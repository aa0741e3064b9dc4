"""INT8 exports keep what can be kept, name the layers that lose most, and take their images from folders and shards."""

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from helpers import photographs as normalized
from images import encoded, make_class_folders, patch
from test_evaluation import random_network

from repghost import reparameterize
from repghost.errors import UserError
from repghost.export import __main__ as export
from repghost.export.check import layer_losses, sqnr
from repghost.images import calibration_images, sample_images


@pytest.fixture(scope="module")
def fused(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return reparameterize(random_network(0.5, 10, tmp_path_factory.mktemp("w") / "w.safetensors"))


def test_calibration_images_from_a_folder_and_a_shard(tmp_path: Path) -> None:
    make_class_folders(tmp_path / "folder", per_class=10)
    found = calibration_images(tmp_path / "folder", 6)
    assert [image.mode for image in found] == ["RGB"] * 6
    everything = calibration_images(tmp_path / "folder", 100)
    assert len(everything) == 30
    chosen = [next(i for i, one in enumerate(everything) if one.tobytes() == image.tobytes()) for image in found]
    assert {i // 10 for i in chosen} == {0, 1, 2}, "of all classes"
    with tarfile.open(tmp_path / "shard.tar", "w") as tar:
        for number in range(4):
            for name, content in ((f"{number}.jpg", encoded(patch(number))), (f"{number}.cls", b"1")):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    assert [image.size for image in calibration_images(tmp_path / "shard.tar", 3)] == [patch(i).size for i in range(3)]


def test_calibration_images_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "bad.jpg").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"bad\.jpg: cannot be read as an image"):
        calibration_images(tmp_path, 5)
    with pytest.raises(UserError, match="no such folder or shard"):
        calibration_images(tmp_path / "none", 5)


def test_sample_images_are_distinct() -> None:
    assert len({image.tobytes() for image in sample_images(16)}) == 16


@torch.no_grad()
def test_layer_losses_are_those_of_rounding_one_layer(fused: Any) -> None:
    images = normalized(4, 64)
    before = {name: tensor.clone() for name, tensor in fused.state_dict().items()}
    layers = layer_losses(fused, images)
    for name, tensor in fused.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert len(layers) == 96 and [row["sqnr_db"] for row in layers] == sorted(row["sqnr_db"] for row in layers)
    # The classifier by hand: 127 steps on either side of 0 for the weights of a class, 255 for its inputs, which are
    # not negative.
    seen: list[torch.Tensor] = []
    hook = fused.classifier.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    exact = fused(images)
    hook.remove()
    steps = fused.classifier.weight.abs().amax(1, keepdim=True) / 127
    weight, step = (fused.classifier.weight / steps).round() * steps, seen[0].max() / 255
    by_hand = (seen[0] / step).round() * step @ weight.T + fused.classifier.bias
    row = next(row for row in layers if row["layer"] == "classifier")
    assert row["sqnr_db"] == pytest.approx(sqnr(exact, by_hand), abs=0.1)
    assert row["top1_flips"] == int((exact.argmax(1) != by_hand.argmax(1)).sum())


def test_sqnr_of_a_known_noise() -> None:
    exact = torch.tensor([[1.0, -1.0], [-1.0, 1.0]])
    assert sqnr(exact + 7, exact + 7.1) == pytest.approx(20, abs=1e-3)


def int8(form: str, tmp_path: Path, *arguments: str) -> dict[str, Any]:
    make_class_folders(tmp_path / "calibration", per_class=6)
    random_network(0.5, 10, tmp_path / "w.safetensors")
    out = tmp_path / f"model{export.FORMATS[form].ending}"
    source = [f"weights={tmp_path / 'w.safetensors'}", "width=0.5", f"format={form}", f"out={out}", "image_size=64"]
    export.run([*source, "int8=true", f"calibration={tmp_path / 'calibration'}", *arguments])
    return json.loads((tmp_path / "model.int8.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize("form", ["onnx", "executorch"])
def test_int8(form: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = int8(form, tmp_path)
    assert report["images"] == 18 and len(report["layers"]) == 96
    assert report["sqnr_db"] > 5 and report["top1_agreement"] > 50, "a random network's classes are nearly tied"
    said = capsys.readouterr().out
    assert report["layers"][0]["layer"] in said and f"evaluate.py weights={tmp_path / 'model'}" in said
    size = (tmp_path / f"model{export.FORMATS[form].ending}").stat().st_size
    assert size < 0.45 * (tmp_path / "w.safetensors").stat().st_size


@pytest.mark.slow
@pytest.mark.parametrize("form", ["onnx", "executorch"])
def test_int8_leaves_the_preprocessing_in_float(form: str, tmp_path: Path) -> None:
    fixed = ("input_size=80x100",) if form == "executorch" else ()
    report = int8(form, tmp_path, "preprocess=true", "softmax=true", *fixed)
    assert report["top1_agreement"] > 50
    if form == "onnx":
        nodes = onnx.load(tmp_path / "model.onnx").graph.node
        producers = {name: node.op_type for node in nodes for name in node.output}
        for node in nodes:
            if node.op_type in ("MatMul", "Floor", "Softmax"):
                assert (
                    "DequantizeLinear" not in {producers.get(name) for name in node.input} or node.op_type == "Softmax"
                )


@pytest.mark.slow
def test_onnx_weights_have_a_scale_for_every_channel(tmp_path: Path) -> None:
    int8("onnx", tmp_path)
    graph = onnx.load(tmp_path / "model.onnx").graph
    tensors = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    producers = {name: node for node in graph.node for name in node.output}
    for node in graph.node:
        if node.op_type == "Conv":
            weight, scale, _ = producers[node.input[1]].input
            assert tensors[weight].dtype == np.int8 and tensors[scale].shape == tensors[weight].shape[:1]


@pytest.mark.slow
def test_int8_mistakes(tmp_path: Path) -> None:
    for argument, said in (("dtype=float16", "give one of them"), ("calibration_images=0", "whole number")):
        with pytest.raises(UserError, match=said):
            int8("onnx", tmp_path / argument, argument)
