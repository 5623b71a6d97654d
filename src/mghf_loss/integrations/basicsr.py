"""BasicSR: importing this module registers the losses and models that log their terms.

    import mghf_loss.integrations.basicsr  # before train_pipeline, as often as you like
    from basicsr.train import train_pipeline

    train_pipeline(root_path)  # python train.py -opt options.yml

The pixel slot takes `MGHFLoss`, `MGHFnLoss` or `DinoJSDLoss`, with the options of the classes of that name and
`loss_weight`; the perceptual slot takes `MGHFPerceptualLoss`, beside a pixel loss of BasicSR's:

    model_type: MGHFSRModel           # SRModel and a value per term in the log; or MGHFSRGANModel
    train:
      pixel_opt:
        type: L1Loss
        loss_weight: 1.0
      perceptual_opt:
        type: MGHFPerceptualLoss
        perceptual_weight: 0.05       # of every term but style
        style_weight: 0.05            # of style
        coefficients: { patch_nce: 0 }  # and any other option of mghf_loss.MGHFLoss

The factors are applied once, by the loss; BasicSR adds what it returns. Images are RGB in [0, 1], as BasicSR's data
sets give them. The models log, beside BasicSR's own `l_pix` and `l_percep`, the unweighted terms as `l_pix_<term>` and
`l_perceptual_<term>`, averaged over processes, to the text log and TensorBoard (`losses/...`).

BasicSR 1.4.2, the last release, imports a module that torchvision has renamed since 0.17; importing this module first
lets it start nevertheless.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from typing import Any

import torch
from torch import Tensor, nn

from .. import mghf, terms
from . import needs
from .registered import DinoJSDLoss, MGHFLoss, MGHFnLoss, check_loss_weight, check_scalar, register

_MOVED = "torchvision.transforms.functional_tensor"
with needs("basicsr", "pip install basicsr"):
    if importlib.util.find_spec("basicsr") and not importlib.util.find_spec(_MOVED):
        sys.modules[_MOVED] = importlib.import_module("torchvision.transforms._functional_tensor")
    from basicsr.models.sr_model import SRModel  # type: ignore[import-not-found]
    from basicsr.models.srgan_model import SRGANModel  # type: ignore[import-not-found]
    from basicsr.utils.registry import LOSS_REGISTRY, MODEL_REGISTRY  # type: ignore[import-not-found]


class MGHFPerceptualLoss(nn.Module):
    """Perceptual slot: `MGHFLoss` as (percep, style), sr, gt (B, 3, H, W) -> 0-d tensors or None.

    percep = perceptual_weight * sum of coefficient * term over all terms but style,
    style = style_weight * coefficient * style. With equal weights they add up to the weight times `mghf_loss.MGHFLoss`.

    Args:
        perceptual_weight: 0 leaves these terms out, and percep is None.
        style_weight: 0 leaves style out, and style is None.
        options: of `mghf_loss.MGHFLoss`; an unknown one is a `TypeError`.

    Attributes:
        criterion: the `mghf_loss.MGHFLoss`.
        terms: the terms of the last call by name: unweighted, detached, 0-d; empty before the first.
    """

    def __init__(self, perceptual_weight: float = 1.0, style_weight: float = 1.0, **options: Any) -> None:
        super().__init__()
        self.perceptual_weight = check_loss_weight("perceptual_weight", perceptual_weight)
        self.style_weight = check_loss_weight("style_weight", style_weight)
        check_scalar(options.get("reduction"))
        unused = set() if self.perceptual_weight else mghf.DEFAULT_COEFFICIENTS.keys() - {"style"}
        unused |= set() if self.style_weight else {"style"}
        if unused:  # neither computed nor their networks loaded
            options["coefficients"] = {**(options.get("coefficients") or {}), **dict.fromkeys(unused, 0.0)}
        self.criterion = mghf.MGHFLoss(**options)
        self.terms: dict[str, Tensor] = {}

    def forward(self, sr: Tensor, gt: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Return (percep, style) of `sr` against `gt`; gradient to `sr` only."""
        values = {
            name: terms.reduce(value, self.criterion.reduction)
            for name, value in self.criterion.term_values(sr, gt).items()
        }
        self.terms = {name: value.detach() for name, value in values.items()}
        weighted = {name: self.criterion.coefficients[name] * value for name, value in values.items()}
        style = weighted.pop("style", None)
        percep = torch.stack(list(weighted.values())).sum() * self.perceptual_weight if weighted else None
        return percep, None if style is None else style * self.style_weight


class LogsTerms:
    """Mixin for a BasicSR model, before its base class: the terms of its losses, by slot and name, enter `log_dict`."""

    def optimize_parameters(self, current_iter: int) -> None:
        """Make the base class's step, then add the terms that it computed."""
        # By attribute rather than class, which is another one after a reload of this module.
        losses = {
            slot.removeprefix("cri_"): loss
            for slot, loss in vars(self).items()
            if isinstance(getattr(loss, "terms", None), dict)
        }
        for loss in losses.values():
            loss.terms = {}  # a GAN's generator is not trained in every iteration
        super().optimize_parameters(current_iter)  # type: ignore[misc]
        values = {f"l_{slot}_{name}": value for slot, loss in losses.items() for name, value in loss.terms.items()}
        if values:
            self.log_dict.update(self.reduce_loss_dict(values))  # type: ignore[attr-defined]


class MGHFSRModel(LogsTerms, SRModel):
    """BasicSR's `SRModel` with the terms in its log."""


class MGHFSRGANModel(LogsTerms, SRGANModel):
    """BasicSR's `SRGANModel` with the terms in its log."""


register(LOSS_REGISTRY, MGHFLoss, MGHFnLoss, DinoJSDLoss, MGHFPerceptualLoss)
register(MODEL_REGISTRY, MGHFSRModel, MGHFSRGANModel)
