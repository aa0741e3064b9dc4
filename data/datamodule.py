"""ImageNetData: shards in, augmented batches on the training device out.

Check: `pytest tests/test_loader.py tests/test_dali_loader.py tests/test_resume.py`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor

from data.augment import Augment, Normalize
from data.crops import CenterCrops, Crops, RandomCrops
from data.dali_loader import DaliLoader, dali_installed
from data.folders import holds_images, shards_of_images
from data.index import Index, load_indexes
from data.loader_plan import LoaderPlan, plan_loader
from data.reader import LoaderOptions, allow_open_files
from data.remote import download_shards, is_remote
from data.row_plan import RowPlan
from data.sampling import RankSampler, epoch_order
from data.torch_loader import CroppedBatches, TorchLoader
from repghost.dataset import Batch, DataModule
from repghost.errors import UserError, print_rank_zero
from repghost.machine import cpus_per_rank
from repghost.training.module import step_seed

SPLITS = {"fit": ("train", "val"), "validate": ("val",), "show": ("train",)}  # of Lightning's stages and data.show

_NOISE = 1  # keeps the seeds of the erase noise apart from those of the network's own draws


@dataclass(kw_only=True, eq=False, repr=False)
class ImageNetData(DataModule):
    """Validation images of a shard folder; the fields are the keys of conf/data/imagenet.yaml.

    root: the folder, its URL, or a folder of class folders. train, val: globs of foreign shards, None for others and
    this project's own. workers: decoding processes or threads per rank, or `auto` for the rank's share of the cores.
    readers: processes that read for DALI, or `auto`, see data.loader_plan. `setup` has to be called first, as Lightning
    does.
    """

    root: str | Path
    train: str | None
    val: str | None
    class_names: str | None
    cache: str | Path
    workers: int | str
    readers: int | str
    prefetch: int
    hw_decoder_load: float
    thread_affinity: bool
    loader: str
    eval_batch_size: int
    image_size: int
    crop_fraction: float
    augment: Normalize

    def __post_init__(self) -> None:
        super().__init__()
        if is_remote(self.root) and (self.train or self.val):
            what = "shards named by data.train or data.val cannot be read from a URL"
            raise UserError(f"data.root={self.root}: {what}: copy them to a local folder")
        self._indexes: dict[str, Index] = {}
        self._copies: torch.cuda.Stream | None = None
        self._loader_plan: LoaderPlan | None = None

    # -- what the data set is --------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Loads the indexes of a stage ("fit", "validate", or "show" for data.show) that are not loaded yet.

        Shards at a URL are downloaded into the cache folder first, and class folders are written there as shards.
        """
        if missing := [split for split in SPLITS[stage] if split not in self._indexes]:
            patterns = {"train": self.train, "val": self.val}
            root = self._local_shards(missing)
            self._indexes |= load_indexes(root, missing, self.cache, patterns, self.class_names)
            if any(index.category_ids for index in self._indexes.values()):
                raise UserError(
                    f"{root}: shards for detection, whose images have no labels: give task=detection data=coco"
                )
            allow_open_files(sum(len(index.shards) for index in self._indexes.values()))

    def _local_shards(self, splits: Sequence[str]) -> Path:
        """The folder of this machine that holds the shards of `splits`."""
        if is_remote(self.root):
            return download_shards(str(self.root), self.cache, splits)
        root = Path(self.root).expanduser()
        if self.train is None and self.val is None and root.is_dir() and holds_images(root):
            return shards_of_images(root, Path(self.cache).expanduser(), splits)
        return root

    def index(self, split: str) -> Index:
        """The index of a split that was loaded."""
        return self._indexes[split]

    @property
    def fingerprints(self) -> dict[str, str]:
        return {split: index.fingerprint for split, index in self._indexes.items()}

    def images(self, split: str, rows: Sequence[int]) -> Tensor:
        crops = CroppedBatches(self._center_crops(split, RankSampler(len(self.index(split)), batch_size=1)))
        return torch.cat([crops[0, row][0].images for row in rows])

    # -- loaders ---------------------------------------------------------------------------------------------------

    def val_dataloader(self) -> TorchLoader | DaliLoader:
        return self._loader(self._center_crops("val", self._sampler("val", self.eval_batch_size)))

    def _sampler(self, split: str, batch_size: int) -> RankSampler:
        trainer, training = self._trainer, split == "train"
        accumulate = trainer.accumulate_grad_batches if training else 1
        count, rank, ranks = len(self.index(split)), trainer.global_rank, trainer.world_size
        return RankSampler(count, batch_size, rank, ranks, accumulate, drop_last=training)

    def _center_crops(self, split: str, sampler: RankSampler) -> CenterCrops:
        return CenterCrops(self.index(split), sampler, self.image_size, self.crop_fraction)

    def _loader(self, crops: Crops, **options: Any) -> TorchLoader | DaliLoader:
        device = self._trainer.strategy.root_device
        ranks = self._trainer.world_size // self._trainer.num_nodes
        plan = self._loader_plan = self._loader_plan or self._planned(device.type == "cuda", ranks)
        shared = LoaderOptions(
            workers=plan.workers,
            readers=plan.readers,
            prefetch=plan.prefetch,
            hw_decoder_load=self.hw_decoder_load,
            thread_affinity=self.thread_affinity,
            pin_memory=device.type == "cuda",
            ranks=ranks,
            **options,
        )
        return DaliLoader(crops, shared, device.index) if plan.loader == "dali" else TorchLoader(crops, shared)

    def _planned(self, on_gpu: bool, ranks: int) -> LoaderPlan:
        """The plan of this rank's loaders, which is printed."""
        plan = plan_loader(
            self.loader,
            self.workers,
            self.readers,
            self.prefetch,
            cores=cores_of_a_rank(on_gpu, ranks),
            on_gpu=on_gpu,
            has_dali=dali_installed(),
        )
        print_rank_zero(f"loader     {plan}")
        return plan

    @property
    def _trainer(self) -> pl.Trainer:
        assert self.trainer is not None, "the data module is used through a Trainer"
        return self.trainer

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
        return batch._replace(images=self.augment.evaluate(batch.images))


def cores_of_a_rank(on_gpu: bool, ranks: int) -> int:
    """Cores for each of the ranks on this machine; GPUs without a rank leave theirs to other runs."""
    cores = cpus_per_rank()
    if on_gpu and (gpus := torch.cuda.device_count()) > ranks:
        return max(1, cores * ranks // gpus)
    return cores


@dataclass(kw_only=True, eq=False, repr=False)
class ImageNetTraining(ImageNetData):
    """Training images, too; the further fields are the keys of `data` in conf/train.yaml.

    batch_size: global. skip_budget: share of the training images that may be bad (masked and counted) per epoch;
    validation has none. scale, ratio: of the area and aspect of random crops.
    """

    augment: Augment
    skip_budget: float
    batch_size: int
    scale: Sequence[float]
    ratio: Sequence[float]
    seed: int

    def __post_init__(self) -> None:
        super().__post_init__()
        self._batch = 0  # number in its epoch of the batch that is on its way to the device
        self._rows: RowPlan | None = None  # of its augmentation
        self._training: TorchLoader | DaliLoader | None = None

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

    def train_dataloader(self) -> TorchLoader | DaliLoader:
        parts = self._trainer.world_size * self._trainer.accumulate_grad_batches
        sampler = self._sampler("train", self.batch_size // parts)
        skip_bad = int(self.skip_budget * sampler.samples)
        self._training = self._loader(self._random_crops(sampler), start=self._next_batch, skip_bad=skip_bad)
        return self._training

    @property
    def seconds_waited(self) -> float:
        return self._training.seconds_waited if self._training else 0.0

    def _random_crops(self, sampler: RankSampler) -> RandomCrops:
        return RandomCrops(self.index("train"), sampler, self.image_size, self.seed, self.scale, self.ratio)

    def _next_batch(self) -> tuple[int, int]:
        """(epoch, batch) that the trainer needs next, by the optimizer steps done, also right after a resume."""
        epoch, step = divmod(self._trainer.global_step, self.steps_per_epoch)
        return epoch, step * self._trainer.accumulate_grad_batches

    def on_before_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Notes which batch it is and what it draws; on the device that could not be read without waiting."""
        if self._trainer.training:
            self._batch = int(batch.positions[0]) // (self.batch_size // self._trainer.accumulate_grad_batches)
            on_gpu = self._trainer.strategy.root_device.type == "cuda"
            self._rows = self.augment.plan(batch.uniforms) if on_gpu else None
        return batch

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """The same with its images augmented, in training; on a GPU perhaps bfloat16, see `Augment.match_step`."""
        if not self._trainer.training:
            return super().on_after_batch_transfer(batch, dataloader_idx)
        seed = step_seed(self.seed, self._trainer.current_epoch, self._batch, self._trainer.global_rank, _NOISE)
        noise = torch.Generator(batch.images.device).manual_seed(seed)
        return batch._replace(images=self.augment.train(batch.images, batch.uniforms, noise, self._rows))

    # -- for data.show ---------------------------------------------------------------------------------------------

    def preview(self, samples: int, epochs: int) -> Iterator[Tensor]:
        """Normalized [samples, 3, S, S] of the first training samples: as in evaluation, then as in each epoch."""
        count = len(self.index("train"))
        one, first = RankSampler(count, batch_size=1), range(min(samples, count))
        evaluated, trained = CroppedBatches(self._center_crops("train", one)), CroppedBatches(self._random_crops(one))
        yield self.augment.evaluate(torch.cat([evaluated[0, i][0].images for i in first]))
        for epoch in range(epochs):
            positions = np.argsort(epoch_order(self.seed, epoch, count))
            batches = [trained[epoch, int(positions[i])][0] for i in first]
            images, uniforms = torch.cat([b.images for b in batches]), torch.cat([b.uniforms for b in batches])
            noise = torch.Generator().manual_seed(step_seed(self.seed, epoch))
            yield self.augment.train(images, uniforms, noise)
