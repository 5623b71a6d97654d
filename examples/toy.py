"""What the examples share: pairs of images, a small x4 network, options."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

from mghf_loss.training.data import Cropping, FolderCrops, list_images
from mghf_loss.training.dead_leaves import dead_leaves

SCALE = 4


class Pairs(Dataset[tuple[Tensor, Tensor]]):
    """`count` pairs (lr, gt), (3, crop / 4, crop / 4) and (3, crop, crop) in [0, 1], each a random crop of its own.

    Crops of the images below a folder, or synthetic images; a pair is a function of its index, so that nothing needs
    to be shuffled.
    """

    def __init__(self, images: Path | None, count: int, crop: int) -> None:
        self.count, self.crop = count, crop
        self.folder = FolderCrops(list_images(images), Cropping(crop)) if images else None

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(index)
        gt = self.folder.crop(index) if self.folder else dead_leaves(self.crop, generator)
        gt = (gt + 1) / 2
        size = self.crop // SCALE
        return F.interpolate(gt[None], (size, size), mode="bicubic", antialias=True)[0], gt


class SmallSR(nn.Module):
    """(B, 3, h, w) -> (B, 3, 4h, 4w): three convolutions and a pixel shuffle, added to bicubic."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, width, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, 3 * SCALE**2, 3, padding=1),
            nn.PixelShuffle(SCALE),
        )

    def forward(self, lr: Tensor) -> Tensor:
        """Upscale a batch."""
        return F.interpolate(lr, scale_factor=SCALE, mode="bicubic") + self.body(lr)


def parser(description: str | None) -> argparse.ArgumentParser:
    """Options that every example takes."""
    parser = argparse.ArgumentParser(
        description=(description or "").split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--images", type=Path, help="folder of images, searched recursively; else synthetic ones")
    parser.add_argument("--steps", type=int, default=20, help="optimiser steps")
    parser.add_argument("--batch", type=int, default=4, help="images a step and process")
    parser.add_argument("--crop", type=int, default=64, help="height and width of gt, a multiple of 4")
    parser.add_argument("--seed", type=int, default=0, help="of everything random")
    return parser


def line(step: int, **values: Tensor) -> str:
    """`step` and named 0-d values in one line."""
    return f"step {step} " + " ".join(f"{name}={value.item():.6g}" for name, value in values.items())
