"""The benchmarks run on a corpus that is as they say, measure what train.py does, and say where they ran."""

import csv
import os
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks import common
from benchmarks.common import described, gpu, kernels_of_training, machine
from benchmarks.corpus import corpus
from benchmarks.feeding import training_batches, training_config
from benchmarks.loader import main
from benchmarks.pipelines import PIPELINES
from benchmarks.setting import COMPACT, REGIONS, SHARDS, Setting, can_make_regions, prepare, repeated
from benchmarks.steps import Run, first_steps, our_step, timed_steps
from data.dali_loader import dali_installed
from data.index import load_indexes
from repghost.training.trainer import make_trainer

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
WRITING_FIGURES = {"images_per_second", "seconds_for_10000", "kilobytes", "size_to_original"}
FACTS = {"workers", "repetitions", "images", "kilobytes", "batch_size", "cores"}
NAMES = {"what", "device", "load", "cpu", "python", "torch", "torchvision", "timm", "pillow", "date"}


@pytest.mark.slow
def test_loader_benchmark(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "results" / "loader.csv"
    options = {"images": 24, "batch-size": 4, "seconds": 0.01, "repetitions": 1, "workers": 1}
    main(
        [f"--{name}={value}" for name, value in options.items()]
        + ["--corpus", str(tmp_path / "corpus"), f"--out={out}"]
    )
    with open(out, newline="", encoding="utf-8") as file:
        table = list(csv.DictReader(file))
    writing = WRITING_FIGURES if can_make_regions() else set()
    assert set(table[0]) == PIPELINE_FIGURES | STAGE_FIGURES | writing | FACTS | NAMES
    for row in table:
        kind = row["what"].partition(":")[0]
        kinds = {"stage": STAGE_FIGURES, "augment": {"milliseconds_per_image"}, "write": WRITING_FIGURES}
        figures = FACTS | kinds.get(kind, PIPELINE_FIGURES)
        assert all(float(row[name]) > 0 for name in figures), row
        assert all(row[name] for name in NAMES)
    pipelines = [row["what"] for row in table if not row["what"].startswith(("stage: ", "augment: ", "write: "))]
    kinds = 2 if can_make_regions() else 1
    assert sum(row["what"].startswith("augment: ") for row in table) == 2
    assert pipelines == [
        name
        for name in PIPELINES
        if (dali_installed() or not name.startswith("dali")) and (kinds == 2 or "regions" not in name)
    ]
    assert sum(float(row["share_of_stages"] or 0) for row in table) == pytest.approx(kinds, abs=0.01 * kinds)
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


CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    return prepare(tmp_path_factory.mktemp("corpus"), images=8, batch_size=4, device=CPU)


def test_a_repeated_data_set_has_every_image_as_often(setting: Setting, tmp_path: Path) -> None:
    folder = repeated(setting.folder.parent / SHARDS, 3)
    assert repeated(setting.folder.parent / SHARDS, 3) == folder
    once = np.unique(setting.original.samples)
    index = load_indexes(folder, ["train", "val"], tmp_path)
    train, val = index["train"], index["val"]
    assert len(train) == 3 * len(once) == 24 and len(val) == 8 and len(train.shards) == 3
    for field in ("offset", "size", "crc32", "label"):
        assert (np.sort(train.samples[field]) == np.sort(np.tile(once[field], 3))).all()


def test_kinds_of_shards_are_repeated_apart(setting: Setting, tmp_path: Path) -> None:
    kinds = [SHARDS, COMPACT, *([REGIONS] if can_make_regions() else [])]
    indexes = [load_indexes(repeated(setting.folder.parent / kind, 2), ["train"], tmp_path)["train"] for kind in kinds]
    assert len({index.fingerprint for index in indexes}) == len(kinds)
    if can_make_regions():
        regions = indexes[-1].regions
        assert regions is not None and len(regions.rows) == 16 and (regions.rows["interval"] > 0).all()


def test_our_batches_are_those_of_a_training(setting: Setting, tmp_path: Path) -> None:
    shards = repeated(setting.folder.parent / SHARDS, 1)
    config = training_config(CPU, f"data.root={shards}", f"data.cache={tmp_path}", "batch_size=4", "trainer.threads=1")
    batches = list(islice(training_batches(config), 5))
    decoded = next(training_batches(config, augmented=False))
    assert decoded.images.dtype == torch.uint8 and torch.equal(decoded.uniforms, batches[0].uniforms)
    assert [batch.positions.tolist() for batch in batches] == [[0, 1, 2, 3], [4, 5, 6, 7]] * 2 + [[0, 1, 2, 3]]
    images = batches[0].images
    assert images.shape == (4, 3, 224, 224) and images.dtype == torch.float32 and images.min() < -0.5
    assert not torch.equal(images, batches[2].images), "the next epoch has other crops"


def test_a_step_is_timed_after_warming_up() -> None:
    run = Run(CPU, 0.5, 2, threads=1, workers=1)
    assert first_steps(lambda run: our_step(run, compile="auto"), run) > 0
    assert timed_steps(run, 1) > 0


def test_both_sides_have_the_kernels_of_a_training(tmp_path: Path) -> None:
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    flags: list[tuple[Any, str]] = [(cudnn, "benchmark"), (cudnn, "allow_tf32"), (matmul, "allow_tf32")]
    before, found = [getattr(owner, name) for owner, name in flags], []
    try:
        for set_up in (kernels_of_training, lambda: trainer_in(tmp_path)):
            for owner, name in flags:
                setattr(owner, name, name == "allow_tf32")
            set_up()
            found.append([getattr(owner, name) for owner, name in flags])
    finally:
        for (owner, name), value in zip(flags, before, strict=True):
            setattr(owner, name, value)
    assert found[0] == found[1] == [True, False, False]


def trainer_in(folder: Path) -> None:
    make_trainer(
        accelerator="cpu", devices=1, num_nodes=1, precision="auto", deterministic=False, threads=1, timeout_minutes=1,
        directory=folder,
    )  # fmt: skip


SMI = """#!/bin/sh
case "$1" in
  *compute-apps*) echo "GPU-one, 11"; echo "GPU-two, 12"; echo "GPU-one, $OWN" ;;
  *) echo "GPU-two, 570, 1, 2, 3, 4"; echo "GPU-one, 580.65, 1755, 1980, 2619, 2619" ;;
esac
"""


def test_the_facts_of_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that nvidia-smi tells, of the GPU that torch uses, which need not be its first one."""
    (tmp_path / "nvidia-smi").write_text(SMI)
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("OWN", str(os.getpid()))
    of_torch = SimpleNamespace(name="NVIDIA H100", uuid="one")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: of_torch)
    for name in ("_sleep", "synchronize"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: None)
    facts = gpu(torch.device("cuda"))
    assert facts == {
        "device": "NVIDIA H100",
        "driver": "580.65",
        "sm_mhz": "1755 of 1980",
        "memory_mhz": "2619 of 2619",
        "other_gpu_processes": 1,
    }
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\nexit 9\n")
    assert gpu(torch.device("cuda"))["driver"] == ""


def test_the_machine_and_whether_it_was_idle(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "getloadavg", lambda: (0.1, 9, 9))
    facts = machine(CPU)
    assert facts["device"] == facts["cpu"] == common.processor() != ""
    assert described(facts).endswith("the machine was otherwise idle")
    busy = described(facts | {"load": 3.2, "cores": 2, "other_gpu_processes": 1})
    assert busy.endswith("the machine was NOT otherwise idle: load 3.2 on 2 cores, 1 other process(es) on the GPU")
