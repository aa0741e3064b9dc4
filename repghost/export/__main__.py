"""Exports what was trained, or published weights, for deployment: always the fused network.

    python -m repghost.export run=outputs/NAME format=onnx [selection=best_ema] [out=FILE]
    python -m repghost.export weights=timm width=1.0 format=executorch
    python -m repghost.export run=outputs/NAME format=onnx int8=true calibration=SHARD.tar

Formats: onnx, executorch (XNNPACK), torchscript, coreml, safetensors (the fused weights), hub (a folder for the Hugging
Face hub). Every export is run by its own runtime on photographs and compared with torch before it appears at `out`; one
that differs by too much is an error (see `repghost.export.check`). INT8 also leaves a report beside the file (see
`repghost.export.quantize`). Check: `pytest tests/test_export.py tests/test_quantize.py`.
"""

import json
import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
from PIL import Image

from repghost.errors import UserError, run_command
from repghost.export import formats
from repghost.export.check import check_coreml, compare, inputs_of, int8_report, int8_summary, open_written
from repghost.export.formats import Deployable, Deployment
from repghost.export.hub import export_hub
from repghost.export.quantize import quantize_executorch, quantize_onnx
from repghost.export.runtimes import quiet, require
from repghost.files import TEMPORARY, atomic_write, write_text
from repghost.images import Preprocessing, calibration_images, sample_images
from repghost.model import RepGhostNet
from repghost.options import Option, parse
from repghost.reparameterize import reparameterize
from repghost.source import SourceOptions, open_source
from repghost.weights import save_weights

ENDINGS = {"onnx": ".onnx", "executorch": ".pte", "torchscript": ".pt", "coreml": ".mlpackage",
           "safetensors": ".safetensors"}  # fmt: skip
FORMATS = (*ENDINGS, "hub")
# What has to be installed for a format, in the order in which it is asked for.
PACKAGES = {"onnx": ("onnx", "onnxscript", "onnxruntime"), "executorch": ("executorch.exir", "torchao"),
            "coreml": ("coremltools",)}  # fmt: skip

_HUB = {"run", "selection", "format", "out"}
_WEIGHTS = _HUB | {"weights", "width", "image_size", "crop_fraction", "check"}
_NETWORK = _WEIGHTS | {"batch", "dtype", "softmax", "preprocess"}
_INT8 = {"int8", "calibration", "calibration_images"}
READ = {  # the keys that each format reads
    "onnx": _NETWORK | _INT8 | {"opset"},
    "executorch": _NETWORK | _INT8 | {"input_size"},
    "torchscript": _NETWORK | {"input_size"},
    "coreml": _NETWORK | {"input_size"},
    "safetensors": _WEIGHTS,
    "hub": _HUB,
}
CHECKED = 16  # images that an export is compared on


@dataclass
class Options(SourceOptions):
    """What to export, and how."""

    format: Annotated[str | None, Option("what is written", FORMATS)] = None
    out: Annotated[Path | None, Option("the file or folder, by default in the run's folder")] = None
    batch: Annotated[
        str | None,
        Option("images of a call", pattern=r"[1-9]\d{0,5}|dynamic", form="a whole number above 0, or dynamic"),
    ] = None
    dtype: Annotated[str, Option("of the network's weights and activations", ("float32", "float16"))] = "float32"
    softmax: Annotated[bool, Option("whether probabilities come out instead of logits")] = False
    opset: Annotated[int, Option("of ONNX", above=0)] = formats.OLDEST_OPSET
    preprocess: Annotated[bool, Option("whether the file takes photographs, uint8 [N, H, W, 3]")] = False
    input_size: Annotated[
        str | None,
        Option(
            "size of the photographs; ONNX takes any",
            pattern=r"[1-9]\d{0,4}x[1-9]\d{0,4}",
            form="HEIGHTxWIDTH in pixels, such as 480x640",
        ),
    ] = None
    int8: Annotated[bool, Option("whether to quantize, with scales from calibration=")] = False
    calibration: Annotated[Path | None, Option("folder of images, or a shard")] = None
    calibration_images: Annotated[int, Option("how many", above=0)] = 128
    check: Annotated[Path | None, Option("folder or shard of images to check the export on")] = None


def export(options: Options) -> Path:
    """Writes the export, prints how it was checked and returns its path.

    Raises UserError for options that do not go together, and for an export that differs from torch; nothing is then
    written.
    """
    for package in PACKAGES.get(str(options.format), ()):
        require(package)
    if options.int8 != (options.calibration is not None):
        raise UserError("int8=true and calibration=FOLDER or SHARD.tar go together: its scales come from images")
    source = open_source(options)
    deployment = _deployment(options, source.preprocessing)
    out = _out(options, deployment, source.model.width)
    model = reparameterize(source.model).to(memory_format=torch.contiguous_format)  # a run's is in channels_last
    calibration = []
    if options.calibration is not None:
        calibration = calibration_images(options.calibration, options.calibration_images)
    with tempfile.TemporaryDirectory() as folder:
        written = Path(folder) / out.name
        with quiet():
            _write(options, model, deployment, written, calibration)
        if options.format == "coreml":
            print(check_coreml(written))
        elif calibration:
            runtime = open_written(str(options.format), written, model.width)
            report = {"file": str(out), "calibration": str(options.calibration)}
            report |= int8_report(model, runtime, calibration, deployment)
            path = out.with_suffix(".int8.json")
            write_text(path, json.dumps(report, indent=2) + "\n")
            print(int8_summary(report, path, source))
        else:
            images, what = sample_images(CHECKED), f"{CHECKED} crops of photographs"
            if options.check is not None:
                images = calibration_images(options.check, CHECKED)
                what = f"{len(images)} images of {options.check}"
            runtime = open_written(str(options.format), written, model.width)
            print(f"{compare(model, runtime, images, deployment)}; checked on {what}")
        _publish(written, out)
    return out


def _deployment(options: Options, preprocessing: Preprocessing) -> Deployment:
    form = options.format
    if options.int8 and options.dtype == "float16":
        raise UserError("dtype=float16 and int8=true: give one of them")
    if form != "onnx" and options.preprocess != (options.input_size is not None):
        what = f"a {form} file takes photographs of one size"
        raise UserError(f"preprocess=true and input_size=HEIGHTxWIDTH go together: {what}")
    batch = options.batch or ("1" if form in ("executorch", "coreml") else "dynamic")
    if batch == "dynamic" and form == "executorch":
        raise UserError("batch=dynamic: ExecuTorch plans its memory in advance; give the number, batch=1")
    height, _, width = (options.input_size or "").partition("x")
    return Deployment(
        preprocessing,
        batch=None if batch == "dynamic" else int(batch),
        preprocess=options.preprocess,
        input_size=(int(height), int(width)) if options.input_size else None,
        softmax=options.softmax,
        precision="int8" if options.int8 else "float16" if options.dtype == "float16" else "float32",
    )


def _out(options: Options, deployment: Deployment, width: float) -> Path:
    ending = ENDINGS[str(options.format)]
    if options.out is not None:
        out = options.out.expanduser()
        if out.suffix != ending:
            raise UserError(f"out={out}: the name of a {options.format} file ends in {ending}")
        if out.exists() and out.is_dir() != (options.format == "coreml"):
            raise UserError(f"out={out}: this is a {'folder' if out.is_dir() else 'file'}")
        return out
    kind = "" if deployment.precision == "float32" else f"_{deployment.precision}"
    if options.run is None:
        return Path(f"repghostnet_{width:g}{kind}{ending}")
    selection = f"_{options.selection}" if options.selection not in (None, "last") else ""
    return options.run / f"fused{selection}{kind}{ending}"


def _write(
    options: Options, model: RepGhostNet, deployment: Deployment, path: Path, calibration: Sequence[Image.Image]
) -> None:
    """Writes the fused `model` to `path`; with calibration images, in INT8."""
    module, metadata = Deployable.of(model, deployment), formats.metadata_of(model, deployment)
    inputs = inputs_of(calibration, deployment) if calibration else []
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
                quantize_onnx(path, inputs)
        case "executorch":
            program = quantize_executorch(module, deployment, inputs) if inputs else None
            program = program or torch.export.export(module, (formats.example_input(deployment),))
            formats.write_executorch(program, path, metadata)


def _publish(written: Path, out: Path) -> None:
    """Moves a finished file or folder to `out`, whole or not at all."""
    if written.is_file():
        with atomic_write(out) as file:
            file.write(written.read_bytes())
        return
    beside = out.with_name(f".{out.name}{TEMPORARY}")
    shutil.rmtree(beside, ignore_errors=True)
    shutil.copytree(written, beside)
    shutil.rmtree(out, ignore_errors=True)
    beside.rename(out)


def run(arguments: Sequence[str]) -> None:
    """Exports as the arguments say."""
    paths, options = parse(Options, arguments)
    if paths:
        raise UserError(f"{paths[0]}: options are given as KEY=VALUE; --help lists them")
    if options.format is None:
        raise UserError(f"format is missing: format=FORMAT, one of {', '.join(FORMATS)}")
    read = READ[options.format]
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
