"""What the loader benchmark reads: the corpus, its shards of every kind, and data sets with long epochs of few images.

Check: `pytest tests/test_benchmarks.py`.
"""

import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig

from benchmarks.corpus import TRAIN, corpus
from benchmarks.feeding import training_config
from data.augment import Augment
from data.crops import RandomCrops
from data.image_sizes import ImageSizes
from data.index import Index, load_index
from data.sampling import RankSampler
from data.shards import MANIFEST
from data.write_shards.write import write_folder
from repghost.files import file_sha256, write_text
from repghost.training.trainer import compiles

IMAGE_SIZE = 224
SHARDS = "shards"  # the folder of the originals beside that of the class folders
COMPACT, SHORTER = "compact", 256  # that of small images, and their shorter side
REGIONS = "regions"  # that of the originals with restart markers, of which parts are decoded
EPOCH = 1_000_000  # images that an index is repeated to, so that no epoch ends while it is measured
REPEATED = 60  # times that an epoch of train.py's loaders has every image


@dataclass(frozen=True)
class Setting:
    """What all pipelines share. original: the index of the corpus, repeated to EPOCH images.

    regions: that of its region shards, repeated REPEATED times; None without jpegtran, which makes them.
    """

    folder: Path  # class folders
    original: Index
    regions: Index | None
    recipe: DictConfig
    batch_size: int
    device: torch.device  # that the batches are for
    width: float  # of the network that the recipe is for

    @property
    def files(self) -> int:
        """Images of the corpus."""
        return len(np.unique(self.original.samples))

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    def augment(self) -> Augment:
        """The recipe's augmentation as train.py runs it on the device."""
        made = instantiate(self.recipe.augment)
        if compiles("auto", self.device):
            made.compile()
        return made

    def crops(self, index: Index) -> RandomCrops:
        """The recipe's crops of an index."""
        sampler = RankSampler(len(index), self.batch_size)
        return RandomCrops(index, sampler, ImageSizes(IMAGE_SIZE), 0, self.recipe.scale, self.recipe.ratio)


def prepare(folder: Path, images: int, batch_size: int, device: torch.device, width: float = 1.0) -> Setting:
    """The corpus and its shards, made on the first call, for the recipe of a width."""
    files = corpus(folder, images)

    def write(name: str, **options: Any) -> Path:
        write_folder(files / TRAIN, files / name, split="train", images_per_shard=500, quiet=True, **options)
        return files / name

    original = load_index(write(SHARDS), "train", files)
    original = replace(original, samples=np.tile(original.samples, max(1, EPOCH // images)))
    write(COMPACT, resize=SHORTER)
    regions = None
    if can_make_regions():
        regions = load_index(repeated(write(REGIONS, regions=True), REPEATED), "train", files)
    return Setting(files / TRAIN, original, regions, training_recipe(width), batch_size, device, width)


def can_make_regions() -> bool:
    """Whether the program that `data.write_shards --regions` needs is installed."""
    return shutil.which("jpegtran") is not None


def repeated(shards: Path, times: int) -> Path:
    """A data set that has every training image of another one `times` times, and its first shard for validation.

    Its shards are links, so that an epoch is long and the corpus small. Written on the first call.
    """
    folder = shards.with_name(f"{shards.name}-repeated-{times}")
    if (folder / MANIFEST).exists():
        return folder
    folder.mkdir(exist_ok=True)
    manifest = json.loads((shards / MANIFEST).read_text())
    rows, entries = np.load(shards / "train.index.npy"), manifest["splits"]["train"]["shards"]
    for split, count in (("train", times), ("val", 1)):
        copies = [rows.copy() for _ in range(count)] if split == "train" else [rows[rows["shard"] == 0]]
        sources = entries * count if split == "train" else entries[:1]
        for number, copy in enumerate(copies):
            copy["shard"] += number * len(entries)
        found = np.concatenate(copies)
        names = [f"{split}-{number:06d}.tar" for number in range(len(sources))]
        for name, source in zip(names, sources, strict=True):
            (folder / name).unlink(missing_ok=True)
            (folder / name).symlink_to((shards / source["file"]).resolve())
        index = folder / f"{split}.index.npy"
        np.save(index, found)
        described = _repeated_regions(shards, manifest["splits"]["train"], folder, split, len(copies))
        manifest["splits"][split] = described | {
            "images": len(found),
            "images_per_class": np.bincount(found["label"], minlength=len(manifest["classes"])).tolist(),
            "skipped": [],
            "index": {"file": index.name, "sha256": file_sha256(index)},
            "shards": [source | {"file": name} for name, source in zip(names, sources, strict=True)],
        }
    write_text(folder / MANIFEST, json.dumps(manifest))
    return folder


def _repeated_regions(shards: Path, entry: dict[str, Any], folder: Path, split: str, times: int) -> dict[str, Any]:
    """The part of a split's manifest that describes its regions, which are written; empty where there are none.

    Validation has the first images of them, those of the first shard.
    """
    if "regions" not in entry:
        return {}
    rows_file, segments_file = (shards / file["file"] for file in entry["regions"]["files"])
    rows = np.load(rows_file)
    rows = np.tile(rows, times) if split == "train" else rows[: entry["shards"][0]["images"]]
    names = [f"{split}.regions.npy", f"{split}.segments.npy"]
    np.save(folder / names[0], rows)
    (folder / names[1]).symlink_to(segments_file.resolve())
    files = [{"file": n, "bytes": (folder / n).stat().st_size, "sha256": file_sha256(folder / n)} for n in names]
    return {"regions": {"files": files, "whole": {}}}


def training_recipe(width: float) -> DictConfig:
    """The paper's recipe with the augmentation of a width."""
    config = training_config(torch.device("cpu"), "data.root=not read", "recipe=paper", f"width={width}")
    return config.recipe


def corpus_facts(setting: Setting) -> dict[str, Any]:
    """What the figures depend on beside the code and the machine."""
    sizes = np.unique(setting.original.samples)["size"]
    return {"images": len(sizes), "kilobytes": sizes.mean() / 1000, "batch_size": setting.batch_size}
