"""The batches of train.py without its training: what its data module gives a step, for the benchmarks."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import DictConfig

from benchmarks.common import ROOT
from repghost.dataset import Batch
from repghost.run import resolve_recipe
from repghost.training.trainer import compiles


def training_config(device: torch.device, *overrides: str) -> DictConfig:
    """The config of train.py on one such device."""
    of_device = [f"trainer={'cpu' if device.type == 'cpu' else 'gpu'}", "trainer.devices=1"]
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        config = compose("train", [*of_device, *overrides])
    resolve_recipe(config)
    return config


class InTraining:
    """A Trainer of train.py as its data module sees it in the middle of a training, without the training.

    global_step: counts the batches that were taken.
    """

    training, current_epoch = True, 0

    def __init__(self, trainer: Any) -> None:
        self._trainer, self.global_step = trainer, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._trainer, name)


def training_batches(config: DictConfig, augmented: bool = True) -> Iterator[Batch]:
    """What a training with this config takes its steps on, on its device, epoch after epoch.

    The data module chooses the loader, its workers and all else. augmented: with what is computed on the device, which
    is compiled as in train.py; without it the batches are uint8, as they come from the loader.
    """
    trainer = InTraining(instantiate(config.trainer)(directory=Path.cwd()))
    device = trainer.strategy.root_device
    data: Any = instantiate(config.data)
    data.trainer = trainer
    data.setup("fit")
    data.augment.match_step(device, trainer.precision, config.channels_last)
    if compiles(config.compile, device):
        data.augment.compile()
    loader = data.train_dataloader()
    while True:
        for batch in loader:
            trainer.global_step += 1
            moved = data.transfer_batch_to_device(data.on_before_batch_transfer(batch, 0), device, 0)
            yield data.on_after_batch_transfer(moved, 0) if augmented else moved
