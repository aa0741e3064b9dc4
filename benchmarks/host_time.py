"""What a training step costs the main thread beside the network: CPU time of Lightning, hooks, callbacks, averages.

    python benchmarks/host_time.py
    python benchmarks/host_time.py trainer.devices=2

On a GPU the main thread has to queue every step faster than the device computes it, so what it spends on anything else
is time that the device may wait for. Here `train.py` trains on the embedded digits on a CPU, and the CPU time of the
main thread (`time.thread_time`) is taken apart: forward and backward pass, SGD, augmentation and decoding are left out.
The network is tiny (0.1x), with as many layers as any, so that what remains is work for each tensor, not each number.
"""

import argparse
import time
from collections import Counter
from collections.abc import Callable
from functools import wraps
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import pytorch_lightning as pl
import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig

import train
from benchmarks.common import ROOT
from data.datamodule import ImageNetTraining
from repghost.errors import print_rank_zero
from repghost.ranks import run_on_devices
from repghost.run import open_run
from repghost.training.classifier import ImageClassifier
from repghost.training.ema import WeightAverage

RUN = [
    "data=digits", "recipe=quick", "width=0.1", "image_size=32", "batch_size=16", "epochs=2", "recipe.warmup_epochs=1",
    "trainer=cpu", "trainer.threads=1", "data.workers=0", "curve_seconds=1e9", "name=host",
]  # fmt: skip
LEFT_OUT = ("network", "optimizer", "augmentation", "data")
WARM_UP = 20  # steps


class Stopwatch:
    """CPU time of this thread by part; a part that calls another stops meanwhile."""

    def __init__(self) -> None:
        self.steps: list[Counter[str]] = [Counter()]
        self._parts = ["rest"]
        self._since = time.thread_time()

    def _switch(self) -> None:
        now = time.thread_time()
        self.steps[-1][self._parts[-1]] += now - self._since  # type: ignore[assignment]
        self._since = now

    def measure(self, owner: Any, method: str, part: str) -> None:
        """Counts calls of `owner.method` as `part`."""
        original = getattr(owner, method)

        @wraps(original)
        def measured(*arguments: Any, **options: Any) -> Any:
            self._switch()
            self._parts.append(part)
            try:
                return original(*arguments, **options)
            finally:
                self._switch()
                self._parts.pop()

        setattr(owner, method, measured)

    def end_step(self) -> None:
        self._switch()
        self.steps.append(Counter())


def measured_run(config: DictConfig) -> None:
    """Trains, as one of the ranks; the first one prints the medians of its steps."""
    watch = Stopwatch()
    watch.measure(ImageClassifier, "_network_and_loss", "network")
    watch.measure(torch.Tensor, "backward", "network")
    watch.measure(torch.optim.SGD, "step", "optimizer")
    watch.measure(ImageClassifier, "training_step", "rest")  # SGD calls it
    watch.measure(ImageNetTraining, "on_after_batch_transfer", "augmentation")
    watch.measure(WeightAverage, "update", "average of the weights")
    watch.measure(pl.loops.fetchers._DataFetcher, "__next__", "data")
    after(pl.loops.training_epoch_loop._TrainingEpochLoop, "advance", watch.end_step)
    train.train(config)
    steps = watch.steps[WARM_UP:-1]
    rest = [sum(part for name, part in step.items() if name not in LEFT_OUT) for step in steps]
    print_rank_zero(f"{len(steps)} steps, main thread of the first rank, medians in ms of CPU time")
    for part in dict.fromkeys(name for step in steps for name in step):
        print_rank_zero(f"{1e3 * median(step[part] for step in steps):8.3f}  {part}")
    print_rank_zero(f"{1e3 * median(rest):8.3f}  in all, without {', '.join(LEFT_OUT)}")


def after(owner: Any, method: str, event: Callable[[], None]) -> None:
    """Lets `event` follow every call of `owner.method`."""
    original = getattr(owner, method)

    @wraps(original)
    def wrapped(*arguments: Any, **options: Any) -> Any:
        result = original(*arguments, **options)
        event()
        return result

    setattr(owner, method, wrapped)


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
