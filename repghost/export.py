"""Exports what was trained, or published weights, for deployment: always the fused network.

    python -m repghost.export run=outputs/NAME format=onnx [selection=best_ema] [out=FILE]
    python -m repghost.export weights=timm width=1.0 format=executorch
    python -m repghost.export run=outputs/NAME format=onnx int8=true calibration=SHARD.tar

Formats: onnx, executorch (XNNPACK), torchscript, coreml, safetensors (the fused weights), hub (see `repghost.hub`).
Keys: image_size; batch (a number, or dynamic; an ONNX or TorchScript file takes any number unless one is given,
ExecuTorch and Core ML take 1); dtype=float16; softmax=true; opset (ONNX); preprocess=true: the file takes photographs,
uint8 [N, H, W, 3], and resizes and normalizes them itself, ONNX those of any size, the others those of
input_size=HEIGHTxWIDTH; crop_fraction (of its centre crop); int8=true with calibration=FOLDER|SHARD.tar and
calibration_images (see `repghost.quantize`); check=FOLDER|SHARD.tar: photographs to check the export with.

Every export is run by its own runtime on photographs and compared with torch before it appears at `out`: in float32 no
logit may differ by more than 1e-4 (with softmax, the logarithm of a probability). float16 keeps 11 binary digits, so a
rounding is off by up to 5e-4; those of the weights and activations of about a hundred layers add up like the square
root of 200, to 7e-3 of the largest logit, and three times that, 2e-2, is the bound.
Check: `pytest tests/test_export.py tests/test_quantize.py`.
"""

import json
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from repghost import deploy
from repghost.atomic import TEMPORARY, atomic_write, write_text
from repghost.deploy import Deployable, Deployment
from repghost.errors import UserError
from repghost.exported import ExportedModel, open_executorch, open_onnx, open_torchscript, require
from repghost.hub import export_hub
from repghost.images import evaluation_transform
from repghost.model import RepGhostNet
from repghost.photographs import photographs, sample_photographs
from repghost.quantize import layer_losses, quantize_executorch, quantize_onnx, sqnr
from repghost.reparameterize import reparameterize
from repghost.run import load_run, read_config
from repghost.weights import load_model, save_weights

ENDINGS = {"onnx": ".onnx", "executorch": ".pte", "torchscript": ".pt", "coreml": ".mlpackage",
           "safetensors": ".safetensors"}  # fmt: skip
FORMATS = (*ENDINGS, "hub")
# What has to be installed for a format, in the order in which it is asked for.
PACKAGES = {"onnx": ("onnx", "onnxscript", "onnxruntime"), "executorch": ("executorch.exir", "torchao"),
            "coreml": ("coremltools",)}  # fmt: skip

_SOURCE = ("run", "selection", "weights", "width", "format", "out")
_NETWORK = (*_SOURCE, "image_size", "batch", "dtype", "softmax", "preprocess", "crop_fraction", "check")
_INT8 = ("int8", "calibration", "calibration_images")
KEYS = {
    "onnx": (*_NETWORK, "opset", *_INT8),
    "executorch": (*_NETWORK, "input_size", *_INT8),
    "torchscript": (*_NETWORK, "input_size"),
    "coreml": (*_NETWORK, "input_size"),
    "safetensors": (*_SOURCE, "image_size", "crop_fraction", "check"),
    "hub": ("run", "selection", "format", "out"),
}
CHECKED = 16  # photographs that an export is compared on
EXAMINED = 32  # calibration images that every layer's loss is measured on
SHOWN = 5  # of the layers that lose most
TOLERANCE = 1e-4  # of float32 logits, absolute
TOLERANCE_FLOAT16 = 2e-2  # of the largest logit


@dataclass(frozen=True)
class Source:
    """The fused network to export, where it came from in words of evaluate.py, and the images it was made for."""

    model: RepGhostNet
    arguments: str
    image_size: int
    crop_fraction: float


def export(given: dict[str, str]) -> Path:
    """Exports as `given` says (KEY: VALUE, as on the command line) and prints what was checked; returns the file.

    Raises UserError for what does not go together or cannot be read, and for an export that differs from torch;
    nothing is then written.
    """
    form = given["format"]
    for package in PACKAGES.get(form, ()):
        require(package)
    int8 = _flag(given, "int8")
    if int8 != ("calibration" in given) or ("calibration_images" in given and not int8):
        raise UserError("int8=true and calibration=FOLDER or SHARD.tar go together: its scales come from images")
    source = _source(given)
    deployment = _deployment(given, form, source)
    if int8 and deployment.float16:
        raise UserError("dtype=float16 and int8=true: give one of them")
    out = _out(given, form, source.model.width, deployment, int8)
    opset = _number(given, "opset", deploy.OLDEST_OPSET)

    calibration = photographs(given["calibration"], _number(given, "calibration_images", 128)) if int8 else []
    if "check" in given:
        images = photographs(given["check"], CHECKED)
        what = f"{len(images)} photographs of {given['check']}"
    elif int8:
        images, what = calibration, f"the {len(calibration)} calibration images"
    else:
        images, what = sample_photographs(CHECKED)

    facts = {
        "width": float(source.model.width),
        "num_classes": source.model.classifier.out_features,
        "image_size": deployment.image_size,
        "batch": deployment.batch or 0,
        "preprocess": int(deployment.preprocess),
        "softmax": int(deployment.softmax),
        "precision": "int8" if int8 else "float16" if deployment.float16 else "float32",
    }
    with tempfile.TemporaryDirectory() as folder:
        written = Path(folder) / out.name
        with deploy.quiet():
            module = Deployable(source.model, deployment)
            if form == "safetensors":
                save_weights(source.model, written)
            elif form == "torchscript":
                deploy.write_torchscript(module, deployment, written)
            elif form == "coreml":
                deploy.write_coreml(source.model, deployment, written)
            elif form == "onnx" and int8:
                exact = Path(folder) / "float32.onnx"
                deploy.write_onnx(module, deployment, exact, opset, facts)
                quantize_onnx(exact, written, _inputs(calibration, deployment))
            elif form == "onnx":
                deploy.write_onnx(module, deployment, written, opset, facts)
            elif int8:
                deploy.write_executorch(quantize_executorch(module, _inputs(calibration, deployment)), written, facts)
            else:
                program = torch.export.export(module, (deploy.example_input(deployment),))
                deploy.write_executorch(program, written, facts)
        reference = Deployable(source.model, replace(deployment, float16=False))
        if form == "coreml":
            print(_check_coreml(written))
        elif int8:
            print(_report_int8(reference, _open(form)(written), source, deployment, images, what, out, given))
        else:
            model = _weights_model(written, source.model.width) if form == "safetensors" else _open(form)(written)
            print(_compare(reference, model, _checked_inputs(images, deployment), deployment, what))
        _publish(written, out)
    return out


def _source(given: dict[str, str]) -> Source:
    if ("run" in given) == ("weights" in given):
        raise UserError("give either run=outputs/NAME or weights=timm, weights=FILE with its width=")
    if "run" in given:
        if "width" in given:
            raise UserError("width: a run knows its own; the key goes with weights=")
        directory, selection = Path(given["run"]), given.get("selection", "last")
        config = read_config(directory)
        model, _ = load_run(directory, selection)
        arguments = f"run={directory}" + (f" selection={selection}" if "selection" in given else "")
        size, crop = config.image_size, config.data.crop_fraction
    else:
        if "selection" in given:
            raise UserError("selection: the key goes with run=")
        if "width" not in given:
            raise UserError("width is missing: say which width the weights are of, width=1.0")
        width = _real(given, "width", 0.0, float("inf"))
        model, size, crop = load_model(given["weights"], width), 224, 0.875
        arguments = f"weights={given['weights']} width={width:g}"
    if (channels := model.conv_stem.in_channels) != 3:
        raise UserError(f"a network for images with {channels} channels: exports are checked on photographs, with 3")
    return Source(reparameterize(model), arguments, size, crop)


def _deployment(given: dict[str, str], form: str, source: Source) -> Deployment:
    any_batch = form in ("onnx", "torchscript", "safetensors")
    batch = given.get("batch", "dynamic" if any_batch else "1")
    if batch == "dynamic" and form == "executorch":
        raise UserError("batch=dynamic: ExecuTorch plans its memory in advance; give the number, batch=1")
    dtype = given.get("dtype", "float32")
    if dtype not in ("float32", "float16"):
        raise UserError(f"dtype={dtype} is not one of float32, float16")
    deployment = Deployment(
        image_size=_number(given, "image_size", source.image_size),
        batch=None if batch == "dynamic" else _number(given, "batch", 1),
        preprocess=_flag(given, "preprocess"),
        input_size=_input_size(given),
        crop_fraction=_real(given, "crop_fraction", 0.0, 1.0) if "crop_fraction" in given else source.crop_fraction,
        softmax=_flag(given, "softmax"),
        float16=dtype == "float16",
    )
    if form != "onnx" and deployment.preprocess != ("input_size" in given):
        raise UserError(
            f"preprocess=true and input_size=HEIGHTxWIDTH go together: a {form} file takes photographs of one size"
        )
    return deployment


def _out(given: dict[str, str], form: str, width: float, deployment: Deployment, int8: bool) -> Path:
    if "out" in given:
        out = Path(given["out"]).expanduser()
        if out.suffix != ENDINGS[form]:
            raise UserError(f"out={out}: the name of a {form} file ends in {ENDINGS[form]}")
        if out.is_dir() != (form == "coreml") and out.exists():
            raise UserError(f"out={out}: this is a {'folder' if out.is_dir() else 'file'}")
        return out
    kind = "_int8" if int8 else "_float16" if deployment.float16 else ""
    if "run" in given:
        selection = f"_{given['selection']}" if given.get("selection", "last") != "last" else ""
        return Path(given["run"]) / f"fused{selection}{kind}{ENDINGS[form]}"
    return Path(f"repghostnet_{width:g}{kind}{ENDINGS[form]}")


def _inputs(images: Sequence[Image.Image], deployment: Deployment) -> list[Tensor]:
    """The images as inputs of an export.

    A batch of fixed size is filled up with the first ones; where sizes differ, every batch is of one image.
    """
    if deployment.preprocess and deployment.input_size is None:
        return [_pixels(image).expand(deployment.batch or 1, -1, -1, -1) for image in images]
    if deployment.input_size is not None:
        height, width = deployment.input_size
        rows = [_pixels(image.resize((width, height), Image.Resampling.BICUBIC)) for image in images]
    else:
        transform = evaluation_transform(deployment.image_size, deployment.crop_fraction)
        rows = [transform(image) for image in images]
    size = deployment.batch or 1
    missing = -len(rows) % size
    return list(torch.stack(rows + [rows[i % len(rows)] for i in range(missing)]).split(size))


def _checked_inputs(images: Sequence[Image.Image], deployment: Deployment) -> list[Tensor]:
    """`_inputs`; where a batch of any size goes in, also each image with its mirror image."""
    inputs = _inputs(images, deployment)
    if deployment.batch:
        return inputs
    width = 2 if deployment.preprocess else 3
    return inputs + [torch.cat([x, x.flip(width)]) for x in inputs]


def _pixels(image: Image.Image) -> Tensor:
    """uint8 [H, W, 3]"""
    return torch.from_numpy(np.array(image))


def _open(form: str) -> Callable[[Path], ExportedModel]:
    return {"onnx": open_onnx, "executorch": open_executorch, "torchscript": open_torchscript}[form]


def _weights_model(path: Path, width: float) -> ExportedModel:
    return ExportedModel(load_model(path, width))


@torch.no_grad()
def _compare(
    reference: Deployable, model: ExportedModel, inputs: Sequence[Tensor], deployment: Deployment, what: str
) -> str:
    """One line on how far an export is from torch. Raises UserError when that is too far."""
    expected, found = (torch.cat([net(x) for x in inputs]) for net in (reference, model))
    if deployment.softmax:
        expected, found = (x.clamp_min(torch.finfo(x.dtype).tiny).log() for x in (expected, found))
    difference, largest = float((expected - found).abs().max()), float(expected.abs().max())
    limit = TOLERANCE_FLOAT16 * largest if deployment.float16 else TOLERANCE
    flips = int((expected.argmax(1) != found.argmax(1)).sum())
    outputs = "log-probabilities" if deployment.softmax else "logits"
    line = (
        f"largest difference from torch in the {outputs}: {difference:.1e} (allowed {limit:.1e}), "
        f"Top-1 differs in {flips} of {len(expected)}; checked on {what}"
        + ("" if deployment.batch else ", alone and with their mirror images")
    )
    if not difference <= limit:  # a NaN is not either
        raise UserError(f"the export is wrong, nothing was written: {line}")
    return line


def _check_coreml(package: Path) -> str:
    with deploy.quiet():
        found = deploy.coreml_operations(package)
    assert not any("batch_norm" in operation for operation in found)
    return f"not run: Core ML runs on macOS only; the package loads and has no BatchNorm ({', '.join(sorted(found))})"


@torch.no_grad()
def _report_int8(
    reference: Deployable,
    model: ExportedModel,
    source: Source,
    deployment: Deployment,
    images: Sequence[Image.Image],
    what: str,
    out: Path,
    given: dict[str, str],
) -> str:
    """What INT8 loses, in words; the same is written beside `out` as JSON."""
    inputs = _inputs(images, deployment)
    expected, found = (torch.cat([net(x) for x in inputs])[: len(images)] for net in (reference, model))
    if not bool(found.isfinite().all()):
        raise UserError("the export is wrong, nothing was written: its outputs are not finite")
    agreement = 100 * float((expected.argmax(1) == found.argmax(1)).float().mean())
    normalized = torch.cat(_inputs(images[:EXAMINED], replace(deployment, preprocess=False, input_size=None, batch=1)))
    layers = layer_losses(source.model, normalized)
    report = {
        "file": out.name,
        "calibration": given["calibration"],
        "images": len(images),
        "top1_agreement": agreement,
        "sqnr_db": sqnr(expected, found),
        "layers": layers,
    }
    path = out.with_suffix(".int8.json")
    write_text(path, json.dumps(report, indent=2) + "\n")
    worst = "\n".join(f"  {row['sqnr_db']:5.1f} dB  {row['layer']}" for row in layers[:SHOWN])
    return (
        f"INT8 and float32 agree in the Top-1 of {agreement:.1f}% of {what}; "
        f"{deployment.output}: signal to noise {report['sqnr_db']:.1f} dB\n"
        f"layers that lose most when they alone are quantized (all of them in {path}):\n{worst}\n"
        f"accuracy before: python evaluate.py {source.arguments} data.root=SHARDS\n"
        f"accuracy after:  python evaluate.py weights={out} image_size={deployment.image_size} data.root=SHARDS"
    )


def _publish(written: Path, out: Path) -> None:
    """Moves a finished file or folder to `out`, whole or not at all."""
    if written.is_file():
        with atomic_write(out) as file:
            file.write(written.read_bytes())
        return
    beside = out.with_name(f".{out.name}{TEMPORARY}")
    out.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(beside, ignore_errors=True)
    shutil.copytree(written, beside)
    if out.exists():
        shutil.rmtree(out)
    beside.rename(out)


def _flag(given: dict[str, str], key: str) -> bool:
    value = given.get(key, "false")
    if value not in ("true", "false"):
        raise UserError(f"{key}={value}: give true or false")
    return value == "true"


def _number(given: dict[str, str], key: str, default: int) -> int:
    value = given.get(key)
    if value is None:
        return default
    if not re.fullmatch(r"[1-9][0-9]{0,5}", value):
        raise UserError(f"{key}={value}: give a whole number from 1 on")
    return int(value)


def _real(given: dict[str, str], key: str, above: float, most: float) -> float:
    try:
        value = float(given[key])
    except ValueError:
        value = float("nan")
    if not above < value <= most or value == float("inf"):
        raise UserError(f"{key}={given[key]}: give a number above {above:g}" + (f", at most {most:g}" * (most < 1e9)))
    return value


def _input_size(given: dict[str, str]) -> tuple[int, int] | None:
    if "input_size" not in given:
        return None
    match = re.fullmatch(r"([1-9][0-9]{0,4})x([1-9][0-9]{0,4})", given["input_size"])
    if match is None:
        raise UserError(f"input_size={given['input_size']}: give HEIGHTxWIDTH in pixels, such as 480x640")
    return int(match[1]), int(match[2])


def _parse(arguments: Sequence[str]) -> dict[str, str]:
    """KEY=VALUE arguments of one format. Raises UserError for a key that it does not read, or that has no value."""
    given: dict[str, str] = {}
    for argument in arguments:
        key, _, value = argument.partition("=")
        if not any(key in keys for keys in KEYS.values()):
            known = dict.fromkeys(key for keys in KEYS.values() for key in keys)
            raise UserError(f"{key} is not a key; the keys are {', '.join(known)}, given as KEY=VALUE")
        if not value:
            raise UserError(f"{key} has no value: {key}=VALUE")
        if key in given:
            raise UserError(f"{key} is given twice")
        given[key] = value
    form = given.get("format")
    if form not in FORMATS:
        raise UserError(f"give run=outputs/NAME format=FORMAT; the formats are {', '.join(FORMATS)}")
    if unread := [key for key in given if key not in KEYS[form]]:
        raise UserError(f"{unread[0]}: format={form} does not read this key, only {', '.join(KEYS[form])}")
    return given


def main(arguments: Sequence[str] | None = None) -> None:
    """Exports as the KEY=VALUE arguments say."""
    try:
        given = _parse(sys.argv[1:] if arguments is None else arguments)
        if given["format"] == "hub":
            if "run" not in given:
                raise UserError("give run=outputs/NAME format=hub: a model card needs a run")
            out = Path(given.get("out") or Path(given["run"]) / "hub")
            export_hub(Path(given["run"]), given.get("selection", "last"), out)
            print(f"{out}: {', '.join(sorted(path.name for path in out.iterdir()))}")
        else:
            print(f"written: {export(given)}")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
