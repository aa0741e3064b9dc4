"""What is written of predictions: text on a terminal, lines of JSON, CSV, pictures.

Names of files and classes are written so that they stay on their line, do not steer a terminal and are no formulas to
a spreadsheet. Check: `pytest tests/test_predict.py`.
"""

import csv
import os
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, TextIO
from urllib.parse import quote

from tqdm import tqdm

from repghost.errors import UserError, printable
from repghost.images import EXTENSIONS, is_url
from repghost.predict.predictor import Prediction
from repghost.text import as_cell

LINES = "predictions.jsonl"  # beside the pictures of a detector
SECONDS_BETWEEN_LINES = 10.0  # of progress, where stderr is no terminal


def write_predictions(
    predict: Callable[..., Iterable[Any]],
    images: Sequence[str],
    form: str,
    out: Path | None,
    picture_name: Callable[[str], Path] | None,
    lines: bool,
) -> int:
    """Writes all predictions in a format and returns the exit code: 1 where there are none.

    predict: gives them when it is called with the images and what takes those that cannot be read. out: None for the
    terminal. picture_name: see `picture_names`. lines: whether lines of JSON are written beside pictures.
    """
    predicted = skipped = 0
    said = time.monotonic()

    def skip(file: str, error: Exception) -> None:
        nonlocal skipped
        skipped += 1
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        line = f"{printable(file)}: skipped: {printable(' '.join(reason.split()))}"
        tqdm.write(printable(line, sys.stderr), file=sys.stderr)

    text = out if picture_name is None else (out / LINES if out and lines else None)
    if text:
        text.parent.mkdir(parents=True, exist_ok=True)
    with open(text, "w", encoding="utf-8", newline="") if text else nullcontext(sys.stdout) as output:
        # Neither a bar nor lines where they would run through the table.
        bar, notes = sys.stderr.isatty() and not output.isatty(), not sys.stderr.isatty() and not output.isatty()
        for prediction in tqdm(predict(images, skip), total=len(images), unit=" images", disable=not bar):
            if picture_name is not None:
                path = picture_name(prediction.file)
                path.parent.mkdir(parents=True, exist_ok=True)
                prediction.drawn().save(path)
            if form == "csv":
                write_csv(prediction, output, header=not predicted)
            elif text or form != "pictures":
                print(as_table(prediction, output) if form == "table" else prediction.as_json(), file=output)
            predicted += 1
            if notes and time.monotonic() - said >= SECONDS_BETWEEN_LINES:
                said = time.monotonic()
                print(f"{predicted + skipped:,} of {len(images):,} images", file=sys.stderr, flush=True)
    where = f", annotated in {out}" if picture_name and predicted else ""
    print(printable(f"{predicted:,} images predicted, {skipped:,} skipped{where}"), file=sys.stderr)
    return 0 if predicted else 1


def as_table(prediction: Prediction, output: TextIO | None = None) -> str:
    """The name of the file and a line a class, in the characters that `output` takes."""
    lines = [prediction.file, *(f"  {p:7.2%}  {name}" for _, name, p in prediction.top)]
    return "\n".join(printable(line, output) for line in lines)


def write_csv(prediction: Prediction, output: TextIO, header: bool) -> None:
    """A row: file, then label, class and probability of each rank. header: whether the names of the columns precede."""
    writer = csv.writer(output, lineterminator="\n")
    if header:
        ranks = range(1, len(prediction.top) + 1)
        columns = [f"{name}_{rank}" for rank in ranks for name in ("label", "class", "probability")]
        writer.writerow(["file", *columns])
    cells = [(label, printable(as_cell(name), output), round(p, 6)) for label, name, p in prediction.top]
    writer.writerow([printable(as_cell(prediction.file), output), *(cell for row in cells for cell in row)])


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
