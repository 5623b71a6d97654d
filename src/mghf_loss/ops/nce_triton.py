"""Triton kernels of modulated PatchNCE.

Both maps become unit vectors in fp16, once: unit vectors have no range to lose, so fp16 is as accurate as rounded tf32
at half the bytes and twice the rate. They are packed times 256, where fp16 keeps all its digits down to 2e-7. For
`high` a second fp16 number holds the rest of each entry, and a product takes three. All sums are float32, all
exponents base 2.

Then log w, by Sinkhorn, in one of two ways:

- up to STORED_PLACES, the logits are stored and one program does all iterations of an image in one launch;
- beyond, they are recomputed in tiles, one launch a half iteration. The largest change of a potential goes to
  memory (an atomic maximum, whose result does not depend on the order); later launches read it and return at once
  when the image has converged. So Sinkhorn stops early without the host waiting for the device.

Last, an online softmax over tiles of keys gives the loss and, like an attention with values = keys, its gradient.
Block sizes come from compiling for sm_80, sm_90 and sm_120 without register spills; none has been timed on a GPU.
"""

# Compile-time parameters take plain Python values, and tl.max may return several.
# pyright: reportArgumentType=false, reportOperatorIssue=false

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .statistics_triton import device_properties, launch_options

# Beyond this many places the logits are recomputed, up to it they are stored (float32, N^2 an image). The crossover has
# NOT been measured on a GPU yet; `benchmarks/ops.py` does. Derived from the machine code for an H100 at batch 16: 30 to
# 40 us for a stored half iteration at N = 512 (one program an image), against a launch (about 9 us) and a share of the
# device.
STORED_PLACES = 512
MAX_CHANNELS = 256  # a tile holds whole vectors
PADDING = 128  # places are padded to a multiple of every block size
LOG2_E = math.log2(math.e)
SCALE = 256.0  # of the packed unit vectors
# Iterations that are launched where one tile after the other is recomputed, at eps of at least 1 and a tolerance of at
# least 1e-4: photographs converge in 3 to 5, two antipodal clusters, the slowest found, in 10 (at eps = 0.5 in 53).
MOST_LAUNCHED = 12
# Up to here 2^(sharpness * s + g) cannot leave the range of float32 after one common shift, which saves the running
# maximum; 16 is eps = 0.09.
SHIFT_LIMIT = 16.0


@dataclass(frozen=True)
class Tiles:
    """Block sizes (rows, columns) and launch options, for a number of channels."""

    channels: int  # padded
    pack: tuple[int, dict[str, int | bool]]
    logits: tuple[int, int, dict[str, int | bool]]
    sinkhorn: tuple[int, int, dict[str, int | bool]]
    nce: tuple[int, int, dict[str, int | bool]]


# By padded channels at most, precision and whether it is a Hopper GPU: rows, columns, warps and stages of the kernels
# of logits, Sinkhorn and loss. A product of 64 rows occupies four warps; eight would make it twice.
TILES = {
    (64, "fast", True): ((128, 64, 8, 2), (128, 128, 8, 3), (128, 64, 8, 2)),
    (64, "fast", False): ((128, 64, 8, 2), (128, 128, 8, 3), (128, 64, 8, 2)),
    # Sinkhorn keeps no attended vectors, so its tiles may be larger.
    (128, "fast", True): ((64, 64, 4, 2), (128, 128, 8, 2), (64, 64, 4, 2)),
    (128, "fast", False): ((64, 64, 4, 2), (128, 64, 8, 2), (64, 64, 4, 2)),
    # Four warps would spill the attended vectors, 64 x 256.
    (256, "fast", True): ((64, 64, 4, 2), (128, 64, 8, 2), (64, 64, 8, 2)),
    (256, "fast", False): ((32, 32, 8, 2), (64, 64, 4, 2), (32, 32, 8, 2)),
    # Two fp16 numbers an entry: twice the bytes a tile.
    (64, "high", True): ((64, 64, 4, 2), (64, 64, 4, 2), (64, 64, 4, 2)),
    (64, "high", False): ((64, 64, 4, 2), (64, 64, 4, 2), (64, 32, 4, 2)),
    (128, "high", True): ((64, 32, 4, 2), (64, 32, 4, 2), (64, 32, 8, 2)),
    (128, "high", False): ((64, 32, 4, 2), (64, 32, 4, 2), (64, 32, 8, 1)),
    (256, "high", True): ((16, 32, 8, 2), (32, 32, 8, 2), (32, 32, 8, 1)),
    (256, "high", False): ((16, 32, 8, 2), (32, 32, 8, 2), (32, 32, 8, 1)),
}


def tiles(channels: int, precision: str, capability: tuple[int, int]) -> Tiles:
    """Choose block sizes."""
    padded = max(16, triton.next_power_of_2(channels))
    found = TILES[max(64, padded), precision, capability[0] == 9]
    kernels = [(rows, columns, launch_options(warps, stages)) for rows, columns, warps, stages in found]
    return Tiles(padded, (64 if padded <= 64 else 32, launch_options(4, 1)), *kernels)


def patch_nce_triton(
    sr: Tensor,
    gt: Tensor,
    temperature: float,
    modulation: str,
    eps: float,
    negative_weight: float,
    iterations: int,
    tolerance: float,
    with_jacobian: bool,
    precision: str,
    *,
    stages: int | None = None,
) -> tuple[Tensor, Tensor]:
    """As `patch_nce_formula`, by kernels. `stages` overrides num_stages, to test that it changes nothing."""
    batch, channels, places = sr.shape
    loss = sr.new_zeros((batch, places), dtype=torch.float32)
    jacobian = sr.new_zeros(sr.shape if with_jacobian else 0, dtype=torch.float32)
    if places < 2:  # no negatives
        return loss, jacobian
    if channels > MAX_CHANNELS:
        raise NotImplementedError(f"{channels} channels, the kernels take up to {MAX_CHANNELS}")
    tile = tiles(channels, precision, device_properties(sr.device)[0])
    high = precision == "high"
    stored = places <= STORED_PLACES
    padded = triton.cdiv(places, PADDING) * PADDING
    if stored:
        padded = triton.next_power_of_2(padded)
    query = sr.new_empty((1 + high, batch, padded, tile.channels), dtype=torch.float16)
    key = torch.empty_like(query)
    inverse_norm = sr.new_empty((batch, padded), dtype=torch.float32)
    positive = torch.empty_like(inverse_norm)
    rows, options = tile.pack
    _pack_kernel[(padded // rows, batch)](
        sr,
        gt,
        query,
        key,
        inverse_norm,
        positive,
        query[0].numel(),
        channels,
        places,
        padded,
        *sr.stride(),
        *gt.stride(),
        BLOCK_N=rows,
        D=tile.channels,
        HIGH=high,
        SCALE=SCALE,
        **options,
    )

    # Potentials in units of log 2; -inf on the padding makes every tail mask superfluous.
    row_potential = inverse_norm.new_full((batch, padded), -math.inf)
    row_potential[:, :places] = 0
    column_potential = row_potential.clone()
    slope = LOG2_E / temperature
    log_weight = math.log2(negative_weight)
    if modulation != "plain":
        sharpness = (LOG2_E if modulation == "hard" else -LOG2_E) / eps
        sinkhorn = _sinkhorn_stored if stored else _sinkhorn_streaming
        sinkhorn(
            query, key, row_potential, column_potential, places, sharpness, iterations, tolerance, tile, high, stages
        )
        slope += sharpness
        log_weight += math.log2(places - 1)

    rows, columns, options = tile.nce
    _nce_kernel[(padded // rows, batch)](
        query,
        key,
        row_potential,
        column_potential,
        positive,
        inverse_norm,
        loss,
        jacobian,
        query[0].numel(),
        channels,
        places,
        padded,
        slope / SCALE**2,
        log_weight,
        1 / temperature,
        BLOCK_M=rows,
        BLOCK_N=columns,
        D=tile.channels,
        HIGH=high,
        JACOBIAN=with_jacobian,
        SCALE=SCALE,
        **_with_stages(options, stages),
    )
    return loss, jacobian


def _sinkhorn_stored(
    query: Tensor,
    key: Tensor,
    row_potential: Tensor,
    column_potential: Tensor,
    places: int,
    sharpness: float,
    iterations: int,
    tolerance: float,
    tile: Tiles,
    high: bool,
    stages: int | None,
) -> None:
    batch, padded = row_potential.shape
    logits = row_potential.new_empty((batch, padded, padded))
    rows, columns, options = tile.logits
    _logits_kernel[(padded // rows, padded // columns, batch)](
        query,
        key,
        logits,
        query[0].numel(),
        places,
        padded,
        sharpness / SCALE**2,
        BLOCK_M=rows,
        BLOCK_N=columns,
        D=tile.channels,
        HIGH=high,
        **_with_stages(options, stages),
    )
    _stored_sinkhorn_kernel[(batch,)](
        logits,
        row_potential,
        column_potential,
        places,
        iterations,
        tolerance * LOG2_E,
        N=padded,
        BLOCK=8192 // padded,
        **launch_options(8, 1),
    )


def _sinkhorn_streaming(
    query: Tensor,
    key: Tensor,
    row_potential: Tensor,
    column_potential: Tensor,
    places: int,
    sharpness: float,
    iterations: int,
    tolerance: float,
    tile: Tiles,
    high: bool,
    stages: int | None,
) -> None:
    batch, padded = row_potential.shape
    if abs(sharpness) <= LOG2_E and tolerance >= 1e-4:
        iterations = min(iterations, MOST_LAUNCHED)
    # errors[i] is the largest change of a row potential in iteration i - 1; the first always runs.
    errors = row_potential.new_zeros((iterations + 1, batch))
    errors[0] = math.inf
    rows, columns, options = tile.sinkhorn
    for iteration in range(iterations):
        for from_vectors, to_vectors, given, updated, is_row in (
            (query, key, column_potential, row_potential, True),
            (key, query, row_potential, column_potential, False),
        ):
            _half_iteration_kernel[(padded // rows, batch)](
                from_vectors,
                to_vectors,
                given,
                updated,
                errors,
                query[0].numel(),
                places,
                padded,
                iteration,
                sharpness / SCALE**2,
                3 * abs(sharpness) + 1,
                tolerance * LOG2_E,
                BLOCK_M=rows,
                BLOCK_N=columns,
                D=tile.channels,
                HIGH=high,
                RUNNING_MAXIMUM=abs(sharpness) > SHIFT_LIMIT,
                TRACK=is_row,
                **_with_stages(options, stages),
            )


def _with_stages(options: dict[str, int | bool], stages: int | None) -> dict[str, int | bool]:
    return options if stages is None else {**options, "num_stages": stages}


@triton.jit
def _unit_rows(ptr, image_stride, channel_stride, place_stride, image, rows, channels, places, D: tl.constexpr):
    """Unit vectors and 1/norm of the places in `rows`; 0 where the vector is (below 1e-12)."""
    columns = tl.arange(0, D)
    mask = (rows[:, None] < places) & (columns[None, :] < channels)
    offsets = columns[None, :].to(tl.int64) * channel_stride + rows[:, None].to(tl.int64) * place_stride
    x = tl.load(ptr + image * image_stride + offsets, mask=mask, other=0.0).to(tl.float32)
    # Dividing by the largest entry first keeps squares of huge vectors in range.
    highest = tl.max(tl.abs(x), 1)
    inverse = tl.where(highest > 1e-12, 1.0 / tl.maximum(highest, 1e-12), 0.0)
    x = x * inverse[:, None]
    # The largest entry is 1 now, so the sum is at least 1 wherever it counts.
    inverse_length = 1.0 / tl.sqrt(tl.maximum(tl.sum(x * x, 1), 0.5))
    return x * inverse_length[:, None], inverse * inverse_length


@triton.jit
def _store_packed(ptr, plane, offsets, x, HIGH: tl.constexpr):
    head = x.to(tl.float16)
    tl.store(ptr + offsets, head)
    if HIGH:
        tl.store(ptr + plane + offsets, (x - head.to(tl.float32)).to(tl.float16))


@triton.jit
def _pack_kernel(
    sr_ptr, gt_ptr, query_ptr, key_ptr, inverse_norm_ptr, positive_ptr,
    plane, channels, places, padded,
    sr_image, sr_channel, sr_place, gt_image, gt_channel, gt_place,
    BLOCK_N: tl.constexpr, D: tl.constexpr, HIGH: tl.constexpr, SCALE: tl.constexpr,
):  # fmt: skip
    # Grid (padded / BLOCK_N, batch): (B, C, N) -> SCALE times unit vectors (B, padded, D), 1/norm of SR and q_i.k_i.
    image = tl.program_id(1).to(tl.int64)
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    query, inverse_norm = _unit_rows(sr_ptr, sr_image, sr_channel, sr_place, image, rows, channels, places, D)
    key, _ = _unit_rows(gt_ptr, gt_image, gt_channel, gt_place, image, rows, channels, places, D)
    offsets = (image * padded + rows[:, None]) * D + tl.arange(0, D)[None, :]
    _store_packed(query_ptr, plane, offsets, query * SCALE, HIGH)
    _store_packed(key_ptr, plane, offsets, key * SCALE, HIGH)
    tl.store(inverse_norm_ptr + image * padded + rows, inverse_norm)
    tl.store(positive_ptr + image * padded + rows, tl.sum(query * key, 1))


@triton.jit
def _vectors(ptr, plane, rows, D: tl.constexpr, HIGH: tl.constexpr):
    """Packed vectors (rows, D) and their remainders (themselves where there are none, then not used)."""
    offsets = rows[:, None] * D + tl.arange(0, D)[None, :]
    head = tl.load(ptr + offsets)
    if HIGH:
        rest = tl.load(ptr + plane + offsets)
    else:
        rest = head
    return head, rest


@triton.jit
def _similarities(query, query_rest, key, key_rest, HIGH: tl.constexpr):
    """SCALE^2 times q_i.k_j of a tile, (rows, columns)."""
    s = tl.dot(query, tl.trans(key))
    if HIGH:
        s = tl.dot(query, tl.trans(key_rest), s)
        s = tl.dot(query_rest, tl.trans(key), s)
    return s


@triton.jit
def _logits_kernel(
    query_ptr, key_ptr, logit_ptr, plane, places, padded, sharpness,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, D: tl.constexpr, HIGH: tl.constexpr,
):  # fmt: skip
    # Grid (row tiles, column tiles, batch): sharpness * s_ij, -inf on the diagonal.
    image = tl.program_id(2).to(tl.int64)
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    query, query_rest = _vectors(query_ptr + image * padded * D, plane, rows, D, HIGH)
    key, key_rest = _vectors(key_ptr + image * padded * D, plane, columns, D, HIGH)
    x = _similarities(query, query_rest, key, key_rest, HIGH) * sharpness
    x = tl.where(rows[:, None] == columns[None, :], float("-inf"), x)
    tl.store(logit_ptr + image * padded * padded + rows[:, None] * padded + columns[None, :], x)


@triton.jit
def _stored_update(
    logit_ptr, given_ptr, updated_ptr, start, own_stride, other_stride, places,
    N: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Update the potentials from `start` on, by -log2 sum_j 2^(logit_ij + given_j); return their largest change."""
    rows = start + tl.arange(0, BLOCK)
    columns = tl.arange(0, N)
    x = tl.load(logit_ptr + rows[:, None] * own_stride + columns[None, :] * other_stride)
    x += tl.load(given_ptr + columns)[None, :]
    highest = tl.maximum(tl.max(x, 1), -1e30)
    update = -(highest + tl.log2(tl.sum(tl.exp2(x - highest[:, None]), 1)))
    live = rows < places
    change = tl.where(live, tl.abs(update - tl.load(updated_ptr + rows)), 0.0)
    tl.debug_barrier()  # several warps hold the same rows: all have read the old potentials before one writes
    tl.store(updated_ptr + rows, tl.where(live, update, float("-inf")))
    return tl.max(change, 0)


@triton.jit
def _stored_sinkhorn_kernel(
    logit_ptr, f_ptr, g_ptr, places, iterations, tolerance,
    N: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # Grid (batch,). The barriers make one half iteration's potentials visible to all threads before the next.
    image = tl.program_id(0).to(tl.int64)
    logit_ptr += image * N * N
    f_ptr += image * N
    g_ptr += image * N
    iteration = places * 0
    error = tolerance + 1.0
    while (iteration < iterations) & (error >= tolerance):
        error = tolerance * 0.0
        for start in range(0, N, BLOCK):
            change = _stored_update(logit_ptr, g_ptr, f_ptr, start, N, 1, places, N, BLOCK)
            error = tl.maximum(error, change)
        tl.debug_barrier()
        for start in range(0, N, BLOCK):
            _stored_update(logit_ptr, f_ptr, g_ptr, start, 1, N, places, N, BLOCK)
        tl.debug_barrier()
        iteration += 1


@triton.jit
def _add_tile(
    total, highest, query, query_rest, key_ptr, plane, given_ptr, rows, start, sharpness,
    BLOCK_N: tl.constexpr, D: tl.constexpr, HIGH: tl.constexpr, RUNNING_MAXIMUM: tl.constexpr, DIAGONAL: tl.constexpr,
):  # fmt: skip
    """Add 2^(sharpness * s_ij + g_j - highest_i) over the columns from `start` on to `total`."""
    columns = start + tl.arange(0, BLOCK_N)
    key, key_rest = _vectors(key_ptr, plane, columns, D, HIGH)
    s = _similarities(query, query_rest, key, key_rest, HIGH)
    given = tl.load(given_ptr + columns)
    if RUNNING_MAXIMUM:
        x = s * sharpness + given[None, :]
        if DIAGONAL:
            x = tl.where(rows[:, None] == columns[None, :], float("-inf"), x)
        higher = tl.maximum(highest, tl.max(x, 1))
        total = total * tl.exp2(highest - higher) + tl.sum(tl.exp2(x - higher[:, None]), 1)
        highest = higher
    else:
        p = tl.exp2(s * sharpness + (given - highest)[None, :])
        if DIAGONAL:
            p = tl.where(rows[:, None] == columns[None, :], 0.0, p)
        total += tl.sum(p, 1)
    return total, highest


@triton.jit(do_not_specialize=["iteration"])
def _half_iteration_kernel(
    query_ptr, key_ptr, given_ptr, updated_ptr, error_ptr,
    plane, places, padded, iteration, sharpness, shift, tolerance,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, D: tl.constexpr, HIGH: tl.constexpr,
    RUNNING_MAXIMUM: tl.constexpr, TRACK: tl.constexpr,
):  # fmt: skip
    # Grid (padded / BLOCK_M, batch): f_i = -log2 sum_{j != i} 2^(sharpness * s_ij + g_j), unless converged.
    image = tl.program_id(1).to(tl.int64)
    batch = tl.num_programs(1)
    if tl.load(error_ptr + iteration * batch + image) >= tolerance:
        first = tl.program_id(0) * BLOCK_M
        rows = first + tl.arange(0, BLOCK_M)
        key_ptr += image * padded * D
        given_ptr += image * padded
        updated_ptr += image * padded
        query, query_rest = _vectors(query_ptr + image * padded * D, plane, rows, D, HIGH)
        total = tl.zeros((BLOCK_M,), tl.float32)
        if RUNNING_MAXIMUM:
            highest = tl.full((BLOCK_M,), -1e30, tl.float32)
        else:
            # |g_j - g_0| <= 2 |sharpness| and |s| <= 1: no exponent is above -1, none below -6 |sharpness| - 1.
            highest = tl.load(given_ptr) + shift
        # The tiles on the diagonal come first, so that the rest needs no mask.
        for start in range(first, first + BLOCK_M, BLOCK_N):
            total, highest = _add_tile(
                total, highest, query, query_rest, key_ptr, plane, given_ptr, rows, start, sharpness,
                BLOCK_N, D, HIGH, RUNNING_MAXIMUM, True,
            )  # fmt: skip
        for index in range(0, (padded - BLOCK_M) // BLOCK_N):
            start = index * BLOCK_N
            start = tl.multiple_of(tl.where(start >= first, start + BLOCK_M, start), BLOCK_N)
            total, highest = _add_tile(
                total, highest, query, query_rest, key_ptr, plane, given_ptr, rows, start, sharpness,
                BLOCK_N, D, HIGH, RUNNING_MAXIMUM, False,
            )  # fmt: skip
        update = -(highest + tl.log2(total))
        live = rows < places
        if TRACK:
            change = tl.where(live, tl.abs(update - tl.load(updated_ptr + rows)), 0.0)
            tl.atomic_max(error_ptr + (iteration + 1) * batch + image, tl.max(change, 0))
        tl.store(updated_ptr + rows, tl.where(live, update, float("-inf")))


@triton.jit
def _attend_tile(
    highest, total, attended, query, query_rest, key_ptr, plane, given_ptr, rows, start, slope,
    BLOCK_N: tl.constexpr, D: tl.constexpr, HIGH: tl.constexpr, JACOBIAN: tl.constexpr, DIAGONAL: tl.constexpr,
):  # fmt: skip
    """One step of the online softmax over the columns from `start` on."""
    columns = start + tl.arange(0, BLOCK_N)
    key, key_rest = _vectors(key_ptr, plane, columns, D, HIGH)
    x = _similarities(query, query_rest, key, key_rest, HIGH) * slope + tl.load(given_ptr + columns)[None, :]
    if DIAGONAL:
        x = tl.where(rows[:, None] == columns[None, :], float("-inf"), x)
    higher = tl.maximum(highest, tl.max(x, 1))
    p = tl.exp2(x - (higher - 12.0)[:, None])  # at most 2^12: small shares stay normal in fp16
    decay = tl.exp2(highest - higher)
    total = total * decay + tl.sum(p, 1)
    if JACOBIAN:
        head = p.to(tl.float16)
        attended = tl.dot(head, key, attended * decay[:, None])
        if HIGH:
            attended = tl.dot(head, key_rest, attended)
            attended = tl.dot((p - head.to(tl.float32)).to(tl.float16), key, attended)
    return higher, total, attended


@triton.jit
def _nce_kernel(
    query_ptr, key_ptr, f_ptr, g_ptr, positive_ptr, inverse_norm_ptr, loss_ptr, jacobian_ptr,
    plane, channels, places, padded, slope, log_weight, inverse_temperature,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, D: tl.constexpr, HIGH: tl.constexpr, JACOBIAN: tl.constexpr,
    SCALE: tl.constexpr,
):  # fmt: skip
    # Grid (padded / BLOCK_M, batch).
    image = tl.program_id(1).to(tl.int64)
    first = tl.program_id(0) * BLOCK_M
    rows = first + tl.arange(0, BLOCK_M)
    key_ptr += image * padded * D
    g_ptr += image * padded
    query, query_rest = _vectors(query_ptr + image * padded * D, plane, rows, D, HIGH)
    highest = tl.full((BLOCK_M,), -1e30, tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    attended = tl.zeros((BLOCK_M, D), tl.float32)
    for start in range(first, first + BLOCK_M, BLOCK_N):
        highest, total, attended = _attend_tile(
            highest, total, attended, query, query_rest, key_ptr, plane, g_ptr, rows, start, slope,
            BLOCK_N, D, HIGH, JACOBIAN, True,
        )  # fmt: skip
    for index in range(0, (padded - BLOCK_M) // BLOCK_N):
        start = index * BLOCK_N
        start = tl.multiple_of(tl.where(start >= first, start + BLOCK_M, start), BLOCK_N)
        highest, total, attended = _attend_tile(
            highest, total, attended, query, query_rest, key_ptr, plane, g_ptr, rows, start, slope,
            BLOCK_N, D, HIGH, JACOBIAN, False,
        )  # fmt: skip

    live = rows < places
    f = tl.where(live, tl.load(f_ptr + image * padded + rows), 0.0)
    negative = (highest - 12.0 + tl.log2(total) + f + log_weight) * 0.6931471805599453
    z = negative - tl.load(positive_ptr + image * padded + rows) * inverse_temperature
    # softplus(z) = max(z, 0) + log(1 + r), with a series where 1 + r would lose r's digits
    r = tl.exp2(-tl.abs(z) * 1.4426950408889634)
    series = r * (1.0 - r * (0.5 - r * (0.33333333 - r * (0.25 - r * 0.2))))
    log1p = tl.where(r < 0.02, series, tl.log2(1.0 + r) * 0.6931471805599453)
    tl.store(loss_ptr + image * places + rows, tl.maximum(z, 0.0) + log1p, mask=live)
    if JACOBIAN:
        key, key_rest = _vectors(key_ptr, plane, rows, D, HIGH)
        q = query.to(tl.float32)
        k = key.to(tl.float32)
        if HIGH:
            q += query_rest.to(tl.float32)
            k += key_rest.to(tl.float32)
        pull = tl.where(z >= 0, 1.0, r) / (1.0 + r) * inverse_temperature  # sigmoid(z) / T
        gradient = (attended / total[:, None] - k) * (pull * (1.0 / SCALE))[:, None]
        # through the normalisation q = f / |f|
        along = tl.sum(gradient * q, 1) * (1.0 / (SCALE * SCALE))
        gradient = (gradient - q * along[:, None]) * tl.load(inverse_norm_ptr + image * padded + rows)[:, None]
        columns = tl.arange(0, D)
        target = jacobian_ptr + (image * channels + columns[None, :]) * places + rows[:, None]
        tl.store(target, gradient, mask=live[:, None] & (columns[None, :] < channels))
