"""Says what images show: the likeliest classes of files, folders and URLs, by the fused network.

    python -m repghost.predict IMAGE|FOLDER|URL... run=outputs/NAME [selection=best_ema]
    python -m repghost.predict IMAGE|FOLDER|URL... weights=timm|FILE width=1.0 [class_names=FILE]
                               [format=table|jsonl|pictures] [out=...] [top=5] [batch_size=32]

`jsonl` is a line {"file", "top": [{"label", "class", "probability"}]} an image. `pictures` are copies with the classes
below them in the folder out=, under their paths below the folder that all images have in common. Folders are read
recursively and in sorted order; of what is in them only files with an image's extension count. A path that looks like a
key is written ./KEY=VALUE. Class names are those of the run's data set, or ImageNet's for weights with 1,000 classes.

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
from typing import Annotated, Any
from urllib.parse import quote

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from tqdm import tqdm

from repghost.errors import UserError, run_command
from repghost.files import read_class_names
from repghost.images import EXTENSIONS, image_files, is_url, read_image
from repghost.options import Option, parse
from repghost.reference import class_words
from repghost.reparameterize import reparameterize
from repghost.run import class_names_of
from repghost.source import Source, SourceOptions, open_source

READERS = min(4, os.cpu_count() or 1)  # threads that decode; PIL and torch release the interpreter's lock


@dataclass
class Options(SourceOptions):
    """What to predict with, and what to write."""

    class_names: Annotated[Path | None, Option("text file with a name a line, instead of the run's")] = None
    format: Annotated[str, Option("what is written", ("table", "jsonl", "pictures"))] = "table"
    out: Annotated[
        Path | None, Option("file, by default the terminal; of pictures a folder, by default predictions")
    ] = None
    top: Annotated[int, Option("classes of an image", above=0)] = 5
    batch_size: Annotated[int, Option("images that the network sees at once", above=0)] = 32


@dataclass(frozen=True)
class Prediction:
    """The likeliest classes of one image, best first. probabilities: softmax over all classes, in [0, 1]."""

    file: str
    labels: list[int]
    classes: list[str]
    probabilities: list[float]
    image: Image.Image | None  # where it is kept


class Predictor:
    """Predicts with the fused form of a source's network, in float32, on the GPU where there is one.

    classes: a name for every output; None names them by their numbers.
    """

    def __init__(self, source: Source, classes: Sequence[str] | None = None) -> None:
        outputs = source.model.classifier.out_features
        self._classes = [str(label) for label in range(outputs)] if classes is None else list(classes)
        if len(self._classes) != outputs:
            raise UserError(f"{len(self._classes)} class names for weights of {outputs} classes")
        self._transform = source.preprocessing.transform()
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        # In channels_last the depthwise convolutions are several times as fast on CPUs (benchmarks/latency.py).
        self._model = reparameterize(source.model).to(self._device).to(memory_format=torch.channels_last)

    def __call__(
        self,
        files: Iterable[str],
        on_error: Callable[[str, Exception], None],
        top: int = 5,
        batch_size: int = 32,
        keep_images: bool = False,
    ) -> Iterator[Prediction]:
        """The predictions of `files` in their order; files that cannot be read go to `on_error`."""

        def load(file: str) -> tuple[Image.Image | None, Tensor]:
            image = read_image(file)
            return image if keep_images else None, self._transform(image)

        def readable() -> Iterator[tuple[str, Image.Image | None, Tensor]]:
            for file, result in _readahead(load, files, batch_size + READERS):
                try:
                    yield file, *result()
                except Exception as error:  # a decoder may raise anything
                    on_error(file, error)

        images = readable()
        while batch := list(islice(images, batch_size)):
            probabilities, labels = self._top(torch.stack([pixels for *_, pixels in batch]), top)
            for (file, image, _), p, chosen in zip(batch, probabilities.tolist(), labels.tolist(), strict=True):
                yield Prediction(file, chosen, [self._classes[label] for label in chosen], p, image)

    @torch.inference_mode()
    def _top(self, images: Tensor, top: int) -> tuple[Tensor, Tensor]:
        """float32 [N, 3, S, S] to the largest probabilities and their labels, [N, top] each."""
        logits = self._model(images.to(self._device, memory_format=torch.channels_last))
        values, labels = logits.softmax(1).topk(min(top, logits.shape[1]), dim=1)
        return values.cpu(), labels.cpu()


def _readahead(load: Callable[[str], Any], files: Iterable[str], ahead: int) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Each file with a function that returns, or raises, its `load`; threads load up to `ahead` files in advance."""
    with ThreadPoolExecutor(READERS) as pool:
        waiting: deque[tuple[str, Callable[[], Any]]] = deque()
        try:
            for file in files:
                waiting.append((file, pool.submit(load, file).result))
                if len(waiting) > ahead:
                    yield waiting.popleft()
            yield from waiting
        finally:
            pool.shutdown(cancel_futures=True)


def open_predictor(options: Options) -> Predictor:
    """The predictor of a run or of weights."""
    source, classes = open_source(options), None
    if options.class_names is not None:
        classes = read_class_names(options.class_names)
    elif options.run is not None:
        classes = class_names_of(options.run)
    elif source.model.classifier.out_features == 1000:
        classes = list(class_words())
    return Predictor(source, classes)


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


def annotated(prediction: Prediction) -> Image.Image:
    """A copy of the image with the classes in a band below it."""
    image, margin = prediction.image, 8
    assert image is not None
    text = "\n".join(f"{p:6.1%}  {name}" for p, name in zip(prediction.probabilities, prediction.classes, strict=True))
    font = ImageFont.load_default(max(12, min(image.size) // 24))
    left, top, right, bottom = ImageDraw.Draw(image).multiline_textbbox((0, 0), text, font)
    width, height = round(right - left) + 2 * margin, round(bottom - top) + 2 * margin
    canvas = Image.new("RGB", (max(image.width, width), image.height + height))
    canvas.paste(image)
    ImageDraw.Draw(canvas).multiline_text((margin - left, image.height + margin - top), text, "white", font)
    return canvas


def picture_names(out: Path, paths: Sequence[str]) -> Callable[[str], Path]:
    """A function from an image's file or URL to its picture's path in `out`.

    Raises UserError when one of `paths` lies in `out` or around it, so that no picture takes the place of an image.
    """
    local = [Path(path).absolute() for path in paths if not is_url(path)]
    for path in local:
        folder, inside = out.resolve(), path.resolve()
        if inside.is_relative_to(folder) or (path.is_dir() and folder.is_relative_to(inside)):
            raise UserError(f"out={out}: pictures would overwrite or join {path}; name a folder outside of it")
    base = os.path.commonpath([path if path.is_dir() else path.parent for path in local] or [Path.cwd()])

    def name(file: str) -> Path:
        below = quote(file.partition("://")[2], safe="") if is_url(file) else os.path.relpath(file, base)
        return out / (below if below.lower().endswith(EXTENSIONS) else f"{below}.jpg")

    return name


def _printable(text: str) -> str:
    """File names need not be valid Unicode."""
    return text.encode("utf-8", "backslashreplace").decode()


# --- the command ----------------------------------------------------------------------------------


def run(arguments: Sequence[str]) -> int:
    """Predicts as the arguments say and returns the exit code."""
    paths, options = parse(Options, arguments)
    if not paths:
        raise UserError("give images, folders or URLs, and run=outputs/NAME or weights=")
    predict = open_predictor(options)
    pictures, folder = options.format == "pictures", options.out or Path("predictions")
    picture_name = picture_names(folder, paths) if pictures else None
    predicted = skipped = 0

    def skip(file: str, error: Exception) -> None:
        nonlocal skipped
        skipped += 1
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        tqdm.write(f"{_printable(file)}: skipped: {' '.join(str(reason).split())}", file=sys.stderr)

    text = None if pictures else options.out
    with nullcontext(sys.stdout) if text is None else open(text, "w", encoding="utf-8") as output:
        predictions = predict(image_files(paths), skip, options.top, options.batch_size, pictures)
        # No bar where stderr is no terminal (disable=None), nor where it would run through the table.
        for prediction in tqdm(predictions, unit=" images", disable=True if output.isatty() else None):
            predicted += 1
            if picture_name is not None:
                path = picture_name(prediction.file)
                path.parent.mkdir(parents=True, exist_ok=True)
                annotated(prediction).save(path)
            else:
                print(as_table(prediction) if options.format == "table" else as_json(prediction), file=output)
    where = f", annotated in {folder}" if pictures and predicted else ""
    print(f"{predicted:,} images predicted, {skipped:,} skipped{where}", file=sys.stderr)
    return 0 if predicted else 1


if __name__ == "__main__":
    sys.exit(run_command(lambda: run(sys.argv[1:])))
