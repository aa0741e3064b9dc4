"""What DALI computes: from the files of a batch to regions (on a CPU) or to whole images (on a GPU).

On a CPU, DALI decodes only the region that a crop needs, pixel for pixel as PIL does. On a GPU it decodes, crops and
resizes there; its kernels differ from PIL's by a value or two out of 255.
Check: `pytest tests/test_dali_loader.py`.
"""

from collections import deque
from dataclasses import dataclass, field
from importlib import import_module
from importlib.util import find_spec
from typing import Any
from weakref import ref

import numpy as np

from data.encoded import BatchReader, EncodedBatch, ReaderPool
from data.reader import LoaderOptions
from repghost.errors import UserError


def dali_installed() -> bool:
    """Whether the package is there; it is made for Linux on x86-64 and optional."""
    return find_spec("nvidia") is not None and find_spec("nvidia.dali") is not None


def dali() -> Any:
    """The module nvidia.dali, imported on first use."""
    try:
        return import_module("nvidia.dali")
    except ImportError as error:
        raise UserError(
            f"loader=dali needs the package nvidia-dali-cuda130 ({error}): install it, or take loader=torch"
        ) from None


@dataclass
class DaliSource:
    """Called by the pipeline for the input of one batch after another, in the order of build_pipeline's inputs.

    on_gpu: whether the inputs are those of a GPU's pipeline. iteration: of the next batch, counted over all epochs.
    decoded_until: before this iteration the pipeline gets pixels instead of files. read: the batches that are in the
    pipeline, which takes their files where they are, without a copy.
    """

    reader: BatchReader | ReaderPool
    on_gpu: bool
    iteration: int = 0
    decoded_until: int = 0
    read: deque[EncodedBatch] = field(default_factory=deque)

    def __call__(self) -> tuple[Any, ...]:
        batch = self.reader.read(self.iteration, self.iteration < self.decoded_until)
        self.read.append(batch)
        self.iteration += 1
        tensors, crops = dali().tensors, batch.crops
        files = [tensors.TensorCPU(file) for file in batch.files]
        missing = batch.labels[:, None] < 0
        inputs = [np.where(missing, 0, batch.starts), np.where(missing, 1, crops.parts[:, 2:])]
        inputs = [numbers.astype(np.int32) for numbers in inputs]
        if self.on_gpu:
            square = np.full_like(crops.corners, crops.image_size, np.int32)
            inputs += [crops.sizes.astype(np.float32), crops.bicubic, crops.corners.astype(np.int32), square]
        return tensors.TensorListCPU(files, None, False), *map(tensors.TensorListCPU, inputs)

    def done(self) -> EncodedBatch:
        """The oldest batch in the pipeline, to be called when it has come out of there."""
        batch = self.read.popleft()
        self.reader.release(batch)
        return batch

    def restart(self, ahead: int) -> None:
        """To be called when a pipeline failed and is gone: its batches and `ahead` more come again, as pixels."""
        self.iteration -= len(self.read)
        while self.read:
            self.done()
        self.decoded_until = self.iteration + ahead


def build_pipeline(source: DaliSource, rows: int, options: LoaderOptions, device_id: int | None, decoder: str) -> Any:
    """The pipeline, whose output is a list of uint8 [h, w, 3] regions, or of uint8 [3, S, S] images as on a GPU.

    rows: of a batch. decoder: DALI's device for decoding, `cpu` or `mixed`. source() gives, for each row: file; top and
    left, height and width of its region; and for a GPU also what the region is resized to, whether bicubic, top and
    left of the image in that, and its height and width. The pipeline does not keep the source: DALI's objects hold each
    other, so that they, and with them the source's processes, would stay until the garbage collector runs.
    """
    weak = ref(source)

    def feed() -> tuple[Any, ...]:
        source = weak()
        assert source is not None, "the owner of a pipeline holds its source"
        return source()

    fn, types = dali().fn, dali().types
    dtypes = [types.UINT8, types.INT32, types.INT32, types.FLOAT, types.BOOL, types.INT32, types.INT32]
    dtypes = dtypes[: 7 if source.on_gpu else 3]
    as_pil: dict[str, Any] = {"adjust_orientation": False, "jpeg_fancy_upsampling": True}
    if decoder == "mixed":
        as_pil |= {"hw_decoder_load": options.hw_decoder_load, "affine": options.thread_affinity}

    @dali().pipeline_def(
        batch_size=rows,
        num_threads=max(1, options.workers),
        prefetch_queue_depth=max(1, options.prefetch),
        device_id=device_id,
    )
    def pipeline() -> Any:
        inputs = fn.external_source(feed, num_outputs=len(dtypes), dtype=dtypes, no_copy=True)
        file, start, shape, *rest = inputs
        if not source.on_gpu:
            return fn.decoders.image_slice(file, start, shape, axes=[0, 1], **as_pil)
        # Not image_slice: GPU decoding of regions is reported to crash (nvImageCodec's issue 55).
        decoded = fn.decoders.image(file, device=decoder, **as_pil)
        resized, bicubic, corner, square = rest
        return dali_resize(fn.slice(decoded, start, shape, axes=[0, 1]), resized, bicubic, corner, square)

    return pipeline()


def dali_resize(region: Any, resized: Any, bicubic: Any, corner: Any, square: Any) -> Any:
    """DALI graph: uint8 [h, w, 3] -> uint8 [3, S, S], resized with PIL's filters and cut out at `corner`.

    resized: float [2] of (height, width). bicubic: bool, otherwise bilinear. corner: int [2] of (top, left).
    square: int [2] of (S, S).
    """
    fn, types = dali().fn, dali().types
    kinds = np.array([types.INTERP_LINEAR, types.INTERP_CUBIC], np.int32)
    kind = types.Constant(kinds, device="cpu")[fn.cast(bicubic, dtype=types.INT32)]
    kind = fn.reinterpret(kind, dtype=types.INTERP_TYPE)
    image = fn.resize(region, size=resized, interp_type=kind, antialias=True, subpixel_scale=False)
    image = fn.slice(image, start=corner, shape=square, axes=[0, 1])
    return fn.transpose(image, perm=[2, 0, 1])
