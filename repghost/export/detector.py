"""The detector of a run as ONNX: one photograph in, the boxes after non-maximum suppression out.

`image` is float32 [3, H, W] in [0, 1], of any size; `boxes` float32 [N, 4], left, top, right, bottom in its pixels,
`labels` int64 [N] from 1, `scores` [N] and, of mask_rcnn, `masks` [N, 1, H, W]. The names of the classes are in the
metadata, as JSON under "repghost". It is written by torch's exporter of traced modules, because the newer one cannot
follow torchvision's suppression, whose steps depend on how many boxes there are. Check: `pytest
tests/test_detection_use.py`.
"""

import copy
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.onnx.operators import shape_as_tensor
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.transforms.functional import to_tensor

from repghost.description import KEY, Description
from repghost.detection.run import load_detector
from repghost.errors import UserError
from repghost.export.check import TOLERANCE
from repghost.export.options import FORMATS, Options
from repghost.export.photographs import read_photographs, sample_photographs
from repghost.export.runtimes import quiet, require
from repghost.files import TEMPORARY
from repghost.machine import limit_threads
from repghost.reparameterization import reparameterize

CHECKED = 16  # photographs that an export is compared on
SAME_BOX = 0.5  # pixels by which the sides of two boxes that are the same may differ
MAY_DIFFER = 0.01  # share of the boxes that rounding may keep or suppress in one of both alone


class ExactResize(GeneralizedRCNNTransform):
    """torchvision's transform in evaluation, which a trace computes in float32: some images lose a row or a column."""

    def resize(self, image: Tensor, target: None = None) -> tuple[Tensor, None]:
        sides = shape_as_tensor(image)[-2:].double()
        limits = torch.tensor([self.min_size[-1], self.max_size], dtype=torch.float64)
        scale = (limits / torch.stack([sides.min(), sides.max()])).min()
        height, width = (sides * scale).floor().long()
        return F.interpolate(image[None], size=(height, width), mode="bilinear")[0], None


class OneImage(nn.Module):
    """A detector in evaluation mode for one image, float32 [3, H, W], as a tuple of tensors in the order of `names`."""

    def __init__(self, detector: nn.Module) -> None:
        super().__init__()
        self.detector = detector
        self.names = ["boxes", "labels", "scores", *["masks"] * isinstance(detector, MaskRCNN)]

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        found = self.detector([image])[0]
        return tuple(found[name] for name in self.names)


def export_detector(options: Options) -> Path:
    """Writes the export of `options.run`, prints how it was checked and returns its path.

    Raises UserError when onnxruntime finds something else than torch; nothing is then written.
    """
    for package in FORMATS["onnx"].packages:
        require(package)
    assert options.run is not None
    limit_threads()
    selection = options.selection or "last"
    model, classes, _ = load_detector(options.run, selection)
    module = OneImage(reparameterize(model)).eval()
    out = options.out or options.run / f"fused{'' if selection == 'last' else f'_{selection}'}.onnx"
    photographs = read_photographs(options.check, CHECKED) if options.check else sample_photographs(CHECKED)
    images = [to_tensor(photograph.image) for photograph in photographs]
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(TEMPORARY, ".", out.parent) as folder:
        written = Path(folder) / out.name
        print("converting the detector to onnx ...", flush=True)
        with quiet():
            _write(module, images[0], written, options.opset, Description(form="fused", classes=tuple(classes)))
        print(f"{_compare(module, written, images)}; checked on {len(images)} images")
        written.replace(out)
    return out


def _write(module: OneImage, image: Tensor, path: Path, opset: int, description: Description) -> None:
    import onnx

    module = copy.deepcopy(module)
    transform: Any = module.detector.transform
    if transform.fixed_size is None:
        sizes = (transform.min_size, transform.max_size)
        module.detector.transform = ExactResize(*sizes, transform.image_mean, transform.image_std).eval()
    free: dict[str, dict[int, str]] = {
        "image": {1: "height", 2: "width"},
        **{name: {0: "objects"} for name in module.names},
    }
    if "masks" in free:
        free["masks"] |= {2: "height", 3: "width"}
    torch.onnx.export(
        module, (image,), path, dynamo=False, opset_version=opset,
        input_names=["image"], output_names=module.names, dynamic_axes=free,
    )  # fmt: skip
    model = onnx.load(path)
    model.metadata_props.add(key=KEY, value=description.to_json())
    onnx.save(model, path)


@torch.no_grad()
def _compare(module: OneImage, path: Path, images: list[Tensor]) -> str:
    """How far a file is from torch, in words. Raises UserError when that is too far."""
    session = require("onnxruntime").InferenceSession(str(path), providers=["CPUExecutionProvider"])
    boxes, alone, difference = 0, 0, 0.0
    for image in images:
        expected = dict(zip(module.names, module(image), strict=True))
        outputs = session.run(module.names, {"image": image.numpy()})
        found = dict(zip(module.names, map(torch.from_numpy, outputs), strict=True))
        same = torch.cdist(expected["boxes"], found["boxes"], p=torch.inf) <= SAME_BOX
        same &= expected["labels"][:, None] == found["labels"]
        differences = (expected["scores"][:, None] - found["scores"]).abs().where(same, torch.inf)
        for nearest in (differences.amin(0), differences.amin(1)) if same.numel() else ():
            difference = max([difference, *nearest[nearest.isfinite()].tolist()])
        boxes += sum(same.shape)
        alone += int((~same.any(0)).sum() + (~same.any(1)).sum()) if same.numel() else sum(same.shape)
    line = f"{boxes // 2} boxes, {alone} found by one of both alone; largest difference of scores {difference:.1e}"
    if not difference <= TOLERANCE or alone > MAY_DIFFER * boxes:
        raise UserError(f"the export is wrong, nothing was written: {line}")
    return line
