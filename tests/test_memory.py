"""memory="low": the same gradient, less kept for the backward pass, wherever the losses run."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from conftest import perturbed_inn, saved_bytes
from mghf_loss import DinoJSDLoss, MGHFLoss, MGHFnLoss

LOSSES = ["MGHFnLoss", "MGHFLoss", "mixed", "DinoJSDLoss"]


@pytest.fixture
def twins(inn, tiny_dino):
    """The loss of a name without and with memory="low", on one network each."""

    def build(name: str, **options) -> list[nn.Module]:
        if name == "MGHFnLoss":
            return [MGHFnLoss(inn, conditioning="own", memory=memory, **options) for memory in ("normal", "low")]
        if name == "DinoJSDLoss":  # timm's setting is the network's
            return [DinoJSDLoss(copy.deepcopy(tiny_dino), memory=memory, **options) for memory in ("normal", "low")]
        preset = "sharp" if name == "mixed" else "paper"
        return [MGHFLoss(preset, inn=inn, patches=64, memory=memory, **options) for memory in ("normal", "low")]

    return build


def pair(*shape: int) -> tuple[Tensor, Tensor]:
    gt = torch.rand(shape or (2, 3, 37, 40))
    return (gt + 0.2 * torch.randn_like(gt)).requires_grad_(), gt


def gradient(criterion, sr: Tensor, gt: Tensor) -> Tensor:
    loss = criterion(sr, gt)
    return torch.autograd.grad(loss, sr, torch.arange(1.0, 1 + loss.numel()).reshape(loss.shape))[0]


def assert_same(got: Tensor, expected: Tensor) -> None:
    assert expected.abs().max() > 0
    assert (got - expected).norm() <= 1e-6 * expected.norm()


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("name", LOSSES)
def test_the_gradient_is_the_same(name, reduction, twins):
    normal, low = twins(name, reduction=reduction)
    sr, gt = pair()
    assert_same(gradient(low, sr, gt), gradient(normal, sr, gt))


@pytest.mark.parametrize("variant", ["pyramid", "packet"])
def test_the_gradient_is_the_same_through_any_network(variant):
    network = perturbed_inn(variant=variant, couplings=3, levels=2)
    sr, gt = pair(1, 3, 17, 24)
    normal, low = (MGHFnLoss(network, conditioning="own", memory=memory) for memory in ("normal", "low"))
    assert_same(gradient(low, sr, gt), gradient(normal, sr, gt))


@pytest.mark.parametrize("name", LOSSES)
def test_the_gradient_is_the_same_under_autocast(name, twins):
    normal, low = twins(name)
    sr, gt = pair()
    with torch.autocast("cpu", torch.bfloat16):
        expected, got = gradient(normal, sr, gt), gradient(low, sr, gt)
    assert_same(got, expected)


@pytest.mark.parametrize(
    ("loss", "share"), [(partial(MGHFnLoss, conditioning="own"), 0.32), (partial(MGHFLoss, "paper"), 0.40)]
)
def test_a_fraction_is_kept(loss, share):
    """What enters each coupling; a low-pass band that were kept as a view of all bands would be 5 % more."""
    sr, gt = pair(1, 3, 64, 64)
    assert saved_bytes(loss(memory="low"), sr, gt) <= share * saved_bytes(loss(), sr, gt)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("log_det_jac", [False, True])
def test_a_frozen_network_keeps_signs_and_not_its_hidden_maps(inn, log_det_jac, batch):
    """Of 32 channels: as floats, the four maps of a coupling would be 512 bytes a location."""
    network = inn.requires_grad_(False)
    image, kept = torch.rand(batch, 3, 32, 32, requires_grad=True), {}
    known = {parameter.untyped_storage().data_ptr() for parameter in network.parameters()}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        network(image, log_det_jac=log_det_jac)
    locations = batch * network.config.couplings * sum(4**-level * 32**2 for level in range(1, 1 + len(network.levels)))
    found = sum(size for address, size in kept.items() if address not in known)
    assert found < (450 if log_det_jac else 250) * locations


def test_dino_keeps_no_insides_of_its_blocks(twins):
    normal, low = twins("DinoJSDLoss")
    sr, gt = pair(1, 3, 56, 56)
    assert saved_bytes(low, sr, gt) < 0.6 * saved_bytes(normal, sr, gt)
    criterion = MGHFLoss(coefficients={"dino_jsd": 1.0}, dino=low.network.network.vit, memory="low")
    assert criterion.dino is not None
    assert saved_bytes(criterion.dino, sr, gt) == saved_bytes(low, sr, gt)


def test_nothing_is_kept_without_gradient(twins):
    _, low = twins("MGHFLoss")
    sr, gt = pair()
    with torch.no_grad():
        assert saved_bytes(low, sr, gt) == 0


def test_heatmaps_are_the_same(twins):
    """They go back through one graph several times."""
    maps, images = [], pair(1, 3, 24, 24)
    for criterion in twins("MGHFLoss"):
        maps.append(criterion.heatmap(*images))
    for name, expected in maps[0].items():
        torch.testing.assert_close(maps[1][name], expected, rtol=1e-5, atol=1e-9)


@pytest.mark.compile
@pytest.mark.parametrize("name", LOSSES)
def test_compiled_as_one_graph_it_gives_the_same_gradient(name, twins):
    normal, low = twins(name)
    sr, gt = pair()
    torch._dynamo.reset()
    compiled = torch.compile(low, fullgraph=True, backend="aot_eager")
    got, expected = gradient(compiled, sr, gt), gradient(normal, sr, gt)
    assert (got - expected).norm() <= 1e-5 * expected.norm()


@pytest.mark.parametrize("name", ["MGHFnLoss", "MGHFLoss", "DinoJSDLoss"])
def test_other_words_are_refused(name, twins):
    with pytest.raises(ValueError, match="memory must be one of 'normal', 'low', got 'lowest'"):
        {"MGHFnLoss": MGHFnLoss, "MGHFLoss": MGHFLoss, "DinoJSDLoss": DinoJSDLoss}[name](
            *([twins("DinoJSDLoss")[0].network.network] if name == "DinoJSDLoss" else []), memory="lowest"
        )


def test_log_determinants_are_not_recomputed(inn):
    with pytest.raises(ValueError, match="recompute=True needs log_det_jac=False"):
        inn(torch.rand(1, 3, 8, 8), recompute=True)
