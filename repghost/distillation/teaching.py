"""The teacher of a run as its config names it: one that answers in each step, or the stored answers of one.

Check: `pytest tests/test_distillation.py tests/test_logits_store.py`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from repghost.dataset import SplitIndex, TeacherLogits
from repghost.distillation.loss import Distillation
from repghost.distillation.store import LogitsStore
from repghost.distillation.teacher import Inputs, Teacher, open_teacher
from repghost.run import flat


class TaughtData(Protocol):
    """What a teacher needs of the data module."""

    teacher: Callable[[int, Tensor], TeacherLogits] | None
    batch_size: int
    cycle_epochs: int | None

    def index(self, split: str) -> SplitIndex: ...

    def decoder(self, on_gpu: bool) -> str: ...

    @property
    def fingerprints(self) -> dict[str, str]: ...

    @property
    def steps_per_epoch(self) -> int: ...


@dataclass(frozen=True)
class Teaching:
    """By whom and how a training is taught.

    teacher: None where its logits come with the batches. name, weights: of the teacher, the latter as SHA-256.
    """

    loss: Distillation
    teacher: Teacher | None
    name: str
    weights: str

    def __str__(self) -> str:
        how = "its most probable class" if self.loss.loss == "hard" else f"temperature {self.loss.temperature:g}"
        who = str(self.teacher) if self.teacher else f"{self.name}, stored logits"
        return f"{who}: {self.loss.weight:g} of the loss, {how}"


def open_teaching(config: DictConfig, data: TaughtData, device: torch.device) -> Teaching | None:
    """The teaching of a resolved config of train.py, None without a teacher. `data` then gives stored logits.

    data: loaded for training. device: of the training. Raises UserError for a teacher that does not fit the data.
    """
    recipe = config.recipe
    loss = Distillation(recipe.teacher_loss, recipe.teacher_weight, recipe.teacher_temperature)
    if config.teacher:
        teacher = teacher_of(config, data)
        return Teaching(loss, teacher, teacher.name, teacher.weights)
    if not recipe.teacher_logits:
        return None
    store = LogitsStore.open(recipe.teacher_logits)
    epochs = min(config.epochs, data.cycle_epochs or config.epochs)
    store.require(seen_images(config, data, device), epochs, data.steps_per_epoch * data.batch_size)
    data.teacher = store.read
    return Teaching(loss, None, store.teacher, store.weights)


def teacher_of(config: DictConfig, data: TaughtData) -> Teacher:
    """The teacher that `teacher` names, on the CPU."""
    ours = Inputs(None, config.recipe.augment.mean, config.recipe.augment.std)
    return open_teacher(config.teacher, config.recipe.teacher_image_size, ours, data.index("train"))


def seen_images(config: DictConfig, data: TaughtData, device: torch.device) -> dict[str, Any]:
    """By the keys of train.py, all that decides which images a training shows at a position of an epoch."""
    recipe: Any = OmegaConf.to_container(config.recipe, resolve=True)
    seen: dict[str, Any] = {
        "seed": config.seed,
        "data.root": data.fingerprints["train"],
        "loader": data.decoder(device.type == "cuda"),
        "train_image_size": config.train_image_size or config.image_size,
        "recipe.start_image_size": recipe["start_image_size"],
    }
    if recipe["start_image_size"]:
        seen |= {"epochs": config.epochs, "recipe.full_size_epochs": recipe["full_size_epochs"]}
    read = {key: recipe[key] for key in ("scale", "ratio", "mix", "augment")}
    return seen | {key: value for key, value in flat(read, "recipe.").items() if not key.endswith("_target_")}
