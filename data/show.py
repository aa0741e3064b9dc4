"""Pictures of what the network sees: a grid of augmented training samples of the configured data set.

`python -m data.augment --show data.root=SHARDS width=1.3` takes any override of train.py.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from PIL import Image
from torch import Tensor
from torchvision.utils import make_grid

from repghost.run import resolve_recipe

CONF = Path(__file__).parents[1] / "conf"


def augmented_grid(overrides: Sequence[str], samples: int, epochs: int) -> Image.Image:
    """One row a sample, first without augmentation of colour and shape, then as it is seen in `epochs` epochs.

    A sample's row starts with the centre crop that evaluation sees.
    """
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose("train", list(overrides))
    resolve_recipe(config)
    data = instantiate(config.data).load("train")
    rows = []
    for seen in data.preview(samples, epochs):
        mean, std = (torch.tensor(v).view(-1, 1, 1) for v in (data.augment.mean, data.augment.std))
        rows.append((seen * std + mean).clamp(0, 255) / 255)
    images: Tensor = torch.stack(rows, dim=1).flatten(0, 1)
    grid = make_grid(images, nrow=epochs + 1, padding=4, pad_value=1.0)
    return Image.fromarray((grid.permute(1, 2, 0) * 255).round().byte().numpy())


def main(arguments: Sequence[str] | None = None) -> int:
    """Writes the grid."""
    parser = argparse.ArgumentParser(prog="python -m data.augment", description=__doc__)
    parser.add_argument("--show", action="store_true", required=True, help="write the grid")
    parser.add_argument("--out", default="augmented.png", help="file to write (default: %(default)s)")
    parser.add_argument("--samples", type=int, default=8, help="rows (default: %(default)s)")
    parser.add_argument("--epochs", type=int, default=7, help="augmented columns (default: %(default)s)")
    parser.add_argument("overrides", nargs="*", help="as for train.py: data.root=SHARDS width=1.3 recipe=...")
    options = parser.parse_args(arguments)
    augmented_grid(options.overrides, options.samples, options.epochs).save(options.out)
    print(f"{options.out}: {options.samples} samples, the evaluation crop first, then {options.epochs} epochs")
    return 0
