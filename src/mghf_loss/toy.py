"""What demo, examples and notebook share: a small SR model, its degradation, photographs, crops, a picture."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

from ._files import check_output, read_image, write_atomically

SCALE = 4
TRAINING_PHOTOGRAPHS = ("astronaut", "rocket", "camera", "stereo_motorcycle")


class SmallSR(nn.Module):
    """A small EDSR: residual blocks at low resolution, pixel shuffle, added to bicubic."""

    def __init__(self, width: int = 32, blocks: int = 4, in_channels: int = 3, scale: int = SCALE) -> None:
        super().__init__()
        self.scale = scale
        self.head = nn.Conv2d(in_channels, width, 3, padding=1)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(width, width, 3, padding=1), nn.ReLU(inplace=True), nn.Conv2d(width, width, 3, padding=1)
            )
            for _ in range(blocks)
        )
        self.tail = nn.Conv2d(width, 3 * scale**2, 3, padding=1)
        for parameter in self.tail.parameters():  # training starts from bicubic
            nn.init.zeros_(parameter)

    def forward(self, lr: Tensor) -> Tensor:
        """Upscale (B, 3, h, w) to (B, 3, 4h, 4w)."""
        return upscale(lr) + self.residual(lr)

    def residual(self, x: Tensor) -> Tensor:
        """Map (B, C, h, w), C the constructor's `in_channels`, to what is added to an image, `scale` times as large."""
        x = self.head(x)
        for block in self.blocks:
            x = x + block(x)
        return F.pixel_shuffle(self.tail(x), self.scale)


def upscale(lr: Tensor) -> Tensor:
    """Bicubic x4."""
    return F.interpolate(lr, scale_factor=SCALE, mode="bicubic", align_corners=False)


def downscale(gt: Tensor) -> Tensor:
    """Bicubic, antialiased, to a quarter."""
    size = [side // SCALE for side in gt.shape[-2:]]
    return F.interpolate(gt, size, mode="bicubic", antialias=True, align_corners=False)


def middle(image: Tensor, side: int) -> Tensor:
    """The middle of (..., H, W), at most `side` high and wide, cut to multiples of 4."""
    height, width = (min(length, side) // SCALE * SCALE for length in image.shape[-2:])
    top, left = (image.shape[-2] - height) // 2, (image.shape[-1] - width) // 2
    return image[..., top : top + height, left : left + width]


def photograph(name: str) -> Tensor:
    """One of scikit-image's photographs as (1, 3, H, W) in [0, 1], cut to multiples of 4."""
    from skimage import data

    pixels = getattr(data, name)()
    if isinstance(pixels, tuple):  # a stereo pair with its disparity
        pixels = pixels[0]
    image = torch.from_numpy(pixels.copy()).float() / 255
    image = (image.repeat(3, 1, 1) if image.ndim == 2 else image.permute(2, 0, 1))[None]
    height, width = (side // SCALE * SCALE for side in image.shape[-2:])
    return image[..., :height, :width]


def random_crop(photographs: list[Tensor], generator: torch.Generator, size: int = 96) -> Tensor:
    """Cut (1, 3, size, size) from one of the photographs."""
    gt = photographs[int(torch.randint(len(photographs), (), generator=generator))]
    top, left = (int(torch.randint(side - size + 1, (), generator=generator)) for side in gt.shape[-2:])
    return gt[..., top : top + size, left : left + size]


class Crops(Dataset[Tensor]):
    """Random crops (3, size, size) in [0, 1] of the images in a folder, or of scikit-image's photographs.

    >>> crops = Crops(None, length=10, size=32)
    >>> crops[0].shape
    torch.Size([3, 32, 32])

    Args:
        folder: of images, searched recursively; None for the photographs.
        length: number of crops.
        size: their side in pixels.
        seed: with the index decides which crop it is.

    Raises:
        ValueError: an image is smaller than a crop.
    """

    def __init__(self, folder: Path | None, length: int, size: int = 64, seed: int = 0) -> None:
        from .training.data import list_images

        names = TRAINING_PHOTOGRAPHS if folder is None else list_images(folder)
        self.images = [photograph(name) if isinstance(name, str) else read_image(name) for name in names]
        for name, image in zip(names, self.images, strict=True):
            if min(image.shape[-2:]) < size:
                raise ValueError(f"{name} must be at least {size} x {size} pixels, got {tuple(image.shape[-2:])}")
        self.length, self.size, self.seed = length, size, seed

    def __len__(self) -> int:
        """Return the number of crops."""
        return self.length

    def __getitem__(self, index: int) -> Tensor:
        """Return a crop of a random image."""
        if not 0 <= index < self.length:
            raise IndexError(index)
        generator = torch.Generator().manual_seed(1_000_003 * self.seed + index)
        return random_crop(self.images, generator, self.size)[0]


def save_images(path: Path, images: Mapping[str, Tensor]) -> None:
    """Write images (1, 3, H, W) in [0, 1] side by side, each under its name."""
    from matplotlib import pyplot as plt

    check_output(path, {".png"})
    figure, axes = plt.subplots(1, len(images), figsize=(3.2 * len(images), 3.5), layout="constrained", squeeze=False)
    for axis, (name, image) in zip(axes[0], images.items(), strict=True):
        axis.imshow(image[0].detach().float().clamp(0, 1).permute(1, 2, 0).cpu().numpy(), interpolation="nearest")
        axis.set_title(name)
        axis.set_axis_off()
    write_atomically(path, lambda temporary: figure.savefig(temporary, dpi=110))
    plt.close(figure)
