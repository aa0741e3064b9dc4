"""The order of an epoch and its random numbers: pure functions of (seed, epoch, index in the epoch).

No loader holds random state. The order of an epoch is a permutation drawn from (seed, epoch). Whatever happens to the
sample at an index of that order is computed from a fixed number of uniforms drawn from (seed, epoch, index). So an
epoch can be entered anywhere, by any number of ranks and workers, and gives the same batches.
Check: `pytest tests/test_sampling.py`.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.random import Philox
from torch import Tensor

# Columns of the uniforms of one sample. Their number never varies: an option that is off leaves its columns unread.
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
ERASE_NOISE = 61
MIX = slice(62, 64)  # of two neighbours together: kind and share from the first, the rectangle's place from the second
NUM_UNIFORMS = 64

_PER_COUNTER = 4  # Philox-4x64 yields four words for one value of its counter
# The counter's highest word keeps the uses apart; 2 and 3 belong to data.write_shards.
_ORDER_STREAM, _AUGMENT_STREAM, DETECTION_STREAM = 0, 1, 4


def _raw(seed: int, epoch: int, stream: int, counter: int, words: int) -> np.ndarray:
    """uint64 [words] of the Philox stream of (seed, epoch), from a multiple of four words on."""
    return Philox(key=[seed, epoch], counter=[counter, 0, 0, stream]).random_raw(words)


@lru_cache(maxsize=1)  # every batch of an epoch asks for it, and sorting 1.3 million numbers takes 0.4 s
def epoch_order(seed: int, epoch: int, count: int) -> np.ndarray:
    """int64 [count], read-only: the permutation in which epoch `epoch` visits the samples."""
    order = np.argsort(_raw(seed, epoch, _ORDER_STREAM, 0, count), kind="stable")
    order.flags.writeable = False
    return order


def uniforms(seed: int, epoch: int, start: int, count: int, stream: int = _AUGMENT_STREAM) -> np.ndarray:
    """float32 [count, NUM_UNIFORMS] in [0, 1): a row for each of the indices start .. start + count - 1 of an epoch.

    24 bits each, so that every value is exact in float32 and 1 is never reached.
    """
    raw = _raw(seed, epoch, stream, start * (NUM_UNIFORMS // _PER_COUNTER), count * NUM_UNIFORMS)
    return ((raw >> np.uint64(40)).astype(np.float32) * np.float32(2**-24)).reshape(count, NUM_UNIFORMS)


def between(share: Tensor, low: float, high: float) -> Tensor:
    """Uniform in [low, high) for shares uniform in [0, 1)."""
    return low + (high - low) * share


@dataclass(frozen=True)
class RankSampler:
    """The part of an epoch that one rank reads, as torch's DistributedSampler, but by whole batches.

    samples: images of the split. batch_size: per rank. accumulate: batches per optimizer step. drop_last: an epoch of
    training consists of whole steps; otherwise (validation) the last batches reach beyond `samples`, and the loader
    masks those rows.
    """

    samples: int
    batch_size: int
    rank: int = 0
    ranks: int = 1
    accumulate: int = 1
    drop_last: bool = True

    @property
    def batches(self) -> int:
        """Batches of this rank in one epoch; the same on every rank."""
        if self.drop_last:
            return self.samples // (self.batch_size * self.ranks * self.accumulate) * self.accumulate
        return -(-self.samples // (self.batch_size * self.ranks))

    def start(self, batch: int) -> int:
        """Index in the epoch of the first row of batch `batch`.

        The ranks of one batch stand side by side, and so do the batches that are accumulated into one step: a global
        batch is the same interval of the epoch for any number of ranks.
        """
        return (batch * self.ranks + self.rank) * self.batch_size
