"""Whether an export is right: its own runtime against torch, on photographs.

In float32 no logit may differ by more than 1e-4 (with softmax, the logarithm of a probability). float16 keeps 11 binary
digits, so a rounding is off by up to 5e-4; those of the weights and activations of about a hundred layers add up like
the square root of 200, to 7e-3 of the largest logit, and three times that, 2e-2, is the bound. INT8 has no bound: what
it loses is reported. Check: `pytest tests/test_export.py tests/test_quantize.py`.
"""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from repghost.errors import UserError
from repghost.export.formats import Deployable, Deployment, coreml_operations, quiet
from repghost.export.quantize import layer_losses, sqnr
from repghost.export.runtimes import ExportedModel, open_executorch, open_onnx, open_torchscript
from repghost.files import write_text
from repghost.images import evaluation_transform
from repghost.model import RepGhostNet
from repghost.weights import load_model

TOLERANCE = 1e-4  # of float32 logits, absolute
TOLERANCE_FLOAT16 = 2e-2  # of the largest logit
EXAMINED = 32  # calibration images that every layer's loss is measured on
SHOWN = 5  # of the layers that lose most


def inputs_of(images: Sequence[Image.Image], deployment: Deployment) -> list[Tensor]:
    """The images as inputs of an export.

    A batch of fixed size is filled up with the first ones; where sizes differ, every batch is of one image.
    """
    if deployment.preprocess and deployment.input_size is None:
        return [_pixels(image).expand(deployment.batch or 1, -1, -1, -1) for image in images]
    if deployment.input_size is not None:
        height, width = deployment.input_size
        rows = [_pixels(image.resize((width, height), Image.Resampling.BICUBIC)) for image in images]
    else:
        transform = evaluation_transform(deployment.image_size, deployment.crop_fraction)
        rows = [transform(image) for image in images]
    size = deployment.batch or 1
    missing = -len(rows) % size
    return list(torch.stack(rows + [rows[i % len(rows)] for i in range(missing)]).split(size))


def checked_inputs(images: Sequence[Image.Image], deployment: Deployment) -> list[Tensor]:
    """`inputs_of`; where a batch of any size goes in, also each image with its mirror image."""
    inputs = inputs_of(images, deployment)
    if deployment.batch:
        return inputs
    width = 2 if deployment.preprocess else 3
    return inputs + [torch.cat([x, x.flip(width)]) for x in inputs]


def _pixels(image: Image.Image) -> Tensor:
    """uint8 [H, W, 3]"""
    return torch.from_numpy(np.array(image))


def open_written(form: str, path: Path, width: float) -> ExportedModel:
    """The file that was written, in its own runtime; of safetensors, a network of this width with its weights."""
    if form == "safetensors":
        return ExportedModel(load_model(path, width))
    return {"onnx": open_onnx, "executorch": open_executorch, "torchscript": open_torchscript}[form](path)


@torch.no_grad()
def compare(
    reference: Deployable, model: ExportedModel, inputs: Sequence[Tensor], deployment: Deployment, what: str
) -> str:
    """One line on how far an export is from torch. Raises UserError when that is too far."""
    expected, found = (torch.cat([net(x) for x in inputs]) for net in (reference, model))
    if deployment.softmax:
        expected, found = (x.clamp_min(torch.finfo(x.dtype).tiny).log() for x in (expected, found))
    difference, largest = float((expected - found).abs().max()), float(expected.abs().max())
    limit = TOLERANCE_FLOAT16 * largest if deployment.float16 else TOLERANCE
    flips = int((expected.argmax(1) != found.argmax(1)).sum())
    outputs = "log-probabilities" if deployment.softmax else "logits"
    line = (
        f"largest difference from torch in the {outputs}: {difference:.1e} (allowed {limit:.1e}), "
        f"Top-1 differs in {flips} of {len(expected)}; checked on {what}"
        + ("" if deployment.batch else ", alone and with their mirror images")
    )
    if not difference <= limit:  # a NaN is not either
        raise UserError(f"the export is wrong, nothing was written: {line}")
    return line


def check_coreml(package: Path) -> str:
    """One line on a Core ML package: it is loaded and looked at, not run."""
    with quiet():
        found = coreml_operations(package)
    assert not any("batch_norm" in operation for operation in found)
    return f"not run: Core ML runs on macOS only; the package loads and has no BatchNorm ({', '.join(sorted(found))})"


@torch.no_grad()
def report_int8(
    reference: Deployable,
    model: ExportedModel,
    network: RepGhostNet,
    deployment: Deployment,
    images: Sequence[Image.Image],
    what: str,
    out: Path,
    calibration: str,
    arguments: str,
) -> str:
    """What INT8 loses, in words; the same is written beside `out` as JSON.

    calibration: where the calibration images came from. arguments: of evaluate.py, for the network before.
    """
    inputs = inputs_of(images, deployment)
    expected, found = (torch.cat([net(x) for x in inputs])[: len(images)] for net in (reference, model))
    if not bool(found.isfinite().all()):
        raise UserError("the export is wrong, nothing was written: its outputs are not finite")
    agreement = 100 * float((expected.argmax(1) == found.argmax(1)).float().mean())
    normalized = torch.cat(
        inputs_of(images[:EXAMINED], replace(deployment, preprocess=False, input_size=None, batch=1))
    )
    layers = layer_losses(network, normalized)
    report = {
        "file": out.name,
        "calibration": calibration,
        "images": len(images),
        "top1_agreement": agreement,
        "sqnr_db": sqnr(expected, found),
        "layers": layers,
    }
    path = out.with_suffix(".int8.json")
    write_text(path, json.dumps(report, indent=2) + "\n")
    worst = "\n".join(f"  {row['sqnr_db']:5.1f} dB  {row['layer']}" for row in layers[:SHOWN])
    images_like = f"image_size={deployment.image_size} data.crop_fraction={deployment.crop_fraction:g} data.root=SHARDS"
    return (
        f"INT8 and float32 agree in the Top-1 of {agreement:.1f}% of {what}; "
        f"{deployment.output}: signal to noise {report['sqnr_db']:.1f} dB\n"
        f"layers that lose most when they alone are quantized (all of them in {path}):\n{worst}\n"
        f"accuracy before: python evaluate.py {arguments} {images_like}\n"
        f"accuracy after:  python evaluate.py weights={out} {images_like}"
    )
