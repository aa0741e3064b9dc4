"""What is learned from a teacher, and who the teacher may be."""

import json
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from helpers import photographs, randomize_batchnorm
from safetensors.torch import save_file
from test_classifier import RECIPE, RUN
from torch import Tensor, nn

from repghost.dataset import Mixture, TeacherLogits
from repghost.description import Description
from repghost.distillation import teacher as teachers
from repghost.distillation.loss import Distillation, dense
from repghost.distillation.store import top_logits
from repghost.distillation.teacher import Inputs, Teacher, open_teacher
from repghost.distillation.teaching import Teaching
from repghost.errors import UserError, user_message
from repghost.model import repghostnet
from repghost.reference import IMAGENET_MEAN, IMAGENET_STD
from repghost.reparameterization import reparameterize
from repghost.training.classifier import ImageClassifier
from repghost.training.trainer import compile_step
from repghost.weights import load_described, read_checkpoint, save_weights

pytestmark = pytest.mark.usefixtures("few_blocks")

Program = Callable[..., int]
OURS = Inputs(None, IMAGENET_MEAN, IMAGENET_STD)
NAMES = ("ant", "bee", "cat")


def index(names: Sequence[str] = NAMES) -> Any:
    return SimpleNamespace(classes=names)


def network(names: Sequence[str] = NAMES, width: float = 0.2) -> nn.Module:
    torch.manual_seed(0)
    model = repghostnet(width, len(names))
    randomize_batchnorm(model, 0)
    return model.eval()


# -- the loss ----------------------------------------------------------------------------------------------------------


def logits(seed: int, rows: int = 12, classes: int = 30) -> Tensor:
    return 3 * torch.randn(rows, classes, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_soft_loss_is_the_divergence_by_its_definition(temperature: float) -> None:
    ours, theirs, labels = logits(0), logits(1), torch.arange(12)
    labels[3] = -1
    p, q = ((each.double() / temperature).softmax(1) for each in (theirs, ours))
    expected = (p * (p / q).log()).sum(1)[labels >= 0].mean() * temperature**2
    loss = Distillation("soft", 0.5, temperature)
    torch.testing.assert_close(loss(ours, theirs, labels).double(), expected, rtol=1e-5, atol=0)
    assert loss(ours, ours + 7, labels) == pytest.approx(0, abs=1e-5), "logits count up to a constant"
    assert loss(ours, theirs, torch.full((12,), -1)) == 0


def test_hard_loss_is_the_cross_entropy_with_its_class() -> None:
    ours, theirs, labels = logits(0), logits(1), torch.zeros(12, dtype=torch.int64)
    found = Distillation("hard", 0.5, 3.0)(ours, theirs, labels)
    torch.testing.assert_close(found, F.cross_entropy(ours, theirs.argmax(1)))


def test_gradients_do_not_shrink_with_the_temperature() -> None:
    norms = []
    for temperature in (1.0, 2.0, 8.0):
        ours = (logits(0) / 10).requires_grad_()
        Distillation("soft", 0.5, temperature)(ours, logits(1) / 10, torch.zeros(12, dtype=torch.int64)).backward()
        assert ours.grad is not None
        norms.append(ours.grad.norm().item())
    assert max(norms) < 1.3 * min(norms)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_all_classes_stored_are_the_logits(temperature: float) -> None:
    ours, theirs, labels = logits(0), logits(1), torch.arange(12)
    loss = Distillation("soft", 0.5, temperature)
    whole, stored = loss(ours, theirs, labels), dense(top_logits(theirs, 30, "float32"), 30)
    torch.testing.assert_close(loss(ours, stored, labels), whole, rtol=1e-6, atol=1e-7)
    half = dense(top_logits(theirs, 30, "float16"), 30)
    torch.testing.assert_close(loss(ours, half, labels), whole, rtol=0, atol=1e-3)


def test_what_the_stored_classes_leave_is_spread_evenly() -> None:
    theirs = logits(1)
    probabilities, known = dense(top_logits(theirs, 10, "float32"), 30).exp(), theirs.softmax(1)
    top = known.topk(10).indices
    torch.testing.assert_close(probabilities.gather(1, top), known.gather(1, top))
    torch.testing.assert_close(probabilities.sum(1), torch.ones(12))
    others = probabilities.scatter(1, top, 0)
    assert torch.allclose(others[others > 0].view(12, 20), others.max(1, keepdim=True).values)


def test_a_teacher_that_is_certain() -> None:
    certain = dense(TeacherLogits(torch.tensor([[0.0, -40.0]]).half(), torch.tensor([[2, 0]])), 5)
    assert certain.isfinite().all() and certain.argmax() == 2
    assert Distillation("soft", 1, 2)(torch.zeros(1, 5), certain, torch.tensor([0])).isfinite()


# -- the teacher -------------------------------------------------------------------------------------------------------


def timm_file(folder: Path, name: str = "test_resnet", classes: int = 3) -> tuple[Path, nn.Module]:
    torch.manual_seed(1)
    model = timm.create_model(name, num_classes=classes).eval()
    torch.save(model.state_dict(), folder / "teacher.pth")
    return folder / "teacher.pth", model


def test_a_file_of_timm_gets_images_as_it_was_trained(tmp_path: Path) -> None:
    """Its own normalization and size, from the images of a training that has others."""
    file, model = timm_file(tmp_path)
    ours, config = Inputs(None, [0.5, 0.4, 0.3], [0.2, 0.25, 0.3]), timm.data.resolve_model_data_config(model)
    teacher = open_teacher(f"timm:test_resnet@{file}", None, ours, index())
    pixels = (photographs(4, 64) * 0.225 + 0.45).clamp(0, 1)

    def normalized(mean: Sequence[float], std: Sequence[float]) -> Tensor:
        return (pixels - torch.tensor(mean).view(-1, 1, 1)) / torch.tensor(std).view(-1, 1, 1)

    theirs = normalized(config["mean"], config["std"])
    size = config["input_size"][1]
    expected = model(F.interpolate(theirs, (size, size), mode="bicubic", antialias=True))
    torch.testing.assert_close(teacher(normalized(ours.mean, ours.std)), expected, rtol=1e-4, atol=1e-5)
    assert "order" in teacher.name, "what is assumed of its classes is said"
    smaller = open_teacher(f"timm:test_resnet@{file}", 64, ours, index())
    torch.testing.assert_close(smaller(normalized(ours.mean, ours.std)), model(theirs), rtol=1e-4, atol=1e-5)


def test_a_local_folder_of_timm(tmp_path: Path) -> None:
    _, model = timm_file(tmp_path)
    config = {"architecture": "test_resnet", "num_classes": 3, "pretrained_cfg": {"input_size": [3, 32, 32]}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    teacher = open_teacher(f"timm:local-dir:{tmp_path}", None, OURS, index())
    images = photographs(2, 32)
    torch.testing.assert_close(teacher(images), model(images), rtol=1e-4, atol=1e-5)


def test_a_network_of_this_project_is_fused(tmp_path: Path) -> None:
    model = network()
    described = Description(classes=NAMES, image_size=48, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
    save_weights(model, tmp_path / "model.safetensors", described)
    teacher = open_teacher(str(tmp_path), None, Inputs(None, [0.5] * 3, [0.25] * 3), index())
    assert teacher._network.fused  # type: ignore[union-attr]
    images = photographs(2, 48)
    assert torch.equal(teacher(images), reparameterize(model)(images))  # type: ignore[type-var]
    fused = tmp_path / "fused.safetensors"
    save_weights(reparameterize(model), fused, described)
    assert open_teacher(str(fused), None, OURS, index()).weights == teacher.weights, "the same weights, the same hash"


def test_no_gradients_and_no_dropout() -> None:
    teacher = Teacher(network().train(), "it", OURS, OURS)
    images = photographs(2, 32).requires_grad_()
    assert not teacher(images).requires_grad and torch.equal(teacher(images), teacher(images))


REFUSED = {
    "other classes": (NAMES[::-1], "'ant' is 'cat' in the training images"),
    "more classes": ((*NAMES, "dog"), "has 3 classes, the training images have 4"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_teacher_of_other_classes_is_refused(case: str, tmp_path: Path) -> None:
    names, message = REFUSED[case]
    save_weights(network(), tmp_path / "a.safetensors", Description(classes=NAMES))
    with pytest.raises(UserError, match=message):
        open_teacher(str(tmp_path / "a.safetensors"), None, OURS, index(names))


@pytest.mark.parametrize("source", ["timm:no_such_network", "timm:resnet18@missing.pth", "missing", "timm:"])
def test_a_teacher_that_is_not_there(source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as error:
        open_teacher(source, None, OURS, index())
    assert "\n" not in str(error.value) and source.rpartition(":")[2] in str(error.value)


def test_timm_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ImportError) as error:
        open_teacher("timm:resnet18", None, OURS, index())
    assert "pip install" in (said := user_message(error.value) or "") and "[distill]" in said


# -- training ----------------------------------------------------------------------------------------------------------


def taught(*arguments: str) -> tuple[str, ...]:
    return ("teacher=outputs/a", "recipe.teacher_weight=0.5", "recipe.teacher_temperature=2", "name=b", *arguments)


def test_the_teacher_is_in_no_checkpoint(finished_run: Path, train_tiny: Program, capfd: Any) -> None:
    assert train_tiny("epochs=1", "name=plain") == 0
    capfd.readouterr()
    assert train_tiny(*taught("epochs=1")) == 0
    assert "teacher    outputs/a" in capfd.readouterr().out
    plain, content = (read_checkpoint(f"outputs/{name}/checkpoints/last.ckpt") for name in ("plain", "b"))
    for part in ("state_dict", "ema"):
        assert content[part].keys() == plain[part].keys()
    name, weights = content["teacher"], content["run"]["teacher"]
    assert name == "outputs/a" and len(weights) == 64 and plain["run"]["teacher"] is None
    assert not torch.equal(content["ema"]["classifier.weight"], plain["ema"]["classifier.weight"])


def test_another_teacher_on_resume_is_refused(finished_run: Path, train_tiny: Program, capfd: Any) -> None:
    assert train_tiny(*taught("epochs=1")) == 0
    Path("outputs/b/evaluation.json").unlink()
    weights = finished_run / "model.safetensors"
    model, description = load_described(weights)
    torch.nn.init.ones_(model.classifier.bias)
    save_weights(model, weights, description)
    capfd.readouterr()
    assert train_tiny(*taught("epochs=1")) == 2
    assert "the checkpoint is of a run with teacher=" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("recipe=distill",), "teacher_weight=0.9: give teacher="),
        (("teacher=outputs/a",), "teacher_weight=0: nothing is learned"),
        (taught("recipe.teacher_logits=x"), "are another teacher: give one"),
        (taught("recipe.teacher_loss=warm"), "recipe.teacher_loss=warm: give soft or hard"),
        (("recipe.start_image_size=48",), "recipe.start_image_size=48: give a multiple of 32"),
        (("recipe.start_image_size=64",), "recipe.start_image_size=64: give at most the full size, 32"),
        (("recipe.full_size_epochs=1",), "is for recipe.start_image_size"),
        (("recipe.mix.mixup=1", "batch_size=9"), "an even number"),
    ],
)
def test_what_cannot_be_meant(
    arguments: tuple[str, ...], message: str, finished_run: Path, train_tiny: Program, capfd: Any
) -> None:
    assert train_tiny(*arguments) == 2
    said = capfd.readouterr().err
    assert message in said and said.count("\n") == 1


def test_two_ranks_and_a_teacher(train_tiny: Program, forked_ranks: None) -> None:
    assert train_tiny("name=a", "epochs=1") == 0
    assert train_tiny(*taught("epochs=1", "trainer.devices=2", "trainer.threads=1")) == 0
    assert read_checkpoint("outputs/b/checkpoints/last.ckpt")["teacher"] == "outputs/a"


def test_hard_labels_and_mixing_together(finished_run: Path, train_tiny: Program) -> None:
    assert train_tiny(*taught("epochs=1", "recipe.teacher_loss=hard", "recipe.mix.cutmix=1", "recipe.mix.mixup=1")) == 0


def test_the_digest_is_of_names_shapes_and_values() -> None:
    def digest(**tensors: Tensor) -> str:
        return teachers._digest(SimpleNamespace(state_dict=lambda: tensors))  # type: ignore[arg-type]

    one = digest(a=torch.zeros(2), b=torch.ones(1))
    assert one == digest(b=torch.ones(1), a=torch.zeros(2))
    assert len({one, digest(a=torch.zeros(2), c=torch.ones(1)), digest(a=torch.ones(2), b=torch.ones(1))}) == 3


@pytest.mark.slow
def test_a_compiled_step_is_taught_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """As one graph, with a teacher of another size and normalization, with stored logits, and with mixed images."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    images, labels = photographs(4, 32), torch.tensor([0, 2, -1, 1])
    by_teacher = Distillation("soft", 0.5, 2.0)
    teacher = Teacher(network(), "it", Inputs(48, [0.5] * 3, [0.25] * 3), OURS)
    stored = top_logits(teacher(images), 2, "float16")
    mixed = Mixture(labels.flip(0), torch.tensor([0.5, 1.0, 1.0, 0.5]))
    for teaching, logits in (
        (Teaching(by_teacher, teacher, "it", teacher.weights), None),
        (Teaching(by_teacher, None, "it", teacher.weights), stored),
    ):
        classifier = ImageClassifier(repghostnet(0.1, 3, dropout=0.0), RECIPE, **RUN, teaching=teaching)
        eager = classifier._network_and_loss(images, labels, mixed, logits)
        compiled = compile_step(classifier._network_and_loss)(images, labels, mixed, logits)
        torch.testing.assert_close(compiled, eager, rtol=1e-4, atol=1e-5)
        assert compiled.requires_grad
