"""The small SR model, its degradation and the photographs that demo, examples and notebook share."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

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
