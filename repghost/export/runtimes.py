"""An exported file, run by its own runtime: ONNX by onnxruntime, ExecuTorch by its own, TorchScript by torch.

It stands where a network stands: images in, logits out, on the CPU. `python evaluate.py weights=model.onnx
data.root=SHARDS` (or model.pte) evaluates it like any weights, so that accuracy before and after can be compared.
Check: `pytest tests/test_export.py`.
"""

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from repghost.errors import UserError
from repghost.export.formats import quiet

EVALUATED = (".onnx", ".pte")
# What an exported file says of itself, in the order of their meaning: see `facts`.
FACTS = {"width": float, "num_classes": int, "image_size": int, "batch": int, "preprocess": int, "softmax": int,
         "precision": str}  # fmt: skip

Call = Callable[[Tensor], Tensor]


def require(package: str, extra: str = "deploy") -> ModuleType:
    """Imports an optional package. Raises UserError that says which extra has it."""
    try:
        with quiet():
            return import_module(package)
    except ImportError as error:
        missing = error.name or package
        raise UserError(f"{missing} is not installed: pip install 'repghost[{extra}]'") from None


class ExportedModel(nn.Module):
    """An exported file as a network: images of what the file takes, float32 [N, num_classes] out.

    batch: how many images a call of the file takes, None for any; a last batch is filled up and cut off again.
    metadata: what the file says of itself. Nothing in it can be trained.
    """

    def __init__(self, call: Call, batch: int | None = None, facts: dict[str, Any] | None = None) -> None:
        super().__init__()
        self._call, self._batch, self.metadata = call, batch, facts or {}

    def forward(self, images: Tensor) -> Tensor:
        chunks = images.cpu().split(self._batch) if self._batch else (images.cpu(),)
        outputs = []
        for chunk in chunks:
            missing = self._batch - len(chunk) if self._batch else 0
            filled = F.pad(chunk, (0, 0, 0, 0, 0, 0, 0, missing)) if missing else chunk
            outputs.append(self._call(filled)[: len(chunk)])
        return torch.cat(outputs).to(images.device)


def open_onnx(path: str | Path, batch: int | None = None) -> ExportedModel:
    """An ONNX file in onnxruntime, on the CPU."""
    onnxruntime = require("onnxruntime")
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name

    def call(images: Tensor) -> Tensor:
        return torch.from_numpy(session.run(None, {name: images.contiguous().numpy()})[0])

    return ExportedModel(call, batch, dict(session.get_modelmeta().custom_metadata_map))


def open_executorch(path: str | Path, batch: int | None = None) -> ExportedModel:
    """An ExecuTorch program in ExecuTorch's own runtime."""
    runtime = require("executorch.runtime")
    with quiet():
        program = runtime.Runtime.get().load_program(str(path))
        method = program.load_method("forward")
        names = program.method_names - {"forward"}
        facts = {name: program.load_method(name).execute([])[0] for name in names & FACTS.keys()}

    def call(images: Tensor) -> Tensor:
        with quiet():
            return method.execute([images.contiguous()])[0].clone()  # the next call writes to the same memory

    return ExportedModel(call, batch, facts)


def open_torchscript(path: str | Path, batch: int | None = None) -> ExportedModel:
    """A TorchScript file in torch."""
    with quiet():
        module = torch.jit.load(str(path))

    def call(images: Tensor) -> Tensor:
        with torch.no_grad():
            return module(images)

    return ExportedModel(call, batch)


def is_exported(weights: Any) -> bool:
    """Whether weights= names an exported file that can be evaluated."""
    return Path(str(weights)).suffix in EVALUATED


def open_exported(path: str | Path, image_size: int, precision: str = "float32") -> ExportedModel:
    """An exported file for evaluation on normalized images of `image_size` pixels; its facts are in their types.

    precision: what the command asks for; a file has its own, which leaves only the usual "float32".

    Raises UserError for a file that is not one of `repghost.export`, or that takes or gives something else.
    """
    path = Path(path)
    if precision != "float32":
        raise UserError(f"precision={precision}: an exported file computes in its own")
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    opener = open_onnx if path.suffix == ".onnx" else open_executorch
    try:
        found = opener(path).metadata
    except UserError:
        raise
    except Exception as error:  # the runtimes' own exceptions have no common class
        first = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(f"{path}: its runtime cannot load it ({first})") from None
    if missing := [key for key in FACTS if key not in found]:
        raise UserError(f"{path}: not written by repghost.export, it does not say its {missing[0]}")
    facts = {key: read(found[key]) for key, read in FACTS.items()}
    for key, what in (("preprocess", "takes photographs"), ("softmax", "gives probabilities")):
        if facts[key]:
            raise UserError(f"{path}: {what}, evaluation needs an export without {key}=true")
    if facts["image_size"] != image_size:
        raise UserError(f"{path}: takes images of {facts['image_size']} pixels: image_size={facts['image_size']}")
    model = opener(path, facts["batch"] or None)
    model.metadata = facts
    return model
