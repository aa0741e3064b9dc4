"""Says what images show: the likeliest classes of files, folders and URLs, by the fused network.

    python -m repghost.predict IMAGE|FOLDER|URL... run=outputs/NAME [selection=best_ema]
    python -m repghost.predict IMAGE|FOLDER|URL... weights=timm|FILE width=1.0 [class_names=FILE]
                               [format=table|jsonl|pictures] [out=...] [top=5] [batch_size=32]
                               [image_size=224] [crop_fraction=0.875]

`table` and `jsonl` go to the terminal or to the file out=; `jsonl` is a line {"file", "top": [{"label", "class",
"probability"}]} an image. `pictures` are copies with the classes below them in the folder out= (default: predictions),
under their paths below the folder that all images have in common. Folders are read recursively and in sorted order,
a few files ahead; of what is in them only files with an image's extension count. A path with a = in it that could be
a key is written ./KEY=VALUE.

Class names: of a run, those of its data set (classes.txt in its folder); of weights with 1,000 classes, ImageNet's;
class_names=FILE, a line a class, overrides both. ImageNet's WordNet ids are shown as words. Image size and crop are the
run's.

A file that cannot be read or decoded is one line on stderr and is skipped. Exit codes: 0; 1 when no image could be
predicted; 2 for a mistake in the command. The pixels are those of evaluation (see `repghost.images`), so a photograph
that is stored on its side stays on its side. Check: `pytest tests/test_predict.py`.
"""

import json
import os
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any
from urllib.parse import quote

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from tqdm import tqdm

from repghost.errors import UserError
from repghost.files import read_class_names
from repghost.images import EXTENSIONS, evaluation_transform, image_files, is_url, read_image
from repghost.model import RepGhostNet
from repghost.reference import class_words
from repghost.reparameterize import reparameterize
from repghost.run import class_names_of
from repghost.weights import load_model

FORMATS = ("table", "jsonl", "pictures")
KEYS = (
    "run", "selection", "weights", "width", "class_names", "image_size", "crop_fraction",
    "format", "out", "top", "batch_size",
)  # fmt: skip
READERS = min(4, os.cpu_count() or 1)  # threads that decode; PIL and torch let others run meanwhile


@dataclass(frozen=True)
class Prediction:
    """The likeliest classes of one image, best first. probabilities: softmax over all classes, in [0, 1]."""

    file: str
    labels: list[int]
    classes: list[str]
    probabilities: list[float]
    image: Image.Image | None = None  # as read, where it is wanted


class Predictor:
    """Predicts with the fused form of `model`, in float32, on the GPU where there is one.

    classes: a name for every output; None names them by their numbers.
    """

    def __init__(
        self,
        model: RepGhostNet,
        classes: Sequence[str] | None = None,
        *,
        image_size: int = 224,
        crop_fraction: float = 0.875,
    ) -> None:
        outputs = model.classifier.out_features
        if model.conv_stem.in_channels != 3:
            raise UserError(f"the weights are for images of {model.conv_stem.in_channels} channels, not for RGB")
        if classes is not None and len(classes) != outputs:
            raise UserError(f"{len(classes)} class names for weights of {outputs} classes")
        self._classes = [str(label) for label in range(outputs)] if classes is None else list(classes)
        self._transform = evaluation_transform(image_size, crop_fraction)
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        # In channels_last the depthwise convolutions are several times as fast on CPUs (benchmarks/latency.py).
        self._model = reparameterize(model).to(self._device).to(memory_format=torch.channels_last)

    def __call__(
        self,
        files: Iterable[str],
        *,
        top: int = 5,
        batch_size: int = 32,
        keep_images: bool = False,
        on_error: Callable[[str, Exception], None],
    ) -> Iterator[Prediction]:
        """The predictions of `files` in their order, as they come; those that cannot be read go to `on_error`."""

        def load(file: str) -> tuple[Tensor, Image.Image | None]:
            image = read_image(file)
            return self._transform(image), image if keep_images else None

        def readable() -> Iterator[tuple[str, Tensor, Image.Image | None]]:
            for file, result in _ahead(load, files, batch_size + READERS):
                try:
                    yield file, *result()
                except Exception as error:  # a decoder may raise anything; the file is named and left out
                    on_error(file, error)

        images = readable()
        while batch := list(islice(images, batch_size)):
            probabilities, labels = self._top(torch.stack([pixels for _, pixels, _ in batch]), top)
            for (file, _, image), p, chosen in zip(batch, probabilities.tolist(), labels.tolist(), strict=True):
                yield Prediction(file, chosen, [self._classes[label] for label in chosen], p, image)

    @torch.inference_mode()
    def _top(self, images: Tensor, top: int) -> tuple[Tensor, Tensor]:
        """float32 [N, 3, S, S] to the largest probabilities and their labels, [N, top] each."""
        logits = self._model(images.to(self._device, memory_format=torch.channels_last))
        values, labels = logits.softmax(1).topk(min(top, logits.shape[1]), dim=1)
        return values.cpu(), labels.cpu()


def _ahead(load: Callable[[str], Any], files: Iterable[str], ahead: int) -> Iterator[tuple[str, Callable[[], Any]]]:
    """(file, what gives or raises its `load`) in the order of `files`; threads load at most `ahead` of them early."""
    with ThreadPoolExecutor(READERS) as pool:
        waiting: deque[tuple[str, Callable[[], Any]]] = deque()
        try:
            for file in files:
                waiting.append((file, pool.submit(load, file).result))
                if len(waiting) > ahead:
                    yield waiting.popleft()
            while waiting:
                yield waiting.popleft()
        finally:
            pool.shutdown(cancel_futures=True)


# --- what predicts --------------------------------------------------------------------------------


def predictor(given: dict[str, str]) -> Predictor:
    """The predictor of a run (`run`, `selection`) or of weights (`weights`, `width`); other keys override."""
    if ("run" in given) == ("weights" in given):
        raise UserError("give either run=outputs/NAME or weights=timm, weights=FILE with width=")
    classes: Sequence[str] | None
    if "run" in given:
        from repghost.run import load_run, read_config  # needs Hydra, which weights alone do not

        if "width" in given:
            raise UserError("width= belongs to weights=; a run knows its own")
        directory = Path(given["run"])
        config = read_config(directory)
        model, _ = load_run(directory, given.get("selection", "last"))
        size, fraction = int(config.image_size), float(config.data.crop_fraction)
        classes = None if "class_names" in given else class_names_of(directory)
    else:
        if "selection" in given:
            raise UserError("selection= belongs to run=")
        if "width" not in given:
            raise UserError(f"weights={given['weights']}: say which width, width=1.0")
        model = load_model(given["weights"], _number(given, "width", 1.0))
        size, fraction = 224, 0.875
        classes = class_words() if model.classifier.out_features == 1000 else None
    if "class_names" in given:
        classes = read_class_names(Path(given["class_names"]))
    return Predictor(
        model,
        classes,
        image_size=int(_number(given, "image_size", size)),
        crop_fraction=_number(given, "crop_fraction", fraction),
    )


# --- what is written ------------------------------------------------------------------------------


def as_table(prediction: Prediction) -> str:
    """The name of the file and a line a class."""
    rows = zip(prediction.probabilities, prediction.classes, strict=True)
    return "\n".join([_printable(prediction.file), *(f"  {p:7.2%}  {name}" for p, name in rows)])


def as_json(prediction: Prediction) -> str:
    """One line of JSON."""
    rows = zip(prediction.labels, prediction.classes, prediction.probabilities, strict=True)
    top = [{"label": label, "class": name, "probability": round(p, 6)} for label, name, p in rows]
    return json.dumps({"file": prediction.file, "top": top})


def annotated(image: Image.Image, prediction: Prediction) -> Image.Image:
    """A copy of `image` with the classes in a band below it."""
    text = "\n".join(f"{p:6.1%}  {name}" for p, name in zip(prediction.probabilities, prediction.classes, strict=True))
    font = ImageFont.load_default(max(12, min(image.size) // 24))
    left, top, right, bottom = ImageDraw.Draw(image).multiline_textbbox((0, 0), text, font)
    margin = 8
    width, height = round(right - left) + 2 * margin, round(bottom - top) + 2 * margin
    canvas = Image.new("RGB", (max(image.width, width), image.height + height))
    canvas.paste(image)
    ImageDraw.Draw(canvas).multiline_text((margin - left, image.height + margin - top), text, "white", font)
    return canvas


class PictureFolder:
    """Where annotated copies go: below `out`, by their paths below the folder that all of `paths` lie in.

    Raises UserError where a copy would take the place of an image, or would be found in a folder of images.
    """

    def __init__(self, out: Path, paths: Sequence[str]) -> None:
        self._out = out
        local = [Path(path).absolute() for path in paths if not is_url(path)]
        folders = [path if path.is_dir() else path.parent for path in local]
        self._base = Path(os.path.commonpath(folders)) if folders else Path.cwd()
        for path in local:
            if path.is_dir() and out.resolve().is_relative_to(path.resolve()):
                raise UserError(f"out={out} is in {path}, a folder of the images: name one outside of it")
        originals = {path.resolve() for path in local}
        for path in local:
            if not path.is_dir() and self._target(str(path)).resolve() in originals:
                raise UserError(f"out={out} would overwrite {path}: name another folder")

    def _target(self, file: str) -> Path:
        if is_url(file):
            name = quote(file.partition("://")[2].lstrip("/"), safe="/")
            if ".." in name.split("/"):
                name = name.replace("/", "%2F")
        else:
            name = os.path.relpath(os.path.abspath(file), self._base)
        return self._out / (name if name.lower().endswith(EXTENSIONS) else f"{name}.jpg")

    def write(self, prediction: Prediction) -> Path:
        """Writes the annotated copy in the format of the original."""
        assert prediction.image is not None
        path = self._target(prediction.file)
        path.parent.mkdir(parents=True, exist_ok=True)
        annotated(prediction.image, prediction).save(path)
        return path


def _printable(text: str) -> str:
    """File names need not be valid Unicode."""
    return text.encode("utf-8", "backslashreplace").decode()


# --- the command ----------------------------------------------------------------------------------


def split_arguments(arguments: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """(paths, the KEY=VALUE among the arguments)."""
    paths, given = [], {}
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if equals and key in KEYS:
            given[key] = value
        elif equals and key.isidentifier() and not os.path.exists(argument):
            raise UserError(f"{key} is not a key; the keys are {', '.join(KEYS)}, given as KEY=VALUE")
        else:
            paths.append(argument)
    return paths, given


def _number(given: dict[str, str], key: str, default: float) -> float:
    try:
        return float(given.get(key, default))
    except ValueError:
        raise UserError(f"{key}={given[key]}: a number is needed") from None


def _count(given: dict[str, str], key: str, default: int) -> int:
    if not given.get(key, "1").isdecimal() or int(given.get(key, "1")) < 1:
        raise UserError(f"{key}={given[key]}: a whole number of at least 1 is needed")
    return int(given.get(key, default))


def run(arguments: Sequence[str]) -> int:
    """Predicts as the arguments say and returns the exit code."""
    paths, given = split_arguments(arguments)
    if not paths:
        raise UserError("give images, folders or URLs, and run=outputs/NAME or weights=")
    format = given.get("format", "table")
    if format not in FORMATS:
        raise UserError(f"format={format} is not one of {', '.join(FORMATS)}")
    top, batch_size = _count(given, "top", 5), _count(given, "batch_size", 32)
    predict = predictor(given)
    pictures = PictureFolder(Path(given.get("out", "predictions")), paths) if format == "pictures" else None
    predicted = skipped = 0

    def report(file: str, error: Exception) -> None:
        nonlocal skipped
        skipped += 1
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        tqdm.write(f"{_printable(file)}: skipped: {' '.join(str(reason).split())}", file=sys.stderr)

    with _output(given.get("out") if pictures is None else None) as output:
        predictions = predict(
            image_files(paths), top=top, batch_size=batch_size, keep_images=pictures is not None, on_error=report
        )
        # disable=None: no bar where stderr is no terminal, none either where it would run through the table.
        for prediction in tqdm(predictions, unit=" images", disable=True if output.isatty() else None):
            predicted += 1
            if pictures is not None:
                pictures.write(prediction)
            else:
                print(as_table(prediction) if format == "table" else as_json(prediction), file=output)
    where = f", annotated in {given.get('out', 'predictions')}" if pictures is not None and predicted else ""
    print(f"{predicted:,} images predicted, {skipped:,} skipped{where}", file=sys.stderr)
    return 0 if predicted else 1


def _output(path: str | None) -> Any:
    """A context of the text file to print to: the terminal without a path."""
    if path is None:
        return nullcontext(sys.stdout)
    try:
        return open(path, "w", encoding="utf-8")
    except OSError as error:
        raise UserError(f"out={path}: {error.strerror}") from None


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    try:
        sys.exit(run(sys.argv[1:] if arguments is None else arguments))
    except (UserError, OSError) as error:  # what cannot be written among them
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
