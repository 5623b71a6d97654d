"""Importance of feature channels: entropy, pruning, reweighting."""

from __future__ import annotations

import torch
from torch import Tensor

BINS = 64
LIMIT = 4.0  # whitened features: four standard deviations; rarer values fall in the end bins


def channel_entropy(features: Tensor) -> Tensor:
    """H = -sum_b p_b log p_b of each channel's histogram: (B, C, H, W) -> nats (B, C) in [0, ln 64].

    64 bins over [-4, 4], outliers in the end bins; without gradient. A constant channel has entropy 0.

    Reference: arXiv 2411.13548 (MGHF), adaptive entropy-based pruning; histogram and range are our choice.
    """
    batch, channels = features.shape[:2]
    values = features.detach().flatten(2)
    # NaN has no bin; the other terms report it, an index out of range would take the device down.
    bins = ((values + LIMIT) * (BINS / (2 * LIMIT))).nan_to_num().clamp(0, BINS - 1).long()
    counts = torch.zeros(batch, channels, BINS, device=values.device, dtype=values.dtype)
    counts.scatter_add_(2, bins, torch.ones_like(values))
    p = counts / values.shape[2]
    return -torch.special.xlogy(p, p).sum(2)


def entropy_channel_weights(gt_level: Tensor, prune: float = 0.25) -> Tensor:
    """Weights proportional to `channel_entropy`, 0 for the least `prune` of channels: (B, C, H, W) -> (B, C).

    Per sample, floor(prune * C) channels of least entropy get 0, the others their entropy, scaled to a mean
    of 1 over all C. Equal entropies (a constant image) give equal weights. Without gradient.

    Args:
        gt_level: features of the ground truth at one level.
        prune: fraction of channels to drop, in [0, 1).

    Reference: arXiv 2411.13548 (MGHF), adaptive entropy-based pruning and reweighting; the proportional
    weights and the default of a quarter are our choice.
    """
    entropy = channel_entropy(gt_level)
    channels = entropy.shape[1]
    dropped = entropy.argsort(dim=1, stable=True)[:, : int(prune * channels)]
    # The constant decides only where all entropies are 0.
    weights = (entropy + 1e-6).scatter(1, dropped, 0.0)
    return weights / weights.mean(1, keepdim=True)
