"""Sweeps: `python train.py -m width=0.5,0.58` runs every job as a process of its own, one after the other.

A launcher of Hydra's, which finds its plugins in this folder and chooses it in conf/hydra/launcher; any of its sweepers
works with it. What a job does is up to train.py: it resumes a run that was interrupted and passes over one that is
finished, so the same sweep goes on where it stopped. Check: `pytest tests/test_sweep.py`.
"""

import inspect
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import JobReturn, JobStatus
from hydra.experimental.callback import Callback
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf

from repghost.errors import UserError
from repghost.results import read_results, runs_table
from repghost.run import folder_of, top1
from repghost.training.trainer import started_outside

PASSED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)

_OURS_ALONE = re.compile(r"[+~]*hydra[./](mode|launcher|sweep)")  # Hydra's settings for the sweep, not for its jobs
_SECONDS_TO_END = 5  # for the other ranks of a job, once its first one has


class ProcessLauncher(Launcher, Callback):
    """Runs jobs as processes; prints what failed and the table of results when the sweep has ended.

    The sweep's exit code is 0, 1 when a job failed, or `checkpoint.exit_code` when a signal ended a job or the sweep.
    """

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        _require_one_process()
        self._loader = hydra_context.config_loader
        self._config = config
        self._command = [sys.executable, inspect.getfile(inspect.unwrap(task_function)), *_flags(config)]
        given = OverridesParser.create().parse_overrides(list(config.hydra.overrides.task))
        last = {override.get_key_element(): override for override in given}
        self._fixed = {key: override.input_line for key, override in last.items() if not override.is_sweep_override()}
        self._runs: dict[Path, tuple[Sequence[str], DictConfig]] = {}  # overrides and config by folder
        self._failures: list[str] = []
        self._process: subprocess.Popen[bytes] | None = None
        self._signal: int | None = None
        Path(config.hydra.sweep.dir).mkdir(parents=True, exist_ok=True)  # of a launcher, sweepers expect that
        # A sweeper may launch many times: Hydra tells its callbacks when it has ended.
        hydra_context.callbacks.callbacks.append(self)

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Runs the jobs; what each returns is its Top-1 in percent, or None where it failed."""
        # Sweepers write values anew, 1e-3 as 0.001, and a run's name has them as they were given.
        job_overrides = [[self._fixed.get(_key(o)) or o for o in overrides] for overrides in job_overrides]
        jobs = [(overrides, *self._compose(overrides)) for overrides in job_overrides]
        known = OmegaConf.select(self._config, "hydra.sweeper.n_trials")
        count = known or initial_job_idx + len(jobs)
        returned = []
        with self._signals_passed_on():
            for number, (overrides, folder, config) in enumerate(jobs, initial_job_idx + 1):
                title = f"[{number}/{count}] {' '.join(self._swept(overrides))}"
                print(f"\n{title}", flush=True)
                code = self._run(overrides)
                stopped = OmegaConf.select(config, "checkpoint.exit_code")
                if code == stopped or self._signal is not None:
                    print(f"\ninterrupted in {title}: the same command goes on from there", flush=True)
                    sys.exit(stopped or 1)
                if code:
                    self._failures.append(f"{title}: {_said(code)}")
                    print(self._failures[-1], flush=True)
                returned.append(JobReturn(overrides, config, status=JobStatus.COMPLETED))
                returned[-1].return_value = None if code else top1(folder)
        return returned

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Prints the table of the sweep's runs and what failed; exits with 1 if anything did."""
        names = [folder.name for folder in self._runs]
        tables = dict.fromkeys(str(config.results) for _, config in self._runs.values())
        rows = [row for table in tables for row in read_results(table) if row["name"] in names]
        if rows:
            print(f"\n{runs_table(sorted(rows, key=lambda row: names.index(row['name'])))}", flush=True)
        if self._failures:
            print(f"\n{len(self._failures)} failed:", *self._failures, sep="\n", flush=True)
            sys.exit(1)

    def _compose(self, overrides: Sequence[str]) -> tuple[Path, DictConfig]:
        """The folder and the config of a job's run. Raises UserError when it would train in the folder of another."""
        config = self._loader.load_sweep_config(self._config, list(overrides))
        HydraConfig.instance().set_config(config)  # a run's name depends on it
        folder = folder_of(config)
        if self._runs.setdefault(folder, (overrides, config))[0] != overrides and "output" in config:
            raise UserError(
                f"two runs of the sweep would share the folder {folder}: give them names that differ, such as "
                f"'name=NAME-${{{_key(next(iter(self._swept(overrides)), 'seed'))}}}'"
            )
        return folder, config

    def _swept(self, overrides: Sequence[str]) -> list[str]:
        """The overrides that not every job has."""
        return [override for override in overrides if _key(override) not in self._fixed]

    def _run(self, overrides: Sequence[str]) -> int:
        """Starts a job, waits for its end, and returns its exit code."""
        group = "-".join(["sweep", *sorted(_key(override).lstrip("+") for override in self._swept(overrides))])
        self._process = subprocess.Popen(
            [*self._command, *overrides],
            env={"WANDB_RUN_GROUP": group, **os.environ},
            stdin=subprocess.DEVNULL,  # nobody answers the questions of a sweep
            start_new_session=True,  # Ctrl-C reaches a job once, through us
        )
        if self._signal is not None:  # it came while the job started
            self._process.send_signal(self._signal)
        code = self._process.wait()
        _end_group(self._process.pid)
        return code

    @contextmanager
    def _signals_passed_on(self) -> Iterator[None]:
        def pass_on(number: int, frame: FrameType | None) -> None:
            self._signal = number
            if self._process is not None:
                self._process.send_signal(number)

        before = {number: signal.getsignal(number) for number in PASSED_ON}
        for number, handler in before.items():
            if handler != signal.SIG_IGN:  # as nohup does
                signal.signal(number, pass_on)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _key(override: str) -> str:
    return override.partition("=")[0]


def _flags(config: DictConfig) -> list[str]:
    """What of the sweep's command line its jobs need, beside their overrides."""
    folders = [source.path for source in config.hydra.runtime.config_sources if source.provider == "command-line"]
    overrides = [override for override in config.hydra.overrides.hydra if not _OURS_ALONE.match(override)]
    return [
        *(f"--config-dir={folder}" for folder in folders),
        f"--config-name={config.hydra.job.config_name}",
        *overrides,
    ]


def _require_one_process() -> None:
    """Raises UserError where a launcher of ranks started the sweep: every rank would run every job."""
    started = started_outside()
    if started or "RANK" in os.environ or "WORLD_SIZE" in os.environ:
        raise UserError(
            f"-m under {started.by if started else 'a launcher that sets RANK and WORLD_SIZE'}: ranks of different "
            "jobs would mix their gradients; start the sweep with python, its jobs start the ranks (trainer.devices=N)"
        )


def _said(code: int) -> str:
    return f"exit code {code}" if code > 0 else f"ended by {signal.Signals(-code).name}"


def _end_group(group: int) -> None:
    """Ends what is left of a job's process group: a rank that waits for one that failed would hold its device."""
    try:
        for _ in range(10 * _SECONDS_TO_END):
            os.killpg(group, 0)
            time.sleep(0.1)
        os.killpg(group, signal.SIGKILL)
    except ProcessLookupError:
        return
