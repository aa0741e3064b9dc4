"""Logits of a teacher on disk: what it said of the image at each position of each epoch.

Order, crops, augmentation and mixing of a training are pure functions of seed, epoch and position, so that a teacher
can answer once for all trainings that see the same images. A store is a folder of
    store.json             teacher, sizes, and everything that decides which images it saw
    epoch-0000.logits ...  a record of fixed size for each position: K logarithms of probabilities, descending, their
                           classes, and a CRC-32 of both
Check: `pytest tests/test_logits_store.py`.
"""

import json
import os
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from repghost.dataset import TeacherLogits
from repghost.errors import UserError
from repghost.files import write_text

STORE = "store.json"
FORMAT = 1  # changes with the meaning of the files


@dataclass(frozen=True)
class LogitsStore:
    """The folder of a store, and what store.json says.

    teacher: its name. weights: SHA-256 of its weights. classes: how many. top: K. dtype: of the values, float16 or
    float32. positions: records of an epoch. epochs: in a complete store. seen: by the keys of train.py, all that
    decides which images the teacher saw. written: epochs that are complete.
    """

    folder: Path
    teacher: str
    weights: str
    classes: int
    top: int
    dtype: str
    positions: int
    epochs: int
    seen: Mapping[str, Any]
    written: int = 0
    format: int = field(default=FORMAT)

    @cached_property
    def record(self) -> np.dtype:
        """The structured dtype of a record."""
        of_class = "<u2" if self.classes <= 2**16 else "<u4"
        of_value = np.dtype(self.dtype).newbyteorder("<")
        return np.dtype([("values", of_value, self.top), ("classes", of_class, self.top), ("checksum", "<u4")])

    @property
    def bytes(self) -> int:
        """Size of the complete store."""
        return self.epochs * self.positions * self.record.itemsize

    def path(self, epoch: int) -> Path:
        """The file of an epoch."""
        return self.folder / f"epoch-{epoch:04}.logits"

    # -- writing ---------------------------------------------------------------------------------------------------

    def save(self) -> None:
        """Writes store.json."""
        content = {key: value for key, value in asdict(self).items() if key != "folder"}
        write_text(self.folder / STORE, json.dumps(content, indent=1) + "\n")

    def write(self, epoch: int, start: int, logits: TeacherLogits) -> None:
        """Writes the records of successive positions; several processes may write into one file at once."""
        records = np.zeros(len(logits.values), self.record)
        records["values"], records["classes"] = logits.values.numpy(), logits.classes.numpy()
        records["checksum"] = _checksums(records.tobytes(), self.record.itemsize)
        path = self.path(epoch)
        try:
            # Which keeps what is in the file.
            with open(path, "wb", opener=lambda name, flags: os.open(name, flags & ~os.O_TRUNC, 0o666)) as file:
                file.seek(start * self.record.itemsize)
                file.write(records.tobytes())
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(path)) from None  # a failed write does not say where

    def sync(self, epoch: int) -> None:
        """Returns when what this process wrote of an epoch is on the disk."""
        if self.path(epoch).exists():
            with open(self.path(epoch), "rb") as file:
                os.fsync(file.fileno())

    # -- reading ---------------------------------------------------------------------------------------------------

    @classmethod
    def open(cls, folder: str | Path) -> Self:
        """The store in `folder`. Raises UserError where there is none."""
        folder = Path(folder).expanduser()
        path = folder / STORE
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(content, dict) or content.get("format") != FORMAT:
                raise UserError(f"{path}: not of this version of the project: write the logits again")
            return cls(folder, **content)
        except FileNotFoundError:
            raise UserError(f"{folder}: no logits are stored there (it has no {STORE})") from None
        except (ValueError, TypeError) as error:
            raise UserError(f"{path}: cannot be read ({error}): write the logits again") from None

    def require(self, seen: Mapping[str, Any], epochs: int, positions: int) -> None:
        """Raises UserError unless the store has what a training needs, by the key that differs.

        seen: as that of the store. epochs: whose logits the training reads. positions: of an epoch that it visits.
        """
        for key in (*seen, *self.seen):
            theirs, ours = (json.dumps(each.get(key)) for each in (self.seen, seen))
            if theirs != ours:
                raise UserError(f"{self.folder}: the teacher saw images of {key}={theirs}, this command says {ours}")
        if epochs > self.written:
            has = f"has logits of {self.written} epochs"
            if self.written < self.epochs:
                has += f" so far, of {self.epochs}"
            raise UserError(
                f"{self.folder}: {has}, this training reads {epochs}: write more, or repeat the epochs by "
                f"recipe.cycle_epochs={max(self.written, 1)}"
            )
        if positions > self.positions:
            raise UserError(
                f"{self.folder}: has logits of {self.positions} images of an epoch, this training visits {positions}: "
                "give the batch_size that they were written with"
            )
        expected = self.positions * self.record.itemsize
        for path in map(self.path, range(epochs)):
            found = path.stat().st_size if path.is_file() else 0
            if found != expected:
                raise UserError(f"{path}: has {found:,} bytes instead of {expected:,}: write the logits again")

    def read(self, epoch: int, positions: Tensor) -> TeacherLogits:
        """The logits for successive positions, int64 [N], of an epoch. Raises UserError for a damaged record."""
        start, path = int(positions[0]), self.path(epoch)
        try:
            with open(path, "rb", buffering=0) as file:
                content = os.pread(file.fileno(), len(positions) * self.record.itemsize, start * self.record.itemsize)
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror})") from None
        records = np.frombuffer(content[: len(content) // self.record.itemsize * self.record.itemsize], self.record)
        good = records["checksum"] == _checksums(content, self.record.itemsize)
        if len(records) < len(positions) or not good.all():
            position = start + int(np.append(good, False).argmin())
            raise UserError(f"{path}: position {position} is damaged or was never written: write the logits again")
        values, classes = torch.from_numpy(records["values"].copy()), records["classes"].astype(np.int64)
        return TeacherLogits(values, torch.from_numpy(classes))


def top_logits(logits: Tensor, top: int, dtype: str) -> TeacherLogits:
    """The `top` largest of floats [N, C] as logarithms of probabilities, on the CPU, in the dtype of a store."""
    values, classes = logits.float().log_softmax(dim=1).topk(top, dim=1)
    return TeacherLogits(values.to(getattr(torch, dtype)).cpu(), classes.cpu())


def _checksums(records: bytes, size: int) -> np.ndarray:
    """uint32 [N]: the CRC-32 of all but the last four bytes of each of N whole records of `size` bytes."""
    return np.array([zlib.crc32(records[end - size : end - 4]) for end in range(size, len(records) + 1, size)], "<u4")
