"""The DALI loader on a CPU: the torch loader's batches, byte for byte; and the GPU's resize, which runs on a CPU too.

Damaged shards are in tests/test_faults.py, for both loaders.
"""

import gc
import io
import os
import re
import subprocess
import sys
import time
import weakref
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from threading import get_ident
from typing import Any

import numpy as np
import pytest
import torch
from helpers import time_limit
from images import encoded, patch
from PIL import Image
from test_loader import variants
from torch.utils._python_dispatch import TorchDispatchMode
from webdataset import TarWriter

from benchmarks import thread_time
from data import dali_loader
from data.crops import CenterCrops, Crops, RandomCrops
from data.dali_loader import DaliLoader, Gpu, dali_installed
from data.dali_pipeline import DaliSource, build_pipeline, dali_resize
from data.encoded import BatchReader, ReaderPool
from data.image_sizes import ImageSizes
from data.index import Index, load_index
from data.reader import LoaderOptions, ShardReader
from data.sampling import RankSampler
from data.torch_loader import TorchLoader
from repghost.dataset import Batch
from repghost.errors import UserError
from repghost.images import to_rgb
from repghost.training.signals import SIGNALS

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
    return RandomCrops(
        index, RankSampler(len(index), rows, **options), ImageSizes(size), seed=0, scale=SCALE, ratio=RATIO
    )


def evaluation(index: Index, rows: int, size: int = 32, rank: int = 0, ranks: int = 1) -> CenterCrops:
    return CenterCrops(index, RankSampler(len(index), rows, rank, ranks, drop_last=False), size, crop_fraction=0.875)


def loader(
    kind: type, crops: Crops, start: tuple[int, int] = (0, 0), workers: int = 0, skip_bad: int = 0, readers: int = 0
) -> TorchLoader | DaliLoader:
    options = LoaderOptions(workers=workers, prefetch=2, readers=readers, start=lambda: start, skip_bad=skip_bad)
    return kind(crops, options)


def assert_same(mine: Sequence[Batch], theirs: Sequence[Batch]) -> None:
    for one, other in zip(mine, theirs, strict=True):
        for a, b in zip(one[:4], other[:4], strict=True):
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
        seen += [place for _, labels, places, *_ in batches for place in places[labels >= 0].tolist()]
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


def test_reader_processes_change_no_batch(index: Index) -> None:
    crops = training(index, 16)
    epochs = {epoch: list(loader(TorchLoader, crops, (epoch, 0))) for epoch in (2, 3)}
    where = (2, 1)
    mine = DaliLoader(crops, LoaderOptions(workers=1, prefetch=3, readers=2, start=lambda: where))
    assert_same(list(mine), epochs[2][1:])
    pool = mine._stream.reader  # type: ignore[union-attr]
    where = (3, 0)
    assert_same(list(mine), epochs[3])
    assert mine._stream.reader is pool, "one epoch runs into the next"  # type: ignore[union-attr]
    assert isinstance(pool, ReaderPool) and len(pool.processes) == 2
    for process in pool.processes:
        for number in SIGNALS:
            os.kill(process.pid or 0, number)
    pool.processes[0].kill()
    with pytest.raises(UserError, match=r"a process that reads images was killed.*data\.readers"), time_limit(60):
        for epoch in range(4, 20):
            where = (epoch, 0)
            list(mine)
    mine.close()
    assert not any(process.is_alive() for process in pool.processes)


def test_reader_processes_end_with_their_loader(index: Index) -> None:
    mine = loader(DaliLoader, evaluation(index, 16), readers=1)
    next(iter(mine))
    (process,) = mine._stream.reader.processes  # type: ignore[union-attr]
    gc.disable()
    try:
        del mine
        process.join(60)
    finally:
        gc.enable()
    assert process.exitcode == 0


@pytest.mark.slow
def test_reader_processes_end_with_a_killed_training(shards: Path, tmp_path: Path) -> None:
    script = """
import os, sys
from test_dali_loader import DaliLoader, load_index, loader, training
if __name__ == "__main__":
    mine = loader(DaliLoader, training(load_index(sys.argv[1], "train", sys.argv[2])), readers=1)
    next(iter(mine))
    print(mine._stream.reader.processes[0].pid, flush=True)
    os.kill(os.getpid(), 9) if sys.argv[3] == "killed" else sys.exit(3)
"""
    (tmp_path / "run.py").write_text(script)
    environment = {**os.environ, "PYTHONPATH": f"{Path(__file__).parent}{os.pathsep}{Path(__file__).parents[1]}"}
    for end, code in (("killed", -9), ("exits", 3)):
        command = [sys.executable, str(tmp_path / "run.py"), str(shards), str(tmp_path), end]
        run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
        assert run.returncode == code and "Error" not in run.stderr, run.stderr
        with time_limit(60):
            while Path(f"/proc/{run.stdout.strip()}").exists():
                time.sleep(0.01)


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
    for crops, readers in ((training(index, 4), 0), (evaluation(index, 4), 0), (training(index, 4), 1)):
        caplog.clear()
        mine = list(loader(DaliLoader, crops, skip_bad=2, readers=readers))
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
    source = DaliSource(BatchReader(crops, whole_windows=True), on_gpu=True)

    @dali.pipeline_def(batch_size=crops.sampler.batch_size, num_threads=1, device_id=None)
    def pipeline():
        file, start, shape, *rest = dali.fn.external_source(source, num_outputs=6, no_copy=True)
        return dali_resize(
            dali.fn.decoders.image_slice(file, start, shape, axes=[0, 1]), *rest, np.array([224, 224], np.int32)
        )

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


class Queue(TorchDispatchMode):
    """Stands in for a stream of a GPU: what is launched there happens when somebody waits for it, or `late`.

    Like a GPU it knows addresses, not tensors, and torch keeps memory that it allocated, and no other, for the streams
    that were recorded.
    """

    def __init__(self, device_id: int = 0) -> None:
        super().__init__()
        self._work: list[Callable[[], object]] = []
        self._recorded: list[torch.Tensor] = []

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        assert function is torch.ops.aten.clone.default, "the loader launches nothing but a copy"
        source = arguments[0]
        copy = torch.full_like(source, 77)
        self.launch(source, lambda found: copy.view(-1).copy_(found))
        return copy

    def launch(self, tensor: torch.Tensor, kernel: Callable[[torch.Tensor], object]) -> None:
        """Queues a kernel, which gets the bytes that lie in the tensor's place when it runs."""
        address, size = tensor.contiguous().data_ptr(), tensor.numel()

        def run() -> None:
            with open("/proc/self/mem", "rb", buffering=0) as memory:  # an error, no crash, where nothing is mapped
                memory.seek(address)
                kernel(torch.frombuffer(bytearray(memory.read(size)), dtype=torch.uint8))

        self._work.append(run)

    def record(self, tensor: torch.Tensor) -> None:
        if tensor.untyped_storage().resizable():  # torch's own
            self._recorded.append(tensor)

    def synchronize(self) -> None:
        while self._work:
            self._work.pop(0)()
        self._recorded.clear()


class StandIn(Gpu):
    """Whose pipeline is on the CPU. Everything else is the GPU's, on streams that are a Queue."""

    decoder = "cpu"

    def __init__(self, device_id: int) -> None:
        super().__init__(device_id)
        self.rank_device, self.device_id = device_id, None

    def enter_thread(self) -> None:
        self.device_id = self.rank_device
        super().enter_thread()
        self.device_id = None


@pytest.fixture
def computing(monkeypatch: pytest.MonkeyPatch) -> Queue:
    """The stream of the training, on a stand-in for a GPU."""
    current, devices = Queue(), []
    monkeypatch.setattr(dali_loader, "Gpu", StandIn)
    monkeypatch.setattr(torch.cuda, "Stream", Queue)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: devices.append((device, get_ident())))
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: stream.record(tensor))
    monkeypatch.setattr(current, "devices", devices, raising=False)
    return current


@pytest.mark.parametrize("kind", ["training", "evaluation"])
@pytest.mark.parametrize("readers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_gpu_that_is_behind_reads_the_right_images(kind: str, readers: int, index: Index, computing: Queue) -> None:
    """The host is done with all batches, and has dropped them, before the GPU has read the first of them."""
    crops = training(index, 4, 64) if kind == "training" else evaluation(index, 4, 64)

    def options() -> LoaderOptions:
        return LoaderOptions(workers=1, prefetch=2, readers=readers)

    expected = [batch.images.clone() for batch in DaliLoader(crops, options(), device_id=1)]
    late: list[torch.Tensor] = []
    for batch in DaliLoader(crops, options(), device_id=1):
        computing.launch(batch.images, late.append)
        del batch
    computing.synchronize()
    assert len({images.numpy().tobytes() for images in expected}) == len(expected) == len(late) > 8
    assert all(torch.equal(a, b.view_as(a)) for a, b in zip(expected, late, strict=True))
    devices = computing.devices  # type: ignore[attr-defined]
    assert [device for device, _ in devices] == [1, 1]
    assert get_ident() not in [thread for _, thread in devices], "it is the loader's thread whose device is set"


def test_the_decoder_gets_the_keys_that_are_for_it(index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    """The pipeline of a GPU can be described without one."""
    fn = import_module("nvidia.dali").fn
    found: dict[str, Any] = {}
    monkeypatch.setattr(fn.decoders, "image", lambda file, **given: found.update(given) or file)
    options = LoaderOptions(workers=3, prefetch=4, hw_decoder_load=0.9, thread_affinity=False)
    source = DaliSource(BatchReader(training(index), whole_windows=True), on_gpu=True)
    pipeline = build_pipeline(source, 8, options, device_id=0, decoder="mixed")
    assert found["device"] == "mixed" and found["hw_decoder_load"] == 0.9 and found["affine"] is False
    assert (pipeline.num_threads, pipeline.prefetch_queue_depth, pipeline.device_id) == (3, 4, 0)
    build_pipeline(source, 8, LoaderOptions(workers=1, prefetch=1), device_id=0, decoder="mixed")
    assert found["hw_decoder_load"] == 0.65 and found["affine"] is True


def test_the_time_of_the_training_processs_threads_is_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    options = {"images": 24, "batch-size": 4, "batches": 3, "readers": 0, "image-size": 32}
    found = thread_time.main([f"--{name}={value}" for name, value in options.items()] + [f"--corpus={tmp_path}"])
    assert found[0] > 0 and "read in a thread" in capsys.readouterr().out and caplog.text == ""


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


@pytest.mark.usefixtures("no_evaluation")
def test_auto_takes_dali_and_the_run_is_the_same(
    train_tiny: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert train_tiny("name=torch", "epochs=1") == 0  # without workers
    assert re.findall("^loader .*", capsys.readouterr().out, re.M) == ["loader     torch, in the training process"]
    assert train_tiny("name=dali", "epochs=1", "data.workers=1") == 0
    printed = capsys.readouterr().out
    assert re.findall("^loader .*", printed, re.M) == ["loader     dali, 1 thread per rank, prefetch 2"]
    metrics = [Path("outputs", name, "metrics.csv").read_text() for name in ("torch", "dali")]
    assert metrics[0] == metrics[1]


def test_without_the_package_the_error_names_it(index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)  # as import sees a missing module
    with pytest.raises(UserError, match="nvidia-dali-cuda130"):
        loader(DaliLoader, training(index))
