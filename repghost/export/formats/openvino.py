"""OpenVINO: Intel's processors, graphics and NPUs. Two files, NAME.xml and NAME.bin.

INT8 is NNCF's post-training quantization.
Check: `pytest tests/test_runtimes.py tests/test_quantize.py`.
"""

import os
import sys
from collections.abc import Sequence
from functools import cache
from itertools import takewhile
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from repghost.export.deployable import Deployable, Deployment, Metadata, program_of
from repghost.export.runtimes import ExportedModel, require

_OWN = "repghost"  # where in the file our metadata are


def write(
    module: Deployable,
    deployment: Deployment,
    path: Path,
    metadata: Metadata,
    calibration: Sequence[Tensor] = (),
    **quantizer: Any,
) -> None:
    """Writes `path` and, beside it, the weights.

    quantizer: what NNCF's `quantize` is given instead of the values here.
    """
    openvino, _ = _openvino()
    model = openvino.convert_model(program_of(module, deployment))
    model.inputs[0].get_tensor().set_names({"image"})
    model.outputs[0].get_tensor().set_names({deployment.output})
    if calibration:
        model = _quantized(model, calibration, **quantizer)
    for key, value in metadata.items():
        model.set_rt_info(str(value), [_OWN, key])
    openvino.save_model(model, path, compress_to_fp16=deployment.precision == "float16")


def _quantized(model: Any, calibration: Sequence[Tensor], **quantizer: Any) -> Any:
    """The network in INT8; what is before the network stays in float."""
    import nncf
    from nncf.quantization.range_estimator import RangeEstimatorParametersSet

    operations = takewhile(lambda operation: operation.get_type_name() != "Convolution", model.get_ordered_ops())
    around = nncf.IgnoredScope(names=[op.get_friendly_name() for op in operations], validate=False)
    images = [image for batch in calibration for image in batch.numpy()]
    # NNCF's own choices, ranges that are means over images, and biases corrected, lose more (benchmarks/int8.py).
    ranges = nncf.AdvancedQuantizationParameters(
        activations_range_estimator_params=RangeEstimatorParametersSet.MINMAX, disable_bias_correction=True
    )
    # Symmetric activations: zero points keep convolutions from the faster kernels, and a network takes a third longer.
    options = {"preset": nncf.QuantizationPreset.PERFORMANCE, "advanced_parameters": ranges, **quantizer}
    return nncf.quantize(
        model,
        nncf.Dataset(images, lambda image: image[None]),
        subset_size=len(images),
        target_device=nncf.TargetDevice.CPU,
        ignored_scope=around,
        **options,
    )


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
    """The file in OpenVINO, on the CPU: a network of float32 in float32, where its default may be bfloat16."""
    _, core = _openvino()
    model = core.read_model(path)
    metadata = model.get_rt_info([_OWN]).value if model.has_rt_info([_OWN]) else {}
    settings: dict[str, Any] = {"INFERENCE_NUM_THREADS": torch.get_num_threads()}
    if metadata.get("precision") != "int8":
        settings["INFERENCE_PRECISION_HINT"] = "f32"
    compiled = core.compile_model(model, "CPU", settings)

    def call(images: Tensor) -> Tensor:
        return torch.from_numpy(compiled(images.numpy())[0].copy())

    return ExportedModel(call, metadata)
