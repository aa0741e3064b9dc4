"""What a run records of its data: class names and fingerprints, in data.json, by which it knows its images again.

data.json holds the names exactly; classes.txt, which is for people and for `class_names=`, has one name a line, with
escapes for what would break or hide a line. Runs of earlier versions have no data.json: their checkpoints hold the
fingerprints. Check: `pytest tests/test_run_data.py`.
"""

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from omegaconf import DictConfig

from repghost.errors import UserError
from repghost.files import read_class_names, write_text
from repghost.text import one_line
from repghost.weights import read_checkpoint

if TYPE_CHECKING:
    from repghost.dataset import DataModule  # which needs Lightning

DATA_FILE, CLASSES_FILE = "data.json", "classes.txt"
LAST_CHECKPOINT = Path("checkpoints", "last.ckpt")


@dataclass(frozen=True)
class RunData:
    """The names of a run's classes, in label order, and the fingerprints of its splits ("train", "val")."""

    classes: tuple[str, ...] | None
    fingerprints: Mapping[str, str]

    def difference(self, classes: Sequence[str], fingerprints: Mapping[str, str]) -> str | None:
        """In what other data differ from these, in words; None where nothing is known to differ."""
        both = self.fingerprints.keys() & fingerprints.keys()
        other = sorted(split for split in both if self.fingerprints[split] != fingerprints[split])
        if both and not other:
            return None
        if self.classes is not None and self.classes != tuple(classes):
            gone, new = set(self.classes) - set(classes), set(classes) - set(self.classes)
            if gone:
                return f"the data now given have no class {one_line(min(gone))}"
            return f"class {one_line(min(new))} is new" if new else "the classes are in another order"
        return f"the {' and '.join(other)} images are others" if other else None


def recorded_data(directory: Path) -> RunData | None:
    """What the run in `directory` records of its data; None for a run of which nothing is known."""
    path = directory / DATA_FILE
    if path.exists():
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            return RunData(tuple(content["classes"]), {str(k): str(v) for k, v in content["fingerprints"].items()})
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise UserError(f"{path}: not what train.py wrote ({error}): delete it") from None
    names = directory / CLASSES_FILE
    classes = tuple(read_class_names(names)) if names.exists() else None
    fingerprints: Mapping[str, str] = {}
    with suppress(UserError):  # no checkpoint, or a damaged one: who resumes the run says so
        # Under the name of the data module's class, whatever that was.
        states = [value for value in read_checkpoint(directory / LAST_CHECKPOINT).values() if isinstance(value, dict)]
        fingerprints = next((state for state in states if state.keys() == {"train", "val"}), {})
    return RunData(classes, fingerprints) if classes or fingerprints else None


def require_same_data(directory: Path, config: DictConfig, begun_with: object, finished: bool) -> None:
    """Raises UserError when `data.root` names other images than those that the run in `directory` records.

    begun_with: the run's data.root. Shards at a URL are not downloaded for that: at the URL that the run was begun with
    they count as the same, and those of a run that is not finished are compared once it has them. A finished run needs
    its images no longer.
    """
    from hydra.utils import instantiate

    root = config.data.root
    remote = isinstance(root, str) and "://" in root
    if remote and root != begun_with and finished:
        what = f"was trained on data.root={begun_with}, and only a download would tell whether {root} is the same"
        raise UserError(f"{directory} {what}: give the old data.root, or give the new run a name=...")
    gone = finished and root == begun_with and isinstance(root, str) and not Path(root).expanduser().exists()
    if not remote and not gone:
        data = instantiate(config.data)
        data.setup("fit")
        require_equal(directory, data, begun_with)


def require_equal(directory: Path, data: "DataModule", begun_with: object) -> None:
    """Raises UserError when `data`, loaded for training, are not those that the run in `directory` records."""
    before = recorded_data(directory)
    if before and (difference := before.difference(data.index("train").classes, data.fingerprints)):
        what = f"was begun with other data, data.root={begun_with} ({difference})"
        raise UserError(f"{directory} {what}: give back the old data.root, or give the new run a name=...")


def record_data(directory: Path, data: "DataModule") -> None:
    """Writes data.json and classes.txt of the run in `directory`, on the first rank only."""
    classes = data.index("train").classes
    content = {"classes": list(classes), "fingerprints": data.fingerprints}
    write_on_rank_zero(directory / DATA_FILE, json.dumps(content, indent=1) + "\n")
    write_class_names(directory, classes)


def write_class_names(directory: Path, names: Sequence[str]) -> None:
    """Writes classes.txt of the run in `directory`, on the first rank only."""
    write_on_rank_zero(directory / CLASSES_FILE, "".join(f"{one_line(name)}\n" for name in names))


def write_on_rank_zero(path: Path, text: str) -> None:
    """Writes `text` (UTF-8), on the first rank only."""
    from pytorch_lightning.utilities.rank_zero import rank_zero_only  # which reading a run does not need

    rank_zero_only(write_text)(path, text)
