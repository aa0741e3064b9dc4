"""What is written of predictions: text on a terminal, lines of JSON, CSV, pictures.

Names of files and classes are written so that they stay on their line, do not steer a terminal and are no formulas to
a spreadsheet. Check: `pytest tests/test_predict.py`.
"""

import csv
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, TextIO
from urllib.parse import quote

from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from repghost.errors import UserError, printable
from repghost.images import EXTENSIONS, is_url
from repghost.predict.predictor import Prediction
from repghost.text import as_cell

SECONDS_BETWEEN_LINES = 10.0  # of progress, where stderr is no terminal

Predict = Callable[[Callable[[str, Exception], None]], Iterable[Any]]


def write_predictions(
    predict: Predict,
    total: int,
    form: str,
    out: Path | None,
    picture_name: Callable[[str], Path] | None,
    draw: Callable[[Any], Image.Image] | None = None,
    line: Callable[[Any], str] | None = None,
) -> int:
    """Writes all predictions in a format and returns the exit code: 1 where there are none.

    predict: gives them when it is called with what takes the images that cannot be read. total: number of images. out:
    None for the terminal. picture_name: see `picture_names`. draw, line: picture and line of JSON of a prediction that
    is no `Prediction`.
    """
    draw, line = draw or annotated, line or as_json
    predicted = skipped = 0
    said = time.monotonic()

    def skip(file: str, error: Exception) -> None:
        nonlocal skipped
        skipped += 1
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        line = f"{printable(file)}: skipped: {printable(' '.join(reason.split()))}"
        tqdm.write(printable(line, sys.stderr), file=sys.stderr)

    to_file = out is not None and picture_name is None
    if to_file and out:
        out.parent.mkdir(parents=True, exist_ok=True)
    with open(out, "w", encoding="utf-8", newline="") if to_file and out else nullcontext(sys.stdout) as output:
        # Neither a bar nor lines where they would run through the table.
        bar, lines = sys.stderr.isatty() and not output.isatty(), not sys.stderr.isatty() and not output.isatty()
        for prediction in tqdm(predict(skip), total=total, unit=" images", disable=not bar):
            if picture_name is not None and prediction.image is not None:
                path = picture_name(prediction.file)
                path.parent.mkdir(parents=True, exist_ok=True)
                draw(prediction).save(path)
            elif form == "csv":
                write_csv(prediction, output, header=not predicted)
            else:
                print(as_table(prediction, output) if form == "table" else line(prediction), file=output)
            predicted += 1
            if lines and time.monotonic() - said >= SECONDS_BETWEEN_LINES:
                said = time.monotonic()
                print(f"{predicted + skipped:,} of {total:,} images", file=sys.stderr, flush=True)
    where = f", annotated in {out}" if picture_name and predicted else ""
    print(printable(f"{predicted:,} images predicted, {skipped:,} skipped{where}"), file=sys.stderr)
    return 0 if predicted else 1


def as_table(prediction: Prediction, output: TextIO | None = None) -> str:
    """The name of the file and a line a class, in the characters that `output` takes."""
    lines = [prediction.file, *(f"  {p:7.2%}  {name}" for _, name, p in prediction.top)]
    return "\n".join(printable(line, output) for line in lines)


def as_json(prediction: Prediction) -> str:
    """One line of JSON in ASCII."""
    top = [{"label": label, "class": name, "probability": round(p, 6)} for label, name, p in prediction.top]
    return json.dumps({"file": prediction.file, "top": top})


def write_csv(prediction: Prediction, output: TextIO, header: bool) -> None:
    """A row: file, then label, class and probability of each rank. header: whether the names of the columns precede."""
    writer = csv.writer(output, lineterminator="\n")
    if header:
        ranks = range(1, len(prediction.top) + 1)
        columns = [f"{name}_{rank}" for rank in ranks for name in ("label", "class", "probability")]
        writer.writerow(["file", *columns])
    cells = [(label, printable(as_cell(name), output), round(p, 6)) for label, name, p in prediction.top]
    writer.writerow([printable(as_cell(prediction.file), output), *(cell for row in cells for cell in row)])


def annotated(prediction: Prediction) -> Image.Image:
    """A copy of the image with its classes in a band below it."""
    image = prediction.image
    assert image is not None
    text, margin = "\n".join(f"{p:6.1%}  {printable(name)}" for _, name, p in prediction.top), 8
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
