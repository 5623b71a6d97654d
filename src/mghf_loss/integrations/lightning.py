"""Lightning: a callback that logs terms and feature energies to any logger, and heat maps to TensorBoard.

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
            loss = F.l1_loss(sr, gt) + self.criterion(sr, gt)
            self.log("train/loss", loss)
            return {"loss": loss, "sr": sr, "gt": gt}  # what the callback sees; `return loss` where you do not want it

    lightning.Trainer(callbacks=[MGHFLogger(every=500)], precision="bf16-mixed")

The callback logs each term, so the module need not. In validation it does where `validation_step` returns
{"sr": sr, "gt": gt}. See examples/lightning_trainer.py. With manual optimisation `global_step` counts the steps of all
optimisers: two per batch in a GAN.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..criterion import Criterion
from . import needs
from .tensorboard import energies, log_pictures, loss_and_terms, uncompiled

with needs("lightning", "pip install lightning"):
    from lightning.pytorch import Callback, LightningModule, Trainer
    from lightning.pytorch.loggers import TensorBoardLogger


class MGHFLogger(Callback):
    """Logs the loss, its terms and feature energies to every logger of the trainer, and pictures to TensorBoard.

    Takes `sr` and `gt` from what `training_step` and `validation_step` return, a mapping with these keys. A step that
    returns None is passed over.

    - Training: `mghf/train/loss`, `mghf/train/term/<name>` and `mghf/train/energy/...` every so many optimiser steps,
      by the first process, of its batch. The step is the trainer's `global_step`, which counts optimiser steps. The
      values do not wait for `log_every_n_steps`.
    - Validation: `mghf/val/loss` and `mghf/val/term/<name>` through the module's `self.log`, as means over all batches
      and processes, so that `ModelCheckpoint(monitor="mghf/val/loss")` finds them; the energies of the first batch. A
      second data loader logs `mghf/val1/...`. The step is the one that Lightning gives to what a module logs.
    - Pictures, of the first process: those of `mghf_loss.integrations.tensorboard.log_pair`, to each
      `TensorBoardLogger`, at the steps of training, and of the first batch of each data loader in validation.

    Args:
        criterion: name of the module's attribute that is a loss of this package.
        every: optimiser steps between two logs of training; None for none.
        validation: log in validation, too.
        images: pictures of each log at most; 0 for scalars alone, which spares the backward passes of the heat maps.

    Raises:
        ValueError: an argument is not as above, or the trainer has no logger.
        TypeError: the attribute is no loss of this package, or a step returns something else without `sr` and `gt`;
            at the first batch, that of Lightning's sanity check included, and on every process.
    """

    def __init__(
        self, criterion: str = "criterion", every: int | None = 500, validation: bool = True, images: int = 4
    ) -> None:
        if every is not None and every < 1:
            raise ValueError(f"every must be at least 1, or None, got {every!r}")
        if images < 0:
            raise ValueError(f"images must be at least 0, got {images!r}")
        self.criterion = criterion
        self.every = every
        self.validation = validation
        self.images = images
        self._last = 0

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check what would otherwise fail after hours."""
        self._check(trainer, pl_module)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check again, for `Trainer.validate`."""
        self._check(trainer, pl_module)

    def _check(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not isinstance(uncompiled(getattr(pl_module, self.criterion, None)), Criterion):
            raise TypeError(f"{type(pl_module).__name__}.{self.criterion} must be a loss of mghf-loss for MGHFLogger")
        dry = getattr(trainer, "fast_dev_run", False)
        if not dry and not trainer.loggers:
            raise ValueError("MGHFLogger needs a logger, got a trainer without: lightning.Trainer(logger=...)")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count from here: the steps before a resumption were logged."""
        self._last = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log where another `every` steps are done, once each, whatever is accumulated and however many optimisers."""
        if self.every is None:
            return
        pair = self._pair(outputs, "training_step")
        step, last = trainer.global_step, self._last
        if not pair or step // self.every <= last // self.every:
            return
        self._last = step
        if trainer.is_global_zero:
            criterion = uncompiled(getattr(pl_module, self.criterion))
            values = {**loss_and_terms(criterion, *pair, step), **energies(criterion, *pair)}
            # Not through `pl_module.log`, of which Lightning drops what falls between two `log_every_n_steps`.
            for logger in trainer.loggers:
                logger.log_metrics({f"mghf/train/{name}": value for name, value in values.items()}, step=step)
            self._draw(trainer, criterion, *pair, "mghf/train")

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Log a batch, which Lightning averages with the others; draw the first of a data loader."""
        if not self.validation:
            return
        pair = self._pair(outputs, "validation_step")
        if not pair or trainer.sanity_checking:
            return
        tag = f"mghf/val{dataloader_idx}" if dataloader_idx else "mghf/val"
        criterion = uncompiled(getattr(pl_module, self.criterion))
        values = loss_and_terms(criterion, *pair, trainer.global_step)
        if batch_idx == 0:
            values |= energies(criterion, *pair)
        pl_module.log_dict(
            {f"{tag}/{name}": value for name, value in values.items()},
            on_step=False,
            on_epoch=True,
            batch_size=len(pair[0]),
            sync_dist=True,
            add_dataloader_idx=False,
        )
        if batch_idx == 0 and trainer.is_global_zero:
            self._draw(trainer, criterion, *pair, tag)

    @staticmethod
    def _pair(outputs: Any, method: str) -> tuple[Tensor, Tensor] | None:
        """`sr` and `gt` of a step, or None where it returned nothing."""
        if outputs is None or (isinstance(outputs, Mapping) and not outputs):  # the training loop's word for None
            return None
        sr, gt = (outputs.get(name) if isinstance(outputs, Mapping) else None for name in ("sr", "gt"))
        if not isinstance(sr, Tensor) or not isinstance(gt, Tensor):
            raise TypeError(
                f'{method} must return a dictionary with "sr" and "gt" for MGHFLogger, got {outputs!r:.200}'
            )
        return sr, gt

    def _draw(self, trainer: Trainer, criterion: Criterion, sr: Tensor, gt: Tensor, tag: str) -> None:
        for logger in trainer.loggers:
            if self.images and isinstance(logger, TensorBoardLogger):
                log_pictures(
                    logger.experiment, criterion, sr[: self.images], gt[: self.images], trainer.global_step, tag
                )
