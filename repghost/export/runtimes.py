"""An exported file, run by its own runtime (see `repghost.export.formats`), in the place of a network.

Images in, logits out. `python evaluate.py weights=model.onnx data.root=SHARDS` evaluates it like any weights, so that
accuracy before and after can be compared; `python -m repghost.predict` takes it as well. Check: `pytest
tests/test_export.py tests/test_runtimes.py`.
"""

import io
import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, TextIO

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from repghost.description import KEY, Description, described_beside
from repghost.errors import UserError, first_sentence
from repghost.extras import how_to_install

# Endings of the files that can be evaluated and predict, and their formats.
EXPORTED = {
    ".onnx": "onnx", ".pte": "executorch", ".xml": "openvino", ".tflite": "litert", ".param": "ncnn",
    ".engine": "tensorrt",
}  # fmt: skip


def _numbers(text: str) -> tuple[float, ...]:
    return tuple(float(number) for number in text.split())


# What an exported file says of itself beside its description, and how that is read: see
# `repghost.export.deployable.metadata_of`.
METADATA: dict[str, Callable[[Any], Any]] = {
    "width": float, "num_classes": int, "image_size": int, "batch": int, "preprocess": int, "softmax": int,
    "precision": str, "crop_fraction": float, "mean": _numbers, "std": _numbers,
}  # fmt: skip
# Files of earlier versions do not say these.
_BEFORE = {"crop_fraction": 0.875, "mean": "0.485 0.456 0.406", "std": "0.229 0.224 0.225"}


class ExportedModel(nn.Module):
    """An exported file as a network: images of what the file takes, float32 [N, num_classes] out.

    metadata: what the file says of itself. Where that is the `batch` of a call, a last batch is filled up and cut off
    again. description: the part of it that files of every kind have. It has no parameters.
    """

    description = Description()

    def __init__(self, call: Callable[[Tensor], Tensor], metadata: Mapping[str, Any] | None = None) -> None:
        super().__init__()
        self._call, self.metadata = call, metadata or {}

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        batch, outputs = int(self.metadata.get("batch", 0)) or len(images), []
        for chunk in images.cpu().contiguous().split(batch):
            missing = batch - len(chunk)
            filled = F.pad(chunk, (0, 0, 0, 0, 0, 0, 0, missing)) if missing else chunk
            outputs.append(self._call(filled)[: len(chunk)])
        return torch.cat(outputs).to(images.device)


def open_as(form: str, path: Path) -> ExportedModel:
    """A file in the format `form`, one of `repghost.export.formats`, in its own runtime."""
    return import_module(f"repghost.export.formats.{form}").open_model(path)


def is_exported(weights: Any) -> bool:
    """Whether weights= names an exported file that can be evaluated."""
    return Path(str(weights)).suffix in EXPORTED


def open_file(path: str | Path) -> ExportedModel:
    """An exported file (one of EXPORTED) with its metadata in their types, and its description.

    Raises UserError for a file that is not one of `repghost.export`.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    try:
        model = open_as(EXPORTED[path.suffix], path)
    except UserError:
        raise
    except Exception as error:  # the runtimes' own exceptions have no common class
        raise UserError(f"{path}: its runtime cannot load it ({first_sentence(error)})") from None
    found = _BEFORE | dict(model.metadata)
    if missing := [key for key in METADATA if key not in found]:
        kind = "a detector, or not" if KEY in found else "not"
        raise UserError(f"{path}: {kind} written by repghost.export, it does not say its {missing[0]}")
    try:
        model.metadata = {key: read(found[key]) for key, read in METADATA.items()}
        described = Description.from_mapping({**model.metadata, "form": "fused"})
    except (ValueError, TypeError) as error:
        raise UserError(f"{path}: what it says of itself cannot be read ({error})") from None
    if KEY in found:
        described = Description.from_json(str(found[KEY]), str(path))
    # An older file says less, but may lie in its run's folder.
    model.description = described if described.classes else replace(described, classes=described_beside(path).classes)
    if model.description.classes and len(model.description.classes) != model.metadata["num_classes"]:
        raise UserError(f"{path}: says that it has {len(model.description.classes)} and other numbers of classes")
    return model


def open_exported(
    path: str | Path, image_size: int, precision: str, normalization: Mapping[str, Sequence[float]]
) -> ExportedModel:
    """An exported file for evaluation on normalized images of `image_size` pixels.

    precision: what the command asks for; a file has its own, which leaves only the usual "float32". normalization:
    the `mean` and `std` of the images.

    Raises UserError for a file that is not one of `repghost.export`, or that takes or gives something else.
    """
    if precision != "float32":
        raise UserError(f"precision={precision}: an exported file computes in its own")
    model = open_file(path)
    metadata = model.metadata
    for key, what in (("preprocess", "takes photographs"), ("softmax", "gives probabilities")):
        if metadata[key]:
            raise UserError(f"{path}: {what}, evaluation needs an export without {key}=true")
    if (size := metadata["image_size"]) != image_size:
        raise UserError(f"{path}: takes images of {size} pixels: image_size={size}")
    for key in ("mean", "std"):
        if tuple(normalization[key]) != metadata[key]:
            value = f"[{','.join(map(str, metadata[key]))}]"
            raise UserError(f"{path}: takes images with another {key}: data.augment.{key}={value}")
    return model


def require(package: str) -> ModuleType:
    """Imports an optional package. Raises UserError that says which extra has it."""
    try:
        with quiet():
            return import_module(package)
    except ImportError as error:
        line = how_to_install(error.name or package) or how_to_install(package)
        raise UserError(line or f"{package} cannot be imported ({first_sentence(error)})") from None


@contextmanager
def quiet() -> Iterator[TextIO]:
    """Holds back what exporters and runtimes print, also from C++; when they fail, it is printed after all.

    Gives stderr as it was, for what is to be seen nevertheless.
    """
    with tempfile.TemporaryFile() as kept, open(os.dup(2), "w") as stderr, warnings.catch_warnings(action="ignore"):
        sys.stderr.flush()
        os.dup2(kept.fileno(), 2)
        try:
            with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
                yield stderr
        except BaseException as error:
            kept.seek(0)
            stderr.write("" if isinstance(error, UserError) else kept.read().decode(errors="replace"))
            stderr.flush()
            raise
        finally:
            os.dup2(stderr.fileno(), 2)
