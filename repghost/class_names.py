"""What classes are called: classes.txt in a run's folder, a name a line in the order of the labels.

A run writes it when it starts, since whoever predicts with it may no longer have the data. ImageNet's classes stand in
data sets under their WordNet ids, and are shown as words. Check: `pytest tests/test_predict.py -k names`.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from pytorch_lightning.utilities.rank_zero import rank_zero_only

from repghost.atomic import write_text
from repghost.errors import UserError
from repghost.imagenet import class_words, synsets

_FILE = "classes.txt"


@rank_zero_only
def write_class_names(directory: Path, names: Sequence[str]) -> None:
    """Writes the class names of the run in `directory`."""
    write_text(directory / _FILE, "".join(f"{name}\n" for name in names))


def class_names_of(directory: Path) -> list[str] | None:
    """The class names of the run in `directory`; None, and a line on stderr, when it has none."""
    if not (directory / _FILE).exists():
        print(f"{directory / _FILE}: missing, showing numbers (class_names=FILE names them)", file=sys.stderr)
        return None
    of_imagenet = dict(zip(synsets(), class_words(), strict=True))
    return [of_imagenet.get(name, name) for name in read_class_names(directory / _FILE)]


def read_class_names(path: Path) -> list[str]:
    """The names in a text file, a line each. Raises UserError for a file that cannot be read."""
    try:
        return [line.strip() for line in path.expanduser().read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: no class names can be read from it ({error})") from None
