"""What a loss leaves alone, and what leaves a loss alone: random numbers, coefficients, ranges, moves of its parent."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

from conftest import perturbed_inn
from mghf_loss import DinoJSDLoss, MGHFLoss, MGHFnLoss, terms
from mghf_loss.frozen import Frozen
from mghf_loss.mghf import OFF

NCE_ALONE = OFF | {"patch_nce": 1.0}


def pair(size: int = 32) -> tuple[Tensor, Tensor]:
    gt = torch.rand(2, 3, size, size)
    return (0.9 * gt + 0.1 * torch.rand_like(gt)), gt


@pytest.fixture(params=["MGHFnLoss", "MGHFLoss", "DinoJSDLoss"])
def build(request, inn, tiny_dino) -> Callable[..., nn.Module]:
    return {
        "MGHFnLoss": lambda **options: MGHFnLoss(inn, **options),
        "MGHFLoss": lambda **options: MGHFLoss(inn=inn, patches=16, **options),
        "DinoJSDLoss": lambda **options: DinoJSDLoss(tiny_dino, **options),
    }[request.param]


@pytest.mark.parametrize("training", [True, False])
def test_one_pair_has_one_value_and_no_random_number_is_drawn(training, build):
    criterion, (sr, gt) = build().train(training), pair()
    state = torch.get_rng_state()
    assert torch.equal(criterion(sr, gt), criterion(sr, gt))
    criterion.heatmap(sr, gt)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("loss", [MGHFnLoss, MGHFLoss])
def test_construction_draws_no_random_number(loss):
    state = torch.get_rng_state()
    loss()
    assert torch.equal(torch.get_rng_state(), state)


def test_an_image_has_the_value_that_it_has_alone(inn):
    criterion, (sr, gt) = MGHFLoss(inn=inn, patches=16, reduction="none"), pair()
    alone = torch.cat([criterion(s[None], g[None]) for s, g in zip(sr, gt, strict=True)])
    torch.testing.assert_close(criterion(sr, gt), alone)


def test_the_seed_of_a_generator_chooses_the_locations_and_drawing_does_not_matter(inn):
    criterion, (sr, gt) = MGHFLoss(coefficients=NCE_ALONE, inn=inn, shift="none", patches=16), pair()
    first, second = (torch.Generator().manual_seed(seed) for seed in (1, 2))
    value = criterion(sr, gt, generator=first)
    torch.rand(3, generator=first)
    assert torch.equal(criterion(sr, gt, generator=first), value)
    assert not torch.equal(criterion(sr, gt, generator=second), value)


def test_locations_are_distinct_uniform_and_other_for_other_images(inn):
    seeds = torch.arange(2000)
    locations = terms.random_locations(seeds, 64, 16)
    assert locations is not None
    assert locations.shape == (2000, 16)
    assert all(len(set(row.tolist())) == 16 for row in locations[:50])
    counts = locations.flatten().bincount(minlength=64)
    assert (counts - 500).abs().max() < 5 * 500**0.5  # 16 of 64, 2000 times
    assert len({tuple(sorted(row.tolist())) for row in locations}) == 2000
    assert terms.random_locations(seeds, 64, 64) is None
    assert terms.random_locations(seeds, 64, None) is None


@pytest.mark.parametrize("with_generator", [True, False])
def test_gradient_checkpointing_recomputes_the_same_loss(with_generator, inn):
    criterion, (sr, gt) = MGHFLoss(coefficients=NCE_ALONE, inn=inn, patches=16), pair()

    def gradient(recompute: bool) -> Tensor:
        generator = torch.Generator().manual_seed(0) if with_generator else None
        image = sr.clone().requires_grad_()

        def loss(sr: Tensor, gt: Tensor) -> Tensor:
            return criterion(sr, gt, generator=generator)

        value = checkpoint(loss, image, gt, use_reentrant=False) if recompute else loss(image, gt)
        assert isinstance(value, Tensor)
        value.backward()
        assert image.grad is not None
        return image.grad

    assert torch.equal(gradient(True), gradient(False))


def test_a_seeded_training_is_bit_equal_with_a_loss_that_is_built_and_logged_beside_it():
    def train(with_logging: bool) -> list[Tensor]:
        torch.manual_seed(0)
        logged = MGHFLoss() if with_logging else None
        model, criterion = nn.Conv2d(3, 3, 3, padding=1), MGHFLoss()
        optimiser = torch.optim.Adam(model.parameters(), lr=1e-3)
        for _ in range(2):
            for batch in DataLoader(torch.rand(4, 3, 24, 24), batch_size=2, shuffle=True):
                loss = F.l1_loss(model(batch), batch) + 0.05 * criterion(model(batch), batch)
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
                if logged is not None:
                    logged(model(batch), batch, return_terms=True)
        return [parameter.detach().clone() for parameter in model.parameters()]

    assert all(torch.equal(a, b) for a, b in zip(train(True), train(False), strict=True))


def test_coefficients_are_changed_by_a_checked_call_alone(inn):
    criterion, (sr, gt) = MGHFLoss("paper", inn=inn), pair()
    before = criterion(sr, gt)
    with pytest.raises(TypeError):
        criterion.coefficients["style"] = 2.0  # type: ignore[index]
    with pytest.raises(AttributeError, match="set_coefficients"):
        criterion.coefficients = {"style": 2.0}
    for changes, message in (
        ({"stlye": 1.0}, "unknown term stlye; known are content, style"),
        ({"style": -1.0}, r"coefficients\['style'\] must be a finite number of at least 0, got -1.0"),
        ({"style": float("nan")}, "got nan"),
        ({"style": True}, "got True"),
        (dict.fromkeys(criterion.coefficients, 0), "all coefficients are 0"),
        ({"dino_jsd": 1.0}, "the network of dino_jsd is not loaded"),
    ):
        with pytest.raises(ValueError, match=message):
            criterion.set_coefficients(**changes)
    assert torch.equal(criterion(sr, gt), before)
    criterion.set_coefficients(style=0, patch_nce=0)
    loss, values = criterion(sr, gt, return_terms=True)
    assert set(values) == {"content", "correlation"}
    torch.testing.assert_close(loss, 5 * values["content"] + values["correlation"])
    criterion.set_coefficients(style=600, patch_nce=0.008)
    assert torch.equal(criterion(sr, gt), before)


@pytest.mark.parametrize(("scale", "offset"), [(255, 0), (2, -1)])
def test_images_of_another_range_are_warned_of_once(scale, offset, build):
    criterion, (sr, gt) = build(), pair()
    with pytest.warns(UserWarning, match=r"input_range is \(0, 1\)"):
        criterion(sr * scale + offset, gt * scale + offset)
    criterion(sr * scale + offset, gt * scale + offset)
    right = build(input_range=(offset, scale + offset))
    right(sr * scale + offset, gt * scale + offset)
    build()(sr, gt)


@pytest.mark.parametrize("input_range", [(0, 255), (-1, 1), (0, 0.5)])
def test_images_in_unit_range_are_warned_of_where_another_is_expected(input_range, build):
    with pytest.warns(UserWarning, match=rf"input_range is \({input_range[0]}, {input_range[1]}\)"):
        build(input_range=input_range)(*pair())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": True}, "temperature must be a finite number above 0, got True"),
        ({"temperature": float("inf")}, "temperature must be .* got inf"),
        ({"temperature": float("nan")}, "temperature must be .* got nan"),
        ({"preset": "sharp-ish"}, "preset must be one of 'balanced', .*, 'paper', got 'sharp-ish'"),
    ],
)
def test_numbers_that_are_none_are_refused(options, message, inn):
    with pytest.raises(ValueError, match=message):
        MGHFLoss(**{"inn": inn, **options})


def test_numpy_integers_are_integers(inn):
    assert MGHFLoss(inn=inn, patches=np.int64(64)).patches == 64  # type: ignore[arg-type]


def test_a_mapping_in_the_first_place_is_told_where_it_belongs():
    with pytest.raises(TypeError, match=r"MGHFLoss\(coefficients={'style': 0}\)"):
        MGHFLoss({"style": 0})  # type: ignore[arg-type]


def test_options_are_keywords(inn):
    with pytest.raises(TypeError, match="positional"):
        MGHFnLoss(inn, (0, 1))  # type: ignore[misc]


def test_sparse_and_nested_images_are_refused_by_name(build):
    _, gt = pair()
    with pytest.raises(TypeError, match=r"sr must be a dense tensor, got torch.sparse_coo"):
        build()(gt.to_sparse(), gt)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        nested = torch.nested.nested_tensor([gt[0], gt[1]])
    with pytest.raises(TypeError, match="gt must be a dense tensor, got a nested tensor"):
        build()(gt, nested)


def test_channel_weights_of_another_shape_are_refused():
    sr, gt = torch.rand(2, 2, 9, 8, 8).unbind(0)
    for term in (terms.content, terms.style, terms.correlation, terms.texture, terms.grid, terms.patch_nce):
        for weights in (torch.ones(9), torch.ones(1, 9), torch.ones(2, 1)):
            with pytest.raises(ValueError, match=r"channel_weights must have shape \(B, C\) = \(2, 9\)"):
                term(sr, gt, weights)


def test_images_on_another_device_are_told_how_to_move_the_loss(build):
    sr = gt = torch.rand(1, 3, 32, 32, device="meta")
    with pytest.raises(ValueError, match=r"images are on meta, the loss is on cpu: .*criterion.to\('meta'\)"):
        build()(sr, gt)


def test_cached_features_are_not_those_of_a_replaced_network(inn):
    criterion, (sr, gt) = MGHFnLoss(inn, cache_gt=True), pair()
    criterion(sr, gt)
    other = perturbed_inn(levels=2)
    criterion.inn.network = other
    torch.testing.assert_close(criterion(sr, gt), MGHFnLoss(other)(sr, gt))
    assert not list(criterion.parameters())
    assert not criterion.state_dict()
    assert not criterion.train().inn.network.training


class Parent(nn.Module):
    def __init__(self, criterion: nn.Module) -> None:
        super().__init__()
        self.model, self.criterion = nn.Conv2d(3, 3, 1), criterion


MOVES: dict[str, Callable[[Parent], nn.Module]] = {
    "half and back": lambda parent: parent.half().float(),
    "bfloat16": lambda parent: parent.to(torch.bfloat16),
    "emptied": lambda parent: parent.to_empty(device="cpu"),
    "over meta": lambda parent: parent.to("meta").to_empty(device="cpu"),
    "deep copy": copy.deepcopy,
    "pickle": lambda parent: pickle.loads(pickle.dumps(parent)),
    "shared": lambda parent: parent.share_memory(),
    "saved whole": lambda parent: torch.load(_saved(parent), weights_only=False),
}


def _saved(module: nn.Module) -> io.BytesIO:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return file


@pytest.mark.parametrize("move", MOVES)
def test_whatever_happens_to_its_parent_the_value_stays(move, build):
    criterion, (sr, gt) = build(), pair()
    expected = criterion(sr, gt)
    moved = MOVES[move](Parent(criterion))
    assert isinstance(moved, Parent)
    assert torch.equal(moved.criterion(sr, gt), expected)


def test_double_precision_is_followed(build):
    sr, gt = pair()
    expected, double = build()(sr, gt), build().double()(sr.double(), gt.double())
    assert double.dtype == torch.float64
    torch.testing.assert_close(double.float(), expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_the_default_dtype_is_not_the_networks(dtype):
    expected = MGHFLoss()(*(images := pair()))
    torch.set_default_dtype(dtype)
    try:
        criterion = MGHFLoss()
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(criterion(*images), expected)


def test_a_loss_built_in_inference_mode_or_on_the_meta_device_trains():
    sr, gt = pair()
    expected = MGHFLoss()(sr, gt)
    with torch.inference_mode():
        first = MGHFLoss()
    with torch.device("meta"):
        second = MGHFLoss()
    for criterion in (first, second):
        image = sr.clone().requires_grad_()
        loss = criterion(image, gt)
        loss.backward()
        assert torch.equal(loss.detach(), expected)


def test_data_parallel_is_refused_by_name(build):
    (frozen,) = (module for module in build().modules() if isinstance(module, Frozen))
    with pytest.raises(RuntimeError, match="DataParallel does not copy the frozen network"):
        frozen._replicate_for_data_parallel()  # what nn.DataParallel calls


def test_options_of_public_terms_are_checked():
    sr, gt = torch.rand(2, 2, 9, 8, 8).unbind(0)
    with pytest.raises(ValueError, match=r"locations must have shape \(B, N\) with B = 2, got \(1, 10\)"):
        terms.patch_nce(sr, gt, locations=torch.arange(10)[None])
    with pytest.raises(ValueError, match="eps must be a finite number of at least 0, got -1"):
        terms.correlation(sr, gt, eps=-1)
    with pytest.raises(ValueError, match="prune must be a number of at least 0 and below 1, got 2"):
        terms.entropy_channel_weights(gt, prune=2)


@pytest.mark.parametrize(
    "options", [{"temperature": 10**400}, {"coefficients": {"style": 10**400}}, {"input_range": (0, 10**400)}]
)
def test_integers_beyond_all_floats_are_refused_by_name(options, inn):
    with pytest.raises(ValueError, match=r"(temperature|style|input_range).* must be"):
        MGHFLoss(inn=inn, **options)


def test_a_wrong_range_is_warned_of_once_with_the_dino_term_too(inn, tiny_dino):
    criterion, (sr, gt) = MGHFLoss(coefficients={"dino_jsd": 1.0}, inn=inn, dino=tiny_dino), pair()
    with pytest.warns(UserWarning, match="input_range") as caught:
        criterion(255 * sr, 255 * gt)
    assert len(caught) == 1
