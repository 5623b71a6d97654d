"""Triton kernel of the network's couplings: one launch for mixing and phi, one for rho_eta and scaling.

A program marches down the rows of a strip. Of each row it computes the hidden map at three horizontal shifts (a product
of 16 columns is cheaper than an exchange between threads) and adds each of them, times its weight, to the sums of the
row above, this one and the one below; when a row's sum is complete, so is its second hidden map, and the output is
written. Reflection is a matter of indices. The mixing is multiplied into the first and the skip connection's weights.

Products, "high": each operand as two tf32 numbers, three products, as accurate as float32. "fast": the weights as two
tf32 numbers, the maps as one. Rounded by integer arithmetic, as tensor cores truncate. One program serves all levels of
a pyramid: more than 13 details, or 64 hidden channels, go to cuDNN.
"""

# Compile-time parameters take plain Python values, and decide which names there are.
# pyright: reportArgumentType=false, reportOperatorIssue=false, reportCallIssue=false, reportAssignmentType=false
# pyright: reportPossiblyUnboundVariable=false

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .couplings import MAX_DETAILS, MAX_HIDDEN
from .statistics_triton import _round_tf32, launch_options

INPUTS = 16  # details and low-pass, padded: the least of a matrix product


def coupling_triton(
    x: Tensor,
    low: Tensor,
    matrix: Tensor,
    phi: Sequence[Tensor],
    rho_eta: Sequence[Tensor],
    clamp: float,
    precision: str,
) -> tuple[Tensor, Tensor]:
    """As `coupling_formula`, by kernels."""
    return _forward(x, low, matrix, phi, rho_eta, clamp, precision, False)[:2]


def kept_triton(
    x: Tensor,
    low: Tensor,
    matrix: Tensor,
    phi: Sequence[Tensor],
    rho_eta: Sequence[Tensor],
    clamp: float,
    precision: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `kept_formula`, by kernels."""
    return _forward(x, low, matrix, phi, rho_eta, clamp, precision, True)


def _forward(
    x: Tensor,
    low: Tensor,
    matrix: Tensor,
    phi: Sequence[Tensor],
    rho_eta: Sequence[Tensor],
    clamp: float,
    precision: str,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, channels, height, width = x.shape
    constants = _constants(channels, phi, height, width, precision)
    x, low = x.contiguous(), low.contiguous()
    z, scale = torch.empty_like(x), x.new_empty((batch, constants["N1"], height, width))
    z1 = torch.empty_like(scale if keep else scale[:0])
    signs = x.new_empty((batch if keep else 0, 4, height, width), dtype=torch.int32)
    for second, parameters in ((False, phi), (True, rho_eta)):
        _half_kernel[_grid(constants, batch, height, width)](
            z if second else x,
            low,
            z,
            scale,
            z1,
            signs,
            matrix.contiguous(),
            *(parameter.contiguous() for parameter in parameters),
            height,
            width,
            clamp,
            1 / clamp,
            SECOND=second,
            KEEP=keep,
            **constants,
        )
    return z, scale, z1, signs


def kept_backward_triton(
    gradient: Tensor,
    scale: Tensor,
    z1: Tensor,
    signs: Tensor,
    matrix: Tensor,
    phi: Sequence[Tensor],
    rho_eta: Sequence[Tensor],
    clamp: float,
    precision: str,
) -> tuple[Tensor, Tensor]:
    """As `kept_backward_formula`, by kernels."""
    batch, channels, height, width = gradient.shape
    constants = _constants(channels, phi, height, width, precision)
    gradient = gradient.contiguous()
    between, of_x = torch.empty_like(gradient), torch.empty_like(gradient)
    of_low = gradient.new_empty((batch, 3, height, width))
    for second, parameters, given, found in ((True, rho_eta, gradient, between), (False, phi, between, of_x)):
        w1, _, w2, _, w3, _ = (parameter.contiguous() for parameter in parameters)
        _half_backward_kernel[_grid(constants, batch, height, width)](
            given,
            found,
            of_low,
            scale,
            z1,
            signs,
            matrix.contiguous(),
            w1,
            w2,
            w3,
            height,
            width,
            1 / clamp,
            SECOND=second,
            **constants,
        )
    return of_x, of_low


def _constants(channels: int, phi: Sequence[Tensor], height: int, width: int, precision: str) -> dict[str, int | bool]:
    """Compile-time parameters and launch options that all kernels share."""
    hidden = phi[0].shape[0]
    padded = max(16, triton.next_power_of_2(hidden))
    if channels > MAX_DETAILS or padded > MAX_HIDDEN:
        known = f"{channels} details and {hidden} hidden channels"
        raise NotImplementedError(f"{known}, the kernel takes up to {MAX_DETAILS} and {MAX_HIDDEN}")
    columns, rows, options = tiles(padded, width)
    sizes = {"CHANNELS": channels, "N1": channels - channels // 2, "HIDDEN": hidden, "H": padded, "K": INPUTS}
    strip = {"P": columns, "ROWS": rows, "REPLICATE": min(height, width) == 1, "HIGH": precision == "high"}
    return {**sizes, **strip, **options}


def _grid(constants: dict[str, int | bool], batch: int, height: int, width: int) -> tuple[int, int, int]:
    return triton.cdiv(width, constants["P"]), triton.cdiv(height, constants["ROWS"]), batch


def tiles(hidden: int, width: int) -> tuple[int, int, dict[str, int | bool]]:
    """Columns and rows of a program's strip, and launch options."""
    columns = min(64, max(16, triton.next_power_of_2(width)))
    return columns, 8, launch_options(8 if columns == 64 else 4, 1)


@triton.jit
def _reflected(i, size, REPLICATE: tl.constexpr):
    if not REPLICATE:
        i = tl.abs(i)
        i = tl.where(i >= size, 2 * (size - 1) - i, i)
    return tl.minimum(tl.maximum(i, 0), size - 1)


@triton.jit
def _halves(x):
    head = _round_tf32(x)
    return head, _round_tf32(x - head)


@triton.jit
def _multiply(head, rest, x, total, HIGH: tl.constexpr):
    """total + (head + rest) @ x"""
    x_head = _round_tf32(x)
    total = tl.dot(rest, x_head, total, input_precision="tf32")
    if HIGH:
        total = tl.dot(head, _round_tf32(x - x_head), total, input_precision="tf32")
    return tl.dot(head, x_head, total, input_precision="tf32")


@triton.jit
def _inputs(x_ptr, low_ptr, plane, row, columns, width, FIRST: tl.constexpr, CHANNELS: tl.constexpr, K: tl.constexpr):
    """A row of the details from channel FIRST on and of the low-pass band, (K, columns)."""
    k = tl.arange(0, K)[:, None]
    places = row * width + columns[None, :]
    x = tl.load(x_ptr + k * plane + places, mask=(k >= FIRST) & (k < CHANNELS), other=0.0)
    low = tl.load(low_ptr + (k - CHANNELS) * plane + places, mask=(k >= CHANNELS) & (k < CHANNELS + 3), other=0.0)
    return x + low


@triton.jit
def _hidden(
    x_ptr, low_ptr, plane, row, columns, width, w1, w1_rest, b1,
    FIRST: tl.constexpr, CHANNELS: tl.constexpr, K: tl.constexpr, HIGH: tl.constexpr,
):  # fmt: skip
    x = _inputs(x_ptr, low_ptr, plane, row, columns, width, FIRST, CHANNELS, K)
    hidden = _multiply(w1, w1_rest, x, tl.zeros((w1.shape[0], x.shape[1]), tl.float32), HIGH)
    return tl.maximum(hidden + b1, 0.0), x


@triton.jit
def _signs(hidden, H: tl.constexpr):
    """Which channels are positive, a bit each."""
    bits = (hidden > 0).to(tl.int32) << tl.arange(0, H)[:, None]
    return tl.sum(bits, 0)


@triton.jit
def _half_kernel(
    x_ptr, low_ptr, z_ptr, scale_ptr, z1_ptr, sign_ptr, matrix_ptr, w1_ptr, b1_ptr, w2_ptr, b2_ptr, w3_ptr, b3_ptr,
    height, width, clamp, inverse_clamp,
    CHANNELS: tl.constexpr, N1: tl.constexpr, HIDDEN: tl.constexpr, H: tl.constexpr, K: tl.constexpr,
    P: tl.constexpr, ROWS: tl.constexpr, SECOND: tl.constexpr, REPLICATE: tl.constexpr, HIGH: tl.constexpr,
    KEEP: tl.constexpr,
):  # fmt: skip
    # Grid (strips, row blocks, batch). First half: z = M x, z2 += phi. Second half, x = z: z1 = s z1 + eta, in place,
    # which no other program reads.
    image = tl.program_id(2).to(tl.int64)
    plane = height * width
    x_ptr += image * CHANNELS * plane
    z_ptr += image * CHANNELS * plane
    low_ptr += image * 3 * plane
    scale_ptr += image * N1 * plane
    z1_ptr += image * N1 * plane
    sign_ptr += (image * 4 + (2 if SECOND else 0)) * plane
    y0 = tl.program_id(1) * ROWS
    columns = tl.program_id(0) * P + tl.arange(0, P)
    left = _reflected(columns - 1, width, REPLICATE)
    right = _reflected(columns + 1, width, REPLICATE)
    middle = tl.minimum(columns, width - 1)

    j = tl.arange(0, H)
    k = tl.arange(0, K)
    m = tl.arange(0, K)
    live = j < HIDDEN
    N2: tl.constexpr = CHANNELS - N1
    FIRST: tl.constexpr = N1 if SECOND else 0
    if SECOND:
        inner = (k >= N1) & (k < CHANNELS + 3)
        w1 = tl.load(w1_ptr + j[:, None] * (N2 + 3) + (k - N1)[None, :], mask=live[:, None] & inner[None, :], other=0.0)
        w3_rows = m < N1
    else:
        # (z1, low) = (M1 x, low): M1 is multiplied into the weights.
        square = tl.load(
            matrix_ptr + m[:, None] * CHANNELS + k[None, :],
            mask=(m < CHANNELS)[:, None] & (k < CHANNELS)[None, :],
            other=0.0,
        )
        w1 = tl.load(w1_ptr + j[:, None] * (N1 + 3) + k[None, :], mask=live[:, None] & (k < N1)[None, :], other=0.0)
        w1 = tl.dot(w1, square, input_precision="ieee")
        inner = (k >= CHANNELS) & (k < CHANNELS + 3)
        w1 += tl.load(
            w1_ptr + j[:, None] * (N1 + 3) + (N1 + k - CHANNELS)[None, :],
            mask=live[:, None] & inner[None, :],
            other=0.0,
        )
        skip, skip_rest = _halves(square)
        w3_rows = (m >= N1) & (m < CHANNELS)
    OFFSET: tl.constexpr = 0 if SECOND else N1
    w3_mask = w3_rows[:, None] & live[None, :]
    w3 = tl.load(w3_ptr + (m - OFFSET)[:, None] * HIDDEN + j[None, :], mask=w3_mask, other=0.0)
    b3 = tl.load(b3_ptr + m - OFFSET, mask=w3_rows, other=0.0)[:, None]
    w1, w1_rest = _halves(w1)
    w3, w3_rest = _halves(w3)
    if SECOND:
        w4 = tl.load(w3_ptr + (m + N1)[:, None] * HIDDEN + j[None, :], mask=w3_mask, other=0.0)
        b4 = tl.load(b3_ptr + m + N1, mask=w3_rows, other=0.0)[:, None]
        w4, w4_rest = _halves(w4)
    b1 = tl.load(b1_ptr + j, mask=live, other=0.0)[:, None]
    b2 = tl.load(b2_ptr + j, mask=live, other=0.0)[:, None]
    w00 = tl.load(w2_ptr + j * 9, mask=live, other=0.0)[:, None]
    w01 = tl.load(w2_ptr + j * 9 + 1, mask=live, other=0.0)[:, None]
    w02 = tl.load(w2_ptr + j * 9 + 2, mask=live, other=0.0)[:, None]
    w10 = tl.load(w2_ptr + j * 9 + 3, mask=live, other=0.0)[:, None]
    w11 = tl.load(w2_ptr + j * 9 + 4, mask=live, other=0.0)[:, None]
    w12 = tl.load(w2_ptr + j * 9 + 5, mask=live, other=0.0)[:, None]
    w20 = tl.load(w2_ptr + j * 9 + 6, mask=live, other=0.0)[:, None]
    w21 = tl.load(w2_ptr + j * 9 + 7, mask=live, other=0.0)[:, None]
    w22 = tl.load(w2_ptr + j * 9 + 8, mask=live, other=0.0)[:, None]

    above = tl.zeros((H, P), tl.float32)  # sums of the row above the one in hand
    here = tl.zeros((H, P), tl.float32)
    centre = tl.zeros((K, P), tl.float32)  # input of the row above
    for step in range(0, ROWS + 2):
        row = _reflected(y0 + step - 1, height, REPLICATE)
        hidden, x = _hidden(
            x_ptr, low_ptr, plane, row, left, width, w1, w1_rest, b1, FIRST, CHANNELS, K, HIGH
        )  # fmt: skip
        done = above + hidden * w20
        above = here + hidden * w10
        here = hidden * w00
        hidden, x = _hidden(
            x_ptr, low_ptr, plane, row, right, width, w1, w1_rest, b1, FIRST, CHANNELS, K, HIGH
        )  # fmt: skip
        done += hidden * w22
        above += hidden * w12
        here += hidden * w02
        hidden, x = _hidden(
            x_ptr, low_ptr, plane, row, middle, width, w1, w1_rest, b1, FIRST, CHANNELS, K, HIGH
        )  # fmt: skip
        done += hidden * w21
        above += hidden * w11
        here += hidden * w01
        y = y0 + step - 2
        if KEEP:
            mask = (columns < width) & (step >= 1) & (step <= ROWS) & (y + 1 < height)
            tl.store(sign_ptr + (y + 1) * width + columns, _signs(hidden, H), mask=mask)
        if (step >= 2) & (y < height):
            second = tl.maximum(done + b2, 0.0)
            if KEEP:
                tl.store(sign_ptr + plane + y * width + columns, _signs(second, H), mask=columns < width)
            places = y * width + columns[None, :]
            inside = (columns < width)[None, :]
            total = _multiply(w3, w3_rest, second, tl.zeros((K, P), tl.float32) + b3, HIGH)
            if SECOND:
                z_mask = (m < N1)[:, None] & inside
                eta = _multiply(w4, w4_rest, second, tl.zeros((K, P), tl.float32) + b4, HIGH)
                # clamp tanh(rho / clamp)
                e = tl.exp(-2.0 * tl.abs(total * inverse_clamp))
                bounded = clamp * (1.0 - e) / (1.0 + e)
                scale = tl.exp(tl.where(total < 0, -bounded, bounded))
                z1 = tl.load(z_ptr + m[:, None] * plane + places, mask=z_mask, other=0.0)
                if KEEP:
                    tl.store(z1_ptr + m[:, None] * plane + places, z1, mask=z_mask)
                tl.store(z_ptr + m[:, None] * plane + places, z1 * scale + eta, mask=z_mask)
                tl.store(scale_ptr + m[:, None] * plane + places, scale, mask=z_mask)
            else:
                total = _multiply(skip, skip_rest, centre, total, True)
                tl.store(z_ptr + m[:, None] * plane + places, total, mask=(m < CHANNELS)[:, None] & inside)
        centre = x


@triton.jit
def _output_gradient(
    gradient_ptr, scale_ptr, z1_ptr, plane, places, inside, inverse_clamp,
    CHANNELS: tl.constexpr, N1: tl.constexpr, K: tl.constexpr, SECOND: tl.constexpr,
):  # fmt: skip
    """Gradient of a bottleneck's output: of (rho, eta), or of phi in rows N1 to CHANNELS - 1."""
    k = tl.arange(0, K)[:, None]
    inside = inside[None, :]
    if SECOND:
        row = tl.where(k < N1, k, k - N1)
        gradient = tl.load(gradient_ptr + row * plane + places[None, :], mask=(k < 2 * N1) & inside, other=0.0)
        scale = tl.load(scale_ptr + k * plane + places[None, :], mask=(k < N1) & inside, other=1.0)
        z1 = tl.load(z1_ptr + k * plane + places[None, :], mask=(k < N1) & inside, other=0.0)
        bounded = tl.log(scale) * inverse_clamp
        return tl.where(k < N1, gradient * z1 * scale * (1.0 - bounded * bounded), gradient)
    else:
        mask = (k >= N1) & (k < CHANNELS) & inside
        return tl.load(gradient_ptr + k * plane + places[None, :], mask=mask, other=0.0)


@triton.jit
def _hidden_gradient(
    gradient_ptr, scale_ptr, z1_ptr, sign_ptr, plane, row, columns, height, width, inverse_clamp, w3, w3_rest,
    CHANNELS: tl.constexpr, N1: tl.constexpr, H: tl.constexpr, K: tl.constexpr, P: tl.constexpr, SECOND: tl.constexpr,
    HIGH: tl.constexpr,
):  # fmt: skip
    """Gradient before the second ReLU; 0 outside of the map."""
    inside = (columns >= 0) & (columns < width) & (row >= 0) & (row < height)
    places = row * width + columns
    gradient = _output_gradient(
        gradient_ptr, scale_ptr, z1_ptr, plane, places, inside, inverse_clamp, CHANNELS, N1, K, SECOND
    )  # fmt: skip
    hidden = _multiply(w3, w3_rest, gradient, tl.zeros((H, P), tl.float32), HIGH)
    return _where_positive(hidden, tl.load(sign_ptr + plane + places, mask=inside, other=0), H)


@triton.jit
def _where_positive(hidden, signs, H: tl.constexpr):
    return tl.where(((signs[None, :] >> tl.arange(0, H)[:, None]) & 1) != 0, hidden, 0.0)


@triton.jit
def _half_backward_kernel(
    gradient_ptr, found_ptr, low_ptr, scale_ptr, z1_ptr, sign_ptr, matrix_ptr, w1_ptr, w2_ptr, w3_ptr,
    height, width, inverse_clamp,
    CHANNELS: tl.constexpr, N1: tl.constexpr, HIDDEN: tl.constexpr, H: tl.constexpr, K: tl.constexpr,
    P: tl.constexpr, ROWS: tl.constexpr, SECOND: tl.constexpr, REPLICATE: tl.constexpr, HIGH: tl.constexpr,
):  # fmt: skip
    # Grid (strips, row blocks, batch). The second half comes first and writes the low-pass band's gradient, the first
    # half adds its own: each program reads and writes its own places.
    image = tl.program_id(2).to(tl.int64)
    plane = height * width
    gradient_ptr += image * CHANNELS * plane
    found_ptr += image * CHANNELS * plane
    low_ptr += image * 3 * plane
    scale_ptr += image * N1 * plane
    z1_ptr += image * N1 * plane
    sign_ptr += (image * 4 + (2 if SECOND else 0)) * plane
    y0 = tl.program_id(1) * ROWS
    columns = tl.program_id(0) * P + tl.arange(0, P)

    j = tl.arange(0, H)
    k = tl.arange(0, K)
    live = j < HIDDEN
    N2: tl.constexpr = CHANNELS - N1
    if SECOND:
        w3_mask = live[:, None] & (k < 2 * N1)[None, :]
        w3 = tl.load(w3_ptr + k[None, :] * HIDDEN + j[:, None], mask=w3_mask, other=0.0)
        inner = (k >= N1) & (k < CHANNELS + 3)
        w1 = tl.load(w1_ptr + j[None, :] * (N2 + 3) + (k - N1)[:, None], mask=live[None, :] & inner[:, None], other=0.0)
    else:
        w3_mask = live[:, None] & ((k >= N1) & (k < CHANNELS))[None, :]
        w3 = tl.load(w3_ptr + (k - N1)[None, :] * HIDDEN + j[:, None], mask=w3_mask, other=0.0)
        mixing = tl.load(
            matrix_ptr + k[None, :] * CHANNELS + k[:, None],
            mask=(k < CHANNELS)[:, None] & (k < CHANNELS)[None, :],
            other=0.0,
        )  # transposed
        w1 = tl.load(w1_ptr + j[None, :] * (N1 + 3) + k[:, None], mask=live[None, :] & (k < N1)[:, None], other=0.0)
        w1 = tl.dot(mixing, w1, input_precision="ieee")
        inner = (k >= CHANNELS) & (k < CHANNELS + 3)
        w1 += tl.load(
            w1_ptr + j[None, :] * (N1 + 3) + (N1 + k - CHANNELS)[:, None],
            mask=live[None, :] & inner[:, None],
            other=0.0,
        )
        skip, skip_rest = _halves(mixing)
    w1, w1_rest = _halves(w1)
    w3, w3_rest = _halves(w3)

    # A location gets from its neighbours, and at the borders from what was reflected: their taps add up.
    if REPLICATE:
        left_fold = (columns < 0).to(tl.float32)[None, :]
        right_fold = left_fold
        first_fold = (columns == 0).to(tl.float32)[None, :]
        last_fold = (columns == width - 1).to(tl.float32)[None, :]
    else:
        left_fold = (columns == 1).to(tl.float32)[None, :]
        right_fold = (columns == width - 2).to(tl.float32)[None, :]
        first_fold = (columns < 0).to(tl.float32)[None, :]
        last_fold = first_fold
    above = tl.zeros((H, P), tl.float32)
    here = tl.zeros((H, P), tl.float32)
    for step in range(0, ROWS + 2):
        row = y0 + step - 1
        left = _hidden_gradient(
            gradient_ptr, scale_ptr, z1_ptr, sign_ptr, plane, row, columns - 1, height, width, inverse_clamp,
            w3, w3_rest, CHANNELS, N1, H, K, P, SECOND, HIGH,
        )  # fmt: skip
        middle = _hidden_gradient(
            gradient_ptr, scale_ptr, z1_ptr, sign_ptr, plane, row, columns, height, width, inverse_clamp,
            w3, w3_rest, CHANNELS, N1, H, K, P, SECOND, HIGH,
        )  # fmt: skip
        right = _hidden_gradient(
            gradient_ptr, scale_ptr, z1_ptr, sign_ptr, plane, row, columns + 1, height, width, inverse_clamp,
            w3, w3_rest, CHANNELS, N1, H, K, P, SECOND, HIGH,
        )  # fmt: skip
        to_first = right + first_fold * middle + left_fold * left  # of taps 0, 3, 6
        to_last = left + last_fold * middle + right_fold * right
        up = _taps(w2_ptr, j, live, 0) * to_first + _taps(w2_ptr, j, live, 1) * middle
        up += _taps(w2_ptr, j, live, 2) * to_last
        same = _taps(w2_ptr, j, live, 3) * to_first + _taps(w2_ptr, j, live, 4) * middle
        same += _taps(w2_ptr, j, live, 5) * to_last
        down = _taps(w2_ptr, j, live, 6) * to_first + _taps(w2_ptr, j, live, 7) * middle
        down += _taps(w2_ptr, j, live, 8) * to_last
        if row == 0:  # the row above is row 1, or this one
            if REPLICATE:
                same += up
            else:
                down += up
            up = up * 0.0
        if row == height - 1:
            if REPLICATE:
                same += _last_down(w2_ptr, j, live, to_first, middle, to_last)
            else:
                up += _last_down(w2_ptr, j, live, to_first, middle, to_last)
        done = above + up
        above = here + same
        here = down
        y = row - 1
        if (step >= 2) & (y < height):
            inside = columns < width
            places = y * width + columns
            signs = tl.load(sign_ptr + places, mask=inside, other=0)
            total = _multiply(w1, w1_rest, _where_positive(done, signs, H), tl.zeros((K, P), tl.float32), HIGH)
            offsets = k[:, None] * plane + places[None, :]
            mask = (k < CHANNELS)[:, None] & inside[None, :]
            gradient = tl.load(gradient_ptr + offsets, mask=mask, other=0.0)
            low_mask = ((k >= CHANNELS) & (k < CHANNELS + 3))[:, None] & inside[None, :]
            low = low_ptr + (k - CHANNELS)[:, None] * plane + places[None, :]
            if SECOND:
                scale = tl.load(scale_ptr + offsets, mask=(k < N1)[:, None] & inside[None, :], other=1.0)
                total += gradient * scale
            else:
                total = _multiply(skip, skip_rest, gradient, total, True)
                total += tl.load(low, mask=low_mask, other=0.0)
            tl.store(found_ptr + offsets, total, mask=mask)
            tl.store(low, total, mask=low_mask)


@triton.jit
def _taps(w2_ptr, j, live, tap):
    return tl.load(w2_ptr + j * 9 + tap, mask=live, other=0.0)[:, None]


@triton.jit
def _last_down(w2_ptr, j, live, to_first, middle, to_last):
    down = _taps(w2_ptr, j, live, 6) * to_first + _taps(w2_ptr, j, live, 7) * middle
    return down + _taps(w2_ptr, j, live, 8) * to_last
