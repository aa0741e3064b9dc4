"""The training step of this project and timm's, each as a function that runs one on a batch: for train_step.py."""

import atexit
import multiprocessing
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import Executor, ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig
from timm.loss import LabelSmoothingCrossEntropy
from timm.optim import create_optimizer_v2
from timm.utils import ModelEmaV2
from torch import nn

from benchmarks.common import kernels_of_training, wait_for
from benchmarks.feeding import training_config
from benchmarks.setting import IMAGE_SIZE
from repghost.dataset import Batch, TeacherLogits
from repghost.distillation.loss import Distillation
from repghost.distillation.store import LogitsStore, top_logits
from repghost.distillation.teaching import Teaching
from repghost.training.trainer import keep_freed_memory

CLASSES = 1000
WARM_UP = {"cuda": 30, "cpu": 2}  # steps that compile, record, and let cuDNN time its kernels
Step = Callable[[Batch], None]


@dataclass(frozen=True)
class Run:
    """What is trained, and on what."""

    device: torch.device
    width: float
    batch_size: int
    threads: int  # of a step on a CPU
    workers: int | str  # of this project's loader, or auto

    @property
    def amp(self) -> torch.autocast:
        """bf16 on a GPU, float32 on a CPU, as both projects do by default."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda")

    @property
    def overrides(self) -> list[str]:
        """The keys of train.py for this training, beside those of its device."""
        size = [f"width={self.width}", f"batch_size={self.batch_size}"]
        return [*size, f"data.workers={self.workers}", f"trainer.threads={self.threads}"]

    def config(self, *more: str) -> DictConfig:
        """The config of train.py with these keys."""
        return training_config(self.device, *self.overrides, *more)

    def batch(self) -> Batch:
        """Noise; what is in the images costs nothing."""
        shape = (self.batch_size, 3, IMAGE_SIZE, IMAGE_SIZE)
        labels = torch.randint(CLASSES, shape[:1], device=self.device)
        return Batch(torch.randn(shape, device=self.device), labels, torch.arange(self.batch_size), torch.empty(0))

    def wait(self) -> None:
        wait_for(self.device)

    def process(self) -> Executor:
        """A process of its own: how memory is allocated, and what is compiled, belong to a process."""
        return ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), initializer=self.set_up)

    def set_up(self) -> None:
        """Makes this process one that trains, in the same way for all that is compared."""
        torch.set_num_threads(self.threads)
        kernels_of_training()


def our_step(run: Run, compile: bool | str, taught: bool = False) -> Step:
    """ImageClassifier as train.py builds it, without Lightning around it; compile: the key of that name.

    Its images are float32, as timm's are: on a GPU it casts them, which train.py leaves to the augmentation.
    taught: with ten stored logits of a teacher for each image, which are read in every step.
    """
    config = run.config("data.root=not read", f"compile={compile}")
    if run.device.type == "cpu":
        keep_freed_memory()  # as make_trainer does
    model = instantiate(config.model, num_classes=CLASSES)
    store = stored_logits(run) if taught else None
    teaching = Teaching(Distillation("soft", 0.5, 1.0), None, "noise", "") if taught else None
    classifier = instantiate(config.classifier)(model, config.recipe, steps_per_epoch=1000, teaching=teaching)
    classifier = classifier.to(run.device)
    classifier.on_fit_start()
    optimizer = classifier.configure_optimizers()

    def step(batch: Batch) -> None:
        if store:
            logits = store.read(0, batch.positions)
            batch = batch._replace(teacher=TeacherLogits(*(tensor.to(run.device) for tensor in logits)))
        classifier.on_train_batch_start(batch, 0)
        with run.amp:
            loss = classifier.training_step(batch, 0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        classifier.ema.update(classifier.model)

    return step


def stored_logits(run: Run) -> LogitsStore:
    """A store of an epoch of one batch, in a folder that is removed when the process ends."""
    folder = tempfile.TemporaryDirectory()
    atexit.register(folder.cleanup)
    store = LogitsStore(Path(folder.name), "noise", "", CLASSES, 10, "float16", run.batch_size, 1, {})
    store.write(0, 0, top_logits(torch.randn(run.batch_size, CLASSES), store.top, store.dtype))
    return store


def timm_step(run: Run, compile: bool) -> Step:
    """The inner loop of timm's training script; compile: with channels_last, too."""
    name = f"repghostnet_{round(100 * run.width):03d}"
    model: nn.Module = timm.create_model(name, num_classes=CLASSES, drop_rate=0.2)
    layout = torch.channels_last if compile else torch.contiguous_format
    model = model.to(run.device).to(memory_format=layout).train()
    optimizer = create_optimizer_v2(model, "sgd", lr=0.01, momentum=0.9, weight_decay=1e-5)
    average, loss_of = ModelEmaV2(model, decay=0.9999), LabelSmoothingCrossEntropy(0.1)
    network = torch.compile(model) if compile else model

    def step(batch: Batch) -> None:
        with run.amp:
            loss = loss_of(network(batch.images.contiguous(memory_format=layout)), batch.labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        average.update(model)

    return step


_ready: dict[str, Any] = {}  # the step and the batch of this process


def first_steps(make: Callable[[Run], Step], run: Run) -> float:
    """Makes the step and warms it up; seconds to the end of the second step, without imports."""
    start = time.perf_counter()
    _ready.update(step=make(run), batch=run.batch())
    timed_steps(run, 2)
    seconds = time.perf_counter() - start
    timed_steps(run, WARM_UP[run.device.type] - 2)
    return seconds


def timed_steps(run: Run, steps: int) -> float:
    """What so many steps take in this process."""
    run.wait()
    start = time.perf_counter()
    for _ in range(steps):
        _ready["step"](_ready["batch"])
    run.wait()
    return time.perf_counter() - start
