"""torchmetrics: a loss of this package as a metric, averaged over images, batches and processes.

    from mghf_loss.integrations.torchmetrics import MGHFMetric

    metric = MGHFMetric().to(device)
    for lr, gt in loader:
        metric.update(model(lr), gt)
    print(metric.compute())  # 0 for equal images, lower is better

Needs the extra `metrics`. In Lightning, `self.log("val/mghf", metric)` resets it after each epoch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _checks
from ..criterion import Criterion
from ..metric import TILE, distance
from ..mghf import MGHFLoss
from . import needs

with needs("torchmetrics", "pip install 'torchmetrics>=1.4'"):
    from torchmetrics import Metric


class MGHFMetric(Metric):
    """Average `mghf_loss.metric.distance` over all images: 0 for equal images, lower is better.

    update(sr, gt), both (B, 3, H, W) in the criterion's `input_range`, of any size, which may change between updates;
    compute() -> 0-d tensor, or 0-d tensors by name.

    >>> metric = MGHFMetric()
    >>> for _ in range(2):
    ...     metric.update(*torch.rand(2, 1, 3, 32, 32))
    >>> metric.compute() > 0
    tensor(True)

    Args:
        criterion: one of the three losses, which is taken over and moves with the metric; None for `MGHFLoss()`.
            `MGHFLoss(shift="average")` is slower and more accurate for small images. Its `reduction` does not
            matter: every image counts as much.
        return_terms: compute a dictionary of the unweighted terms and `"total"`, instead of the total.
        tile: largest side of a tile, see `mghf_loss.metric.distance`.
        options: of `torchmetrics.Metric`, for instance `dist_sync_on_step`.

    Raises:
        TypeError: `criterion` is no loss of this package.
        ValueError, TypeError: as `distance`.
    """

    higher_is_better = False
    is_differentiable = False
    full_state_update = False
    sums: Tensor
    count: Tensor

    def __init__(
        self, criterion: Criterion | None = None, *, return_terms: bool = False, tile: int = TILE, **options: Any
    ) -> None:
        super().__init__(**options)
        criterion = MGHFLoss() if criterion is None else criterion
        if not isinstance(criterion, Criterion):
            raise TypeError(f"criterion must be a loss of mghf-loss, got {type(criterion).__name__}")
        self.criterion = criterion
        self.return_terms = _checks.boolean("return_terms", return_terms)
        self.tile = tile
        self.names = [name for name, factor in criterion.coefficients.items() if factor]
        self.add_state("sums", torch.zeros(1 + len(self.names), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, sr: Tensor, gt: Tensor) -> None:
        """Add the images of a batch."""
        _checks.pair(sr, gt)
        total, terms = distance(self.criterion, sr, gt, tile=self.tile)
        # A sum over the images, whatever the criterion's reduction made of them.
        scale = len(sr) if self.criterion.reduction == "mean" else 1
        values = torch.stack([value.sum() for value in (total, *(terms[name] for name in self.names))])
        self.sums += scale * values.to(self.sums.dtype)
        self.count += len(sr)

    def compute(self) -> Tensor | dict[str, Tensor]:
        """Return the mean over the images since the last reset."""
        total, *terms = (self.sums / self.count).float()
        return {**dict(zip(self.names, terms, strict=True)), "total": total} if self.return_terms else total
