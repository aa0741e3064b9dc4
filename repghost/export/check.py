"""Whether an export is right: its own runtime against torch, on photographs; and what INT8 loses.

In float32 no logit may differ by more than 1e-4 (with softmax, the logarithm of a probability). float16 has 11
significant bits, so a rounding is off by up to 5e-4; those of the weights and activations of about a hundred layers add
up like the square root of 200, to 7e-3 of the largest logit, and the bound is three times that, 2e-2. INT8 has no
bound: what it loses is reported, and what the quantization of each layer alone does to the logits.
Check: `pytest tests/test_export.py tests/test_quantize.py`.
"""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from repghost.errors import UserError
from repghost.export.formats import Deployable, Deployment
from repghost.export.runtimes import ExportedModel
from repghost.files import write_text
from repghost.model import RepGhostNet

Images = Sequence[Image.Image]

TOLERANCE = 1e-4  # of float32 logits, absolute
TOLERANCE_FLOAT16 = 2e-2  # of the largest logit
EXAMINED = 32  # calibration images that every layer's loss is measured on
SHOWN = 5  # layers in the summary of an INT8 report


def inputs_of(images: Images, deployment: Deployment) -> list[Tensor]:
    """The images as inputs of an export.

    A batch of fixed size is filled up with the first ones; where sizes differ, every batch is of one image.
    """
    size = deployment.batch or 1
    if not deployment.preprocess:
        transform = deployment.preprocessing.transform()
        rows = [transform(image) for image in images]
    else:
        if deployment.input_size is not None:
            side = deployment.input_size[::-1]
            images = [image.resize(side, Image.Resampling.BICUBIC) for image in images]
        rows = [torch.from_numpy(np.array(image)) for image in images]  # uint8 [H, W, 3]
        if deployment.input_size is None:
            return [row.expand(size, -1, -1, -1) for row in rows]
    missing = -len(rows) % size
    return list(torch.stack(rows + [rows[i % len(rows)] for i in range(missing)]).split(size))


@torch.no_grad()
def compare(network: RepGhostNet, model: ExportedModel, images: Images, deployment: Deployment) -> str:
    """How far an export is from the fused `network` in torch, in words. Raises UserError when that is too far.

    Where a batch of any size goes in, each image is also compared together with its mirror image.
    """
    inputs, reference = inputs_of(images, deployment), Deployable.of(network, replace(deployment, precision="float32"))
    if deployment.batch is None:
        inputs += [torch.cat([x, x.flip(2 if deployment.preprocess else 3)]) for x in inputs]
    expected, found = (torch.cat([net(x) for x in inputs]) for net in (reference, model))
    if deployment.softmax:
        expected, found = (x.clamp_min(torch.finfo(x.dtype).tiny).log() for x in (expected, found))
    difference, largest = float((expected - found).abs().max()), float(expected.abs().max())
    limit = TOLERANCE_FLOAT16 * largest if deployment.precision == "float16" else TOLERANCE
    flips = int((expected.argmax(1) != found.argmax(1)).sum())
    line = (
        f"largest difference from torch in the {'log-' * deployment.softmax}{deployment.output}: {difference:.1e} "
        f"(allowed {limit:.1e}), Top-1 differs in {flips} of {len(expected)}"
    )
    if not difference <= limit:  # a NaN is not either
        raise UserError(f"the export is wrong, nothing was written: {line}")
    return line


@torch.no_grad()
def int8_report(
    network: RepGhostNet, model: ExportedModel, images: Images, deployment: Deployment, out: Path, source: Path | None
) -> str:
    """What INT8 loses of the fused `network`, in words: agreement of the Top-1, signal to noise, the loss by layer.

    All of it is written beside `out`, as .int8.json. source: the folder or shard of the calibration images. Raises
    UserError when outputs are not finite.
    """
    inputs, reference = inputs_of(images, deployment), Deployable.of(network, deployment)
    expected, found = (torch.cat([net(x) for x in inputs])[: len(images)] for net in (reference, model))
    if not bool(found.isfinite().all()):
        raise UserError("the export is wrong, nothing was written: its outputs are not finite")
    agreement, noise = 100 * float((expected.argmax(1) == found.argmax(1)).float().mean()), sqnr(expected, found)
    normalized, path = Deployment(deployment.preprocessing), out.with_suffix(".int8.json")
    layers = layer_losses(network, torch.cat(inputs_of(images[:EXAMINED], normalized)))
    report = {"file": str(out), "calibration": str(source), "images": len(images)}
    report |= {"top1_agreement": agreement, "sqnr_db": noise, "layers": layers}
    write_text(path, json.dumps(report, indent=2) + "\n")
    lines = [
        f"INT8 and float32 agree in the Top-1 of {agreement:.1f}% of the {len(images)} calibration images; "
        f"signal to noise {noise:.1f} dB",
        f"layers that lose most when they alone are quantized (all of them in {path}):",
        *(f"  {row['sqnr_db']:5.1f} dB  {row['layer']}" for row in layers[:SHOWN]),
        f"accuracy: python evaluate.py weights={out} data.root=SHARDS",
    ]
    return "\n".join(lines)


def sqnr(exact: Tensor, quantized: Tensor) -> float:
    """Signal to quantization noise of [N, C] logits in dB: 20 log10(|exact| / |exact - quantized|), larger is better.

    The mean over N is not part of the signal: what all images share tells no classes apart.
    """
    signal, noise = (exact - exact.mean(0)).norm(), (exact - quantized).norm()
    return float(20 * torch.log10(signal / noise.clamp_min(torch.finfo(noise.dtype).tiny)))


@torch.no_grad()
def layer_losses(model: RepGhostNet, images: Tensor) -> list[dict[str, Any]]:
    """What quantizing each convolution and the classifier alone does to the logits of `images`, the worst layer first.

    A layer's weights are rounded to INT8 with a scale for each output channel, its input with one for the tensor, over
    the range that it has on `images`; everything else stays in float32. Rows hold the `layer`, `sqnr_db` (see `sqnr`)
    and `top1_flips`. images: float32 [N, 3, H, W].
    """
    exact, rows = model(images), []
    layers = [(name, layer) for name, layer in model.named_modules() if isinstance(layer, nn.Conv2d | nn.Linear)]
    for name, layer in tqdm(layers, "INT8 of each layer", disable=None, leave=False):
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
    scale = weight.flatten(1).abs().amax(1).clamp_min(torch.finfo(weight.dtype).tiny) / 127
    zero = torch.zeros_like(scale, dtype=torch.int32)
    return torch.fake_quantize_per_channel_affine(weight, scale, zero, 0, -127, 127)


def _rounded_input(x: Tensor) -> Tensor:
    """Any shape in affine INT8 per tensor, with a zero that is exact, and back."""
    low, high = min(0.0, float(x.min())), max(0.0, float(x.max()))
    scale = max(high - low, torch.finfo(x.dtype).tiny) / 255
    return torch.fake_quantize_per_tensor_affine(x, scale, round(-128 - low / scale), -128, 127)
