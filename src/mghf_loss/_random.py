"""Random draws that are functions of a ground truth: no state is kept, and the program's random numbers are left alone.

So a loss has one value for one pair, recomputation repeats it, every SR image of a GT meets the same draws, and CUDA
graphs and `torch.compile` need nothing special.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor


def seed(gt: Tensor, generator: torch.Generator | None) -> Tensor:
    """One number for each GT, (B,) int64: from GT (B, 3, H, W) in [0, 255], rounded, and the generator's seed."""
    of_gt = gt.detach().round().long().flatten(1).sum(1)
    return of_gt if generator is None else of_gt + generator.initial_seed() % 2**62


def integers(seed: Tensor, count: int) -> Tensor:
    """Return `count` pseudo-random int64 for every seed (B,): (B, count), whatever the device.

    Reference: Steele et al., OOPSLA 2014 (SplitMix64).
    """
    counter = torch.arange(1, count + 1, device=seed.device)
    key = torch.add(seed[:, None], counter, alpha=-0x61C8864680B583EB)
    key = (key ^ (key >> 30)) * -0x40A7B892E31B1A47
    key = (key ^ (key >> 27)) * -0x6B2FB644ECCEEE15
    return key ^ (key >> 31)


class Shift(NamedTuple):
    """Cyclic shifts of the images of a batch: the row and column of the image that each row and column takes."""

    rows: Tensor  # (B, H)
    columns: Tensor  # (B, W)
    places: Tensor  # of both: row * W + column, (B, H * W)


def shift_of(offsets: Tensor, height: int, width: int) -> Shift:
    """Shift images of a size by their own offsets, (B, 2), in pixels up and to the left."""
    steps = offsets[:, :, None] + torch.arange(max(height, width), device=offsets.device)
    if height == width:
        rows, columns = (steps % height).unbind(1)
    else:
        rows, columns = steps[:, 0, :height] % height, steps[:, 1, :width] % width
    return Shift(rows, columns, _places(rows, columns))


def shifted(image: Tensor, shift: Shift) -> Tensor:
    """Shift images (B, C, H, W), a permutation: every pixel counts once, and its gradient arrives at that pixel."""
    # A trace holds no functions of Python.
    differentiated = image.requires_grad and torch.is_grad_enabled()
    if differentiated and not torch.jit.is_tracing():  # pyright: ignore[reportPrivateImportUsage]
        return _Shifted.apply(image, *shift)  # type: ignore[return-value]
    return _gather(image, shift.places)


def _gather(image: Tensor, places: Tensor) -> Tensor:
    return image.flatten(2).gather(2, _of_channels(image, places)).view(image.shape)


def _places(rows: Tensor, columns: Tensor) -> Tensor:
    """Where each pixel of the shifted images comes from, (B, H W)."""
    return torch.add(columns[:, None], rows[:, :, None], alpha=columns.shape[1]).flatten(1)


def _of_channels(image: Tensor, places: Tensor) -> Tensor:
    return places[:, None].expand(-1, image.shape[1], -1)


class _Shifted(torch.autograd.Function):
    """`gather` whose backward pass keeps rows and columns: autograd would keep the image, and an index of its size."""

    generate_vmap_rule = True

    @staticmethod
    def forward(image: Tensor, rows: Tensor, columns: Tensor, places: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        return _gather(image, places)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs[1:3])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        rows, columns = ctx.saved_tensors
        gradient, places = gradients[0].flatten(2), _of_channels(gradients[0], _places(rows, columns))
        return torch.empty_like(gradient).scatter_(2, places, gradient).view(gradients[0].shape), None, None, None
