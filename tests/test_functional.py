"""The losses as functions: equal to the modules, and built once for each set of options."""

from __future__ import annotations

import pytest
import torch

from mghf_loss import DinoJSDLoss, MGHFLoss, MGHFnLoss, functional


@pytest.fixture(autouse=True)
def _empty_cache():
    functional._criterion.cache_clear()
    yield
    functional._criterion.cache_clear()


def test_values_and_gradients_are_those_of_the_modules(tiny_dino):
    sr, gt = torch.rand(2, 2, 3, 32, 32)
    calls = (
        (functional.mghf_n, MGHFnLoss(), {}),
        (functional.mghf, MGHFLoss(coefficients={"style": 300.0}), {"coefficients": {"style": 300.0}}),
        (functional.dino_jsd, DinoJSDLoss(tiny_dino), {"model": tiny_dino}),
    )
    for function, criterion, options in calls:
        first, second = (sr.clone().requires_grad_() for _ in range(2))
        function(first, gt, **options).backward()
        criterion(second, gt).backward()
        assert torch.equal(first.grad, second.grad)
    loss, terms = functional.mghf(sr, gt, return_terms=True)
    expected, expected_terms = MGHFLoss()(sr, gt, return_terms=True)
    assert torch.equal(loss, expected)
    assert terms == expected_terms


def test_a_network_is_loaded_once_for_each_set_of_options(inn):
    sr, gt = torch.rand(2, 1, 3, 32, 32)
    count = functional._criterion.cache_info
    for _ in range(2):
        functional.mghf(sr, gt, inn=inn, coefficients={"style": 1.0, "patch_nce": 0.0})
    functional.mghf(sr, gt, coefficients={"patch_nce": 0.0, "style": 1.0}, inn=inn)  # in another order
    functional.mghf(sr, gt, inn=inn, coefficients={"style": 1.0, "patch_nce": 0.0}, return_terms=True)
    functional.mghf(sr.half(), gt.half(), inn=inn, coefficients={"style": 1.0, "patch_nce": 0.0})
    assert (count().misses, count().hits) == (1, 4)
    functional.mghf(sr, gt, inn=inn, coefficients={"style": 2.0, "patch_nce": 0.0})
    functional.mghf_n(sr, gt, inn=inn)
    assert count().misses == 3


def test_double_images_are_computed_in_double():
    sr, gt = torch.rand(2, 1, 3, 32, 32, dtype=torch.float64)
    value = functional.mghf_n(sr, gt)
    assert value.dtype == torch.float64
    assert torch.equal(value, MGHFnLoss().double()(sr, gt))


def test_options_of_the_call_and_of_the_loss_are_told_apart():
    sr, gt = torch.rand(2, 2, 3, 32, 32)
    values = functional.mghf_n(255 * sr, 255 * gt, input_range=[0, 255], reduction="none")
    torch.testing.assert_close(values, functional.mghf_n(sr, gt, reduction="none"), rtol=1e-3, atol=1e-5)
    mask = torch.zeros(1, 1, 32, 32, dtype=torch.bool)
    assert functional.mghf_n(sr, gt, mask=mask) == 0
    with pytest.raises(TypeError, match=r"MGHFnLoss has no argument 'data_range': use input_range"):
        functional.mghf_n(sr, gt, data_range=255)
    with pytest.raises(TypeError, match=r"sr must be a torch\.Tensor, got list"):
        functional.mghf_n([1], gt)
