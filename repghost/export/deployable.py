"""The module that is deployed: always the fused network, with what was asked for around it.

That is the preprocessing of photographs, float16, a softmax. Its interface is the same in every format and precision:
`image` in, float32 [N, num_classes] out, `logits` or `probabilities`. Check: `pytest tests/test_export.py`.
"""

import copy
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.nn import functional as F

from repghost.description import KEY, Description
from repghost.images import Preprocessing
from repghost.model import RepGhostNet

Metadata = Mapping[str, float | str]
_ONE = 2.0**15  # a weight of 1; the weights of a pixel add up to at most 1.25 in size: 1.25 * 255 * _ONE < 2**24


@dataclass(frozen=True)
class Deployment:
    """What an exported file takes and gives.

    preprocessing: of the images that the network sees. batch: how many images a call takes, None for any number.
    preprocess: the file takes photographs, uint8 [N, H, W, 3] in RGB, and preprocesses them; otherwise it takes
    float32 [N, 3, image_size, image_size], normalized. input_size: (H, W) of the photographs, None for any. softmax:
    probabilities instead of logits. precision: of the network's weights and activations, between float32 inputs and
    outputs.
    """

    preprocessing: Preprocessing
    batch: int | None = 1
    preprocess: bool = False
    input_size: tuple[int, int] | None = None
    softmax: bool = False
    precision: Literal["float32", "float16", "int8"] = "float32"

    @property
    def output(self) -> str:
        return "probabilities" if self.softmax else "logits"


class Preprocess(nn.Module):
    """Photographs, uint8 [N, H, W, 3], to float32 [N, 3, image_size, image_size], as evaluation does it.

    `Preprocessing.transform` in operations that every runtime has. A resize is linear along each side, so it is a
    product with two matrices, which are constants for photographs of one size (`input_size`). As in PIL and
    torchvision, columns come first, pixels are rounded between the two products, and weights are multiples of a power
    of 2. So all sums are integers below 2**24, which float32 adds exactly, in any order: every runtime gets the same
    pixels.
    """

    def __init__(self, preprocessing: Preprocessing, input_size: tuple[int, int] | None) -> None:
        super().__init__()
        self._image_size, self._shorter = preprocessing.image_size, preprocessing.shorter_side
        self._input_size = input_size
        self.mean, self.std = (
            nn.Buffer(255 * torch.tensor(x).view(3, 1, 1)) for x in (preprocessing.mean, preprocessing.std)
        )
        if input_size is not None:
            self.rows, self.columns = map(nn.Buffer, self._matrices(*input_size))

    def forward(self, photographs: Tensor) -> Tensor:
        x = photographs.permute(0, 3, 1, 2).float()
        fixed = self._input_size is not None
        rows, columns = (self.rows, self.columns) if fixed else self._matrices(x.shape[2], x.shape[3])
        x = _whole(rows @ _whole(x @ columns))
        return (x - self.mean) / self.std

    def _matrices(self, height: Any, width: Any) -> tuple[Tensor, Tensor]:
        """float32 [image_size, height] and [width, image_size], in units of 1 / _ONE."""
        shorter = torch.sym_min(height, width)
        rows, columns = (self._matrix(side, self._shorter * side // shorter) for side in (height, width))
        return rows, columns.T.contiguous()

    def _matrix(self, length: Any, resized: Any) -> Tensor:
        """float32 [image_size, length]: a side of `length` pixels resized to `resized`, cropped at the centre.

        A pixel's weight is Keys' cubic (a = -1/2) of its distance, stretched where the side shrinks: PIL's bicubic.
        """
        rest = resized - self._image_size
        corner = rest // 2 + rest % 2 * (rest // 2 % 2)  # torchvision rounds half to even
        target = torch.arange(self._image_size, dtype=torch.float64)[:, None] + corner + 0.5
        source = torch.arange(length, dtype=torch.float64) + 0.5
        x = ((source * resized - target * length) / torch.sym_max(length, resized)).abs()
        near, far = (1.5 * x - 2.5) * x * x + 1, ((2.5 - 0.5 * x) * x - 4) * x + 2
        weights = torch.where(x < 1, near, torch.where(x < 2, far, torch.zeros_like(x)))
        return (_ONE * weights / weights.sum(1, keepdim=True)).round().float()


def _whole(x: Tensor) -> Tensor:
    """Sums in units of 1 / _ONE, rounded to pixels from 0 to 255."""
    return (x / _ONE + 0.5).floor().clamp(0, 255)


class _Pointwise(nn.Module):
    """A 1x1 convolution of maps of one pixel as a matrix product, which runtimes compute faster: [N, out].

    Without the sides of length 1, so that the ReLU that follows is fused with it: in INT8 the range of the values is
    that after the ReLU.
    """

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(conv.weight.flatten(1)), conv.bias

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.flatten(1), self.weight, self.bias)


class Deployable(nn.Module):
    """`network` with what `deployment` puts around it: `image` to float32 [N, num_classes]."""

    def __init__(self, network: nn.Module, deployment: Deployment) -> None:
        super().__init__()
        self.deployment = deployment
        self.preprocess: Preprocess | None = None
        if deployment.preprocess:
            self.preprocess = Preprocess(deployment.preprocessing, deployment.input_size)
        self.network = network

    @classmethod
    def of(cls, model: RepGhostNet, deployment: Deployment) -> "Deployable":
        """With a copy of the fused `model`, in float16 where the deployment says so."""
        assert model.fused
        network = copy.deepcopy(model).requires_grad_(False)
        network.add_module("conv_head", _Pointwise(network.conv_head))
        return cls(network.half() if deployment.precision == "float16" else network, deployment).eval()

    def forward(self, image: Tensor) -> Tensor:
        x = image if self.preprocess is None else self.preprocess(image)
        x = self.network(x.half()).float() if self.deployment.precision == "float16" else self.network(x)
        return x.softmax(1) if self.deployment.softmax else x


def example_input(deployment: Deployment) -> Tensor:
    """An input for tracing. A batch of any size is traced with 2 images: a size of 1 would be taken for a constant."""
    batch, size = deployment.batch or 2, deployment.preprocessing.image_size
    if not deployment.preprocess:
        return torch.zeros(batch, 3, size, size)
    height, width = deployment.input_size or (size + 37, size + 91)
    return torch.zeros(batch, height, width, 3, dtype=torch.uint8)


def program_of(module: Deployable) -> ExportedProgram:
    """`module` in torch.export's form, with those sizes free that its deployment leaves open."""
    deployment = module.deployment
    free: dict[int, Any] = {} if deployment.batch else {0: Dim("batch", min=1, max=2**16)}
    if deployment.preprocess and not deployment.input_size:
        free |= {1: Dim("height", min=1, max=2**16), 2: Dim("width", min=1, max=2**16)}
    return torch.export.export(module, (example_input(deployment),), dynamic_shapes=(free,))


def metadata_of(model: RepGhostNet, deployment: Deployment, description: Description) -> Metadata:
    """What a file says of itself; `repghost.export.runtimes.open_file` reads it.

    description: what is known of the weights.
    """
    images = deployment.preprocessing
    numbers = {
        "width": float(model.width), "num_classes": model.classifier.out_features, "image_size": images.image_size,
        "crop_fraction": float(images.crop_fraction), "batch": deployment.batch or 0,
        "preprocess": int(deployment.preprocess), "softmax": int(deployment.softmax),
    }  # fmt: skip
    normalization = {name: " ".join(map(str, getattr(images, name))) for name in ("mean", "std")}
    described = replace(description, width=float(model.width), form="fused", **asdict(images))
    return numbers | normalization | {"precision": deployment.precision, KEY: described.to_json()}
