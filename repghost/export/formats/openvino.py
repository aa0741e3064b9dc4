"""OpenVINO: Intel's processors, graphics and NPUs. Two files, NAME.xml and NAME.bin.

INT8 is NNCF's post-training quantization.
Check: `pytest tests/test_runtimes.py tests/test_quantize.py`.
"""

import os
import sys
from collections.abc import Mapping, Sequence
from functools import cache
from itertools import takewhile
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from repghost.export.deployable import Deployable, Metadata, program_of
from repghost.export.runtimes import ExportedModel, require

_OWN = "repghost"  # where in the file our metadata are
_LAYERS = ("Convolution", "GroupConvolution", "MatMul")
_HIGHEST = 63  # of the levels of a weight: x86 without VNNI adds two products in 16 bits, and 2 * 127 * 255 overflows


def write(
    module: Deployable, path: Path, metadata: Metadata, calibration: Sequence[Tensor] = (), **quantizer: Any
) -> None:
    """Writes `path` and, beside it, the weights.

    quantizer: what NNCF's `quantize` is given instead of the values here.
    """
    openvino, _ = _openvino()
    model = openvino.convert_model(program_of(module))
    model.inputs[0].get_tensor().set_names({"image"})
    model.outputs[0].get_tensor().set_names({module.deployment.output})
    if calibration:
        model = _quantized(model, calibration, **quantizer)
    for key, value in metadata.items():
        model.set_rt_info(str(value), [_OWN, key])
    openvino.save_model(model, path, compress_to_fp16=module.deployment.precision == "float16")


def _quantized(model: Any, calibration: Sequence[Tensor], **quantizer: Any) -> Any:
    """The network in INT8; what is before the network stays in float."""
    import nncf
    from nncf.quantization.advanced_parameters import QuantizationParameters
    from nncf.quantization.range_estimator import RangeEstimatorParametersSet

    before = takewhile(lambda operation: operation.get_type_name() != "Convolution", model.get_ordered_ops())
    names = [op.get_friendly_name() for op in before]
    around = nncf.IgnoredScope(names=names, validate=False)
    weights = {
        op.get_friendly_name(): op.input_value(1).get_node().get_data().copy()
        for op in model.get_ordered_ops()
        if op.get_type_name() in _LAYERS and op.get_friendly_name() not in names
    }
    images = [image for batch in calibration for image in batch.numpy()]
    # NNCF's own choices, ranges that are means over images, biases corrected, and a scale for each channel that a
    # depthwise convolution reads, lose more (benchmarks/int8.py).
    ranges = nncf.AdvancedQuantizationParameters(
        activations_range_estimator_params=RangeEstimatorParametersSet.MINMAX,
        activations_quantization_params=QuantizationParameters(per_channel=False),
        disable_bias_correction=True,
    )
    # Symmetric activations: zero points keep convolutions from the faster kernels, and a network takes a third longer.
    options = {"preset": nncf.QuantizationPreset.PERFORMANCE, "advanced_parameters": ranges, **quantizer}
    quantized = nncf.quantize(
        model,
        nncf.Dataset(images, lambda image: image[None]),
        subset_size=len(images),
        target_device=nncf.TargetDevice.CPU,
        ignored_scope=around,
        **options,
    )
    _scale_every_channel(quantized, weights)
    return quantized


def _scale_every_channel(model: Any, weights: Mapping[str, np.ndarray]) -> None:
    """Rounds `weights`, float32 [out, ...] by the name of their layer, with the scale of each channel.

    NNCF lets no scale be less than a hundredth of the largest. The weights of a channel that BatchNorm found without
    variance are 300 times as large as others, which then had two levels.
    """
    from openvino import opset13

    for layer in model.get_ordered_ops():
        name = layer.get_friendly_name()
        if name not in weights or (product := layer.input_value(1).get_node()).get_type_name() != "Multiply":
            continue  # gates of squeeze-and-excitation stay in float
        exact, levels = weights[name], product.input_value(0).get_node()
        scales = np.abs(exact).max(tuple(range(1, exact.ndim)), keepdims=True) / _HIGHEST
        scales = np.maximum(scales, np.finfo(np.float32).tiny)
        rounded = np.rint(exact / scales).astype(np.int8)
        levels.input(0).replace_source_output(opset13.constant(rounded).output(0))
        product.input(1).replace_source_output(opset13.constant(scales).output(0))


@cache
def _openvino() -> tuple[ModuleType, Any]:
    """The package and its runtime, without AMX and usage statistics unless the process has them already.

    One runtime for the whole life of the process: each one, when its part for the CPU is loaded, brings a stack for
    signal handlers, and leaves the one of its predecessor when it goes. If that went before, the next signal, even the
    end of a child process, would be a segmentation fault.
    """
    # Its INT8 crashes on some processors with AMX (https://github.com/openvinotoolkit/openvino/issues/37577). Read when
    # the first network is compiled.
    os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_VNNI")
    # The package and NNCF would report each import and conversion, which forks this process from six threads.
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]  # as if it were not installed
    package = require("openvino")
    core = package.Core()
    core.get_property("CPU", "FULL_DEVICE_NAME")
    return package, core


def open_model(path: Path) -> ExportedModel:
    """The file in OpenVINO, on the CPU; what is not in INT8 is computed in float32.

    OpenVINO's default is bfloat16 on processors that have it, and fails where its kernels are kept from using that.
    """
    _, core = _openvino()
    model = core.read_model(path)
    metadata = model.get_rt_info([_OWN]).value if model.has_rt_info([_OWN]) else {}
    settings = {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "INFERENCE_PRECISION_HINT": "f32"}
    compiled = core.compile_model(model, "CPU", settings)

    def call(images: Tensor) -> Tensor:
        return torch.from_numpy(compiled(images.numpy())[0].copy())

    return ExportedModel(call, metadata)
