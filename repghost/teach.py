"""Stores what a teacher says of every training image, so that trainings learn from it at no cost:

  python -m repghost.teach teacher=timm:resnet50.a1_in1k data.root=SHARDS epochs=300 trainer=gpu OUT
  python train.py recipe=distill recipe.teacher_logits=OUT data.root=SHARDS trainer=gpu

The keys are those of train.py: they decide which images the teacher sees, and a training must agree in all that changes
an image: seed, data, size, crops, augmentation (another one from width 1.3 on). What does not, such as learning rates,
changes nothing here. The same command again goes on where it stopped.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from repghost.command_line import CONF, compose_config
from repghost.errors import UserError, end_at_once_on_signals, run_command
from repghost.schema.help import help_text


def main(arguments: Sequence[str]) -> int:
    """Writes the logits that the arguments ask for; returns the exit code."""
    if {"-h", "--help"} & set(arguments):
        print(help_text("teach", (__doc__ or "").strip(), CONF))
        return 0
    flags = [argument for argument in arguments if argument.startswith("-")]
    if flags:
        raise UserError(f"{flags[0]}: no flag of this command; --help lists its keys")
    folders = [argument for argument in arguments if "=" not in argument]
    if len(folders) > 1:
        raise UserError(f"{folders[1]}: neither KEY=VALUE nor the folder of the logits, which is {folders[0]}")
    overrides = [argument for argument in arguments if "=" in argument]
    config = compose_config("teach", [*overrides, *(f"out={folder}" for folder in folders)])

    # What takes long to import: the command line was understood by now.
    from omegaconf import OmegaConf

    from repghost.distillation.write import write_logits
    from repghost.lock import sole_writer
    from repghost.processes import run_on_devices
    from repghost.run import resolve_recipe

    resolve_recipe(config)
    OmegaConf.resolve(config)
    with sole_writer(Path(config.out)):
        return run_on_devices(write_logits, config)


if __name__ == "__main__":
    end_at_once_on_signals()
    sys.exit(run_command(lambda: main(sys.argv[1:])))
