"""The pair of features: less memory for the same gradient, and GT's features kept across calls."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref

import pytest
import torch
from torch import nn

from conftest import perturbed_inn
from mghf_loss import MGHFLoss, MGHFnLoss
from mghf_loss.features import PairFeatures

BOTH = pytest.mark.parametrize("loss", [MGHFnLoss, MGHFLoss])


def pair(size: int = 48) -> tuple[torch.Tensor, torch.Tensor]:
    gt = torch.rand(2, 3, size, size)
    return (gt + 0.1 * torch.randn_like(gt)).requires_grad_(), gt


def value(criterion: nn.Module, sr: torch.Tensor, gt: torch.Tensor) -> torch.Tensor:
    """With the same random places in every call."""
    if isinstance(criterion, MGHFLoss):
        return criterion(sr, gt, generator=torch.Generator().manual_seed(0))
    return criterion(sr, gt)


def saved_bytes(criterion: nn.Module, sr: torch.Tensor, gt: torch.Tensor) -> int:
    """Of the distinct storages that autograd keeps, without the network's parameters."""
    parameters = {p.untyped_storage().data_ptr() for p in criterion.inn.network.parameters()}
    kept = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        value(criterion, sr, gt)
    sizes = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept}
    return sum(size for address, size in sizes.items() if address not in parameters)


@BOTH
@pytest.mark.parametrize("variant", ["pyramid", "packet"])
def test_low_memory_gives_the_same_gradient_for_a_third_of_what_is_saved(loss, variant):
    network = perturbed_inn(variant=variant, hidden=32)
    normal, low = loss(inn=copy.deepcopy(network)), loss(inn=network, memory="low")
    sr, gt = pair(64)
    values = [value(criterion, sr, gt) for criterion in (normal, low)]
    gradients = [torch.autograd.grad(each, sr)[0] for each in values]
    assert torch.equal(*values)
    torch.testing.assert_close(*gradients, rtol=1e-6, atol=1e-6 * gradients[0].abs().max().item())
    assert saved_bytes(low, sr, gt) < saved_bytes(normal, sr, gt) / 3


def test_low_memory_survives_two_backward_passes_autocast_and_reductions():
    sr, gt = pair()
    network = perturbed_inn()
    normal, low = (MGHFLoss(inn=copy.deepcopy(network), memory=memory) for memory in ("normal", "low"))
    maps = [
        criterion.heatmap(sr, gt, generator=torch.Generator().manual_seed(0)) for criterion in (normal, low)
    ]  # a gradient of every term through one graph
    for name in maps[0]:
        torch.testing.assert_close(maps[0][name], maps[1][name], rtol=1e-5, atol=1e-8)
    low.reduction = "none"
    with torch.autocast("cpu", torch.bfloat16):
        losses = value(low, sr, gt)
    assert losses.shape == (2,)
    losses[0].backward()
    assert sr.grad is not None
    assert sr.grad[0].abs().sum() > 0
    assert sr.grad[1].abs().sum() == 0
    with torch.no_grad():
        torch.testing.assert_close(value(low, sr, gt), losses.detach())


def test_low_memory_compiles_as_a_whole():
    torch.compiler.reset()
    sr, gt = pair()
    criterion = MGHFnLoss(inn=perturbed_inn(), memory="low", cache_gt=True)
    expected = torch.autograd.grad(criterion(sr, gt), sr)[0]
    compiled = torch.compile(criterion, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(torch.autograd.grad(compiled(sr, gt), sr)[0], expected)


def counted(monkeypatch, criterion: nn.Module) -> list[torch.Tensor]:
    """The images that the network sees from now on."""
    seen: list[torch.Tensor] = []
    features = criterion.inn.network.features

    def record(image: torch.Tensor, **options):
        seen.append(image)
        return features(image, **options)

    monkeypatch.setattr(criterion.inn.network, "features", record)
    return seen


@BOTH
def test_a_ground_truth_that_comes_again_is_not_computed_again(loss, monkeypatch):
    criterion = loss(inn=perturbed_inn(), cache_gt=True)
    seen = counted(monkeypatch, criterion)
    sr, gt = pair()
    first, again = value(criterion, sr, gt), value(criterion, sr, gt)
    assert len(seen) == 3
    assert torch.equal(first, again)
    other = gt.clone()
    value(criterion, sr, other)  # equal, and another tensor
    assert len(seen) == 5
    value(criterion, sr, gt)  # only the last one is kept
    assert len(seen) == 7


def test_without_the_option_nothing_is_kept(monkeypatch):
    criterion = MGHFnLoss(inn=perturbed_inn())
    seen = counted(monkeypatch, criterion)
    sr, gt = pair()
    criterion(sr, gt), criterion(sr, gt)
    assert len(seen) == 4
    assert criterion.inn._known is None


def test_a_ground_truth_changed_in_place_is_computed_again():
    criterion, plain = (MGHFnLoss(inn=perturbed_inn(), cache_gt=cache) for cache in (True, False))
    plain.inn = copy.deepcopy(criterion.inn)
    plain.inn.cache_gt = False
    sr, gt = pair()
    criterion(sr, gt)
    gt.mul_(0.5)
    assert torch.equal(criterion(sr, gt), plain(sr, gt))
    gt[0, 0, 0, 0] = 1  # through a view
    assert torch.equal(criterion(sr, gt), plain(sr, gt))


def test_a_converted_loss_computes_again():
    criterion = MGHFnLoss(inn=perturbed_inn(), cache_gt=True)
    sr, gt = pair()
    single = criterion(sr, gt)
    double = criterion.double()(sr, gt)
    assert double.dtype == torch.float64
    assert double != single.double()


def test_the_cache_keeps_no_ground_truth_alive():
    criterion = MGHFnLoss(inn=perturbed_inn(), cache_gt=True)
    sr, gt = pair()
    criterion(sr, gt)
    (_, features), reference = criterion.inn._known[gt], weakref.ref(gt)
    kept = weakref.ref(features[0])
    del gt, features
    gc.collect()
    assert reference() is None
    assert kept() is None


def test_a_copy_and_a_pickle_have_seen_nothing():
    criterion = MGHFnLoss(inn=perturbed_inn(), cache_gt=True)
    sr, gt = pair()
    expected = criterion(sr, gt)
    for other in (copy.deepcopy(criterion), pickle.loads(pickle.dumps(criterion))):
        assert other.inn._known is None
        assert torch.equal(other(sr, gt), expected)


def test_tensors_of_inference_mode_are_never_kept():
    criterion = MGHFnLoss(inn=perturbed_inn(), cache_gt=True)
    with torch.inference_mode():
        gt = torch.rand(1, 3, 16, 16)
        assert criterion(gt, gt) == 0
    assert criterion.inn._known is None


def test_a_wrong_option_is_named():
    with pytest.raises(ValueError, match=r"memory must be one of \('normal', 'low'\), got 'less'"):
        MGHFLoss(memory="less")
    with pytest.raises(TypeError, match="inn must be a checkpoint's name or path"):
        PairFeatures(3)
