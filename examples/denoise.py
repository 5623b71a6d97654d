"""Denoising with the preset "denoise": noise of 25/255, a small residual model, a picture at the end.

pip install ".[demo]"
python examples/denoise.py --steps 2000 --images DIR
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from mghf_loss import MGHFLoss
from mghf_loss.toy import Crops, SmallSR, photograph, save_images


class Denoiser(nn.Module):
    """A small residual model that works at half the resolution: (B, 3, H, W) -> (B, 3, H, W), H and W even."""

    def __init__(self) -> None:
        super().__init__()
        self.body = SmallSR(in_channels=12, scale=2)

    def forward(self, noisy: Tensor) -> Tensor:
        """Remove the noise."""
        return noisy + self.body.residual(F.pixel_unshuffle(noisy, 2))


def main() -> None:
    """Train a small denoiser."""
    parser = argparse.ArgumentParser(description="Train a small denoiser with L1 + MGHFLoss.")
    parser.add_argument("--images", type=Path, help="folder of photographs [scikit-image's]")
    parser.add_argument("--noise", type=float, default=25.0, help="standard deviation of the noise in 1/255")
    parser.add_argument("--steps", type=int, default=200, help="optimiser steps")
    parser.add_argument("--batch", type=int, default=4, help="crops per step")
    parser.add_argument("--seed", type=int, default=0, help="seed of initialisation, crops and noise")
    parser.add_argument("--out", type=Path, default=Path("denoise.png"), help="picture of an unseen photograph")
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(arguments.seed)
    model = Denoiser().to(device)
    criterion = MGHFLoss("denoise").to(device)
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-3)

    def add_noise(image: Tensor) -> Tensor:
        return image + arguments.noise / 255 * torch.randn_like(image)

    crops = Crops(arguments.images, arguments.steps * arguments.batch, seed=arguments.seed)
    progress = tqdm(DataLoader(crops, arguments.batch), unit="step")
    for step, batch in enumerate(progress):
        gt = batch.to(device)
        output = model(add_noise(gt))
        pixel, mghf = F.l1_loss(output, gt), criterion(output, gt)
        optimiser.zero_grad(set_to_none=True)
        (pixel + mghf).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.2)
        optimiser.step()
        if step % 10 == 0 or step + 1 == arguments.steps:
            progress.write(f"step {step}  pixel {pixel.item():.6f}  mghf {mghf.item():.6f}")

    gt = photograph("chelsea")[..., 80:208, 100:228].to(device)
    noisy = add_noise(gt)
    with torch.no_grad():
        save_images(arguments.out, {"noisy": noisy, "output": model(noisy), "ground truth": gt})


if __name__ == "__main__":
    main()
