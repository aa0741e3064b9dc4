"""TensorRT: an engine for the GPU that it is built on, from the ONNX file of the same network.

Networks are strongly typed: the precision is that of the ONNX file, float32, float16 or INT8. An engine says nothing of
itself; NAME.json beside it does. Check: `pytest tests/test_runtimes.py`, on a machine with a GPU.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from repghost.errors import UserError
from repghost.export.deployable import Deployable, Metadata, example_input
from repghost.export.formats import onnx
from repghost.export.runtimes import ExportedModel, require

LARGEST_BATCH = 256  # of an engine that takes any; its kernels are chosen for the middle of that


def write(module: Deployable, path: Path, metadata: Metadata, calibration: Sequence[Tensor] = ()) -> None:
    """Writes the engine and its metadata. Raises UserError where TensorRT cannot build it."""
    import tensorrt
    from onnxruntime.quantization import QuantType

    source, signed = path.with_suffix(".onnx"), QuantType.QInt8
    explicit = {"ActivationSymmetric": True, "QuantizeBias": False}  # no zero points, biases in float
    onnx.write(
        module, source, metadata, calibration,
        activation_type=signed, weight_type=signed, extra_options=explicit,
    )  # fmt: skip
    logger = tensorrt.Logger(tensorrt.Logger.ERROR)
    builder = tensorrt.Builder(logger)
    network = builder.create_network()
    parser = tensorrt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(source)):
        raise UserError(f"TensorRT cannot read the network: {parser.get_error(0).desc()}")
    source.unlink()
    config = builder.create_builder_config()
    if module.deployment.batch is None:
        profile, image = builder.create_optimization_profile(), example_input(module.deployment).shape[1:]
        profile.set_shape("image", *((batch, *image) for batch in (1, LARGEST_BATCH // 8, LARGEST_BATCH)))
        config.add_optimization_profile(profile)
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        raise UserError("TensorRT could not build the engine; its own messages are above")
    path.write_bytes(engine)
    path.with_suffix(".json").write_text(json.dumps(dict(metadata)))


def open_model(path: Path) -> ExportedModel:
    """The engine on the current GPU; images may come from the CPU, and logits go back there."""
    tensorrt = require("tensorrt")
    engine = tensorrt.Runtime(tensorrt.Logger(tensorrt.Logger.ERROR)).deserialize_cuda_engine(path.read_bytes())
    if engine is None:
        raise UserError(f"{path}: built for another GPU or version of TensorRT; export it again on this machine")
    context = engine.create_execution_context()
    output = next(name for name in map(engine.get_tensor_name, range(engine.num_io_tensors)) if name != "image")

    def call(images: Tensor) -> Tensor:
        images = images.cuda().contiguous()
        context.set_input_shape("image", tuple(images.shape))
        logits = torch.empty(tuple(context.get_tensor_shape(output)), device=images.device)
        context.set_tensor_address("image", images.data_ptr())
        context.set_tensor_address(output, logits.data_ptr())
        stream: Any = torch.cuda.current_stream()
        context.execute_async_v3(stream.cuda_stream)
        return logits.cpu()

    sidecar = path.with_suffix(".json")
    return ExportedModel(call, json.loads(sidecar.read_text()) if sidecar.is_file() else {})
