"""The latency benchmark measures what it says, keeps what was measured before, and the figure shows it."""

import csv
import importlib.util
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

from benchmarks import latency
from benchmarks.latency_calls import (
    FORMS,
    FUSED,
    PACKAGES,
    PROVIDERS,
    TIMM,
    TRAINING,
    Exports,
    cannot_run,
    networks,
    prepare,
)
from benchmarks.latency_rows import COLUMNS, imported, merge
from repghost import figures
from repghost.errors import UserError

# Two rounds: on a slow machine a round is one call, and deciles need two.
SMALL = ["--widths", "0.5", "--threads", "1", "--batches", "1", "--repetitions", "2", "--seconds", "0"]


def rows_of(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_every_form_and_peer_has_a_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, threads = tmp_path / "latency.csv", torch.get_num_threads()
    arguments = [*SMALL, "--image-size", "32", "--backends", "eager", "--peers", "ghostnet_100", f"--out={out}"]
    latency.main(arguments)
    torch.set_num_threads(threads)
    rows = rows_of(out)
    assert tuple(rows[0]) == COLUMNS
    found = {(r["model"], r["form"], r["backend"], r["threads"], r["batch"], r["image_size"]) for r in rows}
    ours = {("repghostnet_050", form, "eager", "1", "1", "32") for form in FORMS}
    assert found == {*ours, ("ghostnet_100", TIMM, "eager", "1", "1", "32")}
    # timm's form as timm gives it, and in the faster memory format where that is another.
    timm = [r["memory_format"] for r in rows if (r["family"], r["form"]) == ("RepGhostNet", TIMM)]
    assert "contiguous" in timm and len(rows) == 3 + len(timm) and len(set(timm)) == len(timm)
    for row in rows:
        assert 0 < float(row["p10_ms"]) <= float(row["median_ms"]) <= float(row["p90_ms"])
        assert float(row["images_per_second"]) == pytest.approx(1000 / float(row["median_ms"]), rel=2e-3)
        assert row["memory_format"] in ("contiguous", "channels_last") and row["machine"] and row["date"]
        assert row["versions"] == f"torch {version('torch')}" and row["device"] == "cpu"
    assert {(row["family"], row["top1"]) for row in rows} == {("RepGhostNet", "66.980"), ("GhostNet", "73.960")}
    printed = capsys.readouterr().out
    assert "times as fast as repghostnet_050 (timm_reparameterized" in printed

    first = rows[0] | {"machine": "another", "median_ms": "5"}
    merge(out, [first])
    merge(out, [rows[0] | {"median_ms": "7"}])
    merged = rows_of(out)
    assert len(merged) == len(rows) + 1 and {r["machine"] for r in merged} == {rows[0]["machine"], "another"}
    assert [r["median_ms"] for r in merged if r["form"] == TRAINING] == ["5", "7"]


@pytest.mark.slow
def test_detectors(tmp_path: Path) -> None:
    out, threads = tmp_path / "latency.csv", torch.get_num_threads()
    latency.main([*SMALL, "--image-size", "64", "--detectors", "ssdlite", f"--out={out}"])
    torch.set_num_threads(threads)
    found = [(row["model"], row["family"], row["form"], row["backend"], row["top1"]) for row in rows_of(out)]
    assert found == [("ssdlite_050", "ssdlite", form, "eager", "") for form in (TRAINING, FUSED)]
    assert figures.measured_latency(figures.read_latency(out)) is None, "the figure is of classifiers"


def test_the_forms_are_one_network() -> None:
    made = {n.form: n.module for n in networks([0.5], FORMS, [])}
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        training, timm, fused = (made[form](images) for form in FORMS)
    torch.testing.assert_close(fused, training)
    torch.testing.assert_close(timm, training)
    kinds = {form: {type(m) for m in module.modules()} for form, module in made.items()}
    assert torch.nn.BatchNorm2d in kinds[TRAINING] and torch.nn.BatchNorm2d not in kinds[FUSED]


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["onnxruntime", "executorch", "openvino", "ncnn", "compiled"])
def test_other_backends(backend: str, tmp_path: Path) -> None:
    if importlib.util.find_spec(PACKAGES[backend]) is None:
        pytest.skip(f"{backend} is not installed")
    out, threads = tmp_path / "latency.csv", torch.get_num_threads()
    latency.main([*SMALL, "--image-size", "64", "--backends", backend, "--peers", f"--out={out}"])
    torch.set_num_threads(threads)
    assert [(r["form"], r["backend"]) for r in rows_of(out)] == [(form, backend) for form in FORMS]


@pytest.mark.slow
@pytest.mark.parametrize("runtime", ["onnxruntime", "executorch", "openvino"])
def test_int8_is_measured_of_the_fused_form_alone(runtime: str, tmp_path: Path) -> None:
    out, threads = tmp_path / "latency.csv", torch.get_num_threads()
    backends = [runtime, f"{runtime} int8"]
    latency.main([*SMALL, "--image-size", "96", "--backends", *backends, "--peers", f"--out={out}"])
    torch.set_num_threads(threads)
    found = [(r["form"], r["backend"]) for r in rows_of(out)]
    assert sorted(found) == sorted([*((form, runtime) for form in FORMS), (FUSED, backends[1])])


def test_a_backend_that_a_device_lacks_is_left_out(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """onnxruntime without its CUDA provider runs on the CPU after a warning: no row may call that a GPU's figure."""
    onnxruntime = pytest.importorskip("onnxruntime")
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert cannot_run("onnxruntime", cpu) is None and cannot_run("eager", cuda) is None
    assert "no CUDAExecutionProvider" in (cannot_run("onnxruntime", cuda) or "")
    assert "for the CPU" in (cannot_run("executorch", cuda) or "")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    out = tmp_path / "latency.csv"
    with pytest.raises(UserError, match="none of them runs on --device cuda"):
        latency.main(["--device", "cuda", "--backends", "onnxruntime", "executorch", f"--out={out}"])
    assert capsys.readouterr().out.count("left out: ") == 2 and not out.exists()


@pytest.mark.filterwarnings("ignore:Specified provider:UserWarning")
def test_a_session_that_fell_back_to_the_cpu_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this onnxruntime has the provider")
    monkeypatch.setitem(PROVIDERS, "cpu", "CUDAExecutionProvider")  # as on a GPU
    (network,) = networks([0.5], [FUSED], [])
    with pytest.raises(UserError, match="with CPUExecutionProvider instead of CUDAExecutionProvider"):
        prepare(network, "onnxruntime", torch.zeros(1, 3, 32, 32), 1, Exports(tmp_path, 32), {})


def phone(**changes: str) -> dict[str, str]:
    row = {"model": "repghostnet_100", "form": "fused", "backend": "executorch", "machine": "a phone"}
    return row | {"threads": "1", "batch": "1", "median_ms": "12.5"} | changes


def write(path: Path, *rows: dict[str, str]) -> Path:
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return path


def test_what_was_measured_elsewhere_is_imported_and_drawn(tmp_path: Path) -> None:
    peer = phone(model="ghostnet_100", form="timm_reparameterized", median_ms="20")
    out = tmp_path / "latency.csv"
    latency.main([f"--import={write(tmp_path / 'phone.csv', phone(), peer)}", f"--out={out}", "--figure"])
    ours, other = rows_of(out)
    assert (ours["family"], ours["width"], ours["top1"]) == ("RepGhostNet", "1", "74.200")
    assert float(ours["images_per_second"]) == 80
    assert (other["family"], other["width"], other["image_size"]) == ("GhostNet", "", "224")
    label, milliseconds = figures.measured_latency(figures.read_latency(out)) or ("", {})
    assert milliseconds == {"repghostnet_100": 12.5, "ghostnet_100": 20} and "executorch, 1 thread" in label
    for text in ("a phone", "executorch"):
        assert text in (tmp_path / "accuracy.svg").read_text()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"median_ms": ""}, "line 2: median_ms is missing"),
        ({"median_ms": "fast"}, "line 2: batch and median_ms"),
        ({"model": "resnet50"}, "line 2: model=resnet50"),
        ({"form": "folded"}, "line 2: form=folded"),
    ],
)
def test_a_bad_row_is_named(change: dict[str, str], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        imported(write(tmp_path / "phone.csv", phone(**change)))


def test_the_figure_takes_one_setting(tmp_path: Path) -> None:
    def setting(backend: str, threads: str, milliseconds: str) -> list[dict[str, str]]:
        common = {"backend": backend, "threads": threads, "median_ms": milliseconds}
        common |= {"device": "cpu", "image_size": "224", "date": "2030-01-01"}
        return [phone(**common), phone(**common, model="ghostnet_100", form="timm_reparameterized")]

    rows = [*setting("eager", "1", "9"), *setting("onnxruntime", "2", "3"), *setting("onnxruntime", "1", "5")]
    label, milliseconds = figures.measured_latency(rows) or ("", {})
    assert set(milliseconds.values()) == {5.0} and "onnxruntime, 1 thread (ms)" in label
    assert figures.measured_latency(rows[:1]) is None  # no peer beside it
    for threads, milliseconds in ("1", "2"), ("2", "7"):
        rows.append(setting("openvino int8", threads, milliseconds)[0])
    assert figures.other_backends(rows) == {"openvino int8": {"repghostnet_100": 2.0}}, "with one thread, too"
    with pytest.raises(UserError, match="no column backend"):
        figures.read_latency(write(tmp_path / "other.csv", {"model": "x"}))


def test_unknown_names_are_mistakes(tmp_path: Path) -> None:
    for arguments in (["--widths", "0.7"], ["--peers", "resnet50"]):
        with pytest.raises(UserError, match=f"{arguments[1]} is not one of"):
            latency.main([*arguments, f"--out={tmp_path / 'x.csv'}"])
