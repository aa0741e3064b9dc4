"""How many processor cores this process may use: what it is bound to (affinity), and the CPU quota of its cgroup.

A container or a batch job that is given 8 of 128 cores is bound to them, or is stopped whenever it has used more time
than 8 cores have; Python and PyTorch know the former only. Check: `pytest tests/test_parallel.py`.
"""

import math
import os
import platform
from contextlib import suppress
from pathlib import Path, PurePosixPath

CGROUPS = Path("/sys/fs/cgroup")
OWN_CGROUPS = Path("/proc/self/cgroup")


def available_cpus() -> int:
    """Processor cores that this process may use."""
    bound, quota = len(bound_to()), cpu_quota()
    return bound if quota is None else min(bound, quota)


def cpus_per_rank() -> int:
    """Cores for each rank: those it may use, shared evenly by the ranks that may use the same ones.

    Ranks that torchrun or Lightning starts share the cores of the node or of the job; srun may give each its own. A
    quota of CPU time is one for all ranks of a node.
    """
    import torch.distributed as dist  # which counting cores does not need

    mine = platform.node(), bound_to()
    of_ranks = [mine]
    if dist.is_initialized():
        of_ranks *= dist.get_world_size()
        dist.all_gather_object(of_ranks, mine)
    share = len(mine[1]) // of_ranks.count(mine)
    if quota := cpu_quota():
        share = min(share, quota // [node for node, _ in of_ranks].count(mine[0]))
    return max(1, share)


def limit_threads() -> None:
    """Lets PyTorch have at most as many threads as this process has cores, unless OMP_NUM_THREADS says how many."""
    import torch

    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(min(torch.get_num_threads(), cpus_per_rank()))


def bound_to() -> list[int]:
    """The numbers of the cores that this process may run on."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))


def cpu_quota() -> int | None:
    """How many cores the CPU quota of this process's cgroup is worth, rounded up; None where it has none.

    The smallest of the cgroup and those that it is in, of version 2 (cpu.max) and 1 (cpu.cfs_quota_us).
    """
    quotas = [quota for folder in _cgroups() if (quota := _quota(folder)) is not None]
    return max(1, math.ceil(min(quotas))) if quotas else None


def _cgroups() -> list[Path]:
    """The folders of the cgroups that may limit this process's CPU time; in a container the outer ones are not seen."""
    try:
        lines = OWN_CGROUPS.read_text().splitlines()
    except OSError:  # not Linux
        return []
    folders = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers or "cpu" in controllers.split(","):
            inside = PurePosixPath(path.lstrip("/"))
            root = CGROUPS / "cpu" if controllers else CGROUPS
            folders += [root / each for each in (inside, *inside.parents)]
    return folders


def _quota(folder: Path) -> float | None:
    """Cores, of one cgroup."""
    with suppress(OSError, ValueError):  # it has no such file, or no limit, which is "max"
        quota, period = map(int, (folder / "cpu.max").read_text().split())
        return quota / period
    with suppress(OSError, ValueError):
        quota, period = (int((folder / f"cpu.cfs_{name}_us").read_text()) for name in ("quota", "period"))
        return quota / period if quota > 0 else None
    return None
