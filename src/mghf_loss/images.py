"""Images as the losses take them: checks of a pair, conversion of the range, padding, reading a file."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from PIL import Image


def check_image(name: str, image: Tensor, least_size: int = 1) -> None:
    """Raise unless `image` is a floating-point (B, 3, H, W) tensor with H, W >= `least_size`.

    Looks at type and shape only, never at values: nothing waits for a GPU.
    """
    if not isinstance(image, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(image).__name__}")
    if not image.is_floating_point():
        raise TypeError(
            f"{name} must be a floating-point tensor, got {image.dtype}; "
            f"for 8-bit images use {name}.float() / 255 and input_range=(0, 1)"
        )
    shape = tuple(image.shape)
    if image.ndim != 4:
        raise ValueError(f"{name} must have shape (B, 3, H, W), got {shape}")
    if shape[1] == 1:
        raise ValueError(
            f"{name} must have 3 channels (RGB), got 1 (shape {shape}); "
            f"for grey images use {name}.expand(-1, 3, -1, -1)"
        )
    if shape[1] != 3:
        raise ValueError(f"{name} must have 3 channels (RGB), got {shape[1]} (shape {shape})")
    if shape[0] < 1:
        raise ValueError(f"{name} must hold at least one image, got shape {shape}")
    if min(shape[-2:]) < least_size:
        raise ValueError(f"{name} must be at least {least_size} x {least_size}, got shape {shape}")


def check_pair(sr: Tensor, gt: Tensor, least_size: int = 1) -> None:
    """Raise unless `sr` and `gt` are images of one shape on one device, and not swapped; see `check_image`."""
    check_image("sr", sr, least_size)
    check_image("gt", gt, least_size)
    if sr.shape != gt.shape:
        raise ValueError(f"sr and gt must have the same shape, got sr {tuple(sr.shape)} and gt {tuple(gt.shape)}")
    if sr.device != gt.device:
        raise ValueError(f"sr and gt must be on the same device, got sr on {sr.device} and gt on {gt.device}")
    if torch.is_grad_enabled() and gt.requires_grad and not sr.requires_grad:
        raise ValueError(
            "gt requires a gradient and sr does not, but gradient flows to sr alone: are the two swapped? "
            "Expected criterion(sr, gt); if the order is meant, pass gt.detach()"
        )


def check_range(input_range: tuple[float, float]) -> tuple[float, float]:
    """Return (low, high) as floats; raise unless they are two numbers with low < high."""
    try:
        low, high = (float(bound) for bound in input_range)
    except (TypeError, ValueError):
        raise ValueError(
            f"input_range must be two numbers (black, white) such as (0, 1), got {input_range!r}"
        ) from None
    if not -math.inf < low < high < math.inf:
        raise ValueError(f"input_range must be finite (black, white) with black < white, got {input_range!r}")
    return low, high


def rescale(image: Tensor, source: tuple[float, float], target: tuple[float, float]) -> Tensor:
    """Map the range `source` to the range `target`, linearly and without clamping."""
    if source == target:
        return image
    scale = (target[1] - target[0]) / (source[1] - source[0])
    return image * scale + (target[0] - source[0] * scale)


def pad_to_multiple(image: Tensor, multiple: int) -> Tensor:
    """Pad (B, C, H, W) by reflection at the bottom and right to H, W multiples of `multiple`."""
    # Written without a negative dividend, which torch.compile cannot follow where sizes are symbolic.
    bottom, right = ((multiple - size % multiple) % multiple for size in image.shape[-2:])
    return F.pad(image, (0, right, 0, bottom), mode="reflect") if bottom or right else image


@contextmanager
def open_image(source: str | Path | BinaryIO, name: str | None = None) -> Iterator[Image.Image]:
    """Open an image file with Pillow; raise `OSError`, with `name` or else the path, where that or its use fails."""
    from PIL import Image

    try:
        with Image.open(source) as image:
            yield image
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise OSError(f"cannot read image {name or source}: {error}") from error


def read_pixels(source: str | Path | BinaryIO, name: str | None = None) -> Tensor:
    """Read an image file as (3, H, W) RGB, uint8; grey is repeated, transparency laid on white.

    Needs Pillow. Raises `OSError`, with `name` or else the path, where it is missing, damaged or no image.
    """
    import numpy as np
    from PIL import Image

    with open_image(source, name) as image:
        if image.mode.startswith(("I", "F")):
            raise OSError(f"{image.mode} pixels are not supported, expected 8 bits a channel")
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        pixels = np.asarray(image.convert("RGB"))
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1)


def read_image(path: str | Path) -> Tensor:
    """Read an image file as (1, 3, H, W) RGB in [0, 1]; see `read_pixels`."""
    return read_pixels(path)[None].float() / 255
