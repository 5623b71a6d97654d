"""Entropy, pruning and reweighting of channels."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.stats import entropy

from mghf_loss.terms import channel_entropy, entropy_channel_weights


def test_entropy_is_scipys_of_numpys_histogram():
    features = torch.randn(2, 3, 20, 30, dtype=torch.double) * torch.tensor([0.1, 1.0, 5.0]).reshape(1, 3, 1, 1)
    expected = [
        [entropy(np.histogram(np.clip(channel.numpy(), -4, 4), bins=64, range=(-4, 4))[0]) for channel in image]
        for image in features
    ]
    np.testing.assert_allclose(channel_entropy(features).numpy(), expected, rtol=1e-12)


def test_entropy_by_hand():
    values = torch.tensor([-3.9, -3.9, 0.1, 0.1])
    uniform = torch.linspace(-4, 4, 65)[:-1] + 1 / 16
    features = torch.stack([values.repeat(16), torch.zeros(64), uniform])[None, :, :, None]
    got = channel_entropy(features)[0]
    torch.testing.assert_close(got, torch.tensor([math.log(2), 0.0, math.log(64)]))


def test_outliers_and_non_finite_values_have_a_bin():
    features = torch.tensor([1e30, -1e30, math.inf, -math.inf, math.nan, 0.0]).reshape(1, 1, 2, 3)
    # The lowest bin holds -1e30, -inf and NaN, the highest 1e30 and inf.
    p = [3 / 6, 2 / 6, 1 / 6]
    assert channel_entropy(features).item() == pytest.approx(-sum(x * math.log(x) for x in p), rel=1e-6)


@pytest.mark.parametrize(("prune", "dropped"), [(0.0, 0), (0.25, 2), (0.5, 4), (0.75, 6), (0.99, 8)])
def test_the_least_entropy_is_dropped_and_the_mean_is_one(prune, dropped):
    scale = torch.linspace(0.05, 1, 9)[torch.randperm(9)]
    features = torch.randn(3, 9, 32, 32) * scale.reshape(1, 9, 1, 1)
    weights = entropy_channel_weights(features, prune)
    assert ((weights == 0).sum(1) == dropped).all()
    torch.testing.assert_close(weights.mean(1), torch.ones(3))
    entropies = channel_entropy(features)
    for sample in range(3):
        assert set(entropies[sample].argsort()[:dropped].tolist()) == set(
            (weights[sample] == 0).nonzero().flatten().tolist()
        )
    kept = weights > 0
    ratio = (weights / (entropies + 1e-6)).masked_fill(~kept, math.nan)
    torch.testing.assert_close(ratio.nan_to_num(0).amax(1), ratio.nan_to_num(math.inf).amin(1))


def test_a_constant_image_gets_equal_weights():
    weights = entropy_channel_weights(torch.zeros(1, 8, 4, 4), 0.25)
    assert weights[0].tolist() == pytest.approx([0, 0] + [8 / 6] * 6)


def test_weights_carry_no_gradient():
    features = torch.randn(1, 4, 8, 8, requires_grad=True)
    assert not entropy_channel_weights(features).requires_grad
