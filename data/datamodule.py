"""ImageNetData: shards in, augmented batches on the training device out."""

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor

from data.augment import Augment, Normalize
from data.crops import EvaluationPlan, Plan, TrainPlan
from data.dali_loader import DaliLoader, dali_installed
from data.index import Index, load_index
from data.reader import allow_open_files
from data.remote import is_url, stage
from data.sampling import Partition, epoch_order
from data.torch_loader import PlannedBatches, TorchLoader
from repghost.dataset import Batch, DataModule
from repghost.errors import UserError, print_rank_zero
from repghost.training.classifier import step_seed

_NOISE = 1  # keeps the seeds of the erase noise apart from those of the network's own draws


@dataclass(frozen=True)
class _Training:
    """What only training reads."""

    augment: Augment
    skip_budget: float
    batch_size: int
    scale: Sequence[float]
    ratio: Sequence[float]
    seed: int


class ImageNetData(DataModule):
    """Training and validation images of a shard folder.

    root: the folder, or its URL. train, val: globs of foreign shards, None for this project's own. batch_size: global.
    workers: processes that decode, per rank, or `auto` for one a core. skip_budget: share of the training images that
    may be bad (masked and counted) per epoch; validation has none. Evaluation needs neither this nor batch_size, scale,
    ratio and seed, and an `augment` that normalizes only.
    """

    def __init__(
        self,
        *,
        root: str | Path,
        train: str | None,
        val: str | None,
        class_names: str | None,
        cache: str | Path,
        workers: int | str,
        prefetch: int,
        loader: str,
        eval_batch_size: int,
        image_size: int,
        crop_fraction: float,
        augment: Normalize,
        skip_budget: float | None = None,
        batch_size: int | None = None,
        scale: Sequence[float] | None = None,
        ratio: Sequence[float] | None = None,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        if image_size < 32:
            raise UserError(f"image_size={image_size}: the network divides by 32, so at least 32")
        if not 0 < crop_fraction <= 1:
            raise UserError(f"data.crop_fraction={crop_fraction} is not in (0, 1]")
        if loader not in ("auto", "dali", "torch"):
            raise UserError(f"loader={loader} is not one of auto, dali, torch")
        if seed is not None and seed < 0:
            raise UserError(f"seed={seed}: not negative")
        self.augment = augment
        self._copies: torch.cuda.Stream | None = None
        if is_url(root) and (train or val):
            raise UserError(
                f"data.root={root}: shards named by data.train or data.val cannot be read from a URL: "
                "copy them to a local folder"
            )
        self._root = root
        self._cache = cache
        self._patterns = {"train": train, "val": val}
        self._class_names = class_names
        self._indexes: dict[str, Index] = {}
        self._loader_name = loader
        self._workers = workers
        self._prefetch = prefetch
        training = (skip_budget, batch_size, scale, ratio, seed)
        self._train_options = None if None in training else _Training(augment, *training)  # type: ignore[arg-type]
        self._eval_batch_size = eval_batch_size
        self._image_size = image_size
        self._crop_fraction = crop_fraction

    @property
    def _training(self) -> _Training:
        assert self._train_options is not None, "a config of evaluate.py has no values for training"
        return self._train_options

    # -- what the data set is --------------------------------------------------------------------------------------

    def load(self, *splits: str) -> Self:
        """Loads the indexes of `train`, `val` or both; nothing else of this class works without.

        Shards at a URL are downloaded into the cache folder first.
        """
        root = stage(str(self._root), self._cache, splits) if is_url(self._root) else self._root
        self._indexes = {
            split: load_index(root, split, self._cache, self._patterns[split], self._class_names) for split in splits
        }
        allow_open_files(sum(len(index.shards) for index in self._indexes.values()))
        return self

    def index(self, split: str) -> Index:
        """The index of a split that was loaded."""
        return self._indexes[split]

    @property
    def counts(self) -> tuple[int, int]:
        """Numbers of training and of validation images."""
        return len(self.index("train")), len(self.index("val"))

    @property
    def num_classes(self) -> int:
        """Number of classes of the loaded splits; shards of others may not show them all in each."""
        return max(len(index.classes) for index in self._indexes.values())

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of a training epoch: whole global batches only."""
        images = len(self.index("train"))
        batch_size = self._training.batch_size
        if images < batch_size:
            raise UserError(f"batch_size={batch_size} is larger than the {images} training images")
        return images // batch_size

    def preview(self, samples: int, epochs: int) -> Iterator[Tensor]:
        """Normalized [samples, 3, S, S] of the first training samples: as in evaluation, then as in each epoch."""
        index, images = self.index("train"), range(min(samples, len(self.index("train"))))
        one = Partition(samples=len(index), rows=1)
        plain = PlannedBatches(self._evaluation_plan(index, one), self._image_size, keep_going=False)
        yield self.augment.evaluate(torch.cat([plain[(0, i)][0].images for i in images]))
        seen = PlannedBatches(self._train_plan(index, one), self._image_size, keep_going=False)
        for epoch in range(epochs):
            positions = np.argsort(epoch_order(self._training.seed, epoch, len(index)))
            batches = [seen[(epoch, int(positions[i]))][0] for i in images]
            pixels, draws = torch.cat([b.images for b in batches]), torch.cat([b.uniforms for b in batches])
            noise = torch.Generator().manual_seed(step_seed(self._training.seed, epoch))
            yield self._training.augment.train(pixels, draws, noise)

    def state_dict(self) -> dict[str, Any]:
        return {split: index.fingerprint for split, index in self._indexes.items()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for split, fingerprint in state_dict.items():
            if self.index(split).fingerprint != fingerprint:
                raise UserError(
                    f"the {split} images are not those that this run began with: "
                    "give back the old data.root, or a new name="
                )

    # -- loaders ---------------------------------------------------------------------------------------------------

    def train_dataloader(self) -> TorchLoader | DaliLoader:
        index, trainer = self.index("train"), self._trainer
        partition = Partition(
            samples=len(index.samples),
            rows=self._training.batch_size // (trainer.world_size * trainer.accumulate_grad_batches),
            rank=trainer.global_rank,
            ranks=trainer.world_size,
            accumulate=trainer.accumulate_grad_batches,
        )
        plan = self._train_plan(index, partition)
        return self._loader(plan, self._train_position, skip_bad=int(self._training.skip_budget * len(index.samples)))

    def val_dataloader(self) -> TorchLoader | DaliLoader:
        index, trainer = self.index("val"), self._trainer
        partition = Partition(
            samples=len(index.samples),
            rows=self._eval_batch_size,
            rank=trainer.global_rank,
            ranks=trainer.world_size,
            drop_last=False,
        )
        plan = self._evaluation_plan(index, partition)
        return self._loader(plan, lambda: (0, 0), skip_bad=0)

    def _train_plan(self, index: Index, partition: Partition) -> TrainPlan:
        training = self._training
        return TrainPlan(
            index,
            partition,
            seed=training.seed,
            image_size=self._image_size,
            scale=training.scale,
            ratio=training.ratio,
        )

    def _evaluation_plan(self, index: Index, partition: Partition) -> EvaluationPlan:
        return EvaluationPlan(index, partition, image_size=self._image_size, crop_fraction=self._crop_fraction)

    def _loader(self, plan: Plan, position: Callable[[], tuple[int, int]], skip_bad: int) -> TorchLoader | DaliLoader:
        share = (os.cpu_count() or 1) // self._local_ranks()
        workers = max(1, share) if self._workers == "auto" else int(self._workers)
        if self._loader_name == "auto":
            # DALI is the faster one, also on a CPU; without workers nothing is to run beside the training.
            self._loader_name = "dali" if dali_installed() and workers > 0 else "torch"
            print_rank_zero(f"loader     {self._loader_name}")
        device = self._trainer.strategy.root_device
        options: dict[str, Any] = {
            "image_size": self._image_size,
            "workers": workers,
            "prefetch": self._prefetch,
            "pin_memory": device.type == "cuda",
            "position": position,
            "skip_bad": skip_bad,
        }
        if self._loader_name == "dali":
            return DaliLoader(plan, device_id=device.index, **options)
        return TorchLoader(plan, **options)

    def _local_ranks(self) -> int:
        return self._trainer.world_size // self._trainer.num_nodes

    @property
    def _trainer(self) -> pl.Trainer:
        assert self.trainer is not None, "the data module is used through a Trainer"
        return self.trainer

    def _train_position(self) -> tuple[int, int]:
        """(epoch, batch) that the trainer asks for next, from its own counters, also right after a checkpoint was read.

        After a whole epoch the batch is the number of batches; the loader takes that for the next epoch's first.
        """
        loop: Any = self._trainer.fit_loop
        return loop.epoch_progress.current.processed, loop.batch_idx + 1

    # -- on the training device ------------------------------------------------------------------------------------

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, dataloader_idx: int) -> Any:
        """The batch on `device`; to a GPU beside what that is computing, which is the step before."""
        if device.type != "cuda" or batch.images.is_cuda:
            return super().transfer_batch_to_device(batch, device, dataloader_idx)
        self._copies = self._copies or torch.cuda.Stream(device)
        computing = torch.cuda.current_stream(device)
        with torch.cuda.stream(self._copies):
            moved = super().transfer_batch_to_device(batch, device, dataloader_idx)
        computing.wait_stream(self._copies)
        for tensor in moved:
            tensor.record_stream(computing)  # its memory was allocated for the other stream
        return moved

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """A loader's batch on its device, with its images normalized: float32 [N, 3, S, S]."""
        if not self._trainer.training:
            return batch._replace(images=self.augment.evaluate(batch.images))
        epoch, step = self._trainer.current_epoch, self._trainer.fit_loop.batch_idx + 1
        seed = step_seed(self._training.seed, epoch, step, self._trainer.global_rank, _NOISE)
        noise = torch.Generator(batch.images.device).manual_seed(seed)
        return batch._replace(images=self._training.augment.train(batch.images, batch.uniforms, noise))
