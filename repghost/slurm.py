"""The jobs of a sweep that SLURM runs: `hydra/launcher=slurm`, with Hydra's launcher for submitit.

Each task of a job is a process of submitit's, which starts the program as the process launcher does, so that a job that
is killed is a failure like any other. What became of it is the task's result, and the sweep's process, which waits for
all jobs, reports it. Check: `make test-cluster`.
"""

import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

from hydra.core.hydra_config import HydraConfig
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobStatus

from repghost.errors import UserError

# Those of squeue(1) that no job leaves; submitit takes more for an end, such as CONFIGURING.
_ENDS = {"BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "TIMEOUT"}


@contextmanager
def jobs_reported_to(
    prepare: Callable[[Sequence[Sequence[str]], int], list[str]], failed: Callable[[str], None]
) -> Iterator[None]:
    """Within, jobs of the plugin's SLURM launcher go to `prepare` before and to `failed`; nothing without the plugin.

    The plugin alone ends a sweep at the first job that fails, and leaves the jobs of one that is interrupted.
    """
    Plugins.instance()  # imports the plugins anew
    try:
        from hydra_plugins.hydra_submitit_launcher.submitit_launcher import SlurmLauncher
    except ImportError:
        if any(argument.startswith(("hydra/launcher=slurm", "hydra/launcher=submitit")) for argument in sys.argv):
            raise
        yield
        return
    launch = SlurmLauncher.launch

    def launch_all(launcher: Any, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> list[JobReturn]:
        _require_slurm(launcher.params)
        HydraConfig.instance().set_config(launcher.config)
        titles = prepare(job_overrides, initial_job_idx)
        with _results_of_lost_jobs() as submitted:
            try:
                returned = list(launch(launcher, job_overrides, initial_job_idx))
            except BaseException as error:
                _cancel(submitted)
                if type(error).__name__ in ("FailedJobError", "FailedSubmissionError"):  # what sbatch says
                    raise UserError(f"hydra/launcher=slurm: {' '.join(str(error).split())}") from None
                raise
        for title, each in zip(titles, returned, strict=True):
            if each.status == JobStatus.FAILED:  # submitit's, as after max_num_timeout
                each.return_value, each.status = str(each._return_value), JobStatus.COMPLETED
            if isinstance(each.return_value, str):
                failed(f"{title}: {each.return_value}")
        return returned

    with mock.patch.object(SlurmLauncher, "launch", launch_all):
        yield


def _require_slurm(options: Mapping[str, Any]) -> None:
    if options["timeout_min"] < 1:
        raise UserError("hydra.launcher.timeout_min is missing: give the time limit of a job in minutes, from 1 on")
    if shutil.which("sbatch") is None:
        raise UserError("hydra/launcher=slurm: there is no sbatch on this machine")


@contextmanager
def _results_of_lost_jobs() -> Iterator[list[str]]:
    """Within, a job that ended without a result has its end for one; yields a list of the jobs that are waited for."""
    import submitit

    results, submitted = submitit.SlurmJob.results, []

    def results_or_end(job: Any) -> list[Any]:
        submitted.append(job.job_id.partition("_")[0])  # of all jobs, where they are an array
        try:
            return results(job)
        except (submitit.core.utils.FailedJobError, submitit.core.utils.UncompletedJobError) as error:
            lost = JobReturn(status=JobStatus.COMPLETED)
            failed = isinstance(error, submitit.core.utils.FailedJobError)
            what = "failed" if failed else f"ended without a result (its state: {job.state})"
            lost.return_value = f"SLURM's job {job.job_id} {what}; its log is in {job.paths.folder}"
            return [lost]

    watcher = mock.patch.multiple(type(submitit.SlurmJob.watcher), _make_command=_ask_queue, read_info=_states_in_queue)
    with mock.patch.object(submitit.SlurmJob, "results", results_or_end), watcher:
        yield submitted


# Submitit asks sacct, which knows nothing where no accounting is configured: it would wait for ever for a job that was
# cancelled before it began.


def _ask_queue(watcher: Any) -> list[str] | None:
    """The command that tells the states of a user's jobs, also of those that ended lately; None if nobody waits."""
    waited_for = watcher._registered - watcher._finished
    return ["squeue", "--me", "--noheader", "--array", "--states=all", "--format=%i|%T"] if waited_for else None


def _states_in_queue(watcher: Any, output: bytes) -> dict[str, dict[str, str]]:
    """{job: {"State": state}} of the jobs that `watcher` waits for; one that has left the queue is over."""
    gone = "no longer in the queue"
    listed = dict(line.strip().split("|", 1) for line in output.decode().splitlines() if "|" in line)
    states = {}
    for job in watcher._registered:  # of an array, which is listed as one once it is cancelled
        state = listed.get(job) or listed.get(job.partition("_")[0], gone)
        states[job] = {"State": state if state in _ENDS or state == gone else "RUNNING"}
    return states


def _cancel(jobs: Sequence[str]) -> None:
    for job in dict.fromkeys(jobs):
        done = subprocess.run(["scancel", job], capture_output=True, text=True)
        problem = f"still in the queue ({done.stderr.strip()})" if done.returncode else "cancelled"
        print(f"\nSLURM's job {job} is {problem}; the same sweep goes on from there", flush=True)
