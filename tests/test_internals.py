"""The private parts of Lightning, torch and Hydra that we rely on still are what they were.

The first tests to read after an upgrade of one.
"""

import ast
import importlib
import inspect
import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from helpers import run_script
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobStatus
from pytorch_lightning.loops import _TrainingEpochLoop
from pytorch_lightning.trainer.connectors.signal_connector import _SignalConnector

from repghost.training import internals
from repghost.training.internals import STAGE_OF_ACTION, WARNINGS

Program = Callable[..., int]
ROOT = Path(__file__).parents[1]
COUNTERS = {"ready", "started", "processed", "completed"}


class Actions(pl.profilers.Profiler):
    """Keeps the names of all actions."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def start(self, action_name: str) -> None:
        self.names.add(action_name)

    def stop(self, action_name: str) -> None:
        pass


def test_signals() -> None:
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    assert isinstance(trainer._signal_connector, _SignalConnector)
    assert isinstance(trainer.fit_loop.epoch_loop, _TrainingEpochLoop)
    internals.disable_signal_handling(trainer)
    for method in (
        trainer._signal_connector.register_signal_handlers,
        trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor,
    ):
        assert method() is None


def test_a_checkpoint_s_counters_and_a_profiler_s_actions(train_tiny: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    actions = Actions()
    monkeypatch.setattr("repghost.training.profiler.StepProfiler", lambda directory: actions)
    assert train_tiny("name=a", "epochs=1", "profile=true") == 0
    for end in STAGE_OF_ACTION:
        assert any(name.endswith(end) for name in actions.names), f"Lightning names no action ...{end} any more"
    assert any(name.endswith(".on_validation_start") for name in actions.names)

    loops = torch.load("outputs/a/checkpoints/last.ckpt", weights_only=True)["loops"]["fit_loop"]
    for loop in ("epoch_loop.batch_progress", "epoch_loop.val_loop.batch_progress"):
        progress = loops[loop]
        assert set(progress) == {"total", "current", "is_last_batch"}, loop
        assert COUNTERS == set(progress["total"]) == set(progress["current"]), loop
    assert loops["epoch_loop.batch_progress"]["current"]["ready"] == 5


# What each filtered warning says, up to the end of a line in the sources, and the module that says it.
SOURCES = {
    "LeafSpec": ("torch.utils._pytree", "`isinstance(treespec, LeafSpec)` is deprecated"),
    "your dataloader is not resumable": ("pytorch_lightning.loops.training_epoch_loop", " not resumable."),
    "does not have many workers": (
        "pytorch_lightning.trainer.connectors.data_connector",
        "does not have many workers",
    ),
    "functional.all_gather": (
        "torch.distributed.nn.functional",
        "torch.distributed.nn.functional.{name} is deprecated",
    ),
    "`srun` command is available": ("lightning_fabric.plugins.environments.slurm", "`srun` command is available on"),
}


def test_warnings_that_are_hidden_are_still_given() -> None:
    assert {f".*{words}.*" for words in SOURCES} == set(WARNINGS)
    for words, (module, text) in SOURCES.items():
        assert text in inspect.getsource(importlib.import_module(module)), words
        with warnings.catch_warnings(record=True) as caught:
            internals.ignore_warnings()
            warnings.warn(f"about {words} and more", stacklevel=1)
        assert not caught


def test_torch() -> None:
    before = torch._inductor.config.deterministic
    internals.choose_kernels_by_rule(True)
    assert torch._inductor.config.deterministic is True
    internals.choose_kernels_by_rule(before)
    assert Path(internals.default_cache_dir()).is_absolute()
    assert internals.has_triton() in (True, False)
    assert callable(internals.share_initial_state)
    targets, values = [torch.zeros(2), torch.zeros(3, dtype=torch.int64)], [torch.ones(2), torch.arange(3)]
    internals.copy_all(targets, values)
    assert all(torch.equal(a, b) for a, b in zip(targets, values, strict=True))


def test_lightning_notes_the_hook_that_runs_in_its_module() -> None:
    module = internals.LightningModule()
    module._current_fx_name = "training_step"
    assert vars(module)["_current_fx_name"] == "training_step" and module._current_fx_name == "training_step"
    module.layer = torch.nn.Linear(1, 1)
    assert len(list(module.parameters())) == 2
    hook = inspect.getsource(pl.trainer.call._call_lightning_module_hook)
    assert "pl_module._current_fx_name = hook_name" in hook


def test_inductor_has_a_rank_s_share_of_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    config = torch._inductor.config
    monkeypatch.delenv("TORCHINDUCTOR_COMPILE_THREADS", raising=False)
    with config.patch(compile_threads=20):
        internals.limit_compile_threads(3)
        assert config.compile_threads == 3
        monkeypatch.setenv("TORCHINDUCTOR_COMPILE_THREADS", "7")  # the user's, which torch has read
        internals.limit_compile_threads(5)
        assert config.compile_threads == 3


def test_hydra_and_its_launcher_for_slurm() -> None:
    """What repghost/slurm.py replaces for the time of a sweep; the second part runs in `make test-cluster`."""
    job = JobReturn(status=JobStatus.FAILED)
    job.return_value = error = ValueError()
    assert job._return_value is error, "its property would raise it"
    Plugins.instance()
    launchers = pytest.importorskip(
        "hydra_plugins.hydra_submitit_launcher.submitit_launcher", reason="the extra `sweep` is not installed"
    )
    submitit = pytest.importorskip("submitit")
    launch = inspect.signature(launchers.SlurmLauncher.launch)
    assert list(launch.parameters) == ["self", "job_overrides", "initial_job_idx"]
    assert {"params", "config"} <= vars(launchers.SlurmLauncher()).keys()
    assert ".results()[0]" in inspect.getsource(launchers.BaseSubmititLauncher.launch), "of each job"
    assert "results" in vars(submitit.core.core.Job) and issubclass(submitit.SlurmJob, submitit.core.core.Job)
    assert {"FailedJobError", "FailedSubmissionError", "UncompletedJobError"} <= vars(submitit.core.utils).keys()
    environment = submitit.core.job_environment.JobEnvironment
    assert environment.USR_SIG == "USR2", "has the job queued again"


def private_names(code: str) -> Iterator[str]:
    """Names with a leading underscore that `code` imports, or reads of anything but self and the standard library."""
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{name.name}" for name in node.names if "._" in f".{node.module}.{name.name}")
        elif isinstance(node, ast.Import):
            yield from (name.name for name in node.names if "._" in name.name)
        elif isinstance(node, ast.Attribute) and re.match("_[^_]", node.attr):
            yield from {ast.unparse(node)} - {f"self.{node.attr}", "os._exit"}


def test_no_other_file_of_training_has_private_parts() -> None:
    assert set(private_names("import a._b; from torch import _c; x._d; self._e")) == {"a._b", "torch._c", "x._d"}
    for path in Path(internals.__file__).parent.glob("*.py"):
        if path.name not in ("internals.py", "ranks.py"):
            assert list(private_names(path.read_text())) == [], path.name


# -- nothing of it at import -------------------------------------------------------------------------------------------


def test_a_process_ends_although_its_workers_ignore_signals() -> None:
    script = """
import torch
from repghost.training.signals import end_workers_at_exit, ignore_signals
end_workers_at_exit()
loader = torch.utils.data.DataLoader(range(100), num_workers=2, worker_init_fn=ignore_signals)
batches = iter(loader)
print(int(next(batches)), flush=True)
raise SystemExit  # with the iterator alive, as after an error whose traceback holds it
"""
    assert run_script(script) == "0\n"
