"""The network's operators, by their torch formulas: against the modules, derivative, registration."""

from __future__ import annotations

import pytest
import torch

from conftest import perturbed_inn
from mghf_loss import MGHFLoss, coupling, inn
from mghf_loss.ops import couplings, linear


@pytest.fixture
def frozen():
    return perturbed_inn(levels=2).requires_grad_(False)


@pytest.fixture
def as_on_cuda(monkeypatch):
    """The choice that the network makes on CUDA, where its operators are kernels; here they run as formulas."""

    def take():
        calls = []
        for module in (coupling, linear):
            monkeypatch.setattr(module, "uses_operators", lambda x: calls.append(x.shape) or True)
        return calls

    return take


@pytest.mark.parametrize("conditioning", ["own", "gt"])
@pytest.mark.parametrize("size", [(16, 24), (9, 11)])
def test_the_loss_is_the_same_by_operators_by_functions_and_by_modules(size, conditioning, as_on_cuda, monkeypatch):
    criterion = MGHFLoss("paper", inn=perturbed_inn(), conditioning=conditioning, patches=20)
    gt = torch.rand(2, 3, *size)
    sr = (gt + 0.1 * torch.randn_like(gt)).requires_grad_()

    def run() -> tuple[torch.Tensor, torch.Tensor]:
        loss = criterion(sr, gt)
        return loss.detach(), torch.autograd.grad(loss, sr)[0]

    with monkeypatch.context() as patch:
        patch.setattr(inn, "frozen_coupling", lambda *_: None)
        patch.setattr(inn.Level, "_takes_linear_level", lambda *_: False)
        by_modules = run()
    by_functions = run()
    calls = as_on_cuda()
    by_operators = run()
    assert len(calls) > 6
    for loss, gradient in (by_functions, by_operators):
        torch.testing.assert_close(loss, by_modules[0])
        assert (gradient - by_modules[1]).norm() <= 1e-5 * by_modules[1].norm()


def test_operators_are_for_float32_on_cuda_and_channels_that_fit(frozen, as_on_cuda, monkeypatch):
    calls, low = [], torch.rand(1, 3, 4, 4)
    monkeypatch.setattr(coupling, "coupling", lambda *given: calls.append(given) or couplings.coupling(*given))

    def is_operator(pair, channels: int = 9, differentiated: bool = False) -> bool:
        before = len(calls)
        coupling.frozen_coupling(*pair, torch.randn(1, channels, 4, 4, requires_grad=differentiated), low)
        return len(calls) > before

    pair = frozen.levels[0]._pairs()[0]
    assert not is_operator(pair)
    as_on_cuda()
    assert is_operator(pair)
    assert is_operator(pair, differentiated=True)
    many = perturbed_inn(levels=1, hidden=33).requires_grad_(False).levels[0]._pairs()[0]
    assert is_operator(many)
    assert not is_operator(many, differentiated=True)  # its signs do not fit into 32 bits
    wide = perturbed_inn(levels=2, variant="packet").requires_grad_(False).levels[1]
    assert not is_operator(wide._pairs()[0], channels=45)


def test_a_trainable_network_takes_its_modules(as_on_cuda):
    network = perturbed_inn(levels=1)
    as_on_cuda()
    image = torch.rand(1, 3, 8, 8)
    sum(level.sum() for level in network.features(image)).backward()
    assert all(parameter.grad is not None for parameter in network.parameters() if parameter.requires_grad)


@pytest.mark.parametrize("size", [(4, 5), (2, 3), (1, 4), (1, 1)])
def test_the_gradient_of_a_coupling_is_that_of_its_modules(size, frozen):
    mixing, affine = frozen.double().levels[0]._pairs()[0]
    x = torch.randn(2, 9, *size, dtype=torch.double, requires_grad=True)
    low = torch.rand(2, 3, *size, dtype=torch.double, requires_grad=True)
    blocks = [list(block.parameters()) for block in (affine.phi, affine.rho_eta)]
    expected, log_scale = affine.transform(mixing.transform(x), low)
    upstream = torch.randn_like(expected)
    gradients = torch.autograd.grad((expected * upstream).sum(), (x, low))
    by_operator = couplings.coupling(x, low, mixing.matrix, *blocks, affine.clamp)
    for found, scale in (by_operator, coupling.frozen_coupling(mixing, affine, x, low)):
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(scale, log_scale.exp())
        assert not scale.requires_grad
        torch.testing.assert_close(torch.autograd.grad((found * upstream).sum(), (x, low)), gradients)


def linear_inputs(count: int, dtype: torch.dtype = torch.float32):
    matrices, scales = torch.randn(count, 9, 9, dtype=dtype), torch.rand(count, 2, 5, 3, 4, dtype=dtype) + 0.5
    return torch.randn(2, 3, 6, 8, dtype=dtype, requires_grad=True), list(matrices), list(scales)


@pytest.mark.parametrize("used", [slice(0, 1), slice(1, 2), slice(0, 2)], ids=["details", "low-pass", "both"])
@pytest.mark.parametrize("count", [0, 2])
@pytest.mark.parametrize("is_operator", [False, True])
def test_the_gradient_of_a_linear_level_is_its_transpose(is_operator, count, used, as_on_cuda):
    if is_operator:
        as_on_cuda()
    x, *given = linear_inputs(count, torch.double)
    assert torch.autograd.gradcheck(lambda x: linear.linear_level(x, *given)[used], x)


def test_a_linear_level_without_mixings_is_the_haar_step():
    image, trained = torch.rand(2, 3, 6, 8), perturbed_inn(levels=1)  # by FrEIA's module
    for found, expected in zip(linear.linear_level(image), trained.levels[0]._split(image), strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.compile
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # opcheck's own doing
def test_operators_are_registered_as_torch_wants_them(frozen):
    mixing, affine = frozen.levels[0]._pairs()[0]
    blocks = [list(block.parameters()) for block in (affine.phi, affine.rho_eta)]
    inputs = (torch.randn(2, 9, 5, 6), torch.rand(2, 3, 5, 6), mixing.matrix, *blocks, 2.0, "high")
    torch.library.opcheck(couplings.operator, inputs)
    torch.library.opcheck(couplings.kept_operator, (inputs[0].requires_grad_(), *inputs[1:]))
    torch.library.opcheck(linear.operator, linear_inputs(2))
    details, low = linear.linear_level(linear_inputs(0)[0])
    for given in (low.detach(), None):
        torch.library.opcheck(linear.transpose_operator, (details.detach(), given, *linear_inputs(2)[1:]))


@pytest.mark.compile
@pytest.mark.parametrize("conditioning", ["own", "gt"])
def test_the_loss_compiles_as_one_graph_with_operators(conditioning, as_on_cuda):
    criterion = MGHFLoss("paper", inn=perturbed_inn(levels=2), conditioning=conditioning, patches=20)
    gt = torch.rand(1, 3, 12, 16)
    sr = (gt + 0.1 * torch.randn_like(gt)).requires_grad_()
    expected = torch.autograd.grad(criterion(sr, gt), sr)[0]
    as_on_cuda()
    torch._dynamo.reset()
    found = torch.autograd.grad(torch.compile(criterion, fullgraph=True, backend="aot_eager")(sr, gt), sr)[0]
    assert (found - expected).norm() <= 1e-5 * expected.norm()
