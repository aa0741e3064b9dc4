"""The paper's table from measurements that are there, and only those; the figure; a model for the hub."""

import csv
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from repghost import figures
from repghost.errors import run_command
from repghost.files import rows_as_csv
from repghost.model import WIDTHS
from repghost.results import (
    COLUMNS,
    HEADER,
    MARKERS,
    append_result,
    as_markdown,
    main,
    paper_rows,
    read_results,
    require_writable_results,
)

Program = Callable[..., int]


def evaluation(top1: float, width: float = 1.0, **changes: Any) -> dict[str, Any]:
    fused = {"top1": top1, "top5": 91.0, "top1_flips": 0, "max_rel_logit_diff": 1e-7}
    row = {"images": 50_000, "top1": top1, "top5": 91.0, "loss": 1.1, "fused": fused, "width": width}
    return {**row, "weights": "ema", "epoch": 299, "selection": "last", "params_m": 4.07, "macs_m": 142.0, **changes}


def cells(rows: list[list[str]], width: str, measured: str) -> dict[str, str]:
    (row,) = (r for r in (dict(zip(HEADER, row, strict=True)) for row in rows)
              if r["width"] == width and r["measured"] == measured)  # fmt: skip
    return row


def test_an_empty_table_is_not_filled() -> None:
    rows = paper_rows([], "imagenet")
    assert [row[0] for row in rows] == ["0.5", "0.58", "0.8", "1.0", "1.11", "1.3", "1.5", "2.0"]
    for row in rows:
        assert row[HEADER.index("measured")] == "not measured" and not any(row[HEADER.index("measured") + 1 :])


def test_every_measurement_stands_in_its_place(tmp_path: Path) -> None:
    path = tmp_path / "results.csv"
    published = {"weights": "timm", "epoch": None, "selection": None}
    for row in (
        evaluation(60.0),  # an older one
        evaluation(74.0),
        evaluation(74.1, selection="best_ema", epoch=252),
        evaluation(74.24, **published, image_size=224, crop_fraction=0.875, precision="32-true"),
        evaluation(75.5, **published, image_size=288, crop_fraction=1.0, precision="32-true"),
        evaluation(66.0, 0.5),
        evaluation(80.0, 0.8, images=500),
        evaluation(99.0, 1.3, weights="outputs/other.ckpt", selection=None),
    ):
        append_result(path, "x", "imagenet", row)
    append_result(path, "x", "elsewhere", evaluation(99.0, 1.5))
    rows = paper_rows(read_results(path), "imagenet")
    assert len(rows) == 9, "width 1.0 has two kinds of measurements"
    own = cells(rows, "1.0", "training")
    assert (own["last EMA Top-1"], own["best EMA Top-1"], own["difference"]) == ("74.00", "74.10", "-0.12")
    assert own["within tolerance"] == "yes (0.3)" and own["images"] == "50000" and own["date"]
    authors = cells(rows, "1.0", "published weights")
    assert (authors["best EMA Top-1"], authors["difference"]) == ("74.24", "+0.02")
    assert authors["last EMA Top-1"] == "" and authors["within tolerance"] == "yes (0.03)"
    half = cells(rows, "0.5", "training")
    assert half["best EMA Top-1"] == "not measured" and half["within tolerance"] == "no (0.3)"
    assert "50,000" in cells(rows, "0.8", "training")["within tolerance"]
    for width in ("1.3", "1.5"):
        cells(rows, width, "not measured")


def test_the_table_in_markdown_holds_every_cell(tmp_path: Path) -> None:
    append_result(tmp_path / "r.csv", "x", "imagenet", evaluation(74.0))
    expected = [list(HEADER), *paper_rows(read_results(tmp_path / "r.csv"), "imagenet")]
    lines = [line for line in as_markdown(HEADER, expected[1:]).splitlines() if "---" not in line]
    assert [[c.strip() for c in line[2:-2].split(" | ")] for line in lines] == expected


def test_the_table_goes_between_the_markers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{MARKERS[0]}\nold\n{MARKERS[1]}\nafter\n")
    for _ in range(2):  # again changes nothing
        main(["--readme", str(readme)])
        text = readme.read_text()
        assert text.startswith(f"before\n{MARKERS[0]}\n| width") and text.endswith(f"|\n{MARKERS[1]}\nafter\n")
        assert "old" not in text and text.count("| 1.11 |") == 1
    readme.write_text("no markers\n")
    main(["--readme", str(readme)])
    assert readme.read_text() == "no markers\n" and "nothing was written" in capsys.readouterr().out
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    assert run_command(lambda: main(["--results", "other.csv"])) == 2
    error = capsys.readouterr().err
    assert "other.csv: not a table of results" in error and len(error.splitlines()) == 1


def test_rows_of_older_versions_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "results.csv"
    old = [c for c in COLUMNS if c not in ("image_size", "crop_fraction", "precision")]
    path.write_text(f"{','.join(old)}\n{','.join('7' for _ in old)}\n")
    assert read_results(path)[0]["precision"] == ""
    append_result(path, "x", "imagenet", evaluation(74.0, precision="32-true"))
    first, second = read_results(path)
    assert first["top1"] == "7" and second["top1"] == "74" and second["precision"] == "32-true"
    assert path.read_text().splitlines()[0] == ",".join(COLUMNS)


def test_a_row_begins_a_line_of_its_own_and_leaves_the_others(tmp_path: Path) -> None:
    path = tmp_path / "results.csv"
    append_result(path, "one", "imagenet", evaluation(74.0))
    with open(path, newline="") as file:
        header, row = file.read().split()
    path.write_text(f"{header},note\n{row},by hand")  # as an editor may leave it
    append_result(path, "two", "imagenet", evaluation(75.0))
    with open(path, newline="") as file:
        first, second = csv.DictReader(file)
    assert (first["name"], first["note"], second["name"], second["note"]) == ("one", "by hand", "two", "")
    assert float(second["top1"]) == 75


def changed(text: str) -> dict[str, bytes]:
    """What editors and spreadsheets make of a results.csv."""
    lines = text.splitlines()
    table = [line.split(",") for line in lines]
    comma = [";".join(cell.replace(".", ",") if cell[:1].isdigit() else cell for cell in row) for row in table]
    return {
        "no newline at the end": text.rstrip("\n").encode(),
        "byte order mark": b"\xef\xbb\xbf" + text.encode(),
        "CRLF": "\r\n".join(lines).encode() + b"\r\n",
        "semicolons": text.replace(",", ";").encode(),
        "tabs": text.replace(",", "\t").encode(),
        "decimal commas": b"\xef\xbb\xbf" + "\r\n".join(comma).encode(),
        "quoted": "\n".join(",".join(f'"{cell}"' for cell in row) for row in table).encode(),
        "another order": "\n".join(",".join(reversed(row)) for row in table).encode(),
        "blank lines": text.replace("\n", "\n\n,,,,\n").encode(),
        "more cells than columns": text.rstrip("\n").encode() + b",note\n",
    }


def test_what_a_spreadsheet_saved_is_understood(tmp_path: Path) -> None:
    path = tmp_path / "results.csv"
    append_result(path, "one", "imagenet", evaluation(74.25, crop_fraction=0.875))
    (expected,) = read_results(path)
    for name, content in changed(path.read_text()).items():
        path.write_bytes(content)
        require_writable_results(path)
        assert read_results(path) == [expected], name
        append_result(path, "two", "imagenet", evaluation(75.5))
        first, second = read_results(path)
        assert first == expected and (second["name"], second["top1"]) == ("two", "75.5"), name
        with open(path, newline="") as file:
            assert [row["name"] for row in csv.DictReader(file) if row["name"]] == ["one", "two"], name
        assert b"note" in path.read_bytes() or b"note" not in content
        paper_rows(read_results(path), "imagenet")


BROKEN = {
    "latin-1": ("name,ü\n".encode("latin-1"), "not a table in UTF-8"),
    "utf-16": ("name,data\n".encode("utf-16"), "not a table in UTF-8"),
    "another table": (b"a,b\n1,2\n", "no column commit"),
    "an image": (b"\x89PNG\r\n\x1a\n\0\0\0", "not a table in UTF-8"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_what_is_no_table_is_found_before_the_work_and_left_alone(
    kind: str, train_tiny: Program, capsys: pytest.CaptureFixture[str]
) -> None:
    content, said = BROKEN[kind]
    Path("r.csv").write_bytes(content)
    assert train_tiny("results=r.csv", "name=a") == 2
    error = capsys.readouterr().err.strip()
    assert "r.csv" in error and said in error and len(error.splitlines()) == 1
    assert Path("r.csv").read_bytes() == content and not Path("outputs").exists()


def test_a_place_for_results_that_cannot_be_written_is_found_before_the_work(
    train_tiny: Program, evaluate_with: Program, shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("folder").mkdir()
    Path("file").write_text("")
    os.mkfifo("pipe")
    weights = ("weights=x.safetensors", f"data.root={shards}", "trainer=cpu")
    for place in ("folder", "file/r.csv", "pipe", "/proc/none/r.csv"):
        for program in (lambda option: train_tiny(option, "name=a"), lambda option: evaluate_with(option, *weights)):
            assert program(f"results={place}") == 2
            error = capsys.readouterr().err.strip()
            assert error.startswith("error: ") and "results=" in error and len(error.splitlines()) == 1, error
    require_writable_results("file")  # which is empty
    assert read_results("file") == [] and not Path("outputs").exists()


def test_a_cell_that_is_no_number_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "results.csv"
    append_result(path, "one", "imagenet", evaluation(74.25))
    path.write_text(path.read_text().replace("74.25", "24. Jul"))
    assert run_command(lambda: main(["--results", str(path)])) == 2
    assert "row 2: top1 is '24. Jul', not a number" in capsys.readouterr().err


NO_TABLES: dict[str, bytes | str] = {
    "binary": bytes(range(256)),
    "an image": b"\x89PNG\r\n\x1a\n\0\0\0",
    "prose": b"the quick brown fox\n",
    "a table of something else": b"a,b\n1,2\n",
    "an open quote": b'a,"b\n1,2\n',
    "a folder": "folder",
    "a pipe": "pipe",
    "a device": "/dev/zero",
}


@pytest.mark.parametrize("kind", NO_TABLES)
def test_what_is_no_table_is_a_line(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("folder").mkdir()
    os.mkfifo("pipe")
    given = NO_TABLES[kind]
    path = given if isinstance(given, str) else "given"
    if isinstance(given, bytes):
        Path(path).write_bytes(given)
    for program, option in ((main, "--results"), (figures.main, "--results"), (figures.main, "--latency")):
        assert run_command(lambda program=program, option=option: program([option, path])) == 2, option
        error = capsys.readouterr().err.strip()
        assert error.startswith(f"error: {path}: ") and len(error.splitlines()) == 1
    if kind not in ("prose", "a table of something else", "an open quote"):
        assert run_command(lambda: main(["--readme", path])) == 2
        error = capsys.readouterr().err.strip()
        assert error.startswith(f"error: {path}: ") and len(error.splitlines()) == 1
    assert not Path("results").exists(), "nothing was drawn"


@pytest.mark.parametrize(
    ("column", "cell"),
    [("threads", "two"), ("threads", "1.5"), ("batch", ""), ("batch", "9" * 5000), ("median_ms", "12 ms"),
     ("median_ms", "nan"), ("median_ms", "1e999")],
)  # fmt: skip
def test_a_latency_that_is_no_number_is_named(
    column: str, cell: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    row = {"machine": "m$_{", "device": "cpu", "backend": "eager", "threads": "1", "batch": "1", "form": "fused"}
    row |= {"image_size": "224", "model": "repghostnet_100", "median_ms": "2.5"}
    peer = row | {"form": "timm_reparameterized", "model": "mobilenetv3_large_100"}
    path = tmp_path / "latency.csv"

    def draw() -> int:
        return run_command(lambda: figures.main(["--latency", str(path), "--out", str(tmp_path)]))

    path.write_text(rows_as_csv([row, peer]))
    assert draw() == 0 and capsys.readouterr().out.endswith("accuracy.svg\n")
    path.write_text(rows_as_csv([row, peer | {column: cell}]))
    assert draw() == 2
    error = capsys.readouterr().err
    assert f"latency.csv: row 3: {column} is " in error and "number" in error and len(error.splitlines()) == 1
    path.write_text(rows_as_csv([row]) + "m,cpu\n")
    assert draw() == 2 and "row 3: threads is '', not a whole number" in capsys.readouterr().err


def test_a_link_to_shared_results_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "shared").mkdir()
    (tmp_path / "r.csv").symlink_to(tmp_path / "shared" / "r.csv")
    for name in ("one", "=two"):
        append_result(tmp_path / "r.csv", name, "imagenet", evaluation(74.0))
    assert (tmp_path / "r.csv").is_symlink() and [
        row["name"] for row in read_results(tmp_path / "shared" / "r.csv")
    ] == ["one", "=two"]
    assert "'=two," in (tmp_path / "r.csv").read_text()


def test_the_figure_shows_the_published_networks_and_the_measured_ones(tmp_path: Path) -> None:
    append_result(tmp_path / "r.csv", "x", "imagenet", evaluation(73.3))
    written = figures.draw_accuracy(read_results(tmp_path / "r.csv"), "imagenet", tmp_path)
    assert [path.suffix for path in written] == [".png", ".svg"]
    assert written[0].read_bytes().startswith(b"\x89PNG")
    drawn = written[1].read_text()
    for text in (*figures.STYLES, "RepGhostNet, measured", *(f"{width}x" for width in WIDTHS)):
        assert f"<!-- {text}" in drawn
    figures.draw_accuracy([], "imagenet", tmp_path)
    assert "RepGhostNet, measured" not in written[1].read_text()
    ours = {round(float(r["top1"]), 2) for r in figures.peers() if r["family"] == "RepGhostNet"}
    assert len(ours) == 8 and {r["family"] for r in figures.peers()} == set(figures.STYLES)


def test_an_epoch_that_explodes_leaves_the_curve_readable() -> None:
    losses = ("train_loss", "val_loss", "ema_loss")
    history = [dict.fromkeys(("val_top1", "ema_top1", "lr", *losses), 2.0) | {"epoch": float(e)} for e in range(9)]
    quiet = figures.curve_figure(history, None).axes[1].get_ylim()
    history[4]["val_loss"] = 4e4
    low, high = figures.curve_figure(history, None).axes[1].get_ylim()
    assert low == quiet[0] == 0 and quiet[1] <= high <= 2 * quiet[1]
