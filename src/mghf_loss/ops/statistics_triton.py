"""Triton kernels of the second-order statistics.

Forward: every program reads a run of places ("split") of a block of channels once, for the block's Gram difference
and moments; channels beyond one block get a second kernel for the blocks off the diagonal. Partial results are
added up by a second stage in a fixed order: there are no atomics, two runs agree bit for bit.

Backward: every program writes a tile of places of a block of channels.

Precision of the products: `fast` rounds the second operand to tf32 by integer arithmetic, because tensor cores
truncate, which would shrink every product (relative bias 7e-4, by simulation), and multiplies the first one as tf32
plus a remainder: relative error 2.1e-4 where rounding both gives 3e-4. `high` is float32 ("ieee").
The block sizes come from compiling for sm_80, sm_90 and sm_120 without register spills; none has been timed on a GPU.
"""

# Compile-time parameters take plain Python values.
# pyright: reportArgumentType=false

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

CHANNEL_BLOCK = 128  # channels of a block at most, half as many off Hopper; more take several blocks
PARTIAL_SHARE = 0.25  # partial Gram matrices may take this share of the inputs' bytes
MOMENTS = 6
MOMENT_PARTS = 8  # of a split: pivots, means relative to them, centred sums


@dataclass(frozen=True)
class Tiles:
    """Block sizes and launch options of the kernels, for a number of channels."""

    channels: int  # of a block
    blocks: int  # of channels
    places: int  # of a step of the forward loop
    options: dict[str, int | bool]  # num_warps, num_stages of the blocks on the diagonal
    off_options: dict[str, int | bool]  # likewise off it
    back_inner: int  # channels of a step of the backward loop
    back_places: int
    back_options: dict[str, int | bool]


# The first row that fits is taken, None fits all. Which features: channels of a block at most, precision, `aligned`,
# Hopper GPU, one block, bytes of a number. Then (places, warps, stages) of the forward kernel on the diagonal, (warps,
# stages) off it, (channels of a step or None for the whole block, places, warps, stages) of the backward kernel.
TILES: tuple[tuple[Any, ...], ...] = (
    # Small tiles, and no block off the diagonal.
    ((16, "fast", True, None, True, None), (64, 4, 3), None, (None, 128, 4, 1)),
    ((16, "high", True, None, True, None), (64, 4, 3), None, (None, 64, 4, 1)),
    ((16, "fast", False, None, True, None), (32, 4, 3), None, (None, 128, 4, 1)),
    ((16, "high", False, None, True, None), (32, 4, 3), None, (None, 64, 4, 1)),
    # Loads are not vectors, and addresses take registers: smaller tiles, fewer stages.
    ((64, "fast", False, None, None, None), (16, 8, 2), (8, 2), (32, 32, 8, 1)),
    ((64, "high", False, None, None, None), (32, 8, 1), (8, 1), (16, 32, 8, 1)),
    ((128, "fast", False, None, None, None), (16, 8, 1), (8, 1), (32, 32, 8, 1)),
    ((128, "high", False, None, None, None), (16, 8, 1), (8, 1), (16, 32, 8, 1)),
    # A product of 64 rows occupies four warps, eight make it twice; off Hopper four would spill in float32.
    ((64, "fast", True, True, True, 4), (32, 4, 3), None, (None, 64, 8, 1)),
    ((64, "fast", True, False, True, 4), (32, 8, 3), None, (None, 32, 8, 1)),
    # 16 bits: half the bytes of a tile.
    ((64, "fast", True, True, True, 2), (64, 8, 3), None, (None, 64, 8, 1)),
    ((64, "fast", True, False, True, 2), (32, 4, 3), None, (None, 32, 8, 1)),
    # Several blocks of 64, off Hopper: a program off the diagonal holds both matrices of two blocks.
    ((64, "fast", True, False, False, None), (16, 4, 3), (8, 3), (32, 32, 8, 1)),
    # Products in float32 run on the ordinary cores, and both operands take registers.
    ((64, "high", True, None, None, None), (32, 8, 2), (8, 2), (16, 64, 8, 1)),
    # Hopper, whose 227 KB of shared memory hold blocks of 128; other GPUs have 99 KB at least.
    ((128, "fast", True, True, None, None), (32, 8, 3), (8, 2), (32, 64, 8, 2)),
    ((128, "high", True, True, None, None), (16, 8, 2), (8, 2), (16, 64, 8, 1)),
)


@cache
def tiles(channels: int, itemsize: int, precision: str, capability: tuple[int, int], aligned: bool) -> Tiles:
    """Choose block sizes for features of `itemsize` bytes; `aligned`: places and strides divide by 16."""
    hopper = capability[0] == 9
    largest = CHANNEL_BLOCK if hopper else CHANNEL_BLOCK // 2
    block = min(largest, max(16, triton.next_power_of_2(channels)))
    blocks = triton.cdiv(channels, block)
    features = (precision, aligned, hopper, blocks == 1, itemsize)
    (places, *options), off, (inner, *back) = next(
        row
        for (most, *wanted), *row in TILES
        if block <= most and all(want in (None, found) for want, found in zip(wanted, features, strict=True))
    )
    return Tiles(
        channels=block,
        blocks=blocks,
        places=places,
        options=launch_options(*options),
        off_options=launch_options(*(off or options)),
        back_inner=inner or block,
        back_places=back[0],
        back_options=launch_options(*back[1:]),
    )


def statistics_triton(
    sr: Tensor, gt: Tensor, keep: Tensor | None, gram: bool, precision: str, *, stages: int | None = None
) -> tuple[Tensor, Tensor]:
    """As `statistics_formula`, by kernels. `stages` overrides num_stages, to test that it changes nothing."""
    x, y = _map(sr), _map(gt)
    batch, channels, places = x.shape
    capability, processors = device_properties(x.device)
    tile = tiles(channels, x.element_size(), precision, capability, _aligned(x, y))
    split_places = _split_places(x, tile, gram, processors)
    splits = triton.cdiv(places, split_places)
    pairs = tile.blocks * (tile.blocks - 1) // 2
    slots = tile.blocks + pairs if gram else 0
    gram_parts = x.new_empty((batch, splits, slots, tile.channels, tile.channels), dtype=torch.float32)
    moment_parts = x.new_empty((batch, splits, MOMENT_PARTS, channels), dtype=torch.float32)
    moments = x.new_empty((batch, MOMENTS, channels), dtype=torch.float32)
    gram_difference = x.new_empty((batch, channels, channels) if gram else 0, dtype=torch.float32)
    arguments = (x, y, moment_parts if keep is None else keep.contiguous(), gram_parts)
    sizes = (channels, places, splits, split_places, *x.stride(), *y.stride())
    constants = {
        "BLOCK_C": tile.channels,
        "BLOCK_P": tile.places,
        "BLOCKS": tile.blocks,
        "PRUNED": keep is not None,
        "PRECISION": precision,
    }
    options = tile.options if stages is None else {**tile.options, "num_stages": stages}
    _diagonal_kernel[(splits * tile.blocks, batch)](*arguments, moment_parts, *sizes, **constants, GRAM=gram, **options)
    if gram and pairs:
        options = tile.off_options if stages is None else {**tile.off_options, "num_stages": stages}
        _off_diagonal_kernel[(splits * pairs, batch)](*arguments, *sizes, **constants, **options)
    if gram:
        rows = 16
        _add_gram_kernel[(slots * tile.channels // rows, batch)](
            gram_parts,
            gram_difference,
            channels,
            splits,
            0.5 / (channels * places),
            BLOCK_C=tile.channels,
            BLOCKS=tile.blocks,
            ROWS=rows,
            **launch_options(4, 2),
        )
    _merge_moments_kernel[(triton.cdiv(channels, 16), batch)](
        moment_parts, moments, channels, places, splits, split_places, BLOCK_C=16, BLOCK_S=32, **launch_options(4, 1)
    )
    return gram_difference, moments


def backward_triton(
    sr: Tensor,
    gt: Tensor,
    keep: Tensor | None,
    moments: Tensor,
    gram_gradient: Tensor | None,
    moment_gradient: Tensor,
    precision: str,
) -> Tensor:
    """As `backward_formula`, by one kernel."""
    x, y = _map(sr), _map(gt)
    batch, channels, places = x.shape
    tile = tiles(channels, x.element_size(), precision, device_properties(x.device)[0], _aligned(x, y))
    gradient = torch.empty_like(sr, memory_format=torch.contiguous_format)
    moments = moments.contiguous()
    grid = (triton.cdiv(places, tile.back_places), tile.blocks, batch)
    _backward_kernel[grid](
        x,
        y,
        moments if keep is None else keep.contiguous(),
        moments,
        moments if gram_gradient is None else gram_gradient.contiguous(),
        moment_gradient.contiguous(),
        gradient,
        channels,
        places,
        1 / places,
        1 / (channels * places),
        *x.stride(),
        *y.stride(),
        BLOCK_C=tile.channels,
        BLOCK_K=tile.back_inner,
        BLOCK_P=tile.back_places,
        PRUNED=keep is not None,
        GRAM=gram_gradient is not None,
        PRECISION=precision,
        **tile.back_options,
    )
    return gradient


@cache
def device_properties(device: torch.device) -> tuple[tuple[int, int], int]:
    """Compute capability and number of multiprocessors; the interpreter's stand-in where there is no GPU."""
    if device.type != "cuda":
        return (8, 0), 2
    properties = torch.cuda.get_device_properties(device)
    return (properties.major, properties.minor), properties.multi_processor_count


def launch_options(warps: int, stages: int) -> dict[str, int | bool]:
    """Options of a kernel launch."""
    return {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True}  # Triton 3.10 turns fusion off


def _map(level: Tensor) -> Tensor:
    """Features as (B, C, N), such that offsets along the places fit into the kernels' 32 bits."""
    level = level.flatten(2)
    return level if level.shape[2] * level.stride(2) < 2**31 else level.contiguous()


def _aligned(x: Tensor, y: Tensor) -> bool:
    return all(size % 16 == 0 for size in (x.shape[2], *x.stride()[:2], *y.stride()[:2]))


def _split_places(x: Tensor, tile: Tiles, gram: bool, processors: int) -> int:
    """Places of a split: two programs for each multiprocessor, unless the partial results became too large."""
    batch, channels, places = x.shape
    steps = triton.cdiv(places, tile.places)
    wanted = max(1, 2 * processors // (batch * tile.blocks))
    split = max(min(4, steps), triton.cdiv(steps, wanted))
    if gram:
        partial = tile.channels**2 * 4 * (tile.blocks * (tile.blocks + 1) // 2)
        step_bytes = 2 * channels * tile.places * x.element_size()
        split = max(split, int(partial / (PARTIAL_SHARE * step_bytes)))
    return min(split, steps) * tile.places


@triton.jit
def _round_tf32(x):
    # To nearest, ties away from zero. Tensor cores drop the low 13 bits. The minimum keeps a NaN of all ones, such as
    # GPUs make, from overflowing into the sign, or as a negative one to 0; a comparison of x with itself would take
    # registers to the point of spills.
    bits = x.to(tl.int32, bitcast=True)
    bits = tl.minimum(bits, (bits & -2147483648) | 0x7FFFEFFF)
    return ((bits + 0x1000) & -8192).to(tl.float32, bitcast=True)


@triton.jit
def _product(a, b, total, PRECISION: tl.constexpr):
    """total + a @ b"""
    if PRECISION == "fast":
        head, b = _round_tf32(a), _round_tf32(b)
        total = tl.dot(a - head, b, total, input_precision="tf32")
        return tl.dot(head, b, total, input_precision="tf32")
    else:
        return tl.dot(a, b, total, input_precision="ieee")


@triton.jit
def _kept(keep_ptr, image, rows, channels, PRUNED: tl.constexpr):
    """Which channels are read."""
    inside = rows < channels
    if PRUNED:
        inside = inside & (tl.load(keep_ptr + image * channels + rows, mask=inside, other=0) != 0)
    return inside


@triton.jit
def _diagonal_kernel(
    x_ptr, y_ptr, keep_ptr, gram_ptr, moment_ptr,
    channels, places, splits, split_places,
    x_image, x_channel, x_place, y_image, y_channel, y_place,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, BLOCKS: tl.constexpr,
    PRUNED: tl.constexpr, PRECISION: tl.constexpr, GRAM: tl.constexpr,
):  # fmt: skip
    # Grid (splits * BLOCKS, batch), blocks fastest.
    block = tl.program_id(0) % BLOCKS
    split = tl.program_id(0) // BLOCKS
    image = tl.program_id(1).to(tl.int64)
    rows = block * BLOCK_C + tl.arange(0, BLOCK_C)
    read = _kept(keep_ptr, image, rows, channels, PRUNED)[:, None]
    x_rows = x_ptr + image * x_image + rows.to(tl.int64)[:, None] * x_channel
    y_rows = y_ptr + image * y_image + rows.to(tl.int64)[:, None] * y_channel
    first = split * split_places
    last = tl.minimum(first + split_places, places)

    # Sums of values minus a pivot near the mean do not cancel: the mean of the first tile.
    columns = first + tl.arange(0, BLOCK_P)[None, :]
    mask = read & (columns < last)
    count = tl.minimum(last - first, BLOCK_P).to(tl.float32)
    x_pivot = tl.sum(tl.load(x_rows + columns * x_place, mask=mask, other=0.0).to(tl.float32), 1) / count
    y_pivot = tl.sum(tl.load(y_rows + columns * y_place, mask=mask, other=0.0).to(tl.float32), 1) / count

    gram = tl.zeros((BLOCK_C, BLOCK_C), tl.float32)
    x_sum = tl.zeros((BLOCK_C,), tl.float32)
    y_sum = tl.zeros((BLOCK_C,), tl.float32)
    xx_sum = tl.zeros((BLOCK_C,), tl.float32)
    yy_sum = tl.zeros((BLOCK_C,), tl.float32)
    xy_sum = tl.zeros((BLOCK_C,), tl.float32)
    error = tl.zeros((BLOCK_C,), tl.float32)
    for start in range(first, last, BLOCK_P):
        columns = start + tl.arange(0, BLOCK_P)[None, :]
        mask = read & (columns < last)
        x = tl.load(x_rows + columns * x_place, mask=mask, other=0.0).to(tl.float32)
        y = tl.load(y_rows + columns * y_place, mask=mask, other=0.0).to(tl.float32)
        d = x - y
        if GRAM:
            gram = _product(d, tl.trans(x + y), gram, PRECISION)
        error += tl.sum(d * d, 1)
        u = tl.where(mask, x - x_pivot[:, None], 0.0)
        v = tl.where(mask, y - y_pivot[:, None], 0.0)
        x_sum += tl.sum(u, 1)
        y_sum += tl.sum(v, 1)
        xx_sum += tl.sum(u * u, 1)
        yy_sum += tl.sum(v * v, 1)
        xy_sum += tl.sum(u * v, 1)

    count = (last - first).to(tl.float32)
    part = moment_ptr + (image * splits + split) * 8 * channels + rows
    inside = rows < channels
    tl.store(part, x_pivot, mask=inside)
    tl.store(part + channels, y_pivot, mask=inside)
    tl.store(part + 2 * channels, x_sum / count, mask=inside)
    tl.store(part + 3 * channels, y_sum / count, mask=inside)
    tl.store(part + 4 * channels, xx_sum - x_sum * (x_sum / count), mask=inside)
    tl.store(part + 5 * channels, yy_sum - y_sum * (y_sum / count), mask=inside)
    tl.store(part + 6 * channels, xy_sum - x_sum * (y_sum / count), mask=inside)
    tl.store(part + 7 * channels, error, mask=inside)
    if GRAM:
        slot = (image * splits + split) * (BLOCKS * (BLOCKS + 1) // 2) + block
        square = tl.arange(0, BLOCK_C)[:, None] * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
        tl.store(gram_ptr + slot * BLOCK_C * BLOCK_C + square, gram)


@triton.jit
def _pair(index):
    """Row and column block of the index-th pair row < column: (0, 1), (0, 2), (1, 2), (0, 3), ..."""
    row = index
    column = index * 0 + 1
    while row >= column:
        row -= column
        column += 1
    return row, column


@triton.jit
def _off_diagonal_kernel(
    x_ptr, y_ptr, keep_ptr, gram_ptr,
    channels, places, splits, split_places,
    x_image, x_channel, x_place, y_image, y_channel, y_place,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, BLOCKS: tl.constexpr,
    PRUNED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    # Grid (splits * pairs, batch), pairs fastest: programs that share places run together and share the L2 cache.
    # d_i m_j^T + m_i d_j^T, twice the block (i, j) of the symmetric Gram difference.
    pairs: tl.constexpr = BLOCKS * (BLOCKS - 1) // 2
    pair = tl.program_id(0) % pairs
    split = tl.program_id(0) // pairs
    image = tl.program_id(1).to(tl.int64)
    block_i, block_j = _pair(pair)
    rows_i = block_i * BLOCK_C + tl.arange(0, BLOCK_C)
    rows_j = block_j * BLOCK_C + tl.arange(0, BLOCK_C)
    read_i = _kept(keep_ptr, image, rows_i, channels, PRUNED)[:, None]
    read_j = _kept(keep_ptr, image, rows_j, channels, PRUNED)[:, None]
    x_i = x_ptr + image * x_image + rows_i.to(tl.int64)[:, None] * x_channel
    y_i = y_ptr + image * y_image + rows_i.to(tl.int64)[:, None] * y_channel
    x_j = x_ptr + image * x_image + rows_j.to(tl.int64)[:, None] * x_channel
    y_j = y_ptr + image * y_image + rows_j.to(tl.int64)[:, None] * y_channel
    first = split * split_places
    last = tl.minimum(first + split_places, places)
    gram = tl.zeros((BLOCK_C, BLOCK_C), tl.float32)
    for start in range(first, last, BLOCK_P):
        columns = start + tl.arange(0, BLOCK_P)[None, :]
        inside = columns < last
        a = tl.load(x_i + columns * x_place, mask=read_i & inside, other=0.0).to(tl.float32)
        b = tl.load(y_i + columns * y_place, mask=read_i & inside, other=0.0).to(tl.float32)
        c = tl.load(x_j + columns * x_place, mask=read_j & inside, other=0.0).to(tl.float32)
        d = tl.load(y_j + columns * y_place, mask=read_j & inside, other=0.0).to(tl.float32)
        gram = _product(a - b, tl.trans(c + d), gram, PRECISION)
        gram = _product(a + b, tl.trans(c - d), gram, PRECISION)
    slot = (image * splits + split) * (BLOCKS * (BLOCKS + 1) // 2) + BLOCKS + pair
    square = tl.arange(0, BLOCK_C)[:, None] * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    tl.store(gram_ptr + slot * BLOCK_C * BLOCK_C + square, gram)


@triton.jit
def _add_gram_kernel(
    part_ptr, gram_ptr, channels, splits, scale,
    BLOCK_C: tl.constexpr, BLOCKS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    # Grid (slots * BLOCK_C / ROWS, batch). Adds the splits in order, symmetrises, scales.
    slots: tl.constexpr = BLOCKS * (BLOCKS + 1) // 2
    strips: tl.constexpr = BLOCK_C // ROWS
    slot = tl.program_id(0) // strips
    image = tl.program_id(1).to(tl.int64)
    first = (tl.program_id(0) % strips) * ROWS
    rows = first + tl.arange(0, ROWS)[:, None]
    columns = tl.arange(0, BLOCK_C)[None, :]
    off = slot >= BLOCKS
    block_i, block_j = _pair(tl.maximum(slot - BLOCKS, 0))
    block_i = tl.where(off, block_i, slot)
    block_j = tl.where(off, block_j, slot)
    total = tl.zeros((ROWS, BLOCK_C), tl.float32)
    # The strip of the transposed block as it lies in memory: turned once, not in each step through shared memory.
    transposed = tl.zeros((BLOCK_C, ROWS), tl.float32)
    lines = tl.arange(0, BLOCK_C)[:, None] * BLOCK_C + first + tl.arange(0, ROWS)[None, :]
    for split in range(0, splits):
        part = part_ptr + ((image * splits + split) * slots + slot) * BLOCK_C * BLOCK_C
        total += tl.load(part + rows * BLOCK_C + columns)
        if slot < BLOCKS:
            transposed += tl.load(part + lines)
    total = (total + tl.trans(transposed)) * scale
    rows += block_i * BLOCK_C
    columns += block_j * BLOCK_C
    inside = (rows < channels) & (columns < channels)
    square = gram_ptr + image * channels * channels
    tl.store(square + rows * channels + columns, total, mask=inside)
    if off:
        tl.store(square + columns * channels + rows, total, mask=inside)


@triton.jit
def _merge_moments_kernel(
    part_ptr, moment_ptr, channels, places, splits, split_places,
    BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    # Grid (channel blocks, batch). Chan, Golub and LeVeque's update: sums about the means of the splits, plus the
    # spread of these means, which are kept relative to the first pivot: no digits are lost to a large mean.
    image = tl.program_id(1).to(tl.int64)
    columns = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = columns < channels
    origin = part_ptr + image * splits * 8 * channels + columns
    x_origin = tl.load(origin, mask=inside, other=0.0)
    y_origin = tl.load(origin + channels, mask=inside, other=0.0)
    parts = origin[None, :]
    total = places * 1.0  # a single place is a compile-time constant, without .to

    x_mean = tl.zeros((BLOCK_C,), tl.float32)
    y_mean = tl.zeros((BLOCK_C,), tl.float32)
    for start in range(0, splits, BLOCK_S):
        rows = start + tl.arange(0, BLOCK_S)[:, None]
        mask = (rows < splits) & inside[None, :]
        part = parts + rows * 8 * channels
        count = tl.maximum(tl.minimum(places - rows * split_places, split_places), 0).to(tl.float32)
        x = tl.load(part, mask=mask, other=0.0) - x_origin[None, :] + tl.load(part + 2 * channels, mask=mask, other=0.0)
        y = tl.load(part + channels, mask=mask, other=0.0) - y_origin[None, :]
        y += tl.load(part + 3 * channels, mask=mask, other=0.0)
        x_mean += tl.sum(count * x, 0)
        y_mean += tl.sum(count * y, 0)
    x_mean = x_mean / total
    y_mean = y_mean / total

    xx = tl.zeros((BLOCK_C,), tl.float32)
    yy = tl.zeros((BLOCK_C,), tl.float32)
    xy = tl.zeros((BLOCK_C,), tl.float32)
    error = tl.zeros((BLOCK_C,), tl.float32)
    for start in range(0, splits, BLOCK_S):
        rows = start + tl.arange(0, BLOCK_S)[:, None]
        mask = (rows < splits) & inside[None, :]
        part = parts + rows * 8 * channels
        count = tl.maximum(tl.minimum(places - rows * split_places, split_places), 0).to(tl.float32)
        x = tl.load(part, mask=mask, other=0.0) - x_origin[None, :] + tl.load(part + 2 * channels, mask=mask, other=0.0)
        y = tl.load(part + channels, mask=mask, other=0.0) - y_origin[None, :]
        y += tl.load(part + 3 * channels, mask=mask, other=0.0)
        x -= x_mean[None, :]
        y -= y_mean[None, :]
        xx += tl.sum(tl.load(part + 4 * channels, mask=mask, other=0.0) + count * x * x, 0)
        yy += tl.sum(tl.load(part + 5 * channels, mask=mask, other=0.0) + count * y * y, 0)
        xy += tl.sum(tl.load(part + 6 * channels, mask=mask, other=0.0) + count * x * y, 0)
        error += tl.sum(tl.load(part + 7 * channels, mask=mask, other=0.0), 0)

    moment = moment_ptr + image * 6 * channels + columns
    tl.store(moment, x_origin + x_mean, mask=inside)
    tl.store(moment + channels, y_origin + y_mean, mask=inside)
    tl.store(moment + 2 * channels, tl.maximum(xx / total, 0.0), mask=inside)
    tl.store(moment + 3 * channels, tl.maximum(yy / total, 0.0), mask=inside)
    tl.store(moment + 4 * channels, xy / total, mask=inside)
    tl.store(moment + 5 * channels, error / total, mask=inside)


@triton.jit
def _mixing(gradient_ptr, rows, columns, channels, live, scale):
    """A block of A: the gradient of the Gram difference plus its transpose, scaled."""
    mask = live & (columns < channels)[None, :]
    gradient = tl.load(gradient_ptr + rows[:, None] * channels + columns[None, :], mask=mask, other=0.0)
    transposed = tl.load(gradient_ptr + columns[None, :] * channels + rows[:, None], mask=mask, other=0.0)
    return (gradient + transposed) * scale


@triton.jit
def _backward_kernel(
    x_ptr, y_ptr, keep_ptr, moment_ptr, gram_gradient_ptr, moment_gradient_ptr, gradient_ptr,
    channels, places, moment_scale, gram_scale,
    x_image, x_channel, x_place, y_image, y_channel, y_place,
    BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_P: tl.constexpr,
    PRUNED: tl.constexpr, GRAM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    # Grid (place tiles, channel blocks, batch).
    image = tl.program_id(2).to(tl.int64)
    rows = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    columns = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)[None, :]
    inside = rows < channels
    kept = _kept(keep_ptr, image, rows, channels, PRUNED)
    read = kept[:, None] & (columns < places)
    x_images = x_ptr + image * x_image + columns * x_place
    x = tl.load(x_images + rows.to(tl.int64)[:, None] * x_channel, mask=read, other=0.0).to(tl.float32)
    mixed = tl.zeros((BLOCK_C, BLOCK_P), tl.float32)
    if GRAM:
        gram_gradient = gram_gradient_ptr + image * channels * channels
        if BLOCK_K == BLOCK_C:  # all channels are in this block
            matrix = _mixing(gram_gradient, rows, rows, channels, kept[:, None], gram_scale)
            mixed = _product(matrix, x, mixed, PRECISION)
        else:
            for start in range(0, channels, BLOCK_K):
                inner = start + tl.arange(0, BLOCK_K)
                matrix = _mixing(gram_gradient, rows, inner, channels, kept[:, None], gram_scale)
                other_mask = _kept(keep_ptr, image, inner, channels, PRUNED)[:, None] & (columns < places)
                other = tl.load(x_images + inner.to(tl.int64)[:, None] * x_channel, mask=other_mask, other=0.0)
                mixed = _product(matrix, other.to(tl.float32), mixed, PRECISION)
    y_rows = y_ptr + image * y_image + rows.to(tl.int64)[:, None] * y_channel
    y = tl.load(y_rows + columns * y_place, mask=read, other=0.0).to(tl.float32)
    moment = moment_ptr + image * 6 * channels + rows
    x_mean = tl.load(moment, mask=kept, other=0.0)[:, None]
    y_mean = tl.load(moment + channels, mask=kept, other=0.0)[:, None]
    upstream = moment_gradient_ptr + image * 6 * channels + rows
    of_mean = tl.load(upstream, mask=kept, other=0.0)[:, None]
    of_variance = tl.load(upstream + 2 * channels, mask=kept, other=0.0)[:, None]
    of_covariance = tl.load(upstream + 4 * channels, mask=kept, other=0.0)[:, None]
    of_error = tl.load(upstream + 5 * channels, mask=kept, other=0.0)[:, None]
    gradient = 2.0 * (of_error * (x - y) + of_variance * (x - x_mean)) + of_covariance * (y - y_mean) + of_mean
    gradient = mixed + moment_scale * gradient
    target = gradient_ptr + (image * channels + rows.to(tl.int64)[:, None]) * places + columns
    tl.store(target, gradient.to(gradient_ptr.dtype.element_ty), mask=inside[:, None] & (columns < places))
