"""Lightning: a callback that logs terms, heat maps and feature energies to TensorBoard.

The loss itself needs no integration: it is an attribute of your module, whose checkpoints and optimiser do not see its
network, and which moves it to the device.

    import lightning
    from mghf_loss import MGHFLoss
    from mghf_loss.integrations.lightning import MGHFLogger

    class SR(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = ...
            self.criterion = MGHFLoss()

        def training_step(self, batch, batch_idx):
            lr, gt = batch
            sr = self.model(lr)
            mghf, terms = self.criterion(sr, gt, return_terms=True)
            self.log_dict({f"train/{name}": value for name, value in terms.items()})
            loss = F.l1_loss(sr, gt) + 0.05 * mghf
            return {"loss": loss, "sr": sr, "gt": gt}  # what the callback sees; `return loss` where you do not want it

    lightning.Trainer(logger=TensorBoardLogger("runs"), callbacks=[MGHFLogger(every=500)], precision="bf16-mixed")

Also written for validation where `validation_step` returns {"sr": sr, "gt": gt}. See examples/lightning_trainer.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from ..mghf import MGHFLoss
from . import needs
from .tensorboard import log_pair

with needs("lightning", "pip install lightning"):
    from lightning.pytorch import Callback, LightningModule, Trainer
    from lightning.pytorch.loggers import TensorBoardLogger


class MGHFLogger(Callback):
    """Writes `log_pair` of `mghf_loss.integrations.tensorboard` every so many optimiser steps, and in validation.

    Takes `sr` and `gt` from what `training_step` and `validation_step` return, a mapping with these keys; in validation
    from the first batch of each data loader. Writes on the first process alone, to every `TensorBoardLogger`, with tags
    `mghf/train/...` and `mghf/val/...`; the step is the trainer's `global_step`, which counts optimiser steps.

    Args:
        criterion: name of the module's attribute that is the `MGHFLoss`.
        every: optimiser steps between two logs of training; None for none.
        images: pictures of each log at most; 0 for scalars alone, which spares the backward passes of the heat maps.

    Raises:
        ValueError: an argument is not as above, or the trainer has no `TensorBoardLogger`.
        TypeError: the attribute is no `MGHFLoss`, or a step returns no mapping with `sr` and `gt`.
    """

    def __init__(self, criterion: str = "criterion", every: int | None = 500, images: int = 4) -> None:
        if every is not None and every < 1:
            raise ValueError(f"every must be at least 1, or None, got {every!r}")
        if images < 0:
            raise ValueError(f"images must be at least 0, got {images!r}")
        self.criterion = criterion
        self.every = every
        self.images = images
        self._last: int | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check what would otherwise fail after hours."""
        if not isinstance(getattr(pl_module, self.criterion, None), MGHFLoss):
            raise TypeError(f"{type(pl_module).__name__}.{self.criterion} must be an MGHFLoss for MGHFLogger")
        if trainer.is_global_zero and not self._writers(trainer):
            raise ValueError(f"MGHFLogger needs a TensorBoardLogger, got the loggers {trainer.loggers}")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log after optimiser steps `every`, 2 * `every`, ..., once each, whatever is accumulated."""
        step = trainer.global_step
        if self.every is not None and step and step % self.every == 0 and step != self._last:
            self._last = step
            self._log(trainer, pl_module, outputs, "training_step", "mghf/train")

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Log the first batch of a data loader."""
        if batch_idx == 0 and not trainer.sanity_checking:
            tag = f"mghf/val{dataloader_idx}" if dataloader_idx else "mghf/val"
            self._log(trainer, pl_module, outputs, "validation_step", tag)

    def _log(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, method: str, tag: str) -> None:
        if not trainer.is_global_zero:
            return
        sr, gt = (outputs.get(name) if isinstance(outputs, Mapping) else None for name in ("sr", "gt"))
        if not isinstance(sr, Tensor) or not isinstance(gt, Tensor):
            raise TypeError(
                f'{method} must return a dictionary with "sr" and "gt" for MGHFLogger, got {outputs!r:.200}'
            )
        criterion, step = getattr(pl_module, self.criterion), trainer.global_step
        for writer in self._writers(trainer):
            log_pair(writer, criterion, sr, gt, step, tag=tag, images=self.images)

    @staticmethod
    def _writers(trainer: Trainer) -> list[SummaryWriter]:
        return [logger.experiment for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]
