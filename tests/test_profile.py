"""profile=true: a table that adds up, a trace that opens, and the same results."""

import csv
import gzip
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from repghost.training.loggers import append_row
from repghost.training.profiler import CLOCKED, SKIPPED, STAGES, StepProfiler

Program = Callable[..., int]


@pytest.mark.usefixtures("no_evaluation")
def test_a_profile_adds_up_opens_and_changes_nothing(train_tiny: Program, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("batch_size=4", "epochs=2")  # 22 steps of two epochs: a validation is between the clocked ones
    assert train_tiny(*options) == 0
    (plain,) = Path("outputs").iterdir()
    assert train_tiny("profile=true", *options) == 0  # the same run, which may change in this
    assert train_tiny("name=seen", "profile=true", *options) == 0
    seen = Path("outputs/seen")
    assert {plain, seen} == set(Path("outputs").iterdir())
    assert (plain / "metrics.csv").read_text() == (seen / "metrics.csv").read_text()
    assert not (plain / "profile.csv").exists()

    with open(seen / "profile.csv", newline="") as file:
        table = {row["stage"]: row for row in csv.DictReader(file)}
    assert tuple(table) == STAGES
    assert sum(float(row["share"]) for row in table.values()) == pytest.approx(1, abs=0.001)
    assert all(float(row["milliseconds_per_step"]) > 0 for row in table.values())
    printed = capsys.readouterr().out
    assert len(re.findall(r"^epoch .*  waited [0-9]+% for data$", printed, re.M)) == 2 * 2
    with open(seen / "timing.csv", newline="") as file:
        waited = [float(row["waited_for_data"]) for row in csv.DictReader(file)]
    assert len(waited) == 2 and all(0 < share < 1 for share in waited)
    assert f"{CLOCKED} steps of" in printed and all(stage in printed for stage in STAGES)

    with gzip.open(seen / "trace.json.gz", "rt") as file:
        names = [event.get("name", "") for event in json.load(file)["traceEvents"]]
    assert set(STAGES[:-1]) <= set(names) and any("convolution_backward" in name for name in names)
    assert not (seen / "trace.json").exists()


def test_a_short_run_leaves_the_steps_that_it_had(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    profiler = StepProfiler(tmp_path)
    for _ in range(SKIPPED + 3):
        profiler.start("[_TrainingEpochLoop].train_dataloader_next")
        profiler.stop("[_TrainingEpochLoop].train_dataloader_next")
    profiler.teardown("fit")
    assert "profile    2 steps" in capsys.readouterr().out
    assert (tmp_path / "profile.csv").exists() and not (tmp_path / "trace.json.gz").exists()


def test_a_table_of_an_earlier_version_gets_the_new_column(tmp_path: Path) -> None:
    table = tmp_path / "timing.csv"
    table.write_text("epoch,train_seconds\n0,1.5\n")
    for epoch in (1, 2):
        append_row(table, {"epoch": epoch, "train_seconds": 2.5, "waited_for_data": 0.25})
    assert table.read_text() == "epoch,train_seconds,waited_for_data\n0,1.5,\n1,2.5,0.25\n2,2.5,0.25\n"
    append_row(tmp_path / "new.csv", {"epoch": 0})
    assert (tmp_path / "new.csv").read_text() == "epoch\n0\n"
