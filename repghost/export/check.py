"""Whether an export is right: its own runtime against torch, on photographs.

In float32 no logit may differ by more than 1e-4 (with softmax, the logarithm of a probability). float16 has 11
significant bits, so a rounding is off by up to 5e-4; those of the weights and activations of about a hundred layers add
up like the square root of 200, to 7e-3 of the largest logit, and the bound is three times that, 2e-2. INT8 has no
bound: what it loses is reported. Check: `pytest tests/test_export.py tests/test_quantize.py`.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from repghost.errors import UserError
from repghost.export.formats import Deployable, Deployment, coreml_operations
from repghost.export.quantize import layer_losses, sqnr
from repghost.export.runtimes import ExportedModel, open_executorch, open_onnx, open_torchscript, quiet
from repghost.model import RepGhostNet
from repghost.source import Source
from repghost.weights import load_model

TOLERANCE = 1e-4  # of float32 logits, absolute
TOLERANCE_FLOAT16 = 2e-2  # of the largest logit
EXAMINED = 32  # calibration images that every layer's loss is measured on
SHOWN = 5  # layers in the summary of an INT8 report


def inputs_of(images: Sequence[Image.Image], deployment: Deployment) -> list[Tensor]:
    """The images as inputs of an export.

    A batch of fixed size is filled up with the first ones; where sizes differ, every batch is of one image.
    """
    size = deployment.batch or 1
    if not deployment.preprocess:
        transform = deployment.preprocessing.transform()
        rows = [transform(image) for image in images]
    elif deployment.input_size is None:
        return [_pixels(image).expand(size, -1, -1, -1) for image in images]
    else:
        height, width = deployment.input_size
        rows = [_pixels(image.resize((width, height), Image.Resampling.BICUBIC)) for image in images]
    missing = -len(rows) % size
    return list(torch.stack(rows + [rows[i % len(rows)] for i in range(missing)]).split(size))


def _pixels(image: Image.Image) -> Tensor:
    """uint8 [H, W, 3]"""
    return torch.from_numpy(np.array(image))


def open_written(form: str, path: Path, width: float) -> ExportedModel:
    """The file that was written, in its own runtime; of safetensors, a network of this width with its weights."""
    if form == "safetensors":
        return ExportedModel(load_model(path, width))
    return {"onnx": open_onnx, "executorch": open_executorch, "torchscript": open_torchscript}[form](path)


@torch.no_grad()
def compare(network: RepGhostNet, model: ExportedModel, images: Sequence[Image.Image], deployment: Deployment) -> str:
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


def check_coreml(package: Path) -> str:
    """What is in a Core ML package, in words: it is loaded, not run."""
    with quiet():
        found = coreml_operations(package)
    assert not any("batch_norm" in operation for operation in found)
    return f"not run: Core ML runs on macOS only; the package loads and has no BatchNorm ({', '.join(sorted(found))})"


@torch.no_grad()
def int8_report(
    network: RepGhostNet, model: ExportedModel, images: Sequence[Image.Image], deployment: Deployment
) -> dict[str, Any]:
    """What INT8 loses of the fused `network`: agreement of the Top-1 in percent, signal to noise, the loss by layer."""
    inputs, reference = inputs_of(images, deployment), Deployable.of(network, deployment)
    expected, found = (torch.cat([net(x) for x in inputs])[: len(images)] for net in (reference, model))
    if not bool(found.isfinite().all()):
        raise UserError("the export is wrong, nothing was written: its outputs are not finite")
    normalized = inputs_of(images[:EXAMINED], Deployment(deployment.preprocessing))
    return {
        "images": len(images),
        "top1_agreement": 100 * float((expected.argmax(1) == found.argmax(1)).float().mean()),
        "sqnr_db": sqnr(expected, found),
        "layers": layer_losses(network, torch.cat(normalized)),
    }


def int8_summary(report: dict[str, Any], path: Path, source: Source) -> str:
    """A report in words; all of it is in `path`."""
    images = source.preprocessing
    end = f"image_size={images.image_size} data.crop_fraction={images.crop_fraction:g} data.root=SHARDS"
    lines = [
        f"INT8 and float32 agree in the Top-1 of {report['top1_agreement']:.1f}% of the {report['images']} "
        f"calibration images; signal to noise {report['sqnr_db']:.1f} dB",
        f"layers that lose most when they alone are quantized (all of them in {path}):",
        *(f"  {row['sqnr_db']:5.1f} dB  {row['layer']}" for row in report["layers"][:SHOWN]),
        f"accuracy before: python evaluate.py {source.arguments} {end}",
        f"accuracy after:  python evaluate.py weights={report['file']} {end}",
    ]
    return "\n".join(lines)
