"""The DALI loader: NVIDIA DALI decodes, on the GPU where there is one, and keeps ahead of the training.

It yields the batches of data.torch_loader and plans them with the same code. On a CPU, DALI decodes only the region
that a crop needs, pixel for pixel as PIL does, and torch resizes it, so that both loaders yield the same bytes. On a
GPU, DALI decodes, crops and resizes there; its kernels differ from PIL's by a value or two out of 255.
DALI cannot skip an image that does not decode, it ends. So none gets there unless its checksum holds, what DALI reads
unlike PIL goes in decoded, and a batch that it fails at after all is decoded here, where each image fails by itself.
Check: `pytest tests/test_dali_loader.py`.
"""

import io
import logging
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from data.crops import BatchPlan, EvaluationPlan, Plan
from data.reader import BadImage, ShardReader, SkipBudget, decode, jpeg_components, resize
from data.torch_loader import Position
from repghost.dataset import Batch
from repghost.errors import UserError

log = logging.getLogger(__name__)

_BLACK = b"P6 1 1 255\n\0\0\0"  # an image of one black pixel, where there is none


def dali_installed() -> bool:
    """Whether the package is there; it is made for Linux on x86-64 and optional."""
    return find_spec("nvidia") is not None and find_spec("nvidia.dali") is not None


def _dali() -> Any:
    """The module nvidia.dali, imported on first use."""
    try:
        return import_module("nvidia.dali")
    except ImportError as error:
        raise UserError(
            f"loader=dali needs the package nvidia-dali-cuda130 ({error}): install it, or take loader=torch"
        ) from None


class DaliLoader:
    """Batches of `plan` from the trainer's position on; its length is that of a full epoch.

    workers: threads that decode on the CPU. prefetch: batches that are made ahead, into the next epoch at the end of
    one. pin_memory: of what is not on the GPU. position: called when an epoch is entered, gives (epoch, batch) to begin
    at. skip_bad: images that may be masked per epoch before the loader gives up with the last one's error.
    device_id: the GPU that decodes and that the images then are on; None for the CPU.
    """

    def __init__(
        self,
        plan: Plan,
        *,
        image_size: int,
        workers: int,
        prefetch: int,
        pin_memory: bool,
        position: Position,
        skip_bad: int,
        device_id: int | None = None,
    ) -> None:
        _dali()
        reader = ShardReader(plan.index)  # one for all streams: it keeps its files open
        self._open = partial(_Stream, plan, reader, image_size, max(1, workers), max(1, prefetch), device_id)
        self._stream: _Stream | None = None
        self._partition = plan.partition
        self._epochs_differ = not isinstance(plan, EvaluationPlan)
        self._pin_memory = pin_memory
        self._position = position
        self._skip_bad = skip_bad

    def __len__(self) -> int:
        return self._partition.batches

    def __iter__(self) -> Iterator[Batch]:
        epoch, first = self._position()
        first %= len(self)
        stream = self._stream_at(epoch * len(self) + first)
        budget = SkipBudget(self._skip_bad)
        for batch in range(first, len(self)):
            images, read = stream.next()
            assert read.plan.positions[0] == self._partition.start(batch), "DALI lost or repeated a batch"
            budget.spend(read.errors)
            labels, positions, draws = map(torch.from_numpy, (read.labels, read.plan.positions, read.plan.draws))
            yield Batch(*map(self._pinned, (images, labels, positions, draws)))

    def _pinned(self, tensor: Tensor) -> Tensor:
        return tensor.pin_memory() if self._pin_memory and not tensor.is_cuda else tensor

    def _stream_at(self, iteration: int) -> "_Stream":
        """The stream whose next batch is that of `iteration`: the one that is open, if it stands there."""
        if self._stream is not None:
            ahead = iteration - self._stream.iteration
            if ahead if self._epochs_differ else ahead % len(self):
                self._stream.close()
                self._stream = None
        if self._stream is None:
            self._stream = self._open(iteration)
        return self._stream


@dataclass(frozen=True)
class _Read:
    """One batch as it was read. labels: int64 [rows], -1 for a row without an image. errors: a line for each image."""

    plan: BatchPlan
    labels: np.ndarray
    errors: list[str]


class _Stream:
    """The batches from `iteration` on, counted over all epochs, without an end.

    A thread of its own reads the files, waits for DALI, whose threads decode, and finishes the batches.
    """

    def __init__(
        self,
        plan: Plan,
        reader: ShardReader,
        image_size: int,
        threads: int,
        prefetch: int,
        device_id: int | None,
        iteration: int,
    ) -> None:
        self.iteration = iteration
        self._plan = plan
        self._reader = reader
        self._image_size = image_size
        self._threads = threads
        self._prefetch = prefetch
        self._device_id = device_id
        self._thread = ThreadPoolExecutor(1)
        started = self._thread.submit(self._start, iteration, careful=0)
        self._ready: deque[Future[tuple[Tensor, _Read]]] = deque(
            self._thread.submit(self._make) for _ in range(prefetch)
        )
        started.result()

    def next(self) -> tuple[Tensor, _Read]:
        """The next batch; its images are uint8 [rows, 3, S, S]."""
        self._ready.append(self._thread.submit(self._make))
        self.iteration += 1
        return self._ready.popleft().result()

    def close(self) -> None:
        """Returns when nothing is under way any more."""
        self._thread.shutdown(cancel_futures=True)

    # -- in the thread ---------------------------------------------------------------------------------------------

    def _start(self, iteration: int, careful: int) -> None:
        """A pipeline from `iteration` on; before the iteration `careful` it gets nothing that needs decoding."""
        self._made, self._careful = iteration, careful
        on_gpu = self._device_id is not None
        self._source = _Source(self._plan, self._reader, self._image_size, on_gpu, iteration, careful)
        self._pipeline = _build_pipeline(
            self._source,
            self._image_size,
            batch_size=self._plan.partition.rows,
            num_threads=self._threads,
            prefetch_queue_depth=self._prefetch,
            device_id=self._device_id,
        )

    def _make(self) -> tuple[Tensor, _Read]:
        try:
            (output,) = self._pipeline.run()
        except RuntimeError:
            if self._made < self._careful:
                raise
            batch = self._made % self._plan.partition.batches
            log.warning("DALI cannot decode a file in batch %d or soon after it: they are decoded without it", batch)
            self._start(self._made, careful=self._made + self._prefetch + 1)  # it was that far ahead
            (output,) = self._pipeline.run()
        self._made += 1
        read = self._source.read.popleft()
        if self._device_id is None:
            return self._resized(read, output), read
        with torch.cuda.device(self._device_id):
            return torch.from_dlpack(output.as_tensor()), read

    def _resized(self, read: _Read, regions: Any) -> Tensor:
        """uint8 [rows, 3, S, S] on the CPU, of regions [h, w, 3], as the torch loader resizes them."""
        plan, size = read.plan, self._image_size
        images = np.zeros((plan.rows, 3, size, size), np.uint8)
        for row in np.flatnonzero(read.labels >= 0):
            region = torch.from_numpy(regions.at(row)).permute(2, 0, 1)
            # Copied by numpy: torch would start threads for it.
            images[row] = resize(region, plan, int(row), size).numpy()
        return torch.from_numpy(images)


class _Source:
    """Called by the pipeline for the input of one batch after another, in the order of _build_pipeline's inputs.

    read: the batches that are in the pipeline.
    """

    def __init__(
        self, plan: Plan, reader: ShardReader, image_size: int, on_gpu: bool, iteration: int, careful: int
    ) -> None:
        self.read: deque[_Read] = deque()
        self._plan = plan
        self._reader = reader
        self._image_size = image_size
        self._on_gpu = on_gpu
        self._iteration = iteration
        self._careful = careful

    def __call__(self) -> tuple[Any, ...]:
        plan = self._plan(*divmod(self._iteration, self._plan.partition.batches))
        labels = np.full(plan.rows, -1)
        errors: list[str] = []
        files = [_BLACK] * plan.rows
        self._reader.announce(plan.samples)
        for row, sample in enumerate(plan.samples.tolist()):
            try:
                files[row] = self._file(sample)
                labels[row] = self._plan.index.samples["label"][sample]
            except BadImage as error:
                errors.append(str(error))
        self.read.append(_Read(plan, labels, errors))
        self._iteration += 1

        def rows(values: np.ndarray, otherwise: int) -> np.ndarray:
            """[rows, ...]: the values where there is an image."""
            filled = np.full((plan.rows, *values.shape[1:]), otherwise, values.dtype)
            filled[: len(values)] = values
            filled[labels < 0] = otherwise
            return filled

        start, shape = rows(plan.windows[:, :2], 0), rows(plan.windows[:, 2:], 1)
        inputs: tuple[Any, ...] = ([np.frombuffer(f, np.uint8) for f in files], *map(np.int32, (start, shape)))
        if self._on_gpu:
            resized, corner = rows(plan.resized, self._image_size), rows(plan.corners, 0)
            inputs += np.float32(resized), rows(plan.bicubic, 0), np.int32(corner)
        return inputs

    def _file(self, sample: int) -> bytes:
        """The file of `sample` if DALI reads it as PIL does, otherwise its pixels as a PPM. Raises BadImage."""
        content = self._reader.read(sample)
        if self._iteration >= self._careful and _read_as_pil_does(content):
            return content
        try:
            image = Image.fromarray(decode(content).permute(1, 2, 0).numpy())
        except Exception as error:  # a decoder may raise anything; the cause goes into the one line
            raise BadImage(f"{self._plan.index.name(sample)}: {error}") from None
        buffer = io.BytesIO()
        image.save(buffer, "PPM")
        return buffer.getvalue()


def _read_as_pil_does(content: bytes) -> bool:
    """Whether DALI gives PIL's pixels: not for a JPEG with four components, nor for a PNG of 16 bits a value.

    A JPEG without its end marker may be cut off anywhere.
    """
    if content[:2] == b"\xff\xd8":
        return content[-2:] == b"\xff\xd9" and jpeg_components(content) != 4
    return not (content[:4] == b"\x89PNG" and content[24:25] == b"\x10")  # PNG specification, 11.2.1


def _build_pipeline(source: Any, image_size: int, *, device_id: int | None, **options: int) -> Any:
    """The pipeline, whose output is a list of uint8 [h, w, 3] regions (CPU) or of uint8 [3, S, S] images (GPU).

    source() gives, for each row: file; top and left, height and width of its region; and on a GPU also what the region
    is resized to, whether bicubic, and top and left of the image in that.
    """
    dali = _dali()
    fn, types = dali.fn, dali.types
    on_gpu = device_id is not None
    dtypes = [types.UINT8, types.INT32, types.INT32, types.FLOAT, types.BOOL, types.INT32][: 6 if on_gpu else 3]

    @dali.pipeline_def(device_id=device_id, **options)
    def pipeline() -> Any:
        file, start, shape, *rest = fn.external_source(source, num_outputs=len(dtypes), dtype=dtypes)
        as_pil = {"adjust_orientation": False, "jpeg_fancy_upsampling": True}
        if not on_gpu:
            return fn.decoders.image_slice(file, start, shape, axes=[0, 1], **as_pil)
        # Not image_slice: GPU decoding of regions is reported to crash (nvImageCodec's issue 55).
        decoded = fn.decoders.image(file, device="mixed", **as_pil)
        resized, bicubic, corner = rest
        return dali_resize(fn.slice(decoded, start, shape, axes=[0, 1]), resized, bicubic, corner, image_size)

    return pipeline()


def dali_resize(region: Any, resized: Any, bicubic: Any, corner: Any, image_size: int) -> Any:
    """DALI graph: uint8 [h, w, 3] -> uint8 [3, S, S], resized with PIL's filters and cut out at `corner`.

    resized: float [2] of (height, width). bicubic: bool, otherwise bilinear. corner: int [2] of (top, left).
    """
    fn, types = _dali().fn, _dali().types
    kinds = np.array([types.INTERP_LINEAR, types.INTERP_CUBIC], np.int32)
    kind = types.Constant(kinds, device="cpu")[fn.cast(bicubic, dtype=types.INT32)]
    kind = fn.reinterpret(kind, dtype=types.INTERP_TYPE)
    image = fn.resize(region, size=resized, interp_type=kind, antialias=True, subpixel_scale=False)
    image = fn.slice(image, start=corner, shape=[image_size, image_size], axes=[0, 1])
    return fn.transpose(image, perm=[2, 0, 1])
