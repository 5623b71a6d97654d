"""What the three losses share: a sum of terms, its reduction over images, maps of where the terms arise."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Mapping
from functools import wraps
from types import MappingProxyType
from typing import Any, Literal, overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import _checks, terms

Memory = Literal["normal", "low"]


class Criterion(nn.Module, ABC):
    """What the losses share: sum of coefficient * term, sr, gt (B, 3, H, W) -> 0-d tensor, or (B,) without reduction.

    Attributes:
        coefficients: factor of each term by name, read-only; `set_coefficients` changes it.
        input_range: values of black and white in `sr` and `gt`.
        reduction: over the images of a batch, `"mean"`, `"sum"` or `"none"`.
    """

    def __init__(
        self, coefficients: Mapping[str, float], input_range: tuple[float, float], reduction: terms.Reduction
    ) -> None:
        super().__init__()
        self._coefficients = dict(coefficients)
        self.input_range = _checks.input_range(input_range)
        self.reduction: terms.Reduction = _checks.one_of("reduction", reduction, terms.Reduction)
        self._has_seen_gt = False

    def __init_subclass__(cls, **options: Any) -> None:
        """Let the constructor name its own argument where it is given that of another library."""
        super().__init_subclass__(**options)
        construct = cls.__init__
        known = inspect.signature(construct).parameters

        @wraps(construct)
        def __init__(self: Any, *args: Any, **kwargs: Any) -> None:  # noqa: N807
            _checks.foreign(cls.__name__, kwargs.keys() - known)
            construct(self, *args, **kwargs)

        cls.__init__ = __init__  # type: ignore[method-assign]

    @property
    def least_size(self) -> int:
        """Least height and width of the images, in pixels."""
        inn = getattr(self, "inn", None)
        return 1 if inn is None else inn.network.stride

    @property
    def coefficients(self) -> Mapping[str, float]:
        """Factor of each term by name."""
        return MappingProxyType(self._coefficients)

    @coefficients.setter
    def coefficients(self, value: Any) -> None:
        raise AttributeError(f"coefficients are read-only: use set_coefficients(name=factor, ...), got {value!r}")

    def set_coefficients(self, **coefficients: float) -> None:
        """Change factors of terms from the next call on, for a schedule; a compiled loss is compiled again.

        >>> criterion = MGHFLoss()
        >>> criterion.set_coefficients(style=300, patch_nce=0)  # a term with 0 is not computed
        >>> criterion.coefficients["style"]
        300.0

        Raises:
            ValueError: a term is unknown, a factor is no finite number of at least 0, all factors would be 0, or the
                network that the term needs was not loaded because the term was off when the loss was built.
        """
        unavailable = [name for name, factor in coefficients.items() if factor and not self._is_available(name)]
        if unavailable:
            raise ValueError(
                f"the network of {', '.join(unavailable)} is not loaded, because the term was off when the loss was "
                f"built: give it a factor there, {type(self).__name__}(coefficients={{{unavailable[0]!r}: ...}})"
            )
        self._coefficients = merged_coefficients(self._coefficients, coefficients)

    def _is_available(self, term: str) -> bool:
        """Whether the network that `term` needs is there."""
        return True

    @abstractmethod
    def _terms(self, sr: Tensor, gt: Tensor, generator: torch.Generator | None) -> dict[str, Tensor]:
        """Unweighted terms by name and per image (B,) of a checked pair."""

    def term_values(
        self, sr: Tensor, gt: Tensor, generator: torch.Generator | None = None, *, mask: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Unweighted terms by name and per image (B,), differentiable in `sr`; arguments as in `forward`."""
        _checks.generator(generator)
        _checks.pair(sr, gt, self.least_size)
        if mask is not None:
            sr = masked(sr, gt, mask)
        values = self._terms(sr, gt, generator)
        is_traced = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
        if not self._has_seen_gt and not is_traced:  # inside vmap, images have no values that can be looked at
            self._has_seen_gt = True
            _checks.warn_of_range(gt, *self.input_range)
        return values

    @overload
    def forward(
        self,
        sr: Tensor,
        gt: Tensor,
        *,
        return_terms: Literal[False] = False,
        generator: torch.Generator | None = None,
        mask: Tensor | None = None,
    ) -> Tensor: ...

    @overload
    def forward(
        self,
        sr: Tensor,
        gt: Tensor,
        *,
        return_terms: Literal[True],
        generator: torch.Generator | None = None,
        mask: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]: ...

    def forward(
        self,
        sr: Tensor,
        gt: Tensor,
        *,
        return_terms: bool = False,
        generator: torch.Generator | None = None,
        mask: Tensor | None = None,
        **unknown: Any,
    ) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        """Return the loss of `sr` against `gt`, both (B, 3, H, W) in `input_range`; gradient to `sr` only.

        The first eager call warns where the values of `gt` do not look like `input_range`.

        Args:
            sr: super-resolved images.
            gt: ground truth; never gets a gradient.
            return_terms: also return the unweighted terms by name, detached, reduced like the loss.
            generator: its seed, with GT, chooses the shift of the Haar grid and PatchNCE's random locations. Nothing is
                drawn from it, so gradient checkpointing computes the same loss again.
            mask: weight of each pixel's error, (B or 1, 1, H, W), boolean or in [0, 1]. The loss compares
                mask * sr + (1 - mask) * gt with `gt`: errors where the mask is 0 count nothing, and gradients are
                multiplied by the mask, for all terms alike. The mask gets no gradient.
            **unknown: refused; the error names the argument to use instead of one of another library's.
        """
        if unknown:
            _checks.foreign(type(self).__name__, unknown)
            raise TypeError(f"{type(self).__name__} takes sr, gt and options, got an unknown {', '.join(unknown)}")
        values = self.term_values(sr, gt, generator, mask=mask)
        first, *others = values
        total = self._coefficients[first] * values[first]
        for name in others:
            total = torch.add(total, values[name], alpha=self._coefficients[name])
        loss = terms.reduce(total, self.reduction)
        if not return_terms:
            return loss
        return loss, {name: terms.reduce(value.detach(), self.reduction) for name, value in values.items()}

    def heatmap(
        self, sr: Tensor, gt: Tensor, *, generator: torch.Generator | None = None, mask: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Show where a training step would change SR: |d(coefficient * term) / d sr| of every term and of `total`.

        sr, gt (B, 3, H, W) in `input_range` -> (B, H, W) by name, in float32 at least: the Euclidean norm over
        colours of the gradient of each image's own loss, whatever `reduction` is, in units of the loss per unit of
        `input_range`, averaged over 5 x 5 pixels. Also without gradients and in inference mode.

        >>> sr, gt = torch.rand(2, 1, 3, 64, 64)
        >>> {name: heat.shape for name, heat in MGHFnLoss().heatmap(sr, gt).items()}
        {'content': torch.Size([1, 64, 64]), 'total': torch.Size([1, 64, 64])}
        """
        with torch.no_grad():
            _checks.pair(sr, gt)
        with torch.inference_mode(False), torch.enable_grad():
            # Half precision would lose what is small; an inference tensor takes part in no gradient.
            sr = sr.to(torch.promote_types(sr.dtype, torch.float32))
            sr, gt = (image.clone() if image.is_inference() else image for image in (sr, gt))
            sr = sr.detach().requires_grad_()
            values = self.term_values(sr, gt, generator, mask=mask)
            gradients = {
                name: torch.autograd.grad(self._coefficients[name] * value.sum(), sr, retain_graph=True)[0]
                for name, value in values.items()
            }
        gradients["total"] = torch.stack(list(gradients.values())).sum(0)
        return {
            name: F.avg_pool2d(gradient.norm(dim=1), 5, stride=1, padding=2, count_include_pad=False)
            for name, gradient in gradients.items()
        }

    def extra_repr(self) -> str:
        """Show the coefficients."""
        return ", ".join(f"{name}={value:g}" for name, value in self._coefficients.items())


def merged_coefficients(coefficients: Mapping[str, float], changes: Mapping[str, float]) -> dict[str, float]:
    """Return `coefficients` with checked `changes`."""
    if not isinstance(changes, Mapping):
        raise TypeError(f"coefficients must be a mapping from term to factor, got {changes!r}")
    _checks.names("term", changes, coefficients)
    factors = {name: _checks.number(f"coefficients[{name!r}]", factor) for name, factor in changes.items()}
    merged = {**coefficients, **factors}
    if not any(merged.values()):
        raise ValueError("all coefficients are 0: there is nothing to compute")
    return merged


def masked(sr: Tensor, gt: Tensor, mask: Tensor) -> Tensor:
    """Return mask * sr + (1 - mask) * gt, exactly `sr` where the mask is 1 and `gt` where it is 0."""
    _checks.mask(mask, sr)
    gt = gt.detach()
    if mask.dtype == torch.bool:
        return torch.where(mask, sr, gt)  # what is not finite in SR, and masked out, has no effect
    dtype = torch.promote_types(sr.dtype, gt.dtype)
    return torch.lerp(gt.to(dtype), sr.to(dtype), mask.detach().to(dtype))


def rescale(image: Tensor, source: tuple[float, float], target: tuple[float, float]) -> Tensor:
    """Map the range `source` to the range `target`, linearly and without clamping."""
    if source == target:
        return image
    scale = (target[1] - target[0]) / (source[1] - source[0])
    offset = target[0] - source[0] * scale
    return image * scale + offset if offset else image * scale
