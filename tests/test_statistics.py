"""Second-order statistics: against numpy, two Gram matrices and finite differences."""

from __future__ import annotations

from shutil import which

import numpy as np
import pytest
import torch
from torch import Tensor

from mghf_loss import terms
from mghf_loss.ops import second_order_statistics
from mghf_loss.ops.statistics import statistics_formula


def levels(*shape: int, dtype: torch.dtype = torch.double) -> tuple[Tensor, Tensor]:
    sr, gt = torch.randn(2, *(shape or (2, 5, 3, 4)), dtype=dtype).unbind(0)
    return sr, gt


def test_every_statistic_is_what_its_name_says():
    sr, gt = levels()
    found = second_order_statistics(sr, gt)
    for b in range(2):
        x, y = sr[b].flatten(1).numpy(), gt[b].flatten(1).numpy()
        expected = {
            "gram_difference": (x @ x.T - y @ y.T) / x.size,
            "mean_sr": x.mean(1),
            "mean_gt": y.mean(1),
            "variance_sr": x.var(1),
            "variance_gt": y.var(1),
            "covariance": np.mean((x - x.mean(1, keepdims=True)) * (y - y.mean(1, keepdims=True)), 1),
            "squared_error": np.mean((x - y) ** 2, 1),
        }
        for name, value in expected.items():
            np.testing.assert_allclose(getattr(found, name)[b].numpy(), value, rtol=1e-11, atol=1e-14, err_msg=name)


def test_by_hand():
    sr = torch.tensor([[[3.0, 1.0]]])
    gt = torch.tensor([[[1.0, 1.0]]])
    found = second_order_statistics(sr, gt)
    assert found.gram_difference.item() == pytest.approx((10 - 2) / 2)
    assert [value.item() for value in found[1:]] == [2.0, 1.0, 1.0, 0.0, 0.0, 2.0]


@pytest.mark.parametrize("gram", [True, False])
@pytest.mark.parametrize("pruned", [True, False])
def test_gradcheck(gram, pruned):
    sr, gt = levels()
    weights = torch.rand(2, 5).index_fill(1, torch.tensor([1, 3]), 0.0) if pruned else None

    def values(sr: Tensor) -> tuple[Tensor, ...]:
        found = second_order_statistics(sr, gt, weights, gram=gram)
        return found if gram else found[1:]

    assert torch.autograd.gradcheck(values, (sr.requires_grad_(),))


def test_no_gradient_reaches_gt_or_weights():
    sr, gt = (level.requires_grad_() for level in levels())
    weights = torch.rand(2, 5, requires_grad=True)
    sum(value.sum() for value in second_order_statistics(sr, gt, weights)).backward()
    assert gt.grad is None
    assert weights.grad is None
    assert sr.grad.abs().sum() > 0


def test_pruned_channels_are_zero_throughout():
    sr, gt = levels()
    weights = torch.tensor([[1.0, 0.0, 2.0, 1.0, 1.0]]).expand(2, 5)
    pruned, whole = second_order_statistics(sr, gt, weights), second_order_statistics(sr, gt)
    keep = weights != 0
    for found, full in zip(pruned[1:], whole[1:], strict=True):
        assert torch.equal(found, torch.where(keep, full, 0))
    assert torch.equal(pruned.gram_difference, torch.where(keep[:, None] & keep[:, :, None], whole.gram_difference, 0))


def test_nothing_cancels_when_sr_is_close_to_gt_or_far_from_zero():
    gt = torch.randn(1, 8, 40, 40, dtype=torch.double) + 100
    sr = gt + 1e-2 * torch.randn_like(gt)
    exact = second_order_statistics(sr.float().double(), gt.float().double())
    found = second_order_statistics(sr.float(), gt.float())
    for name in ("variance_sr", "covariance", "squared_error", "gram_difference"):
        torch.testing.assert_close(getattr(found, name).double(), getattr(exact, name), rtol=1e-4, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtypes(dtype):
    sr, gt = levels(dtype=dtype)
    sr.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = second_order_statistics(sr, gt.float())
    wide = torch.promote_types(dtype, torch.float32)
    assert {value.dtype for value in found} == {wide}
    expected = second_order_statistics(sr.to(wide), gt.to(wide))
    for value, want in zip(found, expected, strict=True):
        torch.testing.assert_close(value, want)
    sum(value.sum() for value in found).backward()
    assert sr.grad.dtype == dtype


@pytest.mark.parametrize("layout", ["channels_last", "strided", "expanded"])
def test_strides_do_not_matter(layout):
    sr, gt = levels(2, 5, 4, 6)
    changed = {
        "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
        "strided": lambda x: x.repeat_interleave(2, dim=3)[..., ::2],
        "expanded": lambda x: x,
    }[layout]
    if layout == "expanded":
        sr, gt = sr[:1].expand(2, -1, -1, -1), gt[:1].expand(2, -1, -1, -1)
    expected = second_order_statistics(sr.contiguous(), gt.contiguous())
    for found, want in zip(second_order_statistics(changed(sr), changed(gt)), expected, strict=True):
        torch.testing.assert_close(found, want)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # opcheck's own doing
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("gram", [True, False])
@pytest.mark.parametrize("keep", [None, torch.tensor([[True, False, True]] * 2)])
@pytest.mark.compile
def test_opcheck(gram, keep, layout):
    sr, gt = (level.contiguous(memory_format=layout) for level in levels(2, 3, 4, 5, dtype=torch.float32))
    arguments = (sr.requires_grad_(), gt, keep, gram, "fast")
    result = torch.library.opcheck(torch.ops.mghf_loss.second_order_statistics.default, arguments)
    assert set(result.values()) == {"SUCCESS"}
    gram_gradient = torch.randn(2, 3, 3) if gram else None
    arguments = (sr.detach(), gt, keep, torch.randn(2, 6, 3), gram_gradient, torch.randn(2, 6, 3), "high")
    result = torch.library.opcheck(torch.ops.mghf_loss.second_order_statistics_backward.default, arguments)
    assert set(result.values()) == {"SUCCESS"}


INDUCTOR = pytest.param("inductor", marks=pytest.mark.skipif(which("c++") is None, reason="needs a C++ compiler"))


@pytest.mark.filterwarnings("ignore:`torch.jit")  # inductor's own use of it, in torch 2.11
@pytest.mark.parametrize("backend", ["aot_eager", INDUCTOR])  # inductor asserts the strides that the fakes promise
@pytest.mark.compile
def test_compiles_without_graph_breaks(backend):
    sr, gt = (level.contiguous(memory_format=torch.channels_last) for level in levels(dtype=torch.float32))
    sr.requires_grad_()

    def value(sr: Tensor, gt: Tensor) -> Tensor:
        return sum(statistic.square().sum() for statistic in second_order_statistics(sr, gt))

    (expected,) = torch.autograd.grad(value(sr, gt), sr)
    torch._dynamo.reset()
    (found,) = torch.autograd.grad(torch.compile(value, fullgraph=True, backend=backend)(sr, gt), sr)
    torch.testing.assert_close(found, expected)


def test_only_the_inputs_are_kept_for_the_backward_pass():
    sr, gt = levels(2, 5, 16, 16, dtype=torch.float32)
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        second_order_statistics(sr.requires_grad_(), gt)
    known = {sr.untyped_storage().data_ptr(), gt.untyped_storage().data_ptr()}
    extra = [tensor for tensor in saved if tensor.untyped_storage().data_ptr() not in known]
    assert sum(tensor.numel() for tensor in extra) < 200


def test_the_terms_of_shared_statistics_are_the_terms():
    sr, gt = levels(2, 5, 8, 8)
    weights = torch.rand(2, 5, dtype=torch.double)
    shared = second_order_statistics(sr, gt, weights)
    for term in (terms.content, terms.style, terms.correlation):
        assert torch.equal(term(sr, gt, weights, statistics=shared), term(sr, gt, weights)), term.__name__


def test_style_of_statistics_without_gram_is_refused():
    sr, gt = levels()
    with pytest.raises(ValueError, match="style needs statistics with gram=True"):
        terms.style(sr, gt, statistics=second_order_statistics(sr, gt, gram=False))


def test_the_formula_is_the_operator():
    sr, gt = levels()
    for found, want in zip(
        torch.ops.mghf_loss.second_order_statistics(sr, gt, None, True, "high"),
        statistics_formula(sr, gt, None, True, "fast"),
        strict=True,
    ):
        assert torch.equal(found, want)


def test_an_empty_batch_has_empty_statistics():
    sr = torch.rand(0, 3, 4, 4, requires_grad=True)
    found = second_order_statistics(sr, sr.detach())
    assert [tuple(value.shape) for value in found] == [(0, 3, 3)] + [(0, 3)] * 6
    assert torch.autograd.grad(sum(value.sum() for value in found), sr)[0].shape == sr.shape


def test_a_second_derivative_is_refused():
    sr, gt = levels()
    sr.requires_grad_()
    (gradient,) = torch.autograd.grad(second_order_statistics(sr, gt).covariance.sum(), sr, create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        torch.autograd.grad(gradient.sum(), sr)


LEVEL = torch.rand(1, 3, 4, 4)
BAD = {
    "other shape": ((LEVEL, LEVEL[..., :3]), {}, ValueError, r"got \(1, 3, 4, 4\) and \(1, 3, 4, 3\)"),
    "two dimensions": ((LEVEL[0, 0], LEVEL[0, 0]), {}, ValueError, r"\(B, C, ...\), got \(4, 4\)"),
    "no place": (
        (LEVEL[..., :0], LEVEL[..., :0]),
        {},
        ValueError,
        r"one channel and location, got shape \(1, 3, 4, 0\)",
    ),
    "no channel": ((LEVEL[:, :0], LEVEL[:, :0]), {}, ValueError, r"one channel and location, got shape \(1, 0, 4, 4\)"),
    "device": ((LEVEL, LEVEL.to("meta")), {}, ValueError, "sr and gt must be on one device, got cpu and meta"),
    "device of weights": (
        (LEVEL, LEVEL, torch.ones(1, 3, device="meta")),
        {},
        ValueError,
        "sr and channel_weights must be on one device, got cpu and meta",
    ),
    "integers": ((LEVEL.long(), LEVEL), {}, TypeError, "got torch.int64 and torch.float32"),
    "weights": ((LEVEL, LEVEL, torch.ones(3)), {}, ValueError, r"shape \(1, 3\), got \(3,\)"),
    "precision": ((LEVEL, LEVEL), {"precision": "low"}, ValueError, "precision must be one of .* got 'low'"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments_are_named(case):
    arguments, options, error, message = BAD[case]
    with pytest.raises(error, match=message):
        second_order_statistics(*arguments, **options)
