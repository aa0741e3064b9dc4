"""The data modules of detection: shards with annotations in, augmented images and their objects out.

Order and augmentation are functions of seed, epoch and position, as in classification, and the same for any number of
ranks and workers. Images keep their sizes: the detector resizes and pads them.
Check: `pytest tests/test_detection_data.py`.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from data import sampling
from data.box_augment import BoxAugment, with_masks
from data.coco import CocoIndex, load_coco
from data.reader import BadImage, ShardReader, allow_open_files
from data.sampling import RankSampler, epoch_order
from data.shard_data import SPLITS, ShardData, ShardTraining
from data.torch_loader import BATCHES_IN_USE, BatchLoader
from repghost.dataset import DetectionBatch
from repghost.errors import UserError

PADDING = 32  # side in pixels of the black image of a row without one


class DetectionBatches(Dataset):
    """Maps (epoch, batch) to a batch of uint8 images and a line for each bad image in it.

    rows: int64 [M], the images of the index that an epoch has. augment: in training, None in validation, where images
    come as stored, in the order of the index, and without masks.
    """

    def __init__(
        self,
        index: CocoIndex,
        rows: np.ndarray,
        sampler: RankSampler,
        augment: BoxAugment | None = None,
        seed: int = 0,
        masks: bool = False,
    ) -> None:
        self.index, self.rows, self.sampler = index, rows, sampler
        self._augment, self._seed, self._masks = augment, seed, masks
        self._reader, self._records = ShardReader(index), ShardReader(index.record_index)

    def __getitem__(self, key: tuple[int, int]) -> tuple[DetectionBatch, list[str]]:
        epoch, batch = key
        count, start = self.sampler.batch_size, self.sampler.start(batch)
        order = epoch_order(self._seed, epoch, len(self.rows)) if self._augment else np.arange(len(self.rows))
        samples = self.rows[order[start : start + count]]
        uniforms = sampling.uniforms(self._seed, epoch, start, count, sampling.DETECTION_STREAM)
        positions = torch.full((count,), -1)
        images = [torch.zeros(3, PADDING, PADDING, dtype=torch.uint8)] * count
        targets = [self._target(np.empty(0, np.int64), *images[0].shape[1:])] * count
        errors: list[str] = []
        self._reader.readahead(samples)
        for row, sample in enumerate(samples.tolist()):
            try:
                images[row], targets[row] = self.load(sample, uniforms[row])
                positions[row] = start + row
            except BadImage as error:
                errors.append(str(error))
        return DetectionBatch(images, targets, positions), errors

    def load(self, sample: int, uniforms: np.ndarray) -> tuple[Tensor, dict[str, Tensor]]:
        """An image, uint8 [3, H, W], and its objects, augmented by the uniforms. Raises BadImage."""
        image = self._reader.decode(sample, self._reader.read(sample))
        objects = np.arange(*self.index.bounds[sample : sample + 2])
        objects = objects[self.index.learned[objects]]
        height, width = image.shape[1:]
        if self._augment is None:
            return image, self._target(objects, height, width)
        geometry = self._augment.geometry(uniforms, height, width)
        boxes, share = geometry.boxes(torch.from_numpy(self.index.boxes[objects]))
        seen = self._augment.visible(share)
        objects, boxes = objects[seen.numpy()], boxes[seen]
        target = {"boxes": boxes, "labels": torch.from_numpy(self.index.labels[objects])}
        if self._masks:
            target["masks"] = geometry.masks(self._stored_masks(sample, objects))
            target["boxes"], left = with_masks(boxes, share[seen], target["masks"])
            target = {name: tensor[left] for name, tensor in target.items()}
        return geometry.image(image), target

    def _target(self, objects: np.ndarray, height: int, width: int) -> dict[str, Tensor]:
        """The boxes and labels of these objects as they are stored; where there are masks, of none."""
        target = {"boxes": self.index.boxes[objects], "labels": self.index.labels[objects]}
        if self._masks:
            target["masks"] = np.zeros((len(objects), height, width), np.uint8)
        return {name: torch.from_numpy(array) for name, array in target.items()}

    def _stored_masks(self, sample: int, objects: np.ndarray) -> Tensor:
        """uint8 [n, H, W]: the masks of these objects of an image, from its polygons and RLEs."""
        from faster_coco_eval.core import mask  # slow to import, and for masks alone

        height, width = (int(self.index.samples[side][sample]) for side in ("height", "width"))
        annotations = json.loads(self._records.read(sample))["annotations"]
        found = [annotations[i]["segmentation"] for i in (objects - self.index.bounds[sample]).tolist()]
        masks = [torch.from_numpy(mask.decode(mask.segmToRle(s, width, height))) for s in found]
        return torch.stack(masks) if masks else torch.zeros(0, height, width, dtype=torch.uint8)

    def batch_bytes(self) -> int:
        """About what a batch takes in shared memory; images differ, and so may batches."""
        sides = self.index.samples[self.rows]
        pixels = sides["height"].astype(np.int64) * sides["width"]
        channels = 3 + (np.diff(self.index.bounds)[self.rows] if self._masks else 0)
        return int((pixels * channels).mean() * self.sampler.batch_size)


@dataclass(kw_only=True, eq=False, repr=False)
class DetectionData(ShardData[CocoIndex]):
    """The validation images of shards with annotations."""

    def setup(self, stage: str) -> None:
        """Loads the indexes of a stage ("fit" or "validate") that are not loaded yet."""
        if missing := [split for split in SPLITS[stage] if split not in self._indexes]:
            self._indexes |= load_coco(self._local_shards(missing), missing, self.cache)
            allow_open_files(sum(len(index.shards) for index in self._indexes.values()))

    def val_dataloader(self) -> BatchLoader[DetectionBatch]:
        sampler, rows = self._sampler("val", self.eval_batch_size), np.arange(self._count("val"))
        return self._loader(DetectionBatches(self.index("val"), rows, sampler))

    def stored_images(self, split: str, rows: Sequence[int]) -> list[Tensor]:
        """uint8 [3, H, W] each: the images in these rows of a split's index, as they are stored."""
        reader = ShardReader(self.index(split))
        return [reader.decode(row, reader.read(row)) for row in rows]

    def on_after_batch_transfer(self, batch: DetectionBatch, dataloader_idx: int) -> DetectionBatch:
        """A loader's batch on its device, with its images as float32 in [0, 1]."""
        return batch._replace(images=[image.float() / 255 for image in batch.images])

    def _loader(self, batches: DetectionBatches, **options: Any) -> BatchLoader[DetectionBatch]:
        plan = self._planned("torch", readers=0, **options)
        # Each tensor of a batch is an open file on its way out of a worker.
        ready = plan.workers * plan.prefetch + BATCHES_IN_USE
        allow_open_files(len(batches.index.shards) + 4 * batches.sampler.batch_size * ready)
        return self._opened(BatchLoader(batches, plan, batches.sampler.batches, batches.batch_bytes()))


@dataclass(kw_only=True, eq=False, repr=False)
class DetectionTraining(ShardTraining[CocoIndex], DetectionData):
    """Training images, too.

    masks: whether they come with the masks of their objects. empty_images: whether those without objects are trained
    on.
    """

    masks: bool
    empty_images: bool
    augment: BoxAugment

    def setup(self, stage: str) -> None:
        """The same. Raises UserError where there is no image to train on, and for objects without the masks that are
        wanted.
        """
        super().setup(stage)
        if "train" not in self._indexes:
            return
        index = self.index("train")
        if not self._count("train"):
            raise UserError(f"{self.root}: no training image has an object: write its shards with their annotations")
        lacking = np.flatnonzero(index.learned & ~index.objects["segmented"])
        if self.masks and len(lacking):
            what = f"{len(lacking):,} of the training objects have no segmentation"
            number = index.image_ids[index.objects["image"][lacking[0]]]
            raise UserError(f"{self.root}: {what} (image {number} has the first): give a detector of boxes alone")

    def _rows(self) -> np.ndarray:
        """int64 [M]: the training images that an epoch has."""
        index = self.index("train")
        return np.arange(len(index)) if self.empty_images else index.shown

    def _count(self, split: str) -> int:
        return len(self._rows()) if split == "train" else super()._count(split)

    def train_dataloader(self) -> BatchLoader[DetectionBatch]:
        sampler, index = self._training_sampler(), self.index("train")
        batches = DetectionBatches(index, self._rows(), sampler, self.augment, self.seed, self.masks)
        self._training = self._loader(batches, **self._training_options())
        return self._training
