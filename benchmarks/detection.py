"""Training and evaluation of a detector beside torchvision's reference loop: same detector, images and device, one run.

    python benchmarks/detection.py                                          (embedded scenes, SSDLite: some minutes)
    python benchmarks/detection.py --source COCO --detector retinanet --width 1.3 --recipe coco_1x

--source is a folder in COCO's format with annotations/instances_{train,val}.json and the images in train/ and val/; the
default are the embedded scenes. The reference is torchvision's (references/detection), written anew: CocoDetection in a
DataLoader, transforms v2 with a horizontal flip, its SGD step without anything around it, and in evaluation a batch of
one image and pycocotools. Measured in turns, --repetitions times:

- training: images/s. Ours is the last epoch of `python train.py` in a process of its own, with the average, the
  checkpoints and the files of a run (timing.csv); the reference takes as many images in a loop;
- evaluation: seconds for the validation images with the same weights, from the stored images to COCO's twelve figures,
  which have to be the same;
- figures: seconds from detections to COCO's figures alone, for --figures-images images of --objects boxes each.

Rates and seconds are medians, ratios medians of the ratios within a repetition. --out gets a row a figure.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import redirect_stdout
from io import StringIO
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import DictConfig
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.datasets import CocoDetection, wrap_dataset_for_transforms_v2
from torchvision.ops import box_convert
from torchvision.transforms import v2

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.common import ROOT, described, kernels_of_training, machine, read_table, wait_for, write_table
from benchmarks.feeding import InTraining
from repghost.detection.detections import Detections
from repghost.detection.figures import FIGURES, Truth
from repghost.detection.run import load_detector
from repghost.machine import available_cpus

WARM_UP = 3  # steps of the reference that do not count


# -- ours --------------------------------------------------------------------------------------------------------------


def train(arguments: list[str], folder: Path) -> float:
    """Images per second of the last epoch of a run of train.py in `folder`/run."""
    more = [f"output={folder}", f"results={folder}/results.csv", "name=run"]
    done = subprocess.run([sys.executable, str(ROOT / "train.py"), *arguments, *more], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"train.py failed:\n{done.stdout}\n{done.stderr}")
    return float(read_table(folder / "run" / "timing.csv")[-1]["images_per_second"])


def evaluate(model: Any, config: DictConfig) -> tuple[float, list[float]]:
    """Seconds and COCO's figures of the validation images, by this project's data module and evaluation."""
    trainer = InTraining(instantiate(config.trainer)(directory=Path.cwd()))
    device = trainer.strategy.root_device
    data: Any = instantiate(config.data)
    data.trainer = trainer
    data.setup("validate")
    start, found = time.perf_counter(), []
    for batch in data.val_dataloader():
        moved = data.transfer_batch_to_device(data.on_before_batch_transfer(batch, 0), device, 0)
        moved = data.on_after_batch_transfer(moved, 0)
        with torch.inference_mode():
            found.append(Detections.of(model(moved.images), moved.positions))
    index = data.index("val")
    joined = Detections.joined(found)
    assert joined is not None
    stats = Truth(index.annotations(), index.category_ids).figures(joined, masks=False)
    return time.perf_counter() - start, [stats[name] for name in FIGURES]


# -- the reference -----------------------------------------------------------------------------------------------------


def reference_loader(source: Path, split: str, batch_size: int, flip: float, workers: int) -> tuple[Any, DataLoader]:
    """The annotations of a split as pycocotools reads them, and batches of (images, targets)."""
    with redirect_stdout(StringIO()):  # pycocotools talks
        stored = CocoDetection(str(source / split), str(source / "annotations" / f"instances_{split}.json"))
    labels = {category: label for label, category in enumerate(sorted(stored.coco.cats), 1)}
    augment = [v2.RandomHorizontalFlip(flip)] if split == "train" else []
    stored.transforms = v2.Compose([v2.ToImage(), *augment, v2.ToDtype(torch.float32, scale=True), v2.ToPureTensor()])
    wrapped = wrap_dataset_for_transforms_v2(stored, target_keys=["image_id", "boxes", "labels"])

    def collate(rows: list[Any]) -> tuple[list[Tensor], list[dict[str, Any]]]:
        images, targets = zip(*rows, strict=True)
        for target in targets:
            target["boxes"] = target.get("boxes", torch.empty(0, 4))
            target["labels"] = torch.tensor([labels[int(c)] for c in target.get("labels", ())], dtype=torch.int64)
        return list(images), list(targets)

    loader = DataLoader(
        wrapped,
        batch_size,
        shuffle=split == "train",
        num_workers=workers,
        collate_fn=collate,
        drop_last=split == "train",
    )
    return stored.coco, loader


def reference_training(model: Any, loader: DataLoader, device: torch.device, images: int) -> float:
    """Images per second of the reference's loop over about `images` images."""
    model.to(device).train()
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(learning, lr=1e-4, momentum=0.9, weight_decay=1e-4)
    batches = (batch for _ in iter(int, 1) for batch in loader)

    def steps(count: int) -> int:
        seen = 0
        for pictures, targets in islice(batches, count):
            pictures = [picture.to(device) for picture in pictures]
            targets = [{key: target[key].to(device) for key in ("boxes", "labels")} for target in targets]
            loss = torch.stack([*model(pictures, targets).values()]).sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            seen += len(pictures)
        wait_for(device)
        return seen

    steps(WARM_UP)
    start = time.perf_counter()
    return steps(max(1, images // (loader.batch_size or 1))) / (time.perf_counter() - start)


def reference_evaluation(model: Any, source: Path, device: torch.device, workers: int) -> tuple[float, list[float]]:
    """Seconds and COCO's figures of the validation images, by the reference's loop and pycocotools."""
    truth, loader = reference_loader(source, "val", 1, 0.0, workers)
    categories, results = sorted(truth.cats), []
    start = time.perf_counter()
    for pictures, targets in loader:
        with torch.inference_mode():
            outputs = model([picture.to(device) for picture in pictures])
        for target, output in zip(targets, outputs, strict=True):
            boxes = box_convert(output["boxes"].cpu(), "xyxy", "xywh")
            columns = (output["labels"].tolist(), output["scores"].tolist(), boxes.tolist())
            results += [
                {"image_id": target["image_id"], "category_id": categories[label - 1], "score": score, "bbox": box}
                for label, score, box in zip(*columns, strict=True)
            ]
    seconds = time.perf_counter() - start
    more, stats = reference_figures(truth, results)
    return seconds + more, stats


def reference_figures(truth: Any, results: list[dict[str, Any]]) -> tuple[float, list[float]]:
    """Seconds and COCO's figures of results, by pycocotools."""
    from pycocotools.cocoeval import COCOeval

    start = time.perf_counter()
    with redirect_stdout(StringIO()):
        evaluation = COCOeval(truth, truth.loadRes(results), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return time.perf_counter() - start, evaluation.stats.tolist()


# -- figures alone -----------------------------------------------------------------------------------------------------


def synthetic(images: int, objects: int, classes: int) -> tuple[dict[str, Any], Detections]:
    """Annotations in COCO's format, and detections: the same boxes, moved a little, and a tenth of other classes."""
    rng = np.random.default_rng(0)
    corners, sides = rng.uniform(0, 400, (images * objects, 2)), rng.uniform(8, 200, (images * objects, 2))
    labels, rows = rng.integers(1, classes + 1, images * objects), np.repeat(np.arange(images), objects)
    truth = {
        "images": [{"id": n + 1, "file_name": f"{n}.jpg", "height": 640, "width": 640} for n in range(images)],
        "categories": [{"id": n, "name": str(n)} for n in range(1, classes + 1)],
        "annotations": [
            {"id": n + 1, "image_id": int(row) + 1, "category_id": int(label), "bbox": [*corner, *side],
             "area": float(side.prod()), "iscrowd": 0}
            for n, (row, label, corner, side) in enumerate(zip(rows, labels, corners.tolist(), sides, strict=True))
        ],
    }  # fmt: skip
    moved = corners + rng.normal(0, 4, corners.shape)
    labels = np.where(rng.random(len(labels)) < 0.1, rng.integers(1, classes + 1, len(labels)), labels)
    scores = rng.random(len(labels))
    order = np.lexsort((-scores, rows))
    found = Detections(
        torch.arange(images), torch.from_numpy(rows[order]), torch.from_numpy(labels[order]),
        torch.from_numpy(scores[order]).float(), torch.from_numpy(np.hstack([moved, moved + sides])[order]).float(),
        torch.empty(0, dtype=torch.uint8), torch.zeros(len(labels), dtype=torch.int64),
    )  # fmt: skip
    return truth, found


def figures_alone(truth: dict[str, Any], found: Detections) -> Iterator[tuple[float, list[float]]]:
    """Seconds and COCO's figures: ours, then pycocotools', both from the same arrays."""
    from pycocotools.coco import COCO

    categories = [category["id"] for category in truth["categories"]]
    start = time.perf_counter()
    ours = Truth(truth, categories).figures(found, masks=False)
    yield time.perf_counter() - start, [ours[name] for name in FIGURES]
    start = time.perf_counter()
    with redirect_stdout(StringIO()):
        theirs = COCO()
        theirs.dataset = truth
        theirs.createIndex()
    results = [*found.results(truth["images"], categories)]
    seconds = time.perf_counter() - start
    of_results, stats = reference_figures(theirs, results)
    yield seconds + of_results, stats


# -- the report --------------------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--source", type=Path, help="folder in COCO's format (default: the embedded scenes)")
    add("--detector", default="ssdlite", help="(default: %(default)s)")
    add("--width", type=float, default=0.5, help="(default: %(default)s)")
    add("--recipe", default="quick_detection", help="(default: %(default)s)")
    add("--batch-size", type=int, default=16, help="images a step (default: %(default)s)")
    add("--flip", type=float, default=0.0, help="probability (default: %(default)s)")
    add("--workers", type=int, default=1, help="processes that decode, on both sides (default: %(default)s)")
    add("--images", type=int, default=640, help="that the reference trains on (default: %(default)s)")
    add("--figures-images", type=int, default=5000, help="(default: %(default)s)")
    add("--objects", type=int, default=36, help="boxes of each of them (default: %(default)s)")
    add("--repetitions", type=int, default=3, help="(default: %(default)s)")
    add("--out", type=Path, help="CSV file")
    options = parser.parse_args()

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    facts = machine(device)
    print(described(facts), flush=True)
    kernels_of_training()
    with tempfile.TemporaryDirectory() as name:
        found = measured(options, device, Path(name))
    table = [row_of(what, *sides) for what, sides in found.items()]
    for row in table:
        print(
            f"{row['what']:<12} ours {row['ours']:9.4g}   reference {row['reference']:9.4g}   {row['ratio']:.2f} times"
        )
    if options.out:
        write_table(options.out, [{**facts, **row} for row in table])


def measured(options: argparse.Namespace, device: torch.device, folder: Path) -> dict[str, tuple[list[float], ...]]:
    """The figures of every repetition, ours and the reference's, by what they are of."""
    source = options.source or scenes(folder / "scenes")
    shards = folder / "shards"
    importer = [sys.executable, "-m", "data.write_shards", "coco", str(source), str(shards)]
    subprocess.run(importer, cwd=ROOT, check=True, capture_output=True)
    arguments = [
        "task=detection", f"data.root={shards}", f"detector={options.detector}", f"width={options.width}",
        f"recipe={options.recipe}", f"batch_size={options.batch_size}", f"recipe.augment.flip={options.flip}",
        f"data.workers={options.workers}", "epochs=2", f"trainer={'cpu' if device.type == 'cpu' else 'gpu'}",
        "trainer.devices=1",
    ]  # fmt: skip
    threads = max(1, available_cpus() - options.workers) if device.type == "cpu" else 1
    arguments += [f"trainer.threads={threads}"] * (device.type == "cpu")
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        config = compose("train_detection", [a for a in arguments if a != "task=detection"])
    truth, objects = synthetic(options.figures_images, options.objects, classes=80)
    found: dict[str, tuple[list[float], ...]] = {what: ([], []) for what in ("training", "evaluation", "figures")}
    for repetition in range(options.repetitions):
        output = folder / str(repetition)
        found["training"][0].append(train(arguments, output))
        torch.set_num_threads(threads)
        model: Any = load_detector(output / "run", "last")[0].to(device)
        pairs = {
            "evaluation": (evaluate(model, config), reference_evaluation(model, source, device, options.workers)),
            "figures": tuple(figures_alone(truth, objects)),
        }
        for what, sides in pairs.items():
            difference = max(abs(a - b) for a, b in zip(sides[0][1], sides[1][1], strict=True))
            print(
                f"{what}: mAP {sides[0][1][0]:.4f}, largest difference of the twelve figures {difference:.1e}",
                flush=True,
            )
            for seconds, (value, _) in zip(found[what], sides, strict=True):
                seconds.append(value)
        _, loader = reference_loader(source, "train", options.batch_size, options.flip, options.workers)
        found["training"][1].append(reference_training(model, loader, device, options.images))
    return found


def scenes(folder: Path) -> Path:
    """The embedded scenes as files in COCO's format."""
    from data.scenes import write_scenes

    folder.mkdir()
    write_scenes(folder)
    return folder


def row_of(what: str, ours: list[float], reference: list[float]) -> dict[str, Any]:
    """Medians, and how many times as fast ours is. Training is in images/s, all else in seconds."""
    faster = [a / b if what == "training" else b / a for a, b in zip(ours, reference, strict=True)]
    unit = "images/s" if what == "training" else "seconds"
    both = {"ours": median(ours), "reference": median(reference), "ratio": median(faster)}
    return {"what": what, "unit": unit, **both, "repetitions": json.dumps([ours, reference])}


if __name__ == "__main__":
    main()
