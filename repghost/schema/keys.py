"""The keys of train.py and evaluate.py: types, ranges, choices, and a sentence on each, which --help prints.

`Train` and `Evaluate` mirror what Hydra composes from conf/train.yaml and conf/evaluate.yaml, in the same order; the
values themselves are in conf/ alone. A key that `follows` another takes its value from there.
Check: `pytest tests/test_schema.py`.
"""

from typing import Annotated, Any, Literal, Self

from pydantic import ConfigDict, Field, ValidationInfo, model_validator

from repghost.schema.recipe import Recipe
from repghost.schema.values import (
    Convert,
    Count,
    FolderName,
    ImageSize,
    Loader,
    Mean,
    NotNegative,
    Part,
    Partial,
    Path,
    Positive,
    Processes,
    Report,
    Share,
    ShareAboveZero,
    Std,
    Target,
    Text,
    Width,
    follows,
    key,
    optional,
)


class Shared(Part):
    """What training and evaluation share: conf/base.yaml."""

    results: Path = key("CSV file to which every finished evaluation appends a row")
    deterministic: bool = key("use deterministic algorithms only")


class ShardFolder(Part):
    """conf/data/imagenet.yaml, which every data set builds on."""

    target: Target
    convert: Convert
    root: Path | dict[str, Any] = key("folder of shards that `python -m data.write_shards` wrote, or its URL")
    train: Path | None = key("training shards of others: a glob or name-{0000..0063}.tar, in data.root")
    val: Path | None = key("validation shards of others: a glob or name-{0000..0063}.tar, in data.root")
    class_names: Path | None = key("text file with a class name a line, for shards of others")
    cache: Path = key("folder for downloads, indexes of others' shards and compiled code")
    workers: Processes = key("processes (torch) or threads (dali) of a rank that decode; auto: its share of the cores")
    readers: Processes = key("processes of a rank that read for dali; 0: a thread does; auto: 1 or 2 on a GPU, else 0")
    prefetch: Annotated[int, Field(ge=1, le=1024)] = key("batches that a worker, or dali, is ahead")
    hw_decoder_load: Share = key("dali on a GPU: share of a batch that its JPEG decoder takes, where it has one")
    thread_affinity: bool = key("dali on a GPU: keep the threads that decode on the cores of its socket")
    eval_batch_size: Annotated[int, Field(ge=1, le=16384)] = key("images per device and batch in evaluation")
    crop_fraction: ShareAboveZero = key("centre crop of evaluation, as a share of the resized image's shorter side")
    loader: Any = follows("loader")
    image_size: Any = follows("image_size")


class TrainingData(ShardFolder):
    """`data` of conf/train.yaml."""

    skip_budget: Share = key("share of the training images that may be damaged in an epoch; validation has none")
    batch_size: Any = follows("batch_size")
    scale: Any = follows("recipe.scale")
    ratio: Any = follows("recipe.ratio")
    augment: Any = follows("recipe.augment")
    seed: Any = follows("seed")


class Normalization(Part):
    """`data.augment` of conf/evaluate.yaml."""

    target: Target
    mean: Mean = key("mean of each channel, of pixels in [0, 1]; with run= the run's")
    std: Std = key("standard deviation of each channel, of pixels in [0, 1]; with run= the run's")


class EvaluationData(ShardFolder):
    augment: Normalization


class Devices(Part):
    """conf/trainer."""

    target: Target
    partial: Partial
    accelerator: Literal["auto", "cpu", "gpu"] = key("what to compute on; auto: GPUs where there are any")
    devices: Literal["auto"] | Annotated[int, Field(ge=1, le=1024)] = key(
        "processes on this machine, one a device; auto: every GPU, one CPU process"
    )
    num_nodes: Annotated[int, Field(ge=1, le=65536)] = key("machines")
    threads: Annotated[int, Field(ge=1, le=1024)] | None = key("of PyTorch in a CPU process; null: one a core, at most")
    timeout_minutes: Annotated[float, Field(gt=0, le=43200)] = key("how long a rank waits for the others")
    precision: Any = follows("precision")
    deterministic: Any = follows("deterministic")


class TrainingDevices(Devices):
    """`trainer` of conf/train.yaml."""

    epochs: Any = follows("epochs")
    batch_size: Any = follows("batch_size")
    accumulate: Any = follows("accumulate")


class Checkpoints(Part):
    minutes: Positive = key("last.ckpt is written this often within an epoch, and at the end of every epoch")
    exit_code: Annotated[int, Field(ge=1, le=255)] = key(
        "of a run that SIGTERM, SIGINT, SIGUSR1 or SIGUSR2 ended, saved, at the end of a batch"
    )
    background: Literal["auto"] | bool = key("a thread writes checkpoints while the training goes on; auto: on GPUs")


class Model(Part):
    target: Target
    width: Any = follows("width")
    dropout: Any = follows("recipe.dropout")


class Classifier(Part):
    target: Target
    partial: Partial
    epochs: Any = follows("epochs")
    batch_size: Any = follows("batch_size")
    freeze_epochs: Any = follows("freeze_epochs")
    channels_last: Any = follows("channels_last")
    compile: Any = follows("compile")
    compile_mode: Any = follows("compile_mode")
    seed: Any = follows("seed")


class LoggerSettings(Part):
    """wandb.Settings, whose other keys can be given as +logger.settings.KEY=VALUE."""

    model_config = ConfigDict(extra="allow")
    init_timeout: NotNegative = key("logger=wandb: seconds for the server to answer at the beginning", default=None)


class Logger(Part):
    """conf/logger: each choice has some of the keys, and its class others, which can be given as +logger.KEY=VALUE."""

    model_config = ConfigDict(extra="allow")
    target: Target = optional()
    convert: Convert = optional()
    sub_dir: Text = key("logger=tensorboard: folder of its files in the run's folder", default=None)
    project: Text = key("logger=wandb: project at Weights & Biases", default=None)
    group: Text | None = key("logger=wandb: group of runs; null: WANDB_RUN_GROUP, which a sweep sets", default=None)
    offline: bool = key("logger=wandb: write to the run's folder only, which needs no account", default=None)
    finish_seconds: NotNegative = key("logger=wandb: how long the end of a run waits for uploads", default=None)
    settings: LoggerSettings = optional()


class Training(Shared):
    """What trainings of every task share: conf/training.yaml."""

    seed: Annotated[int, Field(ge=0, le=2**32 - 1)] = key("of everything random")
    name: FolderName | None = key("the run's folder in output; null: data set, recipe, width, seed, other overrides")
    output: Path = key("folder of the runs' folders")
    accumulate: Count = key("batches that a step adds up; batch_size stays the global batch of a step")
    precision: Literal["auto", "float32", "bf16", "fp16"] = key(
        "of the training; auto: bf16 or fp16 on a GPU, float32 on a CPU; validation is float32"
    )
    profile: bool = key("write where the time of a step goes: profile.csv, and trace.json.gz for ui.perfetto.dev")
    checkpoint: Checkpoints
    curve_seconds: NotNegative = key("curve.png is drawn again at the end of an epoch when it is older")
    trainer: TrainingDevices
    epochs: Annotated[int, Field(ge=1, le=1_000_000)] = key("passes over the training images")
    batch_size: Annotated[int, Field(ge=2, le=1_048_576)] = key("images of a step on all devices together")
    recipe: Any
    logger: Logger

    @model_validator(mode="after")
    def _together(self) -> Self:
        recipe = self.recipe
        if (recipe.ema_decay is None) == (recipe.ema_span is None):
            both = f"recipe.ema_decay={_text(recipe.ema_decay)}, recipe.ema_span={_text(recipe.ema_span)}"
            raise ValueError(f"{both}: give one, and null for the other")
        if self.batch_size < 2 * self.accumulate:
            raise ValueError(
                f"accumulate={self.accumulate}: leaves less than two images of batch_size={self.batch_size} "
                "for a batch, which BatchNorm needs"
            )
        return self


class Train(Training):
    """conf/train.yaml."""

    task: Literal["classification"] = key("what is trained", json_schema_extra={"words": "classification or detection"})
    width: Width = key("width multiplier: 0.5, 0.58, 0.8, 1.0, 1.11, 1.3, 1.5 and 2.0 are published")
    weights: Path | None = key("what to start from, but for the classifier: timm, official:FILE, a file or a folder")
    freeze_epochs: Annotated[int, Field(ge=0)] = key("epochs in which only the classifier learns, at most epochs")
    loader: Loader
    channels_last: bool = key("memory format of images and weights")
    compile: Literal["auto"] | bool = key(
        "torch.compile training step and validation, which takes minutes, once; auto: on GPUs"
    )
    compile_mode: Literal["default", "reduce-overhead"] = key(
        "reduce-overhead: the compiled step as CUDA graphs, for GPUs that wait for the host; takes more memory"
    )
    data: TrainingData
    model: Model
    classifier: Classifier
    image_size: ImageSize = key("side of the square that the network sees, in pixels")
    recipe: Recipe

    @model_validator(mode="after")
    def _fit(self, info: ValidationInfo) -> Self:
        """Context: the keys on the command line. A recipe's own warm-up may be longer than a run that was cut short."""
        epochs, recipe = self.epochs, self.recipe
        for name, value in (("recipe.warmup_epochs", recipe.warmup_epochs), ("freeze_epochs", self.freeze_epochs)):
            if name in (info.context or ()) and value > epochs:
                raise ValueError(f"{name}={value}: give at most epochs={epochs}")
        if self.freeze_epochs and self.weights is None:
            frozen = f"freeze_epochs={self.freeze_epochs}: there is nothing learned to freeze without weights"
            raise ValueError(f"{frozen}: give weights=timm or weights=FILE")
        if self.accumulate > 1 and self.compile_mode == "reduce-overhead":
            raise ValueError(
                f"accumulate={self.accumulate}: CUDA graphs overwrite the gradients that it adds up: "
                "give compile_mode=default"
            )
        return self


class Evaluate(Shared):
    """conf/evaluate.yaml."""

    run: Path | None = key("a run's folder: its averaged weights, and its data and preprocessing unless given here")
    selection: Literal["last", "best_ema"] = key("which of the run's epochs")
    weights: Path | None = key("instead of run: timm (published), official:FILE, a file of any form, or a folder")
    width: Width = key("width multiplier of weights that do not say it themselves")
    image_size: ImageSize = key("side of the square that the network sees, in pixels")
    loader: Loader
    precision: Literal["auto", "float32", "bf16", "fp16"] = key("of the evaluation")
    report: Report | Annotated[list[Report], Field(min_length=1)] | None = key(
        "files in the run's folder, or beside results: classes and predictions are CSV, confusion and worst pictures",
        json_schema_extra={"words": "one of classes, predictions, confusion, worst, null, or several: [classes,worst]"},
    )
    test_set: Literal["imagenet_v2", "imagenet_real", "imagenet_a", "imagenet_r", "imagenet_sketch"] | None = key(
        "how labels count; set by data=imagenet_v2 and its siblings"
    )
    real_labels: Path | None = key("ReaL's real.json, for data=imagenet_real")
    data: EvaluationData
    trainer: Devices
    recipe: Any = Field(None, json_schema_extra={"unread": True})  # what a data set says of training

    @model_validator(mode="after")
    def _together(self) -> Self:
        if (self.run is None) == (self.weights is None):
            raise ValueError("give either run=outputs/NAME or weights=timm, weights=FILE")
        return self


def _text(value: float | None) -> str:
    return "null" if value is None else f"{value:g}"
