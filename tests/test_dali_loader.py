"""The DALI loader on a CPU: the torch loader's batches, byte for byte; and the GPU's resize, which runs on a CPU too.

Damaged shards are in tests/test_faults.py, for both loaders.
"""

import gc
import io
import sys
import weakref
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from images import encoded, patch
from PIL import Image
from test_loader import variants
from webdataset import TarWriter

from data.crops import CenterCrops, Crops, RandomCrops
from data.dali_loader import DaliLoader, DaliSource, dali_installed, dali_resize
from data.index import Index, load_index
from data.reader import LoaderOptions, ShardReader
from data.sampling import RankSampler
from data.torch_loader import TorchLoader
from repghost.dataset import Batch
from repghost.errors import UserError
from repghost.images import to_rgb

pytestmark = pytest.mark.skipif(not dali_installed(), reason="nvidia-dali is made for Linux on x86-64")

SCALE, RATIO = (0.08, 1.0), (3 / 4, 4 / 3)


@pytest.fixture(scope="module")
def index(shards: Path) -> Index:
    return load_index(shards, "train", shards)


def indexed(folder: Path, files: dict[str, bytes]) -> Index:
    """{name: file} as a shard of somebody else's, made in `folder`; labels count the files."""
    folder.mkdir()
    with TarWriter(str(folder / "val.tar"), encoder=False) as tar:
        for label, (name, content) in enumerate(files.items()):
            tar.write({"__key__": name, "jpg": content, "cls": b"%d" % label})
    return load_index(folder, "val", folder / "cache")


def training(index: Index, rows: int = 8, size: int = 32, **options: int) -> RandomCrops:
    return RandomCrops(index, RankSampler(len(index), rows, **options), size, seed=0, scale=SCALE, ratio=RATIO)


def evaluation(index: Index, rows: int, size: int = 32, rank: int = 0, ranks: int = 1) -> CenterCrops:
    return CenterCrops(index, RankSampler(len(index), rows, rank, ranks, drop_last=False), size, crop_fraction=0.875)


def loader(
    kind: type, crops: Crops, start: tuple[int, int] = (0, 0), workers: int = 0, skip_bad: int = 0
) -> TorchLoader | DaliLoader:
    return kind(crops, LoaderOptions(workers=workers, prefetch=2, start=lambda: start, skip_bad=skip_bad))


def assert_same(mine: Sequence[Batch], theirs: Sequence[Batch]) -> None:
    for one, other in zip(mine, theirs, strict=True):
        for a, b in zip(one, other, strict=True):
            assert a.dtype == b.dtype and torch.equal(a, b)


@pytest.mark.parametrize("size", [32, 224])
def test_training_batches_are_those_of_the_torch_loader(index: Index, size: int) -> None:
    mine = list(loader(DaliLoader, training(index, size=size), (3, 0), workers=2))
    assert_same(mine, list(loader(TorchLoader, training(index, size=size), (3, 0))))


@pytest.mark.parametrize("rows", [7, 16, 100])
@pytest.mark.parametrize("ranks", [1, 3])
def test_validation_batches_are_those_of_the_torch_loader(index: Index, rows: int, ranks: int) -> None:
    seen = []
    for rank in range(ranks):
        crops = evaluation(index, rows, rank=rank, ranks=ranks)
        mine = loader(DaliLoader, crops)
        batches, stream = list(mine), mine._stream
        assert_same(batches, list(loader(TorchLoader, crops)))
        assert_same(list(mine), batches)
        assert mine._stream is stream, "the second time goes on with what was made ahead"
        seen += [place for _, labels, places, _ in batches for place in places[labels >= 0].tolist()]
    assert sorted(seen) == list(range(len(index)))


def test_an_epoch_is_entered_anywhere_and_left_for_the_next(index: Index) -> None:
    crops = training(index)
    steps = len(loader(DaliLoader, crops))
    assert steps == 45 // 8
    epochs = {epoch: list(loader(TorchLoader, crops, (epoch, 0))) for epoch in (2, 3, 4)}
    where = (2, 3)
    mine = DaliLoader(crops, LoaderOptions(workers=1, prefetch=3, start=lambda: where))
    assert_same(list(mine), epochs[2][3:])
    stream = mine._stream
    where = (3, 0)
    assert_same(list(mine), epochs[3])
    where = (4, steps)  # as the trainer counts after a whole epoch
    assert_same(list(mine), epochs[4])
    assert mine._stream is stream, "one epoch runs into the next"
    for first in (0, 4, 1):
        where = (4, first)
        batches = iter(mine)
        assert_same([next(batches)], epochs[4][first : first + 1])  # and is left in the middle


def test_a_dropped_loader_takes_its_pipeline_along(index: Index) -> None:
    """At once, not when the garbage collector runs: its threads must not be there when other loaders fork workers."""
    gc.disable()
    try:
        mine = loader(DaliLoader, training(index))
        next(iter(mine))
        stream = mine._stream
        pipeline = weakref.ref(stream._pipeline)
        stream._thread.submit(int).result()  # what was under way has ended
        del mine, stream
        assert pipeline() is None
    finally:
        gc.enable()


def test_decoding_equals_pil(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Files of every kind give what their pixels give, as PIL sees them (`repghost.images.to_rgb`)."""
    files = variants()
    files["16 bits"] = encoded(Image.fromarray(np.arange(3600, dtype=np.uint16).reshape(60, 60) * 18), "png")
    files["with a tail"] = files["420"] + bytes(7)
    for extension in ("gif", "bmp", "tif", "ppm"):
        files[f"named jpg, {extension}"] = encoded(patch(3, 60, 90), extension)
    files["16 bits of colour"] = b"P6 30 20 65535\n" + bytes(range(180)) * 20
    pixels = {n: encoded(to_rgb(Image.open(io.BytesIO(content))), "png") for n, content in files.items()}
    images, labels, *_ = next(iter(loader(DaliLoader, evaluation(indexed(tmp_path / "a", files), len(files)))))
    expected, *_ = next(iter(loader(TorchLoader, evaluation(indexed(tmp_path / "b", pixels), len(files)))))
    differing = [name for name, a, b in zip(files, images, expected, strict=True) if not torch.equal(a, b)]
    assert differing == [] and caplog.text == ""
    assert labels.tolist() == list(range(len(files)))


def test_what_dali_refuses_is_decoded_as_the_torch_loader_does(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    photograph = encoded(patch(3, 60, 90))
    animation = io.BytesIO()
    patch(1).save(animation, "WEBP", save_all=True, append_images=[patch(1).rotate(90)], duration=100)
    files = {f"sound{i}": encoded(patch(i, 60, 90)) for i in range(20)}
    files["empty"] = photograph[: photograph.index(b"\xff\xda")] + b"\xff\xd9"  # the headers and the end
    files["animation"] = animation.getvalue()
    files["endless"] = photograph[:-2]
    index = indexed(tmp_path / "foreign", files)
    for crops in training(index, 4), evaluation(index, 4):
        caplog.clear()
        mine = list(loader(DaliLoader, crops, skip_bad=2))
        assert "DALI cannot decode a file" in caplog.text
        skipped = [record.message for record in caplog.records if record.message.startswith("skipped")]
        caplog.clear()
        assert_same(mine, list(loader(TorchLoader, crops, skip_bad=2)))
        assert skipped == [record.message for record in caplog.records if record.name == "data.reader"]
    assert len(skipped) == 2 and "empty" in skipped[0] and "endless" in skipped[1]


@pytest.mark.parametrize("kind", ["training", "evaluation"])
def test_dalis_resize_is_close_to_pils(kind: str, tmp_path: Path) -> None:
    """What a GPU does, with the decoder of the CPU."""
    index = indexed(tmp_path / "foreign", {str(i): encoded(patch(i, 120, 300), "png") for i in range(16)})
    crops = training(index, 16, 224) if kind == "training" else evaluation(index, 20, 224)
    images, expected = batch_by_dali(crops), batch_by_pil(crops)
    assert len(images) == crops.sampler.batch_size and len(expected) == 16
    for image, wanted in zip(images, expected, strict=False):
        difference = np.abs(image.astype(int) - wanted)
        assert difference.mean() <= 0.3
        assert (difference > 2).mean() <= 0.005
    assert not images[16:].any()


def batch_by_dali(crops: Crops) -> np.ndarray:
    """uint8 [rows, 3, 224, 224], the first batch."""
    dali = import_module("nvidia.dali")
    source = DaliSource(crops, ShardReader(crops.index), on_gpu=True)

    @dali.pipeline_def(batch_size=crops.sampler.batch_size, num_threads=1, device_id=None)
    def pipeline():
        file, start, shape, *rest = dali.fn.external_source(source, num_outputs=6)
        return dali_resize(dali.fn.decoders.image_slice(file, start, shape, axes=[0, 1]), *rest, 224)

    return np.array(pipeline().run()[0].as_tensor())


def batch_by_pil(crops: Crops) -> list[np.ndarray]:
    """uint8 [3, 224, 224] each."""
    batch, images = crops(0, 0), []
    for row, sample in enumerate(batch.samples.tolist()):
        top, left, height, width = batch.windows[row].tolist()
        image = Image.open(io.BytesIO(ShardReader(crops.index).read(sample)))
        region = image.crop((left, top, left + width, top + height))
        resample = Image.Resampling.BICUBIC if batch.bicubic[row] else Image.Resampling.BILINEAR
        height, width = batch.sizes[row].tolist()
        top, left = batch.corners[row].tolist()
        resized = region.resize((width, height), resample).crop((left, top, left + 224, top + 224))
        images.append(np.array(resized).transpose(2, 0, 1))
    return images


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["training", "evaluation"])
def test_on_a_gpu_batches_are_close_to_the_torch_loaders(kind: str, index: Index) -> None:
    crops = training(index, 16, 224) if kind == "training" else evaluation(index, 16, 224)
    options = LoaderOptions(workers=2, prefetch=2, pin_memory=True, start=lambda: (1, 0))
    on_gpu = DaliLoader(crops, options, device_id=0)
    for mine, theirs in zip(on_gpu, loader(TorchLoader, crops, (1, 0)), strict=True):
        assert mine[0].is_cuda and mine[0].shape == theirs[0].shape
        assert (mine[0].cpu().int() - theirs[0].int()).abs().float().mean() <= 1
        assert_same([mine[1:]], [theirs[1:]])  # type: ignore[list-item]


def test_auto_takes_dali_and_the_run_is_the_same(
    train_tiny: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert train_tiny("name=torch", "epochs=1") == 0  # without workers
    assert capsys.readouterr().out.count("loader     torch\n") == 1
    assert train_tiny("name=dali", "epochs=1", "data.workers=1") == 0
    assert capsys.readouterr().out.count("loader     dali\n") == 1
    metrics = [Path("outputs", name, "metrics.csv").read_text() for name in ("torch", "dali")]
    assert metrics[0] == metrics[1]


def test_without_the_package_the_error_names_it(index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)  # as import sees a missing module
    with pytest.raises(UserError, match="nvidia-dali-cuda130"):
        loader(DaliLoader, training(index))
