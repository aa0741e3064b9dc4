"""LiteRT, once TensorFlow Lite: Android, by Google's converter from PyTorch, for batches of a fixed size.

Check: `pytest tests/test_runtimes.py`, which needs the extra litert in an environment of its own.
"""

import json
from pathlib import Path

import torch
from torch import Tensor

from repghost.description import KEY
from repghost.export.deployable import Deployable, Metadata, example_input
from repghost.export.runtimes import ExportedModel, require

_IDENTIFIER = b"TFL3"  # of LiteRT's files


def write(module: Deployable, path: Path, metadata: Metadata) -> None:
    """Writes a .tflite file, with `metadata` as JSON in its own table of metadata."""
    import litert_torch

    litert_torch.convert(module, (example_input(module.deployment),)).export(str(path))
    _describe(path, metadata)


def _describe(path: Path, metadata: Metadata) -> None:
    import flatbuffers
    import numpy as np
    from ai_edge_litert import schema_py_generated as schema

    model = schema.ModelT.InitFromPackedBuf(path.read_bytes())
    content, entry = schema.BufferT(), schema.MetadataT()
    content.data = np.frombuffer(json.dumps(dict(metadata)).encode(), np.uint8)
    model.buffers.append(content)
    entry.name, entry.buffer = KEY, len(model.buffers) - 1
    model.metadata = [*(model.metadata or ()), entry]
    builder = flatbuffers.Builder(path.stat().st_size)
    builder.Finish(model.Pack(builder), _IDENTIFIER)
    path.write_bytes(builder.Output())


def open_model(path: Path) -> ExportedModel:
    """The file in LiteRT, on the CPU."""
    require("ai_edge_litert")
    from ai_edge_litert import schema_py_generated as schema
    from ai_edge_litert.interpreter import Interpreter

    model = schema.ModelT.InitFromPackedBuf(path.read_bytes())
    said = [model.buffers[entry.buffer].data for entry in model.metadata or () if entry.name in (KEY, KEY.encode())]
    interpreter = Interpreter(str(path), num_threads=torch.get_num_threads())
    interpreter.allocate_tensors()
    [image], [logits] = interpreter.get_input_details(), interpreter.get_output_details()

    def call(images: Tensor) -> Tensor:
        interpreter.set_tensor(image["index"], images.numpy())
        interpreter.invoke()
        return torch.from_numpy(interpreter.get_tensor(logits["index"]))

    return ExportedModel(call, json.loads(bytes(said[0])) if said else {})
