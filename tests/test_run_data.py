"""A run knows its data: what finishes it, which images and classes are its own, and where other results stand."""

import csv
import json
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from images import make_images
from test_resume import at, interrupt, step
from webdataset import TarWriter

from data.write_shards.write import write_folder
from repghost.errors import UserError
from repghost.evaluation.test_sets import class_columns, match_classes
from repghost.files import read_class_names
from repghost.reference import class_words, synsets
from repghost.run import is_finished
from repghost.run_data import recorded_data, write_class_names
from repghost.text import as_cell, from_cell, one_line

Program = Callable[..., int]
ODD_NAMES = ["a\nb", " cat", "=1+1", "a\tb", "\udcff", '猫, "x"', "a\u2028b", "  ", "\x1b[31mred", "a\x85b", "Ü b"]


def rows() -> list[tuple[str, str, str]]:
    with open("results/results.csv", newline="") as file:
        return [(row["selection"], row["epoch"], row["data"]) for row in csv.DictReader(file)]


def evaluations(run: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in run.glob("evaluation*.json")}


def relabelled(shards: Path, folder: Path, order: list[str], only: set[str]) -> tuple[str, str]:
    """Validation shards as others write them: the images of some classes under other labels; the options for them."""
    names = json.loads((shards / "manifest.json").read_text())["classes"]
    folder.mkdir()
    with TarWriter(str(folder / "val-0.tar")) as tar:
        for shard in sorted(shards.glob("val*.tar")):
            with tarfile.open(shard) as source:
                content = {member.name: source.extractfile(member).read() for member in source}  # type: ignore[union-attr]
            for name, image in content.items():
                key, _, extension = name.rpartition(".")
                if extension != "cls" and (label := names[int(content[f"{key}.cls"])]) in only:
                    tar.write({"__key__": key, extension: image, "cls": b"%d" % order.index(label)})
    (folder / "names.txt").write_text("\n".join(order))
    return f"data.root={folder}", f"data.class_names={folder / 'names.txt'}"


# -- finished ----------------------------------------------------------------------------------------------------------


def test_an_interrupted_run_that_was_evaluated_goes_on(
    train_tiny: Program, evaluate_with: Program, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.MonkeyPatch.context() as patched:
        at(patched, *step(0, 2), interrupt)
        assert train_tiny("name=a") == 75
    assert evaluate_with("run=outputs/a", "trainer=cpu") == 2
    assert "no epoch of this run is complete yet" in capsys.readouterr().err
    with pytest.MonkeyPatch.context() as patched:
        at(patched, *step(1, 2), interrupt)
        assert train_tiny("name=a") == 75
    for selection in ("last", "best_ema"):
        assert evaluate_with("run=outputs/a", "trainer=cpu", f"selection={selection}") == 0
    run = Path("outputs/a")
    assert set(evaluations(run)) == {"evaluation.json", "evaluation_best_ema.json"} and not is_finished(run)
    assert train_tiny("name=a") == 0
    last, best = (json.loads(evaluations(run)[name])["epoch"] for name in sorted(evaluations(run)))
    assert last == 1 and is_finished(run)
    # A row for each result: the best epoch has one already where it is still the best.
    expected = [("last", "0"), ("best_ema", "0"), *([("best_ema", "1")] if best == 1 else []), ("last", "1")]
    assert [row[:2] for row in rows()] == expected


def test_a_run_that_died_before_its_own_evaluation_is_completed(
    finished_run: Path, train_tiny: Program, evaluate_with: Program
) -> None:
    run = finished_run
    written = ("evaluation.json", "evaluation_best_ema.json", "model.safetensors", "model_fused.safetensors")
    before = {name: (run / name).read_bytes() for name in written}
    for name in written:
        (run / name).unlink()
    Path("results/results.csv").unlink()
    assert evaluate_with("run=outputs/a", "trainer=cpu") == 0
    assert not is_finished(run)
    assert train_tiny("name=a", "epochs=1") == 0
    assert {name: (run / name).read_bytes() for name in written} == before
    assert [row[0] for row in rows()] == ["last", "best_ema"]


def test_runs_of_earlier_versions_count_as_finished(
    finished_run: Path, train_tiny: Program, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = finished_run
    (run / "data.json").unlink()
    evaluation = json.loads((run / "evaluation.json").read_text())
    for key in ("epoch", "changes", "scored"):
        del evaluation[key]
    (run / "evaluation.json").write_text(json.dumps(evaluation))
    assert train_tiny("name=a", "epochs=1") == 0 and "is finished" in capsys.readouterr().out
    # Its checkpoint knows the images.
    write_folder(make_images(tmp_path / "i", train=6, val=2), tmp_path / "o", workers=1, quiet=True)
    assert train_tiny("name=a", "epochs=1", f"data.root={tmp_path / 'o'}") == 2
    assert "the train and val images are others" in capsys.readouterr().err
    (run / "evaluation.json").write_text("{")
    assert train_tiny("name=a", "epochs=1") == 2 and "evaluation.json: not an evaluation" in capsys.readouterr().err


# -- which data are the run's ------------------------------------------------------------------------------------------


def test_other_images_in_a_folder_of_the_same_name_are_another_run(
    train_tiny: Program, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = make_images(tmp_path / "images", ("cat", "dog", "eel"), train=15, val=5)
    write_folder(images, tmp_path / "other" / "tiny", workers=1, quiet=True)
    shutil.copytree(shards, tmp_path / "moved" / "tiny")
    other, moved = (f"data.root={tmp_path / name / 'tiny'}" for name in ("other", "moved"))
    with pytest.MonkeyPatch.context() as patched:
        at(patched, *step(0, 2), interrupt)
        assert train_tiny() == 75
    for code, said in ((0, "epoch   2/2"), (0, "is finished")):
        assert train_tiny(other) == 2
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert f"was begun with other data, data.root={shards}" in error and "name=..." in error
        assert "no class owl" in error
        assert train_tiny(moved) == code and said in capsys.readouterr().out
    assert len(list(Path("outputs").iterdir())) == 1
    # A finished run needs its images no longer, but it does not vouch for a folder that is not there.
    shutil.rmtree(tmp_path / "moved")
    assert train_tiny(moved) == 2 and "no such folder" in capsys.readouterr().err
    url, old = (
        "data.root=https://localhost:1/tiny",
        json.loads(Path(next(Path("outputs").iterdir()), "data.json").read_text()),
    )
    assert train_tiny(url) == 2 and "only a download would tell" in capsys.readouterr().err
    assert old["classes"] == ["cat", "dog", "owl"] and set(old["fingerprints"]) == {"train", "val"}


def test_an_evaluation_with_other_images_or_values_stands_beside_the_runs_own(
    finished_run: Path, train_tiny: Program, evaluate_with: Program, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = finished_run
    own = evaluations(run)
    for number in (1, 2):
        images = make_images(tmp_path / f"images{number}", train=3, val=3 * number)
        write_folder(images, tmp_path / str(number) / "tiny", workers=1, quiet=True)
    common = ("run=outputs/a", "trainer=cpu", "data.workers=0")
    assert evaluate_with(*common) == 0
    assert evaluations(run) == own
    for options, name in (
        (("image_size=64",), "evaluation_image_size_64.json"),
        (("data.crop_fraction=0.5", "precision=bf16"), "evaluation_crop_fraction_0.5_bf16-mixed.json"),
        (("data.augment.mean=[0.1,0.2,0.3]",), "evaluation_mean_0.1_0.2_0.3.json"),
    ):
        capsys.readouterr()
        assert evaluate_with(*common, *options) == 0
        assert f"written to {run / name}" in capsys.readouterr().out
        assert evaluations(run).keys() == {*own, name}
        (run / name).unlink()
    for number in (1, 2):
        root = f"data.root={tmp_path / str(number) / 'tiny'}"
        assert evaluate_with(*common, root, "selection=best_ema", "report=classes") == 0
    beside = evaluations(run).keys() - own.keys()
    assert len(beside) == 2 and all(name.startswith("evaluation_best_ema_tiny-") for name in beside)
    assert len(list(run.glob("tiny-*/classes.csv"))) == 2 and not (run / "classes.csv").exists()
    assert {name: content for name, content in evaluations(run).items() if name in own} == own
    # Rows of results.csv that the paper's table must not take for the run's name other data.
    named = [row[2] for row in rows()]
    assert named[:5] == ["tiny"] * 5 and named[5] == "tiny mean_0.1_0.2_0.3"
    assert len(set(named[6:])) == 2 and all(name.startswith("tiny-") for name in named[6:])
    assert train_tiny("name=a", "epochs=1") == 0 and "is finished" in capsys.readouterr().out


# -- classes by name ---------------------------------------------------------------------------------------------------


def test_a_data_set_is_scored_by_the_names_of_its_classes(
    finished_run: Path, evaluate_with: Program, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = json.loads(Path(finished_run, "evaluation.json").read_text())
    common = ("run=outputs/a", "trainer=cpu", "data.workers=0", f"data.cache={tmp_path / 'cache'}")
    every = {"cat", "dog", "owl"}

    def evaluation(*options: str) -> tuple[dict, str]:
        capsys.readouterr()
        before = evaluations(Path("outputs/a")).keys()
        assert evaluate_with(*common, *options) == 0
        (name,) = evaluations(Path("outputs/a")).keys() - before
        return json.loads(Path("outputs/a", name).read_text()), capsys.readouterr().out

    turned, said = evaluation(*relabelled(shards, tmp_path / "turned", ["owl", "cat", "dog"], every))
    assert "in another order than the network's: matched by name" in said
    assert turned["loss"] == pytest.approx(own["loss"], rel=1e-6) and turned["top1"] == own["top1"]
    part, said = evaluation(*relabelled(shards, tmp_path / "part", ["owl", "cat"], {"owl", "cat"}))
    assert "scored among the 2 classes of the data set, of the network's 3" in said and part["images"] == 10
    numbered, said = evaluation(relabelled(shards, tmp_path / "numbers", ["cat", "dog", "owl"], every)[0])
    assert "are numbers: taken for the labels of the network" in said
    assert numbered["loss"] == pytest.approx(own["loss"], rel=1e-6)
    # Names that the network does not know are refused before anything is decoded.
    root, _ = relabelled(shards, tmp_path / "others", ["cat", "dog", "owl"], every)
    (tmp_path / "others.txt").write_text("cat\ndog\neel\n")
    assert evaluate_with(*common, root, f"data.class_names={tmp_path / 'others.txt'}") == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]  # after the bar of the indexing
    assert error.startswith("error: ") and "does not know the class eel (1 of the 3 classes" in error
    assert len(rows()) == 5


def test_classes_are_matched_by_name() -> None:
    numbers = [str(n) for n in range(11)]
    as_folders = sorted(numbers)
    for data, network, outputs, columns in (
        (["a", "b"], ["a", "b"], 2, None),
        (["b", "a"], ["a", "b"], 2, [1, 0]),
        (["c", "a"], ["a", "b", "c"], 3, [2, 0]),
        (["a", "b"], None, 2, None),
        (numbers, as_folders, 11, [as_folders.index(n) for n in numbers]),
        (numbers, list("abcdefghijk"), 11, None),
        (as_folders, list("abcdefghijk"), 11, [int(n) for n in as_folders]),
        (sorted(map(str, range(1000))), synsets(), 1000, [int(n) for n in sorted(map(str, range(1000)))]),
        (sorted(map(str, range(1000))), None, 1000, [int(n) for n in sorted(map(str, range(1000)))]),
        (synsets()[5:9], synsets(), 1000, [5, 6, 7, 8]),
        (synsets(), None, 1000, None),
        (class_words(), None, 1000, None),
        (["crane", "dog", "crane"], ["crane", "dog", "crane"], 3, None),
        (["crane", "dog", "crane"], None, 3, None),
    ):
        assert match_classes(data, network, outputs)[0] == columns, (data[:3], (network or [])[:3])
    for data, network, outputs, named in (
        (["b", "e", "d"], ["a", "b", "c"], 3, "does not know the class e (2 of the 3"),
        (numbers[:5], list("abcdefghijk"), 11, "does not know the class 0"),
        (numbers[:10], synsets(), 1000, "does not know the class 0"),  # ten digits are no fish
        (["a", "b"], None, 3, "the weights have 3 classes, the data 2"),
        (["a", "b", "b"], ["a", "b", "c"], 3, "two classes are called b"),
        (["b", "a", "c"], ["a", "b", "b", "c"], 4, "two classes are called b"),
    ):
        with pytest.raises(UserError, match=named.replace("(", r"\(")):
            match_classes(data, network, outputs)
    with pytest.raises(UserError, match="two classes are called n01440764"):
        class_columns(["n01440764", "n01443537", "n01440764"])


def test_two_classes_of_the_same_name(
    shards: Path, train_tiny: Program, evaluate_with: Program, capsys: pytest.CaptureFixture[str]
) -> None:
    """Lists of ImageNet's words have two cranes, which their labels tell apart."""
    folder = Path("named")
    shutil.copytree(shards, folder, ignore=lambda _, names: [name for name in names if not name.endswith(".tar")])
    root = f"data.root={folder}"
    (folder / "names.txt").write_text("crane\ndog\ncrane\n")
    data = (root, f"data.class_names={folder / 'names.txt'}")
    assert train_tiny("name=a", "epochs=1", *data) == 0
    assert Path("outputs/a/classes.txt").read_text() == "crane\ndog\ncrane\n"
    own = json.loads(Path("outputs/a/evaluation.json").read_text())
    report = "report=[classes,predictions,confusion,worst]"
    assert evaluate_with("run=outputs/a", "trainer=cpu", "data.workers=0", report) == 0
    assert json.loads(Path("outputs/a/evaluation.json").read_text())["top1"] == own["top1"]
    with open("outputs/a/classes.csv", newline="") as file:
        assert [row["class"] for row in csv.DictReader(file)] == ["crane", "dog", "crane"]
    (folder / "names.txt").write_text("crane\ncrane\ndog\n")
    capsys.readouterr()
    assert evaluate_with("run=outputs/a", *data, "trainer=cpu", "data.workers=0") == 2
    assert "two classes are called crane" in capsys.readouterr().err.strip().splitlines()[-1]


# -- odd names ---------------------------------------------------------------------------------------------------------


def test_odd_names_stay_on_their_line(tmp_path: Path) -> None:
    write_class_names(tmp_path, ODD_NAMES)
    read = read_class_names(tmp_path / "classes.txt")
    assert read == [one_line(name) for name in ODD_NAMES] and len(set(read)) == len(ODD_NAMES)
    assert read[:3] == ["a\\nb", "\\x20cat", "=1+1"] and read[5] == ODD_NAMES[5] and read[10] == "Ü b"
    for name in ODD_NAMES:
        cell = as_cell(name)
        assert from_cell(cell) == one_line(name) and cell[0] not in "=+-@" and cell.isprintable()


def test_a_run_reads_its_class_names_as_they_are(train_tiny: Program, evaluate_with: Program, tmp_path: Path) -> None:
    names = ["=cmd", "a\nb", 'c,d"e', "caf\udce9"]
    images = make_images(tmp_path / "images", tuple(names), train=15, val=5)
    write_folder(images, tmp_path / "shards", workers=1, quiet=True)
    assert train_tiny("name=a", "epochs=1", f"data.root={tmp_path / 'shards'}") == 0
    data = recorded_data(Path("outputs/a"))
    assert data is not None and data.classes == tuple(sorted(names))
    report = "report=[classes,predictions,confusion,worst]"
    assert evaluate_with("run=outputs/a", "trainer=cpu", "data.workers=0", report) == 0
    with open("outputs/a/classes.csv", newline="") as file:
        assert [row["class"] for row in csv.DictReader(file)] == ["'=cmd", "a\\nb", 'c,d"e', "caf\\udce9"]
