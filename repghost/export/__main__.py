"""Exports what was trained, or published weights, for deployment: always the fused network.

    python -m repghost.export run=outputs/NAME format=onnx [selection=best_ema] [out=FILE]
    python -m repghost.export weights=timm width=1.0 format=executorch
    python -m repghost.export run=outputs/NAME format=onnx int8=true calibration=SHARD.tar

Formats: onnx, executorch (XNNPACK), torchscript, coreml, safetensors (the fused weights), hub (a folder for the Hugging
Face hub). Every export is run by its own runtime on photographs and compared with torch before it appears at `out`; one
that differs by too much is an error (see `repghost.export.check`). INT8 also leaves a report beside the file.
Check: `pytest tests/test_export.py tests/test_quantize.py`.
"""

import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image

from repghost.errors import UserError, run_command
from repghost.export import formats
from repghost.export.check import compare, inputs_of, int8_report
from repghost.export.formats import Deployable, Deployment
from repghost.export.hub import export_hub
from repghost.export.runtimes import open_written, quiet, require
from repghost.files import TEMPORARY
from repghost.images import Preprocessing, calibration_images, sample_images
from repghost.model import RepGhostNet
from repghost.options import PATH, SWITCH, WHOLE, NetworkOptions, Values, one_of, open_network, option, parse
from repghost.reparameterization import reparameterize
from repghost.weights import save_weights

CHECKED = 16  # images that an export is compared on
_HUB = {"run", "selection", "format", "out"}
_WEIGHTS = _HUB | {"weights", "width", "image_size", "crop_fraction", "check"}
_NETWORK = _WEIGHTS | {"batch", "dtype", "softmax", "preprocess"}
_INT8 = {"int8", "calibration", "calibration_images"}


class Format(NamedTuple):
    """A format: how its files end, which keys it reads, and what has to be installed, in the order of asking."""

    ending: str
    keys: set[str]
    packages: tuple[str, ...] = ()


FORMATS = {
    "onnx": Format(".onnx", _NETWORK | _INT8 | {"opset"}, ("onnx", "onnxscript", "onnxruntime")),
    "executorch": Format(".pte", _NETWORK | _INT8 | {"input_size"}, ("executorch.exir", "torchao")),
    "torchscript": Format(".pt", _NETWORK | {"input_size"}),
    "coreml": Format(".mlpackage", _NETWORK | {"input_size"}, ("coremltools",)),
    "safetensors": Format(".safetensors", _WEIGHTS),
    "hub": Format("", _HUB),
}


def _size(text: str) -> tuple[int, int]:
    height, width = map(WHOLE.read, text.split("x"))
    return height, width


BATCH = Values("a whole number above 0, or dynamic", lambda text: 0 if text == "dynamic" else WHOLE.read(text))
SIZE = Values("HEIGHTxWIDTH in pixels, such as 480x640", _size)


@dataclass
class Options(NetworkOptions):
    """What to export, and how."""

    format: str = option("what is written", one_of(*FORMATS), "")
    out: Path | None = option("the file or folder, by default in the run's folder", PATH)
    batch: int | None = option("images of a call", BATCH)
    dtype: str = option("of the network's weights and activations", one_of("float32", "float16"), "float32")
    softmax: bool = option("whether probabilities come out instead of logits", SWITCH, False)
    opset: int = option("of ONNX", WHOLE, formats.OLDEST_OPSET)
    preprocess: bool = option("whether the file takes photographs, uint8 [N, H, W, 3]", SWITCH, False)
    input_size: tuple[int, int] | None = option("size of the photographs; ONNX takes any", SIZE)
    int8: bool = option("whether to quantize, with scales from calibration=", SWITCH, False)
    calibration: Path | None = option("folder of images, or a shard", PATH)
    calibration_images: int = option("how many", WHOLE, 128)
    check: Path | None = option("folder or shard of images to check the export on", PATH)


def export(options: Options) -> Path:
    """Writes the export, prints how it was checked and returns its path.

    Raises UserError for options that do not go together, and for an export that differs from torch; nothing is then
    written.
    """
    for package in FORMATS[options.format].packages:
        require(package)
    model, preprocessing = open_network(options)
    deployment = _deployment(options, preprocessing)
    out = _out(options, deployment, model.width)
    model = reparameterize(model).to(memory_format=torch.contiguous_format)  # a run's is in channels_last
    images, what = [], f"{CHECKED} crops of photographs"
    if source := options.calibration or options.check:
        images = calibration_images(source, options.calibration_images if options.int8 else CHECKED)
        what = f"{len(images)} images of {source}"
    elif options.format != "coreml":
        images = sample_images(CHECKED)
    out.parent.mkdir(parents=True, exist_ok=True)
    # Beside `out`, so that a rename puts the finished file or folder there, whole or not at all.
    with tempfile.TemporaryDirectory(TEMPORARY, ".", out.parent) as folder:
        written = Path(folder) / out.name
        with quiet():
            _write(options, model, deployment, written, images)
        if options.format == "coreml":
            print("not run: Core ML runs on macOS only")
        elif options.int8:
            print(int8_report(model, open_written(written, model.width), images, deployment, out, source))
        else:
            print(f"{compare(model, open_written(written, model.width), images, deployment)}; checked on {what}")
        if written.is_dir():
            shutil.rmtree(out, ignore_errors=True)
        written.replace(out)
    return out


def _deployment(options: Options, preprocessing: Preprocessing) -> Deployment:
    form, batch = options.format, options.batch
    if options.int8 != (options.calibration is not None):
        raise UserError("int8=true and calibration=FOLDER or SHARD.tar go together: its scales come from images")
    if options.int8 and options.dtype == "float16":
        raise UserError("dtype=float16 and int8=true: give one of them")
    if form != "onnx" and options.preprocess != (options.input_size is not None):
        what = f"a {form} file takes photographs of one size"
        raise UserError(f"preprocess=true and input_size=HEIGHTxWIDTH go together: {what}")
    if batch is None:
        batch = 1 if form in ("executorch", "coreml") else 0
    if batch == 0 and form == "executorch":
        raise UserError("batch=dynamic: ExecuTorch plans its memory in advance; give the number, batch=1")
    precision: Any = "int8" if options.int8 else options.dtype
    return Deployment(preprocessing, batch or None, options.preprocess, options.input_size, options.softmax, precision)


def _out(options: Options, deployment: Deployment, width: float) -> Path:
    ending, out = FORMATS[options.format].ending, options.out
    if out is not None:
        if out.suffix != ending:
            raise UserError(f"out={out}: the name of a {options.format} file ends in {ending}")
        return out
    kind = "" if deployment.precision == "float32" else f"_{deployment.precision}"
    if options.run is None:
        return Path(f"repghostnet_{width:g}{kind}{ending}")
    selection = f"_{options.selection}" if options.selection not in (None, "last") else ""
    return options.run / f"fused{selection}{kind}{ending}"


def _write(
    options: Options, model: RepGhostNet, deployment: Deployment, path: Path, images: Sequence[Image.Image]
) -> None:
    """Writes the fused `model` to `path`; in INT8, `images` are for its scales."""
    module, metadata = Deployable.of(model, deployment), formats.metadata_of(model, deployment)
    inputs = inputs_of(images, deployment) if options.int8 else []
    match options.format:
        case "safetensors":
            save_weights(model, path)
        case "torchscript":
            formats.write_torchscript(module, deployment, path)
        case "coreml":
            formats.write_coreml(model, deployment, path)
        case "onnx":
            formats.write_onnx(module, deployment, path, options.opset, metadata)
            if inputs:
                formats.quantize_onnx(path, inputs)
        case "executorch":
            program = formats.quantize_executorch(module, deployment, inputs) if inputs else None
            program = program or torch.export.export(module, (formats.example_input(deployment),))
            formats.write_executorch(program, path, metadata)


def run(arguments: Sequence[str]) -> None:
    """Exports as the arguments say."""
    paths, options = parse(Options, arguments)
    if paths:
        raise UserError(f"{paths[0]}: options are given as KEY=VALUE; --help lists them")
    if not options.format:
        raise UserError(f"format is missing: format=FORMAT, one of {', '.join(FORMATS)}")
    read = FORMATS[options.format].keys
    if unread := [key for key in (argument.partition("=")[0] for argument in arguments) if key not in read]:
        raise UserError(f"{unread[0]}: format={options.format} does not read this key, only {', '.join(sorted(read))}")
    if options.format != "hub":
        print(f"written: {export(options)}")
        return
    if options.run is None:
        raise UserError("give run=outputs/NAME format=hub: a model card needs a run")
    out = options.out or options.run / "hub"
    export_hub(options.run, options.selection or "last", out)
    print(f"{out}: {', '.join(sorted(path.name for path in out.iterdir()))}")


if __name__ == "__main__":
    sys.exit(run_command(lambda: run(sys.argv[1:])))
