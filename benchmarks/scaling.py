"""What many GPUs would reach, from figures of one: prints the tables of benchmarks/scaling.md.

    python benchmarks/scaling.py
    python benchmarks/scaling.py --rate 0.5=20000 1.0=11000 2.0=6000 --core-rate 719 --cores 16

The inputs, whose defaults are assumptions wherever benchmarks/scaling.md does not name a measurement:
--rate: images/s of the step on one GPU at some widths (`step: ours` of benchmarks/train_step.py); the others follow by
their bytes of activations. --core-rate, --cores: images/s that a core decodes, and cores for each GPU. --bandwidth:
GB/s of each GPU while all reduce (`busbw` of nccl-tests), within a machine and between machines. --latency:
microseconds of a hop.

The model: a step of b images on each of n GPUs takes the longer of
    network   b / rate, and never less than the host needs to launch its kernels (--launch milliseconds)
    decode    b / (core rate x cores), which runs beside it
and after it, since one graph holds the whole backward pass and no gradient leaves before its end,
    reduce    2 (n - 1) / n x bytes / bandwidth + 2 ceil(log2 n) x latency, a tree's hops (Thakur, Rabenseifner, Gropp,
              "Optimization of collective communication operations in MPICH", 2005, section 4.5)
with 4 bytes for each parameter and for each of BatchNorm's statistics.
"""

import argparse
import math
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))

from repghost.model import WIDTHS, RepGhostNet, repghostnet

IMAGENET, EPOCHS = 1_281_167, 300
GPUS, PER_MACHINE = (1, 8, 64, 512), 8


@dataclass(frozen=True)
class Machine:
    """What everything but the width depends on: images/s, bytes/s, seconds."""

    decode: float  # for each GPU
    within: float
    between: float
    latency: float
    launch: float

    def reduce(self, size: int, gpus: int) -> float:
        """Seconds of an all-reduce of `size` bytes."""
        bandwidth = self.within if gpus <= PER_MACHINE else self.between
        return 2 * (gpus - 1) / gpus * size / bandwidth + 2 * math.ceil(math.log2(gpus)) * self.latency


def exchanged(model: RepGhostNet) -> int:
    """Bytes that are reduced after a step: gradients and floating-point buffers, float32."""
    return 4 * sum(t.numel() for t in [*model.parameters(), *model.buffers()] if t.is_floating_point())


def activations(model: RepGhostNet) -> int:
    """Values that the layers of the network write for one image of 224 x 224; nothing is computed."""
    counted = 0

    def count(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal counted
        counted += output.numel()

    for module in model.modules():
        if not list(module.children()) and not isinstance(module, nn.Identity):
            module.register_forward_hook(count)
    model.to("meta").eval()(torch.empty(1, 3, 224, 224, device="meta"))
    return counted


def rates(given: dict[float, float]) -> dict[float, float]:
    """images/s of the step at every width: those given, the others by the activations of the nearest one given."""
    values = {width: activations(repghostnet(width)) for width in WIDTHS}
    nearest = {width: min(given, key=lambda known: abs(math.log(known / width))) for width in WIDTHS}
    return {width: given[nearest[width]] * values[nearest[width]] / values[width] for width in WIDTHS}


def row(width: float, gpus: int, batch: int, rate: float, machine: Machine) -> str:
    """One line of Markdown; batch: images of a step on each GPU."""
    size = exchanged(repghostnet(width))
    network, decode, reduce = max(batch / rate, machine.launch), batch / machine.decode, machine.reduce(size, gpus)
    seconds = max(network, decode) + reduce
    reached = gpus * batch / seconds
    alone = 1 / max(1 / rate, 1 / machine.decode)
    times = {"launch" if network == machine.launch else "network": network, "decode": decode, "all-reduce": reduce}
    cells = [
        f"{width:g}", f"{gpus}", f"{batch}", f"{gpus * batch:,}", *(f"{1000 * t:.2f}" for t in times.values()),
        f"{reached:,.0f}", f"{reached / (gpus * alone):.0%}", max(times, key=lambda name: times[name]),
        f"{EPOCHS * IMAGENET / reached / 3600:.2f}",
    ]  # fmt: skip
    return f"| {' | '.join(cells)} |"


COLUMNS = ("width", "GPUs", "batch each", "batch", "network ms", "decode ms", "all-reduce ms", "images/s", "of n x one",
           "bound", "hours")  # fmt: skip
HEAD = f"| {' | '.join(COLUMNS)} |\n|{' ---: |' * len(COLUMNS)}"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rate", nargs="+", default=["0.5=10000"], metavar="WIDTH=IMAGES/S")
    parser.add_argument("--core-rate", type=float, default=719, metavar="IMAGES/S")
    parser.add_argument("--cores", type=float, default=16, metavar="N", help="for each GPU")
    parser.add_argument("--bandwidth", type=float, nargs=2, default=(300, 40), metavar="GB/S")
    parser.add_argument("--latency", type=float, default=20, metavar="US")
    parser.add_argument("--launch", type=float, default=3, metavar="MS")
    parser.add_argument("--widths", type=float, nargs="+", default=(0.5, 1.0, 2.0), metavar="WIDTH")
    options = parser.parse_args(arguments)
    given = {float(width): float(rate) for width, rate in (pair.split("=") for pair in options.rate)}
    bandwidth = [1e9 * value for value in options.bandwidth]
    machine = Machine(options.core_rate * options.cores, *bandwidth, options.latency / 1e6, options.launch / 1e3)
    rate = rates(given)
    for title, batch_of in (
        ("128 images on each GPU, the batch grows", lambda gpus: 128),
        ("The recipe's batch of 1,024, shared", lambda gpus: 1024 // gpus),
    ):
        print(f"### {title}\n\n{HEAD}")
        for width in options.widths:
            for gpus in GPUS:
                print(row(width, gpus, batch_of(gpus), rate[width], machine))
        print()


if __name__ == "__main__":
    main()
