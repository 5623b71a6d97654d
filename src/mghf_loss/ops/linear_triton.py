"""Triton kernels of a level as a linear map, and of its transpose: one launch each, bound by memory.

The twelve values of a location (three channels, two by two pixels) are a column of a matrix of 16 rows; the Haar step
is a product with +-1/2, and a mixing a product too. Each operand is two tf32 numbers, as accurate as float32.
"""

# Compile-time parameters take plain Python values.
# pyright: reportArgumentType=false, reportOperatorIssue=false

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from .couplings_triton import _halves, _multiply
from .statistics_triton import launch_options

ROWS = 16  # 9 details and 3 low-pass channels, padded
MOST_COUPLINGS = 4
PLACES = 64
OPTIONS = launch_options(4, 1)


def linear_level_triton(x: Tensor, matrices: Sequence[Tensor], scales: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """As `linear_level_formula`, by a kernel."""
    batch, _, height, width = x.shape
    details, low = x.new_empty((batch, 9, height // 2, width // 2)), x.new_empty((batch, 3, height // 2, width // 2))
    _launch(_forward_kernel, x.contiguous(), details, low, matrices, scales)
    return details, low


def transpose_triton(
    details: Tensor, low: Tensor | None, matrices: Sequence[Tensor], scales: Sequence[Tensor]
) -> Tensor:
    """As `transpose_formula`, by a kernel."""
    batch, _, height, width = details.shape
    x = details.new_empty((batch, 3, 2 * height, 2 * width))
    low_pass = x if low is None else low.contiguous()
    _launch(_transpose_kernel, x, details.contiguous(), low_pass, matrices, scales, LOW=low is not None)
    return x


def _launch(
    kernel, x: Tensor, details: Tensor, low: Tensor, matrices: Sequence[Tensor], scales: Sequence[Tensor], **more: bool
) -> None:
    if details.shape[1] != 9 or len(matrices) > MOST_COUPLINGS:
        raise NotImplementedError(
            f"{details.shape[1]} details and {len(matrices)} couplings, the kernel takes 9 and up to {MOST_COUPLINGS}"
        )
    batch, _, height, width = details.shape
    unused = [x] * (MOST_COUPLINGS - len(matrices))
    contiguous = [tensor.contiguous() for tensor in (*matrices, *scales)]
    matrix_pointers, scale_pointers = contiguous[: len(matrices)] + unused, contiguous[len(matrices) :] + unused
    kernel[(triton.cdiv(height * width, PLACES), batch)](
        x,
        details,
        low,
        *matrix_pointers,
        *scale_pointers,
        height,
        width,
        COUPLINGS=len(matrices),
        N1=scales[0].shape[1] if scales else 0,
        R=ROWS,
        P=PLACES,
        **more,
        **OPTIONS,
    )


@triton.jit
def _haar(R: tl.constexpr):
    """The transposed Haar step (pixels, bands): pixel 4 c + 2 y + x, detail 3 c + band - 1, low-pass 9 + c."""
    pixel = tl.arange(0, R)[:, None]
    band = tl.arange(0, R)[None, :]
    detail = band < 9
    channel = tl.where(detail, band // 3, band - 9)
    kind = tl.where(detail, band % 3 + 1, 0)
    right = pixel % 2 == 1
    bottom = (pixel // 2) % 2 == 1
    odd = ((kind == 1) & right) | ((kind == 2) & bottom) | ((kind == 3) & (right != bottom))
    live = (pixel < 12) & (band < 12) & (pixel // 4 == channel)
    return tl.where(live, tl.where(odd, -0.5, 0.5), 0.0)


@triton.jit
def _matrix(ptr, R: tl.constexpr):
    row = tl.arange(0, R)[:, None]
    column = tl.arange(0, R)[None, :]
    return tl.load(ptr + row * 9 + column, mask=(row < 9) & (column < 9), other=0.0)


@triton.jit
def _scaled(d, scale_ptr, plane, places, N1: tl.constexpr, R: tl.constexpr):
    row = tl.arange(0, R)[:, None]
    scale = tl.load(scale_ptr + row * plane + places[None, :], mask=(row < N1) & (places < plane)[None, :], other=1.0)
    return d * scale


@triton.jit
def _step(d, matrix_ptr, scale_ptr, plane, places, N1: tl.constexpr, R: tl.constexpr, P: tl.constexpr):
    head, rest = _halves(_matrix(matrix_ptr, R))
    d = _multiply(head, rest, d, tl.zeros((R, P), tl.float32), True)
    return _scaled(d, scale_ptr, plane, places, N1, R)


@triton.jit
def _step_back(d, matrix_ptr, scale_ptr, plane, places, N1: tl.constexpr, R: tl.constexpr, P: tl.constexpr):
    head, rest = _halves(tl.trans(_matrix(matrix_ptr, R)))
    return _multiply(head, rest, _scaled(d, scale_ptr, plane, places, N1, R), tl.zeros((R, P), tl.float32), True)


@triton.jit
def _pixels(places, width, plane, R: tl.constexpr):
    """Offsets of the twelve pixels of each location."""
    pixel = tl.arange(0, R)[:, None]
    y = (places // width)[None, :] * 2 + (pixel // 2) % 2
    return (pixel // 4) * (4 * plane) + y * (2 * width) + (places % width)[None, :] * 2 + pixel % 2


@triton.jit
def _forward_kernel(
    x_ptr, details_ptr, low_ptr, m0_ptr, m1_ptr, m2_ptr, m3_ptr, s0_ptr, s1_ptr, s2_ptr, s3_ptr,
    height, width,
    COUPLINGS: tl.constexpr, N1: tl.constexpr, R: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    # Grid (tiles of locations, batch).
    image = tl.program_id(1).to(tl.int64)
    plane = height * width
    places = tl.program_id(0) * P + tl.arange(0, P)
    row = tl.arange(0, R)[:, None]
    inside = (places < plane)[None, :]
    x = tl.load(x_ptr + image * 12 * plane + _pixels(places, width, plane, R), mask=(row < 12) & inside, other=0.0)
    haar = tl.trans(_haar(R))
    d = _multiply(haar, haar * 0.0, x, tl.zeros((R, P), tl.float32), True)
    low = low_ptr + (image * 3 + row - 9) * plane + places[None, :]
    tl.store(low, d, mask=(row >= 9) & (row < 12) & inside)
    offset = image * N1 * plane
    if COUPLINGS > 0:
        d = _step(d, m0_ptr, s0_ptr + offset, plane, places, N1, R, P)
    if COUPLINGS > 1:
        d = _step(d, m1_ptr, s1_ptr + offset, plane, places, N1, R, P)
    if COUPLINGS > 2:
        d = _step(d, m2_ptr, s2_ptr + offset, plane, places, N1, R, P)
    if COUPLINGS > 3:
        d = _step(d, m3_ptr, s3_ptr + offset, plane, places, N1, R, P)
    tl.store(details_ptr + (image * 9 + row) * plane + places[None, :], d, mask=(row < 9) & inside)


@triton.jit
def _transpose_kernel(
    x_ptr, details_ptr, low_ptr, m0_ptr, m1_ptr, m2_ptr, m3_ptr, s0_ptr, s1_ptr, s2_ptr, s3_ptr,
    height, width,
    COUPLINGS: tl.constexpr, N1: tl.constexpr, R: tl.constexpr, P: tl.constexpr, LOW: tl.constexpr,
):  # fmt: skip
    # Grid (tiles of locations, batch).
    image = tl.program_id(1).to(tl.int64)
    plane = height * width
    places = tl.program_id(0) * P + tl.arange(0, P)
    row = tl.arange(0, R)[:, None]
    inside = (places < plane)[None, :]
    d = tl.load(details_ptr + (image * 9 + row) * plane + places[None, :], mask=(row < 9) & inside, other=0.0)
    offset = image * N1 * plane
    if COUPLINGS > 3:
        d = _step_back(d, m3_ptr, s3_ptr + offset, plane, places, N1, R, P)
    if COUPLINGS > 2:
        d = _step_back(d, m2_ptr, s2_ptr + offset, plane, places, N1, R, P)
    if COUPLINGS > 1:
        d = _step_back(d, m1_ptr, s1_ptr + offset, plane, places, N1, R, P)
    if COUPLINGS > 0:
        d = _step_back(d, m0_ptr, s0_ptr + offset, plane, places, N1, R, P)
    if LOW:
        low = low_ptr + (image * 3 + row - 9) * plane + places[None, :]
        d += tl.load(low, mask=(row >= 9) & (row < 12) & inside, other=0.0)
    haar = _haar(R)
    x = _multiply(haar, haar * 0.0, d, tl.zeros((R, P), tl.float32), True)
    tl.store(x_ptr + image * 12 * plane + _pixels(places, width, plane, R), x, mask=(row < 12) & inside)
