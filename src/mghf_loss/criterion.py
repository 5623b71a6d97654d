"""What the three losses share: a sum of terms, its reduction over images, maps of where the terms arise."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Literal, overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import images, terms


class Criterion(nn.Module, ABC):
    """Sum of coefficient * term: sr, gt (B, 3, H, W) -> 0-d tensor, or (B,) with `reduction="none"`.

    Attributes:
        coefficients: factor of each term by name; the names are those of `term_values`.
        input_range: values of black and white in `sr` and `gt`.
        reduction: over the images of a batch, `"mean"`, `"sum"` or `"none"`.
    """

    coefficients: dict[str, float]
    input_range: tuple[float, float]
    reduction: terms.Reduction

    @abstractmethod
    def term_values(self, sr: Tensor, gt: Tensor, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """Unweighted terms by name and per image (B,), differentiable in `sr`.

        `generator` is the source of what is random, PatchNCE's places; the global one where None.
        """

    @overload
    def forward(
        self,
        sr: Tensor,
        gt: Tensor,
        *,
        return_terms: Literal[False] = False,
        generator: torch.Generator | None = None,
    ) -> Tensor: ...

    @overload
    def forward(
        self, sr: Tensor, gt: Tensor, *, return_terms: Literal[True], generator: torch.Generator | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]: ...

    def forward(
        self, sr: Tensor, gt: Tensor, *, return_terms: bool = False, generator: torch.Generator | None = None
    ) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        """Return the loss of `sr` against `gt`, both (B, 3, H, W) in `input_range`; gradient to `sr` only.

        Args:
            sr: super-resolved images.
            gt: ground truth; never gets a gradient.
            return_terms: also return the unweighted terms by name, detached, reduced like the loss.
            generator: source of PatchNCE's random places; the global one where None.
        """
        _check_generator(generator)
        values = self.term_values(sr, gt, generator)
        total = sum(self.coefficients[name] * value for name, value in values.items())
        assert isinstance(total, Tensor)
        loss = terms.reduce(total, self.reduction)
        if not return_terms:
            return loss
        return loss, {name: terms.reduce(value.detach(), self.reduction) for name, value in values.items()}

    def heatmap(self, sr: Tensor, gt: Tensor, *, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """|d(coefficient * term) / d sr| of every term and of their sum, `total`: where a step would change SR.

        sr, gt (B, 3, H, W) in `input_range` -> (B, H, W) by name, in float32 at least: the Euclidean norm over
        colours of the gradient of each image's own loss, whatever `reduction` is, in units of the loss per unit of
        `input_range`, averaged over 5 x 5 pixels. Also without gradients and in inference mode.
        """
        _check_generator(generator)
        with torch.no_grad():
            images.check_pair(sr, gt)
        with torch.inference_mode(False), torch.enable_grad():
            # Half precision would lose what is small; an inference tensor takes part in no gradient.
            sr = sr.to(torch.promote_types(sr.dtype, torch.float32))
            sr, gt = (image.clone() if image.is_inference() else image for image in (sr, gt))
            sr = sr.detach().requires_grad_()
            values = self.term_values(sr, gt, generator)
            gradients = {
                name: torch.autograd.grad(self.coefficients[name] * value.sum(), sr, retain_graph=True)[0]
                for name, value in values.items()
            }
        gradients["total"] = torch.stack(list(gradients.values())).sum(0)
        return {
            name: F.avg_pool2d(gradient.norm(dim=1), 5, stride=1, padding=2, count_include_pad=False)
            for name, gradient in gradients.items()
        }


def _check_generator(generator: object) -> None:
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"generator must be a torch.Generator or None, got {generator!r}")
