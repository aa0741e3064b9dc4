"""What the command-line programs share: Hydra's entry point with errors that a user can read.

A mistake of the user (UserError, an unknown key, a missing value) ends in one line on stderr and exit code 2; anything
else is a defect of ours and keeps its traceback.
"""

import functools
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException
from pytorch_lightning.utilities.rank_zero import rank_zero_only

from repghost.errors import UserError

# Overrides that change where and how fast a run happens, but not which run it is.
_NOT_PART_OF_THE_NAME = ("name", "output", "results", "trainer", "logger", "checkpoint", "data.workers", "data.cache")
_NAMED_ALREADY = ("data", "data.root", "recipe", "width", "seed")


def command(config_name: str) -> Callable[[Callable[[DictConfig], None]], Callable[[], None]]:
    """Makes a program of `function(config)`: Hydra composes conf/`config_name`.yaml beside the function's file."""

    def decorate(function: Callable[[DictConfig], None]) -> Callable[[], None]:
        conf = Path(function.__code__.co_filename).resolve().parent / "conf"

        @functools.wraps(function)
        def job(config: DictConfig) -> None:
            with _mistakes_end_in_one_line():  # inside of Hydra, which would add a line of its own
                function(config)

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


def fail(line: str) -> int:
    """Prints the one line that a user gets and returns the exit code for it."""
    print(f"error: {line}", file=sys.stderr, flush=True)
    return 2


@rank_zero_only
def say(text: str) -> None:
    """Prints for the person who started the program; on one rank only."""
    print(text, flush=True)


def user_message(error: BaseException) -> str | None:
    """The one line for a mistake of the user, None for a defect."""
    chain: list[BaseException] = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None and cause not in chain:
        chain.append(cause)
    for link in chain:
        if isinstance(link, UserError):
            return str(link)
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


def run_name(config: DictConfig) -> str:
    """What tells runs apart: data set, recipe, width, seed and any other override of this command line."""
    hydra_config: Any = HydraConfig.get()
    root = config.data.root if isinstance(config.data.root, str) else hydra_config.runtime.choices.data
    parts = [Path(root.rstrip("/")).name, str(config.recipe.name), f"w{float(config.width):g}", f"s{config.seed}"]
    for override in sorted(hydra_config.overrides.task):
        key, _, value = override.lstrip("+~").partition("=")
        inside = any(key == k or key.startswith(f"{k}.") for k in _NOT_PART_OF_THE_NAME)
        if key not in _NAMED_ALREADY and not inside:
            parts.append(f"{key}_{value}")
    # Nothing that a shell or Hydra's command line would take apart.
    return "-".join(re.sub(r"[^A-Za-z0-9._]+", "_", part).strip("_") for part in parts)
