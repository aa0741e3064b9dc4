"""torch.compile: where it is used, what it needs, and where compiled code is kept.

The training step is compiled as one graph, network and loss, forward and backward; the augmentation as another. Both
have one shape a run, so nothing is compiled again after the first step. Check: `pytest tests/test_train_step.py`.
"""

import os
import shutil
import sysconfig
from collections.abc import Callable
from pathlib import Path

import torch
import torch._inductor.config
from pytorch_lightning.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from torch._inductor.runtime.cache_dir_utils import default_cache_dir
from torch.utils._triton import has_triton

from repghost.errors import UserError

_CACHE = "TORCHINDUCTOR_CACHE_DIR"
# The variables that name a compiler, and what is looked for without them: C for Triton, C++ for CPUs.
_COMPILERS = {"cuda": ("CC", ("cc", "gcc", "clang")), "cpu": ("CXX", ("g++", "clang++"))}


def compiles(wanted: bool | str, device: torch.device) -> bool:
    """Whether to compile for `device`: true, false, or `auto`, which is where it pays within minutes: on GPUs.

    Raises UserError where it is wanted (`true`) and impossible; `auto` goes without, and says so.
    """
    if wanted not in (True, False, "auto"):
        raise UserError(f"compile={wanted} is not one of auto, true, false")
    if not wanted or (wanted == "auto" and device.type != "cuda"):
        return False
    problem = _missing(device)
    if problem and wanted != "auto":
        raise UserError(f"compile=true is impossible here: {problem}; compile=false goes without")
    if problem:
        rank_zero_warn(f"compile=auto: the training step is not compiled, which is slower: {problem}")
    return problem is None


def compile_step(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`function` as one graph for one shape; deterministic, where PyTorch's algorithms are to be."""
    torch._inductor.config.deterministic = torch.are_deterministic_algorithms_enabled()  # kernels by rule, not by time
    return torch.compile(function, fullgraph=True, dynamic=False)


def keep_compiled(folder: str | Path) -> None:
    """Keeps what is compiled in `folder`, so that the next run starts warm, unless TORCHINDUCTOR_CACHE_DIR says where.

    PyTorch's own choice is in the temporary folder, which neither a reboot nor a cluster's next job finds again. It
    writes that choice into the variable as soon as it is imported.
    """
    if os.environ.get(_CACHE, default_cache_dir()) == default_cache_dir():
        os.environ[_CACHE] = str(Path(folder).expanduser().resolve())


def _missing(device: torch.device) -> str | None:
    """What torch.compile lacks on this machine, None if nothing."""
    if device.type == "cuda" and not has_triton():
        return "there is no Triton for this GPU"
    variable, names = _COMPILERS["cuda" if device.type == "cuda" else "cpu"]
    if not any(map(shutil.which, [os.environ[variable]] if variable in os.environ else names)):
        return f"no compiler was found ({', '.join(names)}, or the one that {variable} names)"
    header = Path(sysconfig.get_path("include")) / "Python.h"
    if not header.exists():
        return f"{header} is missing (the headers of Python, often a package python3-dev)"
    return None
