import math
from typing import Any

import pytest
import timm
import torch
from helpers import photographs, randomize_batchnorm

from repghost.errors import UserError
from repghost.model import WIDTHS, RepGhostModule, count_macs, count_parameters, repghostnet
from repghost.reparameterization import reparameterize

# Parameters in training form, millions of multiply-accumulates at 224 pixels.
PUBLISHED = {
    0.5: (2_313_968, 43.31),
    0.58: (2_546_388, 59.80),
    0.8: (3_278_968, 95.52),
    1.0: (4_073_604, 142.39),
    1.11: (4_539_984, 170.12),
    1.3: (5_478_612, 231.12),
    1.5: (6_575_336, 301.32),
    2.0: (9_796_124, 515.87),
}


@pytest.mark.parametrize("width", WIDTHS)
@torch.no_grad()
def test_same_keys_and_logits_as_timm(width: float) -> None:
    theirs = timm.create_model(f"repghostnet_{round(100 * width):03d}").eval()
    ours = repghostnet(width).eval()
    assert len(ours.state_dict()) == 672
    assert [(k, v.shape, v.dtype) for k, v in ours.state_dict().items()] == [
        (k, v.shape, v.dtype) for k, v in theirs.state_dict().items()
    ]
    images = photographs(4, 64)
    for source, target, seed in ((theirs, ours, 1), (ours, theirs, 2)):
        randomize_batchnorm(source, seed)
        target.load_state_dict(source.state_dict(), strict=True)
        expected = theirs(images)
        assert (ours(images) - expected).abs().max() <= 1e-6 * expected.abs().max()


@torch.no_grad()
def test_same_batchnorm_updates_as_timm() -> None:
    theirs: Any = timm.create_model("repghostnet_050")
    ours = repghostnet(0.5)
    randomize_batchnorm(theirs, 0)
    ours.load_state_dict(theirs.state_dict())
    images = photographs(4, 64)
    theirs.train().forward_features(images)
    ours.train().forward_features(images)
    for key, value in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[key], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("width", WIDTHS)
def test_published_parameters_and_macs(width: float) -> None:
    with torch.device("meta"):
        model = repghostnet(width)
    parameters, macs = PUBLISHED[width]
    assert count_parameters(model) == parameters
    assert round(count_macs(model) / 1e6, 2) == macs


@pytest.mark.parametrize(
    "option, parameters",
    [
        ({"reparam": "identity"}, 2_309_008),
        ({"reparam": "none"}, 2_309_008),
        ({"shortcut": False}, 2_313_968),
    ],
)
@torch.no_grad()
def test_ablations(option: dict, parameters: int) -> None:
    model, published = repghostnet(0.5, **option).eval(), repghostnet(0.5).eval()
    assert count_parameters(model) == parameters
    randomize_batchnorm(published, 0)
    model.load_state_dict({k: v for k, v in published.state_dict().items() if k in model.state_dict()})
    images = photographs(2, 64)
    assert not torch.allclose(model(images), published(images), rtol=1e-2)


@torch.no_grad()
def test_identity_branch_adds_its_input() -> None:
    with_branch = RepGhostModule(8, 16, relu=False, reparam="identity").eval()
    without = RepGhostModule(8, 16, relu=False, reparam="none").eval()
    without.load_state_dict(with_branch.state_dict())
    x = torch.rand(2, 8, 6, 6)
    torch.testing.assert_close(with_branch(x), without(x) + without.primary_conv(x))


@pytest.mark.parametrize("width", [0.35, 1.7])
def test_any_width_channels_and_classes(width: float) -> None:
    model = repghostnet(width, num_classes=10, in_channels=1).eval()
    images = torch.rand(2, 1, 70, 40)
    features = model.forward_features(images)
    assert features.shape == (2, model.conv_head.in_channels, 3, 2)
    assert features.min() >= 0
    assert abs(model.conv_head.in_channels - 960 * width) <= 2
    logits = model.forward_head(features)
    assert logits.shape == (2, 10)
    assert torch.equal(logits, model(images))


@pytest.mark.parametrize(
    "option, names",
    [
        ({"width": 0}, "width=0"),
        ({"width": -1.0}, "width=-1.0"),
        ({"width": math.inf}, "width=inf"),
        ({"width": math.nan}, "width=nan"),
        ({"num_classes": 0}, "num_classes=0"),
        ({"in_channels": 0}, "in_channels=0"),
        ({"dropout": 1.0}, "dropout=1.0"),
        ({"dropout": -0.1}, "dropout=-0.1"),
        ({"dropout": math.nan}, "dropout=nan"),
        ({"reparam": "both"}, "reparam=both"),
    ],
)
def test_bad_options(option: dict, names: str) -> None:
    with pytest.raises(UserError, match=names) as error:
        repghostnet(**option)
    assert "\n" not in str(error.value)


@torch.no_grad()
def test_dropout_only_in_training() -> None:
    features = torch.rand(2, 480, 2, 2)
    model = repghostnet(0.5, dropout=0.5)
    evaluated = model.eval().forward_head(features)
    assert torch.equal(model.forward_head(features), evaluated)
    model.train()
    first, second = model.forward_head(features), model.forward_head(features)
    assert not torch.equal(first, second)
    model.dropout.p = 0.0
    assert torch.equal(model.forward_head(features), evaluated)


def test_reset_classifier() -> None:
    model = repghostnet(0.5).double()
    features = torch.rand(2, 480, 2, 2, dtype=torch.float64)
    model.reset_classifier(7)
    assert model.forward_head(features).shape == (2, 7)
    with pytest.raises(UserError, match="num_classes=0"):
        model.reset_classifier(0)


def test_count_macs_leaves_the_model_alone() -> None:
    model = repghostnet(0.5, num_classes=10, in_channels=1)
    model.blocks.eval()
    modes = [module.training for module in model.modules()]
    before = {key: value.clone() for key, value in model.state_dict().items()}
    # Two input channels less save two thirds of the stem: 3x3 weights, 8 channels out, at half the size.
    assert count_macs(repghostnet(0.5, num_classes=10), 64) - count_macs(model, 64) == 2 * 9 * 8 * 32 * 32
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@torch.no_grad()
def test_channels_last_stays_channels_last() -> None:
    model = repghostnet(0.5).eval()
    randomize_batchnorm(model, 0)
    images = photographs(2, 64)
    expected = model(images)
    model, images = model.to(memory_format=torch.channels_last), images.to(memory_format=torch.channels_last)
    assert model.forward_features(images).is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(model(images), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_compiles_without_graph_breaks() -> None:
    model = repghostnet(0.5)
    for form in (model, reparameterize(model)):
        compiled = torch.compile(form, backend="eager", fullgraph=True)
        compiled(torch.rand(2, 3, 64, 64)).sum().backward()
        assert all(parameter.grad is not None for parameter in form.parameters())
