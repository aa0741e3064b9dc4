"""What several tests share: photographs, small networks, BatchNorms that are not fresh, a time limit, a script."""

import os
import shutil
import signal
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import skimage.data
import torch
from sklearn.datasets import load_sample_images
from torch import Tensor, nn
from torch.nn import functional as F

from repghost import model

ALL_BLOCKS = model.STAGES
# A block of every stride, and one with a shortcut: six of the sixteen. What surrounds a network does not need more.
FEW_BLOCKS = (
    ALL_BLOCKS[0], ALL_BLOCKS[1], (), ALL_BLOCKS[3], (), ALL_BLOCKS[5], (), ALL_BLOCKS[7], ALL_BLOCKS[8][-1:],
)  # fmt: skip

# What torch.compile needs on a CPU.
needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, [os.environ["CXX"]] if "CXX" in os.environ else ["g++", "clang++"]))
    or not Path(sysconfig.get_path("include"), "Python.h").exists(),
    reason="needs a C++ compiler and the headers of Python",
)


@cache
def _macs_of(stages: object) -> object:
    """A `_count_macs` that has not counted yet: it does not know that networks of one width can differ."""
    return cache(model._count_macs.__wrapped__)


def use_blocks(patched: pytest.MonkeyPatch, stages: object = FEW_BLOCKS) -> None:
    """Networks that are built from here on have these blocks."""
    patched.setattr(model, "STAGES", stages)
    patched.setattr(model, "_count_macs", _macs_of(stages))


@torch.no_grad()
def randomize_batchnorm(network: nn.Module, seed: int) -> None:
    """Random statistics and affine weights in every BatchNorm of a float32 RepGhostNet (ours or timm's).

    Fresh BatchNorms are nearly the identity and hide errors. The statistics are those of some photographs,
    then moved at random, so that the signal neither fades nor grows. Scales are mostly positive and biases
    lift the signal: a random network without that amplifies the rounding errors of its first layers, until two
    correct forms of it differ by 1e-4.
    """
    generator = torch.Generator().manual_seed(seed)

    def uniform(like: Tensor, low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(like.shape, generator=generator)

    def from_input(bn: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        assert isinstance(bn, nn.BatchNorm2d) and bn.running_mean is not None and bn.running_var is not None
        var, mean = torch.var_mean(inputs[0], dim=(0, 2, 3))
        bn.running_mean.copy_(mean + var.sqrt() * uniform(mean, -0.5, 0.5))
        bn.running_var.copy_(var * uniform(var, 0.5, 2))
        bn.weight.copy_(uniform(mean, 0.5, 1.5) * uniform(mean, -0.1, 1).sign())
        bn.bias.copy_(uniform(mean, 0, 1))

    modes = {module: module.training for module in network.modules()}
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    hooks = [norm.register_forward_pre_hook(from_input) for norm in norms]
    in_channels = next(network.parameters()).shape[1]
    network.eval()(photographs(8, 96)[:, torch.arange(in_channels) % 3])
    for hook in hooks:
        hook.remove()
    for module, training in modes.items():
        module.training = training


@cache
def _photos() -> list[np.ndarray]:
    """uint8 [H, W, 3] each, from the wheels of scikit-image and scikit-learn."""
    return [
        skimage.data.astronaut(),
        skimage.data.coffee(),
        skimage.data.cat(),
        skimage.data.rocket(),
        *load_sample_images().images,
    ]


def photographs(count: int, size: int) -> Tensor:
    """float32 [count, 3, size, size], about normalized: windows of photographs, the same at every call."""
    rng = np.random.default_rng(0)
    crops = []
    for i in range(count):
        photo = _photos()[i % len(_photos())]
        side = int(rng.integers(128, 256))
        top, left = (int(rng.integers(0, length - side + 1)) for length in photo.shape[:2])
        crop = torch.from_numpy(photo[top : top + side, left : left + side].copy()).permute(2, 0, 1)[None]
        crops.append(F.interpolate(crop.float(), size=(size, size), mode="bilinear", antialias=True))
    return (torch.cat(crops) / 255 - 0.45) / 0.225


@contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    """Raises TimeoutError in what is still running after so many seconds."""

    def stop(*_: object) -> None:
        raise TimeoutError(f"still running after {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def run_script(script: str) -> str:
    """What a Python program prints that has to end by itself."""
    root = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", script], cwd=root, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout
