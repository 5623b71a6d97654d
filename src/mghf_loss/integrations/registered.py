"""The losses as the registries of BasicSR and its descendants build them: keyword options and a `loss_weight`."""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Iterable
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from .. import dino, mghf, terms
from ..criterion import Criterion


class TrainerLoss(nn.Module):
    """A loss of this package as a trainer's options describe it.

    Args:
        factors: names of the trainer's own options, for the message about unknown ones.
        options: of `loss_class`.

    Attributes:
        criterion: the loss, a `loss_class`.
        terms: the terms of the last call by name: unweighted, detached, 0-d; empty before the first.

    Raises:
        TypeError: an option is unknown.
        ValueError: an option's value is not as `loss_class` says, or `reduction` is `"none"`.
    """

    loss_class: type[Criterion]

    def __init__(self, factors: Iterable[str], options: dict[str, Any]) -> None:
        super().__init__()
        known = inspect.signature(self.loss_class).parameters
        unknown = sorted(options.keys() - known.keys())
        if unknown:
            names = ", ".join([*factors, *known])
            raise TypeError(f"unknown option {', '.join(unknown)} of {type(self).__name__}; known are {names}")
        if options.get("reduction") == "none":
            raise ValueError("reduction must be 'mean' or 'sum' inside a trainer, which adds scalars, got 'none'")
        self.criterion = self.loss_class(**options)
        self.terms: dict[str, Tensor] = {}
        self._has_seen_gt = False

    def weighted_terms(self, sr: Tensor, gt: Tensor) -> dict[str, Tensor]:
        """Coefficient * term by name, 0-d, of `sr` against `gt`, (B, 3, H, W); gradient to `sr` only.

        The first call warns where `gt` leaves `input_range`, or hardly leaves its black.
        """
        criterion = self.criterion
        values = {
            name: terms.reduce(value, criterion.reduction) for name, value in criterion.term_values(sr, gt).items()
        }
        if not self._has_seen_gt and not torch.compiler.is_compiling():
            self._has_seen_gt = True
            _warn_of_range(gt, criterion.input_range)
        self.terms = {name: value.detach() for name, value in values.items()}
        return {name: criterion.coefficients[name] * value for name, value in values.items()}


class RegisteredLoss(TrainerLoss):
    """A `TrainerLoss` with a factor.

    Args:
        loss_weight: factor of the loss, a finite number of at least 0. The subclass says who multiplies by it.
        options: of `loss_class`.
    """

    def __init__(self, loss_weight: float = 1.0, **options: Any) -> None:
        super().__init__(("loss_weight",), options)
        self.loss_weight = check_loss_weight("loss_weight", loss_weight)


class WeightedLoss(RegisteredLoss):
    """loss_weight * criterion(sr, gt), sr, gt (B, 3, H, W) in the criterion's input range -> 0-d tensor."""

    def forward(self, sr: Tensor, gt: Tensor) -> Tensor:
        """Return the weighted loss of `sr` against `gt`; gradient to `sr` only."""
        return self.loss_weight * torch.stack(list(self.weighted_terms(sr, gt).values())).sum()


class MGHFLoss(WeightedLoss):
    """`loss_weight` times `mghf_loss.MGHFLoss(**options)`."""

    loss_class = mghf.MGHFLoss


class MGHFnLoss(WeightedLoss):
    """`loss_weight` times `mghf_loss.MGHFnLoss(**options)`."""

    loss_class = mghf.MGHFnLoss


class DinoJSDLoss(WeightedLoss):
    """`loss_weight` times `mghf_loss.DinoJSDLoss(**options)`."""

    loss_class = dino.DinoJSDLoss


def check_loss_weight(name: str, value: float) -> float:
    """Return `value` as a float; raise `ValueError` unless it is a finite number of at least 0."""
    if not isinstance(value, Real) or isinstance(value, bool) or not 0 <= value < math.inf:
        hint = "; YAML takes numbers like 5e-2 for text, write 0.05" if isinstance(value, str) else ""
        raise ValueError(f"{name} must be a finite number of at least 0, got {value!r}{hint}")
    return float(value)


def _warn_of_range(gt: Tensor, input_range: tuple[float, float]) -> None:
    """Warn where `gt` leaves the range by 5 %, lies within 2 % of its black, or has nothing below 0 where it may."""
    low, high = (bound.item() for bound in gt.detach().aminmax())
    black, white = input_range
    unit = white - black
    outside = low < black - 0.05 * unit or high > white + 0.05 * unit
    if outside or high < black + 0.02 * unit or low >= 0 > black:
        warnings.warn(
            f"the first GT has values from {low:.4g} to {high:.4g}, while input_range is ({black:g}, {white:g}): "
            "unless these images are meant to be so, set input_range to what the data set gives",
            stacklevel=2,
        )


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
