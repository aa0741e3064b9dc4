"""Pictures of what the network sees: a grid of augmented training samples of the configured data set.

    python -m data.show data.root=SHARDS width=1.3         takes any override of train.py

A row per sample: the crop that evaluation sees, then what training sees in each epoch.
Check: `pytest tests/test_show.py`.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from PIL import Image
from torchvision.utils import make_grid

from repghost.errors import run_command
from repghost.run import resolve_recipe

CONF = Path(__file__).parents[1] / "conf"


def augmented_grid(overrides: Sequence[str], samples: int, epochs: int) -> Image.Image:
    """The grid of the first `samples` training samples, with `epochs` augmented columns."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose("train", list(overrides))
    resolve_recipe(config)
    data = instantiate(config.data)
    data.setup("show")
    mean, std = (torch.tensor(v).view(-1, 1, 1) for v in (data.augment.mean, data.augment.std))
    columns = torch.stack(list(data.preview(samples, epochs)), dim=1)  # [samples, epochs + 1, 3, S, S]
    pixels = (columns.flatten(0, 1) * std + mean).clamp(0, 255) / 255
    grid = make_grid(pixels, nrow=epochs + 1, padding=4, pad_value=1.0)
    return Image.fromarray((grid.permute(1, 2, 0) * 255).round().byte().numpy())


def main(arguments: Sequence[str] | None = None) -> int:
    """Writes the grid."""
    parser = argparse.ArgumentParser(prog="python -m data.show", description=__doc__.partition("\n")[0])
    parser.add_argument("--out", default="augmented.png", help="file to write (default: %(default)s)")
    parser.add_argument("--samples", type=int, default=8, help="rows (default: %(default)s)")
    parser.add_argument("--epochs", type=int, default=7, help="augmented columns (default: %(default)s)")
    parser.add_argument("overrides", nargs="*", help="as for train.py: data.root=SHARDS width=1.3 recipe=...")
    options = parser.parse_args(arguments)
    augmented_grid(options.overrides, options.samples, options.epochs).save(options.out)
    print(f"{options.out}: {options.samples} samples, the evaluation crop first, then {options.epochs} epochs")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
