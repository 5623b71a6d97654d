"""Lightning: a callback that logs terms, heat maps and feature energies to TensorBoard.

    import lightning
    from lightning.pytorch.loggers import TensorBoardLogger
    from mghf_loss.integrations.lightning import MGHFLogger

    lightning.Trainer(logger=TensorBoardLogger("runs"), callbacks=[MGHFLogger(every=500)])

The loss itself needs no integration: it is an attribute of your module, whose checkpoints and optimiser do not see its
network, and which moves it to the device. The callback logs where `training_step` returns {"loss": loss, "sr": sr,
"gt": gt}, and `validation_step` the last two. A whole module: examples/lightning_trainer.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..criterion import Criterion
from . import needs
from .tensorboard import log_pair, uncompiled

with needs("tensorboard", "pip install tensorboard"):
    from torch.utils.tensorboard import SummaryWriter

with needs("lightning", "pip install lightning"):
    from lightning.pytorch import Callback, LightningModule, Trainer
    from lightning.pytorch.loggers import TensorBoardLogger


class MGHFLogger(Callback):
    """Writes `log_pair` of `mghf_loss.integrations.tensorboard` every so many optimiser steps, and in validation.

    Takes `sr` and `gt` from what `training_step` and `validation_step` return, a mapping with these keys; in validation
    from the first batch of each data loader. A step that returns None is passed over. Writes on the first process
    alone, to every `TensorBoardLogger`, with tags `mghf/train/...` and `mghf/val/...`; the step is the trainer's
    `global_step`, which counts the steps of all optimisers: with manual optimisation of a GAN two per batch. Nothing is
    written with `fast_dev_run`, which has no logger.

    Args:
        criterion: name of the module's attribute that is a loss of this package.
        every: optimiser steps between two logs of training; None for none.
        validation: log in validation, too.
        images: pictures of each log at most; 0 for scalars alone, which spares the backward passes of the heat maps.

    Raises:
        ValueError: an argument is not as above, or the trainer has no `TensorBoardLogger`.
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
        if not isinstance(uncompiled(getattr(pl_module, self.criterion, None)), Criterion):
            raise TypeError(f"{type(pl_module).__name__}.{self.criterion} must be a loss of mghf-loss for MGHFLogger")
        dry = getattr(trainer, "fast_dev_run", False)
        if trainer.is_global_zero and not dry and not self._writers(trainer):
            raise ValueError(f"MGHFLogger needs a TensorBoardLogger, got the loggers {trainer.loggers}")

    on_validation_start = on_fit_start  # for `Trainer.validate`

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
        if pair and step // self.every > last // self.every:
            self._last = step
            self._log(trainer, pl_module, *pair, "mghf/train")

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
        if batch_idx or not self.validation:
            return
        pair = self._pair(outputs, "validation_step")
        if pair and not trainer.sanity_checking:
            self._log(trainer, pl_module, *pair, f"mghf/val{dataloader_idx}" if dataloader_idx else "mghf/val")

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

    def _log(self, trainer: Trainer, pl_module: LightningModule, sr: Tensor, gt: Tensor, tag: str) -> None:
        if trainer.is_global_zero:
            criterion = getattr(pl_module, self.criterion)
            for writer in self._writers(trainer):
                log_pair(writer, criterion, sr, gt, trainer.global_step, tag=tag, images=self.images)

    @staticmethod
    def _writers(trainer: Trainer) -> list[SummaryWriter]:
        return [logger.experiment for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]
