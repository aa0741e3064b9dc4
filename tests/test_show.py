"""The grid of augmented samples."""

import runpy
import sys
import warnings
from pathlib import Path

import pytest
from PIL import Image

from data.show import main


@pytest.mark.parametrize("width", [1.0, 1.3])
def test_the_grid_has_a_row_for_each_sample(shards: Path, tmp_path: Path, width: float) -> None:
    out = tmp_path / "grid.png"
    options = ["--out", str(out), "--samples", "3", "--epochs", "4"]
    assert main([*options, f"data.root={shards}", f"width={width}", "image_size=32"]) == 0
    with Image.open(out) as grid:
        assert grid.size == (5 * 36 + 4, 3 * 36 + 4)
        cells = {grid.crop((4 + 36 * i, 4, 36 + 36 * i, 36)).tobytes() for i in range(5)}
    assert len(cells) == 5, "every epoch shows another picture"


def test_the_command_has_two_names_and_one_line_for_a_mistake(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for module, *options in (["data.show"], ["data.augment", "--show"]):
        monkeypatch.setattr(sys, "argv", [module, *options, "data.root=nowhere"])
        with pytest.raises(SystemExit) as end, warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # the module was imported before
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        assert end.value.code == 2
        assert capsys.readouterr().err.startswith("error: nowhere: no such folder")
