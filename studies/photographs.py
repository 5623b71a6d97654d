"""Photographs in memory: folders that are checked before anything is trained, crops, middles."""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from mghf_loss._files import read_pixels
from mghf_loss.toy import middle
from mghf_loss.training.data import list_images

LEAST_SIDE = 200  # two NIQE blocks of 96 and the border that judges cut


def check(folder: Path, least: int) -> None:
    """Raise where there is no photograph below `folder`, or one is unreadable or smaller than `least`."""
    for path in list_images(folder):
        height, width = _pixels(path).shape[-2:]  # all of it: a file may end early
        if min(height, width) < least:
            raise ValueError(f"{path} must be at least {least} x {least} pixels, got {width} x {height}")


@cache  # as bytes: all of them as floats would not fit
def load(folder: Path) -> list[Tensor]:
    """The photographs below `folder`, (3, H, W), uint8, cut to multiples of 4."""
    images = [_pixels(path) for path in list_images(folder)]
    return [middle(image, max(image.shape)) for image in images]


@cache  # `load` keeps views of the same memory
def _pixels(path: Path) -> Tensor:
    return read_pixels(path)


def unit_range(pixels: Tensor, device: str = "cpu") -> Tensor:
    """(3, H, W) or (B, 3, H, W), uint8, to (B, 3, H, W) in [0, 1]."""
    return pixels.reshape(-1, *pixels.shape[-3:]).to(device).float() / 255


def random_crops(images: list[Tensor], count: int, size: int, generator: torch.Generator) -> Tensor:
    """Draw (count, 3, size, size), uint8: a photograph, then a location in it."""
    crops = []
    for _ in range(count):
        image = images[int(torch.randint(len(images), (), generator=generator))]
        top, left = (int(torch.randint(side - size + 1, (), generator=generator)) for side in image.shape[-2:])
        crops.append(image[:, top : top + size, left : left + size])
    return torch.stack(crops)


@cache
def digest(folder: Path) -> str:
    """Of the names and sizes of the photographs: whether they are the same, without reading them all."""
    files = [f"{path.relative_to(folder).as_posix()} {path.stat().st_size}" for path in list_images(folder)]
    return hashlib.sha256("\n".join(files).encode()).hexdigest()[:16]
