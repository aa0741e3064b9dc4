"""Runs of train.py in processes of their own, as users, job managers and the kernel see them; what they trained on.

And a power cut for a run in this process.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY

from repghost.training.classifier import ImageClassifier
from repghost.training.module import TrainingModule

ROOT = Path(__file__).parents[1]


class Process:
    """train.py as a user starts it, in a session of its own."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        self.log = folder / "log"
        with open(self.log, "w") as log:
            self._process = subprocess.Popen(
                [sys.executable, str(ROOT / "train.py"), *arguments],
                cwd=folder, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip

    @property
    def said(self) -> str:
        return self.log.read_text()

    def until(self, condition: Callable[[], bool]) -> None:
        """Waits."""
        while not condition():
            assert self._process.poll() is None, self.said
            time.sleep(0.01)

    def signal(self, number: int) -> None:
        self._process.send_signal(number)

    def signal_all(self, number: int) -> None:
        """As Ctrl-C does: to the program and everything that it started."""
        os.killpg(self._process.pid, number)

    def children(self) -> list[int]:
        """Processes that it started and that are left."""
        path = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children")
        return [int(pid) for pid in path.read_text().split()]

    def ranks(self) -> list[int]:
        """Those of its children that are ranks, in their order."""
        return [pid for pid in self.children() if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]

    def ends(self, within: float = 600) -> int:
        """The exit code, once every process of the session has ended."""
        code = self._process.wait(within)
        until = time.monotonic() + within
        while _session_lives(self._process.pid):
            assert time.monotonic() < until, f"a process is left:\n{self.said}"
            time.sleep(0.05)
        return code


def _session_lives(leader: int) -> bool:
    try:
        os.killpg(leader, 0)
    except ProcessLookupError:
        return False
    return True


StartTrain = Callable[..., Process]


@contextmanager
def processes(folder: Path, shards: Path, common: Sequence[str] = TINY) -> Iterator[StartTrain]:
    """Starts train.py in `folder`; what is left of it at the end is killed."""
    started: list[Process] = []

    def start(*arguments: str) -> Process:
        started.append(Process(folder, *common, f"data.root={shards}", *arguments))
        return started[-1]

    try:
        yield start
    finally:
        for each in started:
            if _session_lives(each._process.pid):
                each.signal_all(signal.SIGKILL)


def images_trained_on(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """(epoch, position) of every image that this process will train on, in order."""
    found: list[tuple[int, int]] = []
    original = ImageClassifier.training_step

    def spy(self: ImageClassifier, batch: Any, batch_idx: int) -> Any:
        found.extend((self.current_epoch, position) for position in batch[2].tolist())
        return original(self, batch, batch_idx)

    monkeypatch.setattr(ImageClassifier, "training_step", spy)
    return found


def stopped_at(run: Path) -> tuple[int, int]:
    """(epoch, images of it) that the checkpoint of a run stands at."""
    checkpoint = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    return checkpoint["epoch"], int(checkpoint["train_sums"][:, 1].sum())


class PowerCut(BaseException):
    """Nothing may catch it, as nothing can catch SIGKILL."""


def cut_after(
    patched: pytest.MonkeyPatch, epoch: int, batch: int, module: type[TrainingModule] = ImageClassifier
) -> None:
    """Ends a run in this process with PowerCut right after the step of this batch."""
    step = module.optimizer_step

    def cut(self: TrainingModule, at_epoch: int, at_batch: int, *arguments: Any) -> None:
        step(self, at_epoch, at_batch, *arguments)
        if (at_epoch, at_batch) == (epoch, batch):
            raise PowerCut

    patched.setattr(module, "optimizer_step", cut)
