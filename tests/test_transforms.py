"""The losses and operators under forward-mode AD, `torch.func`, traces, compilation and autocast."""

from __future__ import annotations

import io

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import grad, jacrev, jvp, vmap

from conftest import perturbed_inn
from mghf_loss import MGHFLoss, MGHFnLoss
from mghf_loss.ops import patch_nce, second_order_statistics
from mghf_loss.ops.local import local_errors

# PyTorch's remarks that it loops over what an operator cannot batch, and that its own forward-mode AD is scripted.
pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop", "ignore:`torch.jit")
ALL = {"content": 1.0, "style": 300.0, "correlation": 1.0, "texture": 1.0, "grid": 1.0, "patch_nce": 0.01}
LOSSES = {
    "MGHFnLoss": lambda: MGHFnLoss(perturbed_inn(levels=2)),
    "MGHFLoss": lambda: MGHFLoss(coefficients=ALL, inn=perturbed_inn(levels=2), patches=16),
    "paper": lambda: MGHFLoss("paper", inn=perturbed_inn(levels=2), patches=16),
    "GT-conditioned": lambda: MGHFLoss(coefficients=ALL, inn=perturbed_inn(levels=2), conditioning="gt", patches=16),
    "mixed": lambda: MGHFLoss(coefficients=ALL, inn=perturbed_inn(levels=2), conditioning="mixed", patches=16),
    "average": lambda: MGHFnLoss(perturbed_inn(levels=2), shift="average"),
    "low memory": lambda: MGHFLoss("paper", inn=perturbed_inn(levels=2), patches=None, memory="low"),
}


def images(batch: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    """SR, GT, and a direction."""
    gt = torch.rand(batch, 3, 16, 16)
    return (gt + 0.1 * torch.randn_like(gt)), gt, torch.randn_like(gt)


def gradient(function, sr: Tensor) -> Tensor:
    sr = sr.clone().requires_grad_()
    return torch.autograd.grad(function(sr), sr)[0]


def skip_checkpoints(criterion) -> None:
    if criterion.memory == "low":
        pytest.skip("torch.utils.checkpoint knows no transforms, or not in every version, and says so")


@pytest.fixture(params=LOSSES)
def criterion(request):
    return LOSSES[request.param]()


def test_forward_mode_is_the_directional_derivative(criterion):
    skip_checkpoints(criterion)
    sr, gt, direction = images()
    expected = (gradient(lambda sr: criterion(sr, gt), sr) * direction).sum()
    with forward_ad.dual_level():
        value, tangent = forward_ad.unpack_dual(criterion(forward_ad.make_dual(sr, direction), gt))
    torch.testing.assert_close(tangent, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(value, criterion(sr, gt))
    torch.testing.assert_close(jvp(lambda sr: criterion(sr, gt), (sr,), (direction,))[1], tangent)


@pytest.mark.parametrize("level", [0, 1])
def test_jacobians_of_one_level_of_the_network_agree(level):
    """The others get no gradient."""
    network = perturbed_inn(levels=2).requires_grad_(False)
    sr, gt, _ = images(1)
    scales = network.conditioning(gt).scales
    for function in (
        lambda image: network.features(image)[level].sum((0, 2, 3)),
        lambda image: network.difference(image - gt, scales)[level].sum((0, 2, 3)),
    ):
        image = sr.clone().requires_grad_()
        rows = torch.stack([torch.autograd.grad(value, image, retain_graph=True)[0] for value in function(image)])
        torch.testing.assert_close(jacrev(function)(sr), rows)
        torch.testing.assert_close(torch.autograd.functional.jacobian(function, sr, vectorize=True), rows)


def test_func_grad_is_the_gradient(criterion):
    skip_checkpoints(criterion)
    sr, gt, _ = images()
    found = grad(lambda sr: criterion(sr, gt))(sr)
    torch.testing.assert_close(found, gradient(lambda sr: criterion(sr, gt), sr))


def test_vmap_is_a_loop(criterion):
    skip_checkpoints(criterion)
    sr, gt, _ = images(3)
    pairs = [(s[None], g[None]) for s, g in zip(sr, gt, strict=True)]

    def value(sr: Tensor, gt: Tensor) -> Tensor:
        return criterion(sr[None], gt[None])

    torch.testing.assert_close(vmap(value)(sr, gt), torch.stack([criterion(*pair) for pair in pairs]))
    expected = torch.cat([gradient(lambda s, g=g: criterion(s, g), s) for s, g in pairs])
    try:
        found = vmap(grad(value))(sr, gt)
    except RuntimeError as error:
        if "aten::view.dtype" in str(error):
            pytest.skip("this version of PyTorch cannot batch a change of dtype")
        raise
    torch.testing.assert_close(found, expected)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_a_trace_with_gradient_can_be_saved(criterion):
    skip_checkpoints(criterion)
    sr, gt, _ = images()
    file = io.BytesIO()
    torch.jit.save(torch.jit.trace(criterion, (sr.requires_grad_(), gt), check_trace=False), file)
    file.seek(0)
    loaded = torch.jit.load(file)
    sr, gt, _ = images()
    torch.testing.assert_close(
        gradient(lambda sr: loaded(sr, gt), sr), gradient(lambda sr: criterion(sr, gt), sr), rtol=1e-4, atol=1e-5
    )


OPERATORS = {
    "patch_nce": lambda sr, gt: patch_nce(sr, gt),
    "statistics": lambda sr, gt: second_order_statistics(sr, gt).covariance,
    "local_errors": lambda sr, gt: torch.cat([x.flatten(1) for x in local_errors(sr[..., None], gt[..., None])], 1),
}


@pytest.mark.parametrize("name", OPERATORS)
def test_operators_transform(name):
    sr, gt, direction = torch.randn(3, 2, 4, 9, dtype=torch.double).unbind(0)

    def value(sr: Tensor) -> Tensor:
        return OPERATORS[name](sr, gt).square().sum()

    expected = gradient(value, sr)
    torch.testing.assert_close(jacrev(value)(sr), expected)
    torch.testing.assert_close(jvp(value, (sr,), (direction,))[1], (expected * direction).sum())


def forward_over_reverse(value, sr: Tensor, direction: Tensor) -> Tensor:
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(sr.clone().requires_grad_(), direction)
        return forward_ad.unpack_dual(torch.autograd.grad(value(dual), dual)[0]).tangent


SECOND_DERIVATIVES = {
    "grad of grad": lambda value, sr, direction: grad(lambda sr: grad(value)(sr).sum())(sr),
    "jvp of grad": lambda value, sr, direction: jvp(grad(value), (sr,), (direction,)),
    "grad of jvp": lambda value, sr, direction: grad(lambda sr: jvp(value, (sr,), (direction,))[1])(sr),
    "forward over reverse": forward_over_reverse,
}


@pytest.mark.parametrize("order", SECOND_DERIVATIVES)
def test_second_derivatives_of_patch_nce_are_refused_not_left_out(order):
    sr, gt, direction = torch.randn(3, 2, 4, 9).unbind(0)
    with pytest.raises(NotImplementedError, match=r"second derivative|jvp"):
        SECOND_DERIVATIVES[order](lambda sr: patch_nce(sr, gt).sum() + sr.square().sum(), sr, direction)


def test_the_gradient_of_a_vmap_of_patch_nce_is_refused_by_name():
    sr, gt = torch.randn(2, 2, 4, 9).unbind(0)
    value = vmap(lambda sr, gt: patch_nce(sr[None], gt[None]).sum())
    with pytest.raises(NotImplementedError, match="use the vmap of the grad"):
        grad(lambda sr: value(sr, gt).sum())(sr)


@pytest.mark.compile
def test_a_compiled_loss_runs_with_and_without_gradient_and_in_inference_mode(criterion):
    sr, gt, _ = images()
    torch._dynamo.reset()
    compiled = torch.compile(criterion, backend="aot_eager", fullgraph=True)
    for mode in (torch.no_grad, torch.inference_mode, torch.enable_grad, torch.inference_mode):
        with mode():
            torch.testing.assert_close(compiled(sr, gt), criterion(sr, gt))
    expected = gradient(lambda sr: criterion(sr, gt), sr)
    torch.testing.assert_close(gradient(lambda sr: compiled(sr, gt), sr), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_backward_inside_autocast_is_that_outside(criterion, dtype):
    sr, gt, _ = images()
    outside = gradient(lambda sr: 1e-3 * criterion(sr, gt), sr)
    with torch.autocast("cpu", dtype):
        inside = gradient(lambda sr: 1e-3 * criterion(sr, gt), sr)
    assert torch.equal(inside, outside)
