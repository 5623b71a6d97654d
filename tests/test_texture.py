"""The operator of the texture term: derivative, registration, dtypes, layouts. Its values: test_terms.py."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mghf_loss.ops import texture
from mghf_loss.ops.texture import texture_error


def levels(*shape: int, dtype: torch.dtype = torch.double) -> tuple[Tensor, Tensor]:
    sr, gt = torch.randn(2, *(shape or (2, 3, 6, 9)), dtype=dtype).unbind(0)
    return sr, gt


@pytest.mark.parametrize("window", [1, 2, 4, 100])
def test_gradcheck(window):
    sr, gt = levels()
    assert torch.autograd.gradcheck(lambda sr: texture_error(sr, gt, window), sr.requires_grad_())


def test_no_gradient_reaches_gt():
    sr, gt = (level.requires_grad_() for level in levels())
    texture_error(sr, gt).sum().backward()
    assert gt.grad is None
    assert sr.grad.abs().sum() > 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtypes(dtype):
    sr, gt = levels(dtype=dtype)
    sr.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = texture_error(sr, gt.float())
    wide = torch.promote_types(dtype, torch.float32)
    torch.testing.assert_close(found, texture_error(sr.to(wide), gt.to(wide)))
    assert found.dtype == wide
    found.sum().backward()
    assert sr.grad.dtype == dtype


def test_strides_do_not_matter():
    sr, gt = levels()
    found, expected = [], []
    for results, layout in ((found, torch.channels_last), (expected, torch.contiguous_format)):
        changed = sr.contiguous(memory_format=layout).requires_grad_()
        error = texture_error(changed, gt.contiguous(memory_format=layout))
        results += [error, torch.autograd.grad(error.sum(), changed)[0]]
    torch.testing.assert_close(found, expected)


def test_a_number_a_window_is_kept_for_the_backward_pass():
    sr, gt = levels(2, 5, 16, 16, dtype=torch.float32)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        texture_error(sr.requires_grad_(), gt)
    extra = [tensor for tensor in saved if tensor.untyped_storage().data_ptr() != sr.untyped_storage().data_ptr()]
    assert [tuple(tensor.shape) for tensor in extra] == [(2, 5, 4, 4)]


def test_an_empty_batch_has_no_error():
    sr = torch.rand(0, 3, 4, 4, requires_grad=True)
    found = texture_error(sr, sr.detach())
    assert found.shape == (0, 3)
    assert torch.autograd.grad(found.sum(), sr)[0].shape == sr.shape


def test_a_second_derivative_is_refused():
    sr, gt = levels()
    sr.requires_grad_()
    (gradient,) = torch.autograd.grad(texture_error(sr, gt).sum(), sr, create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        torch.autograd.grad(gradient.sum(), sr)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # opcheck's own doing
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.compile
def test_opcheck(layout):
    sr, gt = (level.contiguous(memory_format=layout) for level in levels(dtype=torch.float32))
    torch.library.opcheck(texture.operator, (sr.requires_grad_(), gt, 4, 0.05))
    _, slope = texture.operator(sr.detach(), gt, 4, 0.05)
    torch.library.opcheck(texture.backward_operator, (sr.detach(), slope, torch.randn(2, 3), 4))


@pytest.mark.compile
def test_compiles_without_graph_breaks():
    sr, gt = (level.contiguous(memory_format=torch.channels_last) for level in levels(dtype=torch.float32))
    sr.requires_grad_()

    def value(sr: Tensor, gt: Tensor) -> Tensor:
        return texture_error(sr, gt).square().sum()

    (expected,) = torch.autograd.grad(value(sr, gt), sr)
    torch._dynamo.reset()
    (found,) = torch.autograd.grad(torch.compile(value, fullgraph=True, backend="aot_eager")(sr, gt), sr)
    torch.testing.assert_close(found, expected)
