"""Which other rank does not answer, for a rank that lost its connections.

A cut link leaves no trace but a timeout in every rank. Those that can still reach the store at which the ranks met
write into it that they are there; who is missing then is on the other side of the cut. Check: `make test-cluster`.
"""

import os
import re
import time
from datetime import timedelta

import torch.distributed as dist

_SECONDS = 10.0  # between the timeouts of two ranks lies at most a part of a step


def lost_ranks(error: RuntimeError) -> str | None:
    """Words about the ranks that `error` of a collective operation over gloo is about, None if it is another one.

    After a timeout this takes some seconds.
    """
    if found := re.search(r"(?:by peer|Read error|Write error) \[([^\]\s]+)\]", str(error)):
        return f"a rank on {found[1]} has ended; its own last line says why"
    return f"{_silent_ranks()} within trainer.timeout_minutes" if "Timed out waiting" in str(error) else None


def _silent_ranks() -> str:
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    until = time.monotonic() + _SECONDS
    try:
        store = dist.TCPStore(host, port, timeout=timedelta(seconds=_SECONDS), wait_for_workers=False)
        store.set(f"answers/{dist.get_rank()}", "")
    except dist.DistError:
        return f"rank 0 on {host} does not answer"
    silent = []
    for rank in range(dist.get_world_size()):
        try:
            store.wait([f"answers/{rank}"], timedelta(seconds=max(0.5, until - time.monotonic())))
        except dist.DistError:
            silent.append(str(rank))
    return f"rank {', '.join(silent)} does not answer" if silent else "the ranks did not hear from each other"
