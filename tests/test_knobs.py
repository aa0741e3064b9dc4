"""Every key of conf/ changes something. The keys come from the composed configs, so that a new one is tested, too.

A key that no table here knows is given another value, which has to change the results of a tiny run; the tables hold
the values that cannot be derived, and the keys whose effect is another one: a refusal, a file, a property of what is
built. A key that only restates another one (`${...}`) is not tried.
"""

import csv
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import pytest
import pytorch_lightning as pl
import torch
from conftest import TINY, train_in
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from test_evaluation import random_network

from data.dali_loader import dali_installed
from repghost.run import WHERE_AND_HOW_FAST, flat

Program = Callable[..., int]
ROOT = Path(__file__).parents[1]


def keys_of(program: str) -> dict[str, Any]:
    """Every key of conf/`program`.yaml that has a value of its own, with that value."""
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        config = flat(OmegaConf.to_container(compose(program, ["data.root=x"])))
    named = {"_target_", "_partial_", "_convert_"}
    return {
        key: value
        for key, value in config.items()
        if key.rpartition(".")[2] not in named and not str(value).startswith("${")
    }


def another(key: str, value: Any) -> str:
    """A value for `key` that is not its own."""
    if isinstance(value, bool):
        return str(not value).lower()
    if isinstance(value, int | float):
        return str(value + 1 if isinstance(value, int) else value / 2)
    assert isinstance(value, list), f"{key} is new: say in a table of {Path(__file__).name} what it changes"
    return str([x / 2 for x in value]).replace(" ", "")


def last_line(capsys: pytest.CaptureFixture[str]) -> str:
    return capsys.readouterr().err.strip().splitlines()[-1]


# -- training ----------------------------------------------------------------------------------------------------------

WIDE = ("recipe.rand_augment_from_width=0.05",)
TAUGHT = ("teacher={last}", "recipe.teacher_weight=0.5")
BOTH_MIXED = ("recipe.mix.mixup=1", "recipe.mix.cutmix=1")
GROWING = ("train_image_size=64", "epochs=2", "recipe.start_image_size=32")
# What else is on the command line, of the run with the key's own value, too: first match.
CONTEXTS = {
    "recipe.augment.rand_augment": WIDE,
    "recipe.ema_decay": ("recipe.ema_span=null", "recipe.ema_decay=0.5"),
    "freeze_epochs": ("weights={last}",),
    "recipe.quantization_aware": ("weights={last}",),
    # The first epoch is the warm-up, with the rate that it starts at.
    "recipe.learning_rate": ("epochs=2",),
    "recipe.final_learning_rate": ("epochs=2",),
    "recipe.warmup_epochs": ("epochs=2",),
    "recipe.teacher": TAUGHT,
    "recipe.mix.cutmix_share": BOTH_MIXED,
    "recipe.mix.probability": BOTH_MIXED,
    "recipe.start_image_size": GROWING[:2],
    "recipe.full_size_epochs": GROWING,
    "recipe.cycle_epochs": ("epochs=2",),
}
VALUES = {
    "image_size": "64",
    "epochs": "3",
    "recipe.warmup_epochs": "2",
    "recipe.weight_decay": "0.1",
    "recipe.gradient_clip": "1e-3",
    "recipe.rand_augment_from_width": "0.05",
    "recipe.augment.rand_augment.operations": "1",
    "recipe.augment.rand_augment.magnitude": "2",
    "recipe.augment.rand_augment.fill": "[0,0,255]",
    "recipe.augment.erase.area": "[0.3,0.4]",
    "recipe.augment.erase.aspect": "[1,1]",
    "recipe.augment.erase.probability": "1",
    "recipe.ema_decay": "0.6",
    "recipe.ema_span": "0.9",
    "precision": "bf16",
    "batch_size": "9",
    "weights": "{last}",
    "data.crop_fraction": "0.5",
    "accumulate": "2",
    "train_image_size": "64",
    "recipe.start_image_size": "32",
    "recipe.full_size_epochs": "2",
    "recipe.cycle_epochs": "1",
    "recipe.mix.mixup": "1",
    "recipe.mix.cutmix": "1",
    "recipe.quantization_aware": "true",
    "recipe.teacher_loss": "hard",
    "recipe.teacher_weight": "0.9",
    "recipe.teacher_image_size": "64",
}
# Refused in one line that names the value.
REFUSED = {
    "task": "segmentation",
    "data.root": "nowhere",
    "data.train": "nowhere-*.tar",
    "data.val": "nowhere-*.tar",
    "data.class_names": "nowhere.txt",
    "loader": "fast",
    "compile": "perhaps",
    "trainer.accelerator": "abacus",
    "trainer.devices": "0",
    "trainer.num_nodes": "0",
}


class Built(NamedTuple):
    """What a run has built when its training would begin."""

    trainer: pl.Trainer
    classifier: Any
    data: Any
    printed: str


def loader(built: Built) -> Any:
    return built.data.val_dataloader()


def of_dali(option: str) -> Callable[[Built], Any]:
    """What the DALI loader is given: tests/test_dali_loader.py shows what it does with it."""

    def given(built: Built) -> Any:
        with mock.patch.object(built.data, "loader", "dali"):
            return getattr(loader(built).options, option)

    return given


def saves(built: Built) -> Any:
    (callback,) = (c for c in built.trainer.checkpoint_callbacks or built.trainer.callbacks if hasattr(c, "signals"))  # type: ignore[attr-defined]
    return {name: value for name, value in vars(callback).items() if isinstance(value, int | float)}, vars(
        callback.signals
    )


# The value, and what is different with it.
BUILT: dict[str, tuple[str, Callable[[Built], Any]]] = {
    "recipe.name": ("mine", lambda built: built.printed),
    "deterministic": ("true", lambda _: torch.are_deterministic_algorithms_enabled()),
    "channels_last": ("false", lambda b: b.classifier.model.conv_head.weight.stride()),
    "data.workers": ("3", lambda b: loader(b).num_workers),
    "data.prefetch": ("3", lambda b: loader(b).prefetch_factor),
    "data.readers": ("3", of_dali("readers")),
    "data.hw_decoder_load": ("0.9", of_dali("hw_decoder_load")),
    "data.thread_affinity": ("false", of_dali("thread_affinity")),
    "data.eval_batch_size": ("4", lambda b: len(loader(b))),
    "trainer.threads": ("3", lambda _: torch.get_num_threads()),
    "checkpoint.minutes": ("3", saves),
    "checkpoint.exit_code": ("3", saves),
    "checkpoint.background": ("true", saves),
    "compile_mode": ("reduce-overhead", lambda b: b.classifier._compile_mode),
}
DALI_ONLY = {"data.readers", "data.hw_decoder_load", "data.thread_affinity"}
needs_dali = pytest.mark.skipif(not dali_installed(), reason="nvidia-dali is made for Linux on x86-64")
# The key, and the files of a run that has all of these.
FILES = {
    "results": ("results=there/r.csv", "there/r.csv"),
    "output": ("output=runs", "runs/mine/config.yaml"),
    "name": ("name=mine", "runs/mine/evaluation.json"),
    "profile": ("profile=true", "runs/mine/profile.csv"),
    "logger": ("logger=tensorboard", "runs/mine/**/events.out.tfevents.*"),
    "data.cache": ("data.cache=cache", "cache/digits/manifest.json"),
}
# Below, but for the timeout, which takes several ranks: test_sweep.py; and for the teachers: test_distillation.py and
# test_logits_store.py.
ELSEWHERE = {"data.skip_budget", "curve_seconds", "data.root", "trainer.timeout_minutes"}
ELSEWHERE |= {"teacher", "recipe.teacher_logits"}
TRAIN = keys_of("train")
RESULTS = sorted(TRAIN.keys() - REFUSED.keys() - BUILT.keys() - FILES.keys() - ELSEWHERE)


@pytest.fixture(scope="module")
def logged(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """metrics.csv of a tiny run, which is trained once for each command line."""
    done: dict[tuple[str, ...], Path] = {}

    def run(*arguments: str) -> Path:
        if arguments not in done:
            folder = tmp_path_factory.mktemp("knobs")
            with pytest.MonkeyPatch.context() as patched:
                patched.setattr("repghost.evaluation.evaluate.evaluate_run", lambda *_: None)
                train_in(folder, f"data.root={shards}", "name=x", "epochs=1", *arguments)
            done[arguments] = folder / "outputs/x/metrics.csv"
        return done[arguments]

    return run


def test_the_same_command_comes_to_the_same(logged: Callable[..., Path]) -> None:
    assert logged("output=outputs").read_text() == logged().read_text()


@pytest.mark.parametrize("key", RESULTS)
def test_a_key_changes_the_results(key: str, logged: Callable[..., Path]) -> None:
    last = logged().parent / "checkpoints/last.ckpt"
    context = [c.format(last=last) for c in next((c for p, c in CONTEXTS.items() if key.startswith(p)), ())]
    value = (VALUES.get(key) or another(key, TRAIN[key])).format(last=last)
    assert logged(*context, f"{key}={value}").read_text() != logged(*context).read_text()


@pytest.mark.parametrize("key", REFUSED)
def test_a_wrong_value_is_refused(key: str, train_tiny: Program, capsys: pytest.CaptureFixture[str]) -> None:
    assert train_tiny(f"{key}={REFUSED[key]}") == 2
    assert REFUSED[key] in last_line(capsys)


@pytest.fixture
def build(train_tiny: Program, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> Iterator[Callable[..., Built]]:
    """What is built for a command line."""
    built: list[tuple[Any, Any, Any]] = []

    def fit(trainer: pl.Trainer, classifier: Any, datamodule: Any, **_: Any) -> None:
        datamodule.trainer = trainer
        built.append((trainer, classifier, datamodule))

    monkeypatch.setattr(pl.Trainer, "fit", fit)
    monkeypatch.setattr("repghost.evaluation.evaluate.evaluate_run", lambda *_: None)
    threads = torch.get_num_threads()

    def program(*arguments: str) -> Built:
        assert train_tiny("name=x", "loader=torch", "data.workers=1", *arguments) == 0
        return Built(*built[-1], capsys.readouterr().out)

    yield program
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="module")
def defaults() -> dict[str, Any]:
    """What tests have seen without a key of theirs, by key."""
    return {}


@pytest.mark.parametrize("key", [pytest.param(key, marks=needs_dali if key in DALI_ONLY else ()) for key in BUILT])
def test_a_key_changes_what_is_built(key: str, build: Callable[..., Built], defaults: dict[str, Any]) -> None:
    if key not in defaults:
        built = build()
        defaults |= {k: BUILT[k][1](built) for k in (DALI_ONLY if key in DALI_ONLY else BUILT.keys() - DALI_ONLY)}
    value, observed = BUILT[key]
    assert observed(build(f"{key}={value}")) != defaults[key]


def test_the_embedded_digits_train_and_files_are_where_keys_say(
    train_tiny: Program, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [option for option, _ in FILES.values()]
    assert train_tiny("data=digits", "epochs=1", "batch_size=64", "data.eval_batch_size=512", *options) == 0
    assert "10 classes" in capsys.readouterr().out
    assert [file for _, file in FILES.values() if not list(Path().glob(file))] == []


@pytest.mark.usefixtures("no_evaluation")
def test_the_curve_is_drawn_as_often_as_said(train_tiny: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    from repghost.training import loggers

    drawn: list[Any] = []
    monkeypatch.setattr(loggers, "draw_curve", lambda *arguments: drawn.append(arguments))
    for seconds in ("1e9", "0"):  # at the end only; also at the end of each of two epochs
        assert train_tiny(f"name=x{seconds}", f"curve_seconds={seconds}") == 0
    assert len(drawn) == 1 + 3


def test_bad_images_have_a_budget(train_tiny: Program, shards: Path, tmp_path: Path) -> None:
    root = shutil.copytree(shards, tmp_path / "damaged")
    with open(root / "train-000000.tar", "r+b") as tar:
        content = tar.read()
        at = content.index(b"\xff\xd8") + 300  # within the first image
        tar.seek(at)
        tar.write(bytes([content[at] ^ 1]))
    assert train_tiny(f"data.root={root}", "name=a") == 2
    assert train_tiny(f"data.root={root}", "name=a", "data.skip_budget=0.5") == 0


# -- evaluation --------------------------------------------------------------------------------------------------------

EVALUATE_REFUSED = {
    **{key: value for key, value in REFUSED.items() if key in keys_of("evaluate") and key != "data.train"},
    "width": "0.2",
    "selection": "worst",
    "test_set": "imagenet_z",
    "report": "lines",
    "run": "nowhere",
    "weights": "nowhere.ckpt",
}
EVALUATE_VALUES = {"image_size": "64", "precision": "bf16", "data.crop_fraction": "0.5"}
# The same code as in training, or of one split only; real_labels: tests/test_evaluation.py.
AS_IN_TRAINING = {"data.train", "data.cache", *BUILT.keys(), "data.root", "trainer.timeout_minutes", "real_labels"}
EVALUATE = keys_of("evaluate")


@pytest.fixture
def loss(evaluate_with: Program, shards: Path, tmp_path: Path) -> Callable[..., tuple[int, str]]:
    """Exit code of evaluate.py with the weights of a network of width 0.1, and the loss, from the file `results`."""
    random_network(0.1, 3, tmp_path / "w.safetensors")

    def evaluated(*arguments: str) -> tuple[int, str]:
        named = {a.partition("=")[0] for a in arguments}
        plain = [f"weights={tmp_path / 'w.safetensors'}", f"data.root={shards}", "width=0.1", "image_size=32"]
        plain += ["trainer=cpu", "data.workers=0", "results=r.csv"]
        if "run" in named or "selection" in named:
            plain = plain[1:] if "run" in named else [f"run={tmp_path / 'run'}", *plain[1:]]
        code = evaluate_with(*(p for p in plain if p.partition("=")[0] not in named), *arguments)
        with open("r.csv", newline="") if Path("r.csv").exists() else open("/dev/null") as file:
            rows = list(csv.DictReader(file))
        return code, rows[-1]["loss"] if rows else ""

    return evaluated


@pytest.mark.parametrize("key", sorted(EVALUATE.keys() - EVALUATE_REFUSED.keys() - AS_IN_TRAINING - {"results"}))
def test_a_key_changes_the_evaluation(key: str, loss: Callable[..., tuple[int, str]], defaults: dict[str, Any]) -> None:
    value = EVALUATE_VALUES.get(key) or another(key, EVALUATE[key])
    first = defaults.get("loss") or defaults.setdefault("loss", loss())
    second = loss(f"{key}={value}")
    assert first[0] == second[0] == 0 and first[1] != second[1]


@pytest.mark.parametrize("key", EVALUATE_REFUSED)
def test_a_wrong_value_of_an_evaluation_is_refused(
    key: str, loss: Callable[..., tuple[int, str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if key == "selection":
        (tmp_path / "run").mkdir()
        (tmp_path / "run/config.yaml").write_text("image_size: 32\nloader: torch\ndata: {augment: {}}\n")
    assert loss(f"{key}={EVALUATE_REFUSED[key]}") == (2, "")
    assert EVALUATE_REFUSED[key] in last_line(capsys)


def test_an_evaluation_needs_nothing_of_a_recipe(
    loss: Callable[..., tuple[int, str]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert not any(key.startswith(("recipe", "epochs", "batch_size", "accumulate", "seed")) for key in EVALUATE)
    assert loss("epochs=3")[0] == 2 and "epochs" in last_line(capsys)


# -- both --------------------------------------------------------------------------------------------------------------


def test_the_tables_hold_keys_that_exist() -> None:
    tables = VALUES | REFUSED | BUILT | FILES | dict.fromkeys(ELSEWHERE)
    assert tables.keys() <= TRAIN.keys() and EVALUATE_REFUSED.keys() <= EVALUATE.keys()
    for key in WHERE_AND_HOW_FAST:
        assert any(known == key or known.startswith(f"{key}.") for known in TRAIN), key
    assert all(option.partition("=")[0] in TRAIN for option in TINY if not option.startswith(("recipe=", "trainer=")))
