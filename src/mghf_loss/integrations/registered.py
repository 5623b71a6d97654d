"""The losses as the registries of BasicSR and its descendants build them: keyword options and a `loss_weight`."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from .. import _checks, dino, mghf, terms
from ..criterion import Criterion

LOSSES: tuple[type[Criterion], ...] = (mghf.MGHFLoss, mghf.MGHFnLoss, dino.DinoJSDLoss)


class TrainerLoss(nn.Module):
    """A loss of this package from a trainer's options: those of `loss_class`, beside the trainer's own `factors`.

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

    def weighted_terms(self, sr: Tensor, gt: Tensor) -> dict[str, Tensor]:
        """Coefficient * term by name, 0-d, of `sr` against `gt`, (B, 3, H, W); gradient to `sr` only."""
        criterion = self.criterion
        per_image = criterion.term_values(sr, gt)
        values = {name: terms.reduce(value, criterion.reduction) for name, value in per_image.items()}
        self.terms = {name: value.detach() for name, value in values.items()}
        return {name: criterion.coefficients[name] * value for name, value in values.items()}


class RegisteredLoss(TrainerLoss):
    """A `TrainerLoss` with a factor.

    Args:
        loss_weight: factor of the loss, a finite number of at least 0. The subclass says who multiplies by it.
        options: of `loss_class`, which `of` chooses: `WeightedLoss.of(MGHFLoss)(preset="sharp", memory="low")`.
    """

    def __init__(self, loss_weight: float = 1.0, **options: Any) -> None:
        super().__init__(("loss_weight",), options)
        self.loss_weight = _checks.number("loss_weight", loss_weight)

    @classmethod
    def of(cls, loss_class: type[Criterion]) -> type[RegisteredLoss]:
        """Return this class for `loss_class`, named like it, as registries go by `__name__`."""
        name = loss_class.__name__
        names = {"__module__": cls.__module__, "__qualname__": f"{cls.__name__}.of({name})"}
        return type(name, (cls,), {"loss_class": loss_class, **names})


class WeightedLoss(RegisteredLoss):
    """loss_weight * criterion(sr, gt), sr, gt (B, 3, H, W) in the criterion's input range -> 0-d tensor."""

    def forward(self, sr: Tensor, gt: Tensor) -> Tensor:
        """Return the weighted loss of `sr` against `gt`; gradient to `sr` only."""
        return self.loss_weight * torch.stack(list(self.weighted_terms(sr, gt).values())).sum()


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
