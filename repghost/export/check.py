"""Whether an export is right: its own runtime against torch, on photographs.

In float32 no logit may differ by more than 1e-4 (with softmax, the logarithm of a probability). float16 has 11
significant bits, so a rounding is off by up to 5e-4; those of the weights and activations of about a hundred layers add
up like the square root of 200, to 7e-3 of the largest logit, and the bound is three times that, 2e-2. INT8 has no
bound: `repghost.export.int8` reports what it loses. Check: `pytest tests/test_export.py`.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from repghost.errors import UserError
from repghost.export.deployable import Deployable, Deployment
from repghost.export.runtimes import ExportedModel
from repghost.model import RepGhostNet

Images = Sequence[Image.Image]

TOLERANCE = 1e-4  # of float32 logits, absolute
TOLERANCE_FLOAT16 = 2e-2  # of the largest logit


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
