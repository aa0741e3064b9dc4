"""Who sees what: every random draw of the input pipeline as a pure function of (seed, epoch, position).

No loader holds random state. The order of an epoch is a permutation drawn from (seed, epoch); whatever happens to the
sample at a position of that order is computed from a fixed number of uniforms drawn from (seed, epoch, position).
So an epoch can be entered anywhere, by any number of ranks and workers, and gives the same batches.
Check: `pytest tests/test_sampling.py`.
"""

from dataclasses import dataclass

import numpy as np
from numpy.random import Philox

# Columns of the uniforms of one sample. The count never varies: an option that is off leaves its columns unread.
CROP_ATTEMPTS = 10
CROP = slice(0, 2 * CROP_ATTEMPTS)  # (area, aspect) of every attempt
CROP_TOP, CROP_LEFT = 20, 21
INTERPOLATION = 22
FLIP = 23
JITTER = slice(24, 27)  # brightness, contrast, saturation
JITTER_ORDER = 27
RAND_AUGMENT = slice(28, 38)  # of two operations each: choice, apply, magnitude, sign, interpolation
ERASE = 38
ERASE_ATTEMPTS = 10
ERASE_SHAPE = slice(39, 59)  # (area, aspect) of every attempt
ERASE_TOP, ERASE_LEFT = 59, 60
DRAWS = 64

BILINEAR, BICUBIC = 0, 1

_PER_COUNTER = 4  # Philox-4x64 yields four words for one value of its counter
_ORDER_STREAM, _AUGMENT_STREAM = 0, 1  # the counter's highest word keeps the two uses apart


def _raw(seed: int, epoch: int, stream: int, counter: int, words: int) -> np.ndarray:
    """uint64 [words] of the Philox stream of (seed, epoch), from a multiple of four words on."""
    return Philox(key=[seed, epoch], counter=[counter, 0, 0, stream]).random_raw(words)


def epoch_order(seed: int, epoch: int, count: int) -> np.ndarray:
    """int64 [count]: the permutation in which epoch `epoch` visits the samples."""
    return np.argsort(_raw(seed, epoch, _ORDER_STREAM, 0, count), kind="stable")


def uniforms(seed: int, epoch: int, start: int, count: int) -> np.ndarray:
    """float32 [count, DRAWS] in [0, 1): the draws of the positions start .. start + count - 1 of an epoch.

    24 bits each, so that every value is exact in float32 and 1 is never reached.
    """
    raw = _raw(seed, epoch, _AUGMENT_STREAM, start * (DRAWS // _PER_COUNTER), count * DRAWS)
    return ((raw >> np.uint64(40)).astype(np.float32) * np.float32(2**-24)).reshape(count, DRAWS)


def batch_start(batch: int, rank: int, ranks: int, rows: int) -> int:
    """First position of batch `batch` (the trainer's batch index) on `rank`, at `rows` rows a rank.

    The ranks of one batch stand side by side, and so do the batches that are accumulated into one step: a global
    batch is the same interval of positions for any number of ranks.
    """
    return (batch * ranks + rank) * rows


@dataclass(frozen=True)
class Partition:
    """How one rank walks through an epoch of `samples` samples in batches of `rows` rows.

    Training (`drop_last`) runs whole steps only; a step is `accumulate` batches on each of `ranks` ranks. Otherwise
    (validation) positions at or beyond `samples` stand for nothing and are masked by the loader.
    """

    samples: int
    rows: int
    rank: int = 0
    ranks: int = 1
    accumulate: int = 1
    drop_last: bool = True

    @property
    def batches(self) -> int:
        """Batches of this rank in one epoch; the same on every rank."""
        if self.drop_last:
            return self.samples // (self.rows * self.ranks * self.accumulate) * self.accumulate
        return -(-self.samples // (self.rows * self.ranks))

    def start(self, batch: int) -> int:
        """First position of batch `batch` on this rank."""
        return batch_start(batch, self.rank, self.ranks, self.rows)
