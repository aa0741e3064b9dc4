"""make check-gpu: it judges by its bars, notices what it is there to notice, and runs whole on a CPU."""

import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks import check_gpu, check_rates
from benchmarks.check_bench import Bench
from benchmarks.check_gpu import SCALES, Check, checks, machine_kind, outcome, run_checks
from benchmarks.check_report import (
    FAIL,
    INFO,
    PASS,
    SKIP,
    Failed,
    Line,
    Report,
    at_least,
    at_most,
    judged,
    no_bar,
    told,
)
from benchmarks.check_runs import damage
from data.index import load_index
from data.reader import BadImage, ShardReader
from repghost.dataset import Batch
from repghost.errors import UserError

ROOT = Path(__file__).parents[1]
ON_REFERENCE = at_least(10_000, " images/s", "reference")


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path, tmp_path / "corpus", "cpu", 2, SCALES["cpu"], time.monotonic() + 600)


# -- the report --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("figure", "bar", "kind", "status", "said"),
    [
        (97.5, at_least(97, "%"), "cpu", PASS, "97.5%  (at least 97%)"),
        (96.9, at_least(97, "%"), "gpu", FAIL, "96.9%  (at least 97%)"),
        (31.0, at_most(30, " s"), "cpu", FAIL, "31 s  (at most 30 s)"),
        (0, at_most(0), "gpu", PASS, "0  (at most 0)"),
        (9999.0, ON_REFERENCE, "reference", FAIL, "9,999 images/s  (at least 10,000 images/s)"),
        (9999.0, ON_REFERENCE, "gpu", INFO, "(at least 10,000 images/s holds for an H100 with 16 cores: not"),
        (50.0, at_least(90, "%", "gpu"), "cpu", INFO, "holds for GPUs: not applicable here"),
        (50.0, at_least(90, "%", "gpu"), "reference", FAIL, "50%  (at least 90%)"),
        (50.0, no_bar(" images/s"), "reference", INFO, "50 images/s  (no bar)"),
        ("exit code 75", told("goes on"), "gpu", PASS, "exit code 75  (goes on)"),
    ],
)  # fmt: skip
def test_a_figure_is_judged_by_its_bar(figure: float | str, bar: object, kind: str, status: str, said: str) -> None:
    line = judged("x", figure, bar, kind)  # type: ignore[arg-type]
    assert line.status == status and said in str(line)


def test_kinds_of_machines() -> None:
    gpu = {"capability": "9.0", "device": "NVIDIA H100 80GB HBM3", "cores": 16}
    assert machine_kind(gpu) == "reference"
    assert machine_kind(gpu | {"cores": 8}) == machine_kind(gpu | {"device": "NVIDIA A100"}) == "gpu"
    assert machine_kind({"device": "a processor", "cores": 16}) == "cpu"


def test_the_report_is_json_and_markdown(tmp_path: Path) -> None:
    lines = [Line("a", PASS, "1", "at most 2"), Line("b|c", FAIL, "no", "yes", log="its last words")]
    report = Report(
        "check-gpu", {"driver": "580"}, {"topology": "GPU0"}, [*lines, Line("d", SKIP, "needs 8 GPUs", "x")]
    )
    as_json, as_text = report.write(tmp_path / "reports" / "check")
    assert json.loads(as_json.read_text())["verdict"] == report.verdict == "1 PASS, 1 FAIL, 1 SKIP"
    text = as_text.read_text()
    for words in (
        "| PASS | a | 1 | at most 2 | 0 |",
        "b\\|c",
        "- driver: 580",
        "its last words",
        "| needs 8 GPUs |  |",
    ):
        assert words in text
    assert report.failed and not Report("empty").failed


def test_it_ends_early_where_the_rest_says_nothing(bench: Bench, tmp_path: Path) -> None:
    def broken(bench: Bench) -> float:
        raise ValueError("of a defect")

    table = [
        Check("fine", lambda _: 1.0, at_most(1)),
        Check("broken", broken, at_most(1)),
        Check("low", lambda _: 2.0, at_most(1), essential=True),
        Check("after", lambda _: 1.0, at_most(1)),
    ]
    report = Report("x")
    run_checks(table, bench, "cpu", report, tmp_path / "report")
    assert [line.status for line in report.lines] == [PASS, FAIL, FAIL, SKIP]
    assert "ValueError: of a defect" in str(report.lines[1]) and "Traceback" in report.lines[1].log
    assert str(report.lines[3]).endswith("not run: low failed")
    assert json.loads((tmp_path / "report.json").read_text())["failed"]
    bench.until = 0
    assert "the time was over" in outcome(table[0], bench, "cpu").figure


def test_the_table_names_each_check_once() -> None:
    for device, kind in (("cuda", "gpu"), ("cuda", "reference"), ("cpu", "cpu")):
        names = [check.name for check in checks(SCALES[device], kind)]
        assert len(set(names)) == len(names)
    bars = {check.name: check.bar.text for check in checks(SCALES["cuda"], "reference")}
    for size, least in (("0.5x, batch 128", "10,000"), ("0.5x, batch 1024", "10,000"), ("1.0x, batch 1024", "8,000")):
        assert bars[f"end to end, {size}"] == f"at least {least} images/s"
        assert bars[f"of the slower of both, {size}"] == "at least 90%"


# -- its commands ------------------------------------------------------------------------------------------------------


def test_a_command_leaves_nothing(bench: Bench) -> None:
    child = "import subprocess, sys; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])"
    with bench.command("parent", "-c", f"{child}; print('begun', flush=True)") as command:
        while "begun" not in command.text:
            time.sleep(0.01)
        bench.until = 0
        with pytest.raises(Failed, match="parent was still running when its time was over"):
            command.end()
    bench.until = time.monotonic() + 60
    command.end()  # which waits for all of its session


def test_a_command_that_fails_shows_its_last_lines(bench: Bench) -> None:
    with pytest.raises(Failed, match="bad: exit code 3") as failure:
        bench.finished("bad", "-c", "print('why'); raise SystemExit(3)")
    assert failure.value.log == "why"
    with (
        pytest.raises(Failed, match="early ended too early, with exit code 0"),
        bench.command("early", "-c", "") as command,
    ):
        command.until(lambda: False)


def test_what_checks_share_is_made_once(bench: Bench) -> None:
    made: list[int] = []

    def make() -> int:
        made.append(1)
        raise Failed("no")

    for _ in range(2):
        with pytest.raises(Failed, match="no"):
            bench.once("x", make)
    assert made == [1] and bench.once("y", lambda: 2) == bench.once("y", lambda: 3) == 2


@pytest.mark.slow
def test_tests_have_to_run(bench: Bench) -> None:
    file = ROOT / "tests/test_schedule.py"
    assert "passed" in check_rates.tests_ran(bench, file)
    with pytest.raises(Failed, match="exit code 5"):
        check_rates.tests_ran(bench, file, "-k", "no_such_test")


# -- what it looks for -------------------------------------------------------------------------------------------------


def batches_in_one_buffer(clone: bool) -> Iterator[Batch]:
    """Batches of which each overwrites the memory of the one before, unless they are copied."""
    buffer = torch.empty(2, 3, 4, 4, dtype=torch.uint8)
    for number in range(8):
        images: Tensor = buffer.fill_(number)
        yield Batch(images.clone() if clone else images, *[torch.empty(0)] * 3)


def test_the_race_is_noticed() -> None:
    expected = check_rates.means_of(batches_in_one_buffer(clone=False), late=False, held=0)
    assert expected == [[float(number)] * 2 for number in range(8)]
    copied = check_rates.means_of(batches_in_one_buffer(clone=True), late=True, held=3)
    assert check_rates.changed_batches(expected, copied) == 0
    overwritten = check_rates.means_of(batches_in_one_buffer(clone=False), late=True, held=3)
    assert check_rates.changed_batches(expected, overwritten) == 7, "all but the last one"
    assert check_rates.changed_batches(expected, [[mean + 0.3 for mean in batch] for batch in expected]) == 0
    with pytest.raises(Failed, match="the same pixels"):
        check_rates.changed_batches(expected[:1], expected[:1])


def test_the_share_of_the_jpeg_decoder() -> None:
    head = "# gpu     sm    mem    enc    dec    jpg    ofa\n# Idx      %      %      %      %      %      %\n"
    rows = ["    0     10      2      0      0      0      0", "    0     50      9      0      0     40      0"]
    rows += ["    0     60      9      0      0     60      0", "    1      0      0      0      0      0      0"]
    assert check_rates.jpeg_share(head + "\n".join(rows)) == 50
    assert check_rates.jpeg_share(head + rows[0]) == 0
    assert check_rates.jpeg_share(head + "    0     10      2      0      0      -      -") is None
    assert check_rates.jpeg_share("# gpu     sm\n    0      5\n") is None and check_rates.jpeg_share("") is None


def test_one_image_is_damaged(shards: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(shards, tmp_path / "copy"))
    name = damage(copy, tmp_path)
    index = load_index(copy, "train", tmp_path)
    reader, bad = ShardReader(index), []
    for sample in range(len(index)):
        try:
            reader.read(sample)
        except BadImage as error:
            bad.append(str(error))
    assert len(bad) == 1 and name in bad[0]


def test_a_mistake_is_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine").touch()
    with pytest.raises(UserError, match="holds something that is not of this program"):
        check_gpu.main(["--cpu", f"--folder={tmp_path}"])
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(check_gpu, "nvidia_smi", lambda *_: [])
    with pytest.raises(UserError, match="finds no GPU here; --cpu"):
        check_gpu.main([f"--folder={tmp_path / 'new'}"])


# -- on a CPU ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_whole_on_a_cpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--cpu", f"--folder={tmp_path / 'runs'}", f"--out={tmp_path}", f"--corpus={tmp_path / 'corpus'}"]
    code = check_gpu.main(arguments)
    printed = capsys.readouterr().out
    assert code == 0, printed + (tmp_path / "check_cpu.md").read_text()
    lines = {line["name"]: line for line in json.loads((tmp_path / "check_cpu.json").read_text())["lines"]}
    assert set(lines) == {"the device", *(check.name for check in checks(SCALES["cpu"], "cpu"))}
    needs_gpu = {name for name, line in lines.items() if line["figure"] == "needs a GPU"}
    assert needs_gpu == {
        "tests that need a GPU",
        "share of the JPEG decoder, while it works",
        "digits, precision=fp16: Top-1",
        "evaluation on the CPU: images that differ",
        "checkpoint of a CPU, resumed on a GPU",
        "processes on a GPU, with a rank on each",
    }
    assert lines["SIGTERM and resume"]["figure"] == "exit code 75, went on, 3 epochs"
    assert "the same as after SIGTERM" in lines["kill -9 and resume"]["figure"]
