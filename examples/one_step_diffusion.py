"""A one-step diffusion student as in SinSR: the loss compares decoded images, through a frozen decoder.

    pip install ".[demo]"
    python examples/one_step_diffusion.py --steps 2000 --images DIR

A residual-shifting chain in a latent space ends at z_T = encode(up(LR)) + kappa n. The student takes z_T back to the
latent of GT in one step. Its loss is the latent MSE plus MGHF on the decoded images: the gradient passes through the
decoder, which stays frozen, and `memory="low"` keeps the loss's share of the memory small beside it.

The autoencoder here is a tiny one that is trained for a moment first; in SinSR or OSEDiff it is a VQ-GAN or the
VAE of Stable Diffusion, whose images are in [-1, 1]: hence `input_range`.

Reference: Yue et al., ResShift, NeurIPS 2023; Wang et al., SinSR, CVPR 2024; the loss in such a student: arXiv
2411.13548. The sizes are ours.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from mghf_loss import MGHFLoss
from mghf_loss.toy import Crops, downscale, photograph, save_images, upscale

CHANNELS = 8  # of the latent, at a quarter of the resolution
KAPPA = 0.3


def convolutions(*widths: int) -> list[nn.Module]:
    """Convolutions 3 x 3 with SiLU between."""
    layers: list[nn.Module] = []
    for wide_in, wide_out in itertools.pairwise(widths):
        layers += [nn.SiLU(), nn.Conv2d(wide_in, wide_out, 3, padding=1)]
    return layers[1:]


class Autoencoder(nn.Module):
    """(B, 3, H, W) in [-1, 1] <-> latent (B, 8, H/4, W/4)."""

    def __init__(self) -> None:
        super().__init__()
        self.encode = nn.Sequential(nn.PixelUnshuffle(4), *convolutions(48, 64, CHANNELS))
        self.decode = nn.Sequential(*convolutions(CHANNELS, 64, 48), nn.PixelShuffle(4))


def train_autoencoder(batches: Iterable[Tensor], device: str) -> Autoencoder:
    """Return an autoencoder of images in [0, 1], frozen: its parameters get no gradient, its input does."""
    autoencoder = Autoencoder().to(device)
    optimiser = torch.optim.Adam(autoencoder.parameters(), lr=2e-3)
    for batch in batches:
        images = 2 * batch.to(device) - 1
        optimiser.zero_grad(set_to_none=True)
        F.l1_loss(autoencoder.decode(autoencoder.encode(images)), images).backward()
        optimiser.step()
    return autoencoder.requires_grad_(False).eval()


def main() -> None:
    """Train the autoencoder, freeze it, train the student."""
    parser = argparse.ArgumentParser(description="Train a one-step diffusion student with the loss on decoded images.")
    parser.add_argument("--images", type=Path, help="folder of photographs [scikit-image's]")
    parser.add_argument("--steps", type=int, default=200, help="optimiser steps of the student")
    parser.add_argument("--autoencoder-steps", type=int, default=200, help="optimiser steps of the autoencoder, before")
    parser.add_argument("--batch", type=int, default=4, help="crops per step")
    parser.add_argument("--memory", choices=("normal", "low"), default="low", help="memory of the loss")
    parser.add_argument("--seed", type=int, default=0, help="seed of initialisation, crops and noise")
    parser.add_argument("--out", type=Path, default=Path("one-step.png"), help="picture of an unseen photograph")
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(arguments.seed)

    def batches(name: str, steps: int, seed: int) -> tqdm[Tensor]:
        crops = Crops(arguments.images, steps * arguments.batch, seed=seed)
        return tqdm(DataLoader(crops, arguments.batch), name, unit="step")

    autoencoder = train_autoencoder(batches("autoencoder", arguments.autoencoder_steps, arguments.seed + 1), device)
    student = nn.Sequential(*convolutions(2 * CHANNELS, 64, 64, CHANNELS)).to(device)
    criterion = MGHFLoss(input_range=(-1, 1), memory=arguments.memory).to(device)
    optimiser = torch.optim.Adam(student.parameters(), lr=1e-3)

    def restore(lr: Tensor) -> Tensor:
        """Return the latent of SR, one step back from T to 0; images are in [-1, 1]."""
        condition = autoencoder.encode(upscale(lr))
        z_last = condition + KAPPA * torch.randn_like(condition)
        return z_last - student(torch.cat((z_last, condition), dim=1))

    progress = batches("student", arguments.steps, arguments.seed)
    for step, batch in enumerate(progress):
        gt = 2 * batch.to(device) - 1
        z = restore(downscale(gt))
        latent = F.mse_loss(z, autoencoder.encode(gt))
        mghf = criterion(autoencoder.decode(z), gt)  # the gradient passes through the decoder
        optimiser.zero_grad(set_to_none=True)
        (latent + mghf).backward()
        nn.utils.clip_grad_norm_(student.parameters(), 0.2)
        optimiser.step()
        if step % 10 == 0 or step + 1 == arguments.steps:
            progress.write(f"step {step}  latent {latent.item():.5f}  mghf {mghf.item():.5f}")

    gt = photograph("chelsea")[..., 80:208, 100:228].to(device)
    lr = downscale(gt)
    with torch.no_grad():
        sr = (autoencoder.decode(restore(2 * lr - 1)) + 1) / 2
    save_images(arguments.out, {"bicubic": upscale(lr), "SR": sr, "ground truth": gt})


if __name__ == "__main__":
    main()
