"""Pictures of what the network sees: a grid of augmented training samples of the configured data set.

    python -m data.show data.root=SHARDS width=1.3         takes any override of train.py

A row per sample: the crop that evaluation sees, then what training sees in each epoch.
Check: `pytest tests/test_show.py`.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from data.arguments import whole_number
from repghost.command_line import CONF, compose_config
from repghost.errors import UserError, run_command
from repghost.files import atomic_write, require_writable
from repghost.schema.help import key_rows


class Parser(argparse.ArgumentParser):
    """Mistakes are a UserError, whose line is all that is printed."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; --help lists the options")


def image_file(text: str) -> Path:
    """A path whose ending says which format of Pillow's is written."""
    from PIL import Image

    if (path := Path(text).expanduser()).suffix.lower() not in Image.registered_extensions():
        raise argparse.ArgumentTypeError(f"{text}: no ending of an image file, such as .png")
    return path


def augmented_grid(overrides: Sequence[str], samples: int, epochs: int, out: Path) -> None:
    """Writes the grid of the first `samples` training samples, with `epochs` augmented columns."""
    config = compose_config("train", overrides)
    require_writable(out, "--out")

    # What takes long to import: the command line was understood by now.
    import torch
    from hydra.utils import instantiate
    from PIL import Image
    from torchvision.utils import make_grid

    from repghost.run import resolve_recipe

    resolve_recipe(config)
    data = instantiate(config.data)
    if not hasattr(data, "preview"):
        raise UserError("this draws the crops of classification only: give a data set of images with labels")
    data.setup("show")
    mean, std = (torch.tensor(v).view(-1, 1, 1) for v in (data.augment.mean, data.augment.std))
    columns = torch.stack(list(data.preview(samples, epochs)), dim=1)  # [samples, epochs + 1, 3, S, S]
    pixels = (columns.flatten(0, 1) * std + mean).clamp(0, 255) / 255
    grid = make_grid(pixels, nrow=epochs + 1, padding=4, pad_value=1.0)
    image = Image.fromarray((grid.permute(1, 2, 0) * 255).round().byte().numpy())
    with atomic_write(out) as file:
        image.save(file, Image.registered_extensions()[out.suffix.lower()])


def main(arguments: Sequence[str] | None = None) -> int:
    """Writes the grid."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = Parser(
        prog="python -m data.show",
        description=__doc__.partition("\n")[0],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    if {"-h", "--help"} & set(arguments):
        parser.epilog = "\n".join(["keys of train.py, with their values by default:", *key_rows("train", CONF)])
    add = parser.add_argument
    add("--out", type=image_file, default=Path("augmented.png"), help="image file to write (default: %(default)s)")
    add("--samples", type=whole_number(1, 100), default=8, help="rows, 1 to 100 (default: %(default)s)")
    add("--epochs", type=whole_number(1, 100), default=7, help="augmented columns, 1 to 100 (default: %(default)s)")
    add("overrides", nargs="*", help="as for train.py: data.root=SHARDS width=1.3 recipe=...")
    options = parser.parse_intermixed_args(arguments)
    augmented_grid(options.overrides, options.samples, options.epochs, options.out)
    print(f"{options.out}: {options.samples} samples, the evaluation crop first, then {options.epochs} epochs")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
