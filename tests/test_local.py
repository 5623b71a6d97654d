"""The operator of the local errors: derivative, registration, dtypes, layouts. Its values: test_terms.py."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mghf_loss.ops import local
from mghf_loss.ops.local import local_errors


def levels(*shape: int, dtype: torch.dtype = torch.double) -> tuple[Tensor, Tensor]:
    sr, gt = torch.randn(2, *(shape or (2, 3, 6, 9)), dtype=dtype).unbind(0)
    return sr, gt


def flat(sr: Tensor, gt: Tensor, window: int = 4, **options: bool) -> Tensor:
    """All errors as (B, C, 5 or 6)."""
    texture, phases, squared_error = local_errors(sr, gt, window, **options)
    squared = [] if squared_error is None else [squared_error[..., None]]
    return torch.cat([texture[..., None], phases, *squared], 2)


@pytest.mark.parametrize("squared_error", [True, False])
@pytest.mark.parametrize("window", [1, 2, 4, 100])
@pytest.mark.parametrize("size", [(6, 9), (1, 5), (4, 1), (1, 1)])
def test_gradcheck(size, window, squared_error):
    sr, gt = levels(2, 3, *size)
    assert torch.autograd.gradcheck(lambda sr: flat(sr, gt, window, squared_error=squared_error), sr.requires_grad_())


def test_phases_by_hand():
    difference = torch.arange(15.0).view(1, 1, 3, 5)
    expected = [(0 + 2) / 2, (1 + 3) / 2, (5 + 7) / 2, (6 + 8) / 2]  # without the last row and column
    zeros = torch.zeros_like(difference)
    assert local_errors(difference, zeros).phases.flatten().tolist() == expected
    assert local_errors(difference[:, :, :1], zeros[:, :, :1]).phases.flatten().tolist() == [*expected[:2], 0, 0]
    assert local_errors(difference[..., :1], zeros[..., :1]).phases.flatten().tolist() == [0, 0, 5, 0]


def test_the_squared_error_is_left_out_where_it_is_not_wanted():
    sr, gt = levels()
    found = local_errors(sr, gt)
    torch.testing.assert_close(found.squared_error, (sr - gt).square().mean((2, 3)))
    without = local_errors(sr, gt, squared_error=False)
    assert without.squared_error is None
    torch.testing.assert_close(without[:2], found[:2])


def test_no_gradient_reaches_gt():
    sr, gt = (level.requires_grad_() for level in levels())
    flat(sr, gt).sum().backward()
    assert gt.grad is None
    assert sr.grad.abs().sum() > 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtypes(dtype):
    sr, gt = levels(dtype=dtype)
    sr.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = flat(sr, gt.float())
    wide = torch.promote_types(dtype, torch.float32)
    torch.testing.assert_close(found, flat(sr.to(wide), gt.to(wide)))
    assert found.dtype == wide
    found.sum().backward()
    assert sr.grad.dtype == dtype


def test_strides_do_not_matter():
    sr, gt = levels()
    found, expected = [], []
    for results, layout in ((found, torch.channels_last), (expected, torch.contiguous_format)):
        changed = sr.contiguous(memory_format=layout).requires_grad_()
        errors = flat(changed, gt.contiguous(memory_format=layout))
        results += [errors, torch.autograd.grad(errors.sum(), changed)[0]]
    torch.testing.assert_close(found, expected)


def test_a_number_a_window_is_kept_for_the_backward_pass():
    sr, gt = levels(2, 5, 16, 16, dtype=torch.float32)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        local_errors(sr.requires_grad_(), gt, squared_error=False)
    extra = [tensor for tensor in saved if tensor.untyped_storage().data_ptr() != sr.untyped_storage().data_ptr()]
    assert [tuple(tensor.shape) for tensor in extra] == [(2, 5, 4, 4)]


def test_an_empty_batch_has_no_error():
    sr = torch.rand(0, 3, 4, 4, requires_grad=True)
    found = flat(sr, sr.detach())
    assert found.shape == (0, 3, 6)
    assert torch.autograd.grad(found.sum(), sr)[0].shape == sr.shape


def test_a_second_derivative_is_refused():
    sr, gt = levels()
    sr.requires_grad_()
    (gradient,) = torch.autograd.grad(flat(sr, gt).sum(), sr, create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        torch.autograd.grad(gradient.sum(), sr)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # opcheck's own doing
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.compile
def test_opcheck(layout):
    sr, gt = (level.contiguous(memory_format=layout) for level in levels(dtype=torch.float32))
    torch.library.opcheck(local.operator, (sr.requires_grad_(), gt, 4, 0.05, True))
    _, slope = local.operator(sr.detach(), gt, 4, 0.05, True)
    for second, count in ((gt, 6), (None, 5)):
        torch.library.opcheck(local.backward_operator, (sr.detach(), second, slope, torch.randn(2, 3, count), 4))


@pytest.mark.compile
def test_compiles_without_graph_breaks():
    sr, gt = (level.contiguous(memory_format=torch.channels_last) for level in levels(dtype=torch.float32))
    sr.requires_grad_()

    def value(sr: Tensor, gt: Tensor) -> Tensor:
        return flat(sr, gt).square().sum()

    (expected,) = torch.autograd.grad(value(sr, gt), sr)
    torch._dynamo.reset()
    (found,) = torch.autograd.grad(torch.compile(value, fullgraph=True, backend="aot_eager")(sr, gt), sr)
    torch.testing.assert_close(found, expected)
