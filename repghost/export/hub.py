"""A run as a folder for the Hugging Face hub, in timm's format.

    python -m repghost.export run=outputs/NAME format=hub [selection=best_ema] [calibration=SHARD.tar] [out=FOLDER]

The folder holds model.safetensors, config.json, onnx/model.onnx, with calibration images onnx/model_int8.onnx, and a
model card with the recipe, the result and the curve; the hub shows the accuracy in the card's metadata.
`timm.create_model("local-dir:FOLDER", pretrained=True)` loads it, and after the upload (hf upload OWNER/NAME FOLDER) so
does "hf-hub:OWNER/NAME". Check: `pytest tests/test_export.py -k hub`.
"""

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData
from omegaconf import DictConfig, OmegaConf

from repghost.description import KEY, Description
from repghost.errors import UserError
from repghost.export.options import OLDEST_OPSET, Options
from repghost.export.write import export
from repghost.files import write_text
from repghost.model import RepGhostNet
from repghost.networks import preprocessing_of
from repghost.reference import timm_name
from repghost.run import SELECTIONS, class_names_of, data_name, evaluation_name, load_run, read_config, read_evaluation
from repghost.weights import WEIGHTS_FILE, read_description, save_weights


def export_hub(options: Options, out: Path) -> None:
    """Writes the run that the options name to the folder `out` in timm's format, and in ONNX to `out`/onnx.

    In INT8, too, where the options have images for it. Raises UserError for a run that is not evaluated and for a width
    that timm has no architecture of.
    """
    assert options.run is not None
    directory, selection = options.run, options.selection or "last"
    config = read_config(directory)
    path = directory / evaluation_name(selection)
    if (evaluation := read_evaluation(path)) is None:
        raise UserError(f"{path}: missing; python evaluate.py run={directory} selection={selection} writes it")
    model, _ = load_run(directory, selection)
    description = read_description(directory / "checkpoints" / SELECTIONS[selection])
    described = _timm_config(model, description, class_names_of(directory))
    save_weights(model, out / WEIGHTS_FILE, description)
    write_text(out / "config.json", json.dumps(described, indent=2) + "\n")
    card = _card(directory.name, config, evaluation)
    if (curve := directory / "curve.png").exists():
        shutil.copyfile(curve, out / curve.name)
        card += f"\n![accuracy, loss and learning rate over the epochs]({curve.name})\n"
    write_text(out / "README.md", card)
    onnx = replace(options, format="onnx", opset=OLDEST_OPSET)
    export(replace(onnx, out=out / "onnx" / "model.onnx", int8=False, calibration=None))
    if options.calibration is not None:
        export(replace(onnx, out=out / "onnx" / "model_int8.onnx", int8=True))


def _timm_config(model: RepGhostNet, description: Description, names: Sequence[str] | None) -> dict[str, Any]:
    images, classes = preprocessing_of(description), model.classifier.out_features
    return {
        "architecture": timm_name(model.width).partition(".")[0],
        "num_classes": classes,
        "num_features": model.classifier.in_features,
        "global_pool": "avg",
        **({"label_names": list(names)} if names else {}),
        KEY: description.known(),
        "pretrained_cfg": {
            "num_classes": classes,
            "input_size": [model.conv_stem.in_channels, images.image_size, images.image_size],
            "fixed_input_size": False,
            "pool_size": [-(-images.image_size // 32)] * 2,
            "mean": images.mean,
            "std": images.std,
            "interpolation": "bicubic",
            "crop_pct": images.crop_fraction,
            "crop_mode": "center",
            "first_conv": "conv_stem",
            "classifier": "classifier",
        },
    }


def _card(title: str, config: DictConfig, evaluation: dict[str, Any]) -> str:
    task, data = "image-classification", data_name(config)
    results = [
        EvalResult(task, data, data, "accuracy", round(evaluation[f"top{k}"], 2), metric_name=f"Top-{k} accuracy (%)")
        for k in (1, 5)
    ]
    tags = [task, "timm", "repghostnet"]
    metadata = ModelCardData(model_name=title, eval_results=results, library_name="timm", pipeline_tag=task, tags=tags)
    epoch = "best" if evaluation["selection"] == "best_ema" else "last"
    values = {"title": title, "metadata": metadata.to_yaml(), "config": config, "data": data, "epoch": epoch}
    card = files("repghost").joinpath("export/card.md").read_text()
    return card.format(**values, recipe=OmegaConf.to_yaml(config.recipe), result=evaluation)
