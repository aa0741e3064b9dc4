"""What the command-line programs share: Hydra's entry point with errors that a user can read.

A mistake of the user (UserError, an unknown key, a missing value) ends in one line on stderr and exit code 2; anything
else is a defect of ours and keeps its traceback.
"""

import functools
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from repghost.errors import DISK_FULL, UserError, fail
from repghost.run import folder_of, top1


def command(config_name: str) -> Callable[[Callable[[DictConfig], None]], Callable[[], None]]:
    """Makes a program of `function(config)`: Hydra composes conf/`config_name`.yaml beside the function's file."""

    def decorate(function: Callable[[DictConfig], None]) -> Callable[[], None]:
        conf = Path(function.__code__.co_filename).resolve().parent / "conf"

        @functools.wraps(function)
        def job(config: DictConfig) -> float | None:
            if HydraConfig.get().mode == RunMode.MULTIRUN:  # in a launcher that is not ours, such as submitit's
                try:
                    function(config)
                except Exception as error:
                    if line := user_message(error):
                        raise UserError(line) from None  # on its way to the sweep it would lose its cause
                    raise
                return top1(folder_of(config))
            with _mistakes_end_in_one_line():  # inside of Hydra, which would add a line of its own
                function(config)
            return None

        # Hydra takes launchers from the namespace package hydra_plugins only; ours lies in repghost/plugins.
        if (plugins := str(Path(__file__).parent / "plugins")) not in sys.path:
            sys.path.append(plugins)
        compose_and_run = hydra.main(version_base="1.3", config_path=str(conf), config_name=config_name)(job)

        @functools.wraps(function)
        def main() -> None:
            os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then raises instead of printing its own digest
            with _mistakes_end_in_one_line():
                compose_and_run()

        return main

    return decorate


@contextmanager
def _mistakes_end_in_one_line() -> Iterator[None]:
    try:
        yield
    except Exception as error:
        line = user_message(error)
        if line is None:
            raise
        sys.exit(fail(line))


def user_message(error: BaseException) -> str | None:
    """The one line for a mistake of the user, None for a defect."""
    chain: list[BaseException] = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None and cause not in chain:
        chain.append(cause)
    for link in chain:
        if isinstance(link, UserError):
            return str(link)
        if isinstance(link, OSError) and link.errno in DISK_FULL:
            where = link.filename or "a file"
            return f"{where}: {link.strerror}: free some space and start again; nothing is half written"
        if isinstance(link, RuntimeError) and str(link).startswith("DataLoader worker (pid"):
            # Raised by torch's handler of a signal, wherever the program is.
            what = _first_line(link).rstrip(". ")
            return f"{what} (killed for memory? fewer data.workers or a smaller data.prefetch take less)"
        if isinstance(link, MissingMandatoryValue):
            return f"{_first_line(link)} (give it on the command line: KEY=VALUE)"
    if isinstance(error, HydraException | OmegaConfBaseException):
        if isinstance(chain[-1], HydraException | OmegaConfBaseException | TypeError):
            hint = "; --cfg job lists all keys" if "override" in str(error) else ""
            return f"{_first_line(error)} {_first_line(chain[-1])}".strip() + hint
        return None
    return None


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), "")
