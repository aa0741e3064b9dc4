"""The detector in a run's folder. Check: `pytest tests/test_detection_use.py`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from torch import nn

from repghost.detection.detectors import detector
from repghost.errors import UserError, first_sentence
from repghost.run import read_config, read_selected
from repghost.run_data import recorded_data


def load_detector(directory: Path, selection: str) -> tuple[nn.Module, Sequence[str], int]:
    """The averaged detector of a run's last or best epoch, the names of its classes, and the number of that epoch.

    It is in training form, in evaluation mode; label 1 is the first class, and epochs are counted from 0. Raises
    UserError for a folder that holds no such run.
    """
    content, data = read_selected(directory, selection), recorded_data(directory)
    if data is None or data.classes is None:
        raise UserError(f"{directory}: has no data.json, in which train.py keeps the names of the classes")
    node: Any = OmegaConf.to_container(read_config(directory).detector)
    settings = {key: value for key, value in node.items() if not key.startswith("_")}
    model = detector(num_classes=len(data.classes), **settings)
    try:
        model.load_state_dict(content["ema"])
    except RuntimeError as error:
        raise UserError(
            f"{directory}: its weights are not of the detector in config.yaml ({first_sentence(error)})"
        ) from None
    return model.eval(), data.classes, int(content["history"][-1]["epoch"])
