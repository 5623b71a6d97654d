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
    height, width = image.shape[2:]
    rows = (torch.arange(height, device=image.device) + offsets[:, :1]) % height
    columns = (torch.arange(width, device=image.device) + offsets[:, 1:]) % width
    return _select_rows(_select_rows(image, rows).transpose(2, 3), columns).transpose(2, 3)


def _select_rows(image: Tensor, rows: Tensor) -> Tensor:
    """Rows of images (B, C, H, W) by their numbers, (B, H); `gather` would keep the image for the backward pass."""
    batch, channels, height, width = image.shape
    first = torch.arange(batch * channels, device=image.device).view(batch, channels, 1) * height
    return image.reshape(-1, width).index_select(0, (first + rows[:, None]).flatten()).view(image.shape)
