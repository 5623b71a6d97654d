"""traiNNer-redux: importing this module registers `MGHFLoss`, `MGHFnLoss` and `DinoJSDLoss`.

It is installed like `mghf_loss.integrations.neosr`, by a line in a file `traiNNer/losses/mghf_loss.py` of your clone:

    import mghf_loss.integrations.trainner_redux

and a loss in the list of losses in the options, with any option of the class of that name:

    losses:
      - {type: mghfloss, loss_weight: 1.0, preset: balanced}

`loss_weight` is an attribute here and nothing more: the trainer multiplies by it. The losses return their terms by
name, each with its coefficient, which the trainer adds and logs one by one (it leaves out terms that are 0 or NaN).
Images are RGB in [0, 1], autocast and channels_last are welcome. traiNNer-redux is not on PyPI: this follows its call
convention of the versions that multiply by `loss_weight` (2025 on), and has not been run in it. Earlier versions expect
the loss to multiply: `register(LOSS_REGISTRY, *map(WeightedLoss.of, LOSSES))` of `mghf_loss.integrations.registered`.
"""

from __future__ import annotations

from torch import Tensor

from . import needs
from .registered import LOSSES, RegisteredLoss, register

with needs("traiNNer", "see https://github.com/the-database/traiNNer-redux"):
    from traiNNer.utils.registry import LOSS_REGISTRY  # type: ignore[import-not-found]


class UnweightedLoss(RegisteredLoss):
    """sr, gt (B, 3, H, W) -> {name: coefficient * term}, 0-d; the trainer multiplies by `loss_weight`."""

    def forward(self, sr: Tensor, gt: Tensor) -> dict[str, Tensor]:
        """Return coefficient * term by name, without `loss_weight`; gradient to `sr` only."""
        return self.weighted_terms(sr, gt)


register(LOSS_REGISTRY, *map(UnweightedLoss.of, LOSSES))
