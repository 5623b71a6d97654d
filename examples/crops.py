"""Random crops for the examples: of a folder of images, or of photographs that come with scikit-image."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset

from mghf_loss._files import read_image
from mghf_loss.toy import TRAINING_PHOTOGRAPHS, photograph, random_crop
from mghf_loss.training.data import list_images


class RandomCrops(Dataset[Tensor]):
    """`length` crops (3, size, size) in [0, 1]; which one an index is depends on `seed` alone."""

    def __init__(self, folder: Path | None, length: int, size: int = 64, seed: int = 0) -> None:
        names = TRAINING_PHOTOGRAPHS if folder is None else list_images(folder)
        self.images = [photograph(name) if isinstance(name, str) else read_image(name) for name in names]
        for name, image in zip(names, self.images, strict=True):
            if min(image.shape[-2:]) < size:
                raise ValueError(f"{name} must be at least {size} x {size} pixels, got {tuple(image.shape[-2:])}")
        self.length, self.size, self.seed = length, size, seed

    def __len__(self) -> int:
        """How many there are."""
        return self.length

    def __getitem__(self, index: int) -> Tensor:
        """Return a crop of a random photograph."""
        if not 0 <= index < self.length:
            raise IndexError(index)
        generator = torch.Generator().manual_seed(1_000_003 * self.seed + index)
        return random_crop(self.images, generator, self.size)[0]


def positive(text: str) -> int:
    """A number of things, from the command line."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return number


def options(description: str, steps: int) -> argparse.ArgumentParser:
    """What every example takes."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--images", type=Path, help="folder of photographs [scikit-image's]")
    parser.add_argument("--steps", type=positive, default=steps, help="optimiser steps")
    parser.add_argument("--batch", type=positive, default=4, help="crops a step")
    parser.add_argument("--seed", type=int, default=0, help="of initialisation, crops and random places")
    return parser
