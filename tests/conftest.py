"""Runs of train.py and evaluate.py in this process, on small real data."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from images import make_images

import evaluate
import train
from data.write_shards.write import write_folder

# Two threads that wait for each other while something else runs are far slower than one.
torch.set_num_threads(1)

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


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skips what is marked as needing a GPU where there is none."""
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a GPU")


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes, 45 training and 15 validation images in shards of 16."""
    folder = tmp_path_factory.mktemp("photographs")
    write_folder(
        make_images(folder / "images", train=15, val=5), folder / "tiny", images_per_shard=16, workers=1, quiet=True
    )
    return folder / "tiny"


Program = Callable[..., int]


def train_in(folder: Path, *arguments: str) -> None:
    """Trains a tiny network, for fixtures that several tests share; `train_tiny` is for one test."""
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(folder)
        patched.setattr(sys, "argv", ["train.py", *TINY, *arguments])
        train.main()


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Program:
    """Calls a program's main with a command line, in an empty folder; returns the exit code."""
    monkeypatch.chdir(tmp_path)

    def program(main: Callable[[], None], *arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", [main.__module__ + ".py", *arguments])
        try:
            main()
        except SystemExit as end:
            return int(end.code or 0)
        return 0

    return program


@pytest.fixture
def train_tiny(run: Program, shards: Path) -> Program:
    """Trains a tiny network on the photographs; arguments override."""

    def train_with(*arguments: str) -> int:
        root = () if any(a.startswith(("data=", "data.root=")) for a in arguments) else (f"data.root={shards}",)
        return run(train.main, *TINY, *root, *arguments)

    return train_with


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
