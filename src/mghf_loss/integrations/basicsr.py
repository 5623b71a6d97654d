"""BasicSR: importing this module registers the losses and models that log their terms.

    import mghf_loss.integrations.basicsr  # before train_pipeline, as often as you like
    from basicsr.train import train_pipeline

    train_pipeline(root_path)  # python train.py -opt options.yml

    model_type: MGHFSRModel  # SRModel and a value per term in the log; or MGHFSRGANModel
    train:
      pixel_opt: {type: L1Loss, loss_weight: 1.0}
      perceptual_opt: {type: MGHFPerceptualLoss, preset: balanced}  # both weights are 1
      grad_clip: 0.2  # largest norm of the generator's gradient; the two models' own

The pixel slot takes `MGHFLoss`, `MGHFnLoss` or `DinoJSDLoss`, with the options of the classes of that name and
`loss_weight`; the perceptual slot takes `MGHFPerceptualLoss`, beside a pixel loss of BasicSR's. The factors are applied
once, by the loss; BasicSR adds what it returns. Images are RGB in [0, 1], as BasicSR's data sets give them. The models
log, beside BasicSR's own `l_pix` and `l_percep`, the unweighted terms as `l_pix_<term>` and `l_perceptual_<term>`,
averaged over processes, to the text log and TensorBoard (`losses/...`).

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

from .. import _checks, mghf
from . import needs
from .registered import LOSSES, TrainerLoss, WeightedLoss, register

_MOVED = "torchvision.transforms.functional_tensor"
with needs("basicsr", "pip install basicsr"):
    if importlib.util.find_spec("basicsr") and not importlib.util.find_spec(_MOVED):
        sys.modules[_MOVED] = importlib.import_module("torchvision.transforms._functional_tensor")
    from basicsr.models.sr_model import SRModel  # type: ignore[import-not-found]
    from basicsr.models.srgan_model import SRGANModel  # type: ignore[import-not-found]
    from basicsr.utils import get_root_logger  # type: ignore[import-not-found]
    from basicsr.utils.registry import LOSS_REGISTRY, MODEL_REGISTRY  # type: ignore[import-not-found]


class MGHFPerceptualLoss(TrainerLoss):
    """Perceptual slot: `MGHFLoss` as (percep, style), sr, gt (B, 3, H, W) -> 0-d tensors or None.

    percep = perceptual_weight * sum of coefficient * term over all terms but style,
    style = style_weight * coefficient * style. With equal weights they add up to the weight times `mghf_loss.MGHFLoss`.

    Args:
        perceptual_weight: 0 leaves these terms out, and percep is None.
        style_weight: 0 leaves style out, and style is None.
        options: of `mghf_loss.MGHFLoss`.
    """

    loss_class = mghf.MGHFLoss

    def __init__(self, perceptual_weight: float = 1.0, style_weight: float = 1.0, **options: Any) -> None:
        weights = {"perceptual_weight": perceptual_weight, "style_weight": style_weight}
        weights = {name: _checks.number(name, value) for name, value in weights.items()}
        if not any(weights.values()):
            raise ValueError("perceptual_weight and style_weight are 0: there is nothing to compute")
        unused = set() if weights["perceptual_weight"] else mghf.OFF.keys() - {"style"}
        unused |= set() if weights["style_weight"] else {"style"}
        if unused:  # neither computed nor their networks loaded
            options["coefficients"] = {**(options.get("coefficients") or {}), **dict.fromkeys(unused, 0.0)}
        super().__init__(weights, options)
        self.perceptual_weight, self.style_weight = weights.values()

    def forward(self, sr: Tensor, gt: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Return (percep, style) of `sr` against `gt`; gradient to `sr` only."""
        weighted = self.weighted_terms(sr, gt)
        style = weighted.pop("style", None)
        percep = torch.stack(list(weighted.values())).sum() * self.perceptual_weight if weighted else None
        return percep, None if style is None else style * self.style_weight


class LogsTerms:
    """Mixin for a BasicSR model, before its base class: the terms of its losses, by slot and name, enter `log_dict`.

    It also clips the norm of the generator's gradient to `train: grad_clip`, refuses a loss of this package in the
    wrong slot, and warns where no other pixel loss holds the colours.
    """

    def init_training_settings(self) -> None:
        """Build losses and optimisers, and look at them before anything is trained."""
        super().init_training_settings()  # type: ignore[misc]
        pixel, perceptual = (getattr(self, name, None) for name in ("cri_pix", "cri_perceptual"))
        # By attribute rather than class, which is another one after a reload of this module.
        if _has_terms(pixel) and hasattr(pixel, "perceptual_weight"):
            raise ValueError(
                f"{type(pixel).__name__} returns two losses and belongs into perceptual_opt; "
                "pixel_opt takes MGHFLoss, MGHFnLoss or DinoJSDLoss with loss_weight"
            )
        if _has_terms(perceptual) and hasattr(perceptual, "loss_weight"):
            raise ValueError(
                f"{type(perceptual).__name__} returns one loss and belongs into pixel_opt; "
                "perceptual_opt takes MGHFPerceptualLoss with perceptual_weight and style_weight"
            )
        if (pixel is None and _has_terms(perceptual)) or _has_terms(pixel):
            get_root_logger().warning(
                "pixel_opt has no pixel loss: MGHF compares details, and colours may drift. Put L1Loss there and "
                "MGHFPerceptualLoss into perceptual_opt."
            )
        clip = self.opt["train"].get("grad_clip")  # type: ignore[attr-defined]
        if clip is not None:
            network = self.net_g  # type: ignore[attr-defined]
            if not _checks.number("grad_clip", clip):
                raise ValueError("grad_clip must be more than 0, which would stop the training; leave it out for none")

            def clip_gradient(*_: Any) -> None:
                nn.utils.clip_grad_norm_(network.parameters(), clip)

            self.optimizer_g.register_step_pre_hook(clip_gradient)  # type: ignore[attr-defined]

    def optimize_parameters(self, current_iter: int) -> None:
        """Make the base class's step, then add the terms that it computed."""
        losses = {slot.removeprefix("cri_"): loss for slot, loss in vars(self).items() if _has_terms(loss)}
        for loss in losses.values():
            loss.terms = {}  # a GAN's generator is not trained in every iteration
        super().optimize_parameters(current_iter)  # type: ignore[misc]
        values = {f"l_{slot}_{name}": value for slot, loss in losses.items() for name, value in loss.terms.items()}
        if values:
            self.log_dict.update(self.reduce_loss_dict(values))  # type: ignore[attr-defined]


def _has_terms(loss: Any) -> bool:
    return isinstance(getattr(loss, "terms", None), dict)


class MGHFSRModel(LogsTerms, SRModel):
    """BasicSR's `SRModel` with the terms in its log."""


class MGHFSRGANModel(LogsTerms, SRGANModel):
    """BasicSR's `SRGANModel` with the terms in its log."""


register(LOSS_REGISTRY, *map(WeightedLoss.of, LOSSES), MGHFPerceptualLoss)
register(MODEL_REGISTRY, MGHFSRModel, MGHFSRGANModel)
