import multiprocessing
import os
import signal
import subprocess
import sys
import time

import pytest

from data.parallel import check_stop, run_parallel
from repghost import machine
from repghost.errors import UserError
from repghost.machine import available_cpus, cpu_quota

QUOTAS: dict[str, tuple[str, dict[str, str], int | None]] = {
    "none": ("0::/job", {}, None),
    "version 2": ("0::/", {"cpu.max": "300000 100000"}, 3),
    "without a limit": ("0::/", {"cpu.max": "max 100000"}, None),
    "a part of a core": ("0::/", {"cpu.max": "150000 100000"}, 2),
    "less than a core": ("0::/", {"cpu.max": "5000 100000"}, 1),
    "of an outer group": ("0::/slice/job", {"slice/cpu.max": "200000 100000", "slice/job/cpu.max": "max 1000"}, 2),
    "the smallest": ("0::/a/b", {"a/cpu.max": "900000 100000", "a/b/cpu.max": "400000 100000"}, 4),
    "of another group": ("0::/a", {"b/cpu.max": "200000 100000"}, None),
    "outside of this container": ("0::/../other", {"cpu.max": "200000 100000"}, 2),
    "version 1": (
        "4:memory:/\n3:cpu,cpuacct:/job\n0::/",
        {"cpu/job/cpu.cfs_quota_us": "250000", "cpu/job/cpu.cfs_period_us": "50000", "cpu/cpu.cfs_quota_us": "-1"},
        5,
    ),
    "version 1 without a limit": (
        "3:cpu:/",
        {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000", "memory/cpu.max": "100000 100000"},
        None,
    ),
}


@pytest.mark.parametrize("case", QUOTAS)
def test_the_quota_of_a_cgroup(case, tmp_path, monkeypatch):
    own, contents, cores = QUOTAS[case]
    (tmp_path / "own").write_text(f"{own}\n")
    for name, content in contents.items():
        (tmp_path / "cgroup" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "cgroup" / name).write_text(f"{content}\n")
    monkeypatch.setattr(machine, "OWN_CGROUPS", tmp_path / "own")
    monkeypatch.setattr(machine, "CGROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(machine, "bound_to", lambda: list(range(128)))
    assert cpu_quota() == cores
    assert available_cpus() == (cores or 128)
    monkeypatch.setattr(machine, "bound_to", lambda: [7])
    assert available_cpus() == 1


def test_without_cgroups(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "OWN_CGROUPS", tmp_path / "none")
    assert cpu_quota() is None and available_cpus() == len(os.sched_getaffinity(0))


def _process(task: int) -> int:
    return os.getpid()


def _die(task: int) -> int:
    if task == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return task


def _fail(task: int) -> int:
    if task == 0:
        raise UserError("task 0 failed")
    for _ in range(10_000):  # nothing but the stop ends it in time
        check_stop()
        time.sleep(0.01)
    return task


def test_every_task_runs_in_another_process():
    results = dict(run_parallel(_process, range(7), 2))
    assert set(results) == set(range(7)) and os.getpid() not in results.values()
    assert set(dict(run_parallel(_process, range(7), 1)).values()) == {os.getpid()}


def test_a_killed_worker_ends_the_run():
    with pytest.raises(UserError, match="killed"):
        list(run_parallel(_die, range(4), 2))


@pytest.mark.parametrize("workers", [1, 2])
def test_a_failing_task_ends_the_run(workers):
    before = set(multiprocessing.active_children())  # of other tests
    with pytest.raises(UserError, match="task 0 failed"):
        list(run_parallel(_fail, range(4), workers))
    assert set(multiprocessing.active_children()) <= before


def test_workers_end_when_their_parent_is_killed(tmp_path):
    """A run that the system kills leaves no process behind."""
    code = (
        "import multiprocessing, os, time, test_parallel as t\n"
        "from data.parallel import run_parallel\n"
        "if __name__ == '__main__':\n"
        "    for number, process in run_parallel(t._process, range(9), 2):\n"
        "        print(process, flush=True)\n"
        "        os.kill(os.getpid(), 9)\n"
    )
    script = tmp_path / "run.py"
    script.write_text(code)
    paths = os.pathsep.join([os.path.dirname(__file__), os.path.dirname(os.path.dirname(__file__))])
    run = subprocess.run(
        [sys.executable, script], env={**os.environ, "PYTHONPATH": paths}, capture_output=True, timeout=600
    )
    assert run.returncode == -signal.SIGKILL
    worker = int(run.stdout)
    for _ in range(6000):
        if not os.path.exists(f"/proc/{worker}") or "State:\tZ" in _status(worker):
            return
        time.sleep(0.01)
    raise AssertionError(f"worker {worker} lives on")


def _status(process: int) -> str:
    try:
        with open(f"/proc/{process}/status") as file:
            return file.read()
    except FileNotFoundError:
        return "State:\tZ"
