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
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from tqdm import tqdm

from repghost.errors import UserError, run_command
from repghost.files import read_class_names
from repghost.images import EXTENSIONS, image_files, is_url, read_image
from repghost.options import PATH, WHOLE, NetworkOptions, one_of, open_network, option, parse
from repghost.reference import class_words
from repghost.reparameterization import reparameterize
from repghost.run import class_names_of

READERS = min(4, os.cpu_count() or 1)  # threads that decode; PIL and torch release the interpreter's lock


@dataclass
class Options(NetworkOptions):
    """What to predict with, and what to write."""

    class_names: Path | None = option("text file with a name a line, instead of the run's", PATH)
    format: str = option("what is written", one_of("table", "jsonl", "pictures"), "table")
    out: Path | None = option("file, by default the terminal; of pictures a folder, by default predictions", PATH)
    top: int = option("classes of an image", WHOLE, 5)
    batch_size: int = option("images that the network sees at once", WHOLE, 32)


class Prediction(NamedTuple):
    """The likeliest classes of one image, best first: label, name and probability, the softmax over all classes.

    image: where pictures are written, else None.
    """

    file: str
    top: list[tuple[int, str, float]]
    image: Image.Image | None


class Predictor:
    """Predicts with the fused form of a run's or other weights, in float32, on the GPU where there is one."""

    def __init__(self, options: Options) -> None:
        model, preprocessing = open_network(options)
        outputs = model.classifier.out_features
        names: Sequence[str] | None = class_words() if outputs == 1000 and options.run is None else None
        if options.class_names is not None:
            names = read_class_names(options.class_names)
        elif options.run is not None:
            names = class_names_of(options.run)
        self._names = [str(label) for label in range(outputs)] if names is None else names
        if len(self._names) != outputs:
            raise UserError(f"{len(self._names)} class names for weights of {outputs} classes")
        self._options, self._transform = options, preprocessing.transform()
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        # In channels_last the depthwise convolutions are several times as fast on CPUs (benchmarks/latency.py).
        self._model = reparameterize(model).to(self._device).to(memory_format=torch.channels_last)

    def __call__(self, files: Iterable[str], on_error: Callable[[str, Exception], None]) -> Iterator[Prediction]:
        """The predictions of `files` in their order; files that cannot be read go to `on_error`."""
        rest = iter(files)
        with ThreadPoolExecutor(READERS) as pool:
            while batch := list(islice(rest, self._options.batch_size)):
                loaded = []
                for file, reading in [(file, pool.submit(self._load, file)) for file in batch]:
                    try:
                        loaded.append((file, *reading.result()))
                    except Exception as error:  # a decoder may raise anything
                        on_error(file, error)
                tops = self._top([pixels for *_, pixels in loaded]) if loaded else []
                yield from (Prediction(file, top, image) for (file, image, _), top in zip(loaded, tops, strict=True))

    def _load(self, file: str) -> tuple[Image.Image | None, Tensor]:
        image = read_image(file)
        return image if self._options.format == "pictures" else None, self._transform(image)

    @torch.inference_mode()
    def _top(self, images: list[Tensor]) -> list[list[tuple[int, str, float]]]:
        """The likeliest classes of every image, float32 [3, S, S]."""
        logits = self._model(torch.stack(images).to(self._device, memory_format=torch.channels_last))
        values, labels = logits.softmax(1).topk(min(self._options.top, logits.shape[1]), dim=1)
        rows = zip(labels.tolist(), values.tolist(), strict=True)
        return [[(i, self._names[i], p) for i, p in zip(*row, strict=True)] for row in rows]


# --- what is written ------------------------------------------------------------------------------


def as_table(prediction: Prediction) -> str:
    """The name of the file and a line a class."""
    return "\n".join([_printable(prediction.file), *(f"  {p:7.2%}  {name}" for _, name, p in prediction.top)])


def as_json(prediction: Prediction) -> str:
    """One line of JSON."""
    top = [{"label": label, "class": name, "probability": round(p, 6)} for label, name, p in prediction.top]
    return json.dumps({"file": prediction.file, "top": top})


def annotated(image: Image.Image, top: Sequence[tuple[int, str, float]]) -> Image.Image:
    """A copy of the image with its classes in a band below it."""
    text, margin = "\n".join(f"{p:6.1%}  {name}" for _, name, p in top), 8
    font = ImageFont.load_default(max(12, min(image.size) // 24))
    left, upper, right, lower = ImageDraw.Draw(image).multiline_textbbox((0, 0), text, font)
    width, height = round(right - left) + 2 * margin, round(lower - upper) + 2 * margin
    canvas = Image.new("RGB", (max(image.width, width), image.height + height))
    canvas.paste(image)
    ImageDraw.Draw(canvas).multiline_text((margin - left, image.height + margin - upper), text, "white", font)
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
    predictor, pictures = Predictor(options), options.format == "pictures"
    out = options.out or (Path("predictions") if pictures else None)
    picture_name = picture_names(out, paths) if pictures and out else None
    predicted = skipped = 0

    def skip(file: str, error: Exception) -> None:
        nonlocal skipped
        skipped += 1
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        tqdm.write(f"{_printable(file)}: skipped: {' '.join(str(reason).split())}", file=sys.stderr)

    with nullcontext(sys.stdout) if pictures or out is None else open(out, "w", encoding="utf-8") as output:
        # No bar where stderr is no terminal (disable=None), nor where it would run through the table.
        shown = tqdm(predictor(image_files(paths), skip), unit=" images", disable=True if output.isatty() else None)
        for prediction in shown:
            predicted += 1
            if picture_name is not None and prediction.image is not None:
                path = picture_name(prediction.file)
                path.parent.mkdir(parents=True, exist_ok=True)
                annotated(prediction.image, prediction.top).save(path)
            else:
                print(as_table(prediction) if options.format == "table" else as_json(prediction), file=output)
    where = f", annotated in {out}" if pictures and predicted else ""
    print(f"{predicted:,} images predicted, {skipped:,} skipped{where}", file=sys.stderr)
    return 0 if predicted else 1


if __name__ == "__main__":
    sys.exit(run_command(lambda: run(sys.argv[1:])))
