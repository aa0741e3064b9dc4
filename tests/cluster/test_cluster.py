"""Runs on two machines, under SLURM and under torchrun: `make test-cluster`.

They train on the embedded digits, and what disturbs them must not change a bit of what they come to.
"""

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from cluster import Cluster, missing, wait

from benchmarks.kill import differences

ROOT = Path(__file__).parents[2]
TRAIN = (
    f"python {ROOT}/train.py data=digits recipe=quick width=0.1 epochs=2 recipe.warmup_epochs=1 trainer=cpu "
    "trainer.threads=1 data.workers=0 curve_seconds=1e9"
)
TWO = "trainer.devices=1 trainer.num_nodes=2"


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    if reason := missing():
        pytest.skip(reason)
    with Cluster(tmp_path_factory.mktemp("cluster")) as started:
        yield started


@pytest.fixture(autouse=True)
def idle(cluster: Cluster) -> Iterator[None]:
    """Leaves a whole cluster without jobs to the next test."""
    yield
    cluster.restore()


@pytest.fixture(scope="session")
def undisturbed(cluster: Cluster) -> Path:
    """The folder of a run of two ranks on one machine."""
    folder = cluster.folder / "undisturbed"
    folder.mkdir()
    said = cluster.n1.run(f"srun --nodes=1 --ntasks-per-node=2 {TRAIN} trainer.devices=2 name=run", cwd=folder)
    return finished(folder, said)


def finished(folder: Path, said: str) -> Path:
    run = folder / "outputs" / "run"
    assert (run / "evaluation.json").exists(), said
    assert said.count("epoch   2/2") == 1, f"one rank prints:\n{said}"
    return run


@pytest.mark.parametrize(("nodes", "tasks"), [(2, 1), (2, 2)])
def test_srun(cluster: Cluster, undisturbed: Path, tmp_path: Path, nodes: int, tasks: int) -> None:
    counts = f"trainer.devices={tasks} trainer.num_nodes={nodes}"
    said = cluster.n1.run(f"srun --nodes={nodes} --ntasks-per-node={tasks} {TRAIN} {counts} name=run", cwd=tmp_path)
    run = finished(tmp_path, said)
    assert f"on {nodes * tasks} device(s)" in said
    if nodes * tasks == 2:  # the sums of gradients are those of as many ranks
        assert differences(undisturbed, run) == []


BY_ENDPOINT = "--rdzv-backend c10d --rdzv-endpoint n1:29500"
BY_ADDRESS = "--master-addr n1 --master-port 29500 --node-rank"


def torchrun(options: str, command: str) -> str:
    return command.replace("python", f"python -m torch.distributed.run --nnodes 2 --nproc-per-node 1 {options}", 1)


@pytest.mark.parametrize("options", [(BY_ENDPOINT, BY_ENDPOINT), (f"{BY_ADDRESS} 0", f"{BY_ADDRESS} 1")])
def test_torchrun(cluster: Cluster, undisturbed: Path, tmp_path: Path, options: tuple[str, str]) -> None:
    started = [
        node.start(torchrun(each, f"{TRAIN} {TWO} name=run"), tmp_path, subprocess.PIPE)
        for node, each in zip(cluster.nodes, options, strict=True)
    ]
    said = "".join(process.communicate(timeout=600)[0] for process in started)
    assert [process.returncode for process in started] == [0, 0], said
    assert differences(undisturbed, finished(tmp_path, said)) == []


# -- batch jobs --------------------------------------------------------------------------------------------------------

SCRIPT = """#!/bin/bash
#SBATCH --nodes=2 --ntasks-per-node=1 --signal=USR1@120 --time=60 --requeue --open-mode=append --output=log
srun --kill-on-bad-exit=0 --wait=20 {command}
code=$?
[ $code != 75 ] || scontrol requeue $SLURM_JOB_ID
exit $code
"""


class Job:
    """A batch job that trains on both nodes, once its first epoch is over."""

    def __init__(self, cluster: Cluster, folder: Path) -> None:
        self.cluster, self.folder = cluster, folder
        (folder / "job.sh").write_text(SCRIPT.format(command=f"{TRAIN} {TWO} checkpoint.minutes=1e-6 name=run"))
        self.id = cluster.n1.run("sbatch --parsable job.sh", cwd=folder).strip()
        self.until("epoch   1/2")

    @property
    def said(self) -> str:
        return (self.folder / "log").read_text() if (self.folder / "log").exists() else ""

    def until(self, text: str) -> None:
        wait(lambda: text in self.said, 600, lambda: f"no {text!r}\n{self.said}\n{self.cluster.logs()}")

    def ends(self) -> Path:
        self.until("EMA, best ema epoch")
        wait(lambda: not self.cluster.n1.run(f"squeue --noheader --job {self.id}").strip(), 300)
        return finished(self.folder, self.said)


def test_a_signal_and_requeue(cluster: Cluster, undisturbed: Path, tmp_path: Path) -> None:
    job = Job(cluster, tmp_path)
    cluster.n1.run(f"scancel --signal=USR1 {job.id}")
    job.until("stopped by a signal")
    run = job.ends()
    assert re.search(r"resumed +\S*last.ckpt: epoch 2, [1-9]", job.said), job.said
    assert differences(undisturbed, run) == []


def test_a_node_dies(cluster: Cluster, undisturbed: Path, tmp_path: Path) -> None:
    job = Job(cluster, tmp_path)
    cluster.cut()
    cluster.n2.kill()
    cluster.n1.run("scontrol update nodename=n2 state=down reason=test")  # as SLURM itself does after SlurmdTimeout
    cluster.restore(cancel=False)
    run = job.ends()
    assert "resumed " in job.said and "Traceback" not in job.said, job.said
    assert differences(undisturbed, run) == []


@pytest.mark.parametrize("launcher", ["srun", "torchrun"])
def test_a_cut_link_ends_every_rank(cluster: Cluster, tmp_path: Path, launcher: str) -> None:
    """Within `timeout_minutes` and 30 s, and each says who does not answer."""
    command = f"{TRAIN} {TWO} epochs=1000 trainer.timeout_minutes=1 name=run"
    logs = [tmp_path / "0.log", tmp_path / "1.log"]
    if launcher == "srun":
        cluster.n1.start(f"srun --nodes=2 --ntasks-per-node=1 --output=%t.log --error=%t.log {command}", tmp_path)
    else:
        for rank, node in enumerate(cluster.nodes):
            node.start(f"{torchrun(f'{BY_ADDRESS} {rank}', command)} > {rank}.log 2>&1", tmp_path)
    wait(lambda: logs[0].exists() and "epoch   1/" in logs[0].read_text(), 600, lambda: logs[0].read_text())
    cluster.cut()
    ranks = "pgrep --full '[b]in/python[0-9.]* (-u )?/.*train.py'"  # not torchrun itself
    wait(lambda: not any(node.run(ranks) for node in cluster.nodes), 600)  # 80 on an idle machine
    said = [re.findall("^error: .*", log.read_text(), re.MULTILINE)[-1:] for log in logs]
    assert "rank 1 does not answer" in "".join(said[0]), logs[0].read_text()
    assert "rank 0 on n1 does not answer" in "".join(said[1]), logs[1].read_text()


# -- sweeps ------------------------------------------------------------------------------------------------------------

SWEEP = TRAIN.replace("train.py", "train.py -m")
SLURM = "hydra/launcher=slurm hydra.launcher.timeout_min=60 checkpoint.minutes=1e-6"


def logs_of(folder: Path) -> str:
    """What the jobs of a sweep in `folder` printed."""
    return "".join(path.read_text() for path in sorted(folder.glob("outputs/.sweep/.submitit/*/*_log.out")))


def until_trained(sweep: subprocess.Popen[str], folder: Path) -> None:
    """Waits until a job of the sweep has trained an epoch."""
    wait(lambda: "epoch   1/" in logs_of(folder) or sweep.poll() is not None, 600, lambda: logs_of(folder))
    assert sweep.returncode is None, f"{sweep.communicate()[0]}\n{logs_of(folder)}"


def test_a_sweep_of_jobs(cluster: Cluster, tmp_path: Path) -> None:
    """The first job fails, the second is stopped by SIGUSR2 as before its time limit, and queued again."""
    alone = cluster.n1.run(f"{TRAIN} name=alone", cwd=tmp_path)
    sweep = cluster.n1.start(f"{SWEEP} {SLURM} weights=nowhere.safetensors,null", tmp_path, subprocess.PIPE)
    until_trained(sweep, tmp_path)
    job = cluster.n1.run("squeue --noheader --states=running --format=%A").split()[-1]
    cluster.n1.run(f"scancel --signal=USR2 {job}")
    said = sweep.communicate(timeout=600)[0]
    logs = logs_of(tmp_path)
    assert "stopped by a signal" in logs and "resumed " in logs, said + logs
    assert sweep.returncode == 1 and "Traceback" not in said, said
    (run,) = tmp_path.glob("outputs/digits*null*")
    assert f"| {run.name} | 0.1 |" in said
    assert re.search(r"\n1 failed:\n\[1/2\] weights=nowhere.safetensors: exit code 2.*\n$", said), said
    assert differences(tmp_path / "outputs" / "alone", run) == [], alone


def test_a_time_limit_is_asked_for(cluster: Cluster, tmp_path: Path) -> None:
    said = cluster.n1.run(f"{SWEEP} hydra/launcher=slurm seed=0,1; echo exit code $?", cwd=tmp_path)
    assert said.startswith("error: hydra.launcher.timeout_min is missing") and said.endswith("\nexit code 2\n"), said
    assert not (tmp_path / "outputs" / ".sweep" / ".submitit").exists()


def test_a_job_that_somebody_cancels(cluster: Cluster, tmp_path: Path) -> None:
    """It has not begun, so it leaves no result; nor is there any accounting that knows its end."""
    later = "+hydra.launcher.additional_parameters.begin=now+1hour"
    sweep = cluster.n1.start(f"{SWEEP} {SLURM} {later} seed=0,1", tmp_path, subprocess.PIPE)
    wait(lambda: cluster.n1.run("squeue --noheader --array").count("\n") == 2 or sweep.poll() is not None, 300)
    cluster.n1.run("scancel --me")
    said = sweep.communicate(timeout=300)[0]
    assert sweep.returncode == 1 and "Traceback" not in said, said
    ended = re.findall(r"seed=(.): SLURM's job \S+ ended without a result \(its state: CANCELLED\)", said)
    assert set(ended) == {"0", "1"}, said


def test_ctrl_c_cancels_the_jobs(cluster: Cluster, tmp_path: Path) -> None:
    sweep = cluster.n1.start(f"{SWEEP} {SLURM} epochs=1000 seed=0,1", tmp_path, subprocess.PIPE)
    until_trained(sweep, tmp_path)
    cluster.n1.run("pkill -INT --full '[t]rain.py -m.*launcher=slurm'")
    said = sweep.communicate(timeout=300)[0]
    assert "cancelled" in said and "Traceback" not in said, said
    wait(lambda: not cluster.n1.run("squeue --noheader").strip(), 300, lambda: cluster.n1.run("squeue"))
    assert "stopped by a signal" in logs_of(tmp_path)


def test_a_study_goes_on(cluster: Cluster, tmp_path: Path) -> None:
    """Optuna's, kept in SQLite; where every trial fails, that is what is said."""
    study = "hydra/sweeper=optuna hydra.sweeper.direction=maximize hydra.sweeper.n_trials=1 hydra.sweeper.study_name=a"
    kept = f"{study} hydra.sweeper.storage=sqlite:///study.db 'recipe.learning_rate=interval(0.1,0.3)' epochs=1"
    for _ in range(2):
        said = cluster.n1.run(f"{SWEEP} {kept} recipe.warmup_epochs=0; echo exit code $?", cwd=tmp_path)
        assert said.endswith("exit code 0\n"), said
    said = cluster.n1.run(
        "python -c \"import optuna; print(optuna.load_study('a', 'sqlite:///study.db').trials)\"", cwd=tmp_path
    )
    assert said.count("FrozenTrial(") == said.count("TrialState.COMPLETE") == 2, said
    said = cluster.n1.run(
        f"{SWEEP} {study} width=0.1 weights=choice\\(nowhere.safetensors\\); echo exit code $?", cwd=tmp_path
    )
    assert "Traceback" not in said and "1 failed:" in said and said.endswith("exit code 1\n"), said
