"""What becomes of an evaluation: a table for a person, a file in the run's folder, a row in results.csv.

A run's own results are evaluation.json (last epoch) and evaluation_best_ema.json (best epoch). An evaluation with other
images, another size or precision stands beside them, in a file whose name says what differs. Intervals are Wilson's for
a binomial share (Wilson 1927, JASA 22), at 95%. Check: `pytest tests/test_evaluation.py`.
"""

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf

from repghost.files import write_text
from repghost.results import append_result
from repghost.run import data_name, evaluation_name, read_config, read_evaluation
from repghost.run_data import recorded_data

_Z = 1.959963984540054  # 95% of a normal distribution lie within so many standard deviations
_AS_TRAINED = "32-true"  # the precision of a training's own evaluation
_NORMALIZATION = ("data.augment.mean", "data.augment.std")


def changes(directory: Path, config: DictConfig, fingerprint: str, precision: str) -> dict[str, str]:
    """What an evaluation does otherwise than that of the run in `directory` itself: parts of its file's name.

    config: of the evaluation. fingerprint: of its images. Empty for an evaluation just like the run's own.
    """
    trained, before = read_config(directory), recorded_data(directory)
    recorded = before.fingerprints.get("val") if before else None
    same = recorded == fingerprint if recorded else trained.data.root == config.data.root
    found = {}
    if config.get("test_set") or not same:
        found["data"] = f"{config.get('test_set') or data_name(config)[:40]}-{fingerprint[:8]}"
    for key in ("image_size", "data.crop_fraction", *_NORMALIZATION):
        old, new = (OmegaConf.select(each, key) for each in (trained, config))
        if old is not None and old != new:
            numbers = new if isinstance(new, ListConfig) else [new]
            found[key] = "_".join([key.rpartition(".")[2], *(f"{number:g}" for number in numbers)])
    if precision != _AS_TRAINED:
        found["precision"] = precision
    return found


def evaluation_path(directory: Path, evaluation: Mapping[str, Any]) -> Path:
    """The file in a run's folder for an evaluation of it."""
    own = directory / evaluation_name(evaluation["selection"])
    return own.with_stem("_".join([own.stem, *map(_as_name, evaluation["changes"].values())]))


def is_recorded(directory: Path, evaluation: Mapping[str, Any]) -> bool:
    """Whether the file for an evaluation is there, of the same epoch: then it has its row in results.csv as well."""
    before = read_evaluation(evaluation_path(directory, evaluation))
    return before is not None and before.get("epoch", evaluation["epoch"]) == evaluation["epoch"]


def write_evaluation(directory: Path, evaluation: Mapping[str, Any]) -> Path:
    """Writes an evaluation into the folder of its run; returns the file."""
    path = evaluation_path(directory, evaluation)
    write_text(path, json.dumps(evaluation, indent=2) + "\n")
    return path


def append_row(config: DictConfig, name: str, evaluation: Mapping[str, Any], run: Path | None) -> None:
    """Appends an evaluation to results.csv.

    Its data set is named so that the paper's table takes no other images, and no other normalization, for the run's.
    """
    data = config.get("test_set") or data_name(config)
    if run is not None and "data" in evaluation["changes"] and data == data_name(read_config(run)):
        data = evaluation["changes"]["data"]
    others = [evaluation["changes"][key] for key in _NORMALIZATION if key in evaluation["changes"]]
    append_result(config.results, name, " ".join([data, *others]), evaluation)


def reports_folder(evaluation: Mapping[str, Any], test_set: str | None) -> str:
    """The folder for the reports of an evaluation, below that of its run or weights; empty for that folder itself."""
    parts = [part for key, part in evaluation["changes"].items() if key != "data" or not test_set]
    return "/".join([*([test_set] if test_set else []), *(["_".join(map(_as_name, parts))] if parts else [])])


def _as_name(part: str) -> str:
    return re.sub(r"[^\w.-]+", "_", part)


def interval(percent: float, images: int) -> list[float]:
    """Wilson's 95% interval of an accuracy, in percent: [low, high]."""
    share, spread = percent / 100, _Z**2 / images
    middle = (share + spread / 2) / (1 + spread)
    half = _Z / (1 + spread) * math.sqrt(share * (1 - share) / images + spread / (4 * images))
    return [100 * max(0.0, middle - half), 100 * min(1.0, middle + half)]


def table(evaluation: dict[str, Any], title: str) -> str:
    """The result for a person, with 95% intervals: both forms of a RepGhostNet, the one that an exported file has."""
    fused = evaluation["fused"]
    if fused["top1_flips"] is None:
        rows, note = {evaluation["precision"]: evaluation}, "an exported file is the fused network"
    else:
        rows = {"trained form": evaluation, "fused": fused}
        difference = f"the logits by at most {fused['max_rel_logit_diff']:.1e} of the largest"
        note = f"fusing changes {fused['top1_flips']} Top-1, and {difference}"
    lines = [f"\n{title}, {evaluation['images']:,} images"]
    for name, row in rows.items():
        shares = [
            f"{label} {row[key]:6.2f}% [{row[f'{key}_interval'][0]:.2f}, {row[f'{key}_interval'][1]:.2f}]"
            for label, key in (("Top-1", "top1"), ("Top-5", "top5"))
        ]
        lines.append(f"  {name:<13} {'   '.join(shares)}   loss {row['loss']:.4f}")
    if evaluation.get("scored"):
        lines.append(f"  {evaluation['scored']}")
    return "\n".join([*lines, f"  {note}; in brackets: 95% intervals"])
