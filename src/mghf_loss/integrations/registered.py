"""The losses as the registries of BasicSR and its descendants build them: keyword options and a `loss_weight`."""

from __future__ import annotations

import math
from numbers import Real
from typing import Any

from torch import Tensor, nn

from .. import dino, mghf
from ..criterion import Criterion


class RegisteredLoss(nn.Module):
    """A loss of this package as options describe it, with a `loss_weight`.

    Args:
        loss_weight: factor of the loss, a finite number of at least 0.
        options: of `loss_class`; an unknown one is a `TypeError`.

    Attributes:
        criterion: the loss, a `loss_class`.
        loss_weight: the factor. The subclass says who multiplies by it.
    """

    loss_class: type[Criterion]

    def __init__(self, loss_weight: float = 1.0, **options: Any) -> None:
        super().__init__()
        self.loss_weight = check_loss_weight("loss_weight", loss_weight)
        check_scalar(options.get("reduction"))
        self.criterion = self.loss_class(**options)


class WeightedLoss(RegisteredLoss):
    """loss_weight * criterion(sr, gt), sr, gt (B, 3, H, W) in the criterion's input range -> 0-d tensor.

    Attributes:
        terms: the terms of the last call by name: unweighted, detached, 0-d; empty before the first.
    """

    def __init__(self, loss_weight: float = 1.0, **options: Any) -> None:
        super().__init__(loss_weight, **options)
        self.terms: dict[str, Tensor] = {}

    def forward(self, sr: Tensor, gt: Tensor) -> Tensor:
        """Return the weighted loss of `sr` against `gt`; gradient to `sr` only."""
        loss, self.terms = self.criterion(sr, gt, return_terms=True)
        return self.loss_weight * loss


class MGHFLoss(WeightedLoss):
    """`loss_weight` times `mghf_loss.MGHFLoss(**options)`."""

    loss_class = mghf.MGHFLoss


class MGHFnLoss(WeightedLoss):
    """`loss_weight` times `mghf_loss.MGHFnLoss(**options)`."""

    loss_class = mghf.MGHFnLoss


class DinoJSDLoss(WeightedLoss):
    """`loss_weight` times `mghf_loss.DinoJSDLoss(**options)`."""

    loss_class = dino.DinoJSDLoss


def check_scalar(reduction: Any) -> None:
    """Raise `ValueError` where a loss would return a value per image."""
    if reduction == "none":
        raise ValueError("reduction must be 'mean' or 'sum' inside a trainer, which adds scalars, got 'none'")


def check_loss_weight(name: str, value: float) -> float:
    """Return `value` as a float; raise `ValueError` unless it is a finite number of at least 0."""
    if not isinstance(value, Real) or isinstance(value, bool) or not 0 <= value < math.inf:
        raise ValueError(f"{name} must be a finite number of at least 0, got {value!r}")
    return float(value)


def register(registry: Any, *classes: type) -> None:
    """Add classes to a registry of BasicSR's kind under their names; again is no error.

    Raises `ValueError` where a name belongs to another package's class, which would be used in its place.
    """
    for cls in classes:
        if cls.__name__ not in registry:
            registry.register(cls)
            continue
        known = registry.get(cls.__name__)
        if (known.__module__, known.__name__) != (cls.__module__, cls.__name__):
            raise ValueError(f"the registry's {cls.__name__} is {known.__module__}.{known.__name__}, not mghf-loss's")
