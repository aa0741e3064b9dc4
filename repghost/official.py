"""The eight official training curves, to hold a run against: is it on its way to the paper's accuracy?"""

import csv
from importlib.resources import files

IMAGENET = (1_281_167, 50_000)  # training and validation images
EPOCHS = 300

Row = dict[str, float]


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
