"""A run as a folder for the Hugging Face hub, in timm's format.

    python -m repghost.export run=outputs/NAME format=hub [selection=best_ema] [out=FOLDER]

The folder holds model.safetensors, config.json and a model card with the recipe, the result and the curve; the hub
shows the accuracy in the card's metadata. `timm.create_model("local-dir:FOLDER", pretrained=True)` loads it, and after
the upload (hf upload OWNER/NAME FOLDER) so does "hf-hub:OWNER/NAME". Check: `pytest tests/test_export.py -k hub`.
"""

import json
import shutil
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData
from omegaconf import DictConfig, OmegaConf

from repghost.errors import UserError
from repghost.files import write_text
from repghost.model import RepGhostNet
from repghost.reference import timm_name
from repghost.run import class_names_of, data_name, load_run, read_config
from repghost.source import preprocessing_of
from repghost.weights import WEIGHTS_FILE, save_weights


def export_hub(directory: Path, selection: str, out: Path) -> None:
    """Writes the run in `directory` to the folder `out` in timm's format.

    Raises UserError for a run that is not evaluated and for a width that timm has no architecture of.
    """
    config = read_config(directory)
    architecture = timm_name(config.width).partition(".")[0]
    evaluation = _evaluation(directory, selection)
    model, _ = load_run(directory, selection)
    save_weights(model, out / WEIGHTS_FILE)
    described = _timm_config(model, architecture, config, class_names_of(directory))
    write_text(out / "config.json", json.dumps(described, indent=2) + "\n")
    card = _card(directory.name, config, evaluation)
    if (curve := directory / "curve.png").exists():
        shutil.copyfile(curve, out / curve.name)
        card += f"\n![accuracy, loss and learning rate over the epochs]({curve.name})\n"
    write_text(out / "README.md", card)


def _evaluation(directory: Path, selection: str) -> dict[str, Any]:
    path = directory / ("evaluation.json" if selection == "last" else f"evaluation_{selection}.json")
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        what = f"python evaluate.py run={directory} selection={selection}"
        raise UserError(f"{path}: missing; {what} writes it") from None


def _timm_config(
    model: RepGhostNet, architecture: str, config: DictConfig, names: Sequence[str] | None
) -> dict[str, Any]:
    images, classes = preprocessing_of(config), model.classifier.out_features
    return {
        "architecture": architecture,
        "num_classes": classes,
        "num_features": model.classifier.in_features,
        "global_pool": "avg",
        **({"label_names": list(names)} if names else {}),
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
    data = data_name(config)
    results = [
        EvalResult("image-classification", data, data, "accuracy", round(evaluation[key], 2), metric_name=name)
        for key, name in (("top1", "Top-1 accuracy (%)"), ("top5", "Top-5 accuracy (%)"))
    ]
    metadata = ModelCardData(
        model_name=title,
        eval_results=results,
        library_name="timm",
        pipeline_tag="image-classification",
        tags=["image-classification", "timm", "repghostnet"],
    )
    return (
        files("repghost")
        .joinpath("export/card.md")
        .read_text()
        .format(
            title=title,
            metadata=metadata.to_yaml(),
            config=config,
            data=data,
            epoch="best" if evaluation["selection"] == "best_ema" else "last",
            recipe=OmegaConf.to_yaml(config.recipe),
            result=evaluation,
        )
    )
