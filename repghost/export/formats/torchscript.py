"""TorchScript: traced and frozen, for runtimes that still take one. Check: `pytest tests/test_export.py`."""

from pathlib import Path

import torch

from repghost.description import KEY
from repghost.export.deployable import Deployable, Metadata, example_input
from repghost.export.runtimes import ExportedModel, quiet


def write(module: Deployable, path: Path, metadata: Metadata) -> None:
    """Writes the module, its description in an extra file inside of it."""
    traced = torch.jit.freeze(torch.jit.trace(module, example_input(module.deployment)))
    torch.jit.save(traced, str(path), _extra_files={KEY: str(metadata[KEY])})


def open_model(path: Path) -> ExportedModel:
    """The file in torch."""
    with quiet():
        return ExportedModel(torch.jit.load(str(path)))
