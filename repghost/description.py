"""What a model file says of itself: the network, the images that it takes, its classes and the data it learned from.

Every file of weights that this project writes carries a `Description`, so that the file alone is enough to evaluate it
as it was trained. Fields are None where nobody knows, as with files of strangers. `repghost.weights.read_description`
reads it from a file of any kind. Check: `pytest tests/test_description.py`.
"""

import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from repghost.errors import UserError
from repghost.files import read_class_names

KEY = "repghost"  # under which files keep it, as JSON
_CLASSES_FILE = "classes.txt"  # of a run's folder


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _positive(value: Any) -> bool:
    return _number(value) and value > 0


def _list_of(valid: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, Sequence) and not isinstance(value, str) and all(map(valid, value))


def _text(value: Any) -> bool:
    return isinstance(value, str)


def _known(valid: Callable[[Any], bool]) -> Any:
    """A field of a description: None, or a value that is `valid`."""
    return field(default=None, metadata={"valid": valid})


@dataclass(frozen=True)
class Description:
    """What is known of a network beside its tensors.

    classes: the name of each label, as in the data set's index. form: "training" or "fused". image_size, crop_fraction,
    mean and std: of `repghost.images.Preprocessing`. recipe: its name. data: the fingerprint of the training images.
    """

    width: float | None = _known(_positive)
    form: str | None = _known(("training", "fused").__contains__)
    classes: tuple[str, ...] | None = _known(_list_of(_text))
    image_size: int | None = _known(lambda value: isinstance(value, int) and _positive(value))
    crop_fraction: float | None = _known(lambda value: _positive(value) and value <= 1)
    mean: tuple[float, ...] | None = _known(_list_of(_number))
    std: tuple[float, ...] | None = _known(_list_of(_positive))
    recipe: str | None = _known(_text)
    data: str | None = _known(_text)

    def to_json(self) -> str:
        """The fields that are known, as one line of JSON in ASCII."""
        return json.dumps(self.known())

    def known(self) -> dict[str, Any]:
        """The fields that are known."""
        return {key: value for key, value in asdict(self).items() if value is not None}

    @classmethod
    def from_json(cls, text: str, source: str) -> "Description":
        """Raises UserError that names `source` when `text` is not what `to_json` writes; unknown keys are ignored."""
        try:
            return cls.from_mapping(json.loads(text))
        except (ValueError, TypeError, RecursionError) as error:
            raise UserError(f"{source}: what it says of itself cannot be read ({error})") from None

    @classmethod
    def from_mapping(cls, content: Any) -> "Description":
        """Raises ValueError for a value that a field does not take; unknown keys are ignored."""
        if not isinstance(content, Mapping):
            raise ValueError("not a mapping")
        known: dict[str, Any] = {}
        for entry in fields(cls):
            if (value := content.get(entry.name)) is not None:
                if not entry.metadata["valid"](value):
                    raise ValueError(f"{entry.name} is {str(value)[:40]!r}")
                known[entry.name] = tuple(value) if entry.name in ("classes", "mean", "std") else value
        return cls(**known)

    def settings(self, source: str, named: Mapping[str, Any]) -> dict[str, Any]:
        """The keys of evaluate.py that the file at `source` knows and the command does not name, with their values.

        named: keys that the command names, with their values. Raises UserError for another width; what else differs
        from the training is used as named, and a line on stderr says so.
        """
        names = {"width": "width", "image_size": "image_size", "crop_fraction": "data.crop_fraction"}
        names |= {key: f"data.augment.{key}" for key in ("mean", "std")}
        given = {key: named[name] for key, name in names.items() if name in named}
        if self.width is not None and given.get("width", self.width) != self.width:
            raise UserError(f"width={given['width']}: {source} has width={self.width:g}; leave the key out")
        self.say_differences(given)
        known = self.known()
        return {name: known[key] for key, name in names.items() if key in known and name not in named}

    def say_differences(self, used: Mapping[str, Any]) -> None:
        """Prints a line on stderr for every field of the preprocessing in which `used` is not as in the training."""
        for key, unit in (("image_size", " pixels"), ("crop_fraction", ""), ("mean", ""), ("std", "")):
            trained, value = getattr(self, key), used.get(key)
            value = tuple(value) if isinstance(trained, tuple) and value is not None else value
            if None not in (trained, value) and trained != value:
                name = "" if key == "image_size" else f"{key}="
                print(f"trained at {name}{trained}{unit}, used at {name}{value}", file=sys.stderr, flush=True)


def describe_run(config: Any, classes: Sequence[str] | None, fingerprint: str | None) -> Description:
    """The description of the networks of a run.

    config: of train.py, as OmegaConf or plain YAML gives it. classes: the names of its labels, None where they are not
    known. fingerprint: of its training images.
    """
    augment, recipe = config["recipe"]["augment"], config["recipe"]
    mean, std = augment.get("mean"), augment.get("std")  # a detector normalizes and resizes by itself
    return Description(
        width=config["width"],
        classes=None if classes is None else tuple(classes),
        image_size=config.get("image_size"),
        crop_fraction=config["data"].get("crop_fraction"),
        mean=None if mean is None else tuple(mean),
        std=None if std is None else tuple(std),
        recipe=recipe.get("name"),
        data=fingerprint,
    )


def described_beside(path: Path) -> Description:
    """What the folder of a model file says of it: that of a run (config.yaml) or of the Hugging Face hub (config.json).

    Such files were written before they said so themselves, or by timm. Empty for all others.
    """
    import yaml  # which the network does not need

    folder = path.parent.parent if path.parent.name == "checkpoints" else path.parent
    names = folder / _CLASSES_FILE
    try:
        if (folder / "config.yaml").is_file():
            config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
            classes = read_class_names(names) if names.is_file() else None
            return Description.from_mapping(describe_run(config, classes, None).known())
        if (folder / "config.json").is_file():
            return _of_hub(json.loads((folder / "config.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, KeyError, AttributeError, yaml.YAMLError):
        pass  # the config of something else
    return Description()


def _of_hub(config: Mapping[str, Any]) -> Description:
    """timm's config.json as a description."""
    images = config["pretrained_cfg"]
    known = {"mean": images["mean"], "std": images["std"], "image_size": images["input_size"][1]}
    return Description.from_mapping(known | {"crop_fraction": images["crop_pct"], "classes": config.get("label_names")})
