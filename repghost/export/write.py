"""One export from network to file: converted, run by its own runtime, compared, and only then put in its place.

Check: `pytest tests/test_export.py tests/test_runtimes.py tests/test_quantize.py`.
"""

import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any, TextIO

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from repghost.errors import UserError
from repghost.export.check import compare, inputs_of
from repghost.export.deployable import Deployable, Deployment, metadata_of
from repghost.export.equalization import equalize
from repghost.export.int8 import report
from repghost.export.options import FORMATS, Options
from repghost.export.photographs import Photograph, read_photographs, sample_photographs
from repghost.export.runtimes import ExportedModel, is_exported, open_as, quiet, require
from repghost.files import TEMPORARY
from repghost.images import Preprocessing
from repghost.machine import limit_threads
from repghost.model import RepGhostNet
from repghost.networks import Network, open_network
from repghost.reparameterization import reparameterize
from repghost.weights import load_model, save_weights

# In INT8; of OpenVINO 2026.1 to 2026.4 (https://github.com/openvinotoolkit/openvino/issues/37577).
SMALLEST_OPENVINO = 96
CHECKED = 16  # images that an export is compared on
SCORED = 1000  # at most, images that the accuracy of INT8 is measured on


def export(options: Options) -> Path:
    """Writes the export, prints how it was checked and returns its path.

    Raises UserError for options that do not go together, and for an export that differs from torch; nothing is then
    written.
    """
    form = FORMATS[options.format]
    for package in (*form.packages, *form.int8_packages * options.int8):
        require(package)
    if is_exported(options.weights):
        raise UserError(f"{options.weights}: exported already; give the weights or the run that it came from")
    limit_threads()
    network = open_network(options)
    assert isinstance(network.model, RepGhostNet)
    deployment = _deployment(options, network.preprocessing)
    if options.format == "openvino" and options.int8 and deployment.preprocessing.image_size < SMALLEST_OPENVINO:
        raise UserError(
            f"image_size={deployment.preprocessing.image_size}: OpenVINO's INT8 of images under {SMALLEST_OPENVINO} "
            "pixels crashes on processors with AMX; take format=onnx, or larger images"
        )
    out = _out(options, deployment, network.model.width)
    model = reparameterize(network.model).to(memory_format=torch.contiguous_format)  # a run's is in channels_last
    network = network._replace(model=model)
    checked = _photographs(options, CHECKED) if options.format != "coreml" and not options.int8 else []
    out.parent.mkdir(parents=True, exist_ok=True)
    # Beside `out`, so that a rename puts the finished file or folder there, whole or not at all.
    with tempfile.TemporaryDirectory(TEMPORARY, ".", out.parent) as folder:
        written = Path(folder) / out.name
        if options.int8:
            print(_write_int8(options, network, deployment, written, out))
        else:
            _say(f"converting the network to {options.format}")
            with quiet():
                _write(options, network, deployment, written)
            if options.format == "coreml":
                print("not run: Core ML runs on macOS only")
            else:
                _say("comparing with torch")
                found = compare(model, _open(options, written), _images(checked), deployment)
                print(f"{found}; checked on {len(checked)} {'images' if options.check else 'crops of photographs'}")
        if written.is_dir():
            shutil.rmtree(out, ignore_errors=True)
        for ending in form.beside:
            written.with_suffix(ending).replace(out.with_suffix(ending))
        written.replace(out)
    return out


def _write_int8(options: Options, network: Network, deployment: Deployment, path: Path, out: Path) -> str:
    """Writes the INT8 form of the fused network, after its float32 form, and returns the report about both."""
    assert options.calibration is not None and isinstance(network.model, RepGhostNet)
    _say(f"reading images of {options.calibration}")
    calibration = _images(read_photographs(options.calibration, options.calibration_images))
    scored = read_photographs(options.check or options.calibration, SCORED)
    exact = path.with_name(f"float32{path.suffix}")
    _say(f"converting the network to {options.format}, in float32 and in INT8 calibrated on {len(calibration)} images")
    float32 = replace(deployment, precision="float32")
    normalized = inputs_of(calibration, Deployment(deployment.preprocessing))
    with quiet() as terminal:
        _write(options, network, float32, exact)
        equalized = equalize(network.model, Progress(normalized, "ranges of channels", terminal))
        inputs = Progress(inputs_of(calibration, deployment), "calibrating", terminal)
        _write(options, network._replace(model=equalized), deployment, path, inputs)
    _say("comparing with float32, and every layer alone")
    paths = {"float32": exact, "int8": path}
    models = {form: _open(options, file) for form, file in paths.items()}
    sizes = {form: _size(options, file) for form, file in paths.items()}
    classes = network.description.classes or ()
    return report(network.model, models, sizes, scored, classes, deployment, out)


class Progress(list[Tensor]):
    """Batches, with a bar on `terminal` whenever they are read from the first to the last.

    For quantizers, whose own messages go into nothing.
    """

    def __init__(self, batches: Sequence[Tensor], title: str, terminal: TextIO) -> None:
        super().__init__(batches)
        self._title, self._terminal = title, terminal

    def __iter__(self) -> Iterator[Tensor]:
        return iter(tqdm(super().__iter__(), self._title, len(self), file=self._terminal, disable=None, leave=False))


def _photographs(options: Options, count: int) -> list[Photograph]:
    if options.check is None:
        return sample_photographs(count)
    _say(f"reading images of {options.check}")
    return read_photographs(options.check, count)


def _images(photographs: Sequence[Photograph]) -> list[Image.Image]:
    return [photograph.image for photograph in photographs]


def _say(step: str) -> None:
    """Shows what takes its time now."""
    print(f"{step} ...", flush=True)


def _open(options: Options, path: Path) -> ExportedModel:
    """A file that was written in its own runtime; of safetensors, a network with its weights."""
    return ExportedModel(load_model(path)) if options.format == "safetensors" else open_as(options.format, path)


def _size(options: Options, path: Path) -> int:
    """In bytes, of all files."""
    return sum(file.stat().st_size for file in (path, *map(path.with_suffix, FORMATS[options.format].beside)))


def _deployment(options: Options, preprocessing: Preprocessing) -> Deployment:
    batch = FORMATS[options.format].batch if options.batch is None else options.batch
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
    options: Options, network: Network, deployment: Deployment, path: Path, calibration: Sequence[Tensor] = ()
) -> None:
    """Writes the fused network to `path`; in INT8, the scales are those of `calibration`."""
    assert isinstance(network.model, RepGhostNet)
    if options.format == "safetensors":
        save_weights(network.model, path, network.description)
        return
    # Core ML converts to float16 itself.
    precision = "float32" if options.format == "coreml" else deployment.precision
    module = Deployable.of(network.model, replace(deployment, precision=precision))
    more: dict[str, Any] = {"opset": options.opset} if options.format == "onnx" else {}
    if deployment.precision == "int8":
        more["calibration"] = calibration
    metadata = metadata_of(network.model, deployment, network.description)
    import_module(f"repghost.export.formats.{options.format}").write(module, path, metadata, **more)
