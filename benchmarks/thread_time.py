"""CPU time of the training process's own threads for a batch of the DALI loader, read in a thread and by processes.

    python benchmarks/thread_time.py --readers 0 1 2

Every millisecond of theirs holds the interpreter's lock, or competes for it, while a step launches its kernels. Without
a GPU its pipeline runs on the CPU, with the same inputs and outputs, and a file's first bytes stand for its pixels:
batches then follow each other as fast as on a GPU, and DALI's own threads, which decode, do not count anyway. What is
missing is the copy into torch's memory, on a GPU one kernel and a wait. The figure is the median of single batches:
other programs on the same cores make some of them dearer; the lowest is beside it.
"""

import argparse
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from itertools import islice, pairwise
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor

if not __package__:  # started as a file, not as python -m benchmarks.thread_time
    sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.corpus import TRAIN, corpus
from data import dali_loader
from data.crops import RandomCrops
from data.dali_loader import DaliLoader, Gpu
from data.dali_pipeline import dali
from data.image_sizes import ImageSizes
from data.index import Index, load_index
from data.reader import LoaderOptions
from data.sampling import RankSampler
from data.write_shards.write import write_folder

SIDE = 100  # of an image that is made of the first bytes of its file, which has more
EPOCH = 1_000_000  # images that an index is repeated to: ImageNet's order and its index have this size


class StandIn(Gpu):
    """A CPU in the place of a GPU."""

    decoder = "cpu"

    def __init__(self, device_id: int) -> None:
        self.device_id = None

    def enter_thread(self) -> None:
        pass

    def own(self, output: Any) -> Tensor:
        return torch.from_dlpack(output.as_tensor())

    def hand_over(self, images: Tensor) -> None:
        pass


def thread_seconds() -> float:
    """CPU time of the Python threads of this process."""
    idents = [thread.ident for thread in threading.enumerate() if thread.ident]
    return sum(time.clock_gettime(time.pthread_getcpuclockid(ident)) for ident in idents)


def milliseconds(crops: RandomCrops, options: LoaderOptions, batches: int) -> list[float]:
    """CPU time of the loader's thread and of its user's, for each batch."""
    loader = DaliLoader(crops, options, device_id=0)
    arriving = iter(loader)
    for _ in islice(arriving, 2 * options.prefetch + 2):
        pass
    clock = [thread_seconds()]
    for _ in islice(arriving, batches):
        clock.append(thread_seconds())
    return [1000 * (after - before) for before, after in pairwise(clock)]


def main(arguments: list[str] | None = None) -> dict[int, float]:
    """{readers: milliseconds}, which are printed."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--readers", nargs="+", type=int, default=[0, 1, 2], help="(default %(default)s)")
    parser.add_argument("--images", type=int, default=1500, help="files of the corpus (default %(default)s)")
    parser.add_argument("--batch-size", type=int, default=128, help="(default %(default)s)")
    parser.add_argument("--batches", type=int, default=60, help="that are measured (default %(default)s)")
    parser.add_argument("--image-size", type=int, default=64, help="(default %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="of DALI (default %(default)s)")
    parser.add_argument(
        "--corpus", type=Path, default=Path("~/.cache/repghost/benchmark"), help="(default %(default)s)"
    )
    options = parser.parse_args(arguments)
    on_gpu = torch.cuda.is_available()
    index = _index(options.corpus.expanduser(), options.images)
    if not on_gpu:
        for side in ("height", "width"):
            index.samples[side] = SIDE
    crops = RandomCrops(
        index, RankSampler(len(index), options.batch_size), ImageSizes(options.image_size), 0, (0.08, 1), (3 / 4, 4 / 3)
    )
    found = {}
    for readers in options.readers:
        of_loader = LoaderOptions(workers=options.threads, prefetch=2, readers=readers, pin_memory=on_gpu)
        with nullcontext() if on_gpu else on_cpu():
            spent = milliseconds(crops, of_loader, options.batches)
        found[readers] = median(spent)
        where = f"{readers} reader process(es)" if readers else "read in a thread"
        print(
            f"{where:<24} {median(spent):6.2f} ms of thread CPU time per batch of {options.batch_size}, "
            f"the lowest {min(spent):.2f}",
            flush=True,
        )
    return found


@contextmanager
def on_cpu() -> Iterator[None]:
    """Replaces the GPU and its decoder."""
    with patch.object(dali_loader, "Gpu", StandIn), patch.object(dali().fn.decoders, "image", _first_bytes):
        yield


def _first_bytes(file: Any, **_: Any) -> Any:
    """Stands for DALI's decoder."""
    fn = dali().fn
    return fn.reshape(fn.slice(file, 0, SIDE * SIDE * 3, axes=[0]), shape=[SIDE, SIDE, 3], layout="HWC")


def _index(folder: Path, images: int) -> Index:
    files = corpus(folder, images)
    write_folder(files / TRAIN, files / "shards", split="train", images_per_shard=500, quiet=True)
    once = load_index(files / "shards", "train", files)
    return replace(once, samples=np.tile(once.samples, max(1, EPOCH // images)))


if __name__ == "__main__":
    main()
