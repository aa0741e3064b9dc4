"""The learning rate against the eight official logs."""

import csv
from importlib.resources import files

import pytest

from repghost.model import WIDTHS
from repghost.training.schedule import learning_rate, linear_scale


@pytest.mark.parametrize("width", WIDTHS)
def test_equals_every_epoch_of_the_official_log(width: float) -> None:
    with (files("repghost") / "reference" / "curves" / f"width_{width}.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) >= 251
    for row in rows:
        rate = learning_rate(int(row["epoch"]), epochs=300, peak=0.6, start=1e-4, final=1e-5, warmup_epochs=5)
        assert f"{rate:.3e}" == row["lr"], row["epoch"]


def test_scales_linearly_with_the_batch() -> None:
    assert linear_scale(0.6, batch_size=256, reference_batch_size=1024) == pytest.approx(0.15)
