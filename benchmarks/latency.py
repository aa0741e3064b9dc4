"""Latency of RepGhostNet and of its peers: training form, timm's reparameterized form and this project's fused form.

    python benchmarks/latency.py                                    (three widths, five peers: under ten minutes)
    python benchmarks/latency.py --widths all --peers all --backends eager compiled onnxruntime executorch --seconds 300
    python benchmarks/latency.py --import phone.csv                 (adds what was measured elsewhere)

All that has the same batch and threads takes turns in one process, in another order every round. A turn is one call
that does not count and then a few that do. A figure is the median over all calls, with the 10th and 90th percentile; a
ratio is the median of the ratios of the rounds, with their range, so that what else the machine does hits both sides.
--out keeps a row a figure: rows of the same machine and setting are replaced, others stay. Absolute figures belong to a
machine, ratios travel.

Backends: `eager` is torch as it is, in inference mode; each network runs in the memory format in which it was faster
just before (the column says which), and timm's reparameterized RepGhostNet contiguous too, as timm gives it. `compiled`
is torch.compile in the format that was faster in eager mode. `onnxruntime` runs what `repghost.export` writes of the
fused network, and of others what torch's exporter writes. `executorch` is a program for XNNPACK. Weights are random:
latency does not depend on them. Peers are in timm's form, reparameterized where timm can: in `eager` they and timm's
RepGhostNet keep BatchNorm, the other backends can fold it. Their accuracies are published. Check: `pytest
tests/test_latency.py`.
"""

import argparse
import copy
import csv
import importlib.util
import io
import os
import platform
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import date
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import timm
import torch
from timm.utils.model import reparameterize_model
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))

from repghost import WIDTHS, RepGhostNet, reparameterize, repghostnet
from repghost.errors import UserError
from repghost.export.formats import Deployable, Deployment, quiet, write_executorch, write_onnx
from repghost.figures import draw_accuracy, read_latency
from repghost.files import write_text
from repghost.reference import peers
from repghost.results import read_results

ROOT = Path(__file__).parents[1]
COLUMNS = (
    "model", "family", "width", "form", "backend", "device", "machine", "threads", "batch", "image_size",
    "memory_format", "median_ms", "p10_ms", "p90_ms", "images_per_second", "top1", "versions", "date",
)  # fmt: skip
KEY = (
    "model",
    "form",
    "backend",
    "device",
    "machine",
    "threads",
    "batch",
    "image_size",
    "memory_format",
)  # what a row is a figure of
TRAINING, TIMM, FUSED = "training", "timm_reparameterized", "fused"
FORMS = (TRAINING, TIMM, FUSED)
TORCH = ("eager", "compiled")  # the backends that know memory formats
PACKAGES = {"eager": "torch", "compiled": "torch", "onnxruntime": "onnxruntime", "executorch": "executorch"}
PEERS = ("ghostnet_100", "mobilenetv3_large_100", "mobilenetv2_100", "mobileone_s1", "mobilenetv4_conv_small")
CONTIGUOUS = "contiguous"
MEMORY_FORMATS = {CONTIGUOUS: torch.contiguous_format, "channels_last": torch.channels_last}
LEAST_ROUNDS = 3  # however long they take
TURN = 0.05  # seconds of counted calls in a turn, at most CALLS of them
CALLS = 20
MATCHED = 1.5  # points of Top-1 within which a RepGhostNet and a peer are compared

Call = Callable[[], Any]


@dataclass(frozen=True)
class Network:
    """One network in one form. width: None for peers. top1: published, in percent; None where nothing is."""

    model: str
    family: str
    width: float | None
    form: str
    module: nn.Module
    top1: str


@dataclass
class Candidate:
    """A network in a backend, with the durations (seconds) of its calls, a list for every round."""

    network: Network
    backend: str
    call: Call
    memory_format: str
    calls: int
    rounds: list[list[float]]


# --- what is measured -----------------------------------------------------------------------------


def networks(widths: Sequence[float], forms: Sequence[str], others: Sequence[str]) -> Iterator[Network]:
    """RepGhostNet at all widths in all forms, with the same weights, and the peers."""
    published = {row["name"].partition(".")[0]: row for row in peers()}
    for width in widths:
        name = f"repghostnet_{round(100 * width):03d}"
        trained = timm.create_model(name).eval()
        own = repghostnet(width)
        own.load_state_dict(trained.state_dict())
        made: dict[str, nn.Module] = {TRAINING: own.eval(), FUSED: reparameterize(own)}
        made[TIMM] = reparameterize_model(trained)
        for form in forms:
            yield Network(name, "RepGhostNet", width, form, made[form], published[name]["top1"])
    for name in others:
        module = reparameterize_model(timm.create_model(name).eval())
        yield Network(name, published[name]["family"], None, TIMM, module, published[name]["top1"])


class Exports:
    """The exported files of networks, each written once, in a folder that goes with the process."""

    def __init__(self, folder: Path, image_size: int) -> None:
        self._folder, self._image_size = folder, image_size

    def onnx(self, network: Network) -> Path:
        """For batches of any size."""
        path = self._folder / f"{network.model}-{network.form}.onnx"
        if not path.exists():
            with quiet():
                if isinstance(network.module, RepGhostNet) and network.form == FUSED:
                    deployment = Deployment(self._image_size, batch=None)
                    write_onnx(Deployable(copy.deepcopy(network.module), deployment), deployment, path, 18, {})
                else:
                    free = ({0: torch.export.Dim("batch", min=1, max=2**16)},)
                    example = (torch.zeros(2, 3, self._image_size, self._image_size),)
                    program = torch.export.export(network.module, example, dynamic_shapes=free)
                    exported = torch.onnx.export(
                        program, example, dynamo=True, verbose=False, opset_version=18, dynamic_shapes=free
                    )
                    assert exported is not None
                    path.write_bytes(exported.model_proto.SerializeToString())
        return path

    def executorch(self, network: Network, batch: int) -> Path:
        path = self._folder / f"{network.model}-{network.form}-{batch}.pte"
        if not path.exists():
            with quiet():
                example = (torch.zeros(batch, 3, self._image_size, self._image_size),)
                write_executorch(torch.export.export(network.module, example), path, {})
        return path


def prepare(
    network: Network, backend: str, images: Tensor, threads: int, exports: Exports, fastest: dict[Any, str]
) -> list[Candidate]:
    """The network in the backend, warmed up. fastest: the memory formats found so far, by network and setting."""
    batch = len(images)
    if backend == "onnxruntime":
        calls = {CONTIGUOUS: _onnxruntime_call(exports.onnx(network), images, threads)}
    elif backend == "executorch":
        calls = {CONTIGUOUS: _executorch_call(exports.executorch(network, batch), images)}
    else:
        key = (network.model, network.form, threads, batch)
        if key not in fastest:
            fastest[key] = _faster({name: _torch_call(network, name, images) for name in MEMORY_FORMATS})
        names = {fastest[key]}
        if backend == "eager" and network.form == TIMM and network.width is not None:
            names.add(CONTIGUOUS)
        calls = {name: _torch_call(network, name, images, backend == "compiled") for name in sorted(names)}
    candidates = []
    for memory_format, call in calls.items():
        for _ in range(2):
            call()
        seconds = min(_timed(call) for _ in range(2))
        in_turn = max(1, min(CALLS, int(TURN / seconds)))
        candidates.append(Candidate(network, backend, call, memory_format, in_turn, []))
    return candidates


def _torch_call(network: Network, memory_format: str, images: Tensor, compiled: bool = False) -> Call:
    device, torch_format = images.device, MEMORY_FORMATS[memory_format]
    module = copy.deepcopy(network.module).to(device).to(memory_format=torch_format)
    function = torch.compile(module, dynamic=False, fullgraph=True) if compiled else module
    arranged = images.to(memory_format=torch_format)

    @torch.inference_mode()
    def call() -> None:
        function(arranged)
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return call


def _onnxruntime_call(path: Path, images: Tensor, threads: int) -> Call:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    # Its threads would otherwise spin on into the turn of whoever comes next.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    provider = "CUDAExecutionProvider" if images.device.type == "cuda" else "CPUExecutionProvider"
    session = onnxruntime.InferenceSession(str(path), options, providers=[provider])
    feed = {session.get_inputs()[0].name: images.cpu().numpy()}
    return lambda: session.run(None, feed)


def _executorch_call(path: Path, images: Tensor) -> Call:
    from executorch.runtime import Runtime

    with quiet():
        program = Runtime.get().load_program(path.read_bytes())
        method = program.load_method("forward")

    def call(program: Any = program) -> None:  # the method reads from the program, but does not keep it alive
        method.execute([images])

    return call


def _timed(call: Call) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _faster(calls: dict[str, Call]) -> str:
    """The name of the faster call, by the median of five alternating tries after one that does not count."""
    for call in calls.values():
        call()
    tries = [{name: _timed(call) for name, call in calls.items()} for _ in range(5)]
    return min(calls, key=lambda name: median(t[name] for t in tries))


def set_threads(threads: int, backends: Sequence[str]) -> None:
    """Threads of torch and of XNNPACK; onnxruntime takes them with the session."""
    torch.set_num_threads(threads)
    if "executorch" in backends:
        with quiet():
            from executorch.extension.pybindings.portable_lib import _unsafe_reset_threadpool

            _unsafe_reset_threadpool(threads)


def take_turns(candidates: Sequence[Candidate], repetitions: int, seconds: float, rng: random.Random) -> None:
    """`repetitions` rounds, fewer when `seconds` are over; every candidate has one turn a round."""
    began = time.perf_counter()
    for number in range(repetitions):
        if number >= LEAST_ROUNDS and time.perf_counter() - began > seconds:
            break
        for candidate in rng.sample(candidates, len(candidates)):
            candidate.call()
            candidate.rounds.append([_timed(candidate.call) for _ in range(candidate.calls)])


# --- what is reported -----------------------------------------------------------------------------


def row_of(candidate: Candidate, facts: dict[str, Any]) -> dict[str, Any]:
    network = candidate.network
    durations = [1000 * seconds for calls in candidate.rounds for seconds in calls]
    deciles = quantiles(durations, n=10, method="inclusive")
    middle = median(durations)
    return {
        **facts,
        "model": network.model,
        "family": network.family,
        "width": "" if network.width is None else f"{network.width:g}",
        "form": network.form,
        "backend": candidate.backend,
        "memory_format": candidate.memory_format,
        "median_ms": f"{middle:.4g}",
        "p10_ms": f"{deciles[0]:.4g}",
        "p90_ms": f"{deciles[-1]:.4g}",
        "images_per_second": f"{1000 * facts['batch'] / middle:.4g}",
        "top1": network.top1,
        "versions": f"{PACKAGES[candidate.backend]} {version(PACKAGES[candidate.backend])}",
    }


def ratio(slower: Candidate, faster: Candidate) -> tuple[float, float, float]:
    """How many times as fast `faster` is: the median of the rounds, the lowest and the highest."""
    pairs = zip(slower.rounds, faster.rounds, strict=True)
    ratios = [median(a) / median(b) for a, b in pairs]
    return median(ratios), min(ratios), max(ratios)


def print_ratios(candidates: Sequence[Candidate], title: str) -> None:
    """The fused networks beside timm's and the training form of the same width, and beside peers as accurate."""
    print(f"\n{title}")
    for fused in (c for c in candidates if c.network.form == FUSED):
        own, top1 = fused.network, float(fused.network.top1)
        print(
            f"  {own.model}, fused, {_how(fused)}: {1000 * median(map(median, fused.rounds)):.2f} ms, Top-1 {top1:.1f}"
        )
        for other in candidates:
            network = other.network
            same = network.model == own.model and network.form != FUSED
            peer = network.width is None and abs(float(network.top1) - top1) <= MATCHED
            if other.backend == fused.backend and (same or peer):
                middle, low, high = ratio(other, fused)
                what = network.form if same else f"Top-1 {float(network.top1):.1f}"
                what = f"{network.model} ({what}, {_how(other)})"
                print(f"    {middle:5.2f} [{low:.2f} to {high:.2f}] times as fast as {what}")


def _how(candidate: Candidate) -> str:
    return f"{candidate.backend} {candidate.memory_format}" if candidate.backend in TORCH else candidate.backend


def merge(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Adds `rows` to the CSV file `path`; those of the same machine and setting take the place of older ones."""
    new = {tuple(str(row[k]) for k in KEY): row for row in rows}
    kept = [row for row in read_latency(path) if tuple(row[k] for k in KEY) not in new]
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows([*kept, *new.values()])
    write_text(path, text.getvalue())


def imported(path: Path) -> list[dict[str, Any]]:
    """The rows of a CSV file written by hand or by another tool, completed from the published figures.

    It needs model, form, backend, machine, threads, batch and median_ms. Raises UserError that names line and column.
    """
    published = {row["name"].partition(".")[0]: row for row in peers()}
    rows = []
    try:
        with open(path, newline="") as file:
            found = list(csv.DictReader(file))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    for line, row in enumerate(found, 2):
        for column in ("model", "form", "backend", "machine", "threads", "batch", "median_ms"):
            if not row.get(column):
                raise UserError(f"{path}, line {line}: {column} is missing")
        if row["model"] not in published:
            raise UserError(f"{path}, line {line}: model={row['model']} is not one of {', '.join(published)}")
        if row["form"] not in FORMS:
            raise UserError(f"{path}, line {line}: form={row['form']} is not one of {', '.join(FORMS)}")
        try:
            per_second = 1000 * int(row["batch"]) / float(row["median_ms"])
        except (ValueError, ZeroDivisionError):
            raise UserError(f"{path}, line {line}: batch and median_ms have to be numbers above 0") from None
        of_model = published[row["model"]]
        width = f"{int(row['model'][-3:]) / 100:g}" if of_model["family"] == "RepGhostNet" else ""
        filled = {
            "device": "cpu", "image_size": "224", "memory_format": "", "p10_ms": "", "p90_ms": "", "versions": "",
            "date": date.today().isoformat(),
        }  # fmt: skip
        given = {column: row[column] for column in COLUMNS if row.get(column)}
        derived = {
            "family": of_model["family"], "width": width, "top1": of_model["top1"],
            "images_per_second": f"{per_second:.4g}",
        }  # fmt: skip
        rows.append({**filled, **given, **derived})
    return rows


def machine() -> str:
    """What computes, in words: the processor, or the board on ARM, whose processors do not say."""
    try:
        lines = [line.partition(":") for line in Path("/proc/cpuinfo").read_text().splitlines()]
    except OSError:
        lines = []
    found = {key.strip(): value.strip() for key, _, value in lines}
    return found.get("model name") or found.get("Model") or platform.processor() or platform.machine()


def cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# --- the command ----------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--widths", nargs="+", default=["0.5", "1.0", "2.0"], help="of RepGhostNet, or all (default: %(default)s)")
    add("--forms", nargs="+", choices=FORMS, default=FORMS, help="of RepGhostNet (default: all three)")
    add("--peers", nargs="*", default=list(PEERS), help="names in reference/peers.csv, or all (default: %(default)s)")
    add("--backends", nargs="+", choices=PACKAGES, default=["eager", "onnxruntime"], help="(default: %(default)s)")
    add("--batches", nargs="+", type=int, default=[1, 32], help="images a call (default: %(default)s)")
    add("--threads", nargs="+", type=int, default=sorted({1, cores()}), help="(default: 1 and all cores)")
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
    backends = [b for b in options.backends if importlib.util.find_spec(PACKAGES[b])]
    if missing := set(options.backends) - set(backends):
        print(f"not installed, left out: {', '.join(sorted(missing))}")
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch finds no GPU here")
    if device.type == "cuda" and "executorch" in backends:
        raise UserError("--device cuda: executorch's programs are for the CPU; --backends eager compiled")
    what = torch.cuda.get_device_name() if device.type == "cuda" else machine()
    versions = ", ".join(f"{name} {version(name)}" for name in sorted({"timm", *(PACKAGES[b] for b in backends)}))
    print(f"{what}, {cores()} cores, {platform.system()} {platform.machine()}")
    print(f"Python {platform.python_version()}, {versions}", flush=True)
    # Every network has the same code, and torch gives up on code that it has compiled eight times.
    torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit = 10_000
    made = list(networks(widths, options.forms, chosen))
    rng, rows = random.Random(options.seed), []
    fastest: dict[Any, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        exports = Exports(Path(folder), options.image_size)
        for threads in options.threads:
            set_threads(threads, backends)
            for batch in options.batches:
                images = torch.randn(batch, 3, options.image_size, options.image_size, device=device)
                prepared = [prepare(n, b, images, threads, exports, fastest) for n in made for b in backends]
                candidates = list(chain.from_iterable(prepared))
                take_turns(candidates, options.repetitions, options.seconds, rng)
                facts = {
                    "device": options.device, "machine": what, "threads": threads, "batch": batch,
                    "image_size": options.image_size, "date": date.today().isoformat(),
                }  # fmt: skip
                rows += [row_of(candidate, facts) for candidate in candidates]
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
    try:
        rows = imported(options.imported) if options.imported else measure(options)
        merge(options.out, rows)
        print(f"\n{len(rows)} rows in {options.out}")
        if options.figure:
            results = read_results(options.out.parent / "results.csv")
            print(*draw_accuracy(results, "imagenet", options.out.parent, read_latency(options.out)), sep="\n")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
