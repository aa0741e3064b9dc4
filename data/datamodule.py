"""ImageNetData: shards in, augmented batches on the training device out.

Check: `pytest tests/test_loader.py tests/test_dali_loader.py tests/test_resume.py`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data.augment import Augment, Normalize
from data.crops import CenterCrops, Crops, RandomCrops
from data.dali_loader import DaliLoader
from data.folders import holds_images, shards_of_images
from data.index import Index, load_indexes
from data.reader import allow_open_files
from data.remote import is_remote
from data.row_plan import RowPlan
from data.sampling import RankSampler, epoch_order
from data.shard_data import SPLITS, ShardData, ShardTraining
from data.torch_loader import CroppedBatches, TorchLoader
from repghost.dataset import Batch
from repghost.errors import UserError
from repghost.training.module import step_seed

_NOISE = 1  # keeps the seeds of the erase noise apart from those of the network's own draws


@dataclass(kw_only=True, eq=False, repr=False)
class ImageNetData(ShardData[Index]):
    """Validation images of a shard folder; the fields are the keys of conf/data/imagenet.yaml.

    root: may be a folder of class folders, too. train, val: globs of foreign shards, None for others and this
    project's own. readers: processes that read for DALI, or `auto`, see data.loader_plan.
    """

    train: str | None
    val: str | None
    class_names: str | None
    readers: int | str
    hw_decoder_load: float
    thread_affinity: bool
    loader: str
    image_size: int
    crop_fraction: float
    augment: Normalize

    def __post_init__(self) -> None:
        super().__post_init__()
        if is_remote(self.root) and (self.train or self.val):
            what = "shards named by data.train or data.val cannot be read from a URL"
            raise UserError(f"data.root={self.root}: {what}: copy them to a local folder")

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
        root = Path(self.root).expanduser()
        if self.train is None and self.val is None and root.is_dir() and holds_images(root):
            return shards_of_images(root, Path(self.cache).expanduser(), splits)
        return super()._local_shards(splits)

    def images(self, split: str, rows: Sequence[int]) -> Tensor:
        crops = CroppedBatches(self._center_crops(split, RankSampler(len(self.index(split)), batch_size=1)))
        return torch.cat([crops[0, row][0].images for row in rows])

    # -- loaders ---------------------------------------------------------------------------------------------------

    def val_dataloader(self) -> TorchLoader | DaliLoader:
        return self._loader(self._center_crops("val", self._sampler("val", self.eval_batch_size)))

    def _center_crops(self, split: str, sampler: RankSampler) -> CenterCrops:
        return CenterCrops(self.index(split), sampler, self.image_size, self.crop_fraction)

    def _loader(self, crops: Crops, **options: Any) -> TorchLoader | DaliLoader:
        plan = self._planned(self.loader, self.readers)
        of_dali = {"hw_decoder_load": self.hw_decoder_load, "thread_affinity": self.thread_affinity}
        shared = self._options(plan, **of_dali, **options)
        device = self._trainer.strategy.root_device
        return DaliLoader(crops, shared, device.index) if plan.loader == "dali" else TorchLoader(crops, shared)

    # -- on the training device ------------------------------------------------------------------------------------

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """A loader's batch on its device, with its images normalized: float32 [N, 3, S, S]."""
        return batch._replace(images=self.augment.evaluate(batch.images.contiguous()))


@dataclass(kw_only=True, eq=False, repr=False)
class ImageNetTraining(ShardTraining[Index], ImageNetData):
    """Training images, too; the further fields are the keys of `data` in conf/train.yaml.

    scale, ratio: of the area and aspect of random crops.
    """

    augment: Augment
    scale: Sequence[float]
    ratio: Sequence[float]

    def __post_init__(self) -> None:
        super().__post_init__()
        self._batch = 0  # number in its epoch of the batch that is on its way to the device
        self._rows: RowPlan | None = None  # of its augmentation

    def train_dataloader(self) -> TorchLoader | DaliLoader:
        loader = self._loader(self._random_crops(self._training_sampler()), **self._training_options())
        self._training = loader
        return loader

    def _random_crops(self, sampler: RankSampler) -> RandomCrops:
        return RandomCrops(self.index("train"), sampler, self.image_size, self.seed, self.scale, self.ratio)

    def on_before_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Notes which batch it is and what it draws; on the device that could not be read without waiting."""
        if self._trainer.training:
            self._batch = int(batch.positions[0]) // (self.batch_size // self._trainer.accumulate_grad_batches)
            self._rows = self.augment.plan(batch.uniforms) if self._on_gpu else None
        return batch

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """The same with its images augmented, in training; on a GPU perhaps bfloat16, see `Augment.match_step`."""
        if not self._trainer.training:
            return super().on_after_batch_transfer(batch, dataloader_idx)
        seed = step_seed(self.seed, self._trainer.current_epoch, self._batch, self._trainer.global_rank, _NOISE)
        noise = torch.Generator(batch.images.device).manual_seed(seed)
        images = batch.images.contiguous()
        return batch._replace(images=self.augment.train(images, batch.uniforms, noise, self._rows))

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
