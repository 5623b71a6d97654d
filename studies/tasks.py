"""What a model sees of a photograph.

    degrade(gt, "sr-bsrgan", generator) -> input, (B, 3, H / 4, W / 4) for "sr-*", else (B, 3, H, W)

| task | input |
|---|---|
| sr-bicubic | bicubic, antialiased, to a quarter |
| sr-bsrgan | blur, reduction by a random filter, noise, JPEG: the chain of BSRGAN in one fixed order |
| denoise-15, -25, -50 | Gaussian noise of that many 1/255 |
| denoise | Gaussian noise of 5 to 55 of 1/255, drawn for each photograph; the L1 model of the three above learns it |
| deblur | motion blur of 9 to 15 pixels or Gaussian blur of 1 to 3, and noise of 2/255 |
| jpeg | JPEG of quality 10 to 40 |
| inpaint | a quarter of the blocks of 8 x 8 black |

Every input is rounded to 8 bits, as a file would be. Draws come from the generator alone.

Reference: Zhang et al., "Designing a practical degradation model for deep blind image super-resolution", ICCV 2021
(BSRGAN), which shuffles the order, blurs twice and adds camera noise; those are left out.
"""

from __future__ import annotations

from io import BytesIO

import torch
import torch.nn.functional as F
from kornia.filters import filter2d, get_gaussian_kernel2d, get_motion_kernel2d
from PIL import Image
from torch import Tensor

from mghf_loss._files import read_pixels
from mghf_loss.toy import SCALE, downscale

DENOISE = ("denoise-15", "denoise-25", "denoise-50")
TASKS = ("sr-bicubic", "sr-bsrgan", "denoise", *DENOISE, "deblur", "jpeg", "inpaint")
KERNEL = 15
HOLE = 8


def is_sr(task: str) -> bool:
    """Whether the input is a quarter of the photograph's size."""
    return task.startswith("sr-")


def of_base(task: str) -> str:
    """The task of the L1 model that a fine-tuning for `task` starts from."""
    return "denoise" if task in DENOISE else task


def degrade(gt: Tensor, task: str, generator: torch.Generator) -> Tensor:
    """Return the input of `task` for photographs `gt`, (B, 3, H, W) in [0, 1], H, W multiples of 4."""
    count = len(gt)
    if task == "sr-bicubic":
        degraded = downscale(gt)
    elif task == "sr-bsrgan":
        degraded = blur(gt, gaussian_kernels(count, 0.2, 3.0, generator))
        degraded = _reduce(degraded, generator)
        degraded = add_noise(degraded, uniform(count, 1, 25, generator), generator)
        degraded = jpeg(degraded, uniform(count, 30, 95, generator))
    elif task == "denoise":
        degraded = add_noise(gt, uniform(count, 5, 55, generator), generator)
    elif task in DENOISE:
        degraded = add_noise(gt, torch.full((count,), float(task.removeprefix("denoise-"))), generator)
    elif task == "deblur":
        gaussian = gaussian_kernels(count, 1.0, 3.0, generator)
        motion = motion_kernels(count, generator)
        chosen = uniform(count, 0, 1, generator)[:, None, None] < 0.5
        degraded = add_noise(blur(gt, torch.where(chosen, gaussian, motion)), torch.full((count,), 2.0), generator)
    elif task == "jpeg":
        degraded = jpeg(gt, uniform(count, 10, 40, generator))
    elif task == "inpaint":
        blocks = [-(-side // HOLE) for side in gt.shape[-2:]]
        kept = (torch.rand(count, 1, *blocks, generator=generator) >= 0.25).to(gt)
        degraded = gt * F.interpolate(kept, scale_factor=HOLE)[..., : gt.shape[-2], : gt.shape[-1]]
    else:
        raise ValueError(f"unknown task {task!r}, known are {', '.join(TASKS)}")
    return (degraded.clamp(0, 1) * 255).round() / 255


def uniform(count: int, low: float, high: float, generator: torch.Generator) -> Tensor:
    return low + (high - low) * torch.rand(count, generator=generator)


def add_noise(images: Tensor, sigmas: Tensor, generator: torch.Generator) -> Tensor:
    """Add Gaussian noise of `sigmas`, (B,), in 1/255."""
    noise = torch.randn(images.shape, generator=generator)
    return images + (sigmas[:, None, None, None] / 255 * noise).to(images.device)


def jpeg(images: Tensor, qualities: Tensor) -> Tensor:
    """Through Pillow's JPEG, with 4:2:0 chroma, at the integer parts of `qualities`, (B,)."""
    decoded = []
    for image, quality in zip(images, qualities, strict=True):
        pixels = (image.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy()
        file = BytesIO()
        Image.fromarray(pixels).save(file, "jpeg", quality=int(quality), subsampling="4:2:0")
        decoded.append(read_pixels(file))
    return torch.stack(decoded).to(images.device).float() / 255


def gaussian_kernels(count: int, low: float, high: float, generator: torch.Generator) -> Tensor:
    """Kernels (count, 15, 15) of standard deviations in [low, high] pixels, drawn for each axis."""
    sigmas = torch.stack((uniform(count, low, high, generator), uniform(count, low, high, generator)), dim=1)
    return get_gaussian_kernel2d(KERNEL, sigmas)


def motion_kernels(count: int, generator: torch.Generator) -> Tensor:
    """Kernels (count, 15, 15) of straight motion over 9 to 15 pixels in any direction."""
    kernels = []
    for _ in range(count):
        size = 9 + 2 * int(torch.randint(4, (), generator=generator))
        angle = uniform(1, 0, 180, generator)
        kernel = get_motion_kernel2d(size, angle, torch.zeros(1), mode="bilinear")
        border = (KERNEL - size) // 2
        kernels.append(F.pad(kernel, (border,) * 4))
    return torch.cat(kernels)


def blur(images: Tensor, kernels: Tensor) -> Tensor:
    return filter2d(images, kernels.to(images), normalized=True)


def _reduce(images: Tensor, generator: torch.Generator) -> Tensor:
    """To a quarter by area, bilinear or bicubic, one for the batch."""
    size = [side // SCALE for side in images.shape[-2:]]
    mode = ("area", "bilinear", "bicubic")[int(torch.randint(3, (), generator=generator))]
    if mode == "area":
        return F.interpolate(images, size, mode="area")
    return F.interpolate(images, size, mode=mode, antialias=True, align_corners=False)
