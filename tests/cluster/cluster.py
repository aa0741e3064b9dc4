"""A SLURM cluster of two nodes on this machine, in namespaces of its own; `make test-cluster` runs the tests on it.

Each node has a network, processes, mounts and a host name of its own: `n1`, which is the controller and where commands
are typed, and `n2`. A pair of virtual network cards joins them; the file system is in common, as on a cluster. A node
and all that runs on it ends with this process, however this process ends: the kernel kills what is in a process
namespace together with its first process, which asks to be killed when its parent dies.
"""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Self

ADDRESSES = {"n1": "10.0.0.1", "n2": "10.0.0.2"}
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "ip", "nsenter", "unshare", "setpriv")

# The first process of a node, which has nothing to do but to collect what its children leave.
_INIT = "mount --bind {hosts} /etc/hosts && hostname {name} && ip link set lo up && while :; do sleep 1; done"

_SLURM_CONF = """
ClusterName=test
SlurmctldHost=n1(10.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=10
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
SlurmdTimeout=300
KillWait=30
ReturnToService=2
MpiDefault=none
SchedulerParameters=sched_interval=2,batch_sched_delay=0
NodeName=n1,n2 CPUs=8 RealMemory=8000
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def missing() -> str | None:
    """Why there can be no cluster here, None if there can be one. Installs Debian's packages where it may."""
    if os.geteuid():
        return "namespaces and SLURM's daemons need root"
    if not all(map(shutil.which, PROGRAMS)):
        if not shutil.which("apt-get"):
            return "SLURM is not installed, and there is no apt-get to install it"
        for command in ("update", "install -y --no-install-recommends slurm-wlm munge iproute2 util-linux"):
            done = subprocess.run(
                ["apt-get", "-q", *command.split()],
                env={**os.environ, "DEBIAN_FRONTEND": "noninteractive"}, stdin=subprocess.DEVNULL,
                capture_output=True, text=True,
            )  # fmt: skip
        if done.returncode or not all(map(shutil.which, PROGRAMS)):
            return f"apt-get could not install slurm-wlm and munge: {done.stderr.strip().splitlines()[-1:]}"
    namespaces = ["unshare", "--net", "--pid", "--mount", "--uts", "--fork", "--mount-proc"]
    links = "ip link add eth0 type veth peer eth1"
    done = subprocess.run([*namespaces, "sh", "-c", links], capture_output=True, text=True)
    return f"no namespaces here: {done.stderr.strip()}" if done.returncode else None


class Node:
    """A machine of the cluster. commands: what `run` and `start` put before theirs."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name = name
        self._folder = folder
        parent = subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL",
             "unshare", "--net", "--pid", "--mount", "--uts", "--fork", "--kill-child", "--mount-proc",
             "bash", "-c", _INIT.format(hosts=folder / "hosts", name=name)],
            stdin=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        self.parent = parent
        children = Path(f"/proc/{parent.pid}/task/{parent.pid}/children")
        wait(lambda: bool(children.read_text().split()))
        self.init = children.read_text().split()[0]
        self.enter = ["nsenter", "--target", self.init, "--net", "--pid", "--mount", "--uts"]
        wait(lambda: self.run("hostname; ip -br link show lo | grep LOOPBACK,UP").startswith(f"{name}\n"))

    def run(self, command: str, timeout: float = 900, cwd: Path | None = None) -> str:
        """What a shell command prints; its exit code is not asked for."""
        return self.start(command, cwd, stdout=subprocess.PIPE).communicate(timeout=timeout)[0]

    def start(self, command: str, cwd: Path | None = None, stdout: int | None = None) -> subprocess.Popen[str]:
        """Starts a shell command in `cwd`, with SLURM's commands and this Python as `python`, and nothing of ours."""
        variables = {
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "HOME": str(self._folder),
            "SLURM_CONF": str(self._folder / "slurm.conf"), "OMP_NUM_THREADS": "1",
        }  # fmt: skip
        return subprocess.Popen(
            # Behind nohup or in a script's background SIGINT is ignored, and so by all that is started here.
            [*self.enter, f"--wd={cwd or self._folder}", "env", "--default-signal=INT", "bash", "-c", command],
            env=variables, stdin=subprocess.DEVNULL, stdout=stdout, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip

    def kill(self) -> None:
        """Ends every process of the node, as a crash does; its network stays."""
        self.run("kill -9 -1")

    def start_slurmd(self) -> None:
        self.run("slurmd", timeout=60)


class Cluster:
    """Two nodes under one SLURM. Its files are in `folder`, those of tests in folders of `work`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "state").mkdir()
        (folder / "hosts").write_text("127.0.0.1 localhost\n" + "".join(f"{a} {n}\n" for n, a in ADDRESSES.items()))
        (folder / "slurm.conf").write_text(_SLURM_CONF.format(folder=folder))
        (folder / "munge.key").write_bytes(os.urandom(128))
        (folder / "munge.key").chmod(0o600)
        self.n1, self.n2 = (Node(name, folder) for name in ADDRESSES)
        self.nodes = (self.n1, self.n2)
        subprocess.run(
            ["ip", "link", "add", "eth0", "netns", self.n1.init, "type", "veth", "peer", "eth0", "netns", self.n2.init],
            check=True,
        )
        for node in self.nodes:
            node.run(f"ip address add {ADDRESSES[node.name]}/24 dev eth0")
        self.connect()
        munge = " ".join(
            f"--{option}={folder}/munge.{ending}"
            for option, ending in (("socket", "socket"), ("key-file", "key"), ("pid-file", "pid"), ("log-file", "log"),
                                   ("seed-file", "seed"))
        )  # fmt: skip
        self.n1.run(f"munged --force {munge} && slurmctld", timeout=60)
        for node in self.nodes:
            node.start_slurmd()
        wait(lambda: self.states() == ["idle", "idle"], 60, lambda: f"{self.states()}\n{self.logs()}")

    def states(self) -> list[str]:
        return self.n1.run("sinfo --noheader --Node --format=%t").split()

    def connect(self) -> None:
        for node in self.nodes:
            node.run("ip link set eth0 up")

    def cut(self) -> None:
        """Takes the link away: packets are lost, no connection is closed."""
        self.n1.run("ip link set eth0 down")

    def logs(self) -> str:
        return "\n".join(f"-- {path.name}\n{path.read_text()[-3000:]}" for path in self.folder.glob("*.log"))

    def restore(self, cancel: bool = True) -> None:
        """Both nodes idle again, whatever happened to them."""
        self.connect()
        if cancel:
            self.n1.run("scancel --full --me")
            for node in self.nodes:
                node.run("pkill -KILL --full '[t]rain.py'")  # what SLURM does not know of
        for node in self.nodes:
            if not node.run("pgrep -x slurmd"):
                node.start_slurmd()
            self.n1.run(f"scontrol update nodename={node.name} state=resume")
        if cancel:
            wait(lambda: self.states() == ["idle", "idle"], 120, lambda: f"{self.states()}\n{self.logs()}")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for node in self.nodes:
            node.parent.kill()
            node.parent.wait()


def wait(until: Callable[[], object], seconds: float = 30, otherwise: Callable[[], str] = str) -> None:
    """Waits until a condition holds. Raises TimeoutError with the text of `otherwise` if it does not."""
    end = time.monotonic() + seconds
    while not until():
        if time.monotonic() > end:
            raise TimeoutError(f"after {seconds} s: {otherwise()}")
        time.sleep(0.2)
