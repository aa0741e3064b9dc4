"""The training step as it is compiled: one graph, once; the same numbers; memory; and the benchmarks about it."""

import csv
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from helpers import needs_compiler, run_script
from runs import PowerCut, cut_after
from test_classifier import classifier_of
from torch import nn
from torch._dynamo.utils import counters

from benchmarks import train_step
from repghost.dataset import Batch
from repghost.errors import UserError
from repghost.model import repghostnet
from repghost.training.classifier import ImageClassifier
from repghost.training.ema import WeightAverage
from repghost.training.trainer import compile_step, compiles, keep_compiled

Program = Callable[..., int]
CPU = torch.device("cpu")


def trained(steps: int, **options: object) -> ImageClassifier:
    """A tiny network after some steps on noise."""
    torch.manual_seed(0)
    classifier = classifier_of(repghostnet(0.1, 3), **options)
    classifier.train()
    classifier.on_fit_start()
    optimizer = classifier.configure_optimizers()
    for step in range(steps):
        torch.manual_seed(step)
        images, labels = torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, -1])
        classifier.training_step(Batch(images, labels, torch.arange(4), torch.zeros(4, 0)), step).backward()
        optimizer.step()
        optimizer.zero_grad()
        classifier.ema.update(classifier.model)
    return classifier


@pytest.mark.slow
def test_step_and_validation_are_a_graph_each_and_compiled_once(
    monkeypatch: pytest.MonkeyPatch, train_tiny: Program
) -> None:
    # Graphs are those of every backend; this one does without a compiler, which this machine may not have.
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    monkeypatch.setattr("repghost.training.recipe.compiles", lambda wanted, device: wanted)
    monkeypatch.setattr("repghost.training.classifier.compiles", lambda wanted, device: wanted)
    torch._dynamo.reset()
    counters.clear()
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert train_tiny("compile=true") == 0  # two epochs, with validations between them
    assert counters["stats"]["unique_graphs"] == 2 and not counters["graph_break"]


@pytest.mark.slow
def test_a_compiled_step_trains_the_same_network(monkeypatch: pytest.MonkeyPatch) -> None:
    eager = trained(3, compile=False)
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    compiled = trained(3, compile=True)
    for mine, theirs in ((eager.model, compiled.model), (eager.ema.model, compiled.ema.model)):
        for name, tensor in mine.state_dict().items():
            torch.testing.assert_close(theirs.state_dict()[name], tensor, rtol=1e-3, atol=1e-5, msg=name)


def test_cuda_graphs_are_asked_for_and_their_output_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    begun, buffer = [], torch.zeros(())

    def compile(function: Callable[..., torch.Tensor], **options: object) -> Callable[..., torch.Tensor]:
        assert options["mode"] == "reduce-overhead"
        return lambda *arguments: buffer.copy_(function(*arguments))  # as a replay, which writes there every time

    monkeypatch.setattr(torch, "compile", compile)
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: begun.append(None))
    step = compile_step(torch.neg, "reduce-overhead")
    outputs = [step(torch.tensor(value)) for value in (1.0, 2.0)]
    assert outputs == [-1, -2] and len(begun) == 2


@needs_compiler
@pytest.mark.slow
def test_a_step_for_cuda_graphs_trains_the_same_network_on_a_cpu() -> None:
    found = []
    for mode in (None, "reduce-overhead"):
        torch.manual_seed(0)
        network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3))
        optimizer = torch.optim.SGD(network.parameters(), lr=0.1)

        def loss(images: torch.Tensor, network: nn.Module = network) -> torch.Tensor:
            return network(images).square().mean()

        step = compile_step(loss, mode) if mode else loss
        for seed in range(3):
            step(torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(seed))).backward()
            optimizer.step()
            optimizer.zero_grad()
        found.append(network.state_dict())
    for name, tensor in found[0].items():
        torch.testing.assert_close(found[1][name], tensor, msg=name)


def test_auto_compiles_on_gpus_only(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not compiles("auto", CPU) and not compiles(False, CPU)
    with pytest.raises(UserError, match="compile=maybe"):
        compiles("maybe", CPU)
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UserError, match="no compiler"):
        compiles(True, CPU)
    monkeypatch.delenv("CC", raising=False)
    with pytest.warns(UserWarning, match="is not compiled, which is slower"):
        assert not compiles("auto", torch.device("cuda"))


def test_without_a_compiler_a_run_says_so(
    monkeypatch: pytest.MonkeyPatch, train_tiny: Program, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert train_tiny("compile=true") == 2
    assert capsys.readouterr().err.startswith("error: compile=true is impossible here: no compiler was found")


def test_compiled_code_is_kept_where_the_user_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    keep_compiled(tmp_path / "mine")
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    assert cache_dir() == str(tmp_path / "mine")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "theirs"))
    keep_compiled(tmp_path / "mine")
    assert cache_dir() == str(tmp_path / "theirs")


def test_the_average_follows_through_a_checkpoint_and_a_move() -> None:
    model = repghostnet(0.1, 3)
    average = WeightAverage(model, 0.5)
    average.update(model)
    other = repghostnet(0.1, 3)
    other.bn1.running_mean.fill_(3.0)
    other.bn1.num_batches_tracked.fill_(7)
    model.load_state_dict(other.state_dict())  # in place, as a resumed run does
    average.update(model)
    assert torch.allclose(average.model.bn1.running_mean, torch.full_like(model.bn1.running_mean, 1.5))
    assert average.model.bn1.num_batches_tracked == 7
    model.double()  # what moves replaces buffers
    average.model.double()
    average.to(CPU)
    average.update(model)
    assert torch.allclose(average.model.bn1.running_mean, torch.full_like(model.bn1.running_mean, 2.25))


def test_freed_memory_is_found_again() -> None:
    """In a process of its own, as other tests leave their traces in the heap of this one."""
    script = """
import resource, torch
from repghost.training.trainer import keep_freed_memory

def pages():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(2**24)  # 16,384 pages of 4 KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

pages()
print(sum(pages() for _ in range(8)))
keep_freed_memory()
pages()
print(sum(pages() for _ in range(8)))
"""
    before, after = map(int, run_script(script).split())
    if not before:
        pytest.skip("this system does not count page faults")
    assert after < before / 2


@needs_compiler
@pytest.mark.slow
def test_the_compiled_augmentation_has_the_same_bits() -> None:
    from helpers import photographs
    from hydra.utils import instantiate
    from test_config import composed

    from data.sampling import uniforms

    images = (photographs(32, 64) * 57.4 + 115).clamp(0, 255).byte()
    for width in (1.0, 1.3):
        plain, compiled = (instantiate(composed(f"width={width}").data.augment) for _ in range(2))
        compiled.compile()
        for epoch in range(8):
            draws = torch.from_numpy(uniforms(0, epoch, 0, len(images)))
            one, other = (augment.train(images, draws, plain.plan(draws)) for augment in (plain, compiled))
            assert torch.equal(one, other)


@needs_compiler
@pytest.mark.slow
def test_a_compiled_run_is_resumed_to_the_same_bits(train_tiny: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)  # an earlier compiled run in this process has set it
    options = ("compile=true", f"data.cache={Path.cwd()}/cache")
    assert train_tiny("name=whole", *options) == 0
    assert any(Path("cache/compiled").iterdir())
    with monkeypatch.context() as patched, pytest.raises(PowerCut):
        cut_after(patched, epoch=1, batch=2)
        train_tiny("name=cut", "checkpoint.minutes=1e-6", *options)
    assert train_tiny("name=cut", *options) == 0
    for file in ("metrics.csv", "model.safetensors"):
        assert Path("outputs/whole", file).read_bytes() == Path("outputs/cut", file).read_bytes()


# -- benchmarks -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_step_benchmark(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = {"images": 24, "batch-size": 4, "seconds": 0.01, "repetitions": 1, "workers": 1, "threads": 1}
    out = tmp_path / "train_step.csv"
    arguments = [f"--{name}={value}" for name, value in options.items()]
    train_step.main([*arguments, "--quick", "--epochs=4", "--corpus", str(tmp_path / "corpus"), f"--out={out}"])
    table = {row["what"]: row for row in csv.DictReader(out.read_text().splitlines())}
    assert float(table["first step after the command: ours"]["seconds"]) > 1
    for part in ("step", "loader", "end to end"):
        assert float(table[f"{part}: timm"]["ratio_to_timm"]) == 1
        assert float(table[f"{part}: ours"]["images_per_second"]) > 0
    shares = [float(row["share_of_step"]) for row in table.values() if row["share_of_step"]]
    assert sum(shares) == pytest.approx(1, abs=0.01)
    printed = capsys.readouterr().out
    assert "bound by" in printed.splitlines()[-len(table) - 1] and all(what in printed for what in table)
