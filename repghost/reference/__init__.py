"""What is published about RepGhostNet and its peers: the CSV files of this folder, each read here and nowhere else."""

import csv
from functools import cache
from importlib.resources import files

from repghost.errors import UserError

IMAGENET = (1_281_167, 50_000)  # training and validation images
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of red, green and blue in [0, 1]
EPOCHS = 300
Row = dict[str, float]

# The sets that conf/data has files for, and their columns in timm's published results.
PUBLISHED = {
    "imagenet_v2": "v2_matched",
    "imagenet_real": "real",
    "imagenet_a": "a",
    "imagenet_r": "r",
    "imagenet_sketch": "sketch",
}


@cache
def synsets() -> tuple[str, ...]:
    """The WordNet ids of ImageNet's 1,000 classes in label order."""
    return tuple((files("repghost") / "reference" / "imagenet_synsets.txt").read_text().split())


@cache
def class_words() -> tuple[str, ...]:
    """The names of ImageNet's 1,000 classes in label order, all different: torchvision's list."""
    from torchvision.models import MobileNet_V2_Weights

    return tuple(MobileNet_V2_Weights.IMAGENET1K_V1.meta["categories"])


def published_accuracy(name: str, width: float) -> tuple[float, float] | None:
    """Top-1 and Top-5 in percent that timm measured with the published weights of `width`; None for another width."""
    with (files("repghost") / "reference" / "timm_results.csv").open() as file:
        rows = {float(row["width"]): row for row in csv.DictReader(file)}
    if width not in rows:
        return None
    return float(rows[width][f"{PUBLISHED[name]}_top1"]), float(rows[width][f"{PUBLISHED[name]}_top5"])


def published() -> list[dict[str, str]]:
    """The rows of the paper's table, one a width, with the figures of the official logs."""
    with (files("repghost") / "reference" / "paper.csv").open() as file:
        return list(csv.DictReader(file))


def peers() -> list[dict[str, str]]:
    """The rows of reference/peers.csv: networks, their family and timm's published figures."""
    with (files("repghost") / "reference" / "peers.csv").open() as file:
        return list(csv.DictReader(file))


def timm_name(width: float) -> str:
    """timm's name of the published weights of `width`. Raises UserError for a width that is not published."""
    names = {float(row["width"]): row["timm_name"] for row in published()}
    if width not in names:
        raise UserError(f"width={width:g} is not published, only {', '.join(f'{w:g}' for w in names)}")
    return names[width]


def official_curve(width: float, epochs: int, images: tuple[int, int]) -> dict[int, Row] | None:
    """The official run of `width`, a row per epoch with the columns of metrics.csv; None where none can be compared.

    That is for another width, data set (`images`: counts of training and validation images) or number of epochs, at
    which a curve at the same epoch means something else. A row lacks the values that the official log lacks.
    """
    path = files("repghost") / "reference" / "curves" / f"width_{float(width):g}.csv"
    if float(width).is_integer():
        path = files("repghost") / "reference" / "curves" / f"width_{float(width):.1f}.csv"
    if epochs != EPOCHS or images != IMAGENET or not path.is_file():
        return None
    with path.open() as file:
        rows = [{key: float(value) for key, value in row.items() if value} for row in csv.DictReader(file)]
    return {int(row["epoch"]): row for row in rows}


def standing(row: Row, curve: dict[int, Row]) -> str:
    """How many points the run's row is ahead of (+) or behind (-) the official run at the same epoch."""
    official = curve.get(int(row["epoch"]))
    if official is None:
        return "official log ended before"
    parts = [
        f"{name} {row[column] - official[column]:+.2f}"
        for name, column in (("raw", "val_top1"), ("EMA", "ema_top1"))
        if column in official
    ]
    return f"against the official run {', '.join(parts)} points"
