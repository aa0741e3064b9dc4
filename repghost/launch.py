"""How train.py and evaluate.py start: Hydra composes their config, and mistakes end in one line."""

import functools
import os
import sys
from collections.abc import Callable
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from repghost.errors import UserError, run_command, user_message
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
            if code := run_command(lambda: function(config)):  # inside of Hydra, which would add a line of its own
                sys.exit(code)
            return None

        # Hydra takes launchers from the namespace package hydra_plugins only; ours lies in repghost/plugins.
        if (plugins := str(Path(__file__).parent / "plugins")) not in sys.path:
            sys.path.append(plugins)
        compose_and_run = hydra.main(version_base="1.3", config_path=str(conf), config_name=config_name)(job)

        @functools.wraps(function)
        def main() -> None:
            os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then raises instead of printing its own digest
            if code := run_command(compose_and_run):
                sys.exit(code)

        return main

    return decorate
