"""Random crops of a folder of images."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..images import read_image

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"}


def list_images(folder: str | Path) -> list[Path]:
    """Return the image files below `folder`, sorted; raise `FileNotFoundError` where there are none."""
    folder = Path(folder)
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
    if not paths:
        raise FileNotFoundError(f"no images ({', '.join(sorted(SUFFIXES))}) below {folder}")
    return paths


class RandomCrops(Dataset[Tensor]):
    """Item i is a random (3, crop, crop) crop in [-1, 1], a function of (seed, i) alone.

    So a resumed run sees what an undisturbed one would have seen. Every pixel position is equally likely:
    images are drawn in proportion to their area. Each crop is flipped at random. Unreadable files and images
    smaller than the crop are left out with a warning that names them.
    """

    def __init__(self, folder: str | Path, crop: int, length: int, seed: int = 0, cache_bytes: int = 2**31) -> None:
        self.crop, self.length, self.seed = crop, length, seed
        self.paths: list[Path] = []
        self.cache: dict[int, Tensor] = {}
        areas: list[int] = []
        for path in list_images(folder):
            try:
                image = self._decode(path)
            except OSError as error:
                warnings.warn(f"left out unreadable image {path}: {error}", stacklevel=2)
                continue
            if min(image.shape[-2:]) < crop:
                size = f"{image.shape[-1]} x {image.shape[-2]}"
                warnings.warn(f"left out {path}: {size} is smaller than a crop of {crop}", stacklevel=2)
                continue
            # Decoding dominates a CPU step; decoded images are kept as far as they fit.
            if cache_bytes >= image.numel():
                self.cache[len(self.paths)] = image
                cache_bytes -= image.numel()
            self.paths.append(path)
            areas.append(image.shape[-1] * image.shape[-2])
        if not self.paths:
            raise ValueError(f"no image below {folder} is readable and at least {crop} x {crop}")
        self.areas = torch.tensor(areas, dtype=torch.double)

    @staticmethod
    def _decode(path: Path) -> Tensor:
        return (read_image(path)[0] * 255).round().to(torch.uint8)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Tensor:
        if not 0 <= index < self.length:
            raise IndexError(f"crop {index} of {self.length}")
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + index)
        chosen = int(torch.multinomial(self.areas, 1, generator=generator))
        image = self.cache[chosen] if chosen in self.cache else self._decode(self.paths[chosen])
        top, left = (int(torch.randint(size - self.crop + 1, (), generator=generator)) for size in image.shape[-2:])
        patch = image[:, top : top + self.crop, left : left + self.crop].float() / 127.5 - 1
        return patch.flip(-1) if torch.rand((), generator=generator) < 0.5 else patch
