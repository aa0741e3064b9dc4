"""Where a run lives: a folder whose name says what tells it apart from other runs."""

import json
import re
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

# Overrides that change where and how fast a run happens, but not which run it is.
_NOT_PART_OF_THE_NAME = ("name", "output", "results", "trainer", "logger", "checkpoint", "curve_seconds", "profile",
                         "data.workers", "data.prefetch", "data.cache", "data.eval_batch_size")  # fmt: skip
_NAMED_ALREADY = ("data", "data.root", "recipe", "width", "seed")


def folder_of(config: DictConfig) -> Path:
    """The folder of the run that a config of train.py or evaluate.py is about, under the HydraConfig that is set.

    For evaluate.py with weights=FILE, which is no run, FILE without its ending.
    """
    if "output" in config:
        return Path(config.output) / (config.name or run_name(config))
    return Path(config.run) if config.run else Path(config.weights or "weights").with_suffix("")


def top1(folder: Path) -> float | None:
    """What a job of a sweep returns to Hydra: its run's Top-1 in percent (evaluation.json), None if it has none."""
    file = folder / "evaluation.json"
    return float(json.loads(file.read_text())["top1"]) if file.exists() else None


def run_name(config: DictConfig) -> str:
    """What tells runs apart: data set, recipe, width, seed and any other override of this command line."""
    hydra_config: Any = HydraConfig.get()
    root = config.data.root if isinstance(config.data.root, str) else hydra_config.runtime.choices.data
    width = f"{config.width:g}" if isinstance(config.width, int | float) else config.width
    parts = [Path(root.rstrip("/")).name, str(config.recipe.name), f"w{width}", f"s{config.seed}"]
    for override in sorted(hydra_config.overrides.task):
        key, _, value = override.lstrip("+~").partition("=")
        inside = any(key == k or key.startswith(f"{k}.") for k in _NOT_PART_OF_THE_NAME)
        if key not in _NAMED_ALREADY and not inside:
            parts.append(f"{key}_{value}")
    # Nothing that a shell or Hydra's command line would take apart.
    return "-".join(re.sub(r"[^A-Za-z0-9._]+", "_", part).strip("_") for part in parts)
