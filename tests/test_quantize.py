"""INT8 exports keep what can be kept, name the layers that lose most, and take their images from folders and shards."""

import copy
import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from helpers import photographs as normalized
from helpers import randomize_batchnorm
from images import encoded, make_class_folders, patch
from test_evaluation import random_network
from torch import nn

from repghost import reparameterize, repghostnet
from repghost.errors import UserError, run_command
from repghost.export import __main__ as export
from repghost.export.equalization import equalize
from repghost.export.int8 import layer_losses, sqnr
from repghost.export.options import FORMATS
from repghost.export.photographs import read_photographs, sample_photographs
from repghost.rounding import round_layers, rounded_input, rounded_weight
from repghost.weights import load_model

pytestmark = pytest.mark.usefixtures("few_blocks")

Program = Callable[..., int]


@pytest.fixture(scope="module")
def fused(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return reparameterize(random_network(0.5, 10, tmp_path_factory.mktemp("w") / "w.safetensors"))


def write_shard(folder: Path, count: int = 4) -> Path:
    """Patches of which the label comes before or after the image, or is missing."""
    path = folder / "shard.tar"
    with tarfile.open(path, "w") as tar:
        for number in range(count):
            members = [(f"{number}.jpg", encoded(patch(number))), (f"{number}.cls", b"%d" % (number % 2))]
            for name, content in reversed(members) if number % 2 else members[: 1 + (number != 2)]:
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return path


def test_photographs_of_a_folder_and_a_shard(tmp_path: Path) -> None:
    make_class_folders(tmp_path / "folder", per_class=10)
    found = read_photographs(tmp_path / "folder", 6)
    assert [photograph.image.mode for photograph in found] == ["RGB"] * 6
    assert len({photograph.class_name for photograph in found}) == 3, "of all classes"
    assert len(read_photographs(tmp_path / "folder", 100)) == 30
    shard = write_shard(tmp_path)
    assert [photograph.image.size for photograph in read_photographs(shard, 3)] == [patch(i).size for i in range(3)]
    assert [photograph.class_name for photograph in read_photographs(shard, 9)] == [None] * 4, "nothing names them"
    (tmp_path / "manifest.json").write_text(json.dumps({"classes": ["cat", "dog"]}))
    assert [photograph.class_name for photograph in read_photographs(shard, 9)] == ["cat", "dog", None, "dog"]


def test_photographs_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "bad.jpg").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"bad\.jpg: cannot be read as an image"):
        read_photographs(tmp_path, 5)
    with pytest.raises(UserError, match="no such folder or shard"):
        read_photographs(tmp_path / "none", 5)


def test_sample_photographs_are_distinct() -> None:
    assert len({photograph.image.tobytes() for photograph in sample_photographs(16)}) == 16


# -- equalization ------------------------------------------------------------------------------------------------------


def largest_outputs(model: Any, images: torch.Tensor) -> dict[str, torch.Tensor]:
    """The largest absolute value of every channel that a layer writes, by the layer's name."""
    found: dict[str, torch.Tensor] = {}
    for name, layer in model.named_modules():
        if isinstance(layer, torch.nn.Conv2d | torch.nn.Linear):

            def look(_: Any, __: Any, output: torch.Tensor, name: str = name) -> None:
                found[name] = output.abs().transpose(0, 1).flatten(1).amax(1)

            layer.register_forward_hook(look)
    model(images)
    return found


@pytest.mark.parametrize("shortcut", [True, False])
@torch.no_grad()
def test_equalization_changes_no_bit_and_gives_depthwise_channels_one_size(shortcut: bool) -> None:
    torch.manual_seed(0)
    model = repghostnet(0.5, 10, shortcut=shortcut)
    randomize_batchnorm(model, 0)
    fused, images = reparameterize(model), normalized(4, 64)
    state = {name: tensor.clone() for name, tensor in fused.state_dict().items()}
    equalized = equalize(fused, [images[:2], images[2:]])
    assert torch.equal(equalized(images), fused(images))
    assert all(torch.equal(tensor, state[name]) for name, tensor in fused.state_dict().items()), "a copy is changed"
    before, after = (largest_outputs(copy.deepcopy(model), images) for model in (fused, equalized))
    depthwise = {name for name in before if "ghost1.cheap_operation" in name or "ghost2.cheap_operation" in name}
    for name in (name.replace("cheap_operation", "primary_conv") for name in depthwise):
        assert after[name].max() < 2.01 * after[name].min() < 2.01 * before[name].max(), name


@torch.no_grad()
def test_equalization_does_not_take_a_rare_channel_for_a_small_one(fused: Any) -> None:
    """Made as large as the others on images that show little of it, it would be cut off on those that show it."""
    images, rare = normalized(8, 64), copy.deepcopy(fused)
    conv = rare.blocks[1][0].ghost1.primary_conv[0]
    largest = conv(rare.blocks[0](rare.relu(rare.conv_stem(images))))[:, 0].max()
    conv.bias[0] -= 0.999 * largest  # a ReLU lets nearly nothing through
    before, after = (
        equalize(model, [images]).blocks[1][0].ghost1.primary_conv[0].weight[0].norm() for model in (fused, rare)
    )
    assert largest > 0 and after <= 2 * before


@torch.no_grad()
def test_equalization_undoes_what_makes_a_network_hostile(fused: Any) -> None:
    """Channels that differ by three orders of magnitude, most of which INT8 with one scale rounds away."""
    spread, rng = copy.deepcopy(fused), torch.Generator().manual_seed(0)
    for block in (block for stage in spread.blocks[:-1] for block in stage):
        writer, reader = block.ghost1.primary_conv[0], block.ghost1.cheap_operation[0]
        factors = torch.randint(-5, 6, (len(writer.bias),), generator=rng).float().exp2()
        writer.weight.mul_(factors.view(-1, 1, 1, 1))
        writer.bias.mul_(factors)
        reader.weight.div_(factors.view(-1, 1, 1, 1))
    images = normalized(8, 64)
    assert torch.equal(spread(images), fused(images))

    def lost(model: Any) -> float:
        rounded = copy.deepcopy(model)
        round_layers(rounded)
        rounded.dropout.p = 0.0
        return sqnr(fused(images), rounded.train()(images))

    rounded = lost(spread)
    assert lost(equalize(spread, [images])) > rounded + 3


# -- rounding ----------------------------------------------------------------------------------------------------------


def test_rounding_has_256_levels_an_exact_zero_and_the_gradient_of_the_identity() -> None:
    x = torch.linspace(-0.3, 1.7, 1001).requires_grad_()
    rounded = rounded_input(x)
    assert len(rounded.unique()) == 256 and (rounded - x).abs().max() <= 2 / 255 / 2 + 1e-6
    assert rounded_input(torch.tensor([-0.3, 0.0, 1.7]))[1] == 0
    rounded.sum().backward()
    assert torch.equal(x.grad, torch.ones(1001))  # type: ignore[arg-type]
    weight = torch.tensor([[1.0, -0.5], [100.0, 3.0], [0.0, 0.0]])
    steps = torch.tensor([[1 / 127], [100 / 127], [1.0]])
    assert torch.allclose(rounded_weight(weight), (weight / steps).round() * steps)


def test_rounded_layers_round_in_training_mode_only(fused: Any) -> None:
    model, images = copy.deepcopy(fused).requires_grad_(True), normalized(2, 64)
    model.dropout.p = 0.0
    round_layers(model)
    assert {type(layer) for layer in model.modules()} & {torch.nn.Conv2d, torch.nn.Linear} == set()
    assert model.state_dict().keys() == fused.state_dict().keys()
    with torch.no_grad():
        assert torch.equal(model.eval()(images), fused(images))
        assert not torch.equal(model.train()(images), fused(images))
    model(images).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_a_quantization_aware_run_is_a_fused_run(train_tiny: Program, capsys: pytest.CaptureFixture[str]) -> None:
    assert train_tiny("name=exact", "epochs=1") == 0
    arguments = ("recipe=qat", "epochs=1", "name=aware", "recipe.start_learning_rate=5")
    assert train_tiny(*arguments) == 2
    assert "give weights=outputs/NAME" in capsys.readouterr().err
    assert train_tiny(*arguments, "weights=outputs/exact") == 0
    start, end = (load_model(f"outputs/{name}/model_fused.safetensors") for name in ("exact", "aware"))
    assert end.fused and type(end.conv_stem) is torch.nn.Conv2d
    pairs = zip(start.named_parameters(), end.parameters(), strict=True)
    changed = {name for (name, before), after in pairs if not torch.equal(before, after)}
    assert changed >= {"conv_stem.weight", "conv_stem.bias", "conv_head.bias", "classifier.weight", "classifier.bias"}
    make_class_folders(Path("photos"), per_class=2)
    assert run_command(lambda: export.run(["run=outputs/aware", "format=onnx", "int8=true", "calibration=photos"])) == 0


# -- what INT8 loses ---------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_layer_losses_are_those_of_rounding_one_layer(fused: Any) -> None:
    images = normalized(4, 64)
    before = {name: tensor.clone() for name, tensor in fused.state_dict().items()}
    layers = layer_losses(fused, images)
    for name, tensor in fused.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert len(layers) == sum(isinstance(layer, nn.Conv2d | nn.Linear) for layer in fused.modules())
    assert [row["sqnr_db"] for row in layers] == sorted(row["sqnr_db"] for row in layers)
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
    out = tmp_path / f"model{FORMATS[form].ending}"
    source = [f"weights={tmp_path / 'w.safetensors'}", "width=0.5", f"format={form}", f"out={out}", "image_size=64"]
    export.run([*source, "int8=true", f"calibration={tmp_path / 'calibration'}", *arguments])
    return json.loads((tmp_path / "model.int8.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize("form", ["onnx", "executorch"])
def test_int8(form: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = int8(form, tmp_path)
    assert report["images"] == 18 and len(report["layers"]) == 46
    assert report["sqnr_db"] > 5 and report["top1_agreement"] > 50, "a random network's classes are nearly tied"
    said = capsys.readouterr().out
    assert report["layers"][0]["layer"] in said and f"evaluate.py weights={tmp_path / 'model'}" in said
    size = (tmp_path / f"model{FORMATS[form].ending}").stat().st_size
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
            assert tensors[weight].dtype == np.uint8 and tensors[scale].shape == tensors[weight].shape[:1]


def test_int8_mistakes(tmp_path: Path) -> None:
    for argument, said in (("dtype=float16", "give one of them"), ("calibration_images=0", "whole number")):
        with pytest.raises(UserError, match=said):
            int8("onnx", tmp_path / argument, argument)
