import copy
import pickle

import pytest
import torch
from helpers import photographs, randomize_batchnorm
from torch import nn

from repghost.model import WIDTHS, RepGhostNet, count_macs, count_parameters, repghostnet
from repghost.reparameterization import reparameterize


def trained(width: float = 0.5, seed: int = 0, **options) -> RepGhostNet:
    """A model whose BatchNorms look as if it had been trained, in evaluation mode."""
    torch.manual_seed(seed)
    model = repghostnet(width, **options).eval()
    randomize_batchnorm(model, seed)
    return model


def assert_equal(a: RepGhostNet, b: RepGhostNet) -> None:
    """Equal state dicts: keys in order, dtypes and bits."""
    state, other = a.state_dict(), b.state_dict()
    assert list(state) == list(other)
    for key, value in state.items():
        assert value.dtype == other[key].dtype and torch.equal(value, other[key]), key


@pytest.mark.parametrize(
    "width, options",
    [
        *((width, {}) for width in WIDTHS),
        (0.35, {"in_channels": 1, "num_classes": 10}),
        (0.5, {"reparam": "identity"}),
        (0.5, {"reparam": "none"}),
        (0.5, {"shortcut": False}),
    ],
)
@torch.no_grad()
def test_same_logits(width: float, options: dict) -> None:
    model = trained(width, **options)
    fused = reparameterize(model)
    assert type(fused) is RepGhostNet and not fused.training
    assert not any(isinstance(module, nn.BatchNorm2d) for module in fused.modules())
    assert not any("running" in key or "bn" in key for key in fused.state_dict())
    images = photographs(12, 96)[:, : options.get("in_channels", 3)]
    expected, logits = model(images), fused(images)
    assert expected.std(0).mean() > 0.01 * expected.abs().max()  # the logits depend on the image
    assert torch.equal(logits.argmax(1), expected.argmax(1))
    assert (logits - expected).abs().max() < 1e-5 * expected.abs().max()
    expected, logits = model.double()(images[:4].double()), reparameterize(model)(images[:4].double())
    assert (logits - expected).abs().max() < 1e-13 * expected.abs().max()
    assert count_macs(fused, 64) == count_macs(model, 64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rounds_once(dtype: torch.dtype) -> None:
    model = trained().to(dtype)
    fused = reparameterize(model)
    assert all(parameter.dtype == dtype for parameter in fused.parameters())
    assert_equal(fused, reparameterize(copy.deepcopy(model).double()).to(dtype))


def test_original_is_untouched() -> None:
    model = trained().train()
    model.blocks[3].eval()
    modes = [module.training for module in model.modules()]
    before = copy.deepcopy(model)
    fused = reparameterize(model)
    with torch.no_grad():
        for parameter in fused.parameters():
            parameter.zero_()  # shares no memory with the original
    assert_equal(model, before)
    assert [module.training for module in model.modules()] == modes


def test_what_learns_goes_on_learning() -> None:
    model = trained()
    model.blocks[0].requires_grad_(False)
    for name, parameter in reparameterize(model).named_parameters():
        assert parameter.requires_grad != name.startswith("blocks.0."), name


def test_training_mode_gives_the_same_as_evaluation_mode() -> None:
    model = trained()
    fused = reparameterize(model)
    random_state = torch.get_rng_state()
    from_training = reparameterize(model.train())
    assert torch.equal(torch.get_rng_state(), random_state)
    assert not from_training.training
    assert_equal(from_training, fused)


@torch.no_grad()
def test_twice_gives_an_equal_copy() -> None:
    fused = reparameterize(trained())
    again = reparameterize(fused)
    assert_equal(again, fused)
    again.classifier.weight.zero_()
    assert fused.classifier.weight.any()


@torch.no_grad()
def test_training_mode_of_the_result_is_dropout_only() -> None:
    model = trained(dropout=0.3)
    images = photographs(4, 64)
    fused = reparameterize(model)
    assert fused.dropout.p == 0.3
    expected = fused(images)
    fused.train()
    torch.manual_seed(0)
    assert not torch.equal(fused(images), expected)
    fused.dropout.p = 0.0
    assert torch.equal(fused(images), expected)


@torch.no_grad()
def test_fused_state_dict_loads_into_a_fused_model() -> None:
    model = trained(1.11, num_classes=7, in_channels=1)
    model.reset_classifier(5)
    fused = reparameterize(model)
    built = repghostnet(1.11, num_classes=5, in_channels=1, fused=True).eval()
    built.load_state_dict(fused.state_dict(), strict=True)
    assert_equal(built, fused)
    images = photographs(2, 64)[:, :1]
    assert torch.equal(built(images), fused(images))


def test_fused_parameters() -> None:
    """Every weight keeps its name. A BatchNorm leaves one bias for each channel, an identity branch nothing."""
    model = repghostnet(0.5)
    fused = repghostnet(0.5, fused=True)
    matrices = [name for name, parameter in model.named_parameters() if parameter.ndim > 1]
    assert [name for name, parameter in fused.named_parameters() if parameter.ndim > 1] == matrices
    norms = {name: m for name, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)}
    assert len(norms) == 112
    gone = sum(m.num_features * (2 if "fusion_bn" in name else 1) for name, m in norms.items())
    assert count_parameters(model) - count_parameters(fused) == gone


@pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning")
@torch.no_grad()
def test_copies_pickles_and_traces() -> None:
    fused = reparameterize(trained())
    images = photographs(2, 64)
    expected = fused(images)
    assert torch.equal(copy.deepcopy(fused)(images), expected)
    assert torch.equal(pickle.loads(pickle.dumps(fused))(images), expected)
    assert torch.equal(torch.jit.trace(fused, images)(images), expected)
    exported = torch.export.export(fused, (images,)).module()
    torch.testing.assert_close(exported(images), expected)
