"""The checkpoint in the wheel: golden values, invertibility on photographs, whitened features."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from mghf_loss import HighFrequencyINN, MGHFLoss, MGHFnLoss, checkpoints
from mghf_loss.mghf import PRESETS
from mghf_loss.toy import downscale, photograph, upscale
from mghf_loss.training.objective import add_noise, bits_per_detail

GOLDEN = {
    "MGHFnLoss": 0.194817,
    "MGHFLoss": 2.58413,
    "content": 0.363538,
    "style": 0.000227239,
    "correlation": 0.56588,
    "patch_nce": 8.02701,
}


@pytest.fixture(scope="module")
def network() -> HighFrequencyINN:
    return HighFrequencyINN.from_pretrained()


def bicubic_pair() -> tuple[torch.Tensor, torch.Tensor]:
    gt = photograph("astronaut")[..., 96:224, 160:288]
    return upscale(downscale(gt)), gt


def test_golden_values():
    """Of this checkpoint and the released loss; a new checkpoint changes them, nothing else may."""
    sr, gt = bicubic_pair()
    assert MGHFnLoss(conditioning="own", shift="none")(sr, gt).item() == pytest.approx(GOLDEN["MGHFnLoss"], rel=1e-4)
    generator = torch.Generator().manual_seed(0)
    loss, terms = MGHFLoss("paper")(sr, gt, return_terms=True, generator=generator)
    for name, value in {"MGHFLoss": loss, **terms}.items():
        assert value.item() == pytest.approx(GOLDEN[name], rel=1e-3), name


@pytest.mark.parametrize(("name", "size"), [("coffee", (400, 600)), ("chelsea", (299, 451)), ("astronaut", (511, 333))])
def test_photographs_come_back(name, size, network):
    image = photograph(name)[..., : size[0], : size[1]] * 2 - 1
    with torch.no_grad():
        assert (network.inverse(network(image)) - image).abs().max() <= 1e-5
        double = HighFrequencyINN.from_pretrained().double()
        assert (double.inverse(double(image.double())) - image).abs().max() <= 1e-10


def test_features_of_noisy_photographs_are_about_standard_normal(network):
    image = add_noise(photograph("coffee") * 2 - 1, network.config.noise_floor, torch.Generator().manual_seed(0))
    with torch.no_grad():
        latent = network(image)
    for level in latent.features:
        assert level.mean().abs() < 0.1
        assert 0.85 < level.std() < 1.25
    # Noise of 12 grey levels alone has 5.63 bits; photographs cannot have fewer, and PNG needs about 6.6.
    fine = bits_per_detail(latent, network.config.variant)[0, 0]
    assert 5.63 < fine < 6.1


@pytest.mark.parametrize("name", ["black", "white", "checkerboard", "noise"])
def test_features_of_extreme_images_are_finite(name, network):
    ones = torch.ones(1, 3, 64, 64)
    checkerboard = ones.clone()
    checkerboard[..., ::2, ::2] = checkerboard[..., 1::2, 1::2] = -1
    image = {"black": -ones, "white": ones, "checkerboard": checkerboard, "noise": 2 * torch.rand_like(ones) - 1}[name]
    for level in network.features(image):
        assert level.isfinite().all()
        assert level.abs().max() < 100


def test_frozen_and_trainable_networks_have_the_same_gradient(network):
    frozen = HighFrequencyINN.from_pretrained().requires_grad_(False)
    image = photograph("coffee")[..., :45, :70].requires_grad_()

    def gradient(inn: HighFrequencyINN) -> torch.Tensor:
        loss = sum(level.square().mean() + level.sin().sum() for level in inn.features(image * 2 - 1))
        return torch.autograd.grad(loss, image)[0]

    expected = gradient(network)
    torch.testing.assert_close(gradient(frozen), expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())


def test_a_frozen_network_keeps_less_for_the_backward_pass(network):
    frozen = HighFrequencyINN.from_pretrained().requires_grad_(False)
    image = torch.rand(1, 3, 64, 64, requires_grad=True)

    def saved_bytes(inn: HighFrequencyINN) -> int:
        sizes = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            features = inn.features(image)
        assert features[0].requires_grad
        return sum(sizes.values())

    assert saved_bytes(frozen) < 0.6 * saved_bytes(network)


def test_the_coarse_image_is_not_compared(network):
    """As documented: with equal details and another low-pass band the loss is 0, the images differ."""
    gt = photograph("astronaut")[..., 96:224, 160:288]
    with torch.no_grad():
        latent = network(gt * 2 - 1)
        sr = (network.inverse(latent._replace(low_pass=latent.low_pass - 1)) + 1) / 2
    assert (sr - gt).abs().mean() > 0.02
    assert MGHFnLoss(conditioning="own", shift="none")(sr, gt) < 1e-8


@pytest.mark.parametrize("preset", PRESETS)
def test_more_blur_and_more_noise_cost_more(preset):
    criterion = MGHFLoss(preset, patches=64)
    gt = photograph("astronaut")[..., 96:224, 160:288]

    def cost(sr: torch.Tensor) -> float:
        return criterion(sr, gt, generator=torch.Generator().manual_seed(0)).item()

    blurred = [F.interpolate(F.avg_pool2d(gt, k), scale_factor=k, mode="bilinear") for k in (2, 4, 8)]
    noisy = [
        gt + sigma / 255 * torch.randn(gt.shape, generator=torch.Generator().manual_seed(1)) for sigma in (4, 12, 36)
    ]
    for series in (blurred, noisy):
        costs = [cost(gt), *map(cost, series)]
        assert costs == sorted(costs)


def test_the_network_of_a_release_never_changes():
    checkpoint = checkpoints.load("bundled-0.1")
    assert checkpoint.sha256 == "8f2bc6f4bc7b4b24ac29bbc2f4010d12f5d06eadaea0121c71294656a9367991"
    assert checkpoint.sha256 == checkpoints.load("bundled").sha256  # until a release bundles another one
    assert MGHFLoss(inn="bundled-0.1").inn.network.config == HighFrequencyINN.from_pretrained().config


def test_hash_and_config_are_those_of_the_files():
    checkpoint = checkpoints.load("bundled")
    assert len(checkpoint.sha256) == 64
    assert checkpoint.config["noise_floor"] == 12.0
    assert (checkpoints.BUNDLED / checkpoints.MODEL_FILE).stat().st_size < 4 * 2**20
