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

from repghost.command_line import CONF, check_config, choices_listed, read_command_line
from repghost.errors import run_command

if TYPE_CHECKING:
    from repghost.sweep import Sweep

Main = Callable[[DictConfig], int | None]


def command(config_name: str) -> Callable[[Main], Callable[[], None]]:
    """Makes a program of `function(config)`, which returns its exit code or None for 0.

    Hydra composes the config from conf/`config_name`.yaml and the command line.
    """

    def decorate(function: Main) -> Callable[[], None]:
        program = Path(inspect.getfile(function)).resolve()

        @functools.wraps(function)
        def main() -> None:
            sweeps: list[Sweep] = []

            @functools.wraps(function)
            def job(config: DictConfig) -> float | None:
                settings = HydraConfig.get()
                if settings.mode != RunMode.MULTIRUN:
                    # Hydra would add lines of its own to an exception.
                    if code := run_command(lambda: _checked(config_name, function, config)):
                        sys.exit(code)
                    return None
                if settings.runtime.choices["hydra/launcher"] != "basic":
                    # This process is the job's own, from a launcher such as submitit's.
                    if failed := _checked(config_name, function, config):
                        sys.exit(failed)
                    return _top1(config)
                if not sweeps:
                    from repghost.sweep import Sweep

                    sweeps.append(Sweep(program))
                if code := run_command(sweeps[0].run_job):  # Hydra would go on with the next job
                    sys.exit(code)
                return sweeps[0].top1

            if code := run_command(lambda: _run(config_name, inspect.getmodule(function), job)):
                sys.exit(code)
            if sweeps and sweeps[0].report():
                sys.exit(1)

        return main

    return decorate


def _run(program: str, module: object, job: Callable[[DictConfig], float | None]) -> None:
    """Has Hydra read the command line and call `job`, once or for each job of a sweep."""
    flags, overrides = read_command_line(program, sys.argv[1:])
    if {"--help", "-h"} & set(flags):
        from repghost.schema.help import help_text

        print(help_text(program, inspect.getdoc(module) or "", CONF))
        return
    sys.argv = [sys.argv[0], *flags, *overrides]  # where Hydra reads it
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then raises instead of printing its own digest
    with choices_listed():
        hydra.main(version_base="1.3", config_path=str(CONF), config_name=program)(job)()


def _checked(program: str, function: Main, config: DictConfig) -> int | None:
    check_config(program, config, HydraConfig.get().overrides.task)
    return function(config)


def _top1(config: DictConfig) -> float | None:
    from repghost.run import folder_of, top1

    return top1(folder_of(config))
