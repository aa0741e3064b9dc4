"""The loader benchmark runs, on a corpus that is as it says, and writes every figure of every pipeline."""

import csv
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks.corpus import corpus
from benchmarks.loader import PIPELINES, main
from data.dali_loader import dali_installed

PIPELINE_FIGURES = {
    "images_per_second",
    "lowest",
    "highest",
    "ratio_to_timm",
    "share_of_decode_limit",
    "images_per_core_second",
    "ratio_to_timm_per_core_second",
    "share_of_decode_limit_per_core_second",
}
STAGE_FIGURES = {"milliseconds_per_image", "share_of_stages"}
FACTS = {"workers", "repetitions", "images", "kilobytes", "batch_size", "cores"}
NAMES = {"what", "cpu", "python", "torch", "torchvision", "timm", "pillow", "date"}


def test_loader_benchmark(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "results" / "loader.csv"
    options = {"images": 24, "batch-size": 4, "seconds": 0.01, "repetitions": 1, "workers": 1}
    main(
        [f"--{name}={value}" for name, value in options.items()]
        + ["--corpus", str(tmp_path / "corpus"), f"--out={out}"]
    )
    with open(out, newline="", encoding="utf-8") as file:
        table = list(csv.DictReader(file))
    assert set(table[0]) == PIPELINE_FIGURES | STAGE_FIGURES | FACTS | NAMES
    for row in table:
        kind = row["what"].partition(":")[0]
        figures = FACTS | {"stage": STAGE_FIGURES, "augment": {"milliseconds_per_image"}}.get(kind, PIPELINE_FIGURES)
        assert all(float(row[name]) > 0 for name in figures), row
        assert all(row[name] for name in NAMES)
    pipelines = [row["what"] for row in table if not row["what"].startswith(("stage: ", "augment: "))]
    assert sum(row["what"].startswith("augment: ") for row in table) == 2
    assert pipelines == [name for name in PIPELINES if dali_installed() or not name.startswith("dali")]
    assert sum(float(row["share_of_stages"] or 0) for row in table) == pytest.approx(1, abs=0.01)
    printed = capsys.readouterr().out
    assert all(row["what"] in printed for row in table)


def test_corpus_is_like_imagenet_and_made_once(tmp_path: Path) -> None:
    folder = corpus(tmp_path, 40)
    files = sorted(folder.rglob("*.jpg"))
    assert len(files) == 40 and len({file.parent for file in files}) == 10
    sizes = np.array([Image.open(file).size for file in files])
    assert (sizes.mean(axis=0) > 350).all() and (sizes.mean(axis=0) < 550).all()
    assert 85_000 < np.mean([file.stat().st_size for file in files]) < 110_000
    before = [file.stat().st_mtime_ns for file in files]
    assert corpus(tmp_path, 40) == folder and [file.stat().st_mtime_ns for file in files] == before
