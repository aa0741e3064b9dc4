"""One export from network to file: converted, run by its own runtime, compared, and only then put in its place.

Check: `pytest tests/test_export.py tests/test_quantize.py`.
"""

import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn

from repghost.errors import UserError
from repghost.export import formats
from repghost.export.check import compare, inputs_of, int8_report
from repghost.export.formats import Deployable, Deployment
from repghost.export.options import FORMATS, Options
from repghost.export.runtimes import (
    ExportedModel,
    is_exported,
    open_executorch,
    open_onnx,
    open_torchscript,
    quiet,
    require,
)
from repghost.files import TEMPORARY
from repghost.images import Preprocessing, calibration_images, sample_images
from repghost.machine import limit_threads
from repghost.model import RepGhostNet
from repghost.networks import Network, open_network
from repghost.reparameterization import reparameterize
from repghost.weights import load_model, save_weights

CHECKED = 16  # images that an export is compared on


def export(options: Options) -> Path:
    """Writes the export, prints how it was checked and returns its path.

    Raises UserError for options that do not go together, and for an export that differs from torch; nothing is then
    written.
    """
    for package in FORMATS[options.format].packages:
        require(package)
    if is_exported(options.weights):
        raise UserError(f"{options.weights}: exported already; give the weights or the run that it came from")
    limit_threads()
    network = open_network(options)
    assert isinstance(network.model, RepGhostNet)
    deployment = _deployment(options, network.preprocessing)
    out = _out(options, deployment, network.model.width)
    model = reparameterize(network.model).to(memory_format=torch.contiguous_format)  # a run's is in channels_last
    images, what = [], f"{CHECKED} crops of photographs"
    if source := options.calibration or options.check:
        _say(f"reading images of {source}")
        images = calibration_images(source, options.calibration_images if options.int8 else CHECKED)
        what = f"{len(images)} images of {source}"
    elif options.format != "coreml":
        images = sample_images(CHECKED)
    out.parent.mkdir(parents=True, exist_ok=True)
    # Beside `out`, so that a rename puts the finished file or folder there, whole or not at all.
    with tempfile.TemporaryDirectory(TEMPORARY, ".", out.parent) as folder:
        written = Path(folder) / out.name
        calibrated = f", calibrated on {len(images)} images" if options.int8 else ""
        _say(f"converting the network to {options.format}{calibrated}")
        with quiet():
            _write(options, network._replace(model=model), deployment, written, images)
        if options.format == "coreml":
            print("not run: Core ML runs on macOS only")
        elif options.int8:
            _say("comparing with float32, and every layer alone")
            print(int8_report(model, _open(written), images, deployment, out, source))
        else:
            _say("comparing with torch")
            print(f"{compare(model, _open(written), images, deployment)}; checked on {what}")
        if written.is_dir():
            shutil.rmtree(out, ignore_errors=True)
        written.replace(out)
    return out


def _say(step: str) -> None:
    """Shows what takes its time now."""
    print(f"{step} ...", flush=True)


def _open(path: Path) -> ExportedModel:
    """A file that was written in its own runtime; of safetensors, a network with its weights."""
    match path.suffix:
        case ".onnx":
            return open_onnx(path)
        case ".pte":
            return open_executorch(path)
        case ".pt":
            return open_torchscript(path)
    return ExportedModel(load_model(path))


def _deployment(options: Options, preprocessing: Preprocessing) -> Deployment:
    batch = options.batch
    if batch is None:
        batch = 1 if options.format in ("executorch", "coreml") else 0
    precision: Any = "int8" if options.int8 else options.dtype
    return Deployment(preprocessing, batch or None, options.preprocess, options.input_size, options.softmax, precision)


def _out(options: Options, deployment: Deployment, width: float) -> Path:
    if options.out is not None:
        return options.out
    ending = FORMATS[options.format].ending
    kind = "" if deployment.precision == "float32" else f"_{deployment.precision}"
    if options.run is None:
        return Path(f"repghostnet_{width:g}{kind}{ending}")
    selection = f"_{options.selection}" if options.selection not in (None, "last") else ""
    return options.run / f"fused{selection}{kind}{ending}"


def _write(
    options: Options, network: Network, deployment: Deployment, path: Path, images: Sequence[Image.Image]
) -> None:
    """Writes the fused network to `path`; in INT8, `images` are for its scales."""
    model: nn.Module = network.model
    assert isinstance(model, RepGhostNet)
    module, metadata = Deployable.of(model, deployment), formats.metadata_of(model, deployment, network.description)
    inputs = inputs_of(images, deployment) if options.int8 else []
    match options.format:
        case "safetensors":
            save_weights(model, path, network.description)
        case "torchscript":
            formats.write_torchscript(module, deployment, path, metadata)
        case "coreml":
            formats.write_coreml(model, deployment, path, metadata)
        case "onnx":
            formats.write_onnx(module, deployment, path, options.opset, metadata)
            if inputs:
                formats.quantize_onnx(path, inputs)
        case "executorch":
            program = formats.quantize_executorch(module, deployment, inputs) if inputs else None
            program = program or torch.export.export(module, (formats.example_input(deployment),))
            formats.write_executorch(program, path, metadata)
