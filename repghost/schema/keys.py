"""The keys of train.py and evaluate.py that all tasks share: types, ranges, choices, and a sentence on each for --help.

The keys of a task are beside it, in classification.py and detection.py. They mirror what Hydra composes from conf/; the
values themselves are in conf/ alone. So are the keys that have the value of another one there, `${...}`, and cannot be
given: they are not here.
Check: `pytest tests/test_schema.py`.
"""

from typing import Annotated, Any, Literal, Self

from pydantic import ConfigDict, Field, model_validator

from repghost.schema.values import (
    Convert,
    Count,
    FolderName,
    NotNegative,
    Part,
    Partial,
    Path,
    Positive,
    Processes,
    ShareAboveZero,
    ShareBelowOne,
    Target,
    Text,
    key,
)


class Built(Part):
    """What is built from other keys alone."""

    target: Target


class BuiltLater(Built):
    """The same, from what only the program knows, too."""

    partial: Partial


class Devices(BuiltLater):
    """conf/trainer."""

    accelerator: Literal["auto", "cpu", "gpu"] = key("what to compute on; auto: GPUs where there are any")
    devices: Literal["auto"] | Annotated[int, Field(ge=1, le=1024)] = key(
        "processes on this machine, one a device; auto: every GPU, one CPU process"
    )
    num_nodes: Annotated[int, Field(ge=1, le=65536)] = key("machines")
    threads: Annotated[int, Field(ge=1, le=1024)] | None = key("of PyTorch in a CPU process; null: one a core, at most")
    timeout_minutes: Annotated[float, Field(gt=0, le=43200)] = key("how long a rank waits for the others")


class Shared(Part):
    """What training and evaluation share: conf/base.yaml and conf/trainer."""

    results: Path = key("CSV file to which every finished evaluation appends a row")
    deterministic: bool = key("use deterministic algorithms only")
    trainer: Devices


class Evaluation(Shared):
    """What evaluations of every task share."""

    selection: Literal["last", "best_ema"] = key("which of the run's epochs")
    precision: Literal["auto", "float32", "bf16", "fp16"] = key("of the evaluation")


class Shards(Built):
    """Shards of any task: what conf/data/imagenet.yaml and conf/data/coco.yaml have in common."""

    convert: Convert
    root: Path | dict[str, Any] = key("folder of shards that `python -m data.write_shards` wrote, or its URL")
    cache: Path = key("folder for downloads, indexes of others' shards and compiled code")
    workers: Processes = key("processes, or threads of dali, of a rank that decode; auto: its share of the cores")
    prefetch: Annotated[int, Field(ge=1, le=1024)] = key("batches that a worker, or dali, is ahead")
    eval_batch_size: Annotated[int, Field(ge=1, le=16384)] = key("images per device and batch in evaluation")


class SGDRecipe(Part):
    """What the recipes of every task have: the optimizer and the average of the weights."""

    name: Text = key("of the recipe, for the run's name and its log")
    reference_batch_size: Count = key("global batch size for which learning rates are stated")
    momentum: ShareBelowOne = key("of SGD, for classifiers in Nesterov's form")
    weight_decay: NotNegative = key("of parameters with more than one dimension that are no biases")
    gradient_clip: Positive | None = key("norm that the gradients of a step are scaled down to; null: never")
    ema_decay: ShareBelowOne | None = key("of the weight average; null: by ema_span")
    ema_span: ShareAboveZero | None = key(
        "the weight average's memory as a share of the run's steps; null: by ema_decay"
    )


class Checkpoints(Part):
    minutes: Positive = key("last.ckpt is written this often within an epoch, and at the end of every epoch")
    exit_code: Annotated[int, Field(ge=1, le=255)] = key(
        "of a run that SIGTERM, SIGINT, SIGUSR1 or SIGUSR2 ended, saved, at the end of a batch"
    )
    background: Literal["auto"] | bool = key("a thread writes checkpoints while the training goes on; auto: on GPUs")


class LoggerSettings(Part):
    """wandb.Settings, whose other keys can be given as +logger.settings.KEY=VALUE."""

    model_config = ConfigDict(extra="allow")
    init_timeout: NotNegative = key("logger=wandb: seconds for the server to answer at the beginning", default=None)


class Logger(Part):
    """conf/logger: each choice has some of the keys, and its class others, which can be given as +logger.KEY=VALUE."""

    model_config = ConfigDict(extra="allow")
    target: Target = key(default=None)
    convert: Convert = key(default=None)
    sub_dir: Text = key("logger=tensorboard: folder of its files in the run's folder", default=None)
    project: Text = key("logger=wandb: project at Weights & Biases", default=None)
    group: Text | None = key("logger=wandb: group of runs; null: WANDB_RUN_GROUP, which a sweep sets", default=None)
    offline: bool = key("logger=wandb: write to the run's folder only, which needs no account", default=None)
    finish_seconds: NotNegative = key("logger=wandb: how long the end of a run waits for uploads", default=None)
    settings: LoggerSettings = key(default=None)


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


def _text(value: float | None) -> str:
    return "null" if value is None else f"{value:g}"
