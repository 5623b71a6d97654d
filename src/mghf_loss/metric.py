"""A loss as a metric: one value for images of any size, computed in tiles, and 0 for equal images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import cast

import torch
from torch import Tensor

from . import _checks, terms
from .criterion import Criterion

TILE = 512
UNIT = 8
OFFSET = "patch_nce"  # the term that is not 0 for equal images, because some locations look alike

Value = tuple[Tensor, dict[str, Tensor]]


def distance(criterion: Criterion, sr: Tensor, gt: Tensor, *, tile: int = TILE) -> Value:
    """Measure how far `sr` is from `gt`, as a metric to report: deterministic, for any size, and 0 for equal images.

    sr, gt (B, 3, H, W) in the criterion's `input_range` -> total and unweighted terms by name, without gradient,
    reduced over the batch as the criterion reduces. `mghf-loss compare` prints these values.

    >>> sr, gt = torch.rand(2, 1, 3, 40, 64)
    >>> total, terms = distance(MGHFLoss(), sr, gt)
    >>> total > 0, distance(MGHFLoss(), gt, gt)[0]
    (tensor(True), tensor(0.))

    The image is cut into `tile_slices`. The value of a term is its mean over tiles, weighted by their areas; the total
    is the sum of coefficient * term. With PatchNCE, the value of every term is term(sr, gt) - term(gt, gt), because no
    image can avoid the second part, which is 0 for the other terms; near GT the difference may fall below 0. Rounding
    apart, an image that fits into one tile has the terms of `criterion(sr, gt)` without PatchNCE.

    Memory depends on the tile, not on the image. Values depend on the tile, because statistics such as Gram matrices
    are those of a tile: compare values of one tile size only. With the criterion's `shift="random"` every tile has its
    own shift, which follows from GT. `MGHFLoss(shift="average")` averages over all of them, for small images and
    reports.

    Args:
        criterion: one of the three losses.
        sr: super-resolved images.
        gt: ground truth.
        tile: largest side of a tile in pixels, a multiple of 8 and of the network's stride.

    Raises:
        ValueError, TypeError: as `criterion(sr, gt)`, and where `tile` is not as above.
    """
    return distances(criterion, [sr], gt, tile=tile)[0]


@torch.no_grad()
def distances(
    criterion: Criterion,
    srs: Sequence[Tensor],
    gt: Tensor,
    *,
    tile: int = TILE,
    progress: Callable[[], object] = lambda: None,
) -> list[Value]:
    """Return `distance` of several SR images from one GT, which share what is computed of GT.

    With `cache_gt=True` the criterion computes the features of a GT tile once. `progress` is called after each tile.
    """
    for sr in srs:
        _checks.pair(sr, gt, criterion.least_size)
    sums: list[dict[str, Tensor]] = [{} for _ in srs]
    area = gt.shape[2] * gt.shape[3]
    for rows, columns in tile_slices(gt.shape[2], gt.shape[3], tile, criterion.least_size):
        gt_tile = gt[..., rows, columns]
        share = gt_tile.shape[2] * gt_tile.shape[3] / area
        zero = None
        for sr, total in zip(srs, sums, strict=True):
            sr_tile = sr[..., rows, columns]
            values = _term_values(criterion, sr_tile, gt_tile)
            if zero is None and OFFSET in values:
                zero = _term_values(criterion, gt_tile, gt_tile)
            equal = (sr_tile == gt_tile).flatten(1).all(1)  # where rounding alone would be left
            for name, value in values.items():
                excess = value if zero is None else value - zero[name]
                total[name] = total.get(name, 0) + share * excess.masked_fill(equal, 0)
        progress()
    return [_reduced(criterion, values) for values in sums]


def _term_values(criterion: Criterion, sr: Tensor, gt: Tensor) -> dict[str, Tensor]:
    # A new generator for every call: all tiles and images draw alike.
    return criterion.term_values(sr, gt, torch.Generator(gt.device).manual_seed(0))


def _reduced(criterion: Criterion, values: dict[str, Tensor]) -> Value:
    total = cast(Tensor, sum(criterion.coefficients[name] * value for name, value in values.items()))
    by_name = {name: terms.reduce(value, criterion.reduction) for name, value in values.items()}
    return terms.reduce(total, criterion.reduction), by_name


def heatmap(criterion: Criterion, sr: Tensor, gt: Tensor, *, tile: int = TILE) -> dict[str, Tensor]:
    """Return `criterion.heatmap(sr, gt)` of large images, (B, H, W) by name, computed in tiles as in `distance`.

    Each tile has the gradient of its share in the image's value. At the border of a tile the network sees no
    neighbours.
    """
    _checks.pair(sr, gt, criterion.least_size)
    height, width = gt.shape[2:]
    maps: dict[str, Tensor] = {}
    for rows, columns in tile_slices(height, width, tile, criterion.least_size):
        sr_tile, gt_tile = sr[..., rows, columns], gt[..., rows, columns]
        share = gt_tile.shape[2] * gt_tile.shape[3] / (height * width)
        generator = torch.Generator(gt.device).manual_seed(0)
        for name, heat in criterion.heatmap(sr_tile, gt_tile, generator=generator).items():
            if name not in maps:
                maps[name] = heat.new_empty(len(heat), height, width)
            maps[name][:, rows, columns] = share * heat
    return maps


def tile_slices(height: int, width: int, tile: int, stride: int = 1) -> list[tuple[slice, slice]]:
    """Cut an image into as few tiles as possible, none larger than `tile`, of nearly equal sizes.

    >>> tile_slices(20, 40, 32)
    [(slice(0, 20, None), slice(0, 16, None)), (slice(0, 20, None), slice(16, 40, None))]

    Tiles neither overlap nor leave anything out. Every tile starts at a multiple of 8 and of `stride`, where the Haar
    grid of the whole image has a corner.

    Raises:
        ValueError: `tile` is no multiple of 8 and `stride`, or is less than twice these.
    """
    unit = max(UNIT, stride)  # both are powers of 2
    if _checks.integer("tile", tile, least=2 * unit) % unit:
        raise ValueError(f"tile must be a multiple of {unit}, got {tile}")
    rows, columns = (_cuts(side, tile, unit) for side in (height, width))
    return [(row, column) for row in rows for column in columns]


def _cuts(side: int, tile: int, unit: int) -> list[slice]:
    units, count = -(-side // unit), -(-side // tile)
    # Rounded down, so the last part has the most units: the last unit may be cut off.
    bounds = [index * units // count * unit for index in range(count)] + [side]
    return [slice(start, stop) for start, stop in pairwise(bounds)]
