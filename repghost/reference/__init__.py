"""Published facts about ImageNet, RepGhostNet and its peers. No other module opens the files of this folder.

Importing it needs neither torchvision nor Lightning. Check: `pytest tests/test_results.py tests/test_config.py`.
"""

import csv
from functools import cache
from importlib.resources import files

from repghost.errors import UserError

IMAGENET = (1_281_167, 50_000)  # training and validation images
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of red, green and blue in [0, 1]
EPOCHS = 300  # of the official runs
Row = dict[str, float]

# The test sets that conf/data has files for, and their columns in timm's published results.
PUBLISHED = {
    "imagenet_v2": "v2_matched",
    "imagenet_real": "real",
    "imagenet_a": "a",
    "imagenet_r": "r",
    "imagenet_sketch": "sketch",
}
_FOLDER = files(__name__)


@cache
def synsets() -> tuple[str, ...]:
    """The WordNet ids of ImageNet's 1,000 classes in label order."""
    return tuple((_FOLDER / "imagenet_synsets.txt").read_text().split())


@cache
def class_words() -> tuple[str, ...]:
    """The names of ImageNet's 1,000 classes in label order, all different: torchvision's list."""
    from torchvision.models import MobileNet_V2_Weights  # slow to import, and not a dependency of the network

    return tuple(MobileNet_V2_Weights.IMAGENET1K_V1.meta["categories"])


def published() -> list[dict[str, str]]:
    """The rows of the paper's table, one a width, with the figures of the official logs."""
    return _read("paper.csv")


def timm_name(width: float) -> str:
    """timm's name of the published weights of `width`. Raises UserError for a width that is not published."""
    names = {float(row["width"]): row["timm_name"] for row in published()}
    if width not in names:
        raise UserError(f"width={width:g} is not published, only {', '.join(f'{w:g}' for w in names)}")
    return names[width]


def peers() -> list[dict[str, str]]:
    """Networks, their family and timm's published figures."""
    return _read("peers.csv")


def published_detectors() -> list[dict[str, str]]:
    """torchvision's detectors, their backbones, and their figures on COCO with the weights that `source` names."""
    return _read("detectors.csv")


def published_accuracy(name: str, width: float) -> tuple[float, float] | None:
    """Top-1 and Top-5 in percent that timm measured on the test set `name`; None if `width` is not published."""
    for row in _read("timm_results.csv"):
        if float(row["width"]) == width:
            return float(row[f"{PUBLISHED[name]}_top1"]), float(row[f"{PUBLISHED[name]}_top5"])
    return None


def reference_curve(width: float, epochs: int, images: tuple[int, int]) -> dict[int, Row] | None:
    """The official run of `width`: epoch to a row with the columns of metrics.csv, less those the official log lacks.

    images: numbers of training and validation images. None for another data set, number of epochs or width than the
    official ones, since a comparison at the same epoch would then mean something else.
    """
    name = f"curves/width_{float(width)}.csv"
    if epochs != EPOCHS or images != IMAGENET or not (_FOLDER / name).is_file():
        return None
    rows = [{key: float(value) for key, value in row.items() if value} for row in _read(name)]
    return {int(row["epoch"]): row for row in rows}


def standing(row: Row, curve: dict[int, Row]) -> str:
    """How many points the run's row is ahead of (+) or behind (-) the official run at the same epoch."""
    official = curve.get(int(row["epoch"]))
    if official is None:
        return "the official log ended before this epoch"
    pairs = {"raw": "val_top1", "EMA": "ema_top1"}
    parts = [f"{name} {row[key] - official[key]:+.2f}" for name, key in pairs.items() if key in official]
    return f"against the official run {', '.join(parts)} points"


def _read(name: str) -> list[dict[str, str]]:
    with (_FOLDER / name).open() as file:
        return list(csv.DictReader(file))
