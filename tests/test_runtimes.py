"""The runtimes beside onnxruntime and ExecuTorch run an export as torch runs the fused network, INT8 nearly so.

OpenVINO and NCNN are tested everywhere; LiteRT where it is installed, TensorRT where a GPU is as well.
"""

import json
import re
import shutil
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import photographs as normalized
from helpers import run_script
from images import make_class_folders
from test_evaluation import rows, validation_shards
from test_export import command, exported, half, saved_half  # noqa: F401

from repghost import reparameterize
from repghost.errors import UserError
from repghost.export.deployable import Deployable, Deployment
from repghost.export.formats import openvino
from repghost.export.int8 import sqnr
from repghost.export.options import FORMATS
from repghost.export.runtimes import open_as, open_file
from repghost.images import Preprocessing

pytestmark = pytest.mark.usefixtures("few_blocks")

Program = Callable[..., int]
NO_LITERT = pytest.mark.skipif(find_spec("litert_torch") is None, reason="the extra litert is not installed")
NO_TENSORRT = pytest.mark.skipif(
    find_spec("tensorrt") is None or not torch.cuda.is_available(), reason="TensorRT and a GPU are not here"
)
RUNTIMES = ["openvino", "ncnn", pytest.param("litert", marks=NO_LITERT), pytest.param("tensorrt", marks=NO_TENSORRT)]


def batch_of(count: int, form: str) -> list[str]:
    """The key for a format that has calls of several images."""
    return [] if form == "ncnn" else [f"batch={count}"]


@pytest.fixture(scope="module")
def shared(saved_half: tuple[Any, Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:  # noqa: F811
    """Exports the network to a format once, for all tests; returns the file, copied into the current folder."""
    folder, (_, weights) = tmp_path_factory.mktemp("exports"), saved_half

    def copied(form: str) -> Path:
        out = folder / f"model{FORMATS[form].ending}"
        if not out.exists():
            assert command(f"weights={weights}", "width=0.5", f"format={form}", "image_size=64", f"out={out}") == 0
        for file in (out, *map(out.with_suffix, FORMATS[form].beside)):
            shutil.copy(file, file.name)
        return Path(out.name)

    return copied


@pytest.mark.parametrize("form", RUNTIMES)
@torch.no_grad()
def test_every_image_of_a_batch_gets_torchs_logits(half: Any, form: str) -> None:  # noqa: F811
    out = f"model{FORMATS[form].ending}"
    assert exported(f"format={form}", "image_size=64", *batch_of(3, form), f"out={out}") == 0
    images = normalized(7, 64)  # a last batch that is not full
    found = open_as(form, Path(out))
    assert (found(images) - reparameterize(half)(images)).abs().max() < 1e-4
    described = open_file(out)
    assert described.metadata["batch"] == (1 if form == "ncnn" else 3) and described.metadata["image_size"] == 64
    assert described.description.width == 0.5


@pytest.mark.parametrize("form", ["openvino", pytest.param("tensorrt", marks=NO_TENSORRT)])
@torch.no_grad()
def test_a_batch_of_any_size(half: Any, form: str, shared: Callable[[str], Path]) -> None:  # noqa: F811
    model = open_as(form, shared(form))
    for count in (1, 5):
        images = normalized(count, 64)
        assert (model(images) - reparameterize(half)(images)).abs().max() < 1e-4


def test_signals_are_handled_after_openvino(half: Any, shared: Callable[[str], Path]) -> None:  # noqa: F811
    """Its stack for signal handlers must not be gone: a program would end at the first signal, without a word."""
    shared("openvino")
    script = f"""
import gc, os, signal
from pathlib import Path
from repghost.export.runtimes import open_as
first, second = (open_as("openvino", Path("{Path.cwd()}/model.xml")) for _ in range(2))
del first
gc.collect()
del second
gc.collect()
signal.signal(signal.SIGUSR1, lambda *_: print("handled"))
os.kill(os.getpid(), signal.SIGUSR1)
"""
    assert run_script(script) == "handled\n"


@pytest.mark.parametrize("form", ["openvino", pytest.param("tensorrt", marks=NO_TENSORRT)])
def test_int8_is_smaller_and_its_report_is_a_page(half: Any, form: str, capsys: Any) -> None:  # noqa: F811
    make_class_folders(Path("photos"), per_class=6)
    out = f"model{FORMATS[form].ending}"
    common = (f"format={form}", "image_size=96", f"out={out}", "int8=true", "calibration=photos")
    assert exported(*common, "calibration_images=12", "batch=3") == 0
    said = capsys.readouterr().out
    assert "MB in float32" in said and "same Top-1" in said and "layers that lose most" in said
    report = json.loads(Path("model.int8.json").read_text())
    assert report["images"] == 18 and report["sqnr_db"] > 3
    assert report["bytes"]["int8"] < 0.6 * report["bytes"]["float32"]
    assert form != "openvino" or not zero_points(out)


def zero_points(path: str) -> list[str]:
    """Names of the quantizers of an OpenVINO file whose range is neither symmetric nor from 0 on."""
    import openvino

    found = []
    for operation in openvino.Core().read_model(path).get_ops():
        if operation.get_type_name() == "FakeQuantize":
            low, high = (operation.input_value(place).get_node().get_data() for place in (1, 2))
            if not ((low == 0) | (abs(low + high) < 0.02 * abs(high))).all():
                found.append(operation.get_friendly_name())
    return found


@pytest.fixture(scope="module")
@torch.no_grad()
def quantized(saved_half: tuple[Any, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:  # noqa: F811
    """OpenVINO's INT8 of a network of which one channel never fires, and as BatchNorm may leave it has huge weights."""
    model, out = reparameterize(saved_half[0]), tmp_path_factory.mktemp("int8") / "model.xml"
    ghost = model.blocks[0][0].ghost1
    ghost.primary_conv[0].weight[0] = ghost.primary_conv[0].bias[0] = 0
    ghost.cheap_operation[0].weight[0] *= 5000
    openvino.write(Deployable.of(model, Deployment(Preprocessing(64), None)), out, {}, [normalized(4, 64)])
    return out


def test_a_channel_that_never_fires_costs_openvinos_others_no_levels(quantized: Path) -> None:
    import openvino as runtime

    constants = [op for op in runtime.Core().read_model(quantized).get_ops() if op.get_type_name() == "Constant"]
    levels = [op.get_data() for op in constants if op.get_element_type() == runtime.Type.i8]
    used = [abs(each.astype(int)).reshape(len(each), -1).max(1) for each in levels]
    assert len(used) >= 40 and all(((each == 63) | (each == 0)).all() for each in used)


def test_openvinos_int8_is_the_same_on_a_processor_without_vnni(quantized: Path) -> None:
    """Which adds products in 16 bits."""
    images = quantized.with_name("images.pt")
    torch.save(normalized(4, 64), images)
    script = f"""
import os
os.environ["ONEDNN_MAX_CPU_ISA"] = "AVX2"
from pathlib import Path
import torch
from repghost.export.formats.openvino import open_model
print(open_model(Path({str(quantized)!r}))(torch.load({str(images)!r})).tolist())
"""
    assert sqnr(openvino.open_model(quantized)(torch.load(images)), torch.tensor(json.loads(run_script(script)))) > 30


@pytest.mark.parametrize("form", RUNTIMES)
def test_evaluate_takes_the_file(
    half: Any,  # noqa: F811
    form: str,
    shared: Callable[[str], Path],
    evaluate_with: Program,
    tmp_path: Path,
) -> None:
    data, out = validation_shards(tmp_path, tuple("abcdefghij"), 25, 64, 128), shared(form)
    common = (f"data.root={data}", "image_size=64", "trainer=cpu", "data.workers=0")
    assert evaluate_with(f"weights={out}", *common) == 0
    assert evaluate_with("weights=w.safetensors", "width=0.5", *common) == 0
    mine, torchs = rows("results/results.csv")
    assert mine["images"] == "25" and mine["top1"] == torchs["top1"]


def test_openvino_preprocesses_photographs(half: Any, capsys: pytest.CaptureFixture[str]) -> None:  # noqa: F811
    arguments = ("format=openvino", "image_size=64", "preprocess=true", "softmax=true", "input_size=120x160")
    assert exported(*arguments) == 0
    assert "allowed 1.0e-04" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("form", "line"), [("openvino", "its runtime cannot load it"), ("ncnn", "NCNN cannot load it")]
)
def test_a_file_without_its_weights_is_one_line(
    half: Any,  # noqa: F811
    form: str,
    line: str,
    shared: Callable[[str], Path],
) -> None:
    out = shared(form)
    out.with_suffix(".bin").unlink()
    with pytest.raises(UserError, match=re.escape(f"{out}: {line}")):
        open_file(str(out))


def test_a_network_that_its_converter_cannot_read_is_one_line(
    half: Any,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("pnnx.EXEC_PATH", "false")
    assert exported("format=ncnn", "image_size=64", "out=model.ncnn.param") == 2
    assert capsys.readouterr().err == "error: pnnx could not convert the network: it ended with 1\n"
    assert not [*Path().glob("*ncnn*")]


def test_an_ncnn_file_of_others_is_one_line(half: Any) -> None:  # noqa: F811
    assert exported("format=ncnn", "image_size=65", "out=model.ncnn.param") == 0
    ours = Path("model.ncnn.param").read_text().splitlines()
    Path("model.ncnn.param").write_text("\n".join(ours[:-1]))
    with pytest.raises(UserError, match=r"model\.ncnn\.param: not written by repghost\.export"):
        open_file("model.ncnn.param")
