"""Feeds the commands and the readers of files with mutated input: each outcome has to be success or one line.

    python benchmarks/fuzz.py --rounds 10 --cases 2000
    python benchmarks/fuzz.py --only weights-3-117           one case again, with its traceback

A round goes over command lines (keys and values of the schema and beyond), shards of others, manifests, and files of
weights, all made by changing valid ones. A case is drawn from its name, so it can be repeated alone. A traceback, a
case that takes more than a minute, and a message of several lines are failures; exit code 1 when there was any.
"""

import argparse
import random
import signal
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from benchmarks.fuzz_targets import TARGETS, Outcome  # noqa: E402  # needs the path

SECONDS = 60


class Hang(BaseException):
    """A case that takes too long; nothing may catch it."""


@contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    def stop(*_: object) -> None:
        raise Hang

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def failure(name: str, folder: Path, show: bool = False) -> str | None:
    """What is wrong with the outcome of a case, None when it is as it has to be."""
    target = TARGETS[name.partition("-")[0]]
    try:
        with time_limit(SECONDS):
            outcome: Outcome = target(random.Random(name), folder)
    except Hang:
        return f"{name}: still running after {SECONDS} s"
    except Exception as error:
        if show:
            traceback.print_exc()
        return f"{name}: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
    if outcome is not None and len(outcome.splitlines()) != 1:
        return f"{name}: {len(outcome.splitlines())} lines: {outcome[:200]!r}"
    return None


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks/fuzz.py", description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--first", type=int, default=0, help="number of the first round")
    parser.add_argument("--cases", type=int, default=2000, help="of a round, over all targets")
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--only", help="the name of one case")
    options = parser.parse_args(arguments)
    failures: list[str] = []
    done: Counter[str] = Counter()
    rounds = range(options.first, options.first + options.rounds)
    names = [
        f"{target}-{number}-{case}"
        for number in rounds
        for target in options.targets
        for case in range(options.cases // len(options.targets))
    ]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for name in [options.only] if options.only else names:
            done[name.partition("-")[0]] += 1
            if (found := failure(name, folder, show=bool(options.only))) is not None:
                failures.append(found)
                print(found, flush=True)
    print(f"{sum(done.values()):,} cases ({', '.join(f'{k} {n:,}' for k, n in done.items())}), {len(failures)} failed")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
