"""The losses as functions, for one-off calls: the criterion of each set of options is built once and kept.

    from mghf_loss import functional
    value = functional.mghf(sr, gt)  # (B, 3, H, W) in [0, 1] -> 0-d tensor

In a training loop build the loss instead, `criterion = MGHFLoss()`: it moves with your model, and `torch.compile` sees
no cache.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from . import _checks
from .criterion import Criterion
from .dino import DinoJSDLoss
from .mghf import MGHFLoss, MGHFnLoss

KEPT = 8  # criteria
CALL = ("return_terms", "generator", "mask")  # options of a call, not of a criterion


def mghf_n(sr: Tensor, gt: Tensor, **options: Any) -> Any:
    """Compute `MGHFnLoss(...)(sr, gt)` once: one squared error of the high-frequency details.

    sr, gt (B, 3, H, W) in [0, 1] -> 0-d tensor, differentiable in `sr`.

    >>> sr, gt = torch.rand(2, 1, 3, 64, 64)
    >>> torch.equal(mghf_n(sr, gt), MGHFnLoss()(sr, gt))
    True

    Args:
        sr: super-resolved images.
        gt: ground truth.
        **options: of `MGHFnLoss`, and of a call: `return_terms`, `generator`, `mask`.

    Raises:
        ValueError, TypeError, CheckpointError: as `MGHFnLoss` and its call.
    """
    return _call(MGHFnLoss, sr, gt, options)


def mghf(sr: Tensor, gt: Tensor, **options: Any) -> Any:
    """Compute `MGHFLoss(...)(sr, gt)` once: the weighted sum of terms.

    sr, gt (B, 3, H, W) in [0, 1] -> 0-d tensor, differentiable in `sr`.

    >>> sr, gt = torch.rand(2, 1, 3, 64, 64)
    >>> loss, terms = mghf(sr, gt, coefficients={"patch_nce": 0}, return_terms=True)
    >>> list(terms)
    ['content', 'style', 'correlation', 'texture', 'grid']

    Args:
        sr: super-resolved images.
        gt: ground truth.
        **options: of `MGHFLoss`, `preset` among them, and of a call: `return_terms`, `generator`, `mask`.

    Raises:
        ValueError, TypeError, CheckpointError: as `MGHFLoss` and its call.
    """
    return _call(MGHFLoss, sr, gt, options)


def dino_jsd(sr: Tensor, gt: Tensor, **options: Any) -> Any:
    """Compute `DinoJSDLoss(...)(sr, gt)` once: the divergence of DINOv2 embeddings.

    sr, gt (B, 3, H, W) in [0, 1] -> 0-d tensor in nats, differentiable in `sr`. The first call downloads DINOv2.

    >>> import timm
    >>> # the default is DINOv2
    >>> vit = timm.create_model("vit_tiny_patch16_224", dynamic_img_size=True)
    >>> sr, gt = torch.rand(2, 1, 3, 64, 64)
    >>> dino_jsd(sr, gt, model=vit) >= 0
    tensor(True)

    Args:
        sr: super-resolved images.
        gt: ground truth.
        **options: of `DinoJSDLoss`, and of a call: `return_terms`, `generator`, `mask`.

    Raises:
        ValueError, TypeError, CheckpointError: as `DinoJSDLoss` and its call.
    """
    return _call(DinoJSDLoss, sr, gt, options)


def _call(loss_class: type[Criterion], sr: Tensor, gt: Tensor, options: dict[str, Any]) -> Any:
    _checks.pair(sr, gt)
    call = {name: options.pop(name) for name in CALL if name in options}
    # The networks hold float32 at least: half-precision images share one criterion with float32 ones.
    dtype = torch.promote_types(sr.dtype, torch.float32)
    return _criterion(loss_class, sr.device, dtype, _frozen(options))(sr, gt, **call)


@lru_cache(KEPT)
def _criterion(
    loss_class: type[Criterion], device: torch.device, dtype: torch.dtype, options: frozenset[tuple[str, Any]]
) -> Criterion:
    thawed: dict[str, Any] = {name: dict(value) if isinstance(value, frozenset) else value for name, value in options}
    return loss_class(**thawed).to(device, dtype)


def _frozen(options: Mapping[str, Any]) -> frozenset[tuple[str, Any]]:
    """Options as a key: a mapping, such as `coefficients`, and a list have no hash."""
    frozen = {}
    for name, value in options.items():
        if isinstance(value, Mapping):
            value = frozenset(value.items())
        elif isinstance(value, list):
            value = tuple(value)
        frozen[name] = value
    return frozenset(frozen.items())
