"""cache_gt=True: when the features of the last GT are used again, and when not."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor, nn

from mghf_loss import DinoJSDLoss, HighFrequencyINN, MGHFLoss, MGHFnLoss
from mghf_loss._gt_cache import GTCache

LOSSES = ["MGHFnLoss", "MGHFLoss", "DinoJSDLoss"]


@pytest.fixture
def build(inn, tiny_dino):
    def build(name: str, cache_gt: bool = True, **options) -> nn.Module:
        if name == "MGHFnLoss":
            return MGHFnLoss(inn, cache_gt=cache_gt, **{"conditioning": "own", **options})
        if name == "DinoJSDLoss":
            return DinoJSDLoss(tiny_dino, cache_gt=cache_gt)
        # With own conditioning, SR and GT pass through one method of the network.
        options = {"coefficients": {"dino_jsd": 1.0}, "conditioning": "own", **options}
        return MGHFLoss(inn=inn, dino=tiny_dino, cache_gt=cache_gt, **options)

    return build


@pytest.fixture
def seen(monkeypatch) -> list[int]:
    """Addresses of the images that a network computes features of, in order."""
    images: list[int] = []
    for owner, method in ((HighFrequencyINN, "features"), (DinoJSDLoss, "embed")):
        original = getattr(owner, method)

        def counting(self, image: Tensor, *args, original=original, **kwargs):
            images.append(image.data_ptr())
            return original(self, image, *args, **kwargs)

        monkeypatch.setattr(owner, method, counting)
    return images


def passes(criterion: nn.Module, sr: Tensor, gt: Tensor, seen: list[int]) -> int:
    """Network passes of a call, whose value must be that of a loss without cache."""
    before = len(seen)
    value = criterion(sr, gt)
    count = len(seen) - before
    plain = copy.deepcopy(criterion)  # a copy's cache is empty
    assert torch.equal(value, plain(sr, gt))
    return count


def pair() -> tuple[Tensor, Tensor]:
    return torch.rand(2, 3, 24, 24), torch.rand(2, 3, 24, 24)


@pytest.mark.parametrize("name", LOSSES)
def test_the_second_call_with_a_gt_computes_features_of_sr_alone(name, build, seen):
    criterion = build(name)
    sr, gt = pair()
    networks = 2 if name == "MGHFLoss" else 1
    assert passes(criterion, sr, gt, seen) == 2 * networks
    assert passes(criterion, sr, gt, seen) == networks
    assert passes(criterion, torch.rand_like(sr), gt, seen) == networks


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_are_those_without_a_cache(name, build):
    sr, gt = pair()
    sr.requires_grad_()
    cached, plain = build(name), build(name, cache_gt=False)
    cached(sr, gt)
    (got,), (expected,) = (torch.autograd.grad(criterion(sr, gt), sr) for criterion in (cached, plain))
    assert torch.equal(got, expected)


def test_without_the_option_nothing_is_kept(build, seen):
    criterion = build("MGHFnLoss", cache_gt=False)
    pair_ = pair()
    assert [passes(criterion, *pair_, seen) for _ in range(2)] == [2, 2]


CHANGES = {
    "multiplied": lambda gt: gt.mul_(0.5),
    "one entry": lambda gt: gt.__setitem__((0, 0, 0, 0), 9.0),
    "through a view": lambda gt: gt[1].zero_(),
    "through detach": lambda gt: gt.detach().copy_(torch.rand_like(gt)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_an_in_place_change_is_seen(change, build, seen):
    criterion = build("MGHFnLoss")
    sr, gt = pair()
    assert passes(criterion, sr, gt, seen) == 2
    CHANGES[change](gt)
    assert passes(criterion, sr, gt, seen) == 2
    assert passes(criterion, sr, gt, seen) == 1


def test_only_the_last_gt_is_kept_and_equal_values_are_not_enough(build, seen):
    criterion = build("MGHFnLoss")
    sr, gt = pair()
    other = gt.clone()
    assert [passes(criterion, sr, image, seen) for image in (gt, other, other, gt)] == [2, 2, 1, 2]


def test_moving_the_loss_computes_anew(build, seen):
    criterion = build("MGHFnLoss")
    sr, gt = pair()
    criterion(sr, gt)
    criterion.double()
    assert passes(criterion, sr, gt, seen) == 2
    assert criterion(sr, gt).dtype == torch.float64


def test_changed_settings_compute_anew(build, seen):
    criterion = build("MGHFLoss", weighting="entropy")
    sr, gt = pair()
    criterion(sr, gt)
    criterion.prune = 0.5
    assert passes(criterion, sr, gt, seen) == 3  # the INN's of both images, DINO's of SR
    for criterion in (build("MGHFnLoss"), build("DinoJSDLoss")):
        criterion(sr, gt)
        criterion.input_range = (0.0, 2.0)
        assert passes(criterion, sr, gt, seen) == 2


@pytest.mark.parametrize("name", LOSSES)
def test_a_replaced_network_computes_anew(name, build, seen):
    criterion = build(name)
    sr, gt = pair()
    criterion(sr, gt)
    frozen = criterion.inn if name != "DinoJSDLoss" else criterion.network
    other = copy.deepcopy(frozen.network)
    with torch.no_grad():
        next(other.parameters()).mul_(2)
    frozen.network = other
    assert passes(criterion, sr, gt, seen) == (3 if name == "MGHFLoss" else 2)  # DINO's of GT is kept


def test_autocast_is_a_setting(build, seen):
    """DINO computes in the dtype of autocast."""
    criterion = build("DinoJSDLoss")
    sr, gt = pair()
    criterion(sr, gt)
    with torch.autocast("cpu", torch.bfloat16):
        assert passes(criterion, sr, gt, seen) == 2
        assert passes(criterion, sr, gt, seen) == 1
    with torch.autocast("cpu", torch.float16):
        assert passes(criterion, sr, gt, seen) == 2


def test_another_image_put_into_the_tensor_is_seen_by_its_shape_and_type(build, seen):
    criterion = build("MGHFnLoss")
    sr, gt = pair()
    criterion(sr, gt)
    gt.data = gt.double()
    assert passes(criterion, sr, gt, seen) == 2
    gt.data = gt[..., :16].float()
    assert passes(criterion, sr[..., :16], gt, seen) == 2


def test_what_is_kept_has_no_graph(build):
    criterion = build("MGHFLoss", conditioning="gt")
    sr, gt = (image.requires_grad_() for image in pair())
    criterion(sr, gt)
    ((_, (pyramid,)),) = criterion.gt_pyramids._last.values()
    assert pyramid.scales
    assert not any(scale.requires_grad for level in pyramid.scales for scale in level)
    assert not any(level.features.requires_grad for level in pyramid.levels)


def test_threads_leave_one_value(build):
    criterion = build("MGHFnLoss")
    pairs = [pair() for _ in range(8)]
    with ThreadPoolExecutor(4) as pool:
        values = list(pool.map(lambda images: criterion(*images), 4 * pairs))
    assert len(criterion.gt_pyramids._last) == 1
    for value, images in zip(values, 4 * pairs, strict=True):
        assert torch.equal(value, criterion(*images))


@pytest.mark.parametrize("name", LOSSES)
def test_value_dies_with_the_gt_and_the_gt_dies(name, build):
    criterion = build(name)
    sr, gt = pair()
    criterion(sr, gt)
    cache = next(c for c in vars(criterion).values() if isinstance(c, GTCache))
    ((_, value),) = cache._last.values()
    feature = value
    while not isinstance(feature, Tensor):
        feature = feature[0]
    tensors = weakref.ref(gt), weakref.ref(feature)
    gc.disable()  # by counting references alone, as fast as a training step needs it
    try:
        del gt, value, feature
        assert [tensor() for tensor in tensors] == [None, None]
    finally:
        gc.enable()
    assert len(cache._last) == 0


def test_inference_mode_leaves_nothing_for_a_training_step(build, seen):
    criterion = build("MGHFnLoss")
    sr, gt = pair()
    with torch.inference_mode():
        criterion(sr, gt)
        inner = torch.rand_like(gt)
        criterion(sr, inner)
    assert passes(criterion, sr.requires_grad_(), gt, seen) == 2
    torch.autograd.grad(criterion(sr, gt), sr)
    assert [passes(criterion, sr.detach(), inner, seen) for _ in range(2)] == [2, 2]  # counts no versions


@pytest.mark.compile
def test_compiled_it_computes_in_every_call(build):
    criterion = build("MGHFnLoss")
    sr, gt = pair()
    torch._dynamo.reset()
    compiled = torch.compile(criterion, fullgraph=True, backend="aot_eager")
    first = compiled(sr, gt)
    torch.testing.assert_close(first, criterion(sr, gt))
    gt.data.mul_(0.5)  # which a cache could not see
    assert not torch.allclose(compiled(sr, gt), first)


def test_copies_and_pickles_are_empty(build):
    criterion = build("MGHFLoss")
    sr, gt = pair()
    value = criterion(sr, gt)
    for twin in (copy.deepcopy(criterion), pickle.loads(pickle.dumps(criterion))):
        assert twin.gt_pyramids.enabled
        assert len(twin.gt_pyramids._last) == 0
        assert torch.equal(twin(sr, gt), value)


def test_something_else_than_a_truth_value_is_refused(inn):
    with pytest.raises(TypeError, match="cache_gt must be True or False, got 1"):
        MGHFnLoss(inn, cache_gt=1)
