"""The DALI loader: NVIDIA DALI decodes, on the GPU where there is one, and keeps ahead of the training.

It yields the batches of `data.torch_loader`, from the same crops. On a CPU, DALI decodes only the region that a crop
needs, pixel for pixel as PIL does, and torch resizes it, so that both loaders yield the same bytes. On a GPU, DALI
decodes, crops and resizes there; its kernels differ from PIL's by a value or two out of 255.
One image that does not decode ends a DALI pipeline. So no image gets there unless its checksum holds, files that DALI
and PIL read differently are decoded here, and when a pipeline fails all the same, its batches are decoded here, where
a bad image is one line.
Check: `pytest tests/test_dali_loader.py`.
"""

import io
import logging
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from data.crops import BatchCrops, CenterCrops, Crops
from data.reader import LoaderOptions, ShardReader, jpeg_components, resize, within_budget
from repghost.dataset import Batch
from repghost.errors import UserError

log = logging.getLogger(__name__)

# One batch as it was read: its crops, labels (int64 [N], -1 for a row without an image), a line for each bad image.
_Read = tuple[BatchCrops, np.ndarray, list[str]]
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
    """The batches of an epoch from `options.start` on; its length is that of a full epoch.

    device_id: the GPU that decodes and that the images then are on; None for the CPU. Batches are made ahead into the
    next epoch at the end of one.
    """

    def __init__(self, crops: Crops, options: LoaderOptions, device_id: int | None = None) -> None:
        _dali()
        self.crops = crops
        self.options = options
        self.device_id = device_id
        self.reader = ShardReader(crops.index)  # one for all streams: it keeps its files open
        self._stream: _Stream | None = None

    def __len__(self) -> int:
        return self.crops.sampler.batches

    def __iter__(self) -> Iterator[Batch]:
        epoch, first = self.options.start()
        yield from within_budget(self._batches(epoch, first % len(self)), self.options.skip_bad)

    def _batches(self, epoch: int, first: int) -> Iterator[tuple[Batch, list[str]]]:
        iteration = epoch * len(self) + first
        if self._stream is not None:
            ahead = iteration - self._stream.iteration
            # Every epoch of an evaluation is the same.
            if ahead % len(self) if isinstance(self.crops, CenterCrops) else ahead:
                self._stream.close()
                self._stream = None
        if self._stream is None:
            source = DaliSource(self.crops, self.reader, self.device_id is not None, iteration)
            self._stream = _Stream(source, self.options, self.device_id)
        for number in range(first, len(self)):
            images, (crops, labels, errors) = self._stream.next()
            assert crops.positions[0] == self.crops.sampler.start(number), "DALI lost or repeated a batch"
            batch = Batch(images, *map(torch.from_numpy, (labels, crops.positions, crops.uniforms)))
            pinned = self.options.pin_memory
            yield Batch(*(t.pin_memory() if pinned and not t.is_cuda else t for t in batch)), errors


class _Stream:
    """The batches of a source, counted over all epochs, without an end.

    A thread of its own reads the files, waits for DALI, whose threads decode, and finishes the batches.
    """

    def __init__(self, source: "DaliSource", options: LoaderOptions, device_id: int | None) -> None:
        self.iteration = source.iteration
        self._source = source
        self._device_id = device_id
        self._prefetch = max(1, options.prefetch)
        self._build = partial(
            _build_pipeline, source, num_threads=max(1, options.workers), prefetch=self._prefetch, device_id=device_id
        )
        self._thread = ThreadPoolExecutor(1)
        self._pipeline = self._thread.submit(self._build).result()
        self._ready = deque(self._thread.submit(self._make) for _ in range(self._prefetch))

    def next(self) -> tuple[Tensor, _Read]:
        """The next batch; its images are uint8 [N, 3, S, S]."""
        self._ready.append(self._thread.submit(self._make))
        self.iteration += 1
        return self._ready.popleft().result()

    def close(self) -> None:
        """Returns when nothing is under way any more."""
        self._thread.shutdown(cancel_futures=True)

    def _make(self) -> tuple[Tensor, _Read]:
        """In the thread: the next batch."""
        try:
            (output,) = self._pipeline.run()
        except RuntimeError:
            source, failed = self._source, self._source.iteration - len(self._source.read)
            if failed < source.decoded_until:
                raise
            batch = failed % source.crops.sampler.batches
            log.warning("DALI cannot decode a file in batch %d or soon after it: they are decoded without it", batch)
            source.read.clear()
            source.iteration, source.decoded_until = failed, failed + self._prefetch + 1  # it was that far ahead
            self._pipeline = self._build()
            (output,) = self._pipeline.run()
        read = self._source.read.popleft()
        if self._device_id is None:
            return _resized(read, output), read
        with torch.cuda.device(self._device_id):
            return torch.from_dlpack(output.as_tensor()), read


def _resized(read: _Read, regions: Any) -> Tensor:
    """uint8 [N, 3, S, S] on the CPU, of regions [h, w, 3], as the torch loader resizes them."""
    crops, labels, _ = read
    images = np.zeros((len(labels), 3, crops.image_size, crops.image_size), np.uint8)
    for row in np.flatnonzero(labels >= 0).tolist():
        region = torch.from_numpy(regions.at(row)).permute(2, 0, 1)
        # Copied by numpy: torch would start threads for it.
        images[row] = resize(region, crops, row).numpy()
    return torch.from_numpy(images)


@dataclass
class DaliSource:
    """Called by the pipeline for the input of one batch after another, in the order of _build_pipeline's inputs.

    iteration: of the next batch, counted over all epochs. decoded_until: before this iteration the pipeline gets
    pixels instead of files. read: the batches that are in the pipeline.
    """

    crops: Crops
    reader: ShardReader
    on_gpu: bool
    iteration: int = 0
    decoded_until: int = 0
    read: deque[_Read] = field(default_factory=deque)

    def __call__(self) -> tuple[Any, ...]:
        crops = self.crops(*divmod(self.iteration, self.crops.sampler.batches))
        files, labels, errors = self.reader.load(crops, self._file, _BLACK)
        self.read.append((crops, labels, errors))
        self.iteration += 1
        windows = np.where(labels[:, None] < 0, [0, 0, 1, 1], crops.windows).astype(np.int32)
        inputs = [np.frombuffer(file, np.uint8) for file in files], windows[:, :2].copy(), windows[:, 2:].copy()
        if not self.on_gpu:
            return inputs
        return *inputs, crops.sizes.astype(np.float32), crops.bicubic, crops.corners.astype(np.int32)

    def _file(self, row: int, sample: int) -> bytes:
        """The file of `sample` if DALI reads it as PIL does, otherwise its pixels as a PPM. Raises BadImage."""
        content = self.reader.read(sample)
        if self.iteration >= self.decoded_until and _read_as_pil_does(content):
            return content
        buffer = io.BytesIO()
        Image.fromarray(self.reader.decode(sample, content).permute(1, 2, 0).numpy()).save(buffer, "PPM")
        return buffer.getvalue()


def _read_as_pil_does(content: bytes) -> bool:
    """Whether DALI gives PIL's pixels: of JPEG without a fourth component, PNG of up to 8 bits a value, and WebP.

    A JPEG without its end marker may be cut off anywhere.
    """
    if content[:2] == b"\xff\xd8":
        return content[-2:] == b"\xff\xd9" and jpeg_components(content) != 4
    if content[:4] == b"\x89PNG":
        return content[24:25] != b"\x10"  # PNG specification, 11.2.1
    return content[:4] == b"RIFF"


def _build_pipeline(source: DaliSource, num_threads: int, prefetch: int, device_id: int | None) -> Any:
    """The pipeline, whose output is a list of uint8 [h, w, 3] regions (CPU) or of uint8 [3, S, S] images (GPU).

    source() gives, for each row: file; top and left, height and width of its region; and on a GPU also what the region
    is resized to, whether bicubic, and top and left of the image in that.
    """
    dali, rows, image_size = _dali(), source.crops.sampler.batch_size, source.crops.image_size
    fn, types = dali.fn, dali.types
    dtypes = [types.UINT8, types.INT32, types.INT32, types.FLOAT, types.BOOL, types.INT32][: 6 if source.on_gpu else 3]

    @dali.pipeline_def(batch_size=rows, num_threads=num_threads, prefetch_queue_depth=prefetch, device_id=device_id)
    def pipeline() -> Any:
        file, start, shape, *rest = fn.external_source(source, num_outputs=len(dtypes), dtype=dtypes)
        as_pil = {"adjust_orientation": False, "jpeg_fancy_upsampling": True}
        if not source.on_gpu:
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
