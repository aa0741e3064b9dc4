"""What a model file says of itself: the network, the images that it takes, its classes and the data it learned from.

Every file of weights that this project writes carries a `Description`, so that the file alone is enough to evaluate it
as it was trained. Fields are None where nobody knows, as with files of strangers.
Check: `pytest tests/test_weights.py`.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from repghost.errors import UserError


@dataclass(frozen=True)
class Description:
    """What is known of a network beside its tensors.

    classes: the name of each label, as in the data set's index. form: "training" or "fused". image_size, crop_fraction,
    mean and std: of `repghost.images.Preprocessing`. recipe: its name. data: the fingerprint of the training images.
    """

    width: float | None = None
    form: str | None = None
    classes: tuple[str, ...] | None = None
    image_size: int | None = None
    crop_fraction: float | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    recipe: str | None = None
    data: str | None = None

    def to_json(self) -> str:
        """The fields that are known, as one line of JSON."""
        return json.dumps({key: value for key, value in asdict(self).items() if value is not None})

    @classmethod
    def from_json(cls, text: str, source: str) -> "Description":
        """Raises UserError that names `source` when `text` is not what `to_json` writes; unknown keys are ignored."""
        try:
            content = json.loads(text)
            if not isinstance(content, Mapping):
                raise ValueError("not a mapping")
            known: dict[str, Any] = {entry.name: content.get(entry.name) for entry in fields(cls)}
            for key in ("classes", "mean", "std"):
                known[key] = None if known[key] is None else tuple(known[key])
        except (ValueError, TypeError) as error:
            raise UserError(f"{source}: what it says of itself cannot be read ({error})") from None
        return cls(**known)
