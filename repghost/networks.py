"""The network that a command names by `run=` or `weights=`, ready for images: its preprocessing and its class names.

Image size, crop, normalization and names are those of the training, as its files tell them (see
`repghost.description`); what nobody tells is ImageNet's. Check: `pytest tests/test_predict.py tests/test_export.py`.
"""

from collections.abc import Sequence
from dataclasses import fields, replace
from typing import NamedTuple

from repghost.description import Description, describe_run
from repghost.errors import UserError
from repghost.export.runtimes import ExportedModel, is_exported, open_file
from repghost.images import Preprocessing
from repghost.model import RepGhostNet
from repghost.options import NetworkOptions
from repghost.reference import class_words, synsets
from repghost.run import class_names_of, load_run, read_config
from repghost.weights import load_described


class Network(NamedTuple):
    """A network in evaluation mode, what it does to its images, and what is known of it.

    source: its name in messages.
    """

    model: RepGhostNet | ExportedModel
    preprocessing: Preprocessing
    description: Description
    source: str

    @property
    def outputs(self) -> int:
        """Number of classes."""
        if isinstance(self.model, RepGhostNet):
            return self.model.classifier.out_features
        return int(self.model.metadata["num_classes"])

    def class_names(self) -> list[str]:
        """A name for each label, for people: words for ImageNet's classes, numbers where no names are known."""
        names = self.description.classes
        if names is None:
            return list(class_words()) if self.outputs == len(synsets()) else [str(n) for n in range(self.outputs)]
        return words(names)


def words(names: Sequence[str]) -> list[str]:
    """Class names with ImageNet's words in the place of its WordNet ids."""
    if not set(names) & set(synsets()):
        return list(names)
    of_imagenet = dict(zip(synsets(), class_words(), strict=True))
    return [of_imagenet.get(name, name) for name in names]


def open_network(options: NetworkOptions) -> Network:
    """The network that the options name.

    Raises UserError for options that contradict each other or the file. An image size or crop that is given for a
    network that was trained with another is used; a line on stderr says so.
    """
    options.require_network()
    model: RepGhostNet | ExportedModel
    if options.run is not None:
        config = read_config(options.run)
        model, _ = load_run(options.run, options.selection or "last")
        description = describe_run(config, class_names_of(options.run), None)
    elif is_exported(options.weights):
        model = open_file(str(options.weights))
        description = model.description
        _require_as_exported(model, options)
    else:
        model, description = load_described(str(options.weights), options.width)
    source = str(options.run or options.weights)
    if isinstance(model, RepGhostNet) and (channels := model.conv_stem.in_channels) != 3:
        raise UserError(f"{source}: a network for images with {channels} channels, not for RGB")
    given = {key: value for key in ("image_size", "crop_fraction") if (value := getattr(options, key)) is not None}
    description.say_differences(given)
    description = replace(description, **given)
    return Network(model, preprocessing_of(description), description, source)


def _require_as_exported(model: ExportedModel, options: NetworkOptions) -> None:
    """Raises UserError for what an exported file cannot change."""
    if model.metadata["preprocess"]:
        raise UserError(f"{options.weights}: takes photographs: give an export without preprocess=true")
    for key in ("width", "image_size"):
        found, given = model.metadata[key], getattr(options, key)
        if given not in (None, found):
            raise UserError(f"{key}={given:g}: {options.weights} has {key}={found:g}; leave the key out")


def preprocessing_of(description: Description) -> Preprocessing:
    """What the evaluation of a network does to its images; ImageNet's values where they are not known."""
    known = description.known()
    return Preprocessing(**{entry.name: known[entry.name] for entry in fields(Preprocessing) if entry.name in known})
