"""PatchNCE: against explicit loops, the published formulation, and itself in blocks."""

from __future__ import annotations

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mghf_loss import terms
from mghf_loss.ops import nce as module
from mghf_loss.ops import patch_nce
from mghf_loss.ops.nce import patch_nce_formula, transport_potentials

MODULATIONS = ["plain", "hard", "easy"]


def loop_weights(s: list[list[float]], modulation: str, eps: float, negative_weight: float) -> list[list[float]]:
    """w_ij by plain Sinkhorn scaling of the kernel, 2000 iterations, nothing in the log domain."""
    n = len(s)
    if modulation == "plain":
        return [[negative_weight] * n for _ in range(n)]
    cost = {"hard": lambda x: x, "easy": lambda x: 1 - x}[modulation]
    kernel = [[0.0 if i == j else math.exp(cost(s[i][j]) / eps) for j in range(n)] for i in range(n)]
    u, v = [1.0] * n, [1.0] * n
    for _ in range(2000):
        u = [1 / sum(kernel[i][j] * v[j] for j in range(n)) for i in range(n)]
        v = [1 / sum(kernel[i][j] * u[i] for i in range(n)) for j in range(n)]
    return [[(n - 1) * negative_weight * u[i] * kernel[i][j] * v[j] for j in range(n)] for i in range(n)]


def loop_loss(sr: torch.Tensor, gt: torch.Tensor, modulation: str, t: float, eps: float, q: float) -> torch.Tensor:
    """Loss of every place of one image (C, N) by loops, differentiable in sr, weights constant."""
    n = sr.shape[1]
    query = [sr[:, i] / sr[:, i].norm() for i in range(n)]
    key = [gt[:, j] / gt[:, j].norm() for j in range(n)]
    s = [[torch.dot(query[i], key[j]) for j in range(n)] for i in range(n)]
    w = loop_weights([[x.item() for x in row] for row in s], modulation, eps, q)
    losses = []
    for i in range(n):
        positive = torch.exp(s[i][i] / t)
        negatives = sum(w[i][j] * torch.exp(s[i][j] / t) for j in range(n) if j != i)
        losses.append(-torch.log(positive / (positive + negatives)))
    return torch.stack(losses)


@pytest.mark.parametrize("modulation", MODULATIONS)
@pytest.mark.parametrize(("t", "eps", "q"), [(0.07, 1.0, 1.0), (0.5, 0.3, 2.0), (0.07, 0.1, 0.5), (0.2, 0.05, 1.0)])
def test_value_and_gradient_are_those_of_explicit_loops(modulation, t, eps, q):
    sr = torch.randn(2, 5, 9, dtype=torch.double, requires_grad=True)
    gt = sr.detach() + torch.randn(2, 5, 9, dtype=torch.double)
    options = {"temperature": t, "modulation": modulation, "eps": eps, "negative_weight": q}
    loss = patch_nce(sr, gt, **options, iterations=2000, tolerance=1e-13)
    upstream = torch.rand_like(loss)
    (gradient,) = torch.autograd.grad((loss * upstream).sum(), sr)

    expected = torch.stack([loop_loss(sr[b], gt[b], modulation, t, eps, q) for b in range(2)])
    (expected_gradient,) = torch.autograd.grad((expected * upstream).sum(), sr)
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-8, atol=1e-10)


def published_monce(query: torch.Tensor, key: torch.Tensor, modulation: str, t: float, eps: float) -> torch.Tensor:
    """MoNCE as its authors compute it: all logits, -10 on the diagonal of the cost, 50 iterations, +1e-8."""
    n = query.shape[1]
    s = query.T @ key
    cost = (s if modulation == "hard" else 1 - s).clone().fill_diagonal_(-10)
    kernel = torch.exp(cost / eps)
    u = v = torch.ones(n, dtype=s.dtype)
    for _ in range(50):
        u = 1 / (kernel @ v)
        v = 1 / (kernel.T @ u)
    weights = (n - 1) * u[:, None] * kernel * v[None] + 1e-8
    negatives = (s / t + weights.log()).fill_diagonal_(-10.0)
    logits = torch.cat([s.diagonal()[:, None] / t, negatives], 1)
    return logits.logsumexp(1) - logits[:, 0]


@pytest.mark.parametrize("modulation", ["hard", "easy"])
def test_agrees_with_the_published_formulation(modulation):
    features = torch.randn(6, 64, dtype=torch.double)
    query = torch.nn.functional.normalize(features, dim=0)
    key = torch.nn.functional.normalize(features + 0.7 * torch.randn_like(features), dim=0)
    ours = patch_nce(query[None], key[None], modulation=modulation, tolerance=1e-9)
    torch.testing.assert_close(ours[0], published_monce(query, key, modulation, 0.07, 1.0), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("eps", [1.0, 0.1, 0.03])  # the last one takes the path without a stored kernel
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("block", [2**24, 500])
def test_transport_plan_has_row_and_column_sums_of_one(eps, sign, block, monkeypatch):
    monkeypatch.setattr(module, "BLOCK", block)
    query, key = (torch.nn.functional.normalize(torch.randn(2, 4, 40).double(), dim=1) for _ in range(2))
    f, g = transport_potentials(query, key, sign / eps, iterations=5000, tolerance=1e-8)
    plan = torch.exp(f[:, :, None] + sign / eps * query.transpose(1, 2) @ key + g[:, None])
    plan.diagonal(0, 1, 2).zero_()
    assert (plan.sum(1) - 1).abs().max() <= 1e-6
    assert (plan.sum(2) - 1).abs().max() <= 1e-6


def test_sinkhorn_stops_early_and_no_later_than_asked(monkeypatch):
    calls = []
    product = module._log_product
    monkeypatch.setattr(module, "_log_product", lambda *a: calls.append(1) or product(*a))
    query, key = (torch.nn.functional.normalize(torch.randn(1, 8, 64), dim=1) for _ in range(2))
    transport_potentials(query, key, 1.0, iterations=50, tolerance=1e-4)
    assert 2 <= len(calls) < 40
    calls.clear()
    transport_potentials(query, key, 10.0, iterations=3, tolerance=0.0)
    assert len(calls) == 6


@pytest.mark.parametrize("modulation", MODULATIONS)
@pytest.mark.parametrize("places", [2, 3, 17, 100])
def test_blocks_change_nothing(modulation, places, monkeypatch):
    sr, gt = torch.randn(2, 2, 5, places, dtype=torch.double).unbind(0)
    sr.requires_grad_()

    def value_and_gradient() -> tuple[torch.Tensor, torch.Tensor]:
        loss = patch_nce(sr, gt, modulation=modulation, tolerance=1e-12)
        return loss, torch.autograd.grad(loss.sum(), sr)[0]

    whole = value_and_gradient()
    monkeypatch.setattr(module, "BLOCK", 2 * places * 7)
    for got, want in zip(value_and_gradient(), whole, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("modulation", MODULATIONS)
@pytest.mark.parametrize("block", [2**24, 150 * 150, 700])  # the kernel of one image is stored, just fits, does not
def test_the_value_of_an_image_does_not_depend_on_its_batch(modulation, block, monkeypatch):
    monkeypatch.setattr(module, "BLOCK", block)
    sr, gt = torch.randn(2, 3, 9, 150).unbind(0)
    sr[1] = gt[1] = torch.randn(9, 1) + 1e-3 * sr[1]  # converges at once, the others later
    sr[2] = gt[2] + 0.1 * sr[2]
    arguments = (0.07, modulation, 0.3, 1.0, 50, 1e-4, True, "fast")
    single = [patch_nce_formula(s, g, *arguments) for s, g in zip(sr.split(1), gt.split(1), strict=True)]
    for together, alone in zip(patch_nce_formula(sr, gt, *arguments), zip(*single, strict=True), strict=True):
        assert torch.equal(together, torch.cat(alone))


def test_every_image_stops_by_itself_and_has_a_stored_kernel(monkeypatch):
    monkeypatch.setattr(module, "BLOCK", 64 * 64)
    monkeypatch.setattr(module, "_log_row_sums", None)  # of kernels that are not stored
    calls = []
    product = module._log_product
    monkeypatch.setattr(module, "_log_product", lambda *a: calls.append(1) or product(*a))
    sr, gt = torch.randn(2, 3, 8, 64).unbind(0)
    sr[0] = gt[0] = 1.0
    counts = []
    for s, g in [*zip(sr.split(1), gt.split(1), strict=True), (sr, gt)]:
        calls.clear()
        patch_nce(s, g, eps=0.2)
        counts.append(len(calls))
    assert counts[0] < counts[1]
    assert counts[3] == sum(counts[:3])


class LargestTensor(TorchDispatchMode):
    """Records the most elements of any tensor that an operator returns."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.untyped_storage().nbytes() // tensor.itemsize)
        return out


def test_dense_holds_no_square_of_places(monkeypatch):
    monkeypatch.setattr(module, "BLOCK", 2**14)
    sr, gt = torch.randn(2, 1, 3, 2048).unbind(0)
    with LargestTensor() as largest:
        loss = module.patch_nce_formula(sr, gt, 0.07, "hard", 1.0, 1.0, 50, 1e-4, True, "fast")[0]
    assert loss.isfinite().all()
    assert largest.elements <= 2**14 < 2048**2


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # opcheck's own doing
@pytest.mark.parametrize("modulation", MODULATIONS)
@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.compile
def test_opcheck(modulation, channels_last):
    sr, gt = torch.randn(2, 2, 6, 4).transpose(2, 3).unbind(0)
    if not channels_last:
        sr, gt = sr.contiguous(), gt.contiguous()
    for with_jacobian in (True, False):
        sr = sr.detach().requires_grad_(with_jacobian)
        arguments = (sr, gt, 0.07, modulation, 1.0, 1.0, 50, 1e-4, with_jacobian, "fast")
        result = torch.library.opcheck(torch.ops.mghf_loss.patch_nce.default, arguments)
        assert set(result.values()) == {"SUCCESS"}


@pytest.mark.compile
def test_opcheck_of_the_backward_operator():
    arguments = (torch.randn(2, 6), torch.randn(2, 4, 6), torch.randn(2, 6))
    result = torch.library.opcheck(torch.ops.mghf_loss.patch_nce_backward.default, arguments)
    assert set(result.values()) == {"SUCCESS"}


def test_a_second_derivative_is_refused():
    sr = torch.randn(1, 3, 5, requires_grad=True)
    # The square would give a second derivative by itself: what PatchNCE has to add must not be left out silently.
    value = patch_nce(sr, torch.randn(1, 3, 5)).sum() + sr.square().sum()
    (gradient,) = torch.autograd.grad(value, sr, create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        torch.autograd.grad(gradient.sum(), sr)


def test_gradcheck_of_plain():
    # Modulated weights carry no gradient, so only the plain loss is its own derivative's integral.
    sr = torch.randn(1, 3, 5, dtype=torch.double, requires_grad=True)
    gt = torch.randn(1, 3, 5, dtype=torch.double)
    assert torch.autograd.gradcheck(lambda x: patch_nce(x, gt, modulation="plain", temperature=0.3), (sr,))


@pytest.mark.parametrize("modulation", MODULATIONS)
def test_edge_cases_are_finite(modulation):
    def check(sr: torch.Tensor, gt: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        sr = sr.clone().requires_grad_()
        loss = patch_nce(sr, gt, modulation=modulation)
        (gradient,) = torch.autograd.grad(loss.sum(), sr)
        assert loss.isfinite().all()
        assert gradient.isfinite().all()
        return loss, gradient

    one = torch.randn(2, 4, 1)
    loss, gradient = check(one, one)
    assert (loss == 0).all()
    assert (gradient == 0).all()

    same = torch.ones(1, 4, 10)  # every place alike: the positive is one of ten
    loss, gradient = check(same, same)
    torch.testing.assert_close(loss, torch.full((1, 10), math.log(10.0)))
    assert gradient.abs().max() < 1e-5

    zero = torch.zeros(1, 4, 10)
    _, gradient = check(zero, torch.randn(1, 4, 10))
    assert (gradient == 0).all()

    for scale in (1e-10, 1e-20, 1e-38):
        check(torch.randn(1, 4, 10) * scale, torch.randn(1, 4, 10))

    huge = torch.randn(1, 4, 10) * 1e30
    torch.testing.assert_close(check(huge, huge)[0], check(huge / 1e30, huge)[0])


def test_gradient_is_orthogonal_to_the_vectors():
    sr = torch.randn(1, 6, 20, requires_grad=True)
    patch_nce(sr, torch.randn(1, 6, 20)).sum().backward()
    assert (sr.grad * sr).sum(1).abs().max() < 1e-5  # the length of a vector does not matter


def test_no_gradient_reaches_gt():
    sr, gt = torch.randn(1, 4, 9, requires_grad=True), torch.randn(1, 4, 9, requires_grad=True)
    patch_nce(sr, gt).sum().backward()
    assert gt.grad is None
    assert sr.grad.abs().sum() > 0


def test_term_samples_the_same_places_for_the_same_seed():
    sr, gt = torch.randn(2, 2, 9, 12, 12).unbind(0)

    def sampled(seed: int) -> torch.Tensor:
        return terms.patch_nce(sr, gt, locations=terms.random_locations(torch.tensor([seed, 7]), 144, 32))

    assert torch.equal(sampled(1), sampled(1))
    assert not torch.equal(sampled(1), sampled(2))


def test_term_takes_every_place_when_there_are_no_more():
    sr, gt = torch.randn(2, 2, 9, 6, 6).unbind(0)
    dense = terms.patch_nce(sr, gt)
    assert terms.random_locations(torch.tensor([1, 2]), 36, 36) is None
    assert terms.random_locations(torch.tensor([1, 2]), 36, None) is None
    torch.testing.assert_close(terms.patch_nce(sr, gt, locations=torch.arange(36).expand(2, -1)), dense)
    expected = patch_nce(sr.flatten(2), gt.flatten(2)).mean()
    torch.testing.assert_close(dense, expected)


def test_sampled_mean_approaches_dense_of_the_sampled_places():
    sr, gt = torch.randn(2, 1, 9, 10, 10).unbind(0)
    locations = terms.random_locations(torch.tensor([3]), 100, 20)
    expected = patch_nce(sr.flatten(2)[..., locations[0]], gt.flatten(2)[..., locations[0]]).mean()
    torch.testing.assert_close(terms.patch_nce(sr, gt, locations=locations), expected)


def test_channel_weights_prune_channels():
    sr, gt = torch.randn(2, 1, 4, 5, 5).unbind(0)
    weights = torch.tensor([[2.0, 1.0, 0.0, 1.0]])
    changed = sr.clone()
    changed[:, 2] += 100
    assert torch.equal(terms.patch_nce(sr, gt, weights), terms.patch_nce(changed, gt, weights))


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("modulation", "medium"),
        ("temperature", 0.0),
        ("eps", -1.0),
        ("negative_weight", 0.0),
    ],
)
def test_bad_options_are_named(option, value):
    level = torch.randn(1, 4, 5, 5)
    with pytest.raises(ValueError, match=rf"{option} must.*{value!r}"):
        terms.patch_nce(level, level, **{option: value})


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_operator_computes_half_precision_in_float32_whatever_autocast_says(dtype):
    sr, gt = torch.randn(2, 2, 5, 12).to(dtype).unbind(0)
    expected = patch_nce(sr.float(), gt.float())
    sr.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = patch_nce(sr, gt)
        (gradient,) = torch.autograd.grad(found.sum(), sr)
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)
    assert gradient.dtype == dtype


@pytest.mark.compile
def test_operator_compiles_without_graph_breaks_and_takes_any_strides():
    sr, gt = torch.randn(2, 2, 12, 5).transpose(2, 3).unbind(0)
    sr.requires_grad_()
    (expected,) = torch.autograd.grad(patch_nce(sr.contiguous(), gt.contiguous()).sum(), sr)
    torch._dynamo.reset()
    compiled = torch.compile(lambda sr, gt: patch_nce(sr, gt).sum(), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(torch.autograd.grad(compiled(sr, gt), sr)[0], expected)


def test_precision_is_checked_and_changes_nothing_in_the_formula():
    sr, gt = torch.randn(2, 2, 5, 12).unbind(0)
    assert torch.equal(patch_nce(sr, gt, precision="high"), patch_nce(sr, gt, precision="fast"))
    for call in (patch_nce, terms.patch_nce):
        levels = (sr, gt) if call is patch_nce else (sr[..., None], gt[..., None])
        with pytest.raises(ValueError, match=r"precision must be one of .* got 'low'"):
            call(*levels, precision="low")


@pytest.mark.parametrize("modulation", MODULATIONS)
def test_an_empty_batch_has_an_empty_loss(modulation):
    sr = torch.rand(0, 3, 8, requires_grad=True)
    loss = patch_nce(sr, sr.detach(), modulation=modulation)
    assert loss.shape == (0, 8)
    assert torch.autograd.grad(loss.sum(), sr)[0].shape == sr.shape


VECTORS = torch.randn(1, 3, 8)
BAD_VECTORS = {
    "four dimensions": ((VECTORS[None], VECTORS[None]), {}, ValueError, r"\(B, C, N\), got \(1, 1, 3, 8\)"),
    "other shape": ((VECTORS, VECTORS[..., 1:]), {}, ValueError, r"got \(1, 3, 8\) and \(1, 3, 7\)"),
    "integers": ((VECTORS, VECTORS.int()), {}, TypeError, "got torch.float32 and torch.int32"),
    "modulation": ((VECTORS, VECTORS), {"modulation": "medium"}, ValueError, "modulation must be .* got 'medium'"),
    "no channel": ((VECTORS[:, :0], VECTORS[:, :0]), {}, ValueError, r"one channel, got shape \(1, 0, 8\)"),
    "device": ((VECTORS, VECTORS.to("meta")), {}, ValueError, "one device, got cpu and meta"),
    "temperature": ((VECTORS, VECTORS), {"temperature": 0.0}, ValueError, "temperature must .*above 0.*, got 0.0"),
    "infinite": ((VECTORS, VECTORS), {"temperature": math.inf}, ValueError, "temperature must be a finite .* got inf"),
    "NaN": ((VECTORS, VECTORS), {"eps": math.nan}, ValueError, "eps must .*, got nan"),
    "boolean": ((VECTORS, VECTORS), {"temperature": True}, ValueError, "temperature must .* number .*, got True"),
    "text": ((VECTORS, VECTORS), {"eps": "5e-2"}, ValueError, "eps must .* got '5e-2'; YAML"),
    "eps": ((VECTORS, VECTORS), {"eps": -1.0}, ValueError, "eps must .*above 0.*, got -1.0"),
    "weight": ((VECTORS, VECTORS), {"negative_weight": 0.0}, ValueError, "negative_weight must .*, got 0.0"),
    "iterations": ((VECTORS, VECTORS), {"iterations": -1}, ValueError, "iterations must .*integer.*, got -1"),
    "fraction": ((VECTORS, VECTORS), {"iterations": 2.5}, ValueError, "iterations must .*integer.*, got 2.5"),
    "tolerance": ((VECTORS, VECTORS), {"tolerance": -0.1}, ValueError, "tolerance must .*at least 0.*, got -0.1"),
}


@pytest.mark.parametrize("case", BAD_VECTORS)
def test_bad_arguments_of_the_operator_are_named(case):
    arguments, options, error, message = BAD_VECTORS[case]
    with pytest.raises(error, match=message):
        patch_nce(*arguments, **options)
