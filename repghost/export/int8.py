"""What INT8 costs: size, accuracy, time, and what each layer loses, on one page and as JSON.

Weights have a scale for every output channel, activations one for the tensor, found on calibration images by the
quantizer of each format (see `repghost.export.formats`); preprocessing and softmax stay in float.
Check: `pytest tests/test_quantize.py`.
"""

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from repghost.errors import UserError
from repghost.export.check import inputs_of
from repghost.export.deployable import Deployment
from repghost.export.photographs import Photograph
from repghost.export.runtimes import ExportedModel
from repghost.files import write_text
from repghost.model import RepGhostNet
from repghost.rounding import rounded_input, rounded_weight

EXAMINED = 32  # images that every layer's loss is measured on
SHOWN = 5  # layers in the report that is printed
ROUNDS = 20  # of timing: one call in float32 and one in INT8
NOTABLE = 0.5  # points of Top-1; a larger loss gets advice


@torch.no_grad()
def report(
    network: RepGhostNet,
    models: Mapping[str, ExportedModel],
    sizes: Mapping[str, int],
    photographs: Sequence[Photograph],
    classes: Sequence[str],
    deployment: Deployment,
    out: Path,
) -> str:
    """What INT8 loses of the fused `network`, a page to read. The same, and every layer, goes beside `out` as JSON.

    models, sizes: `float32` and `int8`, the same network in the same format, and the bytes of the two files.
    photographs: that it is measured on. classes: names of the network's labels, where they are known; the accuracy is
    that of photographs whose class is one of them. Raises UserError when outputs are not finite.
    """
    images = [photograph.image for photograph in photographs]
    inputs = inputs_of(images, deployment)
    exact, rounded = (
        torch.cat([models[form](x) for x in tqdm(inputs, form, disable=None, leave=False)])[: len(images)]
        for form in ("float32", "int8")
    )
    if not bool(rounded.isfinite().all()):
        raise UserError("the export is wrong, nothing was written: its outputs are not finite")
    found = {
        "file": str(out),
        "images": len(photographs),
        "bytes": dict(sizes),
        "top1_agreement": 100 * float((exact.argmax(1) == rounded.argmax(1)).float().mean()),
        "sqnr_db": sqnr(exact, rounded),
        "top1": _accuracies(photographs, classes, exact, rounded),
        "milliseconds": _milliseconds(models, inputs[0]),
        "threads": torch.get_num_threads(),
        "layers": layer_losses(network, torch.cat(inputs_of(images[:EXAMINED], Deployment(deployment.preprocessing)))),
    }
    write_text(out.with_suffix(".int8.json"), json.dumps(found, indent=2) + "\n")
    return "\n".join(_page(found, out))


def _page(found: dict[str, Any], out: Path) -> list[str]:
    """The report in lines."""
    before, after = found["bytes"].values()
    lines = [
        f"size       {after / 1e6:.2f} MB, {after / before:.0%} of {before / 1e6:.2f} MB in float32",
        f"agreement  the same Top-1 for {found['top1_agreement']:.1f}% of {found['images']} images, "
        f"signal to noise {found['sqnr_db']:.1f} dB",
    ]
    lost = 100 - found["top1_agreement"]
    if top1 := found["top1"]:
        lost = top1["float32"] - top1["int8"]
        lines.append(
            f"accuracy   Top-1 {top1['float32']:.2f}% in float32, {top1['int8']:.2f}% in INT8 "
            f"({top1['int8'] - top1['float32']:+.2f}), {top1['images']} images"
        )
    else:
        lines.append(f"accuracy   not known for these images: python evaluate.py weights={out} data.root=SHARDS")
    slow, fast = found["milliseconds"].values()
    lines.append(f"time       {fast:.2f} ms a call, {slow:.2f} in float32 ({slow / fast:.2f} times as fast), here")
    lines.append(f"layers that lose most when they alone are quantized (all: {out.with_suffix('.int8.json')}):")
    lines += [f"  {row['sqnr_db']:5.1f} dB  {row['layer']}" for row in found["layers"][:SHOWN]]
    if fast > slow:
        lines.append("slower     on this machine: take the float32 file here, or format=openvino on x86")
    if lost > NOTABLE:
        lines.append(
            "to try     more images (calibration_images=1024), images as they will be seen, and training on with the "
            "rounding: python train.py recipe=qat weights=RUN"
        )
    return lines


def _accuracies(
    photographs: Sequence[Photograph], classes: Sequence[str], exact: Tensor, rounded: Tensor
) -> dict[str, float] | None:
    """Top-1 in percent of both, over the photographs with a known class; None where there are none."""
    labels = {name: label for label, name in enumerate(classes)}
    rows = [row for row, photograph in enumerate(photographs) if photograph.class_name in labels]
    if not rows:
        return None
    truth = torch.tensor([labels[str(photographs[row].class_name)] for row in rows])
    float32, int8 = (100 * float((logits[rows].argmax(1) == truth).float().mean()) for logits in (exact, rounded))
    return {"float32": float32, "int8": int8, "images": len(rows)}


def _milliseconds(models: Mapping[str, ExportedModel], images: Tensor) -> dict[str, float]:
    """Of a call, the median without the first; they take turns."""
    taken: dict[str, list[float]] = {form: [] for form in models}
    for _ in range(ROUNDS + 1):
        for form, model in models.items():
            start = time.perf_counter()
            model(images)
            taken[form].append(1000 * (time.perf_counter() - start))
    return {form: median(values[1:]) for form, values in taken.items()}


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
        layer.weight.data = rounded_weight(weight)
        hook = layer.register_forward_pre_hook(lambda _, inputs: (rounded_input(inputs[0]),))
        logits = model(images)
        hook.remove()
        layer.weight.data = weight
        flips = int((logits.argmax(1) != exact.argmax(1)).sum())
        rows.append({"layer": name, "sqnr_db": round(sqnr(exact, logits), 2), "top1_flips": flips})
    return sorted(rows, key=lambda row: row["sqnr_db"])
