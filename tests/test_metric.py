"""A loss as a metric: tiles that cover the image, values by hand, 0 for equal images."""

from __future__ import annotations

import pytest
import torch

from mghf_loss import DinoJSDLoss, MGHFLoss, MGHFnLoss
from mghf_loss.metric import distance, distances, heatmap, tile_slices

TERMS = ["content", "style", "correlation", "patch_nce"]


def by_hand(criterion: MGHFLoss, sr: torch.Tensor, gt: torch.Tensor) -> dict[str, torch.Tensor]:
    with torch.no_grad():
        values, zero = criterion.term_values(sr, gt), criterion.term_values(gt, gt)
    return {name: value - zero[name] for name, value in values.items()}


def test_one_tile_has_the_terms_of_the_loss_less_those_of_gt_itself(inn):
    criterion = MGHFLoss("paper", inn=inn)
    sr, gt = torch.rand(2, 2, 3, 40, 36)
    total, terms = distance(criterion, sr, gt)
    expected = by_hand(criterion, sr, gt)
    assert list(terms) == TERMS
    for name, value in expected.items():
        assert torch.equal(terms[name], value.mean())
    loss = criterion(sr, gt) - criterion.coefficients["patch_nce"] * criterion.term_values(gt, gt)["patch_nce"].mean()
    torch.testing.assert_close(total, loss.detach(), rtol=1e-5, atol=1e-6)
    # Content and style are the loss's own.
    own = criterion(sr, gt, return_terms=True)[1]
    assert torch.equal(terms["content"], own["content"])
    assert torch.equal(terms["style"], own["style"])


def test_tiles_are_weighted_by_their_areas(inn):
    criterion = MGHFLoss("paper", inn=inn, reduction="none")
    sr, gt = torch.rand(2, 2, 3, 16, 44)
    total, terms = distance(criterion, sr, gt, tile=32)
    left, right = (by_hand(criterion, sr[..., part], gt[..., part]) for part in (slice(0, 24), slice(24, 44)))
    for name in TERMS:
        expected = (24 * left[name] + 20 * right[name]) / 44
        torch.testing.assert_close(terms[name], expected, rtol=1e-5, atol=1e-7)
    expected = sum(criterion.coefficients[name] * value for name, value in terms.items())
    torch.testing.assert_close(total, expected, rtol=1e-6, atol=0)
    assert total.shape == (2,)


@pytest.mark.parametrize("name", ["MGHFLoss", "MGHFnLoss", "DinoJSDLoss"])
def test_equal_images_have_distance_0_and_others_more(name, inn, tiny_dino):
    build = {
        "MGHFLoss": lambda: MGHFLoss(inn=inn),
        "MGHFnLoss": lambda: MGHFnLoss(inn),
        "DinoJSDLoss": lambda: DinoJSDLoss(tiny_dino),
    }
    criterion = build[name]()
    gt = torch.rand(1, 3, 40, 40)
    total, terms = distance(criterion, gt, gt.clone(), tile=32)
    assert [value.item() for value in (total, *terms.values())] == [0.0] * (1 + len(terms))
    sr = (gt + 0.1 * torch.randn_like(gt)).requires_grad_()
    total, _ = distance(criterion, sr, gt, tile=32)
    assert total > 0
    assert not total.requires_grad


def test_several_images_share_one_gt_and_no_random_number_is_drawn(inn):
    criterion = MGHFLoss("paper", inn=inn, patches=16, cache_gt=True)
    first, second, gt = torch.rand(3, 1, 3, 32, 40)
    state, tiles = torch.get_rng_state(), []
    together = distances(criterion, [first, second], gt, tile=16, progress=lambda: tiles.append(1))
    assert torch.equal(torch.get_rng_state(), state)
    assert len(tiles) == len(tile_slices(32, 40, 16)) == 6
    for sr, (total, terms) in zip((first, second), together, strict=True):
        alone, alone_terms = distance(MGHFLoss("paper", inn=inn, patches=16), sr, gt, tile=16)
        assert torch.equal(total, alone)
        assert all(torch.equal(terms[name], value) for name, value in alone_terms.items())


@pytest.mark.parametrize("tile", [32, 48, 512])
@pytest.mark.parametrize("stride", [1, 16])
def test_tiles_cover_every_pixel_once_and_are_of_nearly_equal_size(tile, stride):
    unit = max(8, stride)
    for side in [*range(unit, 200), 1356, 2040]:
        parts = [columns for _, columns in tile_slices(8, side, tile, stride)]
        sizes = [part.stop - part.start for part in parts]
        assert [part.stop for part in parts[:-1]] == [part.start for part in parts[1:]]
        assert (parts[0].start, parts[-1].stop) == (0, side)
        assert all(part.start % unit == 0 for part in parts)
        assert unit <= min(sizes) <= max(sizes) <= tile
        assert max(sizes) - min(sizes) < 2 * unit
        assert len(parts) == -(-side // tile)  # as few as possible


@pytest.mark.parametrize(("tile", "message"), [(100, "a multiple of 8, got 100"), (8, "of at least 16, got 8")])
def test_sizes_of_tiles_are_checked(tile, message, inn):
    with pytest.raises(ValueError, match=f"tile must be .*{message}"):
        distance(MGHFLoss(inn=inn), *torch.rand(2, 1, 3, 32, 32), tile=tile)
    with pytest.raises(ValueError, match="tile must be a multiple of 16, got 40"):
        tile_slices(64, 64, 40, stride=16)


def test_heat_maps_of_one_tile_are_those_of_the_loss_and_of_several_shares(inn):
    criterion = MGHFLoss("paper", inn=inn, patches=None)
    sr, gt = torch.rand(2, 1, 3, 16, 32)
    for name, heat in heatmap(criterion, sr, gt).items():
        assert torch.equal(heat, criterion.heatmap(sr, gt)[name])
    tiled = heatmap(criterion, sr, gt, tile=16)
    right = criterion.heatmap(sr[..., 16:], gt[..., 16:])
    for name, heat in tiled.items():
        assert heat.shape == (1, 16, 32)
        torch.testing.assert_close(heat[..., 16:], right[name] / 2)
