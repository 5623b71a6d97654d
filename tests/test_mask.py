"""A weight for each pixel: errors count, and gradients flow, in proportion to the mask, for every term."""

from __future__ import annotations

import pytest
import torch

from mghf_loss import DinoJSDLoss, MGHFLoss, MGHFnLoss
from mghf_loss.criterion import masked


@pytest.fixture(params=["MGHFLoss", "MGHFnLoss", "DinoJSDLoss"])
def criterion(request, inn, tiny_dino):
    build = {
        "MGHFLoss": lambda: MGHFLoss(inn=inn),
        "MGHFnLoss": lambda: MGHFnLoss(inn),
        "DinoJSDLoss": lambda: DinoJSDLoss(tiny_dino),
    }
    return build[request.param]()


def left_half(dtype: torch.dtype) -> torch.Tensor:
    mask = torch.zeros(1, 1, 32, 32, dtype=dtype)
    mask[..., :16] = 1
    return mask


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_errors_outside_the_mask_count_nothing_and_get_no_gradient(criterion, dtype):
    sr, gt = torch.rand(2, 2, 3, 32, 32)
    mask = left_half(dtype)
    other = torch.cat((sr[..., :16], torch.rand(2, 3, 32, 16)), 3)
    other.requires_grad_()
    values = criterion.term_values(other, gt, mask=mask)
    for name, value in criterion.term_values(sr, gt, mask=mask).items():
        assert torch.equal(value, values[name])
    criterion(other, gt, mask=mask).backward()
    assert other.grad[..., 16:].abs().max() == 0
    assert other.grad[..., :16].abs().max() > 0
    maps = criterion.heatmap(sr, gt, mask=mask)
    assert maps["total"][..., 18:].abs().max() == 0  # averaged over 5 x 5 pixels
    assert maps["total"][..., :14].max() > 0


def test_a_mask_of_ones_changes_nothing_and_one_of_zeros_compares_gt_with_itself(criterion):
    sr, gt = torch.rand(2, 2, 3, 32, 32)
    ones = torch.ones(2, 1, 32, 32)
    assert torch.equal(criterion(sr, gt, mask=ones), criterion(sr, gt))
    assert torch.equal(criterion(sr, gt, mask=0 * ones), criterion(gt, gt))


def test_gradients_are_those_of_the_blended_image_times_the_mask(criterion):
    sr, gt = torch.rand(2, 1, 3, 32, 32)
    mask = torch.rand(1, 1, 32, 32)
    blended = masked(sr, gt, mask)
    torch.testing.assert_close(blended, mask * sr + (1 - mask) * gt)
    blended.requires_grad_()
    expected = criterion(blended, gt)
    expected.backward()
    sr.requires_grad_()
    loss = criterion(sr, gt, mask=mask)
    loss.backward()
    assert torch.equal(loss, expected)
    torch.testing.assert_close(sr.grad, mask * blended.grad)


def test_the_blend_is_exact_at_both_ends_and_forgives_what_is_masked_out():
    sr, gt = torch.rand(2, 1, 3, 8, 8)
    ends = (torch.rand(1, 1, 8, 8) < 0.5).float()
    blended = masked(sr, gt, ends)
    assert torch.equal(blended, torch.where(ends.bool(), sr, gt))
    broken = torch.where(ends.bool(), sr, torch.nan)
    assert torch.equal(masked(broken, gt, ends.bool()), blended)
    # A half-precision SR does not round GT outside the mask.
    assert torch.equal(masked(sr.bfloat16(), gt, 0 * ends), gt)
    assert not masked(sr, gt.clone().requires_grad_(), ends.requires_grad_()).requires_grad


@pytest.mark.parametrize(
    ("mask", "error", "message"),
    [
        ([1], TypeError, "mask must be a torch.Tensor, got list"),
        (torch.ones(1, 1, 32, 32).long(), TypeError, "mask must be boolean or a floating-point tensor"),
        (torch.ones(32, 32), ValueError, r"mask must have shape \(2 or 1, 1, 32, 32\), got \(32, 32\)"),
        (torch.ones(2, 3, 32, 32), ValueError, r"got \(2, 3, 32, 32\)"),
        (torch.ones(3, 1, 32, 32), ValueError, r"got \(3, 1, 32, 32\)"),
        (torch.ones(1, 1, 16, 32), ValueError, r"got \(1, 1, 16, 32\)"),
        (torch.ones(1, 1, 32, 32, device="meta"), ValueError, "mask must be on the device of sr"),
    ],
)
def test_masks_are_checked(mask, error, message, inn):
    with pytest.raises(error, match=message):
        MGHFnLoss(inn)(*torch.rand(2, 2, 3, 32, 32), mask=mask)
