"""profile=true: a table that adds up, a trace that opens, and the same results."""

import csv
import gzip
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from repghost.training.profiler import CLOCKED, SKIPPED, STAGES, StepProfiler

Program = Callable[..., int]


def test_a_profile_adds_up_opens_and_changes_nothing(train_tiny: Program, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("batch_size=4", "epochs=2")  # 22 steps of two epochs: a validation is between the clocked ones
    assert train_tiny(*options) == 0
    (plain,) = Path("outputs").iterdir()
    (plain / "evaluation.json").unlink()
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
