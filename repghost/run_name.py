"""The name of a run, which tells it from others, and its folder. Found before anything that takes long is imported.

Check: `pytest tests/test_config.py`.
"""

import hashlib
import re
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

# Keys that say where and how fast a run happens: no part of its name, and free to change when it is resumed.
WHERE_AND_HOW_FAST = ("name", "output", "results", "trainer", "logger", "checkpoint", "curve_seconds", "profile",
                      "data.workers", "data.readers", "data.prefetch", "data.hw_decoder_load", "data.thread_affinity",
                      "data.cache", "data.eval_batch_size")  # fmt: skip
# Part of the name by their values alone.
_NAMED_ALREADY = ("task", "data", "data.root", "recipe", "detector", "width", "seed")
_LONGEST_NAME = 255  # bytes that file systems take


def folder_of(config: DictConfig) -> Path:
    """The folder of the run that a config of train.py or evaluate.py is about, under the HydraConfig that is set.

    For evaluate.py with weights=FILE, which is no run, FILE without its ending.
    """
    if "output" in config:
        return Path(config.output) / (config.name or run_name(config))
    return Path(config.run) if config.run else Path(config.weights or "weights").with_suffix("")


def run_name(config: DictConfig) -> str:
    """What tells runs apart: data set, recipe, detector, width, seed and any other override of this command line."""
    from hydra.core.hydra_config import HydraConfig

    hydra_config: Any = HydraConfig.get()
    root = config.data.root if isinstance(config.data.root, str) else hydra_config.runtime.choices.data
    detector = [str(config.detector.name)] if "detector" in config else []
    parts = [Path(root).name or "data", str(config.recipe.name), *detector, f"w{config.width:g}", f"s{config.seed}"]
    for override in sorted(hydra_config.overrides.task):
        key = key_of(override)
        if key not in _NAMED_ALREADY and not starts_with(key, WHERE_AND_HOW_FAST):
            parts.append(f"{key}_{override.partition('=')[2]}")
    # Nothing that a shell or Hydra's command line would take apart.
    name = "-".join(re.sub(r"[^\w.]+", "_", part).strip("_") for part in parts)
    return name if len(name.encode()) <= _LONGEST_NAME else _shortened(name)


def _shortened(name: str) -> str:
    """The first part of a name and a digest of all of it."""
    digest = hashlib.sha256(name.encode()).hexdigest()[:8]
    return f"{name.encode()[: _LONGEST_NAME - 9].decode(errors='ignore')}-{digest}"


def key_of(override: str) -> str:
    """The key of an argument such as +KEY=VALUE."""
    return override.lstrip("+~").partition("=")[0]


def starts_with(key: str, prefixes: tuple[str, ...]) -> bool:
    """Whether a key is one of `prefixes` or inside one."""
    return any(key == prefix or key.startswith(f"{prefix}.") for prefix in prefixes)
