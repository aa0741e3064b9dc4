"""The shape of the code: how long its files and functions are, what imports what, and that an import does nothing.

Only the check of imports runs the code, in a process of its own; everything else reads it.
"""

import ast
import io
import re
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROGRAMS = [ROOT / "train.py", ROOT / "evaluate.py"]
LIBRARY = sorted(path for package in ("repghost", "data") for path in (ROOT / package).rglob("*.py"))
PRODUCT = [*LIBRARY, *PROGRAMS]

# What trains and evaluates: the network, the training, the feeding, the evaluation, the launch.
CORE = [
    "repghost/model.py", "repghost/reparameterization.py", "repghost/weights.py",
    "repghost/training/**/*.py",
    "data/datamodule.py", "data/shard_data.py", "data/index.py", "data/tars.py", "data/sampling.py", "data/crops.py",
    "data/reader.py", "data/regions.py",
    "data/shards.py", "data/torch_loader.py", "data/dali_loader.py", "data/dali_pipeline.py", "data/encoded.py",
    "data/loader_plan.py", "data/image_sizes.py", "data/augment.py", "data/erase.py", "data/mix.py",
    "data/rand_augment.py", "data/row_plan.py", "data/pil_ops.py",
    "repghost/evaluation/evaluate.py", "repghost/evaluation/finish.py", "repghost/evaluation/reports.py",
    "repghost/evaluation/test_sets.py",
    "repghost/run.py", "repghost/run_name.py",
    "repghost/metrics.py", "repghost/dataset.py", "repghost/launch.py", "repghost/sweep.py", "repghost/command_line.py",
    "repghost/schema/*.py", "repghost/ranks.py", "repghost/processes.py", "repghost/rank_failures.py",
    "repghost/errors.py", "repghost/files.py", "train.py", "evaluate.py",
]  # fmt: skip

# What there is for detectors alone.
DETECTION = [
    "repghost/detection/*.py", "repghost/schema/detection.py", "repghost/export/detector.py",
    "repghost/predict/objects.py", "data/detection.py", "data/coco.py", "data/box_augment.py", "data/scenes.py",
    "data/write_shards/coco.py",
]  # fmt: skip

NO_CODE = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)


def shown(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


# -- the repository ----------------------------------------------------------------------------------------------------

TOP_LEVEL = {
    "train.py", "evaluate.py", "repghost", "data", "conf", "tests", "benchmarks", "results", "docs",
    "README.md", "CONTRIBUTING.md", "CHANGELOG.md", "CITATION.cff", "LICENSE",
    "pyproject.toml", "pins.txt", "requirements.lock", "Makefile", "Dockerfile", ".ci", ".dockerignore", ".gitignore",
}  # fmt: skip


def test_the_repository_holds_nothing_that_a_program_left() -> None:
    """A run's folder, for example, which output=5 once put beside the sources."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert {name.partition("/")[0] for name in listed.split("\0") if name} <= TOP_LEVEL


# -- size --------------------------------------------------------------------------------------------------------------


def code_lines(path: Path) -> int:
    """Lines that hold code: not blank, no comment, no docstring."""
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(path.read_text(encoding="utf-8")).readline):
        if token.type not in NO_CODE:
            lines.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(tree(path)):
        documented = isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        if documented and ast.get_docstring(node) is not None:
            lines.difference_update(range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1))
    return len(lines)


def test_lines_of_code_are_counted(tmp_path: Path) -> None:
    file = tmp_path / "x.py"
    file.write_text('"""A module,\n\nof two lines of code."""\n\nx = [\n]  # a comment\n\n\n# one more\n')
    assert code_lines(file) == 2


def test_the_product_stays_small() -> None:
    """A feature may raise these numbers, knowingly; what is simplified lowers them."""
    core = {path for pattern in CORE for path in ROOT.glob(pattern)}
    assert not [pattern for pattern in CORE if not any(ROOT.glob(pattern))], "in CORE, but not there"
    assert core <= set(PRODUCT)
    lines = {path: code_lines(path) for path in PRODUCT}
    assert sum(lines.values()) <= 12402
    assert sum(lines[path] for path in core) <= 6269
    assert sum(lines[path] for pattern in DETECTION for path in ROOT.glob(pattern)) <= 1470


def test_the_files_that_contributing_names_are_there() -> None:
    named = re.findall(r"`(\w[\w/]*/[\w.]*)`", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"))
    assert len(named) > 40 and not [path for path in named if not (ROOT / path).exists()]


def test_no_file_is_longer_than_300_lines() -> None:
    lines = {shown(path): len(path.read_text(encoding="utf-8").splitlines()) for path in PRODUCT}
    assert not {path: count for path, count in lines.items() if count > 300}


def test_no_function_is_longer_than_60_lines() -> None:
    lengths = {
        f"{shown(path)}:{node.lineno} {node.name}": (node.end_lineno or 0) - node.lineno + 1
        for path in PRODUCT
        for node in ast.walk(tree(path))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }
    assert not {function: length for function, length in lengths.items() if length > 60}


# -- imports -----------------------------------------------------------------------------------------------------------


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_name(path): path for path in PRODUCT}


def imported(path: Path, nodes: Iterator[ast.AST]) -> set[str]:
    """Modules that the import statements among `nodes` of a file name; NAME of `from MODULE import NAME` as well."""
    found: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = module_name(path).split(".")[: -node.level + (path.name == "__init__.py") or None]
            base = ".".join([*(package if node.level else ()), *([node.module] if node.module else ())])
            inner = {f"{base}.{alias.name}" for alias in node.names}
            # A submodule alone, or the module itself, and what may be a submodule of a library.
            found |= inner if inner <= MODULES.keys() else {base, *inner}
    return found


@cache
def imports(path: Path) -> frozenset[str]:
    """Modules of the project that a file imports anywhere: in functions and for type checkers, too."""
    return frozenset((imported(path, ast.walk(tree(path))) & MODULES.keys()) - {module_name(path)})


def circle() -> list[str]:
    """Modules of which each imports the next, the last being the first again; empty when there are none."""
    done: set[str] = set()

    def visit(module: str, above: list[str]) -> list[str]:
        if module in above:
            return [*above[above.index(module) :], module]
        if module not in done:
            for other in sorted(imports(MODULES[module])):
                if found := visit(other, [*above, module]):
                    return found
            done.add(module)
        return []

    return next((found for module in MODULES if (found := visit(module, []))), [])


def test_no_module_imports_itself_by_way_of_others() -> None:
    assert " imports ".join(circle()) == ""


def test_repghost_does_not_import_data() -> None:
    network_side = [path for path in LIBRARY if path.is_relative_to(ROOT / "repghost")]
    named = {
        shown(path): [name for name in imported(path, ast.walk(tree(path))) if name.partition(".")[0] == "data"]
        for path in network_side
    }
    assert not {path: names for path, names in named.items() if names}


def test_the_model_imports_nothing_of_the_project_but_errors() -> None:
    assert imports(ROOT / "repghost/model.py") <= {"repghost.errors"}


def at_import(node: ast.AST) -> Iterator[ast.AST]:
    """Everything below a node that runs when its module is imported."""
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield child
            yield from at_import(child)


IMPORT_EVERYTHING = """
import atexit, importlib, os, signal, sys, threading, warnings
from contextlib import suppress

libraries, modules = (argument.split() for argument in sys.argv[1:])
import matplotlib
for name in libraries:  # whose own side effects are theirs
    with suppress(ImportError):
        importlib.import_module(name)

registered = []
register = atexit.register
def watched(function, *arguments, **keywords):
    if str(function.__module__).partition(".")[0] in ("repghost", "data"):  # a library's own is its own
        registered.append(f"{function.__module__}.{function.__qualname__}")
    return register(function, *arguments, **keywords)
atexit.register = watched

def state():
    return {
        "sys.path": list(sys.path),
        "environment": [f"{name}={value}" for name, value in os.environ.items()],
        "warning filters": [str(entry) for entry in warnings.filters],
        "signal handlers": [f"{number.name}: {signal.getsignal(number)}" for number in signal.Signals],
        "matplotlib's backend": [str(dict.get(matplotlib.rcParams, "backend"))],
        "threads": [thread.name for thread in threading.enumerate()],
        "atexit": list(registered),
    }

for name in modules:
    before = state()
    importlib.import_module(name)
    after = state()
    for what in before:
        if before[what] != after[what]:
            print(f"import {name} changes {what}: {set(before[what]) ^ set(after[what]) or 'their order'}")
"""


def test_an_import_changes_nothing_else() -> None:
    """Of the library: train.py and evaluate.py are programs, which set what torch reads when it is loaded."""
    libraries = {name for path in LIBRARY for name in imported(path, at_import(tree(path)))}
    libraries = {name for name in libraries if name.partition(".")[0] not in ("repghost", "data")}
    names = [module_name(path) for path in LIBRARY]
    done = subprocess.run(
        [sys.executable, "-c", IMPORT_EVERYTHING, " ".join(sorted(libraries)), " ".join(names)],
        cwd=ROOT, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize(
    ("statement", "names"),
    [
        ("import repghost.model", {"repghost.model"}),
        ("from repghost import model", {"repghost.model"}),
        ("from repghost.model import WIDTHS", {"repghost.model"}),
        ("from repghost import repghostnet", {"repghost"}),
        ("from . import errors", {"repghost.errors"}),
        ("from .errors import UserError", {"repghost.errors"}),
        ("def f():\n    from repghost import files", {"repghost.files"}),
        ("if TYPE_CHECKING:\n    import data.index", {"data.index"}),
    ],
)
def test_imports_are_found(statement: str, names: set[str]) -> None:
    assert imported(ROOT / "repghost" / "x.py", ast.walk(ast.parse(statement))) & MODULES.keys() == names
