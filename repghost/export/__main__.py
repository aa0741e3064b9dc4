"""Exports what was trained, or published weights, for deployment: always the fused network.

    python -m repghost.export run=outputs/NAME format=onnx [selection=best_ema] [out=FILE]
    python -m repghost.export weights=timm width=1.0 format=executorch
    python -m repghost.export run=outputs/NAME format=onnx int8=true calibration=SHARD.tar

Formats: onnx, executorch (XNNPACK), torchscript, coreml, safetensors (the fused weights), hub.
Keys: image_size; batch (a number, or dynamic; an ONNX or TorchScript file takes any number unless one is given,
ExecuTorch and Core ML take 1); dtype=float16; softmax=true; opset (ONNX); preprocess=true: the file takes photographs,
uint8 [N, H, W, 3], and resizes and normalizes them itself, ONNX those of any size, the others those of
input_size=HEIGHTxWIDTH; crop_fraction (of its centre crop); int8=true with calibration=FOLDER|SHARD.tar and
calibration_images (see `repghost.export.quantize`); check=FOLDER|SHARD.tar: photographs to check the export with.

Every export is run by its own runtime on photographs and compared with torch before it appears at `out`; one that
differs by too much is an error (see `repghost.export.check`).
Check: `pytest tests/test_export.py tests/test_quantize.py`.
"""

import re
import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from repghost.errors import UserError
from repghost.export import formats as deploy
from repghost.export.check import check_coreml, checked_inputs, compare, inputs_of, open_written, report_int8
from repghost.export.formats import Deployable, Deployment
from repghost.export.hub import export_hub
from repghost.export.quantize import quantize_executorch, quantize_onnx
from repghost.export.runtimes import require
from repghost.files import TEMPORARY, atomic_write
from repghost.images import photographs, sample_photographs
from repghost.model import RepGhostNet
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
                quantize_onnx(exact, written, inputs_of(calibration, deployment))
            elif form == "onnx":
                deploy.write_onnx(module, deployment, written, opset, facts)
            elif int8:
                deploy.write_executorch(quantize_executorch(module, inputs_of(calibration, deployment)), written, facts)
            else:
                program = torch.export.export(module, (deploy.example_input(deployment),))
                deploy.write_executorch(program, written, facts)
        reference = Deployable(source.model, replace(deployment, float16=False))
        if form == "coreml":
            print(check_coreml(written))
        else:
            model = open_written(form, written, source.model.width)
            if int8:
                origin = given["calibration"], source.arguments
                print(report_int8(reference, model, source.model, deployment, images, what, out, *origin))
            else:
                print(compare(reference, model, checked_inputs(images, deployment), deployment, what))
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
    fused = reparameterize(model).to(memory_format=torch.contiguous_format)  # a run's are in channels_last
    return Source(fused, arguments, size, crop)


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
