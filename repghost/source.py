"""What predict and export work with: the network that run= or weights= names, and the preprocessing that goes with it.

A run's image size, crop and normalization are those of its config.yaml; published weights have ImageNet's.
Check: `pytest tests/test_predict.py tests/test_export.py`.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

from omegaconf import DictConfig

from repghost.errors import UserError
from repghost.images import Preprocessing
from repghost.model import RepGhostNet
from repghost.options import Option
from repghost.run import SELECTIONS, load_run, read_config
from repghost.weights import load_model


@dataclass
class SourceOptions:
    """Which network, and which images it sees."""

    run: Annotated[Path | None, Option("folder of a run, outputs/NAME")] = None
    selection: Annotated[str | None, Option("epoch of the run, by default last", tuple(SELECTIONS))] = None
    weights: Annotated[str | None, Option("instead of a run: timm, official:FILE, a file or a folder")] = None
    width: Annotated[float | None, Option("of the weights", above=0)] = None
    image_size: Annotated[int | None, Option("side of what the network sees, by default the run's", above=0)] = None
    crop_fraction: Annotated[float | None, Option("of the centre crop, by default the run's", above=0, most=1)] = None


@dataclass(frozen=True)
class Source:
    """A network in evaluation mode, its preprocessing, and the arguments of evaluate.py that name it."""

    model: RepGhostNet
    preprocessing: Preprocessing
    arguments: str


def open_source(options: SourceOptions) -> Source:
    """The network of a run or of weights. Raises UserError for options that contradict each other."""
    if (options.run is None) == (options.weights is None):
        raise UserError("give either run=outputs/NAME or weights=timm, weights=FILE with its width=")
    if options.run is not None:
        if options.width is not None:
            raise UserError("width: a run knows its own; the key goes with weights=")
        preprocessing = preprocessing_of(read_config(options.run))
        model, _ = load_run(options.run, options.selection or "last")
        arguments = f"run={options.run}" + (f" selection={options.selection}" if options.selection else "")
    else:
        assert options.weights is not None
        if options.selection is not None:
            raise UserError("selection: the key goes with run=")
        if options.width is None:
            raise UserError(f"weights={options.weights}: say which width, width=1.0")
        preprocessing, model = Preprocessing(), load_model(options.weights, options.width)
        arguments = f"weights={options.weights} width={options.width:g}"
    if (channels := model.conv_stem.in_channels) != 3:
        raise UserError(f"{arguments}: a network for images with {channels} channels, not for RGB")
    return Source(
        model,
        replace(
            preprocessing,
            image_size=options.image_size or preprocessing.image_size,
            crop_fraction=options.crop_fraction or preprocessing.crop_fraction,
        ),
        arguments,
    )


def preprocessing_of(config: DictConfig) -> Preprocessing:
    """What the run of this config evaluates its images with."""
    augment = config.recipe.augment
    return Preprocessing(config.image_size, config.data.crop_fraction, tuple(augment.mean), tuple(augment.std))
