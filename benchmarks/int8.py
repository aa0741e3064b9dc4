"""What INT8 costs in accuracy, by how it is done: trained networks, all test images, every runtime.

    apt-get install dataset-fashion-mnist
    python benchmarks/int8.py

trains every width with several seeds on parts of Debian's Fashion-MNIST, enlarged to --size pixels, and evaluates the
fused networks on all 10,000 test images: in float32, and in INT8 by every variant below. The hostile networks are the
narrowest ones with the channels between their layers scaled by factors from 1/32 to 32: in float32 they compute the
same, but their channels differ by three orders of magnitude, as those of depthwise layers of networks for ImageNet do.
Every network also learns on with the rounding of INT8 (recipe=qat) for --qat-epochs, and is evaluated after it.
Writes a row for each network and variant into results/int8.csv and the table of means into results/int8.md. What is in
them is not measured again, and no network trained twice.
"""

import argparse
import copy
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from torch import Tensor, nn

if not __package__:  # started as a file, not as python -m benchmarks.int8
    sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.common import ROOT, described, machine, read_table, write_table
from benchmarks.fashion_mnist import FOLDER, RECIPE, prepare, train
from repghost.export.check import inputs_of
from repghost.export.deployable import Deployable, Deployment
from repghost.export.equalization import equalize, links, rescale
from repghost.export.formats import executorch, onnx, openvino
from repghost.export.options import FORMATS
from repghost.export.photographs import read_photographs
from repghost.export.runtimes import ExportedModel, quiet
from repghost.images import Preprocessing
from repghost.machine import available_cpus
from repghost.model import RepGhostNet
from repghost.reparameterization import reparameterize
from repghost.rounding import round_layers
from repghost.run import load_run

BATCH = 100  # test images a call
FIXED = 32  # the same for formats whose files are for batches of one size
SPREAD = 5  # factors of a hostile network are powers of 2, of up to this exponent
CALIBRATED = 128
AFTER = " after QAT"
Prepare = Callable[[RepGhostNet, Sequence[Tensor]], RepGhostNet]


def main() -> int:
    """The exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--images", type=int, default=3000, help="training images (default: %(default)s)")
    add("--size", type=int, default=64, help="pixels (default: %(default)s)")
    add("--epochs", type=int, default=12, help="(default: %(default)s)")
    add("--widths", type=float, nargs="+", default=[0.5, 1.0, 2.0], help="(default: %(default)s)")
    add("--seeds", type=int, nargs="+", default=[6, 3, 3], help="how many, of each width (default: %(default)s)")
    add("--test-images", type=int, default=10_000, help="(default: %(default)s)")
    add("--variants", nargs="+", default=[], help="names of those to measure (default: all)")
    add("--qat-epochs", type=int, default=1, help="of recipe=qat, 0 for none (default: %(default)s)")
    add("--train-only", action="store_true", help="quantize nothing")
    add("--folder", type=Path, default=FOLDER, help="(default: %(default)s)")
    add("--out", type=Path, default=ROOT / "results" / "int8.csv", help="(default: results/int8.csv)")
    options = parser.parse_args()
    facts = machine(torch.device("cpu"))
    print(described(facts))
    folder = options.folder.expanduser()
    prepare(folder, options.images)
    pairs = sorted(zip(options.widths, options.seeds, strict=True), reverse=True)
    jobs = [(width, seed) for width, seeds in pairs for seed in range(seeds)]

    def run(job: tuple[float, int]) -> list[Path]:
        """The run of a width and seed and, with --qat-epochs, the one that learned on from it."""
        width, seed = job
        name = f"int8_{width:g}_{options.size}_{options.images}_{options.epochs}_s{seed}"
        setting = [f"data.root={folder / str(options.images)}", f"image_size={options.size}", f"seed={seed}"]
        setting.append(f"width={width}")
        commands = {name: [*RECIPE, *setting, f"epochs={options.epochs}"]}
        if options.qat_epochs:
            qat = [f"weights={folder / 'outputs' / name}", f"epochs={options.qat_epochs}"]
            commands[f"{name}_qat{options.qat_epochs}"] = ["recipe=qat", *RECIPE[1:], *setting, *qat]
        for each, command in commands.items():
            top1, _ = train(folder, each, command)
            print(f"{each}: Top-1 {top1:.2f}%", flush=True)
        return [folder / "outputs" / each for each in commands]

    with ThreadPoolExecutor(available_cpus()) as pool:
        runs = dict(zip(jobs, pool.map(run, jobs), strict=True))
    if options.train_only:
        return 0
    torch.set_num_threads(available_cpus())
    preprocessing = Preprocessing(options.size)
    test = read_photographs(folder / "test.images" / "val", options.test_images)
    names = sorted({str(photograph.class_name) for photograph in test})
    labels = torch.tensor([names.index(str(photograph.class_name)) for photograph in test])
    images = torch.cat(inputs_of([photograph.image for photograph in test], Deployment(preprocessing, BATCH)))
    training = read_photographs(folder / f"{options.images}.images" / "train", 1024)
    calibration = inputs_of([photograph.image for photograph in training], Deployment(preprocessing, 1))
    study = Study(preprocessing, images[: len(labels)], labels, calibration)
    setting = {key: getattr(options, key) for key in ("images", "size", "epochs", "test_images")}
    rows: list[dict[str, Any]] = []
    if options.out.exists():
        rows = [row for row in read_table(options.out) if all(row[key] == str(setting[key]) for key in setting)]
    measured = {(row["network"], int(row["seed"]), row["variant"]) for row in rows}
    for (name, seed), network in sorted(networks(runs)):
        for variant, top1 in study.results(
            network, options.variants, {v for n, s, v in measured if (n, s) == (name, seed)}
        ):
            print(f"{name:<12} seed {seed}  {variant:<44} {top1:.2f}%", flush=True)
            rows.append({"network": name, "seed": seed, "variant": variant, "top1": top1, **setting, **facts})
            write_table(options.out, rows)
    text = "\n".join(table(rows))
    options.out.with_suffix(".md").write_text(f"{text}\n")
    print(text)
    return 0


def networks(runs: dict[tuple[float, int], list[Path]]) -> Iterator[tuple[tuple[str, int], RepGhostNet]]:
    """The fused networks by name and seed, and of the narrowest ones their hostile twins."""
    narrowest = min(width for width, _ in runs)
    for (width, seed), folders in runs.items():
        first, *after = (
            reparameterize(load_run(run, "last")[0]).to(memory_format=torch.contiguous_format) for run in folders
        )
        yield (f"{width:g}x", seed), first
        if width == narrowest:
            yield (f"{width:g}x hostile", seed), hostile(first, seed)
        for network in after:
            yield (f"{width:g}x{AFTER}", seed), network


@torch.no_grad()
def hostile(network: RepGhostNet, seed: int) -> RepGhostNet:
    """The same function, but channels of very different size between its layers."""
    network, rng = copy.deepcopy(network), torch.Generator().manual_seed(seed)
    for link in links(network):
        count = link.writers[0].weight.shape[0]
        rescale(link, torch.randint(-SPREAD, SPREAD + 1, (count,), generator=rng).float().exp2())
    return network


@torch.no_grad()
def correct_biases(model: RepGhostNet, batches: Sequence[Tensor]) -> RepGhostNet:
    """A copy of the fused `model` whose layers, rounded as INT8 rounds them, have the means that the exact ones have.

    Rounding moves the mean of a layer's outputs where many pixels are alike; the bias moves it back (arXiv
    1906.04721, section 4.2). A layer is corrected as it runs after those before it were. batches: as in `equalize`.
    """
    exact, corrected, images = copy.deepcopy(model), copy.deepcopy(model), torch.cat([*batches])
    round_layers(corrected)
    means: list[Tensor] = []
    layers = [
        [layer for layer in net.modules() if isinstance(layer, nn.Conv2d | nn.Linear)] for net in (exact, corrected)
    ]

    def keep(_: Any, __: tuple[Tensor, ...], output: Tensor) -> None:
        means.append(_mean(output))

    def correct(layer: Any, _: tuple[Tensor, ...], output: Tensor) -> Tensor:
        moved = _mean(output) - means.pop(0)
        layer.bias.sub_(moved)
        return output - moved.view(-1, *[1] * (output.ndim - 2))

    for hook, net in zip((keep, correct), layers, strict=True):
        for layer in net:
            layer.register_forward_hook(hook)
    exact.eval()(images)
    corrected.dropout.p = 0.0
    corrected.train()(images)
    result = copy.deepcopy(model)
    result.load_state_dict(corrected.state_dict())
    return result


def _mean(output: Tensor) -> Tensor:
    return output.mean([0, *range(2, output.ndim)])


class Study:
    """The variants, on one set of test images."""

    def __init__(
        self, preprocessing: Preprocessing, images: Tensor, labels: Tensor, calibration: Sequence[Tensor]
    ) -> None:
        self._preprocessing, self._images, self._labels, self._all = preprocessing, images, labels, calibration

    def results(self, network: RepGhostNet, words: Sequence[str], but: set[str]) -> Iterator[tuple[str, float]]:
        """Name and Top-1 in percent of each variant that is in `words`, or of all, but for some."""
        for name, model in self._variants(network):
            if name not in but and (not words or name in words):
                with tempfile.TemporaryDirectory() as folder:
                    yield name, self._top1(model(Path(folder)))

    def _top1(self, model: ExportedModel) -> float:
        logits = torch.cat([model(batch) for batch in self._images.split(BATCH)])
        return 100 * float((logits.argmax(1) == self._labels).float().mean())

    def _variants(self, network: RepGhostNet) -> Iterator[tuple[str, Callable[[Path], ExportedModel]]]:
        from nncf import QuantizationPreset
        from onnxruntime.quantization import CalibrationMethod

        def exported(
            form: Any, count: int = CALIBRATED, prepare: Sequence[Prepare] = (), **quantizer: Any
        ) -> Callable[[Path], ExportedModel]:
            """Writes and opens a format; count: calibration images, 0 for float32."""

            def write(folder: Path) -> ExportedModel:
                inputs, model = self._all[:count], network
                for step in prepare:
                    model = step(model, inputs)
                kind = FORMATS[form.__name__.rpartition(".")[2]]
                batch, precision = FIXED if kind.planned else None, "int8" if count else "float32"
                if batch and inputs:
                    inputs = list(torch.cat([*inputs]).split(batch))
                deployment = Deployment(self._preprocessing, batch)
                metadata = {"batch": batch or 0, "precision": precision}
                path = folder / f"model{kind.ending}"
                with quiet():
                    module = Deployable.of(model, deployment)
                    form.write(module, path, metadata, calibration=inputs, **quantizer)
                return form.open_model(path)

            return write

        gates: dict[str, Any] = {"exclude": ".se"}
        yield "float32, onnxruntime", exported(onnx, 0)
        yield "onnxruntime, min-max", exported(onnx)
        yield "onnxruntime, min-max, gates in float", exported(onnx, **gates)
        yield "onnxruntime, percentile", exported(onnx, calibrate_method=CalibrationMethod.Percentile)
        yield "onnxruntime, entropy", exported(onnx, calibrate_method=CalibrationMethod.Entropy)
        yield "onnxruntime, equalized", exported(onnx, prepare=[equalize])
        yield "onnxruntime, equalized, gates in float", exported(onnx, prepare=[equalize], **gates)
        yield "onnxruntime, biases corrected", exported(onnx, prepare=[correct_biases])
        yield "onnxruntime, equalized, biases corrected", exported(onnx, prepare=[equalize, correct_biases])
        for count in (32, 1024):
            yield f"onnxruntime, equalized, {count} images", exported(onnx, count, [equalize])
        yield "ExecuTorch, squared error", exported(executorch)
        yield "ExecuTorch, squared error, equalized", exported(executorch, prepare=[equalize])
        yield "OpenVINO, NNCF", exported(openvino)
        yield "OpenVINO, NNCF, equalized", exported(openvino, prepare=[equalize])
        nncfs: dict[str, Any] = {"prepare": [equalize], "advanced_parameters": None}
        yield "OpenVINO, NNCF's choices, equalized", exported(openvino, **nncfs)
        yield (
            "OpenVINO, NNCF's choices, equalized, asymmetric",
            exported(openvino, **nncfs, preset=QuantizationPreset.MIXED),
        )


def table(rows: Iterable[dict[str, Any]]) -> Iterator[str]:
    """What INT8 adds to the Top-1 of float32 in every variant, mean and standard deviation over the seeds, as Markdown.

    The networks after QAT are compared with those in float32 that they came from, not with themselves.
    """
    rows = list(rows)
    exact = {
        (row["network"], int(row["seed"])): float(row["top1"]) for row in rows if row["variant"].startswith("float32")
    }
    columns = sorted({row["network"] for row in rows})
    yield f"| variant | {' | '.join(columns)} |"
    yield f"| --- |{' --- |' * len(columns)}"
    for variant in dict.fromkeys(row["variant"] for row in rows):
        cells = []
        for column in columns:
            mine = [row for row in rows if (row["network"], row["variant"]) == (column, variant)]
            before = column.removesuffix(AFTER)
            values = [float(row["top1"]) - exact[before, int(row["seed"])] * (variant[:7] != "float32") for row in mine]
            spread = f" ± {stdev(values):.2f}" if len(values) > 1 else ""
            cells.append(f"{mean(values):{'.2f' if variant[:7] == 'float32' else '+.2f'}}{spread}" if values else "")
        yield f"| {variant} | {' | '.join(cells)} |"


if __name__ == "__main__":
    sys.exit(main())
