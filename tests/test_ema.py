"""The weight average against timm's ModelEmaV2 and its own definition."""

import pytest
import timm.utils
import torch

from repghost.model import repghostnet
from repghost.training.ema import WeightAverage


def test_equals_timm_over_parameters_and_buffers() -> None:
    model = repghostnet(0.1, 5).double()
    mine, theirs = WeightAverage(model, 0.9), timm.utils.ModelEmaV2(model, decay=0.9)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(4):
        model.train()
        images = torch.randn(4, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
        model(images).square().sum().backward()
        optimizer.step()
        mine.update(model)
        theirs.update(model)
    for (name, a), b in zip(mine.model.state_dict().items(), theirs.module.state_dict().values(), strict=True):
        if a.is_floating_point():
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14, msg=name)


def test_starts_from_the_initial_weights() -> None:
    model = torch.nn.Linear(1, 1)
    torch.nn.init.constant_(model.weight, 1.0)
    average = WeightAverage(model, 0.75)
    torch.nn.init.constant_(model.weight, 5.0)
    average.update(model)
    assert average.model.weight.item() == pytest.approx(0.75 * 1 + 0.25 * 5)


def test_is_a_twin_that_neither_trains_nor_follows() -> None:
    model = repghostnet(0.1, 5).train()
    average = WeightAverage(model, 0.5)
    assert not average.model.training and model.training
    assert not any(p.requires_grad for p in average.model.parameters())
    assert all(p.requires_grad for p in model.parameters())
    torch.nn.init.zeros_(model.classifier.weight)
    assert average.model.classifier.weight.abs().sum() > 0
