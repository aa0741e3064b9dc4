"""A sweep: `python train.py -m width=0.5,0.58` runs every job as a process of its own, one after the other.

Under any of Hydra's sweepers; with `hydra/launcher=slurm` SLURM runs the jobs, see repghost/slurm.py. A job resumes a
run that was interrupted and passes over one that is finished, so the same sweep goes on where it stopped.
Check: `pytest tests/test_sweep.py`.
"""

import itertools
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import hydra
from hydra.conf import HydraConf
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf

from repghost.command_line import check_config, choices_listed
from repghost.errors import UserError
from repghost.processes import signals_passed_on
from repghost.ranks import external_launcher
from repghost.results import read_results, runs_table
from repghost.run import folder_of, objective
from repghost.schema.check import shown
from repghost.slurm import jobs_reported_to

_REQUEUED_ON = {signal.SIGUSR1, signal.SIGUSR2}  # not SIGTERM, which scancel sends
_SECONDS_UNTIL_ENDED = 60.0
_OF_THE_SWEEP = re.compile(r"[+~]*hydra[./](mode|launcher|sweep)")  # keys of Hydra's that are not its jobs'


class Sweep:
    """The jobs of `python PROGRAM -m ...`: starts them, and reports what failed and the table of results at the end."""

    def __init__(self, program: Path, flags: list[str], overrides: list[str]) -> None:
        self.objective: float | None = None  # of the last job, None if it failed
        self._program = program
        self._count: int | str = 0  # of jobs, once the command line was read; "?" where the sweeper decides
        self._flags = [flag for flag in flags if flag not in ("-m", "--multirun")]  # of Hydra's, for every job
        self._overrides = overrides
        self._fixed: dict[str, str] = {}  # the overrides that all jobs share, by key
        self._runs: dict[Path, tuple[Sequence[str], DictConfig]] = {}  # swept overrides and config by the run's folder
        self._failures: list[str] = []

    def run_job(self) -> None:
        """Runs the job that Hydra has composed.

        Exits with `checkpoint.exit_code` if a signal stopped the job or the sweep. Raises UserError, before the first
        job, for a sweep under a launcher of ranks and for two jobs that would train in the same folder.
        """
        settings = HydraConfig.get()
        if not self._count:
            self._read_command_line(settings)
        swept = [override for override in settings.overrides.task if _key(override) not in self._fixed]
        folder, config = self._compose(swept)
        title = f"[{settings.job.num + 1}/{self._count}] {shown(' '.join(swept))}"
        print(f"\n{title}", flush=True)
        code, received = self._start(swept)
        stopped = OmegaConf.select(config, "checkpoint.exit_code")
        if received or code == stopped:
            print(f"\ninterrupted in {title}: the same command goes on from there", flush=True)
            sys.exit(stopped or 128 + received[0])
        self.objective = None if code else objective(folder)
        if code:
            self.failed(f"{title}: {f'exit code {code}' if code > 0 else signal.Signals(-code).name}")

    def over(self, jobs: Callable[[], None]) -> None:
        """Calls `jobs`, a sweeper that runs this sweep's jobs."""
        try:
            with jobs_reported_to(self.prepare, self.failed):
                jobs()
        except ValueError:
            if self._count and len(self._failures) >= len(self._runs):
                return  # Optuna has no best trial where all failed
            raise

    def prepare(self, job_overrides: Sequence[Sequence[str]], first: int) -> list[str]:
        """Checks jobs that another launcher is about to start, the first of which has number `first` (from 0).

        Returns their titles. Raises UserError as run_job does.
        """
        if not self._count:
            self._read_command_line(HydraConfig.get())
        # For the jobs, which start in another folder and have no program beside them.
        os.environ["PYTHONPATH"] = os.pathsep.join(
            [str(self._program.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
        )
        titles = []
        for number, overrides in enumerate(job_overrides, start=first + 1):
            swept = [override for override in overrides if _key(override) not in self._fixed]
            self._compose(swept)
            titles.append(f"[{number}/{self._count}] {shown(' '.join(swept))}")
            print(titles[-1], flush=True)
        return titles

    def run_task(self, config: DictConfig) -> float | str | None:
        """Runs the program for a task of another launcher's job, in the task's process.

        Returns the run's figure, or what went wrong: at an exception Hydra would end the sweep. A job that a
        signal before its time limit stopped is queued again.
        """
        overrides = HydraConfig.get().overrides.task
        code, received = self._start([override for override in overrides if _key(override) not in self._fixed])
        stopped = OmegaConf.select(config, "checkpoint.exit_code")
        if code == stopped and _REQUEUED_ON & set(received) and "SUBMITIT_EXECUTOR" in os.environ:
            # For submitit's handler: the first task queues the job again and exits.
            os.kill(os.getpid(), signal.SIGUSR2)
            time.sleep(_SECONDS_UNTIL_ENDED)  # the others are ended by that
        if code and not self._count:  # a launcher whose jobs nobody reports
            sys.exit(code)
        if received:
            return f"stopped by {signal.Signals(received[0]).name}"
        if code:
            return f"exit code {code}" if code > 0 else signal.Signals(-code).name
        return objective(folder_of(config))

    def failed(self, failure: str) -> None:
        """Notes that a job failed."""
        self._failures.append(failure)
        print(failure, flush=True)

    def report(self) -> int:
        """Prints the table of the sweep's runs and what failed; returns the sweep's exit code, 1 if anything failed."""
        names = [folder.name for folder in self._runs]
        configs = [config for _, config in self._runs.values()]
        tables = dict.fromkeys((str(config.results), config.get("task", "classification")) for config in configs)
        rows = [row for table in tables for row in read_results(*table) if row["name"] in names]
        if rows:
            print(f"\n{runs_table(sorted(rows, key=lambda row: names.index(row['name'])))}", flush=True)
        if self._failures:
            print(f"\n{len(self._failures)} failed:", *self._failures, sep="\n", flush=True)
        return int(bool(self._failures))

    def _read_command_line(self, settings: HydraConf) -> None:
        """Takes overrides as typed, for the names: sweepers write 1e-3 as 0.001. Composes all jobs that are known."""
        if "RANK" in os.environ or "WORLD_SIZE" in os.environ or external_launcher():
            raise UserError(
                "-m under torchrun, srun or others that set RANK: ranks of different jobs would mix their gradients; "
                "start the sweep with python, its jobs start the ranks (trainer.devices=N)"
            )
        parser = OverridesParser.create(GlobalHydra.instance().config_loader())
        overrides = {override.get_key_element(): override for override in parser.parse_overrides(self._overrides)}
        swept = {key: override for key, override in overrides.items() if override.is_sweep_override()}
        for key in overrides:
            if key not in swept and not _OF_THE_SWEEP.match(key):
                self._fixed[key] = str(overrides[key].input_line)
        self._count = settings.sweeper.get("n_trials") or "?"
        if settings.runtime.choices["hydra/sweeper"] == "basic":
            jobs = ([f"{key}={value}" for value in override.sweep_string_iterator()] for key, override in swept.items())
            for self._count, job in enumerate(itertools.product(*jobs), start=1):
                self._compose(job)

    def _compose(self, swept: Sequence[str]) -> tuple[Path, DictConfig]:
        """The folder and the config of a job's run.

        Raises UserError for a value that cannot be meant, and if the run of another job is in that folder.
        """
        name = str(HydraConfig.get().job.config_name)
        with choices_listed():
            config = hydra.compose(name, [*self._fixed.values(), *swept], return_hydra_config=True)
        HydraConfig.instance().set_config(config)  # a run's name depends on it
        check_config(name, config, config.hydra.overrides.task)
        folder = folder_of(config)
        if set(self._runs.setdefault(folder, (swept, config))[0]) != set(swept) and "output" in config:
            raise UserError(
                f"two runs of the sweep would share the folder {folder}: give them names that differ, such as "
                f"'name=NAME-${{{_key(next(iter(swept), 'seed'))}}}'"
            )
        return folder, config

    def _start(self, swept: Sequence[str]) -> tuple[int, list[int]]:
        """Runs a job as a process; returns its exit code and the signals that came and were passed on meanwhile."""
        process: subprocess.Popen[bytes] | None = None
        group = "-".join(["sweep", *sorted(_key(override).lstrip("+") for override in swept)])

        def send(number: int) -> None:
            if process:
                process.send_signal(number)

        with signals_passed_on(send) as received:
            process = subprocess.Popen(
                [sys.executable, self._program, *self._flags, *self._fixed.values(), *swept],
                env={"WANDB_RUN_GROUP": group, **os.environ},
                stdin=subprocess.DEVNULL,  # nobody answers the questions of a sweep
                start_new_session=True,  # Ctrl-C reaches a job once, through us
            )
            for number in received:  # while the process started
                process.send_signal(number)
            code = process.wait()
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # what a job leaves behind would hold its device
        return code, received


def _key(override: str) -> str:
    return override.partition("=")[0]
