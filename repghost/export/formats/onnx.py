"""ONNX, run by onnxruntime: for servers, computers and most other runtimes.

INT8 is onnxruntime's static quantization, with a QuantizeLinear and a DequantizeLinear around every tensor (QDQ).
Check: `pytest tests/test_export.py tests/test_quantize.py`.
"""

from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from repghost.errors import UserError
from repghost.export.deployable import Deployable, Metadata, example_input, program_of
from repghost.export.options import OLDEST_OPSET
from repghost.export.runtimes import ExportedModel, require


def write(
    module: Deployable,
    path: Path,
    metadata: Metadata,
    calibration: Sequence[Tensor] = (),
    opset: int = OLDEST_OPSET,
    **quantizer: Any,
) -> None:
    """Writes ONNX with the weights inside. Raises UserError for an impossible opset.

    quantizer: what onnxruntime's `quantize_static` is given instead of the values here, and `exclude`: a part of the
    names of modules that stay in float.
    """
    from onnx import defs
    from onnxscript import opset18

    def mean(x: Any, dim: Any, keepdim: bool = False, dtype: Any = None) -> Any:
        assert sorted(axis % 4 for axis in dim) == [2, 3] and keepdim, "the network has no other mean"
        return opset18.GlobalAveragePool(x)

    newest = defs.onnx_opset_version()
    if not OLDEST_OPSET <= opset <= newest:
        raise UserError(f"opset={opset}: torch's exporter and onnx {version('onnx')} write {OLDEST_OPSET} to {newest}")
    program = torch.onnx.export(
        program_of(module),
        (example_input(module.deployment),),
        dynamo=True,
        opset_version=opset,
        input_names=["image"],
        output_names=[module.deployment.output],
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
    if calibration:
        _quantize(path, calibration, **quantizer)


def _quantize(path: Path, inputs: Sequence[Tensor], exclude: str | None = None, **quantizer: Any) -> None:
    """Replaces the ONNX file by its INT8 form (QDQ), calibrated on `inputs`, one call of the file each."""
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    class Reader(CalibrationDataReader):
        rest = iter(inputs)

        def get_next(self) -> dict[str, Any] | None:
            return next(({"image": x.numpy()} for x in self.rest), None)

    def stays(node: onnx.NodeProto) -> bool:
        """By the modules that it comes from, as torch's exporter writes them: "['', 'network', ...]"."""
        scopes = "".join(p.value for p in node.metadata_props if p.key == "pkg.torch.onnx.name_scopes")
        return "'network'" not in scopes or (exclude is not None and exclude in scopes)

    exact = path.rename(path.with_suffix(".float32.onnx"))
    others = [node.name for node in onnx.load(exact).graph.node if stays(node)]
    # Unsigned: with signed activations onnxruntime leaves half of the convolutions in float on x86, and unsigned
    # activations with signed weights overflow on processors without VNNI.
    kinds = {"activation_type": QuantType.QUInt8, "weight_type": QuantType.QUInt8, "quant_format": QuantFormat.QDQ}
    quantize_static(exact, path, Reader(), per_channel=True, nodes_to_exclude=others, **kinds | quantizer)
    exact.unlink()


def open_model(path: Path) -> ExportedModel:
    """The file in onnxruntime, on the CPU."""
    session = require("onnxruntime").InferenceSession(str(path), providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name

    def call(images: Tensor) -> Tensor:
        return torch.from_numpy(session.run(None, {name: images.numpy()})[0])

    return ExportedModel(call, session.get_modelmeta().custom_metadata_map)
