"""The invertible network: wavelets, invertibility, determinant, sizes, configuration."""

from __future__ import annotations

import numpy as np
import pytest
import pywt
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from conftest import perturbed_inn
from mghf_loss import HighFrequencyINN, INNConfig
from mghf_loss.coupling import AffineCoupling, Bottleneck, ChannelMixing
from mghf_loss.ops import convolution

VARIANTS = ["pyramid", "packet"]
SIZES = [(8, 8), (16, 24), (37, 51), (9, 64), (101, 8)]


def haar_of(image: np.ndarray) -> dict[str, np.ndarray]:
    """PyWavelets' bands of one level, channels first."""
    low, (horizontal, vertical, diagonal) = pywt.dwt2(image, "haar", axes=(-2, -1))
    return {"low": low, "horizontal": horizontal, "vertical": vertical, "diagonal": diagonal}


def test_low_pass_is_the_haar_low_pass_of_pywavelets():
    network = perturbed_inn(levels=2).double()
    image = torch.rand(1, 3, 16, 24, dtype=torch.double)
    expected = haar_of(haar_of(image.numpy())["low"])["low"]
    np.testing.assert_allclose(network(image).low_pass.detach().numpy(), expected, atol=1e-12)


def test_details_of_the_haar_step_are_those_of_pywavelets():
    level = perturbed_inn(levels=1).double().levels[0]
    image = torch.rand(1, 3, 16, 24, dtype=torch.double)
    bands = level.haar((image,), jac=False)[0][0].unflatten(1, (3, 4)).numpy()
    expected = haar_of(image.numpy())
    # FrEIA: average, left minus right, top minus bottom, diagonal
    for index, name in enumerate(["low", "vertical", "horizontal", "diagonal"]):
        np.testing.assert_allclose(bands[:, :, index], expected[name], atol=1e-12, err_msg=name)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
def test_inverse_undoes_forward_at_any_size(variant, size, dtype, tolerance):
    network = perturbed_inn(variant=variant).to(dtype)
    image = torch.rand(2, 3, *size, dtype=dtype) * 2 - 1
    with torch.no_grad():
        restored = network.inverse(network(image))
    assert restored.shape == image.shape
    assert (restored - image).abs().max() <= tolerance


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("mixing", ["learned", "fixed"])
def test_log_determinant_is_that_of_autograds_jacobian(variant, mixing):
    network = perturbed_inn(variant=variant, levels=2, mixing=mixing).double()
    image = torch.rand(1, 3, 8, 8, dtype=torch.double) * 2 - 1

    def flat(pixels: torch.Tensor) -> torch.Tensor:
        latent = network(pixels.reshape(1, 3, 8, 8))
        details = latent.features if variant == "pyramid" else latent.features[-1:]
        return torch.cat([tensor.flatten() for tensor in (*details, latent.low_pass)])

    jacobian = torch.autograd.functional.jacobian(flat, image.flatten())
    assert jacobian.shape == (192, 192)  # as many features as pixel values: a bijection
    expected = torch.linalg.slogdet(jacobian).logabsdet
    assert network(image).log_det_jac.sum().item() == pytest.approx(expected.item(), abs=1e-9)


@pytest.mark.parametrize(
    "module", [ChannelMixing([(9, 4, 6)], gain=2.0), AffineCoupling([(9, 4, 6)], [(3, 4, 6)], hidden=5, clamp=2.0)]
)
def test_reverse_log_determinant_is_the_negative(module):
    module = module.double()
    for parameter in module.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    x, low = torch.randn(2, 9, 4, 6).double(), torch.randn(2, 3, 4, 6).double()
    (z,), forward = module((x,), c=[low])
    (back,), reverse = module((z,), c=[low], rev=True)
    torch.testing.assert_close(back, x, atol=1e-10, rtol=0)
    torch.testing.assert_close(forward, -reverse)
    assert (torch.as_tensor(forward) != 0).all()


@pytest.mark.parametrize(("variant", "channels"), [("pyramid", [9, 9, 9]), ("packet", [9, 45, 189])])
def test_feature_shapes(variant, channels):
    features = perturbed_inn(variant=variant).features(torch.rand(2, 3, 33, 40))
    assert [tuple(level.shape) for level in features] == [
        (2, c, h, w) for c, h, w in zip(channels, (20, 10, 5), (20, 10, 5), strict=True)
    ]


def test_features_are_those_of_forward_and_come_without_determinants(inn, monkeypatch):
    image = torch.rand(1, 3, 16, 16)
    expected = inn(image).features

    def refuse(*_):
        raise AssertionError("a determinant was computed")

    monkeypatch.setattr(torch.linalg, "slogdet", refuse)
    for got, want in zip(inn.features(image), expected, strict=True):
        assert torch.equal(got, want)
    assert inn(image, log_det_jac=False).log_det_jac is None


def test_couplings_start_as_the_identity_up_to_a_rotation():
    network = HighFrequencyINN(INNConfig(levels=1, couplings=3)).double()
    image = torch.rand(1, 3, 16, 16, dtype=torch.double)
    details = network(image).features[0]
    bands = haar_of(image.numpy())
    energy = sum((bands[name] ** 2).sum() for name in ("horizontal", "vertical", "diagonal"))
    assert details.square().sum().item() == pytest.approx(8.0**2 * energy, rel=1e-6)


def test_log_scale_is_clamped():
    coupling = AffineCoupling([(9, 4, 4)], [(3, 4, 4)], hidden=4, clamp=0.5)
    for parameter in coupling.parameters():
        torch.nn.init.normal_(parameter, std=100)
    _, log_det = coupling((torch.randn(1, 9, 4, 4),), c=[torch.randn(1, 3, 4, 4)])
    assert log_det.abs().item() <= 0.5 * 5 * 16


def test_autocast_does_not_touch_the_network(inn):
    image = torch.rand(1, 3, 32, 32) * 2 - 1
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        latent = inn(image)
        restored = inn.inverse(latent)
    assert {level.dtype for level in latent.features} == {torch.float32}
    assert (restored - image).abs().max() <= 1e-5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_network_inverts_roughly(dtype):
    network = perturbed_inn(levels=1).to(dtype)
    image = torch.rand(1, 3, 16, 16, dtype=dtype)
    assert (network.inverse(network(image)) - image).abs().max() < 0.1


def test_condition_is_required():
    coupling = AffineCoupling([(9, 4, 4)], [(3, 4, 4)], hidden=4, clamp=2.0)
    with pytest.raises(ValueError, match="low-pass band"):
        coupling((torch.randn(1, 9, 4, 4),))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("variant", "tower"),
        ("mixing", "none"),
        ("levels", 0),
        ("couplings", 1.5),
        ("hidden", -1),
        ("clamp", 0.0),
        ("noise_floor", -1.0),
    ],
)
def test_configuration_errors_name_field_and_value(field, value):
    with pytest.raises(ValueError, match=rf"{field} must.*{value!r}"):
        INNConfig(**{field: value})


def test_images_smaller_than_the_stride_are_refused(inn):
    with pytest.raises(ValueError, match=r"at least 8 x 8, got shape \(1, 3, 7, 16\)"):
        inn.features(torch.rand(1, 3, 7, 16))


@pytest.mark.parametrize("size", [(16, 24), (11, 13), (8, 9)])
def test_on_cuda_no_convolution_of_a_frozen_network_is_in_tf32_and_no_padding_adds_in_any_order(size, inn, monkeypatch):
    """As the dispatcher sees it, with the CPU taken for CUDA: each call says no tf32 itself, whatever is set."""
    monkeypatch.setattr(convolution, "uses_cudnn", lambda x: True)
    calls = []

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            calls.append((func, args))
            return func(*args, **(kwargs or {}))

    inn.requires_grad_(False)
    image = torch.rand(2, 3, *size, requires_grad=True)
    with Recorder():
        features = inn.features(image)
        torch.autograd.grad(sum(level.square().sum() for level in features), image)
        with torch.no_grad():
            inn.inverse(inn(image))
    convolutions = [(func, args) for func, args in calls if "conv" in func.name()]
    assert len(convolutions) > 50
    for func, args in convolutions:
        assert func is torch.ops.aten._convolution.default
        assert args[-1] is False, "allow_tf32"
    assert not [func for func, _ in calls if "reflection" in func.name() and "backward" in func.name()]


@pytest.mark.parametrize("size", [(5, 7), (2, 2), (1, 6), (1, 1)])
def test_a_frozen_bottleneck_has_the_gradient_of_one_with_trainable_parameters(size):
    block = Bottleneck(5, 6, 4).double()
    torch.nn.init.normal_(block[-1].weight)
    x = torch.randn(2, 5, *size, dtype=torch.double, requires_grad=True)
    gradients = []
    for trainable in (True, False):
        block.requires_grad_(trainable)
        gradients.append(torch.autograd.grad(block(x).square().sum(), x)[0])
    torch.testing.assert_close(*gradients)
