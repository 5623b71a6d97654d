"""neosr: importing this module registers `MGHFLoss`, `MGHFnLoss` and `DinoJSDLoss`.

neosr has no hook for packages: it imports every file of `neosr/losses/` whose name ends in `_loss.py`. So put this line
into a file `neosr/losses/mghf_loss.py` of your clone:

    import mghf_loss.integrations.neosr

and name a loss in any slot of the options that takes (output, gt) and one scalar, for instance the perceptual one. The
slot takes `loss_weight`, which the loss applies once, and every option of the class of that name:

    perceptual_opt = { type = "MGHFLoss", loss_weight = 1.0, preset = "balanced" }  # under [train]

Images are RGB in [0, 1]. neosr is not on PyPI: this follows its documented call convention (`LOSS_REGISTRY`, keyword
options, one 0-d tensor) and has not been run in it.
"""

from __future__ import annotations

from . import needs
from .registered import LOSSES, WeightedLoss, register

with needs("neosr", "see https://github.com/neosr-project/neosr"):
    from neosr.utils.registry import LOSS_REGISTRY  # type: ignore[import-not-found]

register(LOSS_REGISTRY, *map(WeightedLoss.of, LOSSES))
