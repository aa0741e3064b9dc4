"""INT8: post-training static quantization of the fused network, by the quantizer of each format.

Weights have a scale for every output channel, activations one for the tensor, found on calibration images:
onnxruntime's `quantize_static` (QDQ) for ONNX, torchao's pt2e with XNNPACK's quantizer for ExecuTorch. Preprocessing
and softmax stay in float. `layer_losses` says what the quantization of each layer alone does to the logits.
Check: `pytest tests/test_quantize.py`.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from repghost.export.formats import Deployable, Deployment
from repghost.model import RepGhostNet

_LOWEST, _HIGHEST = -128, 127


def sqnr(exact: Tensor, quantized: Tensor) -> float:
    """Signal to quantization noise of [N, C] logits in dB: 20 log10(|exact| / |exact - quantized|), larger is better.

    The mean over N is not part of the signal: what all images share tells no classes apart.
    """
    signal, noise = (exact - exact.mean(0)).norm(), (exact - quantized).norm()
    return float(20 * torch.log10(signal / noise.clamp_min(torch.finfo(noise.dtype).tiny)))


def quantize_onnx(path: Path, inputs: Sequence[Tensor]) -> None:
    """Replaces the ONNX file by its INT8 form (QDQ), calibrated on `inputs`, one call of the file each."""
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self._rest = iter(inputs)

        def get_next(self) -> dict[str, Any] | None:
            return next(({"image": x.numpy()} for x in self._rest), None)

    def in_network(node: onnx.NodeProto) -> bool:
        """By the modules that it comes from, as torch's exporter writes them: "['', 'network', ...]"."""
        return any(p.key == "pkg.torch.onnx.name_scopes" and "'network'" in p.value for p in node.metadata_props)

    exact = path.rename(path.with_suffix(".float32.onnx"))
    quantize_static(
        exact,
        path,
        Reader(),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        activation_type=QuantType.QInt8,
        weight_type=QuantType.QInt8,
        nodes_to_exclude=[node.name for node in onnx.load(exact).graph.node if not in_network(node)],
    )


@torch.no_grad()
def quantize_executorch(module: Deployable, deployment: Deployment, inputs: Sequence[Tensor]) -> ExportedProgram:
    """`module` as an exported program with the network in INT8 for XNNPACK, calibrated on `inputs` of `module`."""
    from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import (
        XNNPACKQuantizer,
        get_symmetric_quantization_config,
    )
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    quantizer = XNNPACKQuantizer().set_global(get_symmetric_quantization_config(is_per_channel=True))
    images = [x if module.preprocess is None else module.preprocess(x) for x in inputs]
    program = torch.export.export(module.network, (images[0],))
    prepared = prepare_pt2e(program.module(check_guards=False), quantizer)
    for batch in images:
        prepared(batch)
    return torch.export.export(Deployable(convert_pt2e(prepared), deployment), (inputs[0],))


@torch.no_grad()
def layer_losses(model: RepGhostNet, images: Tensor) -> list[dict[str, Any]]:
    """What quantizing each convolution and the classifier alone does to the logits of `images`, the worst layer first.

    A layer's weights are rounded to INT8 with a scale for each output channel, its input with one for the tensor, over
    the range that it has on `images`; everything else stays in float32. Rows hold the `layer`, `sqnr_db` (see `sqnr`)
    and `top1_flips`. images: float32 [N, 3, H, W].
    """
    exact, rows = model(images), []
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            weight = layer.weight.data
            layer.weight.data = _rounded_weight(weight)
            hook = layer.register_forward_pre_hook(lambda _, inputs: (_rounded_input(inputs[0]),))
            logits = model(images)
            hook.remove()
            layer.weight.data = weight
            flips = int((logits.argmax(1) != exact.argmax(1)).sum())
            rows.append({"layer": name, "sqnr_db": round(sqnr(exact, logits), 2), "top1_flips": flips})
    return sorted(rows, key=lambda row: row["sqnr_db"])


def _rounded_weight(weight: Tensor) -> Tensor:
    """[out, ...] in symmetric INT8 per output channel, and back."""
    scale = weight.flatten(1).abs().amax(1).clamp_min(torch.finfo(weight.dtype).tiny) / _HIGHEST
    zero = torch.zeros_like(scale, dtype=torch.int32)
    return torch.fake_quantize_per_channel_affine(weight, scale, zero, 0, -_HIGHEST, _HIGHEST)


def _rounded_input(x: Tensor) -> Tensor:
    """Any shape in affine INT8 per tensor, with a zero that is exact, and back."""
    low, high = min(0.0, float(x.min())), max(0.0, float(x.max()))
    scale = max(high - low, torch.finfo(x.dtype).tiny) / (_HIGHEST - _LOWEST)
    return torch.fake_quantize_per_tensor_affine(x, scale, round(_LOWEST - low / scale), _LOWEST, _HIGHEST)
