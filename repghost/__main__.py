"""RepGhostNet: the commands that need no checkout.

usage: repghost COMMAND ARGUMENTS...       (repghost COMMAND --help lists the arguments)

  predict      names what images show: files, folders and URLs
  export       writes the network for deployment; all formats but hub need the extra deploy
  results      prints the paper's table beside what was measured
  figures      draws accuracy over multiply-accumulates, parameters and latency

In a checkout, with the extra train; sweep adds Optuna and SLURM to `train.py -m`:

  python train.py                trains a network
  python -m repghost.teach       stores a teacher's logits for trainings
  python evaluate.py             evaluates a run, published weights or an exported file
  python -m data.write_shards    writes images as a data set for both

An extra is installed by pip install '.[train]' in the checkout, several by '.[train,deploy]'.
"""

import runpy
import sys

from repghost.errors import UserError, run_command

COMMANDS = ("predict", "export", "results", "figures")


def run(arguments: list[str]) -> None:
    """Runs a command as `python -m repghost.COMMAND` does, which ends the program with the command's exit code."""
    name = arguments[0] if arguments else "--help"
    if name in ("-h", "--help"):
        print((__doc__ or "").strip())
    elif name in COMMANDS:
        sys.argv = arguments
        runpy.run_module(f"repghost.{name}", run_name="__main__", alter_sys=True)
    else:
        raise UserError(
            f"{name} is not a command; the commands are {', '.join(COMMANDS)}; repghost --help explains them"
        )


def main() -> int:
    """The program `repghost`."""
    return run_command(lambda: run(sys.argv[1:]))


if __name__ == "__main__":
    sys.exit(main())
