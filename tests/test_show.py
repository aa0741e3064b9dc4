"""The grid of augmented samples."""

import runpy
import sys
from pathlib import Path

import numpy as np
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
        with pytest.raises(SystemExit) as end:
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        assert end.value.code == 2
        assert capsys.readouterr().err.startswith("error: nowhere: no such folder")


def test_pictures_are_mixed_and_of_full_size(tmp_path: Path, shards: Path) -> None:
    common = [f"data.root={shards}", "image_size=32", "train_image_size=64", "recipe.start_image_size=32", "epochs=2"]
    for name, more in (("plain", []), ("mixed", ["recipe.mix.cutmix=1", "recipe.mix.probability=1"])):
        main([*common, *more, "--samples", "3", "--epochs", "4", "--out", str(tmp_path / f"{name}.png")])
    plain, mixed = (np.asarray(Image.open(tmp_path / f"{name}.png")) for name in ("plain", "mixed"))
    assert plain.shape == mixed.shape == (3 * 68 + 4, 5 * 68 + 4, 3)
    assert (plain[:, :68] == mixed[:, :68]).all() and (plain != mixed).mean() > 0.05
