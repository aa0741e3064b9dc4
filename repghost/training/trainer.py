"""The Lightning Trainer of a run: devices, precision, strategy. Mistakes are found here, before any data is opened.

Check: `pytest tests/test_sweep.py tests/test_train_step.py`.
"""

import ctypes
import logging
import os
import shutil
import struct
import sysconfig
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from filelock import FileLock
from lightning_fabric.plugins import CheckpointIO
from pytorch_lightning.profilers import PassThroughProfiler
from pytorch_lightning.strategies import DDPStrategy
from pytorch_lightning.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from repghost.errors import UserError
from repghost.machine import cpus_per_rank, limit_threads
from repghost.ranks import choose_devices, environment
from repghost.training.internals import (
    choose_kernels_by_rule,
    default_cache_dir,
    disable_signal_handling,
    has_triton,
    ignore_warnings,
    limit_compile_threads,
    share_initial_state,
)

PRECISIONS = {"float32": "32-true", "bf16": "bf16-mixed", "fp16": "16-mixed"}
_NOTHING = nullcontext()
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of mallopt(3), from malloc.h


def make_trainer(
    *,
    accelerator: str,
    devices: int | str,
    num_nodes: int,
    precision: str,
    deterministic: bool,
    threads: int | None,
    timeout_minutes: float,
    directory: Path,
    epochs: int | None = None,
    batch_size: int | None = None,
    accumulate: int = 1,
    callbacks: Sequence[pl.Callback] = (),
    plugins: Sequence[CheckpointIO] = (),
    **options: Any,
) -> pl.Trainer:
    """A Trainer with what every run of this project shares.

    accelerator: `cpu`, `gpu`, or `auto` (a GPU where there is one). devices: how many, or `auto` (every GPU, one CPU
    process; what torchrun or srun started here). precision: `float32`, `bf16`, `fp16`, or `auto` (bf16 where the GPU
    has it, fp16 on an older one, float32 on a CPU). threads: of PyTorch in each process, None for PyTorch's choice, at
    most its share of the cores.
    timeout_minutes: how long a rank waits for the others before it gives up. Only a training has epochs, accumulate and
    a batch_size, the global one, which is cut into `devices * num_nodes * accumulate` equal parts. options: of
    pl.Trainer.
    """
    accelerator, devices = choose_devices(accelerator, devices, num_nodes)
    distributed = devices * num_nodes > 1
    _set_up_process(accelerator, threads, distributed)
    trainer = pl.Trainer(
        accelerator=accelerator,
        devices=devices,
        num_nodes=num_nodes,
        precision=PRECISIONS[resolve_precision(precision, accelerator)],  # type: ignore[arg-type]
        strategy=_distributed(accelerator, timeout_minutes) if distributed else "auto",
        max_epochs=epochs,
        accumulate_grad_batches=accumulate,
        deterministic=deterministic,
        benchmark=not deterministic,
        default_root_dir=directory,
        callbacks=[_Threads(choose=threads is None), *callbacks],
        plugins=[*plugins, environment()],
        log_every_n_steps=0,  # the loggers get whole epochs
        use_distributed_sampler=False,  # the data module knows the ranks
        num_sanity_val_steps=0,  # it would start the loaders before a resumed run's position is known
        enable_model_summary=False,
        **{"logger": False, **options, "profiler": options.get("profiler") or _NoProfiler()},
    )
    disable_signal_handling(trainer)
    return trainer


def _set_up_process(accelerator: str, threads: int | None, distributed: bool) -> None:
    ignore_warnings()
    if threads is not None:
        torch.set_num_threads(threads)
        if distributed:  # Lightning would choose another number for a rank that does not have this variable
            os.environ["OMP_NUM_THREADS"] = str(threads)
    if accelerator == "cpu":
        keep_freed_memory()
    # Float32 means float32: TensorFloat-32 convolutions would cost the fused model its 1e-5.
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    for library in ("pytorch_lightning", "lightning_fabric", "lightning.fabric"):
        logging.getLogger(library).setLevel(logging.WARNING)


class _NoProfiler(PassThroughProfiler):
    """Measures nothing, at a fraction of what Lightning's takes for it, around 84 actions a step."""

    def profile(self, action_name: str) -> AbstractContextManager[None]:  # type: ignore[override]
        return _NOTHING


class _Threads(pl.Callback):
    """Shares the cores among the ranks, which know each other when this is called. choose: PyTorch's threads, too."""

    def __init__(self, choose: bool) -> None:
        self._choose = choose

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if self._choose:
            limit_threads()
        limit_compile_threads(cpus_per_rank())


def resolve_precision(precision: str, accelerator: str) -> str:
    """The precision that `auto` stands for on this machine; any other one is returned."""
    if precision == "auto" and accelerator == "gpu":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    if precision == "auto":
        return "float32"
    if precision == "fp16" and accelerator != "gpu":
        raise UserError("precision=fp16 needs a GPU; a CPU has float32 and bf16")
    return precision


def keep_freed_memory() -> None:
    """Lets glibc keep what this process frees, so that the next step finds it mapped; without glibc nothing is done.

    By default every large tensor is mapped afresh and its pages are zeroed when they are touched: a sixth of a
    training step on a CPU (benchmarks/NOTES.md). Costs about 5% more memory at the peak.
    """
    if mallopt := getattr(ctypes.CDLL(None), "mallopt", None):
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


class _DataParallel(DDPStrategy):
    """A network on every rank, without DistributedDataParallel around it.

    TrainingModule averages the gradients itself: in one all-reduce with all else that the ranks exchange in a step,
    and with the compiled step as one graph, which DistributedDataParallel cuts into one for each of its buckets.
    """

    def configure_ddp(self) -> None:
        assert self.model is not None
        share_initial_state(self.model)


def _distributed(accelerator: str, timeout_minutes: float) -> DDPStrategy:
    backend = "nccl" if accelerator == "gpu" else "gloo"
    return _DataParallel(process_group_backend=backend, timeout=timedelta(minutes=timeout_minutes))


def compiles(wanted: bool | str, device: torch.device) -> bool:
    """Whether to compile for `device`: true, false, or `auto`: on GPUs, where it pays within minutes.

    Raises UserError where it is wanted (`true`) and impossible; `auto` warns and goes without.
    """
    if wanted not in (True, False, "auto"):
        raise UserError(f"compile={wanted} is not one of auto, true, false")
    if not wanted or (wanted == "auto" and device.type != "cuda"):
        return False
    problem = _missing_for_compiling(device.type)
    if problem and wanted != "auto":
        raise UserError(f"compile=true is impossible here: {problem}; compile=false goes without")
    if problem:
        rank_zero_warn(f"compile=auto: the training step is not compiled, which is slower: {problem}")
    return problem is None


def compile_step(function: Callable[..., Tensor], mode: str = "default") -> Callable[..., Tensor]:
    """`function` as one graph for one shape, deterministic where PyTorch's algorithms have to be.

    mode: of torch.compile. `reduce-overhead` replays the kernels of a step as CUDA graphs; on a CPU it changes nothing.
    """
    choose_kernels_by_rule(torch.are_deterministic_algorithms_enabled())
    compiled = torch.compile(function, fullgraph=True, dynamic=False, mode=mode)
    if mode != "reduce-overhead":
        return compiled

    def replayed(*arguments: Tensor) -> Tensor:
        torch.compiler.cudagraph_mark_step_begin()
        return compiled(*arguments).clone()  # the next replay writes into the same memory

    return replayed


def keep_compiled(folder: str | Path) -> None:
    """Keeps compiled code in `folder`, so that the next run starts warm, unless TORCHINDUCTOR_CACHE_DIR says where.

    torch's default is in the temporary folder, which neither a reboot nor a cluster's next job finds again. What a
    process that was killed left half written there is removed, since torch would load it again and again.
    """
    if os.environ.get("TORCHINDUCTOR_CACHE_DIR", default_cache_dir()) == default_cache_dir():
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(Path(folder).expanduser().resolve())
    _remove_damaged(Path(os.environ["TORCHINDUCTOR_CACHE_DIR"]))


def _remove_damaged(folder: Path) -> None:
    """Removes libraries without their end, unless another process is compiling (torch's locks).

    A compiler writes them in place, and torch everything else whole.
    """
    if any(_is_held(lock) for lock in folder.glob("locks/*.lock")):
        return
    for library in folder.rglob("*.so"):
        if not _is_whole(library):
            library.unlink()


def _is_held(lock: Path) -> bool:
    with suppress(OSError), FileLock(lock, timeout=0):
        return False
    return True


def _is_whole(library: Path) -> bool:
    """Whether a library (elf(5), 64 bits) reaches to the end of its section headers, the last thing in it."""
    with open(library, "rb") as file:
        header = file.read(64)
    if len(header) < 64 or header[:4] != b"\x7fELF":
        return False
    start, size, count = struct.unpack_from("=40xQ10xHH", header)
    return library.stat().st_size >= start + size * count


def _missing_for_compiling(device_type: str) -> str | None:
    """What torch.compile lacks on this machine, None if nothing. torch itself says so only at the first step."""
    variable, names = ("CC", ("cc", "gcc", "clang")) if device_type == "cuda" else ("CXX", ("g++", "clang++"))
    header = Path(sysconfig.get_path("include")) / "Python.h"
    if device_type == "cuda" and not has_triton():
        return "there is no Triton for this GPU"
    if not any(map(shutil.which, [os.environ[variable]] if variable in os.environ else names)):
        return f"no compiler was found ({', '.join(names)}, or the one that {variable} names)"
    return None if header.exists() else f"{header} is missing (the headers of Python, often a package python3-dev)"
