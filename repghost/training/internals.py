"""Every private part of Lightning and torch that training relies on, each with the reason; no other file may add one.

An upgrade that moves one of them fails here first. Check: `pytest tests/test_internals.py`.
"""

import os
import warnings
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.overrides.distributed import _sync_module_states

# Where torch keeps compiled code unless TORCHINDUCTOR_CACHE_DIR says otherwise. torch writes this default into the
# variable as soon as the compiler is imported, so a value there need not be the user's.
from torch._inductor.runtime.cache_dir_utils import default_cache_dir as default_cache_dir

# Whether torch.compile can use Triton here: torch.compile itself says so only at the first step.
from torch.utils._triton import has_triton as has_triton

# Beginnings of warnings that are about Lightning's own internals, or about a sampler that it does not know.
WARNINGS = (
    r".*LeafSpec.*",
    r".*your dataloader is not resumable.*",
    r".*does not have many workers.*",
    r".*functional.all_gather.*",
    r".*`srun` command is available.*",
)

# What Lightning calls the parts of a step for its profilers: how each name ends, and the stage it belongs to.
STAGE_OF_ACTION = {
    "train_dataloader_next": "wait for data",
    ".batch_to_device": "copy to device",
    ".on_after_batch_transfer": "augment",
    ".training_step": "forward",
    ".backward": "backward",
    ".optimizer_zero_grad": "optimizer",
    ".optimizer_step": "optimizer",
    ".average": "EMA",  # ours, in TrainingModule.optimizer_step
    ".on_train_batch_start": "logging and checks",
    ".on_train_batch_end": "logging and checks",
}

# Broadcasts the parameters and buffers of rank 0, in pieces of many, as DistributedDataParallel does when it is made.
share_initial_state = _sync_module_states

# One kernel for a list of tensors. torch.optim exposes it for averaging (get_ema_multi_avg_fn), not for copying.
copy_all = torch._foreach_copy_


class LightningModule(pl.LightningModule):
    """Lightning's, which notes in itself 40 times a step what hook is running: a tenth of what its loop costs the host.

    torch would look every time whether the name is that of a parameter.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "_current_fx_name":
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)


def ignore_warnings() -> None:
    """Hides what no user can act on."""
    for message in WARNINGS:
        warnings.filterwarnings("ignore", message=message)


def disable_signal_handling(trainer: pl.Trainer) -> None:
    """Leaves signals to repghost.training.signals.

    Lightning's handler of SIGTERM starts a collective, which deadlocks when it interrupts another one; and before every
    batch Lightning broadcasts whether a signal came, for which the host waits.
    """
    connector: Any = trainer._signal_connector
    loop: Any = trainer.fit_loop.epoch_loop
    for owner, method in ((connector, "register_signal_handlers"), (loop, "_broadcast_sigterm_tensor")):
        assert callable(getattr(owner, method)), f"Lightning has no {method} any more"
        setattr(owner, method, lambda: None)


def restart_validation(checkpoint: dict[str, Any]) -> None:
    """Lets a checkpoint that is saved during a validation resume at the beginning of that validation.

    Lightning would go on with the next batch, for which the sums so far are not saved. In its counters the first batch
    was begun and none was finished, which makes it run the validation again.
    """
    progress = checkpoint["loops"]["fit_loop"]["epoch_loop.val_loop.batch_progress"]
    nothing = dict.fromkeys(("ready", "started", "processed", "completed"), 0)
    progress.update(total={**nothing, "ready": 1, "started": 1}, current=nothing, is_last_batch=False)


def rescale_batches(checkpoint: dict[str, Any], before: int, now: int) -> None:
    """Counts batches in steps of `now` batches each, where the checkpoint counts in steps of `before`."""
    progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
    for counter in (progress["total"], progress["current"]):
        running = counter["ready"] - counter["completed"]
        counter.update(dict.fromkeys(("ready", "started", "processed"), counter["ready"] * now // before))
        counter["completed"] = counter["ready"] - running


def choose_kernels_by_rule(deterministic: bool) -> None:
    """Whether the compiler chooses among kernels by rule rather than by timing them, which varies between runs."""
    torch._inductor.config.deterministic = deterministic


def limit_compile_threads(count: int) -> None:
    """How many processes of this one compile at most; TORCHINDUCTOR_COMPILE_THREADS says otherwise.

    By default every rank has as many as there are cores.
    """
    if "TORCHINDUCTOR_COMPILE_THREADS" not in os.environ:
        torch._inductor.config.compile_threads = min(32, count)  # torch's own limit
