"""The module that is deployed, and the formats that it is written in.

What is deployed is always the fused network. `Deployable` puts around it what was asked for: the preprocessing of
photographs, float16, a softmax. Its interface is the same in every format and precision: `image` in, float32 [N,
num_classes] out, `logits` or `probabilities`. Check: `pytest tests/test_export.py`.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.nn import functional as F

from repghost.errors import UserError
from repghost.export.preprocess import Preprocess
from repghost.export.runtimes import first_line
from repghost.images import Preprocessing
from repghost.model import RepGhostNet

OLDEST_OPSET = 18  # the oldest that torch's exporter writes, and the first whose Resize is antialiased
COREML_BATCH = 64  # the largest batch of a Core ML package that takes any; it needs a bound
Metadata = Mapping[str, float | str]


@dataclass(frozen=True)
class Deployment:
    """What an exported file takes and gives.

    preprocessing: of the images that the network sees. batch: how many images a call takes, None for any number.
    preprocess: the file takes photographs, uint8 [N, H, W, 3] in RGB, and preprocesses them; otherwise it takes
    float32 [N, 3, image_size, image_size], normalized. input_size: (H, W) of the photographs, None for any. softmax:
    probabilities instead of logits. precision: of the network's weights and activations, between float32 inputs and
    outputs.
    """

    preprocessing: Preprocessing
    batch: int | None = 1
    preprocess: bool = False
    input_size: tuple[int, int] | None = None
    softmax: bool = False
    precision: Literal["float32", "float16", "int8"] = "float32"

    @property
    def output(self) -> str:
        return "probabilities" if self.softmax else "logits"


class _Pointwise(nn.Module):
    """A 1x1 convolution of maps of one pixel as a matrix product, which runtimes compute faster."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(conv.weight.flatten(1)), conv.bias

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.flatten(1), self.weight, self.bias)[:, :, None, None]


class Deployable(nn.Module):
    """`network` with what `deployment` puts around it: `image` to float32 [N, num_classes]."""

    def __init__(self, network: nn.Module, deployment: Deployment) -> None:
        super().__init__()
        self.preprocess: Preprocess | None = None
        if deployment.preprocess:
            self.preprocess = Preprocess(deployment.preprocessing, deployment.input_size)
        self.network = network
        self._float16, self._softmax = deployment.precision == "float16", deployment.softmax

    @classmethod
    def of(cls, model: RepGhostNet, deployment: Deployment) -> "Deployable":
        """With a copy of the fused `model`, in float16 where the deployment says so."""
        assert model.fused
        network = copy.deepcopy(model).requires_grad_(False)
        network.add_module("conv_head", _Pointwise(network.conv_head))
        return cls(network.half() if deployment.precision == "float16" else network, deployment).eval()

    def forward(self, image: Tensor) -> Tensor:
        x = image if self.preprocess is None else self.preprocess(image)
        x = self.network(x.half()).float() if self._float16 else self.network(x)
        return x.softmax(1) if self._softmax else x


def example_input(deployment: Deployment) -> Tensor:
    """An input for tracing. A batch of any size is traced with 2 images: a size of 1 would be taken for a constant."""
    batch, size = deployment.batch or 2, deployment.preprocessing.image_size
    if not deployment.preprocess:
        return torch.zeros(batch, 3, size, size)
    height, width = deployment.input_size or (size + 37, size + 91)
    return torch.zeros(batch, height, width, 3, dtype=torch.uint8)


def metadata_of(model: RepGhostNet, deployment: Deployment) -> Metadata:
    """What a file says of itself; `repghost.export.runtimes.open_exported` reads it."""
    images = deployment.preprocessing
    return {
        "width": float(model.width),
        "num_classes": model.classifier.out_features,
        "image_size": images.image_size,
        "crop_fraction": float(images.crop_fraction),
        "mean": " ".join(map(str, images.mean)),
        "std": " ".join(map(str, images.std)),
        "batch": deployment.batch or 0,
        "preprocess": int(deployment.preprocess),
        "softmax": int(deployment.softmax),
        "precision": deployment.precision,
    }


def write_onnx(module: Deployable, deployment: Deployment, path: Path, opset: int, metadata: Metadata) -> None:
    """Writes ONNX with the weights inside. Raises UserError for an impossible opset."""
    from onnx import defs
    from onnxscript import opset18

    def mean(x: Any, dim: Any, keepdim: bool = False, dtype: Any = None) -> Any:
        assert sorted(axis % 4 for axis in dim) == [2, 3] and keepdim, "the network has no other mean"
        return opset18.GlobalAveragePool(x)

    newest = defs.onnx_opset_version()
    if not OLDEST_OPSET <= opset <= newest:
        raise UserError(f"opset={opset}: torch's exporter and onnx {version('onnx')} write {OLDEST_OPSET} to {newest}")
    free: dict[int, Any] = {} if deployment.batch else {0: Dim("batch", min=1, max=2**16)}
    if deployment.preprocess and not deployment.input_size:
        free |= {1: Dim("height", min=1, max=2**16), 2: Dim("width", min=1, max=2**16)}
    example = (example_input(deployment),)
    program = torch.onnx.export(
        torch.export.export(module, example, dynamic_shapes=(free,)),
        example,
        dynamo=True,
        verbose=False,
        opset_version=opset,
        input_names=["image"],
        output_names=[deployment.output],
        dynamic_shapes=(free,),
        # onnxruntime keeps the convolutions' blocked layout through this one, and not through the usual ReduceMean.
        custom_translation_table={torch.ops.aten.mean.dim: mean},
    )
    assert program is not None
    model = program.model_proto
    written = next(entry.version for entry in model.opset_import if not entry.domain)
    if written != opset:  # the exporter says so on stderr only
        raise UserError(f"opset={opset}: this network cannot be converted to it, only to {written}")
    for key, value in metadata.items():
        model.metadata_props.add(key=key, value=str(value))
    path.write_bytes(model.SerializeToString())


def write_executorch(program: ExportedProgram, path: Path, metadata: Metadata) -> None:
    """Writes an ExecuTorch program for XNNPACK, the CPUs of phones and computers; `metadata` become constant methods.

    In float16 it computes with halves, but XNNPACK keeps the weights in float32: the file does not shrink.
    """
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower

    lowered = to_edge_transform_and_lower(
        program, partitioner=[XnnpackPartitioner()], constant_methods=dict(metadata) or None
    )
    path.write_bytes(lowered.to_executorch().buffer)


def write_torchscript(module: Deployable, deployment: Deployment, path: Path) -> None:
    """Writes a traced and frozen TorchScript module, for runtimes that still take one."""
    torch.jit.freeze(torch.jit.trace(module, example_input(deployment))).save(str(path))


def write_coreml(model: RepGhostNet, deployment: Deployment, path: Path) -> None:
    """Writes a Core ML package (an ML program, for iOS 15 or macOS 12 and newer). Raises UserError where it cannot.

    Core ML has no uint8 tensors: photographs go in as float32 with the same values. float16 is its own conversion.
    """
    import coremltools

    module = Deployable.of(model, replace(deployment, precision="float32"))
    example = example_input(deployment).float()
    shape = example.shape if deployment.batch else (coremltools.RangeDim(1, COREML_BATCH), *example.shape[1:])
    try:
        coremltools.convert(
            torch.jit.trace(module, example),
            convert_to="mlprogram",
            inputs=[coremltools.TensorType("image", shape)],
            outputs=[coremltools.TensorType(deployment.output)],
            compute_precision=coremltools.precision[deployment.precision.upper()],
        ).save(str(path))
    except Exception as error:  # its versions lag behind torch's, and what then fails is of any kind
        tools = f"coremltools {version('coremltools')}"
        raise UserError(f"{tools} cannot convert this with torch {version('torch')}: {first_line(error)}") from error


def coreml_operations(path: Path) -> set[str]:
    """The kinds of operations in a Core ML package."""
    import coremltools

    program = coremltools.models.MLModel(str(path), skip_model_load=True).get_spec().mlProgram
    blocks = [block for function in program.functions.values() for block in function.block_specializations.values()]
    return {operation.type for block in blocks for operation in block.operations}
