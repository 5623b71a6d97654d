"""The terms of the loss on one level of features, (B, C, H, W) of SR and GT -> a scalar, and the channel weights.

Every term takes `reduction`: `"mean"` (a 0-d tensor, the default), `"sum"`, or `"none"` for one value per
image, (B,). `channel_weights` (B, C) multiply the features of both images (in `correlation`, they weight the mean
over channels). GT carries no gradient. All is computed in float32 at least, whatever autocast says.

Content, style and correlation are functions of the level's second-order statistics, which take one pass over its
features. Whoever wants more than one of them computes `mghf_loss.ops.second_order_statistics` once and passes it as
`statistics`, with the same channel weights; the features themselves are not read then.

A function `..._of` is the formula of a term: statistics and channel weights with any leading dimensions, (..., C), such
as those of several stacked levels -> one value for each, (...). A loss computes it once for all levels.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import wraps
from typing import Any, Literal, TypeVar, cast

import torch
from torch import Tensor

from . import _checks, ops
from ._random import integers
from .ops import SecondOrderStatistics, second_order_statistics
from .ops.local import local_errors
from .ops.nce import Modulation
from .ops.statistics import Precision, compute_dtype

Reduction = Literal["mean", "sum", "none"]
BINS = 64
LEAST_SHARE = 0.25  # of the mean entropy; on photographs nearly all channels have more
LEAST_DELTA = 1e-6  # far below any difference of Gram matrices
BOUNDLESS = 1e9  # far above; its square fits into float32
LIMIT = 4.0  # whitened features: four standard deviations; rarer values fall in the end bins
Term = TypeVar("Term", bound=Callable[..., Tensor])


def _term(function: Term) -> Term:
    """Check the levels and the reduction, and compute `function` without autocast and without gradient to GT."""

    @wraps(function)
    def term(sr_level: Tensor, gt_level: Tensor, *arguments: Any, **options: Any) -> Tensor:
        channel_weights = arguments[0] if arguments else options.get("channel_weights")
        _checks.levels(sr_level, gt_level, channel_weights)
        _checks.one_of("reduction", options.get("reduction", "mean"), Reduction)
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
    """Compare features location by location: mean over c, y, x of (w_c (F_sr - F_gt))^2, in [0, inf).

    >>> content(torch.full((1, 9, 8, 8), 2.0), torch.zeros(1, 9, 8, 8))
    tensor(4.)

    0 iff the weighted features are equal.

    Reference: arXiv 2411.13548 (MGHF), MGHF-n and the content term of MGHF-c.
    """
    # With nothing to share, the other statistics would cost more than the error.
    error = squared_error(sr_level, gt_level) if statistics is None else statistics.squared_error
    return reduce(content_of(error, channel_weights), reduction)


def squared_error(sr_level: Tensor, gt_level: Tensor) -> Tensor:
    """Mean over locations of the squared difference of every channel, (B, C), in float32 at least.

    >>> squared_error(torch.full((1, 2, 8, 8), 2.0), torch.zeros(1, 2, 8, 8))
    tensor([[4., 4.]])
    """
    dtype = compute_dtype(sr_level, gt_level)
    return (sr_level.to(dtype) - gt_level.to(dtype)).square().mean((2, 3))


def content_of(squared_error: Tensor, channel_weights: Tensor | None) -> Tensor:
    """Mean over channels of w^2 times the squared error."""
    if channel_weights is not None:
        squared_error = squared_error * channel_weights.square()
    return squared_error.mean(-1)


@_term
def style(
    sr_level: Tensor,
    gt_level: Tensor,
    channel_weights: Tensor | None = None,
    *,
    delta: float = math.inf,
    reduction: Reduction = "mean",
    precision: Precision = "fast",
    statistics: SecondOrderStatistics | None = None,
) -> Tensor:
    """Compare textures by the Gram matrices G = F F^T / (C H W) of weighted features, in [0, inf).

    >>> gt = torch.randn(1, 9, 8, 8)
    >>> style(gt.roll(3, dims=2), gt) < 1e-12  # blind to where a texture is
    tensor(True)

    E, the mean over c, d of (G_sr - G_gt)^2, grows with the fourth power of the features. `delta` bounds that: the term
    is 2 E / (1 + sqrt(1 + E / delta^2)), which is E where the root of E is far below `delta`, and grows as the root of
    E, with the second power, far above it.

    Reference: arXiv 2411.13548 (MGHF), style term; Gatys et al., CVPR 2016, eq. 3-4 (there without 1/(C H W)). The
    bound is ours: the pseudo-Huber function of the distance of the matrices.
    """
    delta = _checks.number("delta", delta, least=LEAST_DELTA, infinite=True)
    if statistics is None:
        statistics = second_order_statistics(sr_level, gt_level, channel_weights, precision=precision)
    return reduce(style_of(statistics, channel_weights, delta), reduction)


def style_of(statistics: SecondOrderStatistics, channel_weights: Tensor | None, delta: float = math.inf) -> Tensor:
    """Mean over pairs of channels of the squared difference of weighted Gram matrices, bounded by `delta`."""
    difference = statistics.gram_difference
    if difference is None:
        raise ValueError("style needs statistics with gram=True, got gram_difference=None")
    if channel_weights is not None:
        difference = difference * channel_weights[..., :, None] * channel_weights[..., None, :]
    error = difference.square().mean((-2, -1))
    if delta > BOUNDLESS:
        return error
    return error / ((error + delta**2).sqrt() + delta) * (2 * delta)


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
    """Compare where details are, whatever their strength: 1 - Pearson's r of each channel, in [0, 2] up to rounding.

    >>> gt = torch.randn(1, 9, 8, 8)
    >>> correlation(3 * gt + 1, gt) < 1e-3, correlation(-gt, gt) > 1.99
    (tensor(True), tensor(True))

    sum_c w_c (1 - r_c) / sum_c w_c with r = (cov + eps) / sqrt((var_sr + eps) (var_gt + eps)) over the locations, so
    that equal or constant channels give 0 with finite gradients.

    Reference: arXiv 2411.13548 (MGHF), CSC, content-style consistency; eps and the weighting are our choice.
    """
    _checks.number("eps", eps)
    if statistics is None:
        statistics = second_order_statistics(sr_level, gt_level, channel_weights, gram=False)
    return reduce(correlation_of(statistics, channel_weights, eps), reduction)


def correlation_of(statistics: SecondOrderStatistics, channel_weights: Tensor | None, eps: float = 1e-4) -> Tensor:
    """Weighted mean over channels of 1 - r."""
    scale = ((statistics.variance_sr + eps) * (statistics.variance_gt + eps)).rsqrt()
    distance = 1 - (statistics.covariance + eps) * scale
    if channel_weights is None:
        return distance.mean(-1)
    return (distance * channel_weights).sum(-1) / channel_weights.sum(-1)


@_term
def texture(
    sr_level: Tensor,
    gt_level: Tensor,
    channel_weights: Tensor | None = None,
    *,
    window: int = 4,
    eps: float = 0.05,
    reduction: Reduction = "mean",
) -> Tensor:
    """Compare how strong details are, window by window: mean of w_c |R_sr - R_gt|, in [0, inf).

    >>> gt = torch.randn(1, 9, 8, 8)
    >>> # blind to the phase, not to the strength
    >>> texture(-gt, gt) < 1e-6, texture(0.5 * gt, gt) > 0.3
    (tensor(True), tensor(True))

    R = sqrt(mean of F^2 over `window` x `window` locations + eps^2), for each channel and window. Where GT is flat,
    R_gt is about eps, and added patterns cost; where GT has texture, blur costs. The gradient is bounded, however large
    an error is.

    Reference: ours; after local moments of wavelet bands in Portilla and Simoncelli, IJCV 2000.
    """
    window = _checks.integer("window", window, least=1)
    eps = _checks.number("eps", eps, above=True)
    errors = local_errors(sr_level, gt_level, window, eps, squared_error=False)
    return reduce(texture_of(errors.texture, channel_weights), reduction)


def texture_of(error: Tensor, channel_weights: Tensor | None) -> Tensor:
    """Mean over channels of w times the error."""
    return (error if channel_weights is None else error * channel_weights).mean(-1)


@_term
def grid(
    sr_level: Tensor,
    gt_level: Tensor,
    channel_weights: Tensor | None = None,
    *,
    reduction: Reduction = "mean",
) -> Tensor:
    """Compare what repeats over the whole image: mean over c and the phases p of (w_c m_cp)^2, in [0, inf).

    >>> gt = torch.randn(1, 9, 8, 8)
    >>> noise, stripes = torch.randn_like(gt), torch.tensor([1.0, -1.0]).repeat(4)  # both of power 1
    >>> grid(gt + noise, gt) < 0.2, grid(gt + stripes, gt) > 0.99
    (tensor(True), tensor(True))

    m is the mean of F_sr - F_gt over the locations of one phase of a grid of 2 x 2 locations. Errors that come and go
    cancel in the mean, and one that repeats every two locations, or at every one, is left whole. Such a pattern, of the
    pixel shuffle or transposed convolution at a model's end, is the cheapest detail that there is: other terms ask for
    detail, and this one holds back that kind. An odd last row or column is left out; a level of one row or column has
    fewer phases, and m is 0 in the others.

    Reference: ours.
    """
    errors = local_errors(sr_level, gt_level, squared_error=False)
    return reduce(grid_of(errors.phases, channel_weights), reduction)


def grid_of(phases: Tensor, channel_weights: Tensor | None) -> Tensor:
    """Mean over channels and phases of w^2 times the squares of the phases' values."""
    squares = phases.square()
    if channel_weights is not None:
        squares = squares * channel_weights.square()[..., None]
    return squares.mean((-2, -1))


@_term
def patch_nce(
    sr_level: Tensor,
    gt_level: Tensor,
    channel_weights: Tensor | None = None,
    *,
    locations: Tensor | None = None,
    modulation: Modulation = "hard",
    temperature: float = 0.07,
    eps: float = 1.0,
    negative_weight: float = 1.0,
    iterations: int = 50,
    tolerance: float = 1e-4,
    reduction: Reduction = "mean",
    precision: Precision = "fast",
) -> Tensor:
    """Compare local structure: can a location of SR be told from all others of GT? In nats, [0, inf).

    >>> sr, gt = torch.randn(2, 2, 9, 16, 16)
    >>> seeds = torch.tensor([0, 1])  # one per image
    >>> patch_nce(sr, gt, locations=random_locations(seeds, 16 * 16, 64), reduction="none").shape
    torch.Size([2])

    Args:
        sr_level: SR features (B, C, H, W).
        gt_level: GT features (B, C, H, W).
        channel_weights: (B, C) or None.
        locations: indices into H * W of those that take part, (B, N), for instance `random_locations(...)`; None
            takes every location ("dense", memory does not grow with N^2).
        modulation: `"hard"`, `"easy"` or `"plain"`.
        temperature: T.
        eps: entropic regularisation of the transport plan.
        negative_weight: Q.
        iterations: Sinkhorn iterations at most.
        tolerance: error of the plan's log row sums at which Sinkhorn stops (see `mghf_loss.ops.patch_nce`).
        reduction: over the batch.
        precision: `"fast"` or `"high"`, see `mghf_loss.ops.patch_nce`.

    Mean over locations i of -log(e^{s_ii/T} / (e^{s_ii/T} + sum_{j != i} w_ij e^{s_ij/T})). s_ij is the cosine of
    SR's weighted feature vector at location i and GT's at location j of the same image; w_ij is Q (`"plain"`) or
    (N - 1) Q P_ij with the optimal-transport plan P that prefers similar (`"hard"`) or dissimilar (`"easy"`) negatives.
    No gradient flows through w; that of the released MoNCE code, which lets it flow, differs by 4-10 % at eps >= 0.5.
    See `mghf_loss.ops.patch_nce` for the formulas.

    Reference: arXiv 2411.13548 (MGHF), LIP, local information preservation; Park et al., ECCV 2020 (PatchNCE);
    Zhan et al., CVPR 2022 (MoNCE). T, eps and Q are MoNCE's.
    """
    sr, gt = sr_level.flatten(2), gt_level.flatten(2)
    if locations is not None:
        if locations.ndim != 2 or len(locations) != len(sr):
            raise ValueError(f"locations must have shape (B, N) with B = {len(sr)}, got {tuple(locations.shape)}")
        index = locations[:, None].expand(-1, sr.shape[1], -1)
        sr, gt = sr.gather(2, index), gt.gather(2, index)
    dtype = compute_dtype(sr, gt)
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


def channel_entropy(features: Tensor) -> Tensor:
    """Measure how much each channel varies: (B, C, H, W) -> entropy H = -sum_b p_b log p_b in nats, (B, C).

    >>> channel_entropy(torch.zeros(1, 9, 8, 8)).max() == 0
    tensor(True)

    64 bins over [-4, 4], outliers in the end bins; without gradient. A constant channel has entropy 0.

    Reference: arXiv 2411.13548 (MGHF), adaptive entropy-based pruning; histogram and range are our choice.
    """
    batch, channels = features.shape[:2]
    values = features.detach().flatten(2)
    # NaN has no bin; the other terms report it, an index out of range would take the device down.
    bins = ((values + LIMIT) * (BINS / (2 * LIMIT))).nan_to_num().clamp(0, BINS - 1).long()
    counts = torch.zeros(batch, channels, BINS, device=values.device, dtype=values.dtype)
    p = counts.scatter_add(2, bins, values.new_ones(()).expand_as(values)) / values.shape[2]
    return -torch.special.xlogy(p, p).sum(2)


def entropy_channel_weights(gt_level: Tensor, prune: float = 0.25) -> Tensor:
    """Weight channels by how much they vary in GT, and drop those that vary least: (B, C, H, W) -> (B, C).

    >>> entropy_channel_weights(torch.randn(1, 8, 16, 16), prune=0.25).count_nonzero()
    tensor(6)

    Per sample, floor(prune * C) channels of least entropy get 0, the others their entropy or a quarter of the mean
    entropy, whichever is more, scaled to a mean of 1 over all C. So what does not vary in GT, as in a clean sky, is not
    free in SR. Equal entropies (a constant image) give equal weights. Without gradient.

    Args:
        gt_level: features of the ground truth at one level.
        prune: fraction of channels to drop, in [0, 1).

    Reference: arXiv 2411.13548 (MGHF), adaptive entropy-based pruning and reweighting; the proportional
    weights, their least value and the default of a quarter are our choice.
    """
    _checks.number("prune", prune, below=1)
    return entropy_weights_of(channel_entropy(gt_level), prune)


def entropy_weights_of(entropy: Tensor, prune: float) -> Tensor:
    """Weights of channels, (..., C), from their entropies."""
    # The constant decides only where all entropies are 0.
    weights = entropy.maximum(LEAST_SHARE * entropy.mean(-1, keepdim=True) + 1e-6)
    count = int(prune * entropy.shape[-1])
    if count:
        dropped = entropy.argsort(dim=-1, stable=True)[..., :count]
        weights = weights.scatter(-1, dropped, 0.0)
    return weights / weights.mean(-1, keepdim=True)


def random_locations(seed: Tensor, count: int, patches: int | None) -> Tensor | None:
    """Choose `patches` of `count` locations for every image: seeds (B,) int64 -> indices (B, patches), or None for all.

    >>> random_locations(torch.tensor([0, 1]), 64, 16).shape
    torch.Size([2, 16])

    A function of the seed alone, whatever the device: the locations of the largest of random integers.
    """
    if patches is None or patches >= count:
        return None
    return integers(seed, count).topk(patches, sorted=False).indices


def reduce(values: Tensor, reduction: Reduction) -> Tensor:
    """Reduce one value per image, (B,), as `reduction` says."""
    if reduction == "mean":
        return values.mean()
    return values.sum() if reduction == "sum" else values
