"""What images show, by a network: `classify` for a few lines of Python, `Predictor` for many images.

    from repghost.predict.predictor import classify

    for prediction in classify(["cat.jpg", array, image], weights="outputs/NAME"):
        print(prediction.file, prediction.top[0])

The pixels are those of evaluation (see `repghost.images`), the network is in fused form, in float32, on the GPU where
there is one. Check: `pytest tests/test_predict.py`.
"""

import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from repghost.errors import UserError, printable
from repghost.files import read_class_names
from repghost.images import read_image
from repghost.machine import available_cpus
from repghost.model import RepGhostNet
from repghost.networks import Network, open_network
from repghost.options import NetworkOptions
from repghost.reparameterization import reparameterize

READERS = 4  # threads that decode, at most; PIL and torch release the interpreter's lock

Picture = str | os.PathLike[str] | Image.Image | np.ndarray


class Prediction(NamedTuple):
    """The likeliest classes of one image, best first: label, name and probability, the softmax over all classes.

    file: the path or URL, or the number of an image in memory, counted from 0. image: where pictures are written, else
    None.
    """

    file: str
    top: list[tuple[int, str, float]]
    image: Image.Image | None = None

    def as_json(self) -> str:
        """One line of JSON in ASCII."""
        top = [{"label": label, "class": name, "probability": round(p, 6)} for label, name, p in self.top]
        return json.dumps({"file": self.file, "top": top})

    def drawn(self) -> Image.Image:
        """A copy of the image with its classes in a band below it."""
        image = self.image
        assert image is not None
        text, margin = "\n".join(f"{p:6.1%}  {printable(name)}" for _, name, p in self.top), 8
        font = ImageFont.load_default(max(12, min(image.size) // 24))
        left, upper, right, lower = ImageDraw.Draw(image).multiline_textbbox((0, 0), text, font)
        width, height = round(right - left) + 2 * margin, round(lower - upper) + 2 * margin
        canvas = Image.new("RGB", (max(image.width, width), image.height + height))
        canvas.paste(image)
        ImageDraw.Draw(canvas).multiline_text((margin - left, image.height + margin - upper), text, "white", font)
        return canvas


def classify(
    images: Picture | Iterable[Picture],
    weights: str | Path,
    *,
    top: int = 5,
    batch_size: int = 32,
    width: float | None = None,
    image_size: int | None = None,
    crop_fraction: float | None = None,
    class_names: Sequence[str] | str | Path | None = None,
) -> list[Prediction]:
    """The likeliest classes of images, in their order.

    images: one or more files, URLs, PIL images, or arrays uint8 [H, W, 3] in RGB or [H, W]. weights: a run's folder,
    "timm", or a file or folder of any kind, exported ones (.onnx, .pte) too. top: classes of an image. width:
    needed for "timm" and for files that do not tell it. image_size, crop_fraction and class_names (a list, or a text
    file with one a line): by default those of the training.

    Raises UserError for an image that cannot be read and for weights that are no network's.
    """
    for name, number in (("top", top), ("batch_size", batch_size)):
        if number < 1:
            raise UserError(f"{name}={number}: give a whole number above 0")
    single = isinstance(images, str | os.PathLike | Image.Image | np.ndarray)
    options = NetworkOptions(weights=str(weights), width=width, image_size=image_size, crop_fraction=crop_fraction)

    def stop(file: str, error: Exception) -> None:
        raise UserError(f"{file}: cannot be read as an image ({error})") from None

    predictor = Predictor(open_network(options), top, batch_size, class_names)
    return list(predictor([images] if single else images, stop))  # type: ignore[list-item,arg-type]


class Predictor:
    """Predicts with a network.

    top: classes of an image. batch_size: images that the network sees at once. class_names: instead of those of its
    training, a list or a text file with one a line. keep_images: whether predictions have their image.
    """

    def __init__(
        self,
        network: Network,
        top: int = 5,
        batch_size: int = 32,
        class_names: Sequence[str] | str | Path | None = None,
        keep_images: bool = False,
    ) -> None:
        names = read_class_names(Path(class_names)) if isinstance(class_names, str | Path) else class_names
        self._names = network.class_names() if names is None else names
        if len(self._names) != network.outputs:
            raise UserError(f"{len(self._names)} class names for weights of {network.outputs} classes")
        self._top, self._batch_size, self._keep = min(top, network.outputs), batch_size, keep_images
        self._transform = network.preprocessing.transform()
        model = network.model
        if isinstance(model, RepGhostNet):
            self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
            self._gives_probabilities = False
            # In channels_last the depthwise convolutions are several times as fast on CPUs (benchmarks/latency.py).
            self._call: Callable[[Tensor], Tensor] = (
                reparameterize(model).to(self._device).to(memory_format=torch.channels_last)
            )
        else:
            self._device, self._call = torch.device("cpu"), model
            self._gives_probabilities = bool(model.metadata["softmax"])

    def __call__(self, pictures: Iterable[Picture], on_error: Callable[[str, Exception], None]) -> Iterator[Prediction]:
        """The predictions of `pictures` in their order; those that cannot be read go to `on_error`."""
        rest = enumerate(pictures)
        with ThreadPoolExecutor(min(READERS, available_cpus())) as pool:
            while batch := list(islice(rest, self._batch_size)):
                loaded = []
                for number, picture, reading in [
                    (n, picture, pool.submit(self._load, picture)) for n, picture in batch
                ]:
                    name = os.fspath(picture) if isinstance(picture, str | os.PathLike) else str(number)
                    try:
                        loaded.append((name, *reading.result()))
                    except Exception as error:  # a decoder may raise anything
                        on_error(name, error)
                tops = self._predict([pixels for *_, pixels in loaded]) if loaded else []
                yield from (Prediction(name, top, image) for (name, image, _), top in zip(loaded, tops, strict=True))

    def _load(self, picture: Picture) -> tuple[Image.Image | None, Tensor]:
        image = _opened(picture)
        return image if self._keep else None, self._transform(image)

    @torch.inference_mode()
    def _predict(self, images: list[Tensor]) -> list[list[tuple[int, str, float]]]:
        """The likeliest classes of every image, float32 [3, S, S]."""
        outputs = self._call(torch.stack(images).to(self._device, memory_format=torch.channels_last))
        probabilities = outputs if self._gives_probabilities else outputs.softmax(1)
        values, labels = probabilities.topk(self._top, dim=1)
        rows = zip(labels.tolist(), values.tolist(), strict=True)
        return [[(i, self._names[i], p) for i, p in zip(*row, strict=True)] for row in rows]


def _opened(picture: Picture) -> Image.Image:
    """The picture in RGB."""
    if isinstance(picture, Image.Image):
        return picture.convert("RGB")
    if isinstance(picture, np.ndarray):
        if picture.dtype != np.uint8 or picture.ndim not in (2, 3) or picture.shape[2:] not in ((), (3,)):
            raise ValueError(f"{picture.dtype} {list(picture.shape)}: give uint8 [H, W, 3] or [H, W]")
        return Image.fromarray(picture).convert("RGB")
    return read_image(os.fspath(picture))
