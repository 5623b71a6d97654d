"""Dead leaves: synthetic images of occluding discs, with the scale invariance of photographs and no compression."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

OVERSAMPLING = 2  # for antialiased edges
DISCS = 150


def dead_leaves(size: int, generator: torch.Generator) -> Tensor:
    """Return a (3, size, size) image in [-1, 1] with 8-bit values, a function of `generator`'s state.

    Discs of one random colour fall on one another; radii r have density proportional to r^-3 between 1 and
    size / 2, which makes the image scale invariant as photographs are. A ramp of brightness over each disc keeps
    surfaces from being constant.

    Reference: Lee, Mumford and Huang, IJCV 2001; for training networks, Baradad et al., NeurIPS 2021.
    """
    side = size * OVERSAMPLING
    uniform = torch.rand(DISCS + 1, 8, generator=generator)
    least, most = float(OVERSAMPLING), side / 2
    # inverse of the distribution function of r^-3 on [least, most]
    radius = (least**-2 - uniform[:, 0] * (least**-2 - most**-2)).rsqrt()
    radius[0] = 2 * side  # the ground
    centre = uniform[:, 1:3] * side
    colour = uniform[:, 3:6]
    ramp = (uniform[:, 6:8] - 0.5) * 0.4
    axis = torch.arange(side) + 0.5
    dy, dx = (axis - centre[:, 0, None]).square(), (axis - centre[:, 1, None]).square()
    seen = torch.zeros(side, side, dtype=torch.long)
    for disc in range(1, DISCS + 1):  # the last disc that covers a pixel is the one that is seen
        seen[dy[disc, :, None] + dx[disc] <= radius[disc] ** 2] = disc
    offset = torch.stack((axis[:, None].expand(side, side), axis.expand(side, side))) - centre[seen].permute(2, 0, 1)
    shade = (ramp[seen].permute(2, 0, 1) * offset).sum(0) / radius[seen]
    image = colour[seen].permute(2, 0, 1) + shade
    return (255 * F.avg_pool2d(image, OVERSAMPLING)).round().clamp(0, 255) / 127.5 - 1
