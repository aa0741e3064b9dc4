"""A bar for batches that a quantizer reads, which prints its own messages into nothing.

Check: `pytest tests/test_quantize.py`.
"""

from collections.abc import Iterator, Sequence
from typing import TextIO, overload

from torch import Tensor
from tqdm import tqdm


class Progress(Sequence[Tensor]):
    """`batches`, with a bar on `terminal` whenever they are read from the first to the last."""

    def __init__(self, batches: Sequence[Tensor], title: str, terminal: TextIO) -> None:
        self._batches, self._title, self._terminal = batches, title, terminal

    def __len__(self) -> int:
        return len(self._batches)

    @overload
    def __getitem__(self, index: int) -> Tensor: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[Tensor]: ...

    def __getitem__(self, index: int | slice) -> Tensor | Sequence[Tensor]:
        return self._batches[index]

    def __iter__(self) -> Iterator[Tensor]:
        return iter(tqdm(self._batches, self._title, file=self._terminal, disable=None, leave=False))
