"""Runs of train.py and evaluate.py in this process, on small real data.

Nothing that takes long to import is, before a fixture needs it: the process that hands the tests out needs nothing.
"""

import contextlib
import gc
import logging
import multiprocessing
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, BinaryIO

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))

import evaluate
import train

TINY = [
    "recipe=quick",
    "width=0.1",
    "image_size=32",
    "batch_size=8",
    "epochs=2",
    "trainer=cpu",
    "data.workers=0",
    "data.eval_batch_size=8",
    "recipe.warmup_epochs=1",
    "curve_seconds=1e9",
]


def use_one_thread() -> None:
    """Of torch: two that wait for each other while something else runs are far slower."""
    import torch

    torch.set_num_threads(1)


def start_autograd() -> None:
    """Now, while it finds no GPU: for a fake one, as exports have, it would start threads, and no copy could train."""
    import torch

    torch.ones(1, requires_grad=True).backward()


def take_shortcuts(patched: pytest.MonkeyPatch) -> None:
    """Leaves out what takes a third of a command on tiny data, and has tests of its own."""
    from hydra._internal.hydra import Hydra

    composed = Hydra.get_mode

    def as_typed(self: Any, config_name: str | None, overrides: list[str]) -> object:
        return composed(self, config_name, overrides) if "hydra" in "".join(overrides) else None

    def a_pixel(history: object, official: object, file: BinaryIO) -> None:
        from PIL import Image

        Image.new("L", (1, 1)).save(file, "PNG")

    # Hydra composes a config twice, to look for hydra.mode in it, which nothing but a command line sets.
    patched.setattr(Hydra, "get_mode", as_typed)
    patched.setattr("repghost.training.loggers.draw_curve", a_pixel)
    # Python looks through all that the tests imported, which pytest_collection_finish froze.
    as_it_is = SimpleNamespace(collect=int, freeze=int, unfreeze=int)
    patched.setattr("repghost.training.module.gc", as_it_is)


@pytest.fixture
def no_shortcuts() -> None:
    """A command does all that it does for a user."""


@pytest.fixture(scope="module")
def few_blocks() -> Iterator[None]:
    """Networks have few blocks in all tests of a module, and in its fixtures."""
    from helpers import use_blocks

    with pytest.MonkeyPatch.context() as patched:
        use_blocks(patched)
        yield


@pytest.fixture
def all_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Networks have the blocks of the paper, also where a command builds them."""
    from helpers import ALL_BLOCKS, use_blocks

    use_blocks(monkeypatch, ALL_BLOCKS)


def pytest_collection_finish() -> None:
    """Prepares the process for the tests: the garbage collector passes by what was imported, and comes seldom."""
    if "torch" in sys.modules:
        use_one_thread()
        start_autograd()
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 50, 100)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skips what is marked as needing a GPU where there is none."""
    if item.get_closest_marker("gpu"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("needs a GPU")


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes, 45 training and 15 validation images in shards of 16."""
    from images import make_images

    from data.write_shards.write import write_folder

    folder = tmp_path_factory.mktemp("photographs")
    write_folder(
        make_images(folder / "images", train=15, val=5), folder / "tiny", images_per_shard=16, workers=1, quiet=True
    )
    return folder / "tiny"


Program = Callable[..., int]


def train_in(folder: Path, *arguments: str) -> None:
    """Trains a tiny network, for fixtures that several tests share; `train_tiny` is for one test."""
    from helpers import use_blocks

    use_one_thread()
    with pytest.MonkeyPatch.context() as patched:
        take_shortcuts(patched)
        use_blocks(patched)
        patched.chdir(folder)
        patched.setattr(sys, "argv", ["train.py", *TINY, *arguments])
        train.main()
    end_logging()


def end_logging() -> None:
    """Takes out what Hydra lets all libraries log to: the stdout of this test, which pytest closes."""
    root = logging.getLogger()
    for handler in root.handlers[:]:
        if type(handler) is logging.StreamHandler:
            root.removeHandler(handler)
    root.setLevel(logging.WARNING)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[Program]:
    """Calls a program's main with a command line, in an empty folder; returns the exit code.

    Networks have few blocks, unless the test has the fixture `all_blocks` or `no_shortcuts`.
    """
    from helpers import use_blocks

    use_one_thread()
    monkeypatch.chdir(tmp_path)
    if "no_shortcuts" not in request.fixturenames:
        take_shortcuts(monkeypatch)
    if not {"no_shortcuts", "all_blocks"} & {*request.fixturenames}:
        use_blocks(monkeypatch)

    def program(main: Callable[[], None], *arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", [main.__module__ + ".py", *arguments])
        try:
            main()
        except SystemExit as end:
            return int(end.code or 0)
        return 0

    yield program
    end_logging()


@pytest.fixture
def train_tiny(run: Program, shards: Path) -> Program:
    """Trains a tiny network on the photographs; arguments override."""

    def train_with(*arguments: str) -> int:
        root = () if any(a.startswith(("data=", "data.root=")) for a in arguments) else (f"data.root={shards}",)
        return run(train.main, *TINY, *root, *arguments)

    return train_with


@pytest.fixture(scope="session")
def _trained(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    train_in(folder, f"data.root={shards}", "name=a", "epochs=1")
    return folder


@pytest.fixture
def finished_run(_trained: Path, run: Program) -> Path:
    """outputs/a in the folder of the test, with results/: what `train_tiny("name=a", "epochs=1")` leaves there."""
    shutil.copytree(_trained, Path(), dirs_exist_ok=True)
    return Path("outputs/a")


@pytest.fixture
def no_evaluation(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run ends with its training, for tests of what it wrote by then."""
    monkeypatch.setattr("repghost.evaluation.evaluate.evaluate_run", lambda *_: None)


@pytest.fixture
def forked_ranks(monkeypatch: pytest.MonkeyPatch, all_blocks: None) -> None:
    """The ranks of a run are copies of this process instead of new ones, which would import everything first.

    New ones all the same where a GPU has made autograd start threads, after which no copy could train: these know
    nothing of networks with few blocks.
    """
    import torch
    from torch.distributed.launcher.api import LaunchConfig

    def step() -> None:
        torch.ones(1, requires_grad=True).backward()

    copy = multiprocessing.get_context("fork").Process(target=step)
    with open(os.devnull, "w") as nothing, contextlib.redirect_stderr(nothing):
        copy.start()
    copy.join()
    if copy.exitcode:
        return
    monkeypatch.setattr("repghost.processes.LaunchConfig", partial(LaunchConfig, start_method="fork"))


@pytest.fixture
def evaluate_with(run: Program) -> Program:
    """Calls evaluate.py."""
    return lambda *arguments: run(evaluate.main, *arguments)


@pytest.fixture
def fresh_wandb(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """wandb as in a new process: it keeps the settings of the first run, and Lightning its mode in the environment."""
    import wandb

    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.delenv("WANDB_MODE")
    wandb.teardown()
    yield
    wandb.teardown()
