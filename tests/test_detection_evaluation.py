"""COCO's figures, equal to pycocotools' on any number of ranks; what fusing changes; reports; the tables of results."""

import contextlib
import copy
import csv
import io
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from detections import CATEGORIES, annotations, detections, outputs
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from repghost.detection.detections import Detections, difference
from repghost.detection.evaluate import figures_of, table
from repghost.detection.figures import FIGURES, NOTHING, Truth
from repghost.detection.reports import REPORTS, quality, shown_rows, write_reports
from repghost.detection.results import main as print_results
from repghost.detection.results import rows_beside_published
from repghost.errors import UserError
from repghost.evaluation.reports import report_names
from repghost.results import append_result, read_results, require_writable_results, runs_table


def joined(batches: list[Detections]) -> Detections:
    found = Detections.joined(batches)
    assert found is not None
    return found


def of_pycocotools(content: dict[str, Any], results: list[dict[str, Any]], kind: str) -> tuple[list[float], Any]:
    """Its twelve figures, and its precisions."""
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = copy.deepcopy(content)
        truth.createIndex()
        results = copy.deepcopy(results)
        for result in results if kind == "segm" else ():
            del result["bbox"]
        evaluation = COCOeval(truth, truth.loadRes(results), kind)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation.stats.tolist(), evaluation.eval["precision"]


@pytest.mark.parametrize("masks", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_the_figures_are_those_of_pycocotools(masks: bool, seed: int) -> None:
    content = annotations(40, seed)
    found = joined(detections(outputs(content, per_image=6, masks=masks, seed=seed)))
    truth = Truth(copy.deepcopy(content), CATEGORIES)
    results = [*found.results(content["images"], CATEGORIES)]
    figures = truth.figures(found, masks)
    assert len(figures) == len(FIGURES) * (1 + masks)
    for prefix, kind in (("", "bbox"), ("mask_", "segm"))[: 1 + masks]:
        expected, precision = of_pycocotools(content, results, kind)
        assert [figures[f"{prefix}{name}"] for name in FIGURES] == pytest.approx(expected, abs=1e-12, rel=0)
        by_class = truth.by_class(found, kind)  # type: ignore[arg-type]
        for k, value in enumerate(by_class):
            of = precision[:, :, k, 0, -1]
            assert value == pytest.approx(of[of > -1].mean() if (of > -1).any() else NOTHING, abs=1e-12)
    assert truth.figures(found, masks) == figures, "nothing is left behind by an evaluation"


def test_nothing_found_and_nothing_to_find() -> None:
    content = annotations(6)
    nothing = joined(detections(outputs(content, per_image=0, masks=False)[:0]))
    assert Truth(content, CATEGORIES).figures(nothing, masks=True)["mask_map"] == 0
    content["annotations"] = []
    found = joined(detections(outputs(content, per_image=2, masks=False)))
    assert set(Truth(content, CATEGORIES).figures(found, masks=False).values()) == {NOTHING}
    with pytest.raises(UserError, match="the validation images have no objects"):
        figures_of(found, found, Truth(content, CATEGORIES), masks=False)


def test_the_order_of_the_batches_does_not_count() -> None:
    content = annotations(23)
    batches = detections(outputs(content, per_image=4, masks=True))
    expected = joined(batches)
    random.Random(0).shuffle(batches)
    found = joined(batches)
    for name in ("images", "rows", "labels", "scores", "boxes", "masks", "lengths"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name
    expected.require_all(23)


@pytest.mark.parametrize(("which", "said"), [(slice(0, 4), "evaluated 16 images, 16"), (slice(None), "24 images, 20")])
def test_every_image_counts_once(which: slice, said: str) -> None:
    batches = detections(outputs(annotations(20), per_image=2, masks=False))
    again = batches[:1] if which == slice(None) else []
    with pytest.raises(UserError, match=said):
        joined([*batches[which], *again]).require_all(20)


def test_json_of_the_results_gives_the_same_figures(tmp_path: Path) -> None:
    content = annotations(20)
    found = joined(detections(outputs(content, per_image=5, masks=True)))
    truth = Truth(copy.deepcopy(content), CATEGORIES)
    write_reports(["predictions", "classes"], found, truth, ["a", "b", "=c", "d"], None, tmp_path)  # type: ignore[arg-type]
    results = json.loads((tmp_path / "predictions.json").read_text())
    for prefix, kind in (("", "bbox"), ("mask_", "segm")):
        expected = [truth.figures(found, masks=True)[f"{prefix}{name}"] for name in FIGURES]
        assert of_pycocotools(content, results, kind)[0] == pytest.approx(expected, abs=1e-12, rel=0)
    with open(tmp_path / "classes.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["category_id"] for row in rows] == [str(number) for number in CATEGORIES]
    assert [float(row["map"]) for row in rows] == truth.by_class(found)
    assert sum(int(row["objects"]) for row in rows) == sum(not a["iscrowd"] for a in content["annotations"])
    assert not rows[2]["class"].startswith("="), "no formula of a spreadsheet"


# -- both forms --------------------------------------------------------------------------------------------------------


def test_what_two_forms_differ_in() -> None:
    found = outputs(annotations(9), per_image=3, masks=False)
    found[3]["boxes"][0, 2:] = found[3]["boxes"][0, :2]  # no area, as at the border of an image
    other = copy.deepcopy(found)
    assert difference(joined(detections(found)), joined(detections(other))) == {"max_score_diff": 0.0, "unmatched": 0}
    other[4]["scores"][0] += 0.25
    other[5]["labels"][0] += 1
    other[6]["boxes"][0] += 100
    for key in other[7]:
        other[7][key] = other[7][key][:0]
    lost = len(found[7]["labels"])
    changed = difference(joined(detections(found)), joined(detections(other)))
    assert changed == {"max_score_diff": pytest.approx(0.25), "unmatched": 4 + lost}


def test_the_table_shows_both_forms() -> None:
    content = annotations(20)
    found = joined(detections(outputs(content, per_image=4, masks=True)))
    shown = table(figures_of(found, found, Truth(content, CATEGORIES), masks=True), "A run")
    lines = shown.splitlines()
    assert lines[1] == "A run, 20 images" and len(lines) == 7
    assert [line.split(",")[0].strip() for line in lines[2:6]] == ["boxes", "boxes", "masks", "masks"]
    assert lines[6] == "  fusing changes scores by at most 0.0e+00"


# -- pictures ----------------------------------------------------------------------------------------------------------


def test_quality_of_an_image() -> None:
    content = annotations(4)
    content["annotations"] = [
        {"id": 1, "image_id": 5, "category_id": 3, "bbox": [10, 10, 20, 20], "area": 400, "iscrowd": 0},
        {"id": 2, "image_id": 5, "category_id": 7, "bbox": [50, 50, 20, 20], "area": 400, "iscrowd": 0},
        {"id": 3, "image_id": 5, "category_id": 7, "bbox": [0, 0, 99, 99], "area": 9801, "iscrowd": 1},
    ]
    output = {
        "boxes": torch.tensor([[10.0, 10, 30, 30], [50, 50, 70, 60], [50, 50, 70, 70], [10, 10, 30, 30]]),
        "labels": torch.tensor([1, 2, 1, 1]),
        "scores": torch.tensor([0.9, 0.8, 0.7, 0.4]),
    }
    nothing = {key: tensor[:0] for key, tensor in output.items()}
    found = joined(detections([output, nothing, nothing, nothing]))
    truth = Truth(content, CATEGORIES)
    # IoUs of 1 and 0.5; two objects, three detections of a score that counts.
    assert quality(found, truth, 0) == pytest.approx(2 * 1.5 / 5)
    assert shown_rows(found, truth) == [(0, pytest.approx(0.6))], "images with objects"


def test_reports_have_names() -> None:
    assert report_names(None, REPORTS) == [] and report_names("classes", REPORTS) == ["classes"]
    with pytest.raises(UserError, match="report=confusion is not one of classes, predictions, pictures"):
        report_names(["confusion"], REPORTS)


def test_the_best_and_the_worst_are_drawn(tmp_path: Path) -> None:
    content = annotations(20)
    found = joined(detections(outputs(content, per_image=4, masks=True)))

    class Images:
        def stored_images(self, split: str, rows: list[int]) -> list[torch.Tensor]:
            assert split == "val" and len(rows) == len(set(rows)) == 12
            return [torch.full((3, 120, 160), 99, dtype=torch.uint8) for _ in rows]

    truth = Truth(content, CATEGORIES)
    write_reports(["pictures"], found, truth, ["a", "b", "$c", "d"], Images(), tmp_path)  # type: ignore[arg-type]
    with Image.open(tmp_path / "pictures.png") as picture:
        assert len(picture.convert("RGB").getcolors(1 << 24) or []) > 100


# -- several ranks -----------------------------------------------------------------------------------------------------


def rank_of(rank: int, ranks: int, folder: str) -> None:
    """A process that has the batches which data.sampling gives its rank; the first writes the figures."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=ranks)
    content = annotations(61)
    found = Detections.joined(detections(outputs(content, per_image=5, masks=True))[rank::ranks])
    assert (found is None) == (rank > 0)
    if found is not None:
        found.require_all(61)
        Path(folder, "figures").write_text(json.dumps(Truth(content, CATEGORIES).figures(found, masks=True)))
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 3])
def test_the_figures_do_not_depend_on_the_ranks(ranks: int, tmp_path: Path) -> None:
    torch.multiprocessing.spawn(rank_of, (ranks, str(tmp_path)), nprocs=ranks)
    content = annotations(61)
    alone = Truth(content, CATEGORIES).figures(
        joined(detections(outputs(content, per_image=5, masks=True))), masks=True
    )
    assert json.loads((tmp_path / "figures").read_text()) == alone


# -- results -----------------------------------------------------------------------------------------------------------


def evaluation(**changed: Any) -> dict[str, Any]:
    figures = dict.fromkeys(FIGURES, 0.5)
    fused = {**figures, "max_score_diff": 1e-6, "unmatched": 0}
    about = {"images": 200, "detector": "fcos", "width": 0.5, "params_m": 1.25, "weights": "ema", "epoch": 3}
    return {**figures, "fused": fused, **about, "selection": "last", "precision": "32-true", **changed}


def test_results_of_detectors_have_a_table_of_their_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "detection.csv"
    append_result(path, "one", "coco", evaluation(map=0.364))
    append_result(path, "two", "scenes", evaluation(map=None, map_large=None) | {"map": 0.7, "mask_map": 0.25})
    rows = read_results(path, "detection")
    assert [row["map"] for row in rows] == ["0.364", "0.7"] and rows[1]["map_large"] == ""
    assert "| two | fcos | 0.5 | scenes | last | 200 | 70.0 | 50.0 | 25.0 |  |" in runs_table(rows)
    beside = rows_beside_published(rows[:1])
    assert ["retinanet", "ResNet-50", "34.0", "36.4", "", "", "5000"] in [row[:-1] for row in beside]
    assert beside[-1][:7] == ["fcos", "RepGhostNet 0.5x", "1.2", "36.4", "", "50.0", "200"]
    print_results(["--results", str(path)])
    assert "Other runs" in capsys.readouterr().out
    with pytest.raises(UserError, match="not a table of results, it has no column"):
        require_writable_results(path)
    require_writable_results(path, "detection")


def test_published_figures_are_torchvisions() -> None:
    from torchvision.models import get_model_weights

    from repghost.reference import published_detectors

    for row in published_detectors():
        weights = get_model_weights(row["name"])["COCO_V1"]
        assert row["source"] == f"torchvision.models.detection.{weights}"
        metrics = weights.meta["_metrics"]["COCO-val2017"]
        masks = str(metrics["mask_map"]) if "mask_map" in metrics else ""
        assert (row["box_map"], row["mask_map"]) == (str(metrics["box_map"]), masks)
        assert float(row["params_m"]) == pytest.approx(weights.meta["num_params"] / 1e6, abs=0.06)
        assert float(row["gmacs"]) == pytest.approx(weights.meta["_ops"])
