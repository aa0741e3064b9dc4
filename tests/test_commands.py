"""Every command ends in one line: after a signal at any moment, a closed pipe, streams that are closed or narrow."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ERRORS = Path(__file__).parents[1] / "repghost" / "errors.py"  # which needs the standard library only

# What a command may be in the middle of; each says first that it has begun.
SLEEPS = "time.sleep(60)"
SWALLOWS = "\ntry: time.sleep(60)\nexcept BaseException: pass"
IN_A_DESTRUCTOR = "\nclass Slow:\n    def __del__(self): time.sleep(60)\nSlow()"
FAILS = "\ntry: time.sleep(60)\nexcept BaseException: raise RuntimeError('of the signal')"
ENDS_SLOWLY = "\ntry: time.sleep(60)\nfinally: print('ending', flush=True); time.sleep(0.5)"
AT_EXIT = "atexit.register(lambda: (print('ending', flush=True), time.sleep(60)))"


def start(body: str, begin: str = "print('begun', flush=True)", **options: object) -> subprocess.Popen[str]:
    text = f"{begin}\n{body}".replace("\n", "\n    ")
    program = (
        f"import atexit, runpy, sys, time\nerrors = runpy.run_path({str(ERRORS)!r})\n"
        f"def command():\n    {text}\nsys.exit(errors['run_command'](command))"
    )
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True} | options
    return subprocess.Popen([sys.executable, "-c", program], **streams)  # type: ignore[call-overload, no-any-return]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("body", [SLEEPS, SWALLOWS, IN_A_DESTRUCTOR, FAILS, ENDS_SLOWLY, AT_EXIT])
def test_a_signal(body: str, number: signal.Signals) -> None:
    with start(body) as process:
        assert process.stdout is not None
        process.stdout.readline()
        if body == AT_EXIT:
            process.stdout.readline()
        process.send_signal(number)
        if body == ENDS_SLOWLY:
            process.stdout.readline()
            process.send_signal(signal.SIGINT)  # changes nothing
        _, err = process.communicate()
    assert process.returncode == 128 + number
    assert err == ("interrupted\n" if number == signal.SIGINT else "ended by SIGTERM\n")


def test_a_signal_that_nohup_ignores() -> None:
    with start("import os, signal; os.kill(os.getpid(), signal.SIGINT)", begin="") as process:
        assert process.wait() == 130
    ignored = start(
        "import os, signal; os.kill(os.getpid(), signal.SIGINT)",
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),
    )
    assert ignored.communicate() == ("begun\n", "") and ignored.returncode == 0


@pytest.mark.parametrize("body", ["for i in range(99999): print(i)", "print(1); sys.exit()", "print(1)"])
def test_a_pipe_that_nobody_reads(body: str) -> None:
    read, write = os.pipe()
    os.close(read)
    with start(body, begin="", stdout=write) as process:
        os.close(write)
        _, err = process.communicate()
    assert (process.returncode, err) == (141, "")


def test_streams_that_are_closed_or_narrow() -> None:
    mistake = "print('日本'); raise errors['UserError']('\\udce4 日本')"
    narrow = start(mistake, begin="", env={**os.environ, "PYTHONIOENCODING": "ascii"})
    out, err = narrow.communicate()
    assert (out, err) == ("\\u65e5\\u672c\n", "error: \\udce4 \\u65e5\\u672c\n") and narrow.returncode == 2

    closed = start(
        "print(1); sys.stdout.isatty(); print(2, file=sys.stderr)", begin="", preexec_fn=lambda: os.closerange(0, 3)
    )
    assert closed.wait() == 0


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_full_disk(unbuffered: str) -> None:
    env = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    with open("/dev/full", "w") as full:
        disk = start("print(1)", begin="", stdout=full, env=env)
        _, err = disk.communicate()
        assert err.startswith("error: ") and "No space left on device" in err and err.count("\n") == 1
        assert disk.returncode == 2
        disk = start("raise errors['UserError']('x')", begin="", stderr=full, env=env)
        assert disk.communicate()[0] == "" and disk.returncode == 2
