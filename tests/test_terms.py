"""Terms and channel weights on one level of features: hand-computed values, NumPy, SciPy, invariances."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.stats import entropy

from conftest import perturbed_inn
from mghf_loss import MGHFLoss, terms
from mghf_loss.terms import channel_entropy, entropy_channel_weights


def levels(batch: int = 2, channels: int = 5, size: tuple[int, int] = (6, 7)) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(2, batch, channels, *size, dtype=torch.double).unbind(0)


def test_content_by_hand():
    sr = torch.tensor([1.0, 2.0, 3.0, 4.0]).reshape(1, 2, 1, 2)
    gt = torch.tensor([1.0, 0.0, 3.0, 7.0]).reshape(1, 2, 1, 2)
    assert terms.content(sr, gt).item() == pytest.approx((4 + 9) / 4)
    weights = torch.tensor([[0.5, 2.0]])
    assert terms.content(sr, gt, weights).item() == pytest.approx((4 * 0.25 + 9 * 4) / 4)


def test_style_by_hand():
    sr = torch.tensor([[1.0, 2.0], [0.0, 1.0]]).reshape(1, 2, 1, 2)
    gt = torch.zeros(1, 2, 1, 2)
    # F F^T = [[5, 2], [2, 1]], / (C H W) = / 4
    assert terms.style(sr, gt).item() == pytest.approx((5**2 + 2 * 2**2 + 1) / 16 / 4)


def test_a_bounded_style_grows_with_the_second_power_of_large_features():
    """As E for a small E, as twice delta times its root for a large one."""
    gt = torch.randn(1, 4, 16, 16)
    small, large = terms.style(1.001 * gt, gt), terms.style(100 * gt, gt)
    assert terms.style(1.001 * gt, gt, delta=1.0).item() == pytest.approx(small.item(), rel=1e-5)
    assert terms.style(100 * gt, gt, delta=1.0).item() == pytest.approx(2 * large.sqrt().item(), rel=1e-2)
    assert terms.style(gt, gt, delta=1.0) == 0
    assert terms.style(100 * gt, gt, delta=1e30) == terms.style(100 * gt, gt)
    with pytest.raises(ValueError, match="delta must be a number of at least 1e-06, got 0"):
        terms.style(gt, gt, delta=0)


def test_style_is_the_difference_of_two_gram_matrices():
    sr, gt = levels()
    weights = torch.rand(2, 5, dtype=torch.double)

    def gram(level: torch.Tensor, b: int) -> np.ndarray:
        f = level[b].flatten(1).numpy() * weights[b].numpy()[:, None]
        return f @ f.T / f.size

    expected = [np.mean((gram(sr, b) - gram(gt, b)) ** 2) for b in range(2)]
    np.testing.assert_allclose(terms.style(sr, gt, weights, reduction="none").numpy(), expected, rtol=1e-12)


def test_style_keeps_its_digits_when_sr_is_close_to_gt():
    gt = torch.randn(1, 8, 32, 32, dtype=torch.double)
    sr = gt + 1e-4 * torch.randn_like(gt)
    exact = terms.style(sr, gt)
    assert terms.style(sr.float(), gt.float()).item() == pytest.approx(exact.item(), rel=1e-2)


def test_style_ignores_where_texture_is_and_correlation_does_not():
    gt = torch.randn(1, 5, 8, 8, dtype=torch.double)
    shuffled = gt.flatten(2)[:, :, torch.randperm(64)].reshape_as(gt)
    assert terms.style(shuffled, gt).item() == pytest.approx(0, abs=1e-25)
    assert terms.correlation(shuffled, gt).item() > 0.5


def test_correlation_is_one_minus_pearsons_r():
    sr, gt = levels()
    r = [[np.corrcoef(sr[b, c].ravel(), gt[b, c].ravel())[0, 1] for c in range(5)] for b in range(2)]
    got = terms.correlation(sr, gt, eps=0.0, reduction="none").numpy()
    np.testing.assert_allclose(got, 1 - np.mean(r, axis=1), rtol=1e-10)
    weights = torch.rand(2, 5, dtype=torch.double)
    got = terms.correlation(sr, gt, weights, eps=0.0, reduction="none").numpy()
    np.testing.assert_allclose(got, 1 - np.average(r, axis=1, weights=weights.numpy()), rtol=1e-10)


def test_correlation_extremes():
    gt = torch.randn(1, 3, 8, 8, dtype=torch.double)
    assert terms.correlation(3 * gt + 1, gt, eps=0.0).item() == pytest.approx(0, abs=1e-12)
    assert terms.correlation(-gt, gt, eps=0.0).item() == pytest.approx(2, abs=1e-12)
    assert terms.correlation(torch.ones_like(gt), torch.zeros_like(gt)).item() == pytest.approx(0, abs=1e-12)


def test_pruned_channels_do_not_count():
    sr, gt = levels()
    weights = torch.ones(2, 5, dtype=torch.double)
    weights[:, 1] = 0
    changed = sr.clone()
    changed[:, 1] *= 7
    for term in (terms.content, terms.style, terms.correlation, terms.texture, terms.grid):
        assert torch.equal(term(changed, gt, weights), term(sr, gt, weights)), term.__name__
        assert not torch.equal(term(changed, gt), term(sr, gt)), term.__name__


@pytest.mark.parametrize(
    "term", [terms.content, terms.style, terms.correlation, terms.texture, terms.grid, terms.patch_nce]
)
def test_reductions_agree(term):
    sr, gt = levels(batch=3)
    values = term(sr, gt, reduction="none")
    assert values.shape == (3,)
    torch.testing.assert_close(term(sr, gt, reduction="mean"), values.mean())
    torch.testing.assert_close(term(sr, gt, reduction="sum"), values.sum())
    single = torch.stack([term(sr[b : b + 1], gt[b : b + 1]) for b in range(3)])
    torch.testing.assert_close(single, values)  # images of a batch do not see one another


@pytest.mark.parametrize("term", [terms.content, terms.style, terms.correlation, terms.texture, terms.grid])
def test_gradcheck(term):
    sr, gt = levels(batch=1, channels=2, size=(2, 3))
    assert torch.autograd.gradcheck(lambda x: term(x, gt), (sr.requires_grad_(),))


@pytest.mark.parametrize(
    "term", [terms.content, terms.style, terms.correlation, terms.texture, terms.grid, terms.patch_nce]
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_levels_are_computed_in_float32_whatever_autocast_says(term, dtype):
    sr, gt = (level.to(dtype) for level in levels())
    expected = term(sr.float(), gt.float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = term(sr, gt)
    assert got.dtype == torch.float32
    assert torch.equal(got, expected)


@pytest.mark.parametrize(
    "term", [terms.content, terms.style, terms.correlation, terms.texture, terms.grid, terms.patch_nce]
)
def test_an_unknown_reduction_is_refused(term):
    with pytest.raises(ValueError, match=r"reduction must be one of .* got 'max'"):
        term(*levels(), reduction="max")


@pytest.mark.parametrize(
    "term", [terms.content, terms.style, terms.correlation, terms.texture, terms.grid, terms.patch_nce]
)
def test_levels_of_different_shape_are_refused(term):
    with pytest.raises(ValueError, match=r"\(1, 3, 4, 4\) and \(1, 3, 4, 5\)"):
        term(torch.rand(1, 3, 4, 4), torch.rand(1, 3, 4, 5))


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
    least = entropies.mean(1, keepdim=True) / 4
    ratio = (weights / (entropies.maximum(least) + 1e-6)).masked_fill(~kept, math.nan)
    torch.testing.assert_close(ratio.nan_to_num(0).amax(1), ratio.nan_to_num(math.inf).amin(1))


def test_a_constant_image_gets_equal_weights():
    weights = entropy_channel_weights(torch.zeros(1, 8, 4, 4), 0.25)
    assert weights[0].tolist() == pytest.approx([0, 0] + [8 / 6] * 6)


def test_a_channel_that_does_not_vary_is_not_free():
    features = torch.randn(2, 9, 32, 32)
    features[:, 3] = 0.7
    weights = entropy_channel_weights(features, 0.0)
    assert weights[:, 3].min() > 0.2
    assert weights.max() < 1.3


def test_weights_carry_no_gradient():
    features = torch.randn(1, 4, 8, 8, requires_grad=True)
    assert not entropy_channel_weights(features).requires_grad


@pytest.mark.parametrize("variant", ["pyramid", "packet"])
@pytest.mark.parametrize("weighting", ["uniform", "entropy"])
def test_the_terms_of_a_loss_are_the_means_over_the_levels(variant, weighting):
    network = perturbed_inn(variant=variant, levels=2)
    factors = dict.fromkeys(("content", "style", "correlation", "texture", "grid", "patch_nce"), 1.0)
    options = {"conditioning": "own", "shift": "none", "patches": None, "prune": 0.25 * (weighting == "entropy")}
    criterion = MGHFLoss(coefficients=factors, inn=network, weighting=weighting, **options)
    sr, gt = torch.rand(2, 2, 3, 16, 24)
    per_level = {name: [] for name in factors}
    for sr_level, gt_level in zip(*(network.features(2 * image - 1) for image in (sr, gt)), strict=True):
        weights = entropy_channel_weights(gt_level) if weighting == "entropy" else None
        for name, values in per_level.items():
            bound = {"delta": criterion.style_delta} if name == "style" else {}
            values.append(getattr(terms, name)(sr_level, gt_level, weights, reduction="none", **bound))
    for name, found in criterion.term_values(sr, gt).items():
        torch.testing.assert_close(found, torch.stack(per_level[name]).mean(0), rtol=1e-5, atol=1e-7)


def test_texture_by_hand():
    sr, gt = torch.zeros(2, 1, 2, 5, 4).unbind(0)
    sr[0, 0] = 3.0  # all windows, whole and cut off
    gt[0, 1, 4, 0] = 2.0  # one of the four locations of the second window
    errors = (9 + 0.05**2) ** 0.5 - 0.05, ((1 + 0.05**2) ** 0.5 - 0.05) / 2
    assert terms.texture(sr, gt).item() == pytest.approx(sum(errors) / 2, rel=1e-6)
    weights = torch.tensor([[0.5, 2.0]])
    assert terms.texture(sr, gt, weights).item() == pytest.approx((0.5 * errors[0] + 2 * errors[1]) / 2, rel=1e-6)
    assert terms.texture(sr, gt, window=1, eps=2.0).item() == pytest.approx((13**0.5 - 2 + (8**0.5 - 2) / 20) / 2)


def test_texture_is_blind_to_sign_and_place_within_a_window_and_not_to_strength():
    gt = torch.randn(2, 5, 8, 12, dtype=torch.double)
    assert terms.texture(gt, gt) == 0
    sign = torch.randn_like(gt).sign()
    assert terms.texture(sign * gt, gt).item() == pytest.approx(0, abs=1e-12)
    windows = gt.unflatten(3, (3, 4)).unflatten(2, (2, 4))
    assert terms.texture(windows.transpose(3, 5).reshape_as(gt), gt).item() == pytest.approx(0, abs=1e-12)
    assert terms.texture(gt.roll(4, 3), gt) > 0.05  # another window
    blurred, sharpened = terms.texture(0.5 * gt, gt), terms.texture(1.5 * gt, gt)
    assert blurred.item() == pytest.approx(sharpened.item(), rel=0.02)
    assert blurred > 0.3


def test_the_gradient_of_texture_is_bounded_as_noise_grows():
    gt, noise = torch.randn(2, 1, 5, 9, 12, dtype=torch.double).unbind(0)
    sizes = []
    for strength in (1.0, 1e2, 1e4, 1e8):
        sr = (gt + strength * noise).requires_grad_()
        (gradient,) = torch.autograd.grad(terms.texture(sr, gt), sr)
        sizes.append(gradient.abs().sum().item())
    assert max(sizes) <= 1  # |d R / d F| adds up to 1 at most in a window, and the windows' mean is taken
    assert sizes[1:] == pytest.approx(sizes[-1:] * 3, rel=0.05)  # and it does not vanish


@pytest.mark.parametrize("sr_is_zero", [True, False])
@pytest.mark.parametrize("gt_is_zero", [True, False])
def test_the_gradient_of_texture_is_finite_where_features_are_zero(sr_is_zero, gt_is_zero):
    sr, gt = (level * (not zero) for level, zero in zip(levels(), (sr_is_zero, gt_is_zero), strict=True))
    sr.requires_grad_()
    (gradient,) = torch.autograd.grad(terms.texture(sr, gt), sr)
    assert gradient.isfinite().all()
    assert (gradient.abs().max() > 0) == (not sr_is_zero)
    assert not torch.autograd.grad(terms.texture(sr, sr.detach()), sr)[0].any()  # the kink, from either side


def test_texture_takes_levels_that_are_smaller_than_its_window():
    sr, gt = levels(size=(1, 3))
    expected = ((sr.square().mean((2, 3)) + 0.05**2).sqrt() - (gt.square().mean((2, 3)) + 0.05**2).sqrt()).abs().mean()
    torch.testing.assert_close(terms.texture(sr, gt), expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 0}, "window must be an integer of at least 1, got 0"),
        ({"window": 2.5}, "window must be an integer of at least 1, got 2.5"),
        ({"eps": 0}, "eps must be a finite number above 0, got 0"),
    ],
)
def test_options_of_texture_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        terms.texture(*levels(), **options)


def test_grid_by_hand():
    sr, gt = torch.zeros(2, 1, 2, 3, 4).unbind(0)  # the third row has no second one beside it, and is left out
    sr[0, 0, 0::2, 1::2] = 3.0  # one phase whole
    sr[0, 1, 1, 0] = 1.0  # half of one phase
    assert terms.grid(sr, gt).item() == pytest.approx((9 / 4 + 0.25 / 4) / 2)
    weights = torch.tensor([[0.5, 2.0]])
    assert terms.grid(sr, gt, weights).item() == pytest.approx((0.25 * 9 / 4 + 4 * 0.25 / 4) / 2)


def test_grid_sees_patterns_of_up_to_two_locations_and_not_what_cancels():
    gt = torch.randn(1, 3, 32, 32, dtype=torch.double)
    pattern = torch.tensor([[1.0, -1.0], [-1.0, 1.0]]).repeat(16, 16)
    assert terms.grid(gt + pattern, gt).item() == pytest.approx(1)
    assert terms.grid(gt + 1, gt).item() == pytest.approx(1)  # of one location: the mean
    assert terms.grid(gt + pattern.roll(1, 1), gt + pattern).item() == pytest.approx(4)
    halves = torch.tensor([1.0, -1.0]).repeat_interleave(16)
    assert terms.grid(gt + halves * pattern, gt).item() == pytest.approx(0)
    noise = torch.randn_like(gt)
    assert terms.grid(gt + noise, gt) < 5 / 256  # its variance over the locations of a phase


@pytest.mark.parametrize("size", [(1, 1), (1, 5), (2, 3)])
def test_grid_takes_levels_without_a_second_phase(size):
    sr, gt = levels(size=size)
    phases = {(1, 1): (1, 1), (1, 5): (1, 2), (2, 3): (2, 2)}[size]
    errors = (sr - gt)[..., : size[1] - size[1] % phases[1]]
    means = [
        errors[:, :, i :: phases[0], j :: phases[1]].mean((2, 3)) for i in range(phases[0]) for j in range(phases[1])
    ]
    torch.testing.assert_close(terms.grid(sr, gt), torch.stack(means).square().sum(0).mean() / 4)
