"""Triton kernels of the texture error: one pass over the features forward and one backward, bound by memory.

Forward: a program adds up the squares of some windows of a channel, row of the window by row, and writes their slopes
and the sum of their errors. The sums are added by torch, in a fixed order. Backward: a program multiplies some features
by the slopes of their windows.
"""

# Compile-time parameters take plain Python values.
# pyright: reportArgumentType=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .statistics_triton import launch_options

FEATURES = 1024  # of a program's step
OPTIONS = launch_options(4, 1)


def texture_triton(sr: Tensor, gt: Tensor, window: int, eps: float) -> tuple[Tensor, Tensor]:
    """As `texture_formula`, by a kernel and a sum."""
    batch, channels, height, width = sr.shape
    rows, columns = min(window, height), min(window, width)
    down, across = triton.cdiv(height, rows), triton.cdiv(width, columns)
    padded, windows = tile(columns)
    programs = triton.cdiv(down * across, windows)
    parts = sr.new_empty((batch, channels, programs), dtype=torch.float32)
    slope = sr.new_empty((batch, channels, down, across), dtype=torch.float32)
    _texture_kernel[(programs, channels, batch)](
        sr.contiguous(),
        gt.contiguous(),
        parts,
        slope,
        height,
        width,
        eps * eps,
        1 / (down * across),
        ROWS=rows,
        COLUMNS=columns,
        PADDED=padded,
        WINDOWS=windows,
        **OPTIONS,
    )
    return parts.sum(2), slope


def texture_backward_triton(sr: Tensor, slope: Tensor, gradient: Tensor, window: int) -> Tensor:
    """As `backward_formula`, by a kernel."""
    batch, channels, height, width = sr.shape
    found = torch.empty_like(sr, memory_format=torch.contiguous_format)
    _texture_backward_kernel[(triton.cdiv(height * width, FEATURES), channels, batch)](
        sr.contiguous(),
        slope.contiguous(),
        gradient.contiguous(),
        found,
        height,
        width,
        ROWS=min(window, height),
        COLUMNS=min(window, width),
        FEATURES=FEATURES,
        **OPTIONS,
    )
    return found


def tile(columns: int) -> tuple[int, int]:
    """Columns of a window, padded, and windows of a program."""
    padded = triton.next_power_of_2(columns)
    return padded, max(1, FEATURES // padded)


@triton.jit
def _texture_kernel(
    x_ptr, y_ptr, part_ptr, slope_ptr, height, width, square_eps, scale,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, PADDED: tl.constexpr, WINDOWS: tl.constexpr,
):  # fmt: skip
    # Grid (blocks of windows, channels, batch).
    plane = tl.program_id(2).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    x_ptr += plane * height * width
    y_ptr += plane * height * width
    across = (width + COLUMNS - 1) // COLUMNS
    count = (height + ROWS - 1) // ROWS * across
    windows = tl.program_id(0) * WINDOWS + tl.arange(0, WINDOWS)
    top = windows // across * ROWS
    left = windows % across * COLUMNS
    column = tl.arange(0, PADDED)[None, :]
    columns = left[:, None] + column
    inside = (column < COLUMNS) & (columns < width)
    xx = tl.zeros((WINDOWS, PADDED), tl.float32)
    yy = tl.zeros((WINDOWS, PADDED), tl.float32)
    for row in range(0, ROWS):
        rows = top[:, None] + row
        mask = inside & (rows < height)
        x = tl.load(x_ptr + rows * width + columns, mask=mask, other=0.0).to(tl.float32)
        y = tl.load(y_ptr + rows * width + columns, mask=mask, other=0.0).to(tl.float32)
        xx += x * x
        yy += y * y
    live = windows < count
    # At least 1 beyond the last window, too.
    locations = tl.maximum(tl.minimum(ROWS, height - top), 1) * tl.minimum(COLUMNS, width - left)
    x_strength = tl.sqrt(tl.sum(xx, 1) / locations + square_eps)
    y_strength = tl.sqrt(tl.sum(yy, 1) / locations + square_eps)
    difference = x_strength - y_strength
    # The sign; 0 and NaN are their own.
    sign = tl.where(difference > 0, 1.0, tl.where(difference < 0, -1.0, difference))
    tl.store(slope_ptr + plane * count + windows, sign / x_strength * scale, mask=live)
    part = part_ptr + plane * tl.num_programs(0) + tl.program_id(0)
    tl.store(part, tl.sum(tl.where(live, tl.abs(difference), 0.0), 0) * scale)


@triton.jit
def _texture_backward_kernel(
    x_ptr, slope_ptr, upstream_ptr, gradient_ptr, height, width,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, FEATURES: tl.constexpr,
):  # fmt: skip
    # Grid (blocks of features, channels, batch).
    plane = tl.program_id(2).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    across = (width + COLUMNS - 1) // COLUMNS
    count = (height + ROWS - 1) // ROWS * across
    places = tl.program_id(0) * FEATURES + tl.arange(0, FEATURES)
    inside = places < height * width
    down = places // width // ROWS
    along = places % width // COLUMNS
    locations = tl.maximum(tl.minimum(ROWS, height - down * ROWS), 1) * tl.minimum(COLUMNS, width - along * COLUMNS)
    slope = tl.load(slope_ptr + plane * count + down * across + along, mask=inside, other=0.0)
    x = tl.load(x_ptr + plane * height * width + places, mask=inside, other=0.0).to(tl.float32)
    gradient = tl.load(upstream_ptr + plane) * slope / locations * x
    tl.store(gradient_ptr + plane * height * width + places, gradient.to(gradient_ptr.dtype.element_ty), mask=inside)
