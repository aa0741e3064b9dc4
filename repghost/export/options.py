"""Exports what was trained, or published weights, for deployment: always the fused network.

    python -m repghost.export run=outputs/NAME format=onnx [selection=best_ema] [out=FILE]
    python -m repghost.export weights=FILE format=safetensors
    python -m repghost.export weights=timm width=1.0 format=executorch
    python -m repghost.export run=outputs/NAME format=openvino int8=true calibration=TRAIN.tar check=VAL.tar

A run of a detector (task=detection) is exported to ONNX: one image in, boxes after non-maximum suppression out.

Formats: onnx, openvino (x86), executorch (XNNPACK, phones), litert (Android), ncnn (phones), tensorrt (NVIDIA's GPUs),
coreml (iOS), torchscript, safetensors (the fused weights), hub (a folder for the Hugging Face hub). Every export is run
by its own runtime on photographs and compared with torch before it appears at `out`; one that differs by too much is an
error (see `repghost.export.check`). INT8 (onnx, openvino, executorch, tensorrt) takes its scales from images of
`calibration` and prints what it costs on those of `check`: size, accuracy, time, the layers that lose most; where that
is too much, `recipe=qat` trains on with the rounding. A file says of itself which width, classes, image size, crop and
normalization it has. Check: `pytest tests/test_export.py tests/test_runtimes.py tests/test_quantize.py`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from repghost.errors import UserError
from repghost.options import PATH, SWITCH, WHOLE, NetworkOptions, Values, one_of, option, parse

OLDEST_OPSET = 18  # the oldest that torch's exporter writes, and the first whose Resize is antialiased
_HUB = {"run", "selection", "format", "out"}
_WEIGHTS = _HUB | {"weights", "width", "image_size", "crop_fraction", "check"}
_NETWORK = _WEIGHTS | {"batch", "dtype", "softmax", "preprocess"}
_DETECTOR = _HUB | {"opset", "check"}
_ONNX = ("onnx", "onnxscript", "onnxruntime")
_EXECUTORCH = ("executorch.exir", "torchao")
_INT8 = {"int8", "calibration", "calibration_images"}


class Format(NamedTuple):
    """A format: how its files end, which keys it reads, and what has to be installed, in the order of asking.

    beside: endings of further files with the same name. batch: images of a call where batch= is not given, 0 for any
    number; planned: whether it is part of the file, so that no file takes any number.
    """

    ending: str
    keys: set[str]
    packages: tuple[str, ...] = ()
    int8_packages: tuple[str, ...] = ()
    beside: tuple[str, ...] = ()
    batch: int = 0
    planned: bool = False


FORMATS = {
    "onnx": Format(".onnx", _NETWORK | _INT8 | {"opset"}, _ONNX),
    "executorch": Format(".pte", _NETWORK | _INT8 | {"input_size"}, _EXECUTORCH, batch=1, planned=True),
    "openvino": Format(".xml", _NETWORK | _INT8 | {"input_size"}, ("openvino",), ("nncf",), (".bin",)),
    "litert": Format(".tflite", _NETWORK | {"input_size"}, ("litert_torch",), batch=1, planned=True),
    "ncnn": Format(".ncnn.param", _WEIGHTS | {"softmax"}, ("ncnn", "pnnx"), beside=(".bin",), batch=1, planned=True),
    "tensorrt": Format(".engine", _NETWORK | _INT8, (*_ONNX, "tensorrt"), beside=(".json",)),
    "torchscript": Format(".pt", _NETWORK | {"input_size"}),
    "coreml": Format(".mlpackage", _NETWORK | {"input_size"}, ("coremltools",), batch=1),
    "safetensors": Format(".safetensors", _WEIGHTS),
    "hub": Format("", _HUB | {"calibration", "calibration_images"}, _ONNX),
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
    out: Path | None = option("the file or folder, by default in the run's folder, or here", PATH)
    batch: int | None = option("images of a call, by default dynamic, 1 where a format has to know it", BATCH)
    dtype: str = option("of the network's weights and activations", one_of("float32", "float16"), "float32")
    softmax: bool = option("whether probabilities come out instead of logits", SWITCH, False)
    opset: int = option("of ONNX", WHOLE, OLDEST_OPSET)
    preprocess: bool = option("whether the file takes photographs, uint8 [N, H, W, 3]", SWITCH, False)
    input_size: tuple[int, int] | None = option("size of the photographs; ONNX takes any", SIZE)
    int8: bool = option("whether to quantize, with scales from calibration=", SWITCH, False)
    calibration: Path | None = option("folder of images, or a shard, that INT8's scales come from", PATH)
    calibration_images: int = option("how many of them", WHOLE, 128)
    check: Path | None = option("folder or shard of images to check the export on, by default two photographs", PATH)


def read_options(arguments: Sequence[str]) -> Options:
    """The options of a command line. Raises UserError for options that no export has or that do not go together."""
    paths, options = parse(Options, arguments)
    form = options.format
    if paths:
        raise UserError(f"{paths[0]}: options are given as KEY=VALUE; --help lists them")
    if not form:
        raise UserError(f"format is missing: format=FORMAT, one of {', '.join(FORMATS)}")
    if options.of_detector and form != "onnx":
        raise UserError(
            f"format={form}: a detector is exported to onnx; its fused weights are in model_fused.safetensors"
        )
    read = _DETECTOR if options.of_detector else FORMATS[form].keys
    if unread := [key for key in (argument.partition("=")[0] for argument in arguments) if key not in read]:
        raise UserError(f"{unread[0]}: format={form} does not read this key, only {', '.join(sorted(read))}")
    if form == "hub":
        if options.run is None:
            raise UserError("give run=outputs/NAME format=hub: a model card needs a run")
        return options
    options.require_network()
    if options.int8 != (options.calibration is not None):
        raise UserError("int8=true and calibration=FOLDER or SHARD.tar go together: its scales come from images")
    if options.int8 and options.dtype == "float16":
        raise UserError("dtype=float16 and int8=true: give one of them")
    if form not in ("onnx", "safetensors") and options.preprocess != (options.input_size is not None):
        what = f"a {form} file takes photographs of one size"
        raise UserError(f"preprocess=true and input_size=HEIGHTxWIDTH go together: {what}")
    if options.batch == 0 and FORMATS[form].planned:
        raise UserError(f"batch=dynamic: {form} plans its memory in advance; give the number, batch=1")
    if options.out is not None and not options.out.name.endswith(FORMATS[form].ending):
        raise UserError(f"out={options.out}: the name of a {form} file ends in {FORMATS[form].ending}")
    return options
