"""What a training step costs the main thread beside the network: CPU time of Lightning, hooks, callbacks, averages.

    python benchmarks/host_time.py
    python benchmarks/host_time.py trainer.devices=2

On a GPU the main thread has to queue every step faster than the device computes it, so what it spends on anything else
is time that the device may wait for. Here `train.py` trains on the embedded digits on a CPU, with stand-ins for forward
and backward pass, optimizer and augmentation, which compute nothing; what they and the loader take is left out of the
CPU time of the main thread (`time.thread_time`). The network is tiny (0.1x) with as many layers as any: what remains is
the work for each tensor, not for each number in it.
"""

import argparse
import sys
import time
from collections import Counter
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import pytorch_lightning as pl
import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig
from torch import Tensor
from torch.optim import SGD

sys.path.insert(0, str(Path(__file__).parents[1]))

import train
from benchmarks.common import ROOT
from data.augment import Augment
from repghost.errors import print_rank_zero
from repghost.processes import run_on_devices
from repghost.run import open_run
from repghost.training.classifier import ImageClassifier
from repghost.training.ema import WeightAverage

RUN = [
    "data=digits", "recipe=quick", "width=0.1", "image_size=32", "batch_size=8", "epochs=2", "recipe.warmup_epochs=1",
    "trainer=cpu", "trainer.threads=1", "data.workers=0", "curve_seconds=1e9", "name=host",
]  # fmt: skip
LEFT_OUT = ("network", "optimizer", "augmentation", "loader")
AVERAGE = "average of the weights"
WARM_UP = 20  # steps


class Stopwatch:
    """CPU time of this thread by part; a part that calls another stops meanwhile."""

    def __init__(self) -> None:
        self.steps: list[Counter[str]] = [Counter()]
        self._parts = ["rest"]
        self._since = time.thread_time()

    def switch(self) -> None:
        """Counts the time since the last switch as the current part's."""
        now = time.thread_time()
        self.steps[-1][self._parts[-1]] += now - self._since  # type: ignore[assignment]
        self._since = now

    def count(self, owner: Any, method: str, part: str, instead: Callable[..., Any] | None = None) -> None:
        """Counts calls of `owner.method`, or of what is called `instead`, as `part`."""
        original = instead or getattr(owner, method)

        @wraps(original)
        def counted(*arguments: Any, **options: Any) -> Any:
            self.switch()
            self._parts.append(part)
            try:
                return original(*arguments, **options)
            finally:
                self.switch()
                self._parts.pop()

        setattr(owner, method, counted)

    def end_step(self) -> None:
        self.switch()
        self.steps.append(Counter())


def put_stand_ins(watch: Stopwatch) -> None:
    """Lets network, optimizer and augmentation compute nothing."""
    gradients: list[tuple[Tensor, Tensor]] = []

    def loss(self: ImageClassifier, images: Tensor, labels: Tensor) -> Tensor:
        if not gradients:
            gradients.extend((parameter, torch.zeros_like(parameter)) for parameter in self.model.parameters())
        return self.model.classifier.bias.sum()

    def backward(self: Tensor, *_: Any, **__: Any) -> None:
        for parameter, gradient in gradients:
            parameter.grad = gradient

    def step(self: SGD, closure: Callable[[], Any]) -> Any:
        with torch.enable_grad():
            return closure()

    watch.count(ImageClassifier, "_network_and_loss", "network", loss)
    watch.count(Tensor, "backward", "network", backward)
    watch.count(SGD, "step", "optimizer", step)
    watch.count(SGD, "zero_grad", "optimizer")
    watch.count(pl.loops.optimization.automatic.Closure, "closure", "rest")  # which SGD calls
    watch.count(Augment, "train", "augmentation", lambda self, images, *_, **__: images)
    watch.count(pl.loops.fetchers._DataFetcher, "__next__", "loader")
    watch.count(WeightAverage, "update", AVERAGE)


def measured_run(config: DictConfig) -> None:
    """Trains, as one of the ranks; the first one prints the medians of its steps."""
    watch = Stopwatch()
    put_stand_ins(watch)
    loop = pl.loops.training_epoch_loop._TrainingEpochLoop
    advance = loop.advance

    def advance_and_count(self: Any, data_fetcher: Any) -> None:
        advance(self, data_fetcher)
        watch.end_step()

    loop.advance = advance_and_count  # type: ignore[method-assign]
    train.train(config)
    steps = watch.steps[WARM_UP:-1]
    print_rank_zero(f"\nmedians of {len(steps)} steps, CPU time of the main thread of the first rank")
    for part in ("rest", AVERAGE):
        print_rank_zero(f"{1e3 * median(step[part] for step in steps):8.3f} ms  {part}")
    both = median(step["rest"] + step[AVERAGE] for step in steps)
    print_rank_zero(f"{1e3 * both:8.3f} ms  in all, without {', '.join(LEFT_OUT)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", help="of train.py, such as trainer.devices=2")
    options = parser.parse_args()
    with TemporaryDirectory() as folder, initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        places = [f"output={folder}", f"results={folder}/results.csv", f"data.cache={folder}/cache"]
        config = compose("train", [*RUN, *places, *options.overrides])
        GlobalHydra.instance().clear()
        _, config = open_run(config)
        run_on_devices(measured_run, config)


if __name__ == "__main__":
    main()
