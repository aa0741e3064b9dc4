"""One writer for a folder: whoever else comes is refused, and a writer that is gone stands in nobody's way."""

import errno
import fcntl
import json
import multiprocessing
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from subprocess import PIPE
from typing import Any

import pytest
from conftest import TINY
from runs import ROOT

from repghost import lock
from repghost.errors import UserError
from repghost.files import require_writable
from repghost.lock import OWNER, sole_writer

FORK = multiprocessing.get_context("fork")


def write_until(folder: Path, began: Any, end: Any) -> None:
    with sole_writer(folder):
        began.set()
        end.wait()


@contextmanager
def another_writer(folder: Path) -> Iterator[Any]:
    began, end = FORK.Event(), FORK.Event()
    process = FORK.Process(target=write_until, args=(folder, began, end))
    process.start()
    began.wait()
    yield process
    if process.is_alive():  # to tell one that was killed while it waits would wait for its answer
        end.set()
    process.join()


def test_a_second_writer_is_refused_until_the_first_has_ended(tmp_path: Path) -> None:
    run = tmp_path / "outputs" / "run"
    with (
        another_writer(run) as process,
        pytest.raises(UserError, match=f"run: process {process.pid} on .*, since 20"),
        sole_writer(run),
    ):
        pass
    assert not (tmp_path / "outputs").exists(), "nothing was written"
    with sole_writer(run):
        (run / "config.yaml").touch()
    assert [path.name for path in run.iterdir()] == ["config.yaml"]
    with another_writer(run), sole_writer(run, rank=1):
        pass


def test_a_writer_that_was_killed_blocks_nobody(tmp_path: Path) -> None:
    for _ in range(3):
        with another_writer(tmp_path / "run") as process:
            # What it forked, such as a DataLoader's workers, may live on for a while.
            os.kill(process.pid, signal.SIGKILL)
            process.join()
            assert (tmp_path / "run" / OWNER).exists()
            with sole_writer(tmp_path / "run"):
                pass


def try_once(folder: Path, ready: Any, tried: Any, said: Any) -> None:
    ready.wait()
    try:
        with sole_writer(folder):
            said.put("wrote")
            tried.wait()
    except UserError:
        said.put("refused")
        tried.wait()


@pytest.mark.parametrize("locks_work", [True, False])
def test_ten_at_once(tmp_path: Path, locks_work: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not locks_work:
        monkeypatch.setattr(fcntl, "lockf", no_locks)
    ready, tried, said = FORK.Barrier(10), FORK.Barrier(10), FORK.Queue()
    arguments = (tmp_path / "outputs" / "run", ready, tried, said)
    processes = [FORK.Process(target=try_once, args=arguments) for _ in range(10)]
    for process in processes:
        process.start()
    found = [said.get() for _ in processes]
    for process in processes:
        process.join()
    assert sorted(found) == ["refused"] * 9 + ["wrote"]
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_command_is_refused_before_anything_that_takes_long_is_imported(tmp_path: Path, shards: Path) -> None:
    program = (
        "import runpy, sys\n"
        "try:\n"
        f"    runpy.run_path({str(ROOT / 'train.py')!r}, run_name='__main__')\n"
        "except SystemExit as end:\n"
        "    print(end.code, 'torch' in sys.modules)\n"
    )
    command = [sys.executable, "-c", program, *TINY, f"data.root={shards}", "name=a"]
    with another_writer(tmp_path / "outputs" / "a"):
        ended = subprocess.run(command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True)
    assert ended.stdout == b"2 False\n" and b"is training there" in ended.stderr, ended.stderr
    assert not list(tmp_path.iterdir()), "nothing is left"


@pytest.mark.slow
def test_the_same_run_started_twenty_times(tmp_path: Path, shards: Path) -> None:
    command = [sys.executable, str(ROOT / "train.py"), *TINY, f"data.root={shards}", "name=a", "trainer.threads=1"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    def start(folder: Path) -> subprocess.Popen[str]:
        return subprocess.Popen(command, cwd=folder, env=environment, text=True, stdout=PIPE, stderr=PIPE)

    alone, together = tmp_path / "alone", tmp_path / "together"
    for folder in (alone, together):
        folder.mkdir()
    assert start(alone).communicate() and (alone / "outputs" / "a" / "evaluation.json").exists()
    draw, processes, before = random.Random(0), [], 0.0
    for moment in sorted([draw.random() for _ in range(10)] + [0.5] * 10):
        time.sleep(moment - before)
        processes.append(start(together))
        before = moment
    outcomes = []
    for process in processes:
        out, error = process.communicate()
        if process.returncode == 2:
            assert re.fullmatch(r"error: outputs/a: process \d+ on .* is training there, since .*\n", error), error
            outcomes.append("refused")
        else:
            assert process.returncode == 0 and "Traceback" not in error, error
            outcomes.append("finished" if "outputs/a is finished" in out else "trained")  # it came late
    assert outcomes.count("trained") == 1 and "refused" in outcomes
    for name in ("metrics.csv", "evaluation.json", "evaluation_best_ema.json", "model.safetensors"):
        (one,), (other,) = (list(folder.rglob(name)) for folder in (alone, together))
        assert one.read_bytes() == other.read_bytes(), name
    assert not [path for path in together.rglob(".*") if path.is_file()], "nothing is left"


# -- where locks do not reach ------------------------------------------------------------------------------------------


def no_locks(*_: Any) -> None:
    raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))


def leave(folder: Path, **owner: Any) -> Path:
    folder.mkdir()
    (folder / OWNER).write_text(json.dumps({"host": "elsewhere", "pid": 1, "begun": "1", "since": "2026"} | owner))
    return folder / OWNER


def test_a_writer_on_another_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its lock is not seen here; the owner file tells whether it lives."""
    run = tmp_path / "run"
    owner = leave(run, job="12")
    monkeypatch.setattr(lock, "_WATCHED", 2.0)
    over = threading.Event()

    def beat() -> None:
        while not over.wait(0.1):
            os.utime(owner)

    living = threading.Thread(target=beat)
    living.start()
    with (
        pytest.raises(UserError, match="process 1 on elsewhere, SLURM job 12 is training there, since 2026"),
        sole_writer(run),
    ):
        pass
    over.set()
    living.join()
    with sole_writer(run):  # it was killed
        assert json.loads(owner.read_text())["pid"] == os.getpid()

    leave(tmp_path / "requeued", job="12")
    monkeypatch.setattr(lock, "_WATCHED", 1e9)
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    with sole_writer(tmp_path / "requeued"):
        pass


def test_without_locks_the_process_is_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fcntl, "lockf", no_locks)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    run, host, parent = tmp_path / "run", lock._this_process()["host"], os.getppid()
    leave(run, host=host, pid=parent, begun=lock._begun(parent))
    with pytest.raises(UserError, match=f"process {parent} on {host}"), sole_writer(run):
        pass
    (run / OWNER).write_text(json.dumps({"host": host, "pid": parent, "begun": "1"}))  # another had this number
    with sole_writer(run):
        pass


# -- places that cannot be written -------------------------------------------------------------------------------------


def test_what_cannot_be_written_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in ("/proc/none/r.csv", tmp_path / "file" / "r.csv", tmp_path, tmp_path / ("x" * 300) / "r.csv"):
        with pytest.raises(UserError, match=r"cannot be written .*: give another results="):
            require_writable(path, "results")
    with pytest.raises(UserError, match="give another output="), sole_writer(tmp_path / "file" / "run"):
        pass
    require_writable(tmp_path / "a" / "b" / "r.csv", "results")
    require_writable(tmp_path / "file", "results")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
