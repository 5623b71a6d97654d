"""Lightning: bfloat16 precision, gradient accumulation, terms and heat maps in TensorBoard, a picture at the end.

pip install ".[demo]" lightning tensorboard
python examples/lightning_trainer.py --images DIR --steps 1000 --out runs
tensorboard --logdir runs
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import lightning
import torch
import torch.nn.functional as F
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor
from torch.utils.data import DataLoader

from mghf_loss import MGHFLoss
from mghf_loss.integrations.lightning import MGHFLogger
from mghf_loss.toy import Crops, SmallSR, downscale, photograph, save_images, upscale


class SR(lightning.LightningModule):
    """The model and its loss; the loss's network is in no checkpoint and no optimiser."""

    def __init__(self) -> None:
        super().__init__()
        self.model = SmallSR()
        self.criterion = MGHFLoss()

    def training_step(self, gt: Tensor, batch_idx: int) -> dict[str, Tensor]:
        """Return the loss, and the images for `MGHFLogger`, which logs the terms."""
        sr = self.model(downscale(gt))
        loss = F.l1_loss(sr, gt) + self.criterion(sr, gt)
        self.log("train/loss", loss)
        return {"loss": loss, "sr": sr, "gt": gt}

    def validation_step(self, gt: Tensor, batch_idx: int) -> dict[str, Tensor]:
        """Log PSNR; `MGHFLogger` logs the loss and its terms."""
        sr = self.model(downscale(gt))
        self.log("val/psnr", -10 * F.mse_loss(sr.clamp(0, 1), gt).log10())
        return {"sr": sr, "gt": gt}

    def configure_optimizers(self) -> Any:
        """Adam over the model."""
        return torch.optim.Adam(self.parameters(), lr=1e-3)


def main() -> None:
    """Train, validate and write logs."""
    parser = argparse.ArgumentParser(description="Train a small x4 model with L1 + MGHFLoss under Lightning.")
    parser.add_argument("--images", type=Path, help="folder of photographs [scikit-image's]")
    parser.add_argument("--steps", type=int, default=200, help="optimiser steps")
    parser.add_argument("--batch", type=int, default=4, help="crops per batch")
    parser.add_argument("--accumulate", type=int, default=2, help="batches per optimiser step")
    parser.add_argument("--precision", default="bf16-mixed", help="Lightning's precision")
    parser.add_argument("--seed", type=int, default=0, help="seed of initialisation and crops")
    parser.add_argument("--out", type=Path, default=Path("runs"), help="folder of logs, checkpoints and the picture")
    arguments = parser.parse_args()
    lightning.seed_everything(arguments.seed)
    trainer = lightning.Trainer(
        max_steps=arguments.steps,
        precision=arguments.precision,
        accumulate_grad_batches=arguments.accumulate,
        gradient_clip_val=0.2,
        logger=TensorBoardLogger(arguments.out),
        callbacks=[MGHFLogger(every=max(1, arguments.steps // 2))],
        log_every_n_steps=1,
        num_sanity_val_steps=0,
    )
    count = arguments.steps * arguments.accumulate * arguments.batch
    training = Crops(arguments.images, count, seed=arguments.seed)
    validation = Crops(arguments.images, 2 * arguments.batch, seed=arguments.seed + 1)
    module = SR()
    trainer.fit(module, DataLoader(training, arguments.batch), DataLoader(validation, arguments.batch))

    if trainer.is_global_zero:
        gt = photograph("chelsea")[..., 80:208, 100:228].to(module.device)
        lr = downscale(gt)
        with torch.no_grad():
            sr = module.model(lr)
        save_images(arguments.out / "lightning.png", {"bicubic": upscale(lr), "SR": sr, "ground truth": gt})


if __name__ == "__main__":
    main()
