"""GT-conditioned features: a linear, invertible function of sr - gt, and a content that is a convex quadratic form."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from conftest import perturbed_inn, saved_bytes
from mghf_loss import HighFrequencyINN, MGHFLoss, MGHFnLoss
from mghf_loss.inn import Level, pad_to_multiple

ALL = {"content": 1.0, "style": 300.0, "correlation": 1.0, "texture": 1.0, "grid": 1.0, "patch_nce": 0.01}


def images(*shape: int) -> tuple[Tensor, Tensor]:
    """SR and GT in [0, 1]."""
    gt = torch.rand(shape or (2, 3, 16, 24), dtype=torch.double)
    return gt + 0.2 * torch.randn_like(gt), gt


def strong_inn(**config) -> HighFrequencyINN:
    """A network whose couplings do much, in double precision."""
    network = perturbed_inn(levels=2, couplings=3, **config).double()
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if "matrix" not in name:
                parameter += 0.1 * torch.randn_like(parameter)
    return network


@pytest.fixture(params=["pyramid", "packet"])
def network(request) -> HighFrequencyINN:
    return strong_inn(variant=request.param)


def scales_of(network: HighFrequencyINN, gt: Tensor) -> list[list[Tensor]]:
    with torch.no_grad():
        return network.conditioning(gt).scales


def test_the_couplings_of_these_tests_do_something(network):
    scales = torch.cat([scale.flatten() for level in scales_of(network, images()[1]) for scale in level])
    assert scales.min() < 0.6
    assert scales.max() > 1.5


def test_gt_has_the_features_that_it_has_alone(network):
    gt = 2 * images(2, 3, 17, 22)[1] - 1
    features, _ = network.conditioning(gt)
    for found, expected in zip(features, network.features(gt), strict=True):
        torch.testing.assert_close(found, expected)
    for difference in network.difference(torch.zeros_like(gt), scales_of(network, gt)):
        assert torch.equal(difference, torch.zeros_like(difference))


def test_the_difference_is_that_of_couplings_that_take_shift_and_scale_from_gt(network):
    """Coupling by coupling, as the docstring says it."""

    def level(module: Level, sr: Tensor, gt: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        (sr, sr_low), (gt, gt_low) = module._split(sr), module._split(gt)
        condition = gt_low * module.condition_scale
        for mixing, coupling in module._pairs():
            (sr_1, sr_2), (gt_1, gt_2) = (mixing.transform(x).split(coupling.split, dim=1) for x in (sr, gt))
            phi = coupling.phi(torch.cat((gt_1, condition), 1))
            sr_2, gt_2 = sr_2 + phi, gt_2 + phi
            rho, eta = coupling.rho_eta(torch.cat((gt_2, condition), 1)).chunk(2, 1)
            s = torch.exp(coupling.clamp * torch.tanh(rho / coupling.clamp))
            sr, gt = torch.cat((s * sr_1 + eta, sr_2), 1), torch.cat((s * gt_1 + eta, gt_2), 1)
        return sr, sr_low, gt, gt_low

    sr, gt = (2 * image - 1 for image in images())
    found = network.difference(sr - gt, scales_of(network, gt))
    features = network.features(gt)
    for module, difference, of_gt in zip(network.levels, found, features, strict=True):
        assert isinstance(module, Level)
        sr_level, sr_low, gt_level, gt_low = level(module, sr, gt)
        torch.testing.assert_close(gt_level, of_gt)
        torch.testing.assert_close(difference, sr_level - gt_level)
        sr, gt = sr_low, gt_low
        if network.config.variant == "packet":
            sr, gt = torch.cat((sr_low, sr_level), 1), torch.cat((gt_low, gt_level), 1)


def test_the_difference_is_linear(network):
    x, y = images()
    scales = scales_of(network, 2 * y - 1)
    combined = network.difference(2 * x - 3 * y, scales)
    for found, of_x, of_y in zip(combined, network.difference(x, scales), network.difference(y, scales), strict=True):
        torch.testing.assert_close(found, 2 * of_x - 3 * of_y)


def test_the_differences_and_the_low_pass_band_tell_every_image(network):
    """The matrix of the linear map, one column for each pixel, has full rank."""
    gt = 2 * images(1, 3, 8, 8)[1] - 1
    pixels = torch.eye(3 * 8 * 8, dtype=torch.double).view(-1, 3, 8, 8)
    differences = network.difference(pixels, scales_of(network, gt))
    low = pixels
    for _ in network.levels:
        low = torch.nn.functional.avg_pool2d(low, 2)
    parts = [differences[-1]] if network.config.variant == "packet" else differences
    matrix = torch.cat([part.flatten(1) for part in (*parts, low)], dim=1).T
    assert matrix.shape == (192, 192)
    assert torch.linalg.matrix_rank(matrix) == 192


def test_gradients(network):
    sr, gt = images(1, 3, 8, 8)
    scales = scales_of(network, 2 * gt - 1)
    sr.requires_grad_()
    assert torch.autograd.gradcheck(lambda sr: network.difference(sr, scales), (sr,))
    for conditioning in ("gt", "mixed"):
        options = {"conditioning": conditioning, "shift": "none", "patches": None, "reduction": "none"}
        criterion = MGHFLoss(coefficients=ALL, inn=network, **options).double()
        assert torch.autograd.gradcheck(lambda sr, loss=criterion: loss(sr, gt), (sr,), atol=1e-4)


@pytest.mark.parametrize("shift", ["none", "random", "average"])
def test_content_is_a_convex_quadratic_form(shift, network):
    criterion = MGHFnLoss(network, conditioning="gt", shift=shift).double()
    first, gt = images(1, 3, 18, 24)
    second = torch.rand_like(gt)

    def content(sr: Tensor) -> Tensor:
        return criterion(sr, gt)

    assert content(gt) == 0
    for t in (-2.0, 1e-3, 30.0):
        torch.testing.assert_close(content(gt + t * (first - gt)), t**2 * content(first))
    apart, middle = first - second, (first + second) / 2
    # The parallelogram law says by how much the inequality of convexity holds.
    mean = (content(first) + content(second)) / 2
    torch.testing.assert_close(mean - content(middle), content(gt + apart / 2))
    assert content(middle) < mean
    own = MGHFnLoss(network, conditioning="own", shift=shift).double()
    assert not torch.allclose(own(gt + 2 * (first - gt), gt), 4 * own(first, gt), rtol=0.01)


@pytest.mark.parametrize("shift", ["none", "random", "average"])
@pytest.mark.parametrize("weighting", ["uniform", "entropy"])
def test_mixed_conditioning_has_places_as_seen_by_gt_and_statistics_as_seen_by_sr(weighting, shift, network):
    sr, gt = images()
    options = {"coefficients": ALL, "inn": network, "weighting": weighting, "shift": shift, "patches": None}
    mixed, of_gt, own = (
        MGHFLoss(conditioning=who, **options).double().term_values(sr, gt) for who in ("mixed", "gt", "own")
    )
    for name, value in mixed.items():
        expected, other = (of_gt, own) if name in ("content", "texture", "grid") else (own, of_gt)
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=0)
        assert not torch.allclose(value, other[name], rtol=1e-3), name
    assert [*mixed] == [*own] == [*ALL]


def test_mixed_conditioning_is_for_several_terms(inn):
    with pytest.raises(ValueError, match="conditioning must be one of 'gt', 'own', got 'mixed'"):
        MGHFnLoss(inn, conditioning="mixed")


@pytest.mark.parametrize("variant", ["pyramid", "packet"])
def test_where_couplings_look_at_nothing_it_makes_no_difference_whose_they_are(variant):
    """Scales and shifts that are constants are those of SR and of GT."""
    network = strong_inn(variant=variant)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if name.endswith("4.weight"):  # the last layer; its bias stays
                parameter.zero_()
    sr, gt = images()
    for shift in ("none", "average"):
        of_gt, own = (MGHFnLoss(network, conditioning=who, shift=shift).double() for who in ("gt", "own"))
        torch.testing.assert_close(of_gt(sr, gt), own(sr, gt))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_around_it_leaves_the_value(dtype, inn):
    criterion, (sr, gt) = MGHFLoss(coefficients=ALL, inn=inn, conditioning="gt", patches=16), images()
    sr, gt = sr.float(), gt.float()
    expected = criterion(sr, gt)
    with torch.autocast("cpu", dtype):
        assert torch.equal(criterion(sr, gt), expected)
    assert torch.equal(criterion.to(dtype)(sr, gt), expected)
    assert criterion(sr.to(dtype), gt.to(dtype)).dtype == torch.float32


def test_nothing_is_recomputed_and_less_is_kept_than_with_own_conditioning():
    gt = torch.rand(1, 3, 64, 64)
    sr = (gt + 0.2 * torch.randn_like(gt)).requires_grad_()
    kept, gradients = {}, []
    for conditioning in ("gt", "own"):
        for memory in ("normal", "low"):
            criterion = MGHFnLoss(conditioning=conditioning, memory=memory)
            kept[conditioning, memory] = saved_bytes(criterion, sr, gt)
            if conditioning == "gt":
                gradients.append(torch.autograd.grad(criterion(sr, gt), sr)[0])
    assert torch.equal(*gradients)
    assert kept["gt", "low"] == kept["gt", "normal"]
    print(kept)
    assert kept["gt", "normal"] < 0.2 * kept["own", "normal"]


def test_odd_sizes_are_padded_like_gt(network):
    """The padding by reflection is linear, too."""
    sr, gt = images(1, 3, 9, 14)
    whole = [pad_to_multiple(image, network.stride) for image in (sr, gt)]
    criterion = MGHFnLoss(network, conditioning="gt", shift="none").double()
    torch.testing.assert_close(criterion(sr, gt), criterion(*whole))
