"""What the data modules of classification and detection share: shards, order, ranks, copies to the device, resume.

Check: `pytest tests/test_loader.py tests/test_detection_data.py tests/test_resume.py`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

import pytorch_lightning as pl
import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor

from data.dali_loader import DaliLoader, dali_installed
from data.index import Index
from data.loader_plan import plan_loader
from data.reader import EpochLoader, LoaderOptions
from data.remote import download_shards, is_remote
from data.sampling import RankSampler
from data.torch_loader import BatchLoader
from repghost.dataset import Batch, DataModule, DetectionBatch
from repghost.errors import UserError, print_rank_zero
from repghost.machine import cpus_per_rank

SPLITS = {"fit": ("train", "val"), "validate": ("val",), "show": ("train",)}  # of Lightning's stages and data.show

AnyIndex = TypeVar("AnyIndex", bound=Index)
AnyLoader = TypeVar("AnyLoader", bound=BatchLoader | DaliLoader)


@dataclass(kw_only=True, eq=False, repr=False)
class ShardData(DataModule, Generic[AnyIndex]):
    """The validation images of a shard folder.

    root: the folder, or its URL. cache: for what is downloaded and made. workers: processes or threads per rank that
    decode, or `auto` for the rank's share of the cores. prefetch: batches that each of them is ahead. eval_batch_size:
    per rank. `setup` has to be called first, as Lightning does.
    """

    root: str | Path
    cache: str | Path
    workers: int | str
    prefetch: int
    eval_batch_size: int

    def __post_init__(self) -> None:
        super().__init__()
        self._indexes: dict[str, AnyIndex] = {}
        self._copies: torch.cuda.Stream | None = None
        self._loader_plan: LoaderOptions | None = None
        self._training: EpochLoader | None = None
        self._loaders: list[BatchLoader | DaliLoader] = []  # of the stage that is running

    def _local_shards(self, splits: Sequence[str]) -> Path:
        """The folder of this machine that holds the shards of `splits`, which are downloaded if `root` is a URL."""
        if is_remote(self.root):
            return download_shards(str(self.root), self.cache, splits)
        return Path(self.root).expanduser()

    def index(self, split: str) -> AnyIndex:
        """The index of a split that was loaded."""
        return self._indexes[split]

    @property
    def fingerprints(self) -> dict[str, str]:
        return {split: index.fingerprint for split, index in self._indexes.items()}

    def _count(self, split: str) -> int:
        """How many images of a split an epoch has."""
        return len(self.index(split))

    def teardown(self, stage: str) -> None:
        """Ends the processes of the loaders, when a stage of Lightning's has come to its end."""
        for loader in self._loaders:
            loader.close()
        self._loaders.clear()

    # -- loaders ---------------------------------------------------------------------------------------------------

    def _opened(self, loader: AnyLoader) -> AnyLoader:
        """The same, which `teardown` closes."""
        self._loaders.append(loader)
        return loader

    def _sampler(self, split: str, batch_size: int) -> RankSampler:
        trainer, training = self._trainer, split == "train"
        accumulate = trainer.accumulate_grad_batches if training else 1
        count, rank, ranks = self._count(split), trainer.global_rank, trainer.world_size
        return RankSampler(count, batch_size, rank, ranks, accumulate, drop_last=training)

    def _planned(self, loader: str, readers: int | str, **options: Any) -> LoaderOptions:
        """What a loader takes: `options`, and the plan of this rank's loaders, which is printed once."""
        if self._loader_plan is None:
            on_gpu = self._on_gpu
            self._loader_plan = plan_loader(
                loader,
                self.workers,
                readers,
                self.prefetch,
                cores=cores_of_a_rank(on_gpu, self._ranks),
                on_gpu=on_gpu,
                has_dali=dali_installed(),
            )
            print_rank_zero(f"loader     {self._loader_plan}")
        return replace(self._loader_plan, pin_memory=self._on_gpu, ranks=self._ranks, **options)

    @property
    def _on_gpu(self) -> bool:
        return self._trainer.strategy.root_device.type == "cuda"

    @property
    def _ranks(self) -> int:
        """Ranks on this machine."""
        return self._trainer.world_size // self._trainer.num_nodes

    @property
    def _trainer(self) -> pl.Trainer:
        assert self.trainer is not None, "the data module is used through a Trainer"
        return self.trainer

    # -- on the training device ------------------------------------------------------------------------------------

    def transfer_batch_to_device(self, batch: Batch | DetectionBatch, device: torch.device, dataloader_idx: int) -> Any:
        """The batch on `device`; to a GPU beside what that is computing, which is the step before."""
        if device.type != "cuda" or batch.images[0].is_cuda:
            return super().transfer_batch_to_device(batch, device, dataloader_idx)
        self._copies = self._copies or torch.cuda.Stream(device)
        computing = torch.cuda.current_stream(device)
        with torch.cuda.stream(self._copies):
            moved = super().transfer_batch_to_device(batch, device, dataloader_idx)
        computing.wait_stream(self._copies)
        # Its memory was allocated for the other stream.
        apply_to_collection(moved, Tensor, lambda tensor: tensor.record_stream(computing))
        return moved


@dataclass(kw_only=True, eq=False, repr=False)
class ShardTraining(ShardData[AnyIndex]):
    """Training images, too.

    batch_size: global. skip_budget: share of the training images that may be bad (masked and counted) per epoch;
    validation has none.
    """

    skip_budget: float
    batch_size: int
    seed: int

    @property
    def counts(self) -> tuple[int, int]:
        """Numbers of training and of validation images."""
        return self._count("train"), self._count("val")

    @property
    def num_classes(self) -> int:
        """Number of classes of the loaded splits; shards of others may not show them all in each."""
        return max(len(index.classes) for index in self._indexes.values())

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of a training epoch: whole global batches only."""
        images = self._count("train")
        if images < self.batch_size:
            raise UserError(f"batch_size={self.batch_size} is larger than the {images} training images")
        return images // self.batch_size

    def state_dict(self) -> dict[str, Any]:
        return self.fingerprints

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for split, fingerprint in state_dict.items():
            if self.index(split).fingerprint != fingerprint:
                what = f"the {split} images are not those that this run began with"
                raise UserError(f"{what}: give back the old data.root, or a new name=")

    def _training_sampler(self) -> RankSampler:
        parts = self._trainer.world_size * self._trainer.accumulate_grad_batches
        return self._sampler("train", self.batch_size // parts)

    def _training_options(self) -> dict[str, Any]:
        """What the loader of the training begins with, and how many bad images an epoch may have."""
        skip_bad = int(self.skip_budget * self._training_sampler().samples)
        return {"start": self._next_batch, "skip_bad": skip_bad}

    @property
    def seconds_waited(self) -> float:
        return self._training.seconds_waited if self._training else 0.0

    def _next_batch(self) -> tuple[int, int]:
        """(epoch, batch) that the trainer needs next, by the optimizer steps done, also right after a resume."""
        epoch, step = divmod(self._trainer.global_step, self.steps_per_epoch)
        return epoch, step * self._trainer.accumulate_grad_batches


def cores_of_a_rank(on_gpu: bool, ranks: int) -> int:
    """Cores for each of the ranks on this machine; GPUs without a rank leave theirs to other runs."""
    cores = cpus_per_rank()
    if on_gpu and (gpus := torch.cuda.device_count()) > ranks:
        return max(1, cores * ranks // gpus)
    return cores
