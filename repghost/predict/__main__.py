"""Says what images show: the likeliest classes of files, folders and URLs, by the fused network.

    python -m repghost.predict IMAGE|FOLDER|URL... run=outputs/NAME [selection=best_ema]
    python -m repghost.predict IMAGE|FOLDER|URL... weights=FILE|FOLDER|model.onnx|model.pte
    python -m repghost.predict IMAGE|FOLDER|URL... weights=timm width=1.0
                               [format=table|csv|jsonl|pictures] [out=...] [class_names=FILE] [top=5] [batch_size=32]
    python -m repghost.predict IMAGE|FOLDER|URL... run=RUN_OF_A_DETECTOR [format=pictures|jsonl] [out=...] [score=0.5]

`csv` is a row an image: file, then label, class and probability of each rank. `jsonl` is a line {"file", "top":
[{"label", "class", "probability"}]} an image. `pictures` are copies with the classes below them in the folder out=,
under their paths below the folder that all images have in common. Folders are read recursively and in sorted order; of
what is in them only files with an image's extension count. A path that looks like a key is written ./KEY=VALUE. Image
size, crop, normalization and class names are those of the training, as the weights' file tells them; of files that do
not, ImageNet's.

The objects that a detector (task=detection) finds are drawn into copies of the images, in the folder out=, with the
file predictions.jsonl beside them: a line {"file", "boxes": [[left, top, right, bottom]], "labels", "scores"} an image,
and "masks", COCO's RLEs, where the detector has them. `jsonl` is these lines alone.

A file that cannot be read or decoded is one line on stderr and is skipped. Exit codes: 0; 1 when no image could be
predicted; 2 for a mistake in the command. The pixels are those of evaluation (see `repghost.images`), so a photograph
that is stored on its side stays on its side. Check: `pytest tests/test_predict.py`.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from repghost.errors import UserError, run_command
from repghost.files import require_writable
from repghost.options import PATH, SHARE, WHOLE, NetworkOptions, one_of, option, parse

_OF_CLASSIFIERS = {"class_names", "top", "batch_size", "image_size", "crop_fraction"}


@dataclass
class Options(NetworkOptions):
    """What to predict with, and what to write."""

    class_names: Path | None = option("text file with a name a line, instead of those of the training", PATH)
    format: str = option(
        "what is written, by default table, of a detector pictures", one_of("table", "csv", "jsonl", "pictures"), ""
    )
    out: Path | None = option("file, by default the terminal; of pictures a folder, by default predictions", PATH)
    top: int = option("classes of an image", WHOLE, 5)
    batch_size: int = option("images that the network sees at once", WHOLE, 32)
    score: float = option("least score of the objects of a detector", SHARE, 0.5)


def run(arguments: Sequence[str]) -> int:
    """Predicts as the arguments say and returns the exit code."""
    paths, options = parse(Options, arguments)
    if not paths:
        raise UserError("give images, folders or URLs, and run=outputs/NAME or weights=")
    options.require_network()
    form = options.format or ("pictures" if options.of_detector else "table")
    kind, unread = ("detector", _OF_CLASSIFIERS) if options.of_detector else ("classifier", {"score"})
    if given := sorted(unread & {argument.partition("=")[0] for argument in arguments}):
        raise UserError(f"{given[0]}: a {kind} does not read this key")
    if options.of_detector and form not in ("pictures", "jsonl"):
        raise UserError(f"format={form}: what a detector finds is written as pictures or jsonl")
    pictures = form == "pictures"
    out = options.out or (Path("predictions") if pictures else None)
    if out is not None:
        require_writable(out / "picture" if pictures else out, "out")

    # What takes seconds to import: the command is understood by now.
    from repghost.images import image_files
    from repghost.machine import limit_threads
    from repghost.networks import open_network
    from repghost.predict.output import picture_names, write_predictions
    from repghost.predict.predictor import Predictor

    limit_threads()
    images = list(image_files(paths))
    picture_name = picture_names(out, paths) if pictures and out else None
    if options.run is not None and options.of_detector:
        from repghost.predict.objects import finder

        predict = finder(options.run, options.selection or "last", options.score)
    else:
        network = open_network(options)
        predict = Predictor(network, options.top, options.batch_size, options.class_names, keep_images=pictures)
    return write_predictions(predict, images, form, out, picture_name, lines=options.of_detector)


if __name__ == "__main__":
    sys.exit(run_command(lambda: run(sys.argv[1:])))
