"""Every key refuses what cannot be meant, in one line that names it; paths and names are what was typed; --help.

The keys, and wrong values for each, come from the schema itself, so that a new key is tested, too.
"""

import copy
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from data.rand_augment import MAX_OPERATIONS
from repghost.command_line import CONF, compose_config, own_values, program_of, read_command_line, read_override
from repghost.detection.backbone import Norm
from repghost.detection.detectors import Name
from repghost.detection.reports import REPORTS as DETECTION_REPORTS
from repghost.errors import UserError
from repghost.evaluation.reports import REPORTS
from repghost.reference import PUBLISHED
from repghost.run import SELECTIONS, flat
from repghost.schema.check import PROGRAMS, check_values, keys
from repghost.schema.help import help_text, task_of, task_of_choice
from repghost.training.trainer import PRECISIONS

ROOT = Path(__file__).parents[1]
NEEDED = {
    "train": ["data.root=x"],
    "evaluate": ["data.root=x", "weights=timm"],
    "train_detection": ["data.root=x", "weights=timm"],
    "evaluate_detection": ["data.root=x", "run=x"],
    "teach": ["data.root=x", "teacher=x", "out=x"],
}


def composed(program: str, *overrides: str) -> Any:
    return compose_config(program, [*NEEDED[program], *overrides])


def refused(program: str, *overrides: str) -> str:
    """The line that refuses a command."""
    with pytest.raises(UserError) as error:
        composed(program, *overrides)
    assert str(error.value).isprintable(), "one line"
    return str(error.value)


# -- values ------------------------------------------------------------------------------------------------------------

JUNK = {"nonsense", "{a:1}", "", "[]", "[[1]]", "[1,x]", "nan", "-inf", "1e999"}


def entries(program: str) -> dict[str, dict[str, Any]]:
    """The JSON schema of every key that can be given."""
    schema = PROGRAMS[program].model_json_schema()

    def walk(part: dict[str, Any], prefix: str) -> Iterator[tuple[str, dict[str, Any]]]:
        for name, entry in part["properties"].items():
            reference = next((v["$ref"] for v in entry.get("anyOf", [entry]) if "$ref" in v), None)
            if reference:
                yield from walk(schema["$defs"][reference.rpartition("/")[2]], f"{prefix}{name}.")
            elif entry.get("description"):
                yield prefix + name, entry

    return dict(walk(schema, ""))


def outside(numbers: dict[str, Any]) -> set[str]:
    """Numbers that the JSON schema of a number excludes."""
    found = {str(numbers.get("exclusiveMinimum", numbers.get("minimum", 1) - 1)), "-1"}
    if "maximum" in numbers or "exclusiveMaximum" in numbers:
        found |= {str(numbers.get("exclusiveMaximum", numbers.get("maximum", 0) + 1)), "9" * 30}
    return found | ({"1.5", "'1'", "true"} if numbers["type"] == "integer" else {"'1'", "true"})


def wrong_values(entry: dict[str, Any]) -> set[str]:
    """Values of another type, out of the range or among no choices, for one key."""
    variants = {variant.get("type"): variant for variant in entry.get("anyOf", [entry])}
    if any("format" in variant for variant in variants.values()):
        return {""}  # anything else is text, as it was typed
    wrong = JUNK if "null" in variants else JUNK | {"null"}
    for kind, variant in variants.items():
        if kind in ("integer", "number"):
            wrong = wrong | outside(variant)
        elif "shape" in variant:
            fit = [str(variant["items"].get("maximum", 1))] * variant["minItems"]
            lists = [[value, *fit[1:]] for value in outside(variant["items"])] + [[*fit, fit[0]], fit[1:]]
            wrong = wrong | {f"[{','.join(values)}]" for values in lists} | {"1", "true"}
            wrong = wrong | ({"[0.9,0.1]"} if len(fit) == 2 else set())
        elif kind != "null" and not {"integer", "number"} & variants.keys():
            wrong = wrong | {"1", "0.5"}
    return wrong


TRIED = {
    (program, key, value)
    for program in PROGRAMS
    for key, entry in entries(program).items()
    for value in wrong_values(entry)
}


@pytest.mark.parametrize("program", PROGRAMS)
def test_every_key_refuses_what_cannot_be_meant(program: str) -> None:
    known, parser = keys(program), OverridesParser.create()
    loggers = ("csv", "wandb", "tensorboard") if not program.startswith("evaluate") else ()
    contents = {name: own_values(program, composed(program, f"logger={name}")) for name in loggers}
    contents[""] = own_values(program, composed(program))
    for _, key, value in sorted(row for row in TRIED if row[0] == program):
        logger = re.match("logger=([a-z]*)", known[key].sentence)
        part = values = copy.deepcopy(contents[logger[1] if logger else ""])
        *parts, last = key.split(".")
        for name in parts:
            part = part[name]
        part[last] = parser.parse_override(read_override(f"{key}={value}", program, sweeping=False)).value()
        try:
            check_values(program, values, [key])
        except UserError as error:
            line = str(error)
            assert line.startswith(f"{key}=") and line.endswith(known[key].words) and line.isprintable(), line
        else:
            pytest.fail(f"{key}={value} is taken")


def test_the_table_is_as_long_as_the_schema() -> None:
    assert len({row[:2] for row in TRIED}) == sum(len(entries(program)) for program in PROGRAMS)
    assert len(TRIED) > 900


@pytest.mark.parametrize("program", PROGRAMS)
def test_schema_and_conf_have_the_same_keys(program: str) -> None:
    choices = [[], ["logger=wandb"], ["logger=tensorboard"]] if not program.startswith("evaluate") else [[]]
    configs = [composed(program, *choice) for choice in choices]
    in_conf = {key for config in configs for key in flat(own_values(program, config))}
    parts = {key for key, entry in keys(program).items() if entry.is_part}
    assert in_conf - parts == keys(program).keys() - parts
    raw = flat(OmegaConf.to_container(configs[0]))
    assert not [key for key in keys(program).keys() - parts if str(raw.get(key)).startswith("${")]


def test_only_arguments_of_what_is_built_may_be_other_keys() -> None:
    """One that a recipe or data set has beside those is read by nothing."""
    config = OmegaConf.create({"seed": 1, "recipe": {"foo": "${seed}"}, "data": {"_target_": "x", "seed": "${seed}"}})
    assert own_values("train", config) == {"seed": 1, "recipe": {"foo": 1}, "data": {"_target_": "x"}}


def test_choices_of_the_schema_are_those_of_the_code() -> None:
    found = {key: re.findall(r"[a-z0-9_]+", entry.words) for key, entry in keys("evaluate").items()}
    assert set(found["test_set"]) - {"one", "of", "null"} == PUBLISHED.keys()
    assert set(found["selection"]) - {"or"} == set(SELECTIONS)
    assert set(found["report"]) - {"one", "of", "null", "or", "several"} == set(REPORTS)
    assert set(found["precision"]) - {"one", "of"} == {"auto", *PRECISIONS}
    detection = {key: re.findall(r"[a-z0-9_]+", entry.words) for key, entry in keys("evaluate_detection").items()}
    assert set(detection["report"]) - {"one", "of", "null", "or", "several"} == set(DETECTION_REPORTS)
    assert set(detection["selection"]) - {"or"} == set(SELECTIONS)
    words = keys("train_detection")
    assert set(re.findall("[a-z_]+", words["detector.name"].words)) - {"one", "of"} == set(get_args(Name))
    assert set(re.findall("[a-z]+", words["detector.norm"].words)) - {"one", "of"} == set(get_args(Norm))
    assert keys("train")["recipe.augment.rand_augment.operations"].words.endswith(f"to {MAX_OPERATIONS}")


ACCEPTED = [
    ["width=1", "recipe.learning_rate=1", "recipe.scale=[1,1]", "seed=4294967295", "compile=true", "data.workers=0"],
    ["recipe.augment.jitter=null", "recipe.augment.erase=null", "recipe.ema_decay=null", "recipe.ema_span=1"],
    ["epochs=1"],  # fewer than the warm-up of the recipe
    ["logger=wandb", "+logger.entity=me", "+logger.settings.mode=offline", "logger.group=7"],
    ["recipe=finetune", "weights=timm"],
    ["data=digits", "logger=tensorboard"],
    ["name=x-${width}-${seed}"],
]


@pytest.mark.parametrize("overrides", ACCEPTED, ids=lambda overrides: overrides[0])
def test_what_can_be_meant_is_taken(overrides: list[str]) -> None:
    composed("train", *overrides)


TOGETHER = [
    (["epochs=3", "recipe.warmup_epochs=4"], "recipe.warmup_epochs=4: give at most epochs=3"),
    (["epochs=3", "freeze_epochs=4"], "freeze_epochs=4: give at most epochs=3"),
    (["recipe.ema_span=0.1"], "recipe.ema_decay=0.9999, recipe.ema_span=0.1: give one, and null for the other"),
    (["recipe.ema_decay=null"], "recipe.ema_decay=null, recipe.ema_span=null: give one, and null for the other"),
    (["batch_size=4", "accumulate=3"], "accumulate=3: leaves less than two images of batch_size=4"),
    (["model.width=2"], "model.width has the value of width: give width=VALUE"),
    (["data.batch_size=8"], "data.batch_size has the value of batch_size: give batch_size=VALUE"),
    (["classifier.compile=true"], "classifier.compile has the value of compile"),
    (["++model.width=3"], "model.width has the value of width: give width=VALUE"),
    (["~data.image_size"], "data.image_size has the value of image_size: give image_size=VALUE"),
    (["data={image_size:64}"], "data.image_size=64: no such key; did you mean image_size?"),
    (["+recipe.foo=${seed}"], "recipe.foo=0: no such key"),
    (["data._target_=foo.bar"], "data._target_=foo.bar: not a class or function that can be imported"),
    (["model._target_=repghost.model.WIDTHS"], "model._target_=repghost.model.WIDTHS: not a class"),
    (["recipe.augment=null"], "recipe.augment=null: give recipe.augment.KEY=VALUE"),
    (["recipe.augment.jitter=3"], "recipe.augment.jitter=3: give null, or recipe.augment.jitter.KEY=VALUE"),
    (["~data.cache"], "data.cache has no value: give a path"),
    (["widht=1"], "widht=1: no such key; did you mean width?"),
    (["workers=1"], "workers=1: no such key; did you mean data.workers?"),
    (["recipe.lerning_rate=1"], "recipe.lerning_rate=1: no such key; did you mean recipe.learning_rate?"),
    (["checkpoint.grace_seconds=x"], "checkpoint.grace_seconds=x: no such key"),
    (["+foo=1"], "foo=1: no such key"),
    (["+trainer.max_steps=1"], "trainer.max_steps=1: no such key"),
    (["logger=null"], "logger=null: give one of csv, tensorboard, wandb"),
    (["data=5"], "data=5: give one of coco, digits, digits_scenes, imagenet, imagenet_a"),
    (
        ["recipe=best"],
        "recipe=best: give one of coco_1x, distill, finetune, paper, qat, quick, quick_detection, ssdlite_320",
    ),
    (["data=imagenet_a"], "test_set=imagenet_a: no key of train.py"),
    (["data.root=???"], "data.root is missing: give it on the command line, data.root=..."),
    (["name=.."], "name=..: give the name of a folder"),
    (["name=a/b"], "name=a/b: give the name of a folder"),
    ([f"name={'é' * 128}"], f"name={'é' * 128}: give the name of a folder, at most 255 bytes"),
    (["width=1,2"], "width=1,2: several values are a sweep: give -m, too"),
    (["width=[1"], "width=[1: close brackets and quotes"),
    (["seed=" + "1" * 5000], "seed=111"),
    (["width"], "width: neither KEY=VALUE nor a flag"),
    (["name=\udce9"], "name=\\udce9: not UTF-8, rename it"),
    (["task=other"], "task=other: give classification or detection"),
    (["recipe=coco_1x"], "recipe=coco_1x: for task=detection, not for task=classification"),
    (["data=digits_scenes"], "data=digits_scenes: for task=detection"),
    (["recipe.warmup_steps=5"], "recipe.warmup_steps=5: another task or command has this key"),
]


@pytest.mark.parametrize(("overrides", "message"), TOGETHER, ids=lambda value: str(value)[:40])
def test_mistakes_are_one_line(overrides: list[str], message: str) -> None:
    assert refused("train", *overrides).startswith(message)


OF_DETECTION = [
    (["recipe.label_smoothing=0.1"], "recipe.label_smoothing=0.1: another task or command has this key"),
    (["image_size=320"], "image_size=320: another task or command has this key"),
    (["recipe=paper"], "recipe=paper: for task=classification, not for task=detection"),
    (
        ["data=imagenet"],
        "data=imagenet: for task=classification",
    ),
    (["weights=null"], "detector.norm=frozen: random weights would never learn: give weights=timm"),
    (["weights=null", "detector.norm=trained"], "detector.trainable_layers=3: random weights would never learn"),
    (["data.masks=true"], "data.masks=true: detector=retinanet has no masks"),
    (["detector=mask_rcnn", "data.masks=false"], "data.masks=false: detector=mask_rcnn has masks"),
    (["detector=yolo"], "detector=yolo: give one of faster_rcnn, fcos, mask_rcnn, retinanet, ssdlite"),
    (["module.width=2"], "module.width has the value of width: give width=VALUE"),
]


@pytest.mark.parametrize(("overrides", "message"), OF_DETECTION, ids=lambda value: str(value)[:40])
def test_mistakes_of_a_detector_are_one_line(overrides: list[str], message: str) -> None:
    assert refused("train_detection", *overrides).startswith(message)


@pytest.mark.parametrize("detector", ["retinanet", "faster_rcnn", "mask_rcnn", "ssdlite", "fcos"])
def test_every_detector_is_taken(detector: str) -> None:
    config = composed("train_detection", f"detector={detector}")
    assert config.data.masks == (detector == "mask_rcnn") and config.module.detector == detector
    composed("train_detection", "data=digits_scenes", "recipe=quick_detection", f"detector={detector}", "weights=null")


def test_the_config_is_that_of_the_task_or_of_the_run(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("task: detection\n")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.yaml").write_text("epochs: 3\n")
    assert program_of("train", ["width=1"]) == program_of("train", ["task=other"]) == "train"
    assert program_of("train", ["--help", "task=detection"]) == "train_detection"
    assert program_of("evaluate", [f"run={tmp_path}", "report=classes"]) == "evaluate_detection"
    assert program_of("evaluate", [f"run={tmp_path}/other"]) == program_of("evaluate", ["run=nothing"]) == "evaluate"
    with pytest.raises(UserError, match="a sweep is of one task"):
        program_of("train", ["-m", "task=classification,detection"])


def test_an_evaluation_is_of_a_run_or_of_weights() -> None:
    assert refused("evaluate", "run=x").startswith("give either run=outputs/NAME or weights=timm")
    assert refused("evaluate", "weights=null").startswith("give either")
    assert refused("evaluate", "epochs=3").startswith("epochs=3: another task or command has this key")
    assert refused("evaluate", "data=digits", "recipe.augment.flip=1").startswith("recipe.augment.flip=1: another task")
    assert composed("evaluate", "data=digits", "report=[classes,predictions]").image_size == 32


# -- paths and names on the command line -------------------------------------------------------------------------------

ODD = ["a=b", "a,b", "a (1)", "[x]", "{y}", "{0000..0003}.tar", "#x", "it's", 'say "x"', "$x", "a\\b", "a\\", "\\'"]
ODD += ["\N{LATIN SMALL LETTER U WITH DIAERESIS}ber", "\N{CJK UNIFIED IDEOGRAPH-65E5}", "a\nb", " a ", "a:b", "a;b|c&d"]
ODD += ["*?", "1", "007", "1e3", "true", "nan", "-1", "~x~", "a b=c,(d]"]


def test_paths_are_what_was_typed() -> None:
    parser = OverridesParser.create()
    for text in ODD:
        for program, key in (
            ("train", "name"),
            ("train", "data.root"),
            ("evaluate", "run"),
            ("evaluate", "real_labels"),
        ):
            for sweeping in (False, True) if "," not in text else (False,):
                override = read_override(f"{key}={text}", program, sweeping)
                assert parser.parse_override(override).value() == text
                assert read_override(override, program, sweeping) == override, "a job of a sweep reads it again"
    everything = "".join(ODD)
    config = composed("train", f"data.root=/{everything}", f"data.cache={everything}", "output=1", "name=007")
    assert (config.data.root, config.data.cache, config.output, config.name) == (
        f"/{everything}",
        everything,
        "1",
        "007",
    )


def test_home_is_expanded_and_hydra_s_own_forms_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/ü (x)")
    assert composed("train", "data.root=~/a,b").data.root == "/home/ü (x)/a,b"
    assert composed("train", "name=~").name == "~"
    assert composed("train", "name=null", "data.train=null").data.train is None
    assert composed("train", "data.root='/a=b'", 'output="c d"').data.root == "/a=b"
    config = composed("train", "name=x (${width})", "data.root=${oc.env:HOME}/s", "width=0.5")
    assert (config.name, config.data.root) == ("x (0.5)", "/home/ü (x)/s")


@pytest.mark.parametrize(
    ("typed", "taken"),
    [
        ("weights=a,b", "weights=a,b"),
        ("name=1,2", "name='1','2'"),
        ("data.root=/a b,/c=d", "data.root=/a b,'/c=d'"),
        ("data.train={a,b}-(1).tar", "data.train='{a,b}-(1).tar'"),
        ("name='a,b','c'", "name='a,b','c'"),
        ("weights=choice(a,b)", "weights=choice(a,b)"),
        ("name=x-${width}", "name=x-${width}"),
        ("width=range(1,3)", "width=range(1,3)"),
    ],
)
def test_several_values_of_a_sweep(typed: str, taken: str) -> None:
    assert read_command_line("train", ["-m", typed]) == (["-m"], [taken], True)


def test_flags_may_stand_anywhere() -> None:
    arguments = ["width=1", "--cfg", "job", "name=a b=c"]
    assert read_command_line("train", arguments) == (["--cfg", "job"], ["width=1", "name='a b=c'"], False)
    with pytest.raises(UserError, match="unrecognized arguments: --widht; --help and --hydra-help list what there is"):
        read_command_line("train", ["--widht"])


def test_keys_may_have_dashes_as_agents_of_sweeps_write_them() -> None:
    typed = ["--width=1.0", "--recipe.learning_rate=0.1", "--data=digits", "--name=a=b", "--logger.settings.x=1"]
    taken = ["width=1.0", "recipe.learning_rate=0.1", "data=digits", "name='a=b'", "logger.settings.x=1"]
    assert read_command_line("train", typed) == ([], taken, False)
    assert read_command_line("train", ["--multirun", "--width=1.0,0.5"]) == (["--multirun"], ["width=1.0,0.5"], True)
    assert read_command_line("evaluate", ["--run=outputs/a"]) == ([], ["run=outputs/a"], False)  # a flag of Hydra, too
    for wrong in ("--widht=1.0", "--recipe.learning_rat=0.1", "--width", "--=1"):
        with pytest.raises(UserError, match=f"{wrong}|--width"):
            read_command_line("train", [wrong])
    with pytest.raises(UserError, match=r"^width=a: give"):
        compose_config("train", read_command_line("train", ["--width=a"])[1])


# -- as programs -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("program", PROGRAMS)
def test_help_explains_every_key_and_choice(program: str) -> None:
    said = help_text(program, "What it does.", CONF)
    for key, entry in keys(program).items():
        if not (entry.is_part or "._" in key):
            (line,) = re.findall(rf"^  {re.escape(key)}(?:=.*?)?  .*", said, re.MULTILINE)
            assert entry.sentence and line.endswith(f"{entry.sentence} ({entry.words})")
    for file in CONF.glob("*/*.yaml"):
        fits = "test_set:" not in file.read_text() or program == "evaluate"
        fits = fits and task_of_choice(file.parent.name, file.stem, CONF) in (None, task_of(program))
        assert (f"  {file.parent.name}={file.stem} " in said) == (fits and file.parent.name in keys(program))
    assert "recipe=paper" not in said or re.search(r"recipe=paper .*\(default\)$", said, re.MULTILINE)


WITHOUT_TORCH = """
import runpy, sys
sys.modules["torch"] = None  # whoever imports it fails
program, *arguments = sys.argv[1:]
for argument in arguments:
    sys.argv = [program, argument]
    try:
        runpy.run_path(program, run_name="__main__")
    except SystemExit as end:
        print(end.code, file=sys.stderr)
"""


@pytest.mark.parametrize("program", ["train.py", "evaluate.py"])
def test_nothing_heavy_is_imported_before_the_command_is_understood(program: str) -> None:
    mistakes = ["widht=1", "width=many", "data=nothing", "--nothing"]
    arguments = [sys.executable, "-c", WITHOUT_TORCH, program, "--help", *mistakes]
    done = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0 and done.stdout.startswith(f"usage: python {program}"), done.stderr
    lines = done.stderr.splitlines()
    assert len(lines) == 8 and lines[1::2] == ["2"] * 4
    assert all(
        line.startswith("error: ") and mistake in line for line, mistake in zip(lines[::2], mistakes, strict=True)
    )


def test_the_package_names_its_parts_when_they_are_asked_for() -> None:
    import repghost.reparameterization

    for name in repghost.__all__:
        assert getattr(repghost, name) is not None
    assert repghost.reparameterize is repghost.reparameterization.reparameterize
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = repghost.nothing
