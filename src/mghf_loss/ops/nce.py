"""Modulated PatchNCE over every pair of locations, without an N x N matrix: MoNCE's transport by Sinkhorn.

With unit vectors q_i, k_j of SR and GT and s_ij = q_i . k_j, the loss of location i is

    loss_i = -log(e^{s_ii/T} / (e^{s_ii/T} + sum_{j != i} w_ij e^{s_ij/T})),   w_ij = (N - 1) * Q * P_ij,

P the entropic optimal-transport plan of the kernel e^{sign * s_ij/eps} off the diagonal (sign +1 "hard", -1
"easy"), or P_ij = 1/(N - 1) ("plain"). In the log domain P_ij = exp(f_i + sign * s_ij/eps + g_j), so that

    loss_i = softplus(n_i - s_ii/T),   n_i = log((N - 1) Q) + f_i + logsumexp_{j != i}((1/T + sign/eps) s_ij + g_j).

Keys and w carry no gradient; with p_ij the softmax over j != i inside n_i,

    d loss_i / d q_i = sigmoid(n_i - s_ii/T) / T * (sum_j p_ij k_j - k_i),

which the forward pass can accumulate: the backward pass is a multiplication.

References: PatchNCE, Park et al., ECCV 2020, eq. 3; modulation, Zhan et al., CVPR 2022 (MoNCE), eq. 4-6. The
released MoNCE code writes -10 into the diagonal of the cost and adds 1e-8 to w; here the diagonal is excluded
exactly and nothing is added (the loss differs by less than 1e-5 at eps = 1).
"""

from __future__ import annotations

import math
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from .. import _checks
from .statistics import Precision, compute_dtype, differentiable, first_derivative

Modulation = Literal["plain", "hard", "easy"]
# Elements of the largest block of pairs that is held at a time: 64 MiB in float32.
BLOCK = 2**24


def patch_nce_formula(
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
) -> tuple[Tensor, Tensor]:
    """Loss of every location (B, N) and its gradient with respect to the SR vector there (B, C, N), or an empty tensor.

    In float32 at least, whatever `precision` and autocast say; on CUDA with the products of
    `torch.set_float32_matmul_precision`.
    """
    batch, _, locations = sr.shape
    dtype = compute_dtype(sr, gt)
    loss = sr.new_zeros((batch, locations), dtype=dtype)
    jacobian = sr.new_zeros(sr.shape if with_jacobian else 0, dtype=dtype)
    if locations < 2:  # no negatives
        return loss, jacobian
    # On a CPU every image by itself: neither its rounding nor its last iteration depends on the others.
    group = 1 if sr.device.type == "cpu" else max(1, BLOCK // locations**2)
    size = max(1, BLOCK // (group * locations))
    with torch.autocast(sr.device.type, enabled=False):
        for first in range(0, batch, group):
            images = slice(first, first + group)
            query, inverse_norm = _unit_vectors(sr[images].to(dtype))
            key, _ = _unit_vectors(gt[images].to(dtype))
            row_potential = column_potential = torch.zeros_like(loss[images])
            slope, log_weight = 1 / temperature, math.log(negative_weight)
            if modulation != "plain":
                sharpness = (1 if modulation == "hard" else -1) / eps
                row_potential, column_potential = transport_potentials(query, key, sharpness, iterations, tolerance)
                slope += sharpness
                log_weight += math.log(locations - 1)
            for start in range(0, locations, size):
                rows = slice(start, start + size)
                similarity = torch.bmm(query[:, :, rows].transpose(1, 2), key)
                positive = similarity.diagonal(start, 1, 2) / temperature
                # softmax over the negatives j != i
                logits = similarity * slope + column_potential[:, None]
                logits.diagonal(start, 1, 2).fill_(-math.inf)
                highest = logits.amax(2, keepdim=True)
                share = logits.sub_(highest).exp_()
                total = share.sum(2, keepdim=True)
                negative = log_weight + row_potential[:, rows] + (highest + total.log()).squeeze(2)
                loss[images, rows] = F.softplus(negative - positive)
                if with_jacobian:
                    attended = torch.bmm(key, (share / total).transpose(1, 2))
                    pull = torch.sigmoid(negative - positive) / temperature
                    gradient = pull[:, None] * (attended - key[:, :, rows])
                    # through the normalisation q = f / |f|
                    along = (gradient * query[:, :, rows]).sum(1, keepdim=True) * query[:, :, rows]
                    jacobian[images, :, rows] = (gradient - along) * inverse_norm[:, :, rows]
    return loss, jacobian


operator = torch.library.custom_op("mghf_loss::patch_nce", patch_nce_formula, mutates_args=())


@operator.register_fake
def _(
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
) -> tuple[Tensor, Tensor]:
    batch, _, locations = sr.shape
    dtype = compute_dtype(sr, gt)
    return sr.new_empty((batch, locations), dtype=dtype), sr.new_empty(sr.shape if with_jacobian else 0, dtype=dtype)


def backward_formula(loss: Tensor, jacobian: Tensor, loss_gradient: Tensor) -> Tensor:
    """Gradient of the SR vectors (B, C, N); `loss` is there so that a second derivative is refused."""
    return loss_gradient[:, None] * jacobian


backward_operator = torch.library.custom_op("mghf_loss::patch_nce_backward", backward_formula, mutates_args=())
backward_operator.register_fake(backward_formula)


def _keep_jacobian(ctx, inputs, output) -> None:
    ctx.dtype = inputs[0].dtype
    ctx.save_for_backward(*output)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx, loss_gradient: Tensor, _) -> tuple[Tensor | None, ...]:
    loss, jacobian = ctx.saved_tensors
    if jacobian.ndim == 1:  # inside vmap, sr did not seem to need a gradient
        raise NotImplementedError("patch_nce has no torch.func.grad of a vmap: use the vmap of the grad, or a batch")
    gradient = first_derivative(backward_operator, loss, jacobian, loss_gradient)
    return gradient.to(ctx.dtype), *[None] * 9


functional = differentiable(operator, _keep_jacobian, _backward)


def patch_nce(
    sr: Tensor,
    gt: Tensor,
    *,
    temperature: float = 0.07,
    modulation: Modulation = "hard",
    eps: float = 1.0,
    negative_weight: float = 1.0,
    iterations: int = 50,
    tolerance: float = 1e-4,
    precision: Precision = "fast",
) -> Tensor:
    """Modulated PatchNCE of every location: vectors (B, C, N) of SR and GT -> loss in nats (B, N).

    Every location's positive is the same location of `gt`, its negatives are all other locations of the same image.
    Gradient flows to `sr` only. A zero vector has similarity 0 to all and gradient 0; N = 1 gives 0.
    Memory beyond inputs and outputs does not grow with N^2: it is bounded by a block of pairs in the torch formula (see
    `BLOCK`), and by 4 bytes for each pair of up to 512 locations in the Triton kernels, which beyond hold none.

    Args:
        sr: query vectors, any floating dtype; float64 stays float64, all else is computed in float32.
        gt: key vectors, detached.
        temperature: T.
        modulation: `"hard"`, `"easy"` or `"plain"`.
        eps: entropic regularisation of the transport.
        negative_weight: Q, weight of all negatives against the positive.
        iterations: Sinkhorn iterations at most.
        tolerance: stop an image when none of its log row marginals is off by more than this (the torch formula on other
            devices than a CPU makes all iterations, as the test would wait).
        precision: of the unit vectors on CUDA. `"fast"`: fp16 (relative error of loss and gradient 2e-3 at most, at
            T = 0.07); `"high"`: two fp16 numbers, as accurate as float32. That is the kernels' promise; the torch
            formula takes float32 for both, on CUDA as `torch.set_float32_matmul_precision` has it.

    Raises:
        ValueError, TypeError: shapes, dtypes or options do not fit, naming what came.
    """
    if sr.ndim != 3 or sr.shape != gt.shape:
        raise ValueError(f"sr and gt must have one shape (B, C, N), got {tuple(sr.shape)} and {tuple(gt.shape)}")
    if sr.shape[1] == 0:
        raise ValueError(f"sr and gt must have at least one channel, got shape {tuple(sr.shape)}")
    if sr.device != gt.device:
        raise ValueError(f"sr and gt must be on one device, got {sr.device} and {gt.device}")
    if not (sr.is_floating_point() and gt.is_floating_point()):
        raise TypeError(f"sr and gt must be floating-point tensors, got {sr.dtype} and {gt.dtype}")
    primal, tangent = forward_ad.unpack_dual(sr)
    if tangent is not None and sr.requires_grad:
        raise NotImplementedError("patch_nce has no second derivative: use either forward-mode AD or backward()")
    compute = functional if torch._C._are_functorch_transforms_active() else operator
    loss, jacobian = compute(
        primal,
        gt.detach(),
        _checks.number("temperature", temperature, above=True),
        _checks.one_of("modulation", modulation, Modulation),
        _checks.number("eps", eps, above=True),
        _checks.number("negative_weight", negative_weight, above=True),
        _checks.integer("iterations", iterations, least=0),
        _checks.number("tolerance", tolerance),
        tangent is not None or (sr.requires_grad and torch.is_grad_enabled()),
        _checks.one_of("precision", precision, Precision),
    )
    if tangent is None:
        return loss
    slope = first_derivative(backward_operator, loss, jacobian, torch.ones_like(loss))
    return forward_ad.make_dual(loss, (slope * tangent).sum(1))


def transport_potentials(
    query: Tensor, key: Tensor, sharpness: float, iterations: int, tolerance: float
) -> tuple[Tensor, Tensor]:
    """Log-domain Sinkhorn: f, g (B, N) such that exp(f_i + sharpness * q_i.k_j + g_j), i != j, has marginals 1.

    `query` and `key` are unit vectors (B, C, N) with N >= 2. Column sums are exact, row sums to `tolerance`.
    """
    batch, _, locations = query.shape
    f = g = query.new_zeros(batch, locations)
    # |q.k| <= 1 bounds the potentials; while e^{4 |sharpness|} is far from overflow, one kernel that fits in a
    # block serves all iterations as a matrix, and an iteration is two matrix-vector products.
    if batch * locations**2 <= BLOCK and abs(sharpness) <= 16:
        pairs = torch.bmm(query.transpose(1, 2), key) * sharpness
        pairs.diagonal(0, 1, 2).fill_(-math.inf)
        kernel = pairs.sub_(abs(sharpness)).exp_()
        log_row_sums = partial(_log_product, kernel, abs(sharpness))
        log_column_sums = partial(_log_product, kernel.transpose(1, 2), abs(sharpness))
    else:
        log_row_sums = partial(_log_row_sums, query, key, sharpness)
        log_column_sums = partial(_log_row_sums, key, query, sharpness)
    for _ in range(iterations):
        update = -log_row_sums(g)
        converged = update.device.type == "cpu" and (update - f).abs().amax() < tolerance
        f, g = update, -log_column_sums(update)
        if converged:
            break
    return f, g


def _log_row_sums(query: Tensor, key: Tensor, sharpness: float, potential: Tensor) -> Tensor:
    """log sum_{j != i} exp(sharpness * q_i.k_j + potential_j), (B, N), in blocks of rows."""
    batch, _, locations = query.shape
    size = max(1, BLOCK // (batch * locations))
    sums = torch.empty_like(potential)
    for start in range(0, locations, size):
        rows = query[:, :, start : start + size].transpose(1, 2)
        offset = potential[:, None].expand(-1, rows.shape[1], -1)
        pairs = torch.baddbmm(offset, rows, key, alpha=sharpness)
        pairs.diagonal(start, 1, 2).fill_(-math.inf)
        sums[:, start : start + size] = pairs.logsumexp(2)
    return sums


def _log_product(kernel: Tensor, log_scale: float, potential: Tensor) -> Tensor:
    """log(e^log_scale * kernel @ exp(potential)), (B, N)."""
    highest = potential.amax(1, keepdim=True)
    return torch.bmm(kernel, (potential - highest).exp()[:, :, None]).squeeze(2).log() + highest + log_scale


def _unit_vectors(vectors: Tensor) -> tuple[Tensor, Tensor]:
    """Unit vectors (B, C, N) and 1/norm (B, 1, N); both are 0 where the vector is (below 1e-12)."""
    # Dividing by the largest entry first keeps squares of huge vectors in range. Vectors as small as rounding
    # errors have no direction: they count as 0, and no gradient explodes.
    highest = vectors.abs().amax(1, keepdim=True)
    inverse = torch.where(highest > 1e-12, highest.reciprocal(), 0)
    scaled = vectors * inverse
    inverse_length = torch.where(inverse > 0, scaled.square().sum(1, keepdim=True).rsqrt(), 0)
    return scaled * inverse_length, inverse * inverse_length
