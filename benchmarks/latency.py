"""Latency of RepGhostNet and of its peers: training form, timm's reparameterized form and this project's fused form.

    python benchmarks/latency.py                                    (three widths, five peers: under ten minutes)
    python benchmarks/latency.py --widths all --peers all --backends eager compiled onnxruntime executorch --seconds 300
    python benchmarks/latency.py --detectors retinanet ssdlite --widths 1.0 --image-size 640 --batches 1
    python benchmarks/latency.py --import phone.csv                 (adds what was measured elsewhere)

All that has the same batch and threads takes turns in one process, in another order every round. A turn is one call
that does not count and then a few that do. A figure is the median over all calls, with the 10th and 90th percentile; a
ratio is the median of the ratios of the rounds, with their range, so that what else the machine does hits both sides.
--out keeps a row a figure: rows of the same machine and setting are replaced, others stay. Absolute figures belong to a
machine, ratios travel.

On a GPU a call ends when the GPU is done, so that small batches measure launching and waiting as well, and onnxruntime
copies images there and results back. A backend that cannot run there is left out, and each row names the device that
ran. float32 is float32: TensorFloat-32 is off.

Backends: `eager` is torch as it is, in inference mode; each network runs in the memory format in which it was faster
just before (the column says which), and timm's reparameterized RepGhostNet contiguous too, as timm gives it. `compiled`
is torch.compile in the format that was faster in eager mode. `onnxruntime`, `executorch`, `openvino`, `litert` and
`ncnn` run what `repghost.export` writes of the fused network, and of others what the same exporter writes of them as
they are; "onnxruntime int8" and so on its INT8, of fused networks only. Weights are random:
latency does not depend on them. Peers are in timm's form, reparameterized where timm can: in `eager` they and timm's
RepGhostNet keep BatchNorm, the other backends can fold it. Their accuracies are published. Check: `pytest
tests/test_latency.py`.
"""

import argparse
import importlib.util
import random
import sys
import tempfile
from collections.abc import Sequence
from datetime import date
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.common import described, kernels_of_training, machine
from benchmarks.latency_calls import (
    FORMS,
    INT8,
    PACKAGES,
    Exports,
    cannot_run,
    detectors,
    networks,
    prepare,
    quantizable,
    set_threads,
    take_turns,
)
from benchmarks.latency_rows import imported, merge, print_ratios, row_of
from repghost import WIDTHS
from repghost.errors import UserError, run_command
from repghost.figures import draw_accuracy, read_latency
from repghost.machine import available_cpus
from repghost.reference import peers
from repghost.results import read_results

ROOT = Path(__file__).parents[1]
PEERS = ("ghostnet_100", "mobilenetv3_large_100", "mobilenetv2_100", "mobileone_s1", "mobilenetv4_conv_small")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--widths", nargs="+", default=["0.5", "1.0", "2.0"], help="of RepGhostNet, or all (default: %(default)s)")
    add("--forms", nargs="+", choices=FORMS, default=FORMS, help="of RepGhostNet (default: all three)")
    add("--peers", nargs="*", default=list(PEERS), help="names in reference/peers.csv, or all (default: %(default)s)")
    add("--detectors", nargs="+", default=[], help="of conf/detector, eager, at --widths, instead of the classifiers")
    add("--backends", nargs="+", choices=PACKAGES, default=["eager", "onnxruntime"], help="(default: %(default)s)")
    add("--batches", nargs="+", type=int, default=[1, 32], help="images a call (default: %(default)s)")
    add("--threads", nargs="+", type=int, default=sorted({1, available_cpus()}), help="(default: 1 and all cores)")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="(default: %(default)s)")
    add("--image-size", type=int, default=224, help="in pixels (default: %(default)s)")
    add("--repetitions", type=int, default=30, help="rounds, at most (default: %(default)s)")
    add("--seconds", type=float, default=60, help="of rounds for each batch and threads (default: %(default)s)")
    add("--seed", type=int, default=0, help="of the order of turns (default: %(default)s)")
    add("--out", type=Path, default=ROOT / "results" / "latency.csv", help="CSV file (default: results/latency.csv)")
    add("--figure", action="store_true", help="draw accuracy.png and accuracy.svg beside the CSV file")
    add("--import", type=Path, dest="imported", help="measure nothing, add the rows of this CSV file to --out")
    return parser


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows of all that `options` name; prints as it goes."""
    families = {row["name"].partition(".")[0]: row["family"] for row in peers()}
    others = [name for name, family in families.items() if family != "RepGhostNet"]
    chosen = others if options.peers == ["all"] else options.peers
    if unknown := [name for name in chosen if name not in others]:
        raise UserError(f"--peers {unknown[0]} is not one of {', '.join(others)}")
    widths = WIDTHS if options.widths == ["all"] else [_width(text) for text in options.widths]
    backends = [b for b in options.backends if importlib.util.find_spec(PACKAGES[b].replace("-", "_"))]
    if missing := set(options.backends) - set(backends):
        print(f"not installed, left out: {', '.join(sorted(missing))}")
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch finds no GPU here")
    for backend in [*backends]:
        if reason := cannot_run(backend, device):
            print(f"{backend}, left out: {reason}")
            backends.remove(backend)
    if not backends:
        raise UserError(f"--backends {' '.join(options.backends)}: none of them runs on --device {options.device} here")
    kernels_of_training()  # float32 is float32 on a GPU
    facts = machine(device)
    versions = {PACKAGES[backend]: version(PACKAGES[backend]) for backend in backends}
    print(described({**facts, **versions}), flush=True)
    # On a GPU the processor's threads do nothing.
    all_threads = options.threads if device.type == "cpu" else [1]
    # Every network has the same code, and torch gives up on code that it has compiled eight times.
    torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit = 10_000
    if options.detectors:
        made, backends = list(detectors(options.detectors, widths, options.forms)), ["eager"]
    else:
        made = list(networks(widths, options.forms, chosen))
    rng, rows = random.Random(options.seed), []
    fastest: dict[Any, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        exports = Exports(Path(folder), options.image_size)
        for threads in all_threads:
            set_threads(threads, backends)
            for batch in options.batches:
                images = torch.randn(batch, 3, options.image_size, options.image_size, device=device)
                pairs = [(n, b) for n in made for b in backends if not b.endswith(INT8) or quantizable(n)]
                prepared = [prepare(n, b, images, threads, exports, fastest) for n, b in pairs]
                candidates = list(chain.from_iterable(prepared))
                take_turns(candidates, options.repetitions, options.seconds, rng)
                setting = {
                    "machine": facts["device"], "threads": threads, "batch": batch,
                    "image_size": options.image_size, "date": date.today().isoformat(),
                }  # fmt: skip
                rows += [row_of(candidate, setting) for candidate in candidates]
                rounds = len(candidates[0].rounds)
                print_ratios(candidates, f"batch {batch}, {threads} thread(s), {rounds} rounds")
    return rows


def _width(text: str) -> float:
    width = next((w for w in WIDTHS if f"{w:g}" == text or str(w) == text), None)
    if width is None:
        raise UserError(f"--widths {text} is not one of {', '.join(map(str, WIDTHS))}, or all")
    return width


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures, or imports, and writes."""
    options = _parser().parse_args(arguments)
    rows = imported(options.imported) if options.imported else measure(options)
    merge(options.out, rows)
    print(f"\n{len(rows)} rows in {options.out}")
    if options.figure:
        results = read_results(options.out.parent / "results.csv")
        print(*draw_accuracy(results, "imagenet", options.out.parent, read_latency(options.out)), sep="\n")


if __name__ == "__main__":
    sys.exit(run_command(main))
