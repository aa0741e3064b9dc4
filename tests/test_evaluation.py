"""evaluate.py says what timm's transform, model, class masks and ReaL labels say; its reports add up."""

import csv
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm.data
import torch
from helpers import photographs, randomize_batchnorm
from images import encoded, patch
from PIL import Image
from scipy.stats import binomtest
from test_distributed import launch
from timm.data.real_labels import RealLabelsImagenet
from webdataset import TarWriter

from data.write_shards.write import write_folder
from repghost import repghostnet
from repghost.errors import UserError
from repghost.evaluation import pictures
from repghost.evaluation.outcome import interval
from repghost.evaluation.pictures import draw_confusion, draw_images
from repghost.evaluation.test_sets import class_columns
from repghost.reference import published_accuracy, synsets
from repghost.weights import save_weights

Program = Callable[..., int]
CPU = ("trainer=cpu", "data.workers=0")
INFO = Path(timm.data.__file__).parent / "_info"


def rows(path: str | Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def validation_shards(folder: Path, classes: tuple[str, ...], count: int, smallest: int, largest: int) -> Path:
    """Shards of `count` photographs of odd sizes, in turn of each class, with the names of ImageNet's images."""
    for number in range(count):
        path = folder / "images" / classes[number % len(classes)] / f"ILSVRC2012_val_{number + 1:08d}.JPEG"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(patch(number, smallest, largest)))
    write_folder(folder / "images", folder / "shards", "val", workers=1, quiet=True)
    return folder / "shards"


def random_network(width: float, classes: int, path: Path) -> Any:
    torch.manual_seed(0)
    model = repghostnet(width, classes)
    randomize_batchnorm(model, 0)
    torch.nn.init.normal_(model.classifier.weight, std=0.1)
    with torch.no_grad():  # without what all images share, so that they differ in their classes
        model.classifier.bias -= model.eval()(photographs(16, 64)).mean(0)
    save_weights(model.eval(), path)
    return model


@torch.no_grad()
def as_timm(model: torch.nn.Module, folder: Path, size: int) -> tuple[list[str], torch.Tensor, torch.Tensor]:
    """File names, labels and logits of all images under timm's own evaluation transform."""
    transform = timm.data.create_transform((3, size, size), interpolation="bicubic", crop_pct=0.875)
    classes = sorted(path.name for path in (folder / "images").iterdir())
    files = sorted((folder / "images").rglob("*.JPEG"), key=lambda path: path.name)
    logits = []
    for file in files:
        with Image.open(file) as image:
            logits.append(model(transform(image.convert("RGB"))[None]))
    labels = torch.tensor([classes.index(file.parent.name) for file in files])
    return [file.name for file in files], labels, torch.cat(logits)


def check_against_timm(evaluate_with: Program, folder: Path, width: float, count: int, size: int, loss: float) -> None:
    data = validation_shards(folder, tuple("abcdefghij"), count, size // 2, 2 * size)
    ours = random_network(width, 10, folder / "w.safetensors")
    theirs = timm.create_model(f"repghostnet_{round(100 * width):03d}", num_classes=10).eval()
    theirs.load_state_dict(ours.state_dict())
    names, labels, logits = as_timm(theirs, folder, size)
    options = (f"data.root={data}", f"width={width}", f"image_size={size}", "report=predictions", *CPU)
    assert evaluate_with(f"weights={folder / 'w.safetensors'}", *options) == 0
    row = rows("results/results.csv")[-1]
    top = logits.topk(5).indices
    hits = top == labels[:, None]
    assert int(row["images"]) == count
    assert abs(float(row["top1"]) / 100 * count - int(hits[:, 0].sum())) < 2.01
    assert abs(float(row["top5"]) / 100 * count - int(hits.any(1).sum())) < 2.01
    assert float(row["loss"]) == pytest.approx(float(torch.nn.functional.cross_entropy(logits, labels)), abs=loss)
    # Image by image: equal sums could hide that all are wrong in the same way.
    predicted = {
        r["key"].partition("_")[2]: int(r["predicted_1"]) for r in rows(f"results/w-{width:g}/predictions.csv")
    }
    assert len(predicted) == count and len(set(predicted.values())) > 2
    wrong = sum(predicted[name.partition(".")[0]] != int(t[0]) for name, t in zip(names, top, strict=True))
    assert wrong <= max(2, 0.04 * count), "a random network's classes are nearly tied in some"


@pytest.mark.usefixtures("all_blocks")
def test_as_timm_on_photographs(evaluate_with: Program, tmp_path: Path) -> None:
    check_against_timm(evaluate_with, tmp_path, 0.5, 40, 64, loss=3e-3)


@pytest.mark.slow
@pytest.mark.parametrize("width", [0.5, 1.0, 1.3])
@pytest.mark.usefixtures("all_blocks")
def test_as_timm_on_500_photographs(width: float, evaluate_with: Program, tmp_path: Path) -> None:
    check_against_timm(evaluate_with, tmp_path, width, 500, 128, loss=1e-3)


def test_class_columns_are_timms_masks() -> None:
    assert list(synsets()) == (INFO / "imagenet_synsets.txt").read_text().split()
    for name in ("imagenet_a", "imagenet_r"):
        classes = sorted((INFO / f"{name}_synsets.txt").read_text().split())
        indices = [int(i) for i in (INFO / f"{name}_indices.txt").read_text().split()]
        assert class_columns(classes) == indices and len(classes) == 200
    assert class_columns(sorted(str(n) for n in range(1000)))[:4] == [0, 1, 10, 100], "ImageNetV2's folders"
    with pytest.raises(UserError, match="cat"):
        class_columns(["cat"])


@pytest.mark.parametrize(
    ("name", "classes"),
    [("imagenet_a", ("n01498041", "n01770393", "n02007558")), ("imagenet_v2", ("0", "10", "2"))],
)
def test_subsets_are_scored_within_their_classes(
    name: str, classes: tuple[str, ...], evaluate_with: Program, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = validation_shards(tmp_path, classes, 12, 32, 80)
    model = random_network(0.5, 1000, tmp_path / "w.safetensors")
    _, labels, logits = as_timm(model, tmp_path, 32)
    logits = logits[:, [list(synsets()).index(c) if c.startswith("n") else int(c) for c in sorted(classes)]]
    options = (f"data={name}", f"data.root={data}", "width=0.5", "image_size=32", *CPU)
    assert evaluate_with(f"weights={tmp_path / 'w.safetensors'}", *options) == 0
    (row,) = rows("results/results.csv")
    assert row["data"] == name and int(row["images"]) == 12
    assert float(row["top1"]) == pytest.approx(100 * float((logits.argmax(1) == labels).double().mean()), abs=9)
    assert float(row["loss"]) == pytest.approx(float(torch.nn.functional.cross_entropy(logits, labels)), rel=2e-3)
    expected = published_accuracy(name, 0.5)
    assert expected and f"{expected[0]:.2f}%" in capsys.readouterr().out
    small = repghostnet(0.5, 10)
    save_weights(small, tmp_path / "ten.safetensors")
    assert evaluate_with(f"weights={tmp_path / 'ten.safetensors'}", *options) == 2


def test_real_labels_count_as_in_timm(
    evaluate_with: Program, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    classes = tuple("abcdefg")
    data = validation_shards(tmp_path, classes, 21, 32, 80)
    draw = np.random.default_rng(0)
    labels = [sorted(draw.choice(7, size=draw.integers(0, 4), replace=False).tolist()) for _ in range(21)]
    (tmp_path / "real.json").write_text(json.dumps(labels))
    random_network(0.5, 7, tmp_path / "w.safetensors")
    options = ("data=imagenet_real", f"data.root={data}", "width=0.5", "image_size=64", "report=predictions", *CPU)
    weights = f"weights={tmp_path / 'w.safetensors'}"
    assert evaluate_with(weights, f"real_labels={tmp_path / 'real.json'}", *options) == 0
    (row,) = rows("results/results.csv")
    # timm's count of the same predictions: logits of its own could differ where two classes are nearly tied.
    (report,) = Path("results").rglob("predictions.csv")
    predictions = rows(report)
    logits = torch.zeros(len(predictions), 7)
    for scores, prediction in zip(logits, predictions, strict=True):
        for k in range(1, 6):
            scores[int(prediction[f"predicted_{k}"])] = 6 - k
    names = [f"{prediction['key'].partition('_')[2]}.JPEG" for prediction in predictions]
    reference = RealLabelsImagenet(names, str(tmp_path / "real.json"))
    reference.add_result(logits)
    counted = sum(1 for accepted in labels if accepted)
    assert 0 < counted < 21 and int(row["images"]) == counted
    for k in (1, 5):
        assert float(row[f"top{k}"]) == pytest.approx(reference.get_accuracy(k), abs=1e-3)
    capsys.readouterr()
    assert evaluate_with(weights, *options) == 2 and "real_labels" in capsys.readouterr().err
    (tmp_path / "short.json").write_text(json.dumps(labels[:5]))
    assert evaluate_with(weights, f"real_labels={tmp_path / 'short.json'}", *options) == 2


def test_reports_add_up(evaluate_with: Program, tmp_path: Path) -> None:
    data = validation_shards(tmp_path, tuple("abcdefg"), 30, 32, 80)
    random_network(0.5, 7, tmp_path / "w.safetensors")
    options = (f"data.root={data}", "width=0.5", "image_size=32", "data.eval_batch_size=8", *CPU)
    assert evaluate_with(f"weights={tmp_path / 'w.safetensors'}", "report=[classes,predictions]", *options) == 0
    (row,) = rows("results/results.csv")
    of_class, pairs, images = (rows(f"results/w-0.5/{n}.csv") for n in ("classes", "confusions", "predictions"))
    assert [r["class"] for r in of_class] == list("abcdefg") and sum(int(r["images"]) for r in of_class) == 30
    for key in ("top1", "top5"):
        hits = sum(float(r[key]) * int(r["images"]) for r in of_class) / 30
        assert hits == pytest.approx(float(row[key]), abs=1e-3)
    wrong = [r for r in images if r["label"] != r["predicted_1"]]
    assert sum(int(r["images"]) for r in pairs) == len(wrong) == round(30 * (1 - float(row["top1"]) / 100))
    assert [int(r["images"]) for r in pairs] == sorted((int(r["images"]) for r in pairs), reverse=True)
    for r in images:
        assert r["key"].startswith("abcdefg"[int(r["label"])])
        shares = [float(r[f"probability_{k}"]) for k in range(1, 6)]
        assert shares == sorted(shares, reverse=True) and sum(shares) <= 1 + 1e-4
    assert evaluate_with(f"weights={tmp_path / 'w.safetensors'}", "report=lines", *options) == 2


def test_reports_are_drawn(tmp_path: Path) -> None:
    """For few classes and for a thousand, and for names that a font or a formula would choke on."""
    draw = np.random.default_rng(0)
    for count in (3, 1000):
        classes = ["$\\frac{", "猫\n" * 30, *(f"class {label}" for label in range(2, count))]
        counts = draw.integers(0, 2, (count, count)) + np.diag(np.full(count, 30))
        buffer = io.BytesIO()
        draw_confusion(counts, classes, buffer)
        with Image.open(buffer) as image:
            # Every class has at least a pixel: the diagonal is darker than what is beside it.
            assert image.format == "PNG" and min(image.size) > count
    images = torch.zeros(7, 3, 32, 32, dtype=torch.uint8)
    for number in (0, 7):
        buffer = io.BytesIO()
        draw_images(images[:number], [(classes[i], f"{classes[-i]} 97%") for i in range(number)], buffer)
        assert buffer.getvalue().startswith(b"\x89PNG")


def test_reports_show_the_images_that_are_confidently_wrong(evaluate_with: Program, tmp_path: Path) -> None:
    data = validation_shards(tmp_path, tuple("abcdefg"), 30, 32, 80)
    random_network(0.5, 7, tmp_path / "w.safetensors")
    drawn: list[tuple[Any, list[tuple[str, str]]]] = []
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(pictures, "draw_images", lambda images, lines, file: drawn.append((images, lines)))
        options = (f"data.root={data}", "width=0.5", "image_size=32", "report=[confusion,predictions,worst]", *CPU)
        assert evaluate_with(f"weights={tmp_path / 'w.safetensors'}", *options) == 0
    assert Path("results/w-0.5/confusion.png").read_bytes().startswith(b"\x89PNG")
    ((images, lines),) = drawn
    wrong = [r for r in rows("results/w-0.5/predictions.csv") if r["label"] != r["predicted_1"]]
    wrong.sort(key=lambda r: -float(r["probability_1"]))
    assert [line[0] for line in lines] == ["abcdefg"[int(r["label"])] for r in wrong[: len(lines)]]
    assert len(lines) == min(len(wrong), 25) == len(images)
    # The pixels are those of the files, cropped as timm's transform does.
    file = next((tmp_path / "images").rglob(wrong[0]["key"].partition("_")[2] + ".JPEG"))
    transform = timm.data.create_transform((3, 32, 32), interpolation="bicubic", crop_pct=0.875, mean=0, std=1)
    with Image.open(file) as image:
        assert (transform(image.convert("RGB")) * 255 - images[0]).abs().mean() < 2


def test_precision_size_and_crop_can_be_chosen(evaluate_with: Program, tmp_path: Path) -> None:
    data = validation_shards(tmp_path, tuple("abc"), 9, 48, 80)
    random_network(0.5, 3, tmp_path / "w.safetensors")
    options = (f"weights={tmp_path / 'w.safetensors'}", f"data.root={data}", "width=0.5", *CPU)
    for more in ((), ("precision=bf16",), ("data.crop_fraction=1.0",), ("image_size=48",)):
        size = () if "image_size=48" in more else ("image_size=32",)
        assert evaluate_with(*options, *size, *more) == 0
    plain, half, crop, larger = rows("results/results.csv")
    assert len({r["loss"] for r in (plain, half, crop, larger)}) == 4
    assert float(half["loss"]) == pytest.approx(float(plain["loss"]), rel=0.1)
    assert (plain["precision"], half["precision"]) == ("32-true", "bf16-mixed")
    assert (crop["crop_fraction"], larger["image_size"]) == ("1", "48")


@pytest.mark.parametrize(("hits", "images"), [(0, 15), (37_109, 50_000), (15, 15), (1, 3)])
def test_intervals_are_wilsons(hits: int, images: int) -> None:
    expected = binomtest(hits, images).proportion_ci(method="wilson")
    assert interval(100 * hits / images, images) == pytest.approx([100 * expected.low, 100 * expected.high], abs=1e-9)


@pytest.mark.slow
def test_50000_images_on_two_ranks_count_50000(tmp_path: Path) -> None:
    jpegs = [encoded(patch(number, 32, 32)) for number in range(50)]
    for shard in range(5):
        with TarWriter(str(tmp_path / f"val-{shard}.tar")) as tar:
            for i in range(shard * 10_000, (shard + 1) * 10_000):
                tar.write({"__key__": f"image_{i:05d}", "jpg": jpegs[i % 50], "cls": b"%d" % (i % 7)})
    random_network(0.1, 7, tmp_path / "w.safetensors")
    launch(
        tmp_path, "evaluate.py", "weights=w.safetensors", "width=0.1", "image_size=32", f"data.root={tmp_path}",
        "data.cache=cache", "data.workers=0", "data.eval_batch_size=512", "trainer=cpu", "trainer.devices=2",
        "report=predictions",
    )  # fmt: skip
    (row,) = rows(tmp_path / "results/results.csv")
    assert row["images"] == "50000"
    images = rows(tmp_path / "results/w-0.1/predictions.csv")
    assert [r["key"] for r in images] == [f"image_{i:05d}" for i in range(50_000)]
    right = sum(r["label"] == r["predicted_1"] for r in images)
    assert float(row["top1"]) == pytest.approx(right / 500, abs=1e-3)
