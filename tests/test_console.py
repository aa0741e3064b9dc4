"""The program `repghost`, what its commands need to be installed, and what an installation holds."""

import ast
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from PIL import Image
from test_structure import LIBRARY, PROGRAMS, imported, tree

from repghost.__main__ import COMMANDS, run
from repghost.errors import run_command, user_message
from repghost.extras import EXTRAS, how_to_install

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
# Calls a command with modules hidden that are named in the first argument, and prints which of `heavy` it loaded.
CALL = """
import sys
from repghost.__main__ import main
sys.modules.update(dict.fromkeys(sys.argv.pop(1).split()))
try:
    code = main()
except SystemExit as end:
    code = end.code
print(*sorted({"torch", "torchvision", "pytorch_lightning", "matplotlib", "hydra"} & sys.modules.keys()))
sys.exit(code)
"""


def call(*arguments: str, hidden: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", CALL, " ".join(hidden), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env={"PYTHONPATH": str(ROOT)}, timeout=600)


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in ([], ["-h"], ["--help"]):
        assert run_command(lambda arguments=arguments: run(arguments)) == 0  # type: ignore[misc]
        lines = capsys.readouterr().out.splitlines()
        for command in COMMANDS:
            assert sum(line.split()[:1] == [command] for line in lines) == 1
        assert "python train.py" in "".join(lines)


@pytest.mark.parametrize("name", ["train", "data", "repghost.results", "--version", "=", ""])
def test_an_unknown_command_is_one_line(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(lambda: run([name])) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.parametrize("arguments", [["--help"], ["nothing"], ["results", "--help"], ["figures", "--help"]])
def test_what_needs_no_network_does_not_load_torch(arguments: list[str]) -> None:
    done = call(*arguments)
    assert done.returncode == (2 if arguments == ["nothing"] else 0), done.stderr
    assert done.stdout.splitlines()[-1] == ""


def test_a_command_ends_with_its_own_exit_code(tmp_path: Path) -> None:
    assert call("figures", "--out", str(tmp_path / "out")).returncode == 0
    assert (tmp_path / "out/accuracy.png").is_file()
    for arguments in (
        ["figures", "--out", "/dev/null/x"],
        ["results", "--no-such-option"],
        ["results", "--readme", "/"],
    ):
        assert call(*arguments).returncode == 2


# -- what has to be installed ------------------------------------------------------------------------------------------


# Distributions that come with others that pyproject.toml names.
PART_OF = {"aiohttp", "flatbuffers", "lightning-utilities", "pydantic-core", "pytorch-lightning"}


def requirements(extra: str) -> set[str]:
    """The distributions that pyproject.toml names for an extra, "" for what all commands need."""
    lines = PROJECT["optional-dependencies"][extra] if extra else PROJECT["dependencies"]
    names = [line.partition(";")[0].partition(">")[0].partition("[")[0] for line in lines]
    return {name.strip().lower().replace("_", "-") for name in names}


def test_the_extras_are_those_of_pyproject() -> None:
    """As far as they are installed."""
    assert {extra for extra in EXTRAS if extra} == PROJECT["optional-dependencies"].keys() - {"dev", "deploy"}
    distributions = packages_distributions()
    for extra, modules in EXTRAS.items():
        wanted = requirements(extra) | PART_OF
        for module in modules:
            found = {name.lower().replace("_", "-") for name in distributions.get(module, [])}
            assert not found or found & wanted, f"{module} does not come with the extra {extra}"


def test_every_import_is_of_something_that_an_extra_has() -> None:
    names = {name for path in [*LIBRARY, *PROGRAMS] for name in imported(path, ast.walk(tree(path)))}
    foreign = {name.partition(".")[0] for name in names} - sys.stdlib_module_names - {"repghost", "data", "train", ""}
    assert not {name for name in foreign if how_to_install(name) is None}


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("hydra", "hydra is not installed: pip install '.[train]'"),
        ("hydra_plugins.hydra_optuna_sweeper", "hydra_plugins is not installed: pip install '.[sweep]'"),
        ("onnxruntime.quantization", "onnxruntime is not installed: pip install '.[onnx]'"),
        ("omegaconf", "omegaconf is not installed: pip install '.'"),
    ],
)
def test_a_missing_package_is_one_line(module: str, line: str) -> None:
    message = user_message(ModuleNotFoundError(f"No module named {module!r}", name=module))
    assert message is not None and message.replace("'repghost", "'.").replace("'..'", "'.'") == line
    assert user_message(ModuleNotFoundError("No module named 'repghst'", name="repghst")) is None


@pytest.mark.slow
@pytest.mark.usefixtures("all_blocks")
def test_the_dependencies_without_extras_are_enough_to_predict(train_tiny: object, tmp_path: Path) -> None:
    assert train_tiny("name=x", "epochs=1") == 0  # type: ignore[operator]
    Image.new("RGB", (40, 40), "red").save("red.jpg")
    optional = tuple(module for extra, modules in EXTRAS.items() if extra for module in modules)
    done = call("predict", "red.jpg", "run=outputs/x", hidden=optional)
    assert done.returncode == 0, done.stderr
    done = call("export", "run=outputs/x", "format=onnx", hidden=optional)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and "[onnx]" in done.stderr


@pytest.mark.slow
def test_a_wheel_holds_the_package_and_nothing_else(tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(ROOT / "repghost", source / "repghost", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("data", "tests", "conf"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE", "train.py", "evaluate.py"):
        shutil.copy(ROOT / name, source)
    expected = {path.relative_to(source).as_posix() for path in source.glob("repghost/**/*") if path.is_file()}
    pip = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--quiet", "--wheel-dir"]
    subprocess.run([*pip, str(tmp_path), str(source)], check=True, timeout=600)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (entry,) = (name for name in names if name.endswith("entry_points.txt"))
        assert "repghost = repghost.__main__:main" in archive.read(entry).decode()
    assert {name for name in names if ".dist-info/" not in name} == expected
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)
