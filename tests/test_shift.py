"""The shift of the Haar grid, common to SR and GT: a permutation that follows from GT and the generator's seed."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from conftest import perturbed_inn
from mghf_loss import MGHFLoss, MGHFnLoss, _random
from mghf_loss.toy import downscale, photograph, upscale

ALL = {"content": 1.0, "style": 300.0, "correlation": 1.0, "texture": 1.0, "grid": 1.0, "patch_nce": 0.01}
SHIFTS = ["random", "average"]


def pair(*shape: int) -> tuple[Tensor, Tensor]:
    gt = torch.rand(shape or (2, 3, 24, 32))
    return (gt + 0.1 * torch.randn_like(gt)).clamp(0, 1), gt


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def offsets(monkeypatch) -> list[list[list[int]]]:
    """The offsets of every shifted batch, in order."""
    seen, shifted = [], _random.shifted

    def recording(image: Tensor, shift: _random.Shift) -> Tensor:
        seen.append(torch.stack((shift.rows[:, 0], shift.columns[:, 0]), 1).tolist())
        return shifted(image, shift)

    monkeypatch.setattr(_random, "shifted", recording)
    return seen


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("size", [(8, 16), (7, 10)])
def test_a_shift_is_a_permutation_and_the_gradient_of_a_pixel_arrives_at_that_pixel(size, layout):
    image = torch.randn(4, 3, *size).contiguous(memory_format=layout).requires_grad_()
    steps = [(0, 0), (1, 0), (3, 7), (6, 9)]
    shifted = _random.shifted(image, _random.shift_of(torch.tensor(steps), *size))
    for before, after, (up, left) in zip(image, shifted, steps, strict=True):
        assert torch.equal(after, before.roll((-up, -left), (1, 2)))
    cotangent = torch.randn_like(image)
    (gradient,) = torch.autograd.grad(shifted, image, cotangent)
    for before, after, (up, left) in zip(gradient, cotangent, steps, strict=True):
        assert torch.equal(before, after.roll((up, left), (1, 2)))


def test_random_shifts_of_many_images_are_uniform(inn):
    """Also where the seeds are consecutive numbers."""
    criterion, count = MGHFnLoss(inn), 6400
    assert inn.stride == 8
    for seeds in (torch.arange(count), _random.seed(255 * torch.rand(count, 3, 8, 8), None)):
        (offsets,) = criterion._offsets(seeds, 8)
        assert offsets is not None
        counts = torch.tensor(list(Counter(map(tuple, offsets.tolist())).values()))
        assert len(counts) == 64
        assert (counts - 100).abs().max() < 5 * 100**0.5


def test_a_random_shift_follows_from_gt_and_the_seed_of_the_generator(offsets, inn):
    criterion, (sr, gt) = MGHFnLoss(inn), pair(16, 3, 8, 8)

    def shift(sr: Tensor, gt: Tensor, generator: torch.Generator | None = None) -> list[list[int]]:
        offsets.clear()
        criterion(sr, gt, generator=generator)
        assert len(offsets) == 2
        assert offsets[0] == offsets[1]  # common to SR and GT
        return offsets[0]

    expected = shift(sr, gt)
    assert len(set(map(tuple, expected))) > 8  # of 16 images
    assert shift(torch.rand_like(sr), gt) == expected
    assert shift(sr[:1], gt[:1]) == expected[:1]
    assert shift(sr, gt.flip(0)) == expected[::-1]
    assert shift(sr, sr) != expected
    generator = seeded(1)
    of_generator = shift(sr, gt, generator)
    torch.rand(5, generator=generator)
    assert shift(sr, gt, generator) == shift(sr, gt, seeded(1)) == of_generator
    assert shift(sr, gt, seeded(2)) != of_generator != expected


def test_no_shift_leaves_the_images_alone(offsets, inn):
    MGHFnLoss(inn, shift="none")(*pair())
    assert offsets == []


@pytest.mark.parametrize("levels", [1, 2, 3, 4])
def test_the_average_meets_every_phase_equally_often_at_every_level(levels):
    criterion = MGHFnLoss(perturbed_inn(levels=levels, hidden=4))
    criterion.shift = "average"
    offsets = criterion._offsets(torch.tensor([7]), 2**levels)
    net = [offset[0].tolist() for offset in offsets if offset is not None]
    assert len(net) == 2**levels
    for rows in range(levels + 1):
        for columns in range(levels + 1 - rows):  # of the rows at one level and the columns at another, too
            phases = Counter((top % 2**rows, left % 2**columns) for top, left in net)
            assert len(phases) == 2 ** (rows + columns)
            assert len(set(phases.values())) == 1


@pytest.mark.parametrize("shift", SHIFTS)
def test_a_shifted_loss_is_that_of_rolled_images(shift, offsets, inn):
    """Each image by its own offset; the average is the mean over the net."""
    criterion, (sr, gt) = MGHFnLoss(inn, shift=shift, reduction="none"), pair(3, 3, 21, 32)
    found, plain = criterion(sr, gt), MGHFnLoss(inn, shift="none")
    of_sr = offsets[len(offsets) // 2 :]
    for index, value in enumerate(found):
        steps = [shifts[index] for shifts in of_sr]
        assert len(steps) == {"random": 1, "average": 8}[shift]
        rolled = [[image[index : index + 1].roll((-up, -left), (2, 3)) for image in (sr, gt)] for up, left in steps]
        torch.testing.assert_close(value, torch.stack([plain(*images) for images in rolled]).mean())


@pytest.mark.parametrize("shift", SHIFTS)
def test_the_value_of_an_image_repeats_and_is_its_own_whatever_else_is_in_the_batch(shift, inn):
    options = {"coefficients": ALL, "inn": inn, "shift": shift, "patches": 16, "reduction": "none"}
    criterion, (sr, gt) = MGHFLoss(**options), pair(3, 3, 19, 24)
    values = criterion(sr, gt)
    assert torch.equal(criterion(sr, gt), values)
    alone = torch.cat([criterion(sr[i : i + 1], gt[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(values, alone)
    torch.testing.assert_close(criterion(sr.flip(0), gt.flip(0)), values.flip(0))


@pytest.mark.parametrize("shift", SHIFTS)
@pytest.mark.parametrize("conditioning", ["own", "gt", "mixed"])
def test_a_cached_gt_gives_the_values_without_a_cache(conditioning, shift, inn):
    options = {"coefficients": ALL, "inn": inn, "conditioning": conditioning, "shift": shift, "patches": 16}
    cached, plain = MGHFLoss(cache_gt=True, **options), MGHFLoss(**options)
    sr, gt = pair()
    for generator in (None, seeded(1), seeded(1), seeded(2), None):
        assert torch.equal(cached(sr, gt, generator=generator), plain(sr, gt, generator=generator))
        sr = (sr + 0.01).clamp(0, 1)


@pytest.mark.parametrize("shift", SHIFTS)
@pytest.mark.parametrize("conditioning", ["own", "gt", "mixed"])
def test_gradient_checkpointing_repeats_the_shift(conditioning, shift, inn):
    criterion = MGHFLoss(coefficients=ALL, inn=inn, conditioning=conditioning, shift=shift, patches=16)
    sr, gt = pair()
    sr.requires_grad_()

    def loss(sr: Tensor, gt: Tensor) -> Tensor:
        return criterion(sr, gt, generator=seeded(3))

    recomputed = checkpoint(loss, sr, gt, use_reentrant=False)
    assert isinstance(recomputed, Tensor)
    (found,), (expected,) = (torch.autograd.grad(value, sr) for value in (recomputed, loss(sr, gt)))
    assert torch.equal(found, expected)


@pytest.mark.parametrize("shift", SHIFTS)
def test_heat_is_where_the_error_is(shift):
    gt = photograph("astronaut")[..., 96:161, 160:227]
    sr = gt.clone()
    sr[..., 20:24, 36:40] += 0.2
    for heat in MGHFnLoss(shift=shift).heatmap(sr, gt).values():
        assert heat.shape == (1, 65, 67)
        assert heat.isfinite().all()
        top, left = divmod(int(heat.argmax()), 67)
        assert 18 <= top < 26
        assert 34 <= left < 42
        assert heat[0, 44:].max() < 0.01 * heat.max()


@pytest.mark.parametrize("conditioning", ["own", "gt", "mixed"])
def test_the_average_is_0_at_identity_and_hardly_changes_with_the_phase(conditioning):
    """Where one grid changes much: the value can be reported."""
    gt = photograph("astronaut")[..., 96:160, 160:224]
    sr = upscale(downscale(gt))
    spread = {}
    for shift in ("none", "average"):
        options = {"coefficients": {"content": 1.0}, "conditioning": conditioning, "shift": shift}
        criterion = MGHFLoss(**options)
        assert criterion(gt, gt).abs() < 1e-6
        with torch.no_grad():
            rolled = [[image.roll((step, step), (2, 3)) for image in (sr, gt)] for step in range(5)]
            values = torch.stack([criterion(*images) for images in rolled])
        spread[shift] = ((values.max() - values.min()) / values.mean()).item()
    assert spread["none"] > 0.1
    assert spread["average"] < min(0.06, 0.25 * spread["none"])


@pytest.mark.compile
@pytest.mark.parametrize("shift", SHIFTS)
@pytest.mark.parametrize("conditioning", ["own", "gt", "mixed"])
def test_compiled_without_graph_breaks_it_gives_the_eager_value(conditioning, shift):
    criterion = MGHFLoss(
        coefficients=ALL, inn=perturbed_inn(levels=2, hidden=4), conditioning=conditioning, shift=shift
    )
    torch._dynamo.reset()
    compiled = torch.compile(criterion, fullgraph=True, backend="aot_eager")
    for shape in ((2, 3, 24, 32), (1, 3, 21, 30)):
        sr, gt = pair(*shape)
        sr.requires_grad_()
        values = [function(sr, gt) for function in (compiled, criterion)]
        torch.testing.assert_close(*values)
        (found,), (expected,) = (torch.autograd.grad(value, sr) for value in values)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
