"""Predictions on real photographs: in three formats, of files, folders and URLs, equal to what evaluation sees."""

import json
import subprocess
import sys
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import skimage.data
import torch
import yaml
from helpers import randomize_batchnorm
from images import patch
from PIL import Image
from timm.data import ImageNetInfo

from data.crops import CenterCrops
from data.reader import resize
from data.sampling import RankSampler
from repghost import repghostnet
from repghost.errors import UserError, run_command
from repghost.images import Preprocessing, image_files, read_image
from repghost.networks import open_network
from repghost.options import parse
from repghost.predict import __main__ as predict
from repghost.predict import output
from repghost.predict.predictor import Prediction, Predictor
from repghost.reference import class_words, synsets
from repghost.run import class_names_of
from repghost.run_data import write_class_names
from repghost.weights import save_weights

PHOTOS = {"astronaut": skimage.data.astronaut, "coffee": skimage.data.coffee, "rocket": skimage.data.rocket}


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network of 1,000 classes that tells photographs apart."""
    torch.manual_seed(0)
    model = repghostnet(0.1)
    randomize_batchnorm(model, seed=0)
    path = tmp_path_factory.mktemp("weights") / "model.safetensors"
    save_weights(model, path)
    return path


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two photographs of the same name in different folders, one of another form, a text and a broken JPEG."""
    folder = tmp_path_factory.mktemp("photos")
    (folder / "sub").mkdir()
    Image.fromarray(skimage.data.astronaut()).save(folder / "a.jpg")
    Image.fromarray(skimage.data.coffee()).save(folder / "sub" / "a.jpg")
    Image.fromarray(skimage.data.rocket()).convert("P").save(folder / "palette.png")
    (folder / "broken.jpg").write_bytes((folder / "a.jpg").read_bytes()[:5000])
    (folder / "notes.txt").write_text("no image")
    return folder


def lines(weights: Path, capsys: pytest.CaptureFixture[str], *arguments: str) -> list[dict]:
    code = predict.run([*arguments, f"weights={weights}", "width=0.1", "image_size=64", "format=jsonl"])
    captured = capsys.readouterr()
    found = [json.loads(line) for line in captured.out.splitlines()]
    assert code == (0 if found else 1)
    return found


def test_a_folder_gives_its_images_and_names_the_broken_one(
    weights: Path, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(photos), f"weights={weights}", "width=0.1", "image_size=64", "format=jsonl"]
    assert predict.run(arguments) == 0
    captured = capsys.readouterr()
    rows = [json.loads(line) for line in captured.out.splitlines()]
    assert [row["file"] for row in rows] == [str(photos / n) for n in ("a.jpg", "palette.png", "sub/a.jpg")]
    broken, summary = captured.err.strip().splitlines()
    assert broken.startswith(f"{photos / 'broken.jpg'}: skipped: ") and summary == "3 images predicted, 1 skipped"
    for row in rows:
        probabilities = [entry["probability"] for entry in row["top"]]
        assert len(probabilities) == 5 and probabilities == sorted(probabilities, reverse=True)
        assert all(entry["class"] == class_words()[entry["label"]] for entry in row["top"])
    assert rows[0]["top"] != rows[2]["top"]


def test_predictions_are_those_of_the_unfused_network_on_evaluation_pixels(
    weights: Path, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (row,) = lines(weights, capsys, str(photos / "a.jpg"), "top=3")
    model = repghostnet(0.1, weights=weights).eval()
    image = Preprocessing(64).transform()(read_image(str(photos / "a.jpg")))
    with torch.no_grad():
        probabilities, labels = model(image[None]).softmax(1).topk(3)
    assert [entry["label"] for entry in row["top"]] == labels[0].tolist()
    assert [entry["probability"] for entry in row["top"]] == pytest.approx(probabilities[0].tolist(), abs=1e-5)


@pytest.mark.parametrize("photo", PHOTOS)
def test_pixels_are_those_of_the_validation_loader(photo: str) -> None:
    pixels = PHOTOS[photo]()
    stored = np.zeros(1, [("height", "i8"), ("width", "i8")])
    stored["height"], stored["width"] = pixels.shape[:2]
    index = SimpleNamespace(samples=stored)
    crops = CenterCrops(index, RankSampler(1, batch_size=1, drop_last=False), 96, crop_fraction=0.875)  # type: ignore[arg-type]
    expected = resize(torch.from_numpy(pixels.copy()), crops(0, 0), 0).permute(2, 0, 1)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    found = Preprocessing(96).transform()(Image.fromarray(pixels)) * std + mean
    assert (found * 255 - expected).abs().max() < 1e-3


def test_progress_is_lines_where_there_is_no_terminal(
    weights: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [str(photos / name) for name in ("a.jpg", "broken.jpg", "sub/a.jpg")]
    for seconds, expected in ((0, ["1 of 3 images", "3 of 3 images"]), (1e9, [])):
        monkeypatch.setattr(output, "SECONDS_BETWEEN_LINES", seconds)
        predict.run([*files, f"weights={weights}", "width=0.1", "batch_size=1", f"out={tmp_path / 'table.txt'}"])
        said = capsys.readouterr().err.splitlines()
        assert [line for line in said if " of " in line] == expected
        assert "broken.jpg: skipped" in said[len(expected) // 2] and said[-1] == "2 images predicted, 1 skipped"


def test_neither_batches_nor_order_matter(weights: Path, photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = [str(photos / n) for n in ("a.jpg", "palette.png", "sub/a.jpg")]
    whole = lines(weights, capsys, *names)
    single = lines(weights, capsys, *names[::-1], "batch_size=1")[::-1]
    for a, b in zip(whole, single, strict=True):
        assert a["file"] == b["file"] and [e["label"] for e in a["top"]] == [e["label"] for e in b["top"]]
        assert [e["probability"] for e in a["top"]] == pytest.approx([e["probability"] for e in b["top"]], abs=2e-6)


def test_the_table_names_file_and_classes(
    weights: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = tmp_path / "names.txt"
    names.write_text("".join(f"thing {label}\n" for label in range(1000)))
    out = tmp_path / "table.txt"
    predict.run(
        [str(photos / "a.jpg"), f"weights={weights}", "width=0.1", "top=2", f"class_names={names}", f"out={out}"]
    )
    first, *rest = out.read_text().splitlines()
    assert first == str(photos / "a.jpg") and len(rest) == 2 and all("%  thing " in line for line in rest)
    names.write_text("one\ntwo\n")
    with pytest.raises(UserError, match="2 class names for weights of 1000 classes"):
        predict.run([str(photos), f"weights={weights}", "width=0.1", f"class_names={names}"])


def test_pictures_keep_their_names_and_the_originals(weights: Path, photos: Path, tmp_path: Path) -> None:
    before = {path: path.read_bytes() for path in photos.rglob("*") if path.is_file()}
    options = [f"weights={weights}", "width=0.1", "image_size=64", "format=pictures"]
    assert predict.run([str(photos), *options, f"out={tmp_path / 'out'}"]) == 0
    written = {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert written == {"a.jpg", "palette.png", "sub/a.jpg"}
    original, copy = Image.open(photos / "a.jpg"), Image.open(tmp_path / "out" / "a.jpg")
    assert copy.width >= original.width and copy.height > original.height
    above = np.asarray(copy.convert("RGB"))[: original.height, : original.width].astype(int)
    assert np.abs(above - np.asarray(original)).mean() < 4
    band = np.asarray(copy.convert("L"))[original.height :]
    assert band.max() > 200 and band.min() < 50  # white letters on black
    assert predict.run([str(photos / "a.jpg"), str(photos / "sub" / "a.jpg"), *options, f"out={tmp_path / 'two'}"]) == 0
    assert (tmp_path / "two" / "a.jpg").exists() and (tmp_path / "two" / "sub" / "a.jpg").exists()
    with pytest.raises(UserError, match="outside of it"):
        predict.run([str(photos), *options, f"out={photos / 'sub'}"])
    with pytest.raises(UserError, match="would overwrite"):
        predict.run([str(photos / "a.jpg"), *options, f"out={photos}"])
    assert before == {path: path.read_bytes() for path in photos.rglob("*") if path.is_file()}


def test_urls(weights: Path, photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    handler = partial(SimpleHTTPRequestHandler, directory=str(photos))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        served = lines(weights, capsys, f"{url}/a.jpg", f"{url}/missing.jpg", (photos / "a.jpg").as_uri())
        server.shutdown()
    (local,) = lines(weights, capsys, str(photos / "a.jpg"))
    assert [row["top"] for row in served] == [local["top"]] * 2
    assert served[0]["file"] == f"{url}/a.jpg"


def test_nothing_predicted_is_exit_code_1(weights: Path, photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert lines(weights, capsys, str(photos / "broken.jpg"), str(photos / "notes.txt"), str(photos / "none")) == []


def test_paths_with_an_equals_sign(
    weights: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("top=1.jpg", "a=b.jpg"):
        (tmp_path / name).write_bytes((photos / "a.jpg").read_bytes())
    rows = lines(weights, capsys, "./top=1.jpg", "a=b.jpg")
    assert [row["file"] for row in rows] == ["./top=1.jpg", "a=b.jpg"]
    with pytest.raises(UserError, match="colour is not a key"):
        predict.run(["colour=red"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a.jpg"], "give either run="),
        (["weights=x", "width=1"], "give images, folders or URLs"),
        (["a.jpg", "weights=x"], "x: no such file"),
        (["a.jpg", "weights=timm"], "say which width"),
        (["a.jpg", "weights=x", "out=."], ".: cannot be written"),
        (["a.jpg", "weights=x", "out=/proc/none/x.csv"], "/proc/none/x.csv: cannot be written"),
        (["a.jpg", "weights=x", "width=1", "top=0"], "top=0"),
        (["a.jpg", "weights=x", "width=1", "format=xml"], "format=xml"),
        (["a.jpg", "weights=nothing.pt", "width=1"], "nothing.pt: no such file"),
    ],
)
def test_mistakes_are_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(lambda: predict.run(arguments)) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and len(error.splitlines()) == 1


def test_the_command_line() -> None:
    command = [sys.executable, "-m", "repghost.predict"]
    done = subprocess.run([*command, "a.jpg"], capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert done.returncode == 2 and done.stderr.startswith("error: give either run=") and done.stdout == ""


def test_the_class_names_of_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert class_names_of(tmp_path) is None
    assert "classes.txt: missing" in capsys.readouterr().err
    write_class_names(tmp_path, ["owl", synsets()[0], "a spaced name"])
    assert class_names_of(tmp_path) == ["owl", "tench", "a spaced name"]


def make_run(folder: Path, **changes: Any) -> torch.nn.Module:
    """A run of a network with three classes in `folder`, as predict and export need it; the network, for evaluation."""
    torch.manual_seed(0)
    model = repghostnet(0.1, num_classes=3)
    augment = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]} | changes
    config = {"width": 0.1, "image_size": 32, "data": {"crop_fraction": 1.0}, "recipe": {"augment": augment}}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / "checkpoints").mkdir()
    write_class_names(folder, ["cat", "dog", "owl"])
    content = {"ema": model.state_dict(), "history": [{"epoch": 0}], "run": {"width": 0.1}}
    torch.save(content, folder / "checkpoints" / "last.ckpt")
    return model.eval()


def predict_one(image: Path, *arguments: str) -> Prediction:
    paths, options = parse(predict.Options, [str(image), *arguments])
    (prediction,) = Predictor(open_network(options))(paths, lambda file, error: pytest.fail(f"{file}: {error}"))
    return prediction


@pytest.mark.parametrize("normalization", [{}, {"mean": [0.1, 0.5, 0.9], "std": [0.5, 0.25, 0.75]}])
def test_a_run_knows_its_classes_and_preprocessing(normalization: dict[str, list[float]], tmp_path: Path) -> None:
    model, image = make_run(tmp_path, **normalization), tmp_path / "owl.png"
    patch(2).save(image)
    prediction = predict_one(image, f"run={tmp_path}")
    _, names, probabilities = zip(*prediction.top, strict=True)
    assert sorted(names) == ["cat", "dog", "owl"] and sum(probabilities) == pytest.approx(1)
    preprocessing = Preprocessing(32, 1.0, **{name: tuple(values) for name, values in normalization.items()})
    with torch.no_grad():
        expected = model(preprocessing.transform()(read_image(str(image)))[None]).softmax(1)[0]
    assert probabilities == pytest.approx(expected.sort(descending=True).values.tolist(), abs=1e-5)
    smaller = predict_one(image, f"run={tmp_path}", "image_size=16", "crop_fraction=0.5")
    assert smaller.top != prediction.top


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "CMYK", "1"])
def test_every_kind_of_image_becomes_rgb(mode: str, tmp_path: Path) -> None:
    path = tmp_path / ("x.tif" if mode == "CMYK" else "x.png")
    Image.fromarray(skimage.data.astronaut()).convert(mode).save(path)
    assert read_image(str(path)).mode == "RGB"


def test_16_bits_become_8(tmp_path: Path) -> None:
    grey = skimage.data.camera()
    Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / "deep.png")
    np.testing.assert_array_equal(np.asarray(read_image(str(tmp_path / "deep.png")))[..., 1], grey)


def test_folders_that_contain_themselves_end(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    patch(0).save(tmp_path / "sub" / "a.png")
    patch(1).save(tmp_path / ".hidden.png")
    (tmp_path / "sub" / "back").symlink_to(tmp_path)
    assert list(image_files([tmp_path])) == [str(tmp_path / "sub" / "a.png")]


def test_imagenet_names_are_in_the_order_of_the_synsets() -> None:
    info = ImageNetInfo("imagenet-1k")
    lemmas = [info.index_to_description(label, detailed=False).lower() for label in range(1000)]
    agree = sum(name.lower() in lemma for name, lemma in zip(class_words(), lemmas, strict=True))
    assert tuple(info.label_names()) == synsets() and len(set(class_words())) == 1000
    assert agree > 900  # the others are told apart by a word more ("crane bird") or spelt otherwise
