"""The module that is deployed, and the formats that it is written in.

What is deployed is always the fused network. `Deployable` puts around it what was asked for: the preprocessing of
photographs, float16, a softmax. Its interface is the same in every format and precision: `image` in, float32 [N,
num_classes] out, `logits` or `probabilities`. Check: `pytest tests/test_export.py`.
"""

import copy
import io
import os
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from repghost.errors import UserError
from repghost.export.preprocess import Preprocess
from repghost.model import RepGhostNet

OLDEST_OPSET = 18  # the oldest that torch's exporter writes, and the first whose Resize is antialiased
COREML_BATCH = 64  # the largest batch of a Core ML package that takes any; it needs a bound


@dataclass(frozen=True)
class Deployment:
    """What an exported file takes and gives.

    image_size: the side of what the network sees, in pixels. batch: how many images a call takes, None for any number.
    preprocess: photographs go in, uint8 [N, H, W, 3] in RGB; otherwise float32 [N, 3, image_size, image_size],
    normalized. input_size: (H, W) of the photographs, None for any. crop_fraction: of evaluation; the shorter side is
    resized to floor(image_size / crop_fraction). softmax: probabilities instead of logits. float16: weights and
    activations of the network, between float32 inputs and outputs.
    """

    image_size: int = 224
    batch: int | None = 1
    preprocess: bool = False
    input_size: tuple[int, int] | None = None
    crop_fraction: float = 0.875
    softmax: bool = False
    float16: bool = False

    @property
    def output(self) -> str:
        return "probabilities" if self.softmax else "logits"


class _Pointwise(nn.Linear):
    """A 1x1 convolution of maps of one pixel as the matrix product that it is, which runtimes are faster at."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__(conv.in_channels, conv.out_channels, device="meta")
        self.weight = nn.Parameter(conv.weight.flatten(1))
        self.bias = conv.bias  # type: ignore[assignment]  # the head has one

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.flatten(1))[:, :, None, None]


class Deployable(nn.Module):
    """The fused `model` with what `deployment` puts around it: `image` to float32 [N, num_classes]."""

    def __init__(self, model: RepGhostNet, deployment: Deployment) -> None:
        super().__init__()
        assert model.fused
        self.preprocess: Preprocess | None = None
        if deployment.preprocess:
            shorter = int(deployment.image_size / deployment.crop_fraction)
            self.preprocess = Preprocess(deployment.image_size, shorter, deployment.input_size)
        self.network = copy.deepcopy(model)
        self.network.add_module("conv_head", _Pointwise(self.network.conv_head))
        if deployment.float16:
            self.network.half()
        self._float16, self._softmax = deployment.float16, deployment.softmax
        self.eval().requires_grad_(False)

    def forward(self, image: Tensor) -> Tensor:
        x = image if self.preprocess is None else self.preprocess(image)
        x = self.network(x.half()).float() if self._float16 else self.network(x)
        return x.softmax(1) if self._softmax else x


def example_input(deployment: Deployment) -> Tensor:
    """An input for tracing. A batch of any size is traced with 2 images: a size of 1 would be taken for a constant."""
    batch = deployment.batch or 2
    if not deployment.preprocess:
        return torch.zeros(batch, 3, deployment.image_size, deployment.image_size)
    height, width = deployment.input_size or (deployment.image_size + 37, deployment.image_size + 91)
    return torch.zeros(batch, height, width, 3, dtype=torch.uint8)


def write_onnx(module: Deployable, deployment: Deployment, path: Path, opset: int, facts: dict[str, Any]) -> None:
    """Writes ONNX with the weights inside; `facts` become its metadata. Raises UserError for an impossible opset."""
    from onnx import defs
    from onnxscript import opset18

    def mean(x: Any, dim: Any, keepdim: bool = False, dtype: Any = None) -> Any:
        assert sorted(axis % 4 for axis in dim) == [2, 3] and keepdim, "the network has no other mean"
        return opset18.GlobalAveragePool(x)

    if not OLDEST_OPSET <= opset <= defs.onnx_opset_version():
        raise UserError(
            f"opset={opset}: torch's exporter and onnx {version('onnx')} write {OLDEST_OPSET} to "
            f"{defs.onnx_opset_version()}"
        )
    free: dict[int, Any] = {} if deployment.batch else {0: Dim("batch", min=1, max=2**16)}
    if deployment.preprocess and not deployment.input_size:
        free |= {1: Dim("height", min=1, max=2**16), 2: Dim("width", min=1, max=2**16)}
    example = example_input(deployment)
    program = torch.onnx.export(
        torch.export.export(module, (example,), dynamic_shapes=(free,)),
        (example,),
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
    for key, value in facts.items():
        model.metadata_props.add(key=key, value=str(value))
    path.write_bytes(model.SerializeToString())


def write_executorch(program: ExportedProgram, path: Path, facts: dict[str, Any]) -> None:
    """Writes an ExecuTorch program for XNNPACK, the CPUs of phones and computers; `facts` become constant methods.

    In float16 it computes with halves, but XNNPACK keeps the weights in float32: the file does not shrink.
    """
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower

    lowered = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()], constant_methods=facts)
    path.write_bytes(lowered.to_executorch().buffer)


def write_torchscript(module: Deployable, deployment: Deployment, path: Path) -> None:
    """Writes a traced and frozen TorchScript module, for runtimes that still take one."""
    torch.jit.freeze(torch.jit.trace(module, example_input(deployment))).save(str(path))


def write_coreml(model: RepGhostNet, deployment: Deployment, path: Path) -> None:
    """Writes a Core ML package (an ML program, for iOS 15 or macOS 12 and newer). Raises UserError where it cannot.

    Core ML has no uint8 tensors: photographs go in as float32 with the same values. float16 is its own conversion.
    """
    import coremltools

    module, example = Deployable(model, replace(deployment, float16=False)), example_input(deployment).float()
    shape = example.shape if deployment.batch else (coremltools.RangeDim(1, COREML_BATCH), *example.shape[1:])
    precision = coremltools.precision.FLOAT16 if deployment.float16 else coremltools.precision.FLOAT32
    try:
        coremltools.convert(
            torch.jit.trace(module, example),
            convert_to="mlprogram",
            inputs=[coremltools.TensorType("image", shape)],
            outputs=[coremltools.TensorType(deployment.output)],
            compute_precision=precision,
        ).save(str(path))
    except Exception as error:  # its versions lag behind torch's, and what then fails is of any kind
        first = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(
            f"coremltools {version('coremltools')} cannot convert this with torch {version('torch')}: {first}"
        ) from error


def coreml_operations(path: Path) -> set[str]:
    """The kinds of operations in a Core ML package."""
    import coremltools

    program = coremltools.models.MLModel(str(path), skip_model_load=True).get_spec().mlProgram
    blocks = [block for function in program.functions.values() for block in function.block_specializations.values()]
    return {operation.type for block in blocks for operation in block.operations}


@contextmanager
def quiet() -> Iterator[None]:
    """Keeps back what exporters and runtimes print, from C++ too; an error of theirs prints it after all."""
    with tempfile.TemporaryFile() as kept, io.TextIOWrapper(io.BytesIO()) as printed:
        sys.stderr.flush()
        stderr = os.dup(2)
        os.dup2(kept.fileno(), 2)
        failed = True
        try:
            with warnings.catch_warnings(), redirect_stdout(printed), redirect_stderr(printed):
                warnings.simplefilter("ignore")
                yield
            failed = False
        except UserError:
            failed = False
            raise
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)
            if failed:
                kept.seek(0)
                sys.stderr.write(kept.read().decode(errors="replace"))
