"""The torch loader: pixels against PIL, whole batches, faults."""

import gc
import io
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import current_process, get_context
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from images import encoded, patch
from PIL import Image
from torch.utils.data._utils.signal_handling import _remove_worker_pids

from data import shard_data
from data.crops import CenterCrops, RandomCrops
from data.image_sizes import ImageSizes
from data.index import Index, load_index
from data.loader_plan import plan_loader
from data.reader import BadImage, EpochLoader, LoaderOptions, ShardReader, decode, resize
from data.sampling import NUM_UNIFORMS, RankSampler
from data.tars import SAMPLE
from data.torch_loader import SEMAPHORES, TorchLoader, batch_bytes
from repghost import machine
from repghost.errors import UserError
from repghost.training.classifier import ImageClassifier

SCALE, RATIO = (0.08, 1.0), (3 / 4, 4 / 3)


@pytest.fixture(scope="module")
def index(shards: Path) -> Index:
    return load_index(shards, "train", shards)


def train_loader(
    index: Index, rows: int = 8, workers: int = 0, start: tuple[int, int] = (0, 0), **options: int
) -> TorchLoader:
    crops = RandomCrops(
        index, RankSampler(len(index), rows, **options), ImageSizes(32), seed=0, scale=SCALE, ratio=RATIO
    )
    return TorchLoader(crops, LoaderOptions(workers=workers, prefetch=2, start=lambda: start))


def eval_loader(index: Index, rows: int, size: int = 32, rank: int = 0, ranks: int = 1) -> TorchLoader:
    sampler = RankSampler(len(index), rows, rank, ranks, drop_last=False)
    return TorchLoader(CenterCrops(index, sampler, size, crop_fraction=0.875), LoaderOptions(workers=0, prefetch=2))


def pil(index: Index, row: int) -> Image.Image:
    return Image.open(io.BytesIO(ShardReader(index).read(row))).convert("RGB")


def pixels(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).int()


def test_a_loader_that_is_dropped_leaves_no_shard_open(index: Index) -> None:
    def still_open() -> list[str]:
        links = (f"/proc/self/fd/{descriptor}" for descriptor in os.listdir("/proc/self/fd"))
        return [path for path in map(os.path.realpath, links) if path in map(os.path.realpath, index.shards)]

    gc.collect()  # loaders of other tests, of the same shards
    before = still_open()
    loader = eval_loader(index, 8)
    list(loader)
    assert len(still_open()) > len(before)
    del loader
    gc.collect()
    assert still_open() == before


def test_training_crops_equal_pil(index: Index) -> None:
    loader = train_loader(index)
    batch, _ = loader.dataset[(3, 1)]  # type: ignore[index]
    crops = loader.dataset.crops(3, 1)  # type: ignore[attr-defined]
    for row, sample in enumerate(crops.samples):
        top, left, height, width = crops.windows[row].tolist()
        resample = Image.Resampling.BICUBIC if crops.bicubic[row] else Image.Resampling.BILINEAR
        crop = pil(index, sample).crop((left, top, left + width, top + height)).resize((32, 32), resample)
        difference = (batch[0][row].int() - pixels(crop)).abs()
        assert (difference <= 1).float().mean() >= 0.999
        assert batch[1][row] == index.samples["label"][sample]
    assert crops.bicubic.any() and not crops.bicubic.all()


def test_evaluation_equals_pil_resize_and_centre_crop(index: Index) -> None:
    images, labels, *_ = next(iter(eval_loader(index, len(index))))
    for row in range(len(index)):
        image = pil(index, row)
        shorter = 36  # int(32 / 0.875)
        width, height = (side * shorter // min(image.size) for side in image.size)
        left, top = round((width - 32) / 2), round((height - 32) / 2)
        resized = image.resize((width, height), Image.Resampling.BICUBIC)
        crop = resized.crop((left, top, left + 32, top + 32))
        assert ((images[row].int() - pixels(crop)).abs() <= 1).float().mean() >= 0.999
    assert labels.tolist() == index.samples["label"].tolist()


@pytest.mark.parametrize("rows", [1, 7, 16, 100])
@pytest.mark.parametrize("ranks", [1, 3])
def test_validation_has_each_image_once_in_whole_batches(index: Index, rows: int, ranks: int) -> None:
    positions = []
    for rank in range(ranks):
        loader = eval_loader(index, rows, rank=rank, ranks=ranks)
        batches = list(loader)
        assert len(batches) == len(loader)
        for images, labels, places, uniforms, *_ in batches:
            assert images.shape == (rows, 3, 32, 32) and images.dtype == torch.uint8
            assert labels.shape == places.shape == (rows,) and uniforms.shape == (rows, NUM_UNIFORMS)
            positions += places[labels >= 0].tolist()
            assert (images[labels < 0] == 0).all()
    assert sorted(positions) == list(range(len(index)))


def test_batches_do_not_depend_on_workers_or_on_where_the_epoch_is_entered(index: Index) -> None:
    whole = list(train_loader(index, start=(2, 0)))
    assert len(whole) == 45 // 8
    for workers, first in ((0, 3), (1, 2), (2, 0), (3, 4)):
        part = list(train_loader(index, workers=workers, start=(2, first)))
        assert len(part) == len(whole) - first
        for mine, theirs in zip(part, whole[first:], strict=True):
            assert all(torch.equal(a, b) for a, b in zip(mine[:4], theirs[:4], strict=True))


def test_a_position_past_the_epoch_is_the_next_one(index: Index) -> None:
    loader = train_loader(index, start=(2, 45 // 8))
    assert len(list(loader)) == len(loader) == 45 // 8


def variants() -> dict[str, bytes]:
    """Files that are named JPEG and are not the plain kind."""
    image = patch(3, 60, 90)
    found = {
        "grey": encoded(image.convert("L")),
        "png": encoded(image, "png"),
        "palette": encoded(image.convert("P"), "png"),
        "transparent": encoded(image.convert("RGBA"), "png"),
        "webp": encoded(image, "webp"),
        "cmyk": encoded(image.convert("CMYK")),
        "row": encoded(image.resize((50, 1))),
    }
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation
    for name, options in {
        "progressive": {"progressive": True},
        "444": {"subsampling": 0},
        "420": {"subsampling": 2},
        "422": {"subsampling": 1},
        "rotated": {"exif": exif},
    }.items():
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=90, **options)
        found[name] = buffer.getvalue()
    return found


@pytest.mark.parametrize("name", variants())
def test_decoding_equals_pil(name: str) -> None:
    content = variants()[name]
    expected = pixels(Image.open(io.BytesIO(content)).convert("RGB"))
    assert torch.equal(decode(content).int(), expected)


def test_changed_bytes_are_found_and_named(index: Index, tmp_path: Path) -> None:
    copies = []
    for shard in index.shards:
        copy = tmp_path / Path(shard).name
        copy.write_bytes(Path(shard).read_bytes())
        copies.append(str(copy))
    row = 20
    sample = index.samples[row]
    with open(copies[sample["shard"]], "r+b") as file:
        file.seek(int(sample["offset"]) + int(sample["size"]) // 2)
        byte = file.read(1)
        file.seek(-1, io.SEEK_CUR)
        file.write(bytes([byte[0] ^ 1]))
    damaged = Index(index.split, tuple(copies), index.samples, index.classes)
    with pytest.raises(BadImage, match="checksum differs") as error:
        ShardReader(damaged).read(row)
    assert index.name(row).split()[-1] in str(error.value)
    with pytest.raises(BadImage, match="skip_budget"):
        list(eval_loader(damaged, 16))


def test_a_bad_image_within_the_budget_is_masked(
    index: Index, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    samples = index.samples.copy()
    samples["crc32"][7] ^= 1
    damaged = Index(index.split, index.shards, samples, index.classes)
    crops = RandomCrops(damaged, RankSampler(45, 9), ImageSizes(32), seed=0, scale=SCALE, ratio=RATIO)
    loader = TorchLoader(crops, LoaderOptions(workers=0, prefetch=2, skip_bad=1))
    labels = torch.cat([batch[1] for batch in loader])
    assert (labels < 0).sum() == 1
    assert index.name(7) in caplog.text


def test_the_private_parts_of_torch_that_are_used_exist(index: Index) -> None:
    """What data.torch_loader touches when a worker was killed."""
    loader = train_loader(index, workers=1)
    batches = iter(loader)
    next(batches)
    for name in ("_worker_pids_set", "_shutdown", "_workers", "_shutdown_workers"):
        assert hasattr(loader._iterator, name), name
    assert callable(_remove_worker_pids)


def test_a_long_tmpdir_is_no_hindrance(index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    long = tmp_path / "of_a_job" / ("x" * 120)
    long.mkdir(parents=True)
    monkeypatch.setattr(tempfile, "tempdir", str(long))
    monkeypatch.delitem(current_process()._config, "tempdir", raising=False)  # type: ignore[attr-defined]
    assert len(list(train_loader(index, workers=1))) == 45 // 8
    assert tempfile.gettempdir() == str(long)


def test_a_small_shared_memory_is_named_before_workers_start(index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = SimpleNamespace(free=64_000, total=10**9)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(UserError, match=r"^/dev/shm: 0\.1 MB are free, 1 x 2 workers need 1\.2"):
        list(train_loader(index, workers=2))
    assert len(list(train_loader(index))) == 5, "without workers nothing is shared"
    crops = train_loader(index).dataset.crops  # type: ignore[attr-defined]
    usage.free = usage.total = SEMAPHORES + 5 * batch_bytes(crops)  # all batches of the epoch
    assert len(list(train_loader(index, workers=2))) == 5
    with pytest.raises(UserError, match=r"4 x 2 workers need"):
        list(TorchLoader(crops, LoaderOptions(workers=2, prefetch=2, ranks=4)))


def shares(rank: int, store: Path) -> list[int]:
    """cpus_per_rank of one of two ranks, for cores that it is bound to and quotas."""
    dist.init_process_group("gloo", f"file://{store}", rank=rank, world_size=2)
    together, apart = list(range(7)), [rank, rank + 2, rank + 4]
    found = []
    with pytest.MonkeyPatch.context() as patched:
        for bound, quota in ((together, None), (together, 4), (together, 1), (apart, None), (apart, 8), (apart, 4)):
            patched.setattr(machine, "bound_to", lambda bound=bound: bound)
            patched.setattr(machine, "cpu_quota", lambda quota=quota: quota)
            found.append(machine.cpus_per_rank())
    return found


def test_the_ranks_of_a_machine_share_its_cores(tmp_path: Path) -> None:
    with ProcessPoolExecutor(2, get_context("fork")) as pool:  # new processes would import everything first
        assert list(pool.map(shares, range(2), [tmp_path / "store"] * 2)) == [[3, 2, 1, 3, 3, 2]] * 2


ON_GPU = {"on_gpu": True, "has_dali": True}
PLANS: dict[str, tuple[tuple[str, int | str, int | str], dict[str, Any], str]] = {
    "a node of GPUs": (("auto", "auto", "auto"), {**ON_GPU, "cores": 16}, "dali, 13 threads and 2 readers"),
    "few cores": (("auto", "auto", "auto"), {**ON_GPU, "cores": 4}, "dali, 2 threads and 1 reader"),
    "two cores": (("auto", "auto", "auto"), {**ON_GPU, "cores": 2}, "dali, 1 thread and 1 reader"),
    "one core": (("auto", "auto", "auto"), {**ON_GPU, "cores": 1}, "dali, 1 thread"),
    "as said": (("auto", 3, 5), {**ON_GPU, "cores": 16}, "dali, 3 threads and 5 readers"),
    "no readers": (("dali", "auto", 0), {**ON_GPU, "cores": 16}, "dali, 15 threads"),
    "torch": (("torch", "auto", "auto"), {**ON_GPU, "cores": 16}, "torch, 16 workers"),
    "without the package": (("auto", "auto", 3), {**ON_GPU, "has_dali": False, "cores": 2}, "torch, 2 workers"),
    "a CPU": (("auto", "auto", "auto"), {"on_gpu": False, "has_dali": True, "cores": 8}, "dali, 8 threads"),
    "a CPU with readers": (
        ("auto", 1, 1),
        {"on_gpu": False, "has_dali": True, "cores": 8},
        "dali, 1 thread and 1 reader",
    ),
}


@pytest.mark.parametrize("case", PLANS)
def test_the_plan_of_a_machine(case: str) -> None:
    (kind, workers, readers), facts, said = PLANS[case]
    assert str(plan_loader(kind, workers, readers, 2, **facts)) == f"{said} per rank, prefetch 2"


def test_without_workers_nothing_runs_beside_the_training() -> None:
    plan = plan_loader("auto", 0, "auto", 2, **ON_GPU, cores=16)  # type: ignore[arg-type]
    assert str(plan) == "torch, in the training process"


def test_a_run_on_one_of_several_gpus_leaves_cores_to_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard_data, "cpus_per_rank", lambda: 64)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert shard_data.cores_of_a_rank(on_gpu=True, ranks=1) == 16
    assert shard_data.cores_of_a_rank(on_gpu=True, ranks=4) == 64
    assert shard_data.cores_of_a_rank(on_gpu=False, ranks=1) == 64


def test_the_time_until_batches_arrive_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])

    class Arriving(EpochLoader[int]):
        options, seconds_waited = LoaderOptions(workers=0, prefetch=1), 1.0

        def __len__(self) -> int:
            return 2

        def _batches(self, epoch: int, first: int) -> Iterator[tuple[int, list[str]]]:
            for seconds in (2, 3):
                clock[0] += seconds
                yield seconds, []
            clock[0] += 4  # nothing more: that, too, takes its time

    loader = Arriving()
    for _ in loader:
        clock[0] += 100  # a step
    assert loader.seconds_waited == 1 + 2 + 3 + 4


@pytest.mark.usefixtures("no_evaluation")
@pytest.mark.parametrize("quota", [1, 2])
def test_workers_and_threads_are_as_many_as_cores(
    quota: int, train_tiny: Callable[..., int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "bound_to", lambda: list(range(128)))
    monkeypatch.setattr(machine, "cpu_quota", lambda: quota)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    found = []
    step = ImageClassifier.training_step

    def spy(self: ImageClassifier, *batch: Any) -> Any:
        found.append((self.trainer.train_dataloader.num_workers, torch.get_num_threads()))
        return step(self, *batch)

    monkeypatch.setattr(ImageClassifier, "training_step", spy)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert train_tiny("data.workers=auto", "loader=torch", "epochs=1") == 0
    finally:
        torch.set_num_threads(before)
    assert set(found) == {(quota, quota)}


@given(
    height=st.integers(1, 300), width=st.integers(1, 300), image_size=st.integers(32, 96),
    fraction=st.sampled_from([0.5, 0.7, 0.875, 0.95, 1.0]), seed=st.integers(0, 2**32 - 1),
)  # fmt: skip
def test_a_centre_crop_needs_no_more_than_its_part(
    height: int, width: int, image_size: int, fraction: float, seed: int
) -> None:
    index = Index("val", (), np.zeros(1, SAMPLE), ("0",))
    index.samples["height"], index.samples["width"] = height, width
    crops = CenterCrops(index, RankSampler(1, 1), image_size, fraction)(0, 0)
    window = torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))
    top, left, h, w = crops.parts[0].tolist()
    whole = resize(window, replace(crops, parts=crops.windows), 0)
    assert torch.equal(resize(window[top : top + h, left : left + w], crops, 0), whole)
    if fraction < 0.8 and min(height, width) > 200:
        assert h * w < 0.9 * height * width
