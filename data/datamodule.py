"""ImageNetData: shards in, augmented batches on the training device out.

Check: `pytest tests/test_loader.py tests/test_dali_loader.py tests/test_resume.py`.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data.augment import Augment, Normalize
from data.crops import CenterCrops, Crops, RandomCrops
from data.dali_loader import DaliLoader, dali_installed
from data.folders import holds_images, shards_of_images
from data.image_sizes import ImageSizes
from data.index import Index, load_indexes
from data.loader_plan import choose_loader
from data.mix import Mix, MixPlan, mix, mixture
from data.reader import allow_open_files
from data.remote import is_remote
from data.row_plan import RowPlan
from data.sampling import RankSampler, epoch_order
from data.shard_data import SPLITS, ShardData, ShardTraining
from data.torch_loader import CroppedBatches, TorchLoader
from repghost.dataset import Batch, TeacherLogits
from repghost.errors import UserError


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
        of_dali = {"hw_decoder_load": self.hw_decoder_load, "thread_affinity": self.thread_affinity}
        plan = self._planned(self.loader, self.readers, **of_dali, **options)
        device = self._trainer.strategy.root_device
        return self._opened(
            DaliLoader(crops, plan, device.index) if plan.loader == "dali" else TorchLoader(crops, plan)
        )

    def decoder(self, on_gpu: bool) -> str:
        """What makes the pixels: DALI's kernels for a GPU differ from PIL's by a value or two, all else does not."""
        loader = choose_loader(self.loader, self.workers, dali_installed())
        return "dali on a GPU" if on_gpu and loader == "dali" else "as PIL"

    # -- on the training device ------------------------------------------------------------------------------------

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """A loader's batch on its device, with its images normalized: float32 [N, 3, S, S]."""
        return batch._replace(images=self.augment.evaluate(batch.images.contiguous()))


@dataclass(kw_only=True, eq=False, repr=False)
class ImageNetTraining(ShardTraining[Index], ImageNetData):
    """Training images, too; the further fields are the keys of `data` in conf/train.yaml.

    scale, ratio: of the area and aspect of random crops. train_image_size: None for image_size. start_image_size,
    full_size_epochs, epochs: of `ImageSizes`. cycle_epochs: of `RandomCrops`. `teacher` gives stored logits for the
    positions of a batch in an epoch.
    """

    augment: Augment
    mix: Mix
    scale: Sequence[float]
    ratio: Sequence[float]
    train_image_size: int | None
    start_image_size: int | None
    full_size_epochs: int
    epochs: int
    cycle_epochs: int | None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.teacher: Callable[[int, Tensor], TeacherLogits] | None = None
        full, first = self.train_image_size or self.image_size, self.start_image_size
        self.sizes = ImageSizes(full, first, self.epochs, self.full_size_epochs)
        # Of the batch that is on its way to the device.
        self._rows: RowPlan | None = None
        self._mixed: MixPlan | None = None

    def train_dataloader(self) -> TorchLoader | DaliLoader:
        sampler = self._training_sampler()
        if self.mix.is_on and sampler.batch_size % 2:
            raise UserError(
                f"batch_size={self.batch_size}: leaves {sampler.batch_size} images for a batch on each device, and "
                "recipe.mix takes pairs: give a batch_size that leaves an even number"
            )
        self._training = self._loader(self._random_crops(sampler), **self._training_options())
        return self._training

    def _random_crops(self, sampler: RankSampler) -> RandomCrops:
        return RandomCrops(
            self.index("train"), sampler, self.sizes, self.seed, self.scale, self.ratio, self.cycle_epochs
        )

    def on_before_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Notes what it draws, and adds a teacher's logits; on the device neither could be read without waiting."""
        if not self._trainer.training:
            return batch
        self._rows = self.augment.plan(batch.uniforms) if self._on_gpu else None
        if self.mix.is_on:
            plan = self.mix.plan(batch.uniforms, batch.labels, batch.images.shape[2])
            self._mixed = MixPlan(*map(self._pinned, plan))
        if self.teacher:
            epoch = self._trainer.current_epoch
            logits = self.teacher(epoch % self.cycle_epochs if self.cycle_epochs else epoch, batch.positions)
            batch = batch._replace(teacher=TeacherLogits(*map(self._pinned, logits)))
        return batch

    def _pinned(self, tensor: Tensor) -> Tensor:
        """In memory from which a GPU copies without waiting."""
        return tensor.pin_memory() if self._on_gpu else tensor

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """The same with its images augmented, in training; on a GPU perhaps bfloat16, see `Augment.match_step`."""
        if not self._trainer.training:
            return super().on_after_batch_transfer(batch, dataloader_idx)
        images = self.augment.train(batch.images.contiguous(), batch.uniforms, self._rows)
        if self._mixed is None:
            return batch._replace(images=images)
        plan = MixPlan(*(numbers.to(images.device, non_blocking=True) for numbers in self._mixed))
        return batch._replace(images=mix(images, plan), mixture=mixture(batch.labels, plan))

    # -- for data.show ---------------------------------------------------------------------------------------------

    def preview(self, samples: int, epochs: int) -> Iterator[Tensor]:
        """Normalized [samples, 3, S, S] of the first training samples: as in evaluation, then as in each epoch.

        All at the full size of training images.
        """
        index, size = self.index("train"), self.sizes.full
        count, one = len(index), RankSampler(len(index), batch_size=1)
        first = range(min(samples, count))
        evaluated = CroppedBatches(CenterCrops(index, one, size, self.crop_fraction))
        trained = CroppedBatches(replace(self._random_crops(one), sizes=ImageSizes(size)))
        yield self.augment.evaluate(torch.cat([evaluated[0, i][0].images for i in first]))
        for epoch in range(epochs):
            positions = np.argsort(epoch_order(self.seed, epoch, count))[: len(first)]
            pairs = np.stack([positions & ~1, np.minimum(positions | 1, count - 1)], axis=1)
            batches = [trained[epoch, int(position)][0] for position in pairs.flat]
            images, labels, uniforms = (
                torch.cat([getattr(batch, name) for batch in batches]) for name in ("images", "labels", "uniforms")
            )
            images = self.augment.train(images, uniforms)
            if self.mix.is_on:
                images = mix(images, self.mix.plan(uniforms, labels, size))
            yield images[torch.from_numpy(2 * np.arange(len(first)) + positions % 2)]
