"""Mixup and CutMix against timm's, and who is mixed with whom."""

from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from test_sampling import EVERYWHERE
from timm.data.mixup import Mixup
from timm.loss import SoftTargetCrossEntropy
from torch import Tensor

from data.mix import Mix, mix, mixture, neighbours
from data.sampling import MIX, NUM_UNIFORMS, uniforms
from repghost.training.classifier import smoothed_cross_entropy

BOTH = Mix(mixup=0.2, cutmix=1.0, probability=0.9, cutmix_share=0.5)


def draws(count: int, epoch: int = 0, start: int = 0) -> Tensor:
    return torch.from_numpy(uniforms(0, epoch, start, count))


def images(count: int, side: int) -> Tensor:
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(count))


@pytest.mark.parametrize("side", [32, 33, 224])
@pytest.mark.parametrize("mixing", [BOTH, Mix(0.4, 0, 1, 0.5), Mix(0, 0.5, 1, 0.5)], ids=["both", "mixup", "cutmix"])
def test_images_and_targets_are_timms_for_the_same_draws(mixing: Mix, side: int) -> None:
    count, classes = 24, 7
    rows, pixels = draws(count), images(count, side)
    labels = torch.arange(count) % classes
    plan = mixing.plan(rows, labels, side)
    ours = mix(pixels, plan)

    # timm mixes the first with the last, the second with the last but one.
    order = torch.cat([torch.arange(0, count, 2), torch.arange(count - 1, 0, -2)])
    pairs = rows[:, MIX].double().numpy().reshape(-1, 4)
    share = mixing.cutmix_share if mixing.mixup and mixing.cutmix else float(mixing.cutmix > 0)
    mixed, cut = pairs[:, 0] < mixing.probability, pairs[:, 0] < mixing.probability * share
    alphas = np.where(cut, mixing.cutmix or 1, mixing.mixup or 1)
    lam = np.where(mixed, stats.beta.ppf(pairs[:, 1], alphas, alphas), 1.0).astype(np.float32)
    places = iter([int(place * side) for row in pairs[cut & mixed] for place in row[2:]])
    theirs = Mixup(mixup_alpha=1, cutmix_alpha=1, mode="pair", label_smoothing=0.1, num_classes=classes)
    with (
        mock.patch.object(theirs, "_params_per_elem", lambda _: (lam.copy(), cut)),
        mock.patch("numpy.random.randint", lambda *_, **__: next(places)),
    ):
        expected, targets = theirs(pixels[order].clone(), labels[order])
    assert next(places, None) is None and mixed.any()
    torch.testing.assert_close(ours[order], expected, rtol=0, atol=2e-6)

    logits = torch.randn(count, classes, generator=torch.Generator().manual_seed(1))
    loss = smoothed_cross_entropy(logits, labels, 0.1, mixture(labels, plan))
    torch.testing.assert_close(loss, SoftTargetCrossEntropy()(logits[order], targets))


@given(st.integers(0, 5), st.integers(0, 40), st.integers(1, 6))
@EVERYWHERE
def test_a_pair_is_mixed_alike_in_any_batch(epoch: int, pair: int, pairs: int) -> None:
    """So that neither the number of devices nor the batch size changes what is trained on."""
    rows, labels = draws(100, epoch), torch.arange(100) % 5
    whole = BOTH.plan(rows, labels, 64)
    part = slice(2 * pair, 2 * (pair + pairs))
    for here, there in zip(BOTH.plan(rows[part], labels[part], 64), whole, strict=True):
        assert torch.equal(here, there[part])


def test_what_has_no_image_is_mixed_with_nothing() -> None:
    rows, labels, pixels = draws(400), torch.arange(400) % 5, images(400, 8)
    labels[::7] = -1
    plan = Mix(1, 1, 1, 0.5).plan(rows, labels, 8)
    alone = (labels < 0) | (neighbours(labels) < 0)
    assert torch.equal(mix(pixels, plan)[alone], pixels[alone])
    assert (plan.label_shares[alone] == 1).all() and (plan.label_shares[~alone] < 1).float().mean() > 0.9


def test_shares_have_the_distribution_of_beta() -> None:
    rows, labels = draws(20_000), torch.zeros(20_000, dtype=torch.int64)
    blended = Mix(0.2, 0, 0.75, 0.5).plan(rows, labels, 64)
    mixed = blended.label_shares < 1
    assert abs(mixed.float().mean() - 0.75) < 0.02
    drawn = blended.label_shares[mixed][::2].numpy()
    assert stats.kstest(drawn[drawn > 1e-4], stats.beta(0.2, 0.2).cdf).statistic < 0.12  # float32 makes some of them 1
    cut = Mix(0, 1, 1, 0.5).plan(rows, labels, 64)
    areas = (cut.boxes[:, 2] - cut.boxes[:, 0]) * (cut.boxes[:, 3] - cut.boxes[:, 1])
    assert torch.allclose(cut.label_shares, 1 - areas / 64**2) and (cut.pixel_shares == 1).all()


def test_columns_of_the_uniforms_suffice() -> None:
    assert MIX.stop == NUM_UNIFORMS


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_dtype_and_memory_format_stay(dtype: torch.dtype, layout: torch.memory_format) -> None:
    pixels = images(8, 32).to(dtype).contiguous(memory_format=layout)
    mixed = mix(pixels, BOTH.plan(draws(8), torch.zeros(8, dtype=torch.int64), 32))
    assert mixed.dtype == dtype and mixed.is_contiguous(memory_format=layout)
