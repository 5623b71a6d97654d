"""Random draws that are functions of a ground truth: no state is kept, and the program's random numbers are left alone.

So a loss has one value for one pair, recomputation repeats it, every SR image of a GT meets the same draws, and CUDA
graphs and `torch.compile` need nothing special.
"""

from __future__ import annotations

import torch
from torch import Tensor


def seed(gt: Tensor, generator: torch.Generator | None) -> Tensor:
    """One number for each GT, (B,) int64: from GT (B, 3, H, W) in [0, 255], rounded, and the generator's seed."""
    start = 0 if generator is None else generator.initial_seed() % 2**62
    return start + gt.detach().round().long().flatten(1).sum(1)


def integers(seed: Tensor, count: int) -> Tensor:
    """Return `count` pseudo-random int64 for every seed (B,): (B, count), whatever the device.

    Reference: Steele et al., OOPSLA 2014 (SplitMix64).
    """
    key = seed[:, None] + torch.arange(1, count + 1, device=seed.device) * -0x61C8864680B583EB
    key = (key ^ (key >> 30)) * -0x40A7B892E31B1A47
    key = (key ^ (key >> 27)) * -0x6B2FB644ECCEEE15
    return key ^ (key >> 31)


def shift(image: Tensor, offsets: Tensor) -> Tensor:
    """Shift images (B, C, H, W) cyclically by their own offsets, (B, 2), in pixels up and to the left.

    A permutation: every pixel counts once, and the gradient of a pixel arrives at that pixel.
    """
    batch, _, height, width = image.shape
    rows = (torch.arange(height, device=image.device) + offsets[:, :1]) % height
    columns = (torch.arange(width, device=image.device) + offsets[:, 1:]) % width
    image = image.gather(2, rows.view(batch, 1, height, 1).expand_as(image))
    return image.gather(3, columns.view(batch, 1, 1, width).expand_as(image))
