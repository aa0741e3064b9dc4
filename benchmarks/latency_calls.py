"""The networks that latency.py compares, in every form and backend, and how they take turns."""

import copy
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any, cast

import timm
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from timm.utils.model import reparameterize_model
from torch import Tensor, nn

from benchmarks.common import ROOT
from repghost import RepGhostNet, reparameterize, repghostnet
from repghost.errors import UserError
from repghost.export.deployable import Deployable, Deployment
from repghost.export.equalization import equalize
from repghost.export.formats import executorch, litert, ncnn, onnx, openvino
from repghost.export.options import FORMATS, OLDEST_OPSET, Format
from repghost.export.runtimes import quiet
from repghost.images import Preprocessing
from repghost.reference import peers

TRAINING, TIMM, FUSED = "training", "timm_reparameterized", "fused"
FORMS = (TRAINING, TIMM, FUSED)
TORCH = ("eager", "compiled")  # the backends that know memory formats
# The backends that run exported files, and their formats.
RUNTIMES: dict[str, Any] = {
    "onnxruntime": onnx, "executorch": executorch, "openvino": openvino, "litert": litert, "ncnn": ncnn,
}  # fmt: skip


def _format(runtime: str) -> Format:
    """What `repghost.export` knows of the files that a runtime runs."""
    return FORMATS["onnx" if runtime == "onnxruntime" else runtime]


INT8 = " int8"  # after the name of a backend
PACKAGES = {
    "eager": "torch", "compiled": "torch", "onnxruntime": "onnxruntime", "executorch": "executorch",
    "openvino": "openvino", "litert": "ai-edge-litert", "ncnn": "ncnn",
}  # fmt: skip
PACKAGES |= {f"{name}{INT8}": PACKAGES[name] for name in RUNTIMES if "int8" in _format(name).keys}
CONTIGUOUS = "contiguous"
MEMORY_FORMATS = {CONTIGUOUS: torch.contiguous_format, "channels_last": torch.channels_last}
LEAST_ROUNDS = 3  # however long they take
TURN = 0.05  # seconds of counted calls in a turn, at most CALLS of them
CALLS = 20
LEAST_SCORE = ("detector.score_threshold=0.05",)

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}  # of onnxruntime

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
    device: str  # that runs it: cpu or cuda
    call: Call
    memory_format: str
    calls: int
    rounds: list[list[float]] = field(default_factory=list)


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


class OfBatch(nn.Module):
    """A detector for images [N, 3, H, W]: all from the resizing to the boxes after the suppression."""

    def __init__(self, detector: nn.Module) -> None:
        super().__init__()
        self.detector = detector

    def forward(self, images: Tensor) -> Any:
        return self.detector([*images])


def detectors(names: Sequence[str], widths: Sequence[float], forms: Sequence[str]) -> Iterator[Network]:
    """Detectors of 80 classes with the values of conf/detector, in training form and fused.

    Their least score is above those of random weights: the suppression has nothing to do.
    """
    for name, width in product(names, widths):
        with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
            config = compose("train_detection", [f"detector={name}", f"width={width}", *LEAST_SCORE, "data.root=."])
        trained = instantiate(config.detector, num_classes=80)().eval()
        for form, module in ((TRAINING, trained), (FUSED, reparameterize(trained))):
            if form in forms:
                yield Network(f"{name}_{round(100 * width):03d}", name, width, form, OfBatch(module), top1="")


class Exports:
    """The exported files of networks, each written once, in a folder that goes with the process."""

    def __init__(self, folder: Path, image_size: int) -> None:
        self._folder, self._image_size = folder, image_size

    def of(self, network: Network, backend: str, batch: int) -> Path:
        """The file for a backend and a batch; ONNX takes batches of any size, as timm exports it, NCNN an image."""
        name, int8 = backend.removesuffix(INT8), backend.endswith(INT8)
        form, free, batch = RUNTIMES[name], name == "onnxruntime", 1 if name == "ncnn" else batch
        path = (
            self._folder
            / f"{network.model}-{network.form}-{0 if free else batch}{'-int8' * int8}{_format(name).ending}"
        )
        if not path.exists():
            precision: Any = "int8" if int8 else "float32"
            deployment = Deployment(Preprocessing(self._image_size), None if free else batch, precision=precision)
            with quiet():
                if quantizable(network):
                    self._write(cast(RepGhostNet, network.module), form, deployment, path, int8)
                else:
                    self._write_as_it_is(network.module, form, deployment, path)
        return path

    def _write(self, network: RepGhostNet, form: Any, deployment: Deployment, path: Path, int8: bool) -> None:
        """As `repghost.export` does it; ranges are those of noise, which the latency does not depend on."""
        noise = [torch.randn(deployment.batch or 1, 3, self._image_size, self._image_size) for _ in range(2)]
        module = Deployable.of(equalize(network, noise) if int8 else network, deployment)
        calibration = {"calibration": noise} if int8 else {}
        form.write(module, path, {"precision": deployment.precision}, **calibration)

    def _write_as_it_is(self, module: nn.Module, form: Any, deployment: Deployment, path: Path) -> None:
        example = (torch.zeros(deployment.batch or 2, 3, self._image_size, self._image_size),)
        if form is not onnx:
            form.write(Deployable(module, deployment).eval(), path, {})
            return
        torch.onnx.export(
            module,
            example,
            path,
            dynamo=True,
            verbose=False,
            external_data=False,
            opset_version=OLDEST_OPSET,
            dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=2**16)},),
        )


def quantizable(network: Network) -> bool:
    """Whether `repghost.export` writes an INT8 form of it."""
    return network.form == FUSED and isinstance(network.module, RepGhostNet)


def cannot_run(backend: str, device: torch.device) -> str | None:
    """Why a backend that is installed does not run on a device, None where it does."""
    if backend.removesuffix(INT8) in ("executorch", "openvino", "litert", "ncnn") and device.type == "cuda":
        return "its programs are for the CPU"
    if backend.removesuffix(INT8) == "onnxruntime":
        import onnxruntime

        if (provider := PROVIDERS[device.type]) not in onnxruntime.get_available_providers():
            return f"this onnxruntime has no {provider}, the package onnxruntime-gpu has"
    return None


def prepare(
    network: Network, backend: str, images: Tensor, threads: int, exports: Exports, fastest: dict[Any, str]
) -> list[Candidate]:
    """The network in the backend, warmed up. fastest: the memory formats found so far, by network and setting."""
    batch = len(images)
    runtime = backend.removesuffix(INT8)
    if runtime == "onnxruntime":
        calls = {CONTIGUOUS: _onnxruntime_call(exports.of(network, backend, batch), images, threads)}
    elif runtime == "executorch":
        calls = {CONTIGUOUS: _executorch_call(exports.of(network, backend, batch), images)}
    elif runtime in RUNTIMES:
        model = RUNTIMES[runtime].open_model(exports.of(network, backend, batch))
        calls = {CONTIGUOUS: partial(model, images)}
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
        candidates.append(Candidate(network, backend, images.device.type, call, memory_format, in_turn))
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
    provider = PROVIDERS[images.device.type]
    settings = {"use_tf32": "0"} if images.device.type == "cuda" else {}
    session = onnxruntime.InferenceSession(str(path), options, providers=[(provider, settings)])
    if (used := session.get_providers()[0]) != provider:  # it warns and takes the CPU where a library is missing
        raise UserError(f"onnxruntime runs {path.name} with {used} instead of {provider}: leave it out of --backends")
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
    if any(backend.startswith("executorch") for backend in backends):
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
