"""Which other rank does not answer, for a rank that lost its connections.

A cut link leaves no trace but a timeout in every rank. Those that can still reach the store at which the ranks met
write into it that they are there; who is missing then is on the other side of the cut.
Check: `make test-cluster`, `pytest tests/test_distributed.py`.
"""

import os
import re
import time
from datetime import timedelta

import torch.distributed as dist

from repghost.rank_failures import open_store

_SECONDS = 10.0  # between the timeouts of two ranks lies at most a part of a step

# Where the other end of a connection is. gloo, transport/tcp/pair.cc: "Connection closed by peer [10.0.0.2]:13505";
# NCCL, misc/socket.cc: "socketProgress: Connection closed by remote peer n2<51234>", which torch gives as "Last error".
_PEER = re.compile(r"(?:by peer|Read error|Write error) \[([^\]\s]+)\]|by remote peer ([^<\s]+)<")

# torch 2.14, c10d/ProcessGroupNCCL.cpp: "[3] is setting up NCCL communicator and retrieving ncclUniqueId from [0] via
# c10d key-value store by key '0', but store->get('0') got error: ...".
_NO_COMMUNICATOR = re.compile(r"retrieving ncclUniqueId from \[(\d+)\]")

_TIMEOUTS = (
    "Timed out waiting",  # gloo, transport/tcp/unbound_buffer.cc
    # c10d/ProcessGroupNCCL.cpp: "[Rank 1] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=5, ..."
    "Watchdog caught collective operation timeout",
    "NCCL timeout in: ",  # c10d/NCCLUtils.cpp, of a communicator whose calls do not block
    "wait timeout after ",  # c10d/TCPStore.cpp: "wait timeout after 600000ms, keys: ..."
)
_GONE = (
    # c10d/NCCLUtils.cpp: "ncclRemoteError: A call failed possibly due to a network error or a remote process exiting
    # prematurely."; NCCL, init.cc: "remote process exited or there was a network error".
    "ncclRemoteError",
    "remote process exited or there was a network error",
    # c10d/NCCLUtils.hpp: "NCCL communicator was aborted on rank 1. Original reason for failure was: ..."
    "NCCL communicator was aborted",
)


def lost_ranks(error: RuntimeError) -> str | None:
    """Words about the ranks that `error` of a collective over gloo or NCCL is about, None if it is another one.

    After a timeout this takes some seconds.
    """
    text = str(error)
    if found := _PEER.search(text):
        return f"a rank on {found[1] or found[2]} has ended; its own last line says why"
    if found := _NO_COMMUNICATOR.search(text):
        return f"rank {found[1]} does not answer within trainer.timeout_minutes"
    if any(timeout in text for timeout in _TIMEOUTS):
        return f"{_silent_ranks()} within trainer.timeout_minutes"
    if any(gone in text for gone in _GONE):
        return "another rank has ended, or its network failed; its own last line says why"
    return None


def _silent_ranks() -> str:
    until = time.monotonic() + _SECONDS
    try:
        store = open_store(_SECONDS)
        store.set(f"answers/{dist.get_rank()}", "")
    except dist.DistError:
        return f"rank 0 on {os.environ['MASTER_ADDR']} does not answer"
    silent = []
    for rank in range(dist.get_world_size()):
        try:
            store.wait([f"answers/{rank}"], timedelta(seconds=max(0.5, until - time.monotonic())))
        except dist.DistError:
            silent.append(str(rank))
    return f"rank {', '.join(silent)} does not answer" if silent else "the ranks did not hear from each other"
