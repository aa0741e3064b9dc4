"""A run as a folder for the Hugging Face hub, in timm's format.

    python -m repghost.export run=outputs/NAME format=hub [selection=best_ema] [out=FOLDER]

The folder holds model.safetensors, config.json and a model card with the recipe, the result and the curve.
`timm.create_model("local-dir:FOLDER", pretrained=True)` loads it, and once it is uploaded (hf upload OWNER/NAME FOLDER)
so does "hf-hub:OWNER/NAME". Check: `pytest tests/test_results.py -k hub`.
"""

import csv
import json
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from repghost.errors import UserError
from repghost.files import atomic_write, write_text
from repghost.model import WIDTHS, RepGhostNet
from repghost.run import class_names_of, load_run, read_config
from repghost.weights import WEIGHTS_FILE, save_weights

# timm's names of what data.augment normalizes with and data.crops resizes with.
_PREPROCESSING = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225], "interpolation": "bicubic"}

_CARD = """---
library_name: timm
pipeline_tag: image-classification
tags: [image-classification, timm, repghostnet]
---
# {title}

RepGhostNet {width:g}x ([arXiv 2211.06088](https://arxiv.org/abs/2211.06088)), trained on {data} for {epochs} epochs:
the average of the weights (EMA) of the {selection} epoch, in training form.

```python
import timm

model = timm.create_model("hf-hub:OWNER/NAME", pretrained=True)  # or local-dir:FOLDER
```

## Result
| images | Top-1 (%) | Top-5 (%) | loss | fused Top-1 (%) | parameters (M) | multiply-accumulates (M) |
| --- | --- | --- | --- | --- | --- | --- |
{result}

95% interval of Top-1: {interval}. Images of {image_size} pixels, cropped from the centre at {crop_fraction:g}.

## Recipe
Global batch {batch_size}, seed {seed}.

```yaml
{recipe}```
{curve}"""


def export_hub(directory: Path, selection: str, out: Path) -> None:
    """Writes the run in `directory` to the folder `out` in timm's format.

    Raises UserError for a run that is not evaluated and for a width that timm has no architecture of.
    """
    config = read_config(directory)
    name = _timm_architecture(float(config.width))
    evaluation = _evaluation(directory, selection)
    model, _ = load_run(directory, selection)
    save_weights(model, out / WEIGHTS_FILE)
    described = _timm_config(model, name, config, class_names_of(directory))
    write_text(out / "config.json", json.dumps(described, indent=2) + "\n")
    curve = directory / "curve.png"
    if curve.exists():
        with atomic_write(out / curve.name) as file:
            file.write(curve.read_bytes())
    write_text(out / "README.md", _card(directory.name, config, evaluation, curve.exists()))


def _timm_architecture(width: float) -> str:
    with (files("repghost") / "reference" / "paper.csv").open() as file:
        names = {float(row["width"]): row["timm_name"].partition(".")[0] for row in csv.DictReader(file)}
    if width not in names:
        raise UserError(f"width={width:g}: timm knows only the widths {', '.join(f'{w:g}' for w in WIDTHS)}")
    return names[width]


def _evaluation(directory: Path, selection: str) -> dict[str, Any]:
    path = directory / ("evaluation.json" if selection == "last" else f"evaluation_{selection}.json")
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(
            f"{path}: missing; python evaluate.py run={directory} selection={selection} writes it"
        ) from None


def _timm_config(
    model: RepGhostNet, architecture: str, config: DictConfig, names: Sequence[str] | None
) -> dict[str, Any]:
    size, classes = config.image_size, model.classifier.out_features
    return {
        "architecture": architecture,
        "num_classes": classes,
        "num_features": model.classifier.in_features,
        "global_pool": "avg",
        **({"label_names": list(names)} if names else {}),
        "pretrained_cfg": {
            **_PREPROCESSING,
            "num_classes": classes,
            "input_size": [model.conv_stem.in_channels, size, size],
            "fixed_input_size": False,
            "pool_size": [-(-size // 32)] * 2,
            "crop_pct": config.data.crop_fraction,
            "crop_mode": "center",
            "first_conv": "conv_stem",
            "classifier": "classifier",
        },
    }


def _card(title: str, config: DictConfig, evaluation: dict[str, Any], curve: bool) -> str:
    low, high = evaluation["top1_interval"]
    cells = [f"{evaluation['images']:,}", *(f"{evaluation[key]:.2f}" for key in ("top1", "top5"))]
    cells += [f"{evaluation['loss']:.4f}", f"{evaluation['fused']['top1']:.2f}"]
    cells += [f"{evaluation['params_m']:.2f}", f"{evaluation['macs_m']:.1f}"]
    root = config.data.root
    return _CARD.format(
        title=title,
        width=config.width,
        data=Path(root.rstrip("/")).name if isinstance(root, str) else "the embedded digits",
        epochs=config.epochs,
        selection="best" if evaluation["selection"] == "best_ema" else "last",
        result=f"| {' | '.join(cells)} |",
        interval=f"{low:.2f} to {high:.2f}%",
        image_size=config.image_size,
        crop_fraction=config.data.crop_fraction,
        batch_size=config.batch_size,
        seed=config.seed,
        recipe=OmegaConf.to_yaml(config.recipe),
        curve="\n![accuracy, loss and learning rate over the epochs](curve.png)\n" if curve else "",
    )
