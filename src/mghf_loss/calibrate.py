"""Coefficients of a preset for other images or another network: each term keeps the ratio of its gradient to L1's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _checks
from .mghf import PRESETS, MGHFLoss, Preset
from .toy import downscale, middle, upscale

if TYPE_CHECKING:
    from .inn import HighFrequencyINN

Loss = Callable[[Tensor, Tensor], Tensor]
Task = Literal["sr", "denoise"]
SIDE = 256  # of the middle of an image that is taken
NOISE = 25 / 255
# Norm of the gradient of coefficient * term over L1's: the medians over 43 photographs, with the bundled network.
# `gradient_ratios` measures them.
RATIOS: dict[Preset, dict[str, float]] = {
    "balanced": {"content": 3.1, "style": 4.41, "correlation": 25.5, "texture": 3.95, "grid": 0.23},
    "sharp": {"content": 2.12, "style": 2.93, "correlation": 3.57, "texture": 1.58, "grid": 0.242},
    "gan": {"content": 1.76, "style": 1.9, "correlation": 3.06, "texture": 1.32, "grid": 0.242},
    "denoise": {"content": 2.79},
    "paper": {"content": 204.0, "style": 42.1, "correlation": 171.0, "patch_nce": 48.7},
}


def degrade(gt: Tensor, task: Task, generator: torch.Generator) -> Tensor:
    """Return what a training starts from, (B, 3, H, W): bicubic x4 there and back, or noise of 25/255."""
    if task == "sr":
        return upscale(downscale(gt))
    return gt + NOISE * torch.randn(gt.shape, generator=generator).to(gt)


def gradient_norms(loss: Loss, sr: Tensor, gt: Tensor) -> Tensor:
    """Norm of d loss / d sr of every image alone, (B,)."""
    norms = []
    for s, g in zip(sr.split(1), gt.split(1), strict=True):
        leaf = s.detach().clone().requires_grad_()
        norms.append(torch.autograd.grad(loss(leaf, g), leaf)[0].norm())
    return torch.stack(norms)


def gradient_ratio(loss: Loss, pairs: Sequence[tuple[Tensor, Tensor]]) -> float:
    """Median over pairs (sr, gt) of batches of the norm of a loss's gradient, over that of L1."""
    norms = [torch.cat([gradient_norms(each, sr, gt) for sr, gt in pairs]).median() for each in (loss, F.l1_loss)]
    return (norms[0] / norms[1]).item()


def gradient_ratios(
    preset: Preset, pairs: Sequence[tuple[Tensor, Tensor]], inn: str | Path | HighFrequencyINN = "bundled"
) -> dict[str, float]:
    """Measure every term that `preset` uses, with coefficient 1: `gradient_ratio` by name."""
    coefficients = PRESETS[preset].coefficients
    ratios = {}
    for name in (name for name, factor in coefficients.items() if factor):
        alone = {other: float(other == name) for other in coefficients}
        criterion = MGHFLoss(preset, coefficients=alone, inn=inn).to(pairs[0][0].device)
        ratios[name] = gradient_ratio(criterion, pairs)
    return ratios


def calibrate(
    images: Sequence[Tensor],
    preset: Preset = "balanced",
    *,
    inn: str | Path | HighFrequencyINN = "bundled",
    task: Task | None = None,
) -> dict[str, float]:
    """Find the coefficients that make `preset` on your images, or with your network, what it is on photographs.

    >>> images = [torch.rand(1, 3, 64, 64) for _ in range(2)]
    >>> coefficients = calibrate(images)
    >>> criterion = MGHFLoss("balanced", coefficients=coefficients)

    Args:
        images: ground truths (1, 3, H, W) in [0, 1], of 32 pixels a side at least; the middle 256 x 256 are used.
        preset: whose balance is kept.
        inn: your network; see `MGHFLoss`.
        task: how images are degraded, `"sr"` (bicubic x4) or `"denoise"` (25/255); None for the preset's.

    Raises:
        ValueError: there are no images, or one is smaller than 32 pixels or flat.

    coefficient = r / r_1, where r_1 is the norm of the gradient of the term over that of L1, the median over the
    images, and r the same of coefficient * term of the preset on photographs (`RATIOS`).
    """
    _checks.one_of("preset", preset, Preset)
    chosen: Task = _checks.one_of("task", default_task(preset) if task is None else task, Task)
    if not images:
        raise ValueError("images must hold at least one image, got none")
    for index, image in enumerate(images):
        _checks.image(f"images[{index}]", image, least_size=32)
        if image.std() < 1 / 255:
            raise ValueError(f"images[{index}] must show something, got a standard deviation of {image.std():.2g}")
    generator = torch.Generator().manual_seed(0)
    gts = [middle(image, SIDE) for image in images]
    found = gradient_ratios(preset, [(degrade(gt, chosen, generator), gt) for gt in gts], inn)
    return {name: float(f"{RATIOS[preset][name] / ratio:.3g}") for name, ratio in found.items()}


def default_task(preset: Preset) -> Task:
    """What a preset is for."""
    return "denoise" if preset == "denoise" else "sr"
