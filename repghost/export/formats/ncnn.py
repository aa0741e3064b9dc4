"""NCNN: phones, by Tencent's runtime and its converter pnnx. Two files, NAME.ncnn.param and NAME.ncnn.bin.

It has no axis for the images of a batch: a call takes one. Check: `pytest tests/test_runtimes.py`.
"""

import json
import subprocess
import tempfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from repghost.errors import UserError
from repghost.export.deployable import Deployable, Metadata, example_input
from repghost.export.runtimes import ExportedModel, require


def write(module: Deployable, path: Path, metadata: Metadata) -> None:
    """Writes `path` with `metadata` as JSON in a last line, which NCNN does not read, and the weights beside it."""
    image, converter = example_input(module.deployment), require("pnnx").EXEC_PATH
    with tempfile.TemporaryDirectory() as folder:
        traced = Path(folder) / "network.pt"
        torch.jit.save(torch.jit.trace(module, image), str(traced))
        options = [f"inputshape={[*image.shape]}".replace(" ", ""), "fp16=0"]
        found = subprocess.run([converter, traced, *options], capture_output=True, cwd=folder)
        param, weights = (traced.with_suffix(f".ncnn.{ending}") for ending in ("param", "bin"))
        if not param.exists():
            raise UserError(f"pnnx could not convert the network: it ended with {found.returncode}")
        path.write_text(f"{param.read_text().rstrip()}\n{json.dumps(dict(metadata))}\n")
        path.with_suffix(".bin").write_bytes(weights.read_bytes())


def open_model(path: Path) -> ExportedModel:
    """The file in NCNN, on the CPU, in float32."""
    ncnn = require("ncnn")
    net = ncnn.Net()
    net.opt.num_threads = torch.get_num_threads()
    net.opt.use_fp16_packed = net.opt.use_fp16_storage = net.opt.use_fp16_arithmetic = False
    if net.load_param(str(path)) or net.load_model(str(path.with_suffix(".bin"))):
        raise UserError(f"{path}: NCNN cannot load it and {path.with_suffix('.bin').name} beside it")
    [image], [logits] = net.input_names(), net.output_names()

    def of(pixels: Tensor) -> Tensor:
        run, array = net.create_extractor(), pixels.numpy()  # which NCNN reads, and does not keep alive
        run.input(image, ncnn.Mat(array))
        return torch.from_numpy(np.array(run.extract(logits)[1]))

    last = path.read_text().splitlines()[-1]
    metadata = json.loads(last) if last.startswith("{") else {}  # a file of others
    return ExportedModel(lambda images: torch.stack([of(each) for each in images]), metadata)
