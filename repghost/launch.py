"""How train.py and evaluate.py start: Hydra composes the config, mistakes end in one line, -m sweeps.

Nothing that takes long to import is, before the command line was understood and its values were checked.
Check: `pytest tests/test_schema.py tests/test_sweep.py`.
"""

import functools
import inspect
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from repghost.command_line import CONF, check_config, choices_listed, program_of, read_command_line
from repghost.errors import run_command
from repghost.schema.help import help_text

if TYPE_CHECKING:
    from repghost.sweep import Sweep

Main = Callable[[DictConfig], int | None]


def command(name: str) -> Callable[[Main], Callable[[], None]]:
    """Makes a program of `function(config)`, which returns its exit code or None for 0.

    name: `train` or `evaluate`. Hydra composes the config from the command line and the file in conf/ for its task.
    """

    def decorate(function: Main) -> Callable[[], None]:
        path = Path(inspect.getfile(function)).resolve()

        @functools.wraps(function)
        def main() -> None:
            sweeps: list[Sweep] = []  # empty, or the one that the command line asks for

            @functools.wraps(function)
            def job(config: DictConfig) -> float | None:
                settings = HydraConfig.get()
                if settings.mode != RunMode.MULTIRUN:
                    # Hydra would add lines of its own to an exception.
                    if code := run_command(lambda: _checked(function, config)):
                        sys.exit(code)
                    return None
                if settings.runtime.choices["hydra/launcher"] != "basic":
                    # This process is the job's own, from a launcher such as submitit's.
                    return sweeps[0].run_task(config)  # type: ignore[return-value]  # a text where it failed
                if code := run_command(sweeps[0].run_job):  # Hydra would go on with the next job
                    sys.exit(code)
                return sweeps[0].objective

            def compose_and_run() -> int | None:
                program = program_of(name, sys.argv[1:])
                flags, overrides, sweeping = read_command_line(program, sys.argv[1:])
                if {"--help", "-h"} & set(flags):
                    print(help_text(program, inspect.getdoc(inspect.getmodule(function)) or "", CONF))
                    return 0
                sys.argv = [sys.argv[0], *flags, *overrides]  # where Hydra reads it
                os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then raises instead of printing its own digest
                run = hydra.main(version_base="1.3", config_path=str(CONF), config_name=program)(job)
                with choices_listed():
                    if not sweeping:
                        return run()
                    from repghost.sweep import Sweep

                    # By now: launchers send it to their processes, as a part of `job`.
                    sweeps.append(Sweep(path, flags, overrides))
                    sweeps[0].over(run)
                return sweeps[0].report()

            try:
                if code := run_command(compose_and_run):
                    sys.exit(code)
            except BaseException as error:
                if "repghost.rank_failures" in sys.modules:  # else nothing has run on devices
                    sys.modules["repghost.rank_failures"].end_failed_rank(error)
                raise

        return main

    return decorate


def _checked(function: Main, config: DictConfig) -> int | None:
    settings = HydraConfig.get()
    check_config(str(settings.job.config_name), config, settings.overrides.task)
    return function(config)
