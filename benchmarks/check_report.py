"""What check_gpu.py says: a line for each check with its figure and its bar, as text, JSON and Markdown."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from repghost.files import write_text

PASS, FAIL, SKIP, INFO = "PASS", "FAIL", "SKIP", "INFO"
MEANINGS = {
    PASS: "reached its bar",
    FAIL: "did not, or went wrong: what it said is below",
    SKIP: "could not run on this machine",
    INFO: "measured, without a bar on this machine",
}
REFERENCE = "an H100 with 16 cores"


class Failed(Exception):
    """A check that went wrong: one line. log: the end of what its command said."""

    def __init__(self, reason: str, log: str = "") -> None:
        super().__init__(reason)
        self.log = log


class Skipped(Exception):
    """A check that this machine cannot run: why."""


@dataclass(frozen=True)
class Bar:
    """What a figure has to be. where: on which machines: "" for all, "gpu", "reference" for REFERENCE, "nowhere"."""

    text: str
    holds: Callable[[float], bool]
    unit: str = ""
    where: str = ""

    def shown(self, figure: float) -> str:
        """The figure with its unit."""
        digits = f"{figure:,.0f}" if figure == int(figure) or abs(figure) >= 1000 else f"{figure:,.4g}"
        return f"{digits}{self.unit}"


def at_least(least: float, unit: str = "", where: str = "") -> Bar:
    """A bar from below."""
    return Bar(f"at least {least:,g}{unit}", lambda figure: figure >= least, unit, where)


def at_most(most: float, unit: str = "", where: str = "") -> Bar:
    """A bar from above."""
    return Bar(f"at most {most:,g}{unit}", lambda figure: figure <= most, unit, where)


def no_bar(unit: str) -> Bar:
    """For a figure that is only reported."""
    return Bar("no bar", lambda figure: True, unit, "nowhere")


def told(text: str) -> Bar:
    """A bar for a check that raises Failed itself and returns words."""
    return Bar(text, lambda figure: True)


@dataclass
class Line:
    """The outcome of a check. figure: in words, or why it failed or was skipped. value: the figure as a number."""

    name: str
    status: str
    figure: str
    bar: str
    seconds: float = 0.0
    value: float | None = None
    log: str = field(default="", repr=False)

    def __str__(self) -> str:
        bar = "" if self.status == SKIP else f"  ({self.bar})"
        return f"{self.status}  {self.name:<52} {self.figure}{bar}"


def judged(name: str, figure: float | str, bar: Bar, kind: str) -> Line:
    """The line of a check that came to a figure. kind: of the machine: "cpu", "gpu" or "reference"."""
    if isinstance(figure, str):
        return Line(name, PASS, figure, bar.text)
    if bar.where == "nowhere":
        return Line(name, INFO, bar.shown(figure), bar.text, value=figure)
    applies = bar.where in ("", kind) or (bar.where, kind) == ("gpu", "reference")
    if not applies:
        where = {"reference": REFERENCE, "gpu": "GPUs"}[bar.where]
        return Line(name, INFO, bar.shown(figure), f"{bar.text} holds for {where}: not applicable here", value=figure)
    return Line(name, PASS if bar.holds(figure) else FAIL, bar.shown(figure), bar.text, value=figure)


@dataclass
class Report:
    """All lines of a run. facts: of the machine, by name; texts: longer ones, such as the topology."""

    title: str
    facts: dict[str, Any] = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict)
    lines: list[Line] = field(default_factory=list)
    stopped_by: str = ""  # the check without which the later ones say nothing
    seconds: float = 0.0

    @property
    def verdict(self) -> str:
        """How many lines have each status."""
        counts = {status: sum(line.status == status for line in self.lines) for status in MEANINGS}
        return ", ".join(f"{count} {status}" for status, count in counts.items() if count)

    @property
    def failed(self) -> bool:
        return any(line.status == FAIL for line in self.lines)

    def write(self, stem: Path) -> Sequence[Path]:
        """Writes `stem`.json and `stem`.md; returns their paths."""
        stem.parent.mkdir(parents=True, exist_ok=True)
        paths = stem.with_suffix(".json"), stem.with_suffix(".md")
        write_text(paths[0], json.dumps({**asdict(self), "verdict": self.verdict, "failed": self.failed}, indent=1))
        write_text(paths[1], self.markdown())
        return paths

    def markdown(self) -> str:
        """The report as one attaches it to an issue."""
        text = [f"# {self.title}", f"{self.verdict}; {self.seconds / 60:.1f} minutes", ""]
        text += [f"- {name}: {value}" for name, value in self.facts.items() if value != ""]
        text += ["", "| | check | figure | bar | s |", "| --- | --- | --- | --- | ---: |"]
        for line in self.lines:
            cells = line.status, line.name, line.figure, "" if line.status == SKIP else line.bar, f"{line.seconds:.0f}"
            text.append("| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |")
        text += ["", *(f"{status}: {meaning}." for status, meaning in MEANINGS.items())]
        blocks = {**self.texts, **{f"{line.name} said": line.log for line in self.lines if line.log}}
        for name, block in blocks.items():
            text += ["", f"## {name}", "```", block.rstrip(), "```"]
        return "\n".join(text) + "\n"
