"""One writer for a run's folder: a second command on it is refused in a line that says who writes there.

The writer locks `.writer.json` in the folder, which says who it is. The kernel drops the lock when the process ends,
whatever ends it. Where file locks do not work, or only within a machine (some mounts of NFS and Lustre), the file alone
speaks for a writer: it is touched every few seconds, and whoever finds that of another machine watches whether this
goes on. Check: `pytest tests/test_lock.py`.
"""

import errno
import fcntl
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO

from repghost.errors import UserError
from repghost.files import require_writable

OWNER = ".writer.json"

_HEARTBEAT = 5.0  # seconds
_WATCHED = 60.0  # seconds in which a writer on another machine shows that it lives, even through the caches of NFS


@contextmanager
def sole_writer(folder: Path, rank: int | None = None) -> Iterator[None]:
    """Makes this process, for all ranks of its run, the only writer of `folder`; ranks other than 0 pass.

    rank: of this process; None: what a launcher says, 0 without one.

    Raises UserError if another process writes there, or if nothing can be written. A folder that is empty at the end
    is removed.
    """
    if (_launched_rank() if rank is None else rank) != 0:
        yield
        return
    require_writable(folder / OWNER, "output")
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    file = _take(folder)
    over = threading.Event()
    threading.Thread(target=_touch, args=(file.fileno(), over), daemon=True).start()
    try:
        yield
    finally:
        over.set()
        (folder / OWNER).unlink(missing_ok=True)
        file.close()
        for path in made:
            with suppress(OSError):
                path.rmdir()


def _launched_rank() -> int:
    """The rank of this process; a first one, or one without others, is told without what takes long to import."""
    if all(os.environ.get(name, "0") in ("", "0") for name in ("RANK", "SLURM_PROCID")):
        return 0
    from repghost.ranks import global_rank

    return global_rank()


def _take(folder: Path) -> BinaryIO:
    """The file OWNER, locked and with this process in it."""
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        # A writer that ended removed the folder, or the file, which is closed again then.
        with suppress(FileNotFoundError), ExitStack() as stack:
            file = stack.enter_context(os.fdopen(os.open(folder / OWNER, os.O_RDWR | os.O_CREAT, 0o666), "r+b"))
            if _take_file(file, folder):
                stack.pop_all()  # open as long as the run
                return file


def _take_file(file: BinaryIO, folder: Path) -> bool:
    """Locks `file`, the one open file that a process has of it: to close another would drop the lock.

    Returns False if it is not in `folder` any more. Raises UserError if another process has it.
    """
    locks_work = True
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # not flock, which a forked child keeps for a dead parent
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            raise UserError(_refusal(folder, _read(file))) from None
        locks_work = False
    with suppress(FileNotFoundError):
        if os.path.samestat(os.stat(folder / OWNER), os.fstat(file.fileno())):
            before, own = _read(file), _this_process()
            if before and _lives(before, file, folder):
                raise UserError(_refusal(folder, before))
            file.seek(0)
            file.truncate()
            file.write(json.dumps(own).encode())
            file.flush()
            if not locks_work:  # of two that come here at once the last one has it
                time.sleep(1)
                if (now := _read(file)) != own:
                    raise UserError(_refusal(folder, now))
            return True
    return False


def _touch(descriptor: int, over: threading.Event) -> None:
    while not over.wait(_HEARTBEAT):
        with suppress(OSError):
            os.utime(descriptor)


def _this_process() -> dict[str, Any]:
    since = f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC"
    job = os.environ.get("SLURM_JOB_ID")
    return {"host": socket.gethostname(), "pid": os.getpid(), "begun": _begun(os.getpid()), "job": job, "since": since}


def _begun(pid: int) -> str | None:
    """What tells a process from others that had its number: when it began (proc_pid_stat(5), field 22)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        return None


def _read(file: BinaryIO) -> dict[str, Any]:
    """Who is in the file OWNER, empty where nobody is."""
    file.seek(0)
    try:
        owner = json.loads(file.read())
    except ValueError:
        return {}
    return owner if isinstance(owner, dict) else {}


def _lives(owner: dict[str, Any], file: BinaryIO, folder: Path) -> bool:
    """Whether the process that is in `file` still writes, though this one got the lock or there are no locks."""
    if owner.get("host") == socket.gethostname():
        return owner.get("pid") != os.getpid() and owner.get("begun") == _begun(owner.get("pid", 0)) is not None
    if owner.get("job") and owner["job"] == os.environ.get("SLURM_JOB_ID"):
        return False  # requeued
    print(f"{folder}: {_who(owner)} wrote there: watching for {_WATCHED:.0f} s whether it still does", flush=True)
    touched, until = os.fstat(file.fileno()).st_mtime_ns, time.monotonic() + _WATCHED
    while time.monotonic() < until:
        time.sleep(1)
        if os.fstat(file.fileno()).st_mtime_ns != touched:
            return True
    print(f"{folder}: it does not, going on from there", flush=True)
    return False


def _who(owner: dict[str, Any]) -> str:
    job = f", SLURM job {owner['job']}" if owner.get("job") else ""
    return f"process {owner.get('pid', '?')} on {owner.get('host', '?')}{job}"


def _refusal(folder: Path, owner: dict[str, Any]) -> str:
    since = f", since {owner['since']}" if "since" in owner else ""
    return f"{folder}: {_who(owner)} is training there{since}: wait for its end, or give this run a name=..."
