"""Triton kernels of the local errors: one pass over the features forward and one backward, bound by memory.

Forward: a program goes through some windows of a channel, row of the window by row, and writes their slopes and its
parts of the sums. The parts are added by torch, in a fixed order. Backward: a program takes some features with the
slopes of their windows and the numbers of their phases.
"""

# Compile-time parameters take plain Python values.
# pyright: reportArgumentType=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .local import PHASES
from .statistics_triton import launch_options

FEATURES = 1024  # of a program's step
OPTIONS = launch_options(4, 1)


def local_triton(sr: Tensor, gt: Tensor, window: int, eps: float, squared_error: bool) -> tuple[Tensor, Tensor]:
    """As `local_formula`, by a kernel and a sum."""
    batch, channels, height, width = sr.shape
    rows, columns = min(window, height), min(window, width)
    down, across = triton.cdiv(height, rows), triton.cdiv(width, columns)
    padded, windows = tile(columns)
    programs = triton.cdiv(down * across, windows)
    parts = sr.new_empty((batch, channels, 1 + PHASES + squared_error, programs), dtype=torch.float32)
    slope = sr.new_empty((batch, channels, down, across), dtype=torch.float32)
    _local_kernel[(programs, channels, batch)](
        sr.contiguous(),
        gt.contiguous(),
        parts,
        slope,
        height,
        width,
        eps * eps,
        1 / (down * across),
        1 / _locations_of_a_phase(height, width),
        1 / (height * width),
        ROWS=rows,
        COLUMNS=columns,
        PADDED=padded,
        WINDOWS=windows,
        SQUARED=squared_error,
        **OPTIONS,
    )
    return parts.sum(3), slope


def local_backward_triton(sr: Tensor, gt: Tensor | None, slope: Tensor, gradient: Tensor, window: int) -> Tensor:
    """As `backward_formula`, by a kernel."""
    batch, channels, height, width = sr.shape
    found = torch.empty_like(sr, memory_format=torch.contiguous_format)
    _local_backward_kernel[(triton.cdiv(height * width, FEATURES), channels, batch)](
        sr.contiguous(),
        sr if gt is None else gt.contiguous(),
        slope.contiguous(),
        gradient.contiguous(),
        found,
        height,
        width,
        1 / _locations_of_a_phase(height, width),
        2 / (height * width),
        ROWS=min(window, height),
        COLUMNS=min(window, width),
        FEATURES=FEATURES,
        SQUARED=gt is not None,
        **OPTIONS,
    )
    return found


def tile(columns: int) -> tuple[int, int]:
    """Columns of a window, padded, and windows of a program."""
    padded = triton.next_power_of_2(columns)
    return padded, max(1, FEATURES // padded)


def _locations_of_a_phase(height: int, width: int) -> int:
    return max(1, height // 2) * max(1, width // 2)


@triton.jit
def _has_phase(rows, columns, height, width):
    # All but an odd last row or column; a single one has.
    return (rows < tl.maximum(height // 2 * 2, 1)) & (columns < tl.maximum(width // 2 * 2, 1))


@triton.jit
def _local_kernel(
    x_ptr, y_ptr, part_ptr, slope_ptr, height, width, square_eps, of_window, of_phase, of_squared,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, PADDED: tl.constexpr, WINDOWS: tl.constexpr, SQUARED: tl.constexpr,
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
    squared = tl.zeros((WINDOWS, PADDED), tl.float32)
    even = tl.zeros((WINDOWS, PADDED), tl.float32)
    odd = tl.zeros((WINDOWS, PADDED), tl.float32)
    for row in range(0, ROWS):
        rows = top[:, None] + row
        mask = inside & (rows < height)
        x = tl.load(x_ptr + rows * width + columns, mask=mask, other=0.0).to(tl.float32)
        y = tl.load(y_ptr + rows * width + columns, mask=mask, other=0.0).to(tl.float32)
        xx += x * x
        yy += y * y
        difference = x - y
        if SQUARED:
            squared += difference * difference
        phased = tl.where(_has_phase(rows, columns, height, width), difference, 0.0)
        even += tl.where(rows % 2 == 0, phased, 0.0)
        odd += tl.where(rows % 2 == 1, phased, 0.0)
    live = windows < count
    # At least 1 beyond the last window, too.
    locations = tl.maximum(tl.minimum(ROWS, height - top), 1) * tl.minimum(COLUMNS, width - left)
    x_strength = tl.sqrt(tl.sum(xx, 1) / locations + square_eps)
    y_strength = tl.sqrt(tl.sum(yy, 1) / locations + square_eps)
    difference = x_strength - y_strength
    # The sign; 0 and NaN are their own.
    sign = tl.where(difference > 0, 1.0, tl.where(difference < 0, -1.0, difference))
    tl.store(slope_ptr + plane * count + windows, sign / x_strength * of_window, mask=live)
    programs = tl.num_programs(0)
    part_ptr += plane * (5 + SQUARED) * programs + tl.program_id(0)
    tl.store(part_ptr, tl.sum(tl.where(live, tl.abs(difference), 0.0), 0) * of_window)
    tl.store(part_ptr + programs, _total(tl.where(columns % 2 == 0, even, 0.0)) * of_phase)
    tl.store(part_ptr + 2 * programs, _total(tl.where(columns % 2 == 1, even, 0.0)) * of_phase)
    tl.store(part_ptr + 3 * programs, _total(tl.where(columns % 2 == 0, odd, 0.0)) * of_phase)
    tl.store(part_ptr + 4 * programs, _total(tl.where(columns % 2 == 1, odd, 0.0)) * of_phase)
    if SQUARED:
        tl.store(part_ptr + 5 * programs, _total(squared) * of_squared)


@triton.jit
def _total(values):
    return tl.sum(tl.sum(values, 1), 0)


@triton.jit
def _local_backward_kernel(
    x_ptr, y_ptr, slope_ptr, upstream_ptr, gradient_ptr, height, width, of_phase, of_squared,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, FEATURES: tl.constexpr, SQUARED: tl.constexpr,
):  # fmt: skip
    # Grid (blocks of features, channels, batch).
    plane = tl.program_id(2).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    across = (width + COLUMNS - 1) // COLUMNS
    count = (height + ROWS - 1) // ROWS * across
    places = tl.program_id(0) * FEATURES + tl.arange(0, FEATURES)
    inside = places < height * width
    rows = places // width
    columns = places % width
    down = rows // ROWS
    along = columns // COLUMNS
    locations = tl.maximum(tl.minimum(ROWS, height - down * ROWS), 1) * tl.minimum(COLUMNS, width - along * COLUMNS)
    slope = tl.load(slope_ptr + plane * count + down * across + along, mask=inside, other=0.0)
    x = tl.load(x_ptr + plane * height * width + places, mask=inside, other=0.0).to(tl.float32)
    upstream_ptr += plane * (5 + SQUARED)
    gradient = tl.load(upstream_ptr) * slope / locations * x
    phased = inside & _has_phase(rows, columns, height, width)
    phase = tl.load(upstream_ptr + 1 + rows % 2 * 2 + columns % 2, mask=phased, other=0.0)
    gradient += phase * of_phase
    if SQUARED:
        y = tl.load(y_ptr + plane * height * width + places, mask=inside, other=0.0).to(tl.float32)
        gradient += tl.load(upstream_ptr + 5) * of_squared * (x - y)
    tl.store(gradient_ptr + plane * height * width + places, gradient.to(gradient_ptr.dtype.element_ty), mask=inside)
