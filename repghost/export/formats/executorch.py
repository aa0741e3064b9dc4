"""ExecuTorch for XNNPACK: the CPUs of phones and computers.

INT8 is torchao's pt2e with XNNPACK's own quantizer: what it leaves in float is what XNNPACK has no kernels for.
Check: `pytest tests/test_export.py tests/test_quantize.py`.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.export import ExportedProgram

from repghost.description import KEY
from repghost.export.deployable import Deployable, Metadata, program_of
from repghost.export.runtimes import METADATA, ExportedModel, quiet, require


def write(module: Deployable, path: Path, metadata: Metadata, calibration: Sequence[Tensor] = ()) -> None:
    """Writes a program for XNNPACK; `metadata` become constant methods.

    In float16 it computes with halves, but XNNPACK keeps the weights in float32: the file does not shrink.
    """
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower

    program = _quantized(module, calibration) if calibration else program_of(module)
    partitioner, methods = [XnnpackPartitioner()], dict(metadata) or None
    lowered = to_edge_transform_and_lower(program, partitioner=partitioner, constant_methods=methods)
    path.write_bytes(lowered.to_executorch().buffer)


@torch.no_grad()
def _quantized(module: Deployable, inputs: Sequence[Tensor]) -> ExportedProgram:
    """`module` as an exported program with the network in INT8 for XNNPACK, calibrated on `inputs` of `module`."""
    from executorch.backends.xnnpack.quantizer import xnnpack_quantizer as xnnpack
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    symmetric = xnnpack.get_symmetric_quantization_config(is_per_channel=True)
    quantizer = xnnpack.XNNPACKQuantizer().set_global(symmetric)
    images = [x if module.preprocess is None else module.preprocess(x) for x in inputs]
    program = torch.export.export(module.network, (images[0],))
    prepared = prepare_pt2e(program.module(check_guards=False), quantizer)
    for batch in images:
        prepared(batch)
    return torch.export.export(Deployable(convert_pt2e(prepared), module.deployment), (inputs[0],))


def open_model(path: Path) -> ExportedModel:
    """The program in ExecuTorch's own runtime."""
    runtime = require("executorch.runtime")
    with quiet():
        program = runtime.Runtime.get().load_program(str(path))
        method = program.load_method("forward")
        names = {*METADATA, KEY} & program.method_names
        metadata = {name: program.load_method(name).execute([])[0] for name in names}

    def call(images: Tensor) -> Tensor:
        with quiet():
            return method.execute([images])[0].clone()  # the next call writes to the same memory

    return ExportedModel(call, metadata)
