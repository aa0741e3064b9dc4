"""Options of a command: types and ranges are checked, mistakes are one line that names the key, --help shows all."""

from dataclasses import dataclass
from pathlib import Path

import pytest

from repghost.errors import UserError
from repghost.options import PATH, SHARE, SWITCH, TEXT, WHOLE, one_of, option, parse


@dataclass
class Common:
    run: Path | None = option("a folder", PATH)


@dataclass
class Options(Common):
    kind: str = option("what is written", one_of("table", "jsonl"), "table")
    top: int = option("how many", WHOLE, 5)
    share: float | None = option("of the whole", SHARE)
    loud: bool = option("whether to shout", SWITCH, False)
    word: str | None = option("any text", TEXT)


def test_paths_and_typed_values() -> None:
    paths, options = parse(Options, ["a.jpg", "top=3", "share=0.5", "./top=4", "loud=true", "run=0123", "b", "x.y=1"])
    assert paths == ["a.jpg", "./top=4", "b", "x.y=1"]
    assert options == Options(run=Path("0123"), top=3, share=0.5, loud=True)
    assert parse(Options, []) == ([], Options())


@pytest.mark.parametrize("text", ["null", "1e3", "yes", "[a]", "a: b", "a=b", " ", "${x}"])
def test_text_stays_as_it_is(text: str) -> None:
    assert parse(Options, [f"word={text}"])[1].word == text


def test_a_file_that_looks_like_an_unknown_key_is_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("colour=red", "top"):
        (tmp_path / name).touch()
    assert parse(Options, ["colour=red", "top"])[0] == ["colour=red", "top"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["colour=red"], "colour is not a key; the keys are run, kind, top, share, loud, word"),
        (["top"], "top has no value: top=VALUE"),
        (["top="], "top has no value: top=VALUE"),
        (["top=1", "top=1"], "top is given twice"),
        (["top=0"], "top=0: give a whole number above 0"),
        (["top=1.5"], "top=1.5: give a whole number above 0"),
        (["share=1.5"], "share=1.5: give a number above 0, at most 1"),
        (["share=nan"], "share=nan: give a number"),
        (["top=inf"], "top=inf: give a whole number"),
        (["loud=maybe"], "loud=maybe: give true or false"),
        (["kind=xml"], "kind=xml: give one of table, jsonl"),
    ],
)
def test_mistakes_name_the_key(arguments: list[str], message: str) -> None:
    with pytest.raises(UserError) as error:
        parse(Options, arguments)
    assert str(error.value).startswith(message) and "\n" not in str(error.value)


def test_help_shows_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        parse(Options, ["--help"])
    said = capsys.readouterr().out
    assert not end.value.code and (__doc__ or "").strip() in said
    assert "top                 how many: a whole number above 0 (default: 5)" in said
    assert "run                 a folder: a path\n" in said
