"""The DALI loader: NVIDIA DALI decodes, on the GPU where there is one, and keeps ahead of the training.

It yields the batches of `data.torch_loader`, from the same crops; on a CPU the same bytes, since torch resizes there.
One image that does not decode ends a DALI pipeline. So no image gets there unless its checksum holds, files that DALI
and PIL read differently are decoded by `data.encoded`, and when a pipeline fails all the same, so are its batches: a
bad image is one line.
Check: `pytest tests/test_dali_loader.py`.
"""

import logging
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data.crops import CenterCrops, Crops
from data.dali_pipeline import DaliSource, build_pipeline, dali
from data.dali_pipeline import dali_installed as dali_installed
from data.encoded import BatchReader, EncodedBatch, ReaderPool
from data.reader import EpochLoader, LoaderOptions, resize
from repghost.dataset import Batch

log = logging.getLogger(__name__)


class Gpu:
    """The GPU that decodes, and on which the images then are; tests put a stand-in in its place.

    DALI hands its images over in memory of its own, and uses that for others as soon as nothing in Python holds it,
    whether or not the GPU has come to read it. torch's memory waits for the streams that are known to use it.
    """

    decoder = "mixed"  # DALI's word for reading files on the host and decoding on the GPU

    def __init__(self, device_id: int) -> None:
        self.device_id: int | None = device_id
        self._copies = torch.cuda.Stream(device_id)

    def enter_thread(self) -> None:
        """Makes it the current device of this thread, so that nothing makes a context on another one."""
        torch.cuda.set_device(self.device_id)

    def own(self, output: Any) -> Tensor:
        """The images of a pipeline's output in torch's memory, once they are there; DALI's may then be reused."""
        with torch.cuda.stream(self._copies):
            images = torch.from_dlpack(output.as_tensor()).clone()
        self._copies.synchronize()
        return images

    def hand_over(self, images: Tensor) -> None:
        """To be called by the thread that will use the images, which were allocated for another stream."""
        images.record_stream(torch.cuda.current_stream(images.device))


class DaliLoader(EpochLoader[Batch]):
    """Batches are made ahead into the next epoch at the end of one.

    device_id: of the GPU that decodes; None for the CPU.
    """

    def __init__(self, crops: Crops, options: LoaderOptions, device_id: int | None = None) -> None:
        dali()
        self.crops = crops
        self.options = options
        self._gpu = None if device_id is None else Gpu(device_id)
        self._stream: _Stream | None = None

    def __len__(self) -> int:
        return self.crops.sampler.batches

    def close(self) -> None:
        """Ends the pipeline and its processes; another epoch would start new ones."""
        if self._stream is not None:
            self._stream.close()
            self._stream = None

    def _batches(self, epoch: int, first: int) -> Iterator[tuple[Batch, list[str]]]:
        iteration = epoch * len(self) + first
        if self._stream is not None:
            ahead = iteration - self._stream.iteration
            # Every epoch of an evaluation is the same.
            if ahead % len(self) if isinstance(self.crops, CenterCrops) else ahead:
                self.close()
        if self._stream is None:
            self._stream = _Stream(self.crops, self.options, self._gpu, iteration)
        for number in range(first, len(self)):
            batch, errors = self._stream.next()
            assert batch.positions[0] == self.crops.sampler.start(number), "DALI lost or repeated a batch"
            if self._gpu:
                self._gpu.hand_over(batch.images)
            yield batch, errors


class _Stream:
    """The batches of `crops` from an iteration on, counted over all epochs, without an end.

    A thread of its own reads the files or receives them from processes, waits for DALI, whose threads decode, and
    finishes the batches.
    """

    def __init__(self, crops: Crops, options: LoaderOptions, gpu: Gpu | None, iteration: int) -> None:
        self.iteration = iteration
        self._crops, self._options, self._gpu = crops, options, gpu
        self._prefetch = max(1, options.prefetch)
        self._thread = ThreadPoolExecutor(1, initializer=gpu.enter_thread if gpu else None)
        self.reader = self._thread.submit(self._make_reader).result()
        self._source = DaliSource(self.reader, on_gpu=gpu is not None, iteration=iteration)
        self._pipeline = self._thread.submit(self._build).result()
        self._ready = deque(self._thread.submit(self._make) for _ in range(self._prefetch))

    def next(self) -> tuple[Batch, list[str]]:
        """The next batch, with uint8 [N, 3, S, S], and a line for each of its bad images."""
        self._ready.append(self._thread.submit(self._make))
        self.iteration += 1
        return self._ready.popleft().result()

    def close(self) -> None:
        """Returns when nothing is under way any more."""
        self._thread.shutdown(cancel_futures=True)
        self._pipeline = None
        self.reader.close()

    def _make_reader(self) -> BatchReader | ReaderPool:
        whole_windows = self._gpu is not None  # which is what DALI's resize takes
        if self._options.readers:
            return ReaderPool(self._crops, whole_windows, self._options.readers, held=self._prefetch + 1)
        return BatchReader(self._crops, whole_windows)

    def _build(self) -> Any:
        gpu = self._gpu
        return build_pipeline(
            self._source,
            self._crops.sampler.batch_size,
            self._options,
            device_id=gpu.device_id if gpu else None,
            decoder=gpu.decoder if gpu else "cpu",
        )

    def _make(self) -> tuple[Batch, list[str]]:
        """In the thread: the next batch."""
        if (output := self._run()) is None:
            self._pipeline = None  # which returns when it no longer uses what it was given
            self._source.restart(ahead=self._prefetch + 1)  # it was that far ahead
            self._pipeline = self._build()
            output = self._pipeline.run()[0]
        batch = self._source.done()
        images = self._gpu.own(output) if self._gpu else _resized(batch, output)
        rest = map(torch.from_numpy, (batch.labels, batch.crops.positions, batch.crops.uniforms))
        tensors: Any = (images, *rest)
        if self._options.pin_memory:
            tensors = (tensor if tensor.is_cuda else tensor.pin_memory() for tensor in tensors)
        return Batch(*tensors), batch.errors

    def _run(self) -> Any:
        """The output of the pipeline; None when it cannot decode a file."""
        try:
            return self._pipeline.run()[0]
        except RuntimeError:
            source = self._source
            failed = source.iteration - len(source.read)
            if failed < source.decoded_until:
                raise
        batch = failed % self._crops.sampler.batches
        log.warning("DALI cannot decode a file in batch %d or soon after it: they are decoded without it", batch)
        return None


def _resized(batch: EncodedBatch, regions: Any) -> Tensor:
    """uint8 [N, 3, S, S] on the CPU, of regions [h, w, 3], as the torch loader resizes them."""
    labels, size = batch.labels, batch.crops.image_size
    images = np.empty((len(labels), size, size, 3), np.uint8)
    images[labels < 0] = 0
    for row in np.flatnonzero(labels >= 0).tolist():
        region = torch.from_numpy(np.asarray(regions[row]))  # in DALI's memory
        # Copied by numpy: torch would start threads for it.
        images[row] = resize(region, batch.crops, row).numpy()
    return torch.from_numpy(images).permute(0, 3, 1, 2)
