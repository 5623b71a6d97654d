"""The terms of the loss on one level of features: SR and GT tensors (B, C, H, W) -> a scalar.

Every term takes `reduction`: `"mean"` (a 0-d tensor, the default), `"sum"`, or `"none"` for one value per
image, (B,). `channel_weights` (B, C) multiply the features of both images (in `correlation`, they weight the mean
over channels). GT carries no gradient. All is computed in float32 at least, whatever autocast says.

Content, style and correlation are functions of the level's second-order statistics, which take one pass over its
features. Whoever wants more than one of them computes `mghf_loss.ops.second_order_statistics` once and passes it as
`statistics`, with the same channel weights; the features themselves are not read then.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import wraps
from numbers import Real
from typing import Any, Literal, TypeVar, cast, get_args

import torch
from torch import Tensor

from . import ops
from .ops import SecondOrderStatistics, second_order_statistics
from .ops.precision import Precision

Reduction = Literal["mean", "sum", "none"]
Modulation = Literal["plain", "hard", "easy"]
REDUCTIONS = get_args(Reduction)
MODULATIONS = get_args(Modulation)
Term = TypeVar("Term", bound=Callable[..., Tensor])


def _term(function: Term) -> Term:
    """Check the levels and the reduction, and compute `function` without autocast and without gradient to GT."""

    @wraps(function)
    def term(sr_level: Tensor, gt_level: Tensor, *arguments: Any, **options: Any) -> Tensor:
        if sr_level.ndim != 4 or sr_level.shape != gt_level.shape:
            raise ValueError(
                "sr_level and gt_level must have the same shape (B, C, H, W), "
                f"got {tuple(sr_level.shape)} and {tuple(gt_level.shape)}"
            )
        check_reduction(options.get("reduction", "mean"))
        with torch.autocast(sr_level.device.type, enabled=False):
            return function(sr_level, gt_level.detach(), *arguments, **options)

    return cast(Term, term)


@_term
def content(
    sr_level: Tensor,
    gt_level: Tensor,
    channel_weights: Tensor | None = None,
    *,
    reduction: Reduction = "mean",
    statistics: SecondOrderStatistics | None = None,
) -> Tensor:
    """mean over c, y, x of (w_c (F_sr - F_gt))^2, in [0, inf), 0 iff the weighted features are equal.

    Reference: arXiv 2411.13548 (MGHF), MGHF-n and the content term of MGHF-c.
    """
    if statistics is None:  # nothing to share: the other statistics would cost more than the error
        dtype = torch.promote_types(torch.promote_types(sr_level.dtype, gt_level.dtype), torch.float32)
        error = (sr_level.to(dtype) - gt_level.to(dtype)).square().mean((2, 3))
    else:
        error = statistics.squared_error
    if channel_weights is not None:
        error = error * channel_weights.square()
    return reduce(error.mean(1), reduction)


@_term
def style(
    sr_level: Tensor,
    gt_level: Tensor,
    channel_weights: Tensor | None = None,
    *,
    reduction: Reduction = "mean",
    precision: Precision = "fast",
    statistics: SecondOrderStatistics | None = None,
) -> Tensor:
    """mean over c, d of (G_sr - G_gt)^2 with G = F F^T / (C H W) of weighted features, in [0, inf).

    Blind to where a texture is: permuting the places of either image changes nothing.

    Reference: arXiv 2411.13548 (MGHF), style term; Gatys et al., CVPR 2016, eq. 3-4 (there without 1/(C H W)).
    """
    if statistics is None:
        statistics = second_order_statistics(sr_level, gt_level, channel_weights, precision=precision)
    difference = statistics.gram_difference
    if difference is None:
        raise ValueError("style needs statistics with gram=True, got gram_difference=None")
    if channel_weights is not None:
        difference = difference * channel_weights[:, :, None] * channel_weights[:, None]
    return reduce(difference.square().mean((1, 2)), reduction)


@_term
def correlation(
    sr_level: Tensor,
    gt_level: Tensor,
    channel_weights: Tensor | None = None,
    *,
    eps: float = 1e-4,
    reduction: Reduction = "mean",
    statistics: SecondOrderStatistics | None = None,
) -> Tensor:
    """sum_c w_c (1 - r_c) / sum_c w_c, r_c Pearson's r of SR and GT over the places of c, in [0, 2] up to rounding.

    r = (cov + eps) / sqrt((var_sr + eps) (var_gt + eps)), so that equal or constant channels give 0 with
    finite gradients. Holds back texture that is not where the content has it.

    Reference: arXiv 2411.13548 (MGHF), CSC, content-style consistency; eps and the weighting are our choice.
    """
    if statistics is None:
        statistics = second_order_statistics(sr_level, gt_level, channel_weights, gram=False)
    scale = ((statistics.variance_sr + eps) * (statistics.variance_gt + eps)).rsqrt()
    r = (statistics.covariance + eps) * scale
    weights = torch.ones_like(r) if channel_weights is None else channel_weights
    return reduce(((1 - r) * weights).sum(1) / weights.sum(1), reduction)


@_term
def patch_nce(
    sr_level: Tensor,
    gt_level: Tensor,
    channel_weights: Tensor | None = None,
    *,
    patches: int | None = 256,
    modulation: Modulation = "hard",
    temperature: float = 0.07,
    eps: float = 1.0,
    negative_weight: float = 1.0,
    iterations: int = 50,
    tolerance: float = 1e-4,
    generator: torch.Generator | None = None,
    reduction: Reduction = "mean",
    precision: Precision = "fast",
) -> Tensor:
    """mean over places i of -log(e^{s_ii/T} / (e^{s_ii/T} + sum_{j != i} w_ij e^{s_ij/T})), in nats, [0, inf).

    s_ij is the cosine of SR's weighted feature vector at place i and GT's at place j of the same image; w_ij
    is Q (`"plain"`) or (N - 1) Q P_ij with the optimal-transport plan P that prefers similar (`"hard"`) or
    dissimilar (`"easy"`) negatives. No gradient flows through w; that of the released MoNCE code, which lets
    it flow, differs by 4-10 % at eps >= 0.5. See `mghf_loss.ops.patch_nce` for the formulas.

    Args:
        sr_level: SR features (B, C, H, W).
        gt_level: GT features (B, C, H, W).
        channel_weights: (B, C) or None.
        patches: number of random places, the same in all images of the batch; `None`, or as many as there
            are, takes every place ("dense", memory does not grow with N^2).
        modulation: `"hard"`, `"easy"` or `"plain"`.
        temperature: T.
        eps: entropic regularisation of the transport plan.
        negative_weight: Q.
        iterations: Sinkhorn iterations at most.
        tolerance: error of the plan's log row sums at which Sinkhorn stops (see `mghf_loss.ops.patch_nce`).
        generator: source of the random places; the global one of the device where None.
        reduction: over the batch.
        precision: `"fast"` or `"high"`, see `mghf_loss.ops.patch_nce`.

    Reference: arXiv 2411.13548 (MGHF), LIP, local information preservation; Park et al., ECCV 2020 (PatchNCE);
    Zhan et al., CVPR 2022 (MoNCE). T, eps and Q are MoNCE's.
    """
    check_modulation(modulation)
    check_patches(patches)
    for name, value in (("temperature", temperature), ("eps", eps), ("negative_weight", negative_weight)):
        check_positive(name, value)
    sr, gt = sr_level.flatten(2), gt_level.flatten(2)
    if patches is not None and patches < sr.shape[2]:
        device = sr.device if generator is None else generator.device
        places = torch.randperm(sr.shape[2], generator=generator, device=device)[:patches].to(sr.device)
        sr, gt = sr[:, :, places], gt[:, :, places]
    dtype = torch.promote_types(torch.promote_types(sr.dtype, gt.dtype), torch.float32)
    sr, gt = sr.to(dtype), gt.to(dtype)
    if channel_weights is not None:
        sr, gt = sr * channel_weights[..., None], gt * channel_weights[..., None]
    loss = ops.patch_nce(
        sr,
        gt,
        temperature=temperature,
        modulation=modulation,
        eps=eps,
        negative_weight=negative_weight,
        iterations=iterations,
        tolerance=tolerance,
        precision=precision,
    )
    return reduce(loss.mean(1), reduction)


def reduce(values: Tensor, reduction: Reduction) -> Tensor:
    """Reduce one value per image, (B,), as `reduction` says."""
    if reduction == "mean":
        return values.mean()
    return values.sum() if reduction == "sum" else values


def check_reduction(reduction: Reduction) -> Reduction:
    """Return `reduction`, or raise `ValueError` naming the known ones."""
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {REDUCTIONS}, got {reduction!r}")
    return reduction


def check_modulation(modulation: Modulation) -> Modulation:
    """Return `modulation`, or raise `ValueError` naming the known ones."""
    if modulation not in MODULATIONS:
        raise ValueError(f"modulation must be one of {MODULATIONS}, got {modulation!r}")
    return modulation


def check_positive(name: str, value: float) -> float:
    """Return `value`, or raise `ValueError` unless it is a finite number above 0."""
    if not isinstance(value, Real) or not 0 < value < math.inf:
        raise ValueError(f"{name} must be positive and finite, got {value!r}")
    return float(value)


def check_patches(patches: int | None) -> int | None:
    """Return `patches`, or raise `ValueError` unless it is None or an integer of at least 2."""
    if patches is not None and (not isinstance(patches, int) or isinstance(patches, bool) or patches < 2):
        raise ValueError(f"patches must be an integer of at least 2, or None for every place, got {patches!r}")
    return patches
