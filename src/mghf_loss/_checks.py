"""The checks of arguments: each returns the argument, or raises and names what came and what was expected.

None but `warn_of_range` looks at values of tensors: nothing waits for a GPU.
"""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Iterable
from numbers import Integral, Real
from typing import Any, get_args

import torch
from torch import Tensor


def one_of(name: str, value: Any, choices: Any) -> Any:
    """Return `value` if it is one of `choices`, a `Literal` type or a tuple."""
    known = get_args(choices) or tuple(choices)
    if value not in known:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, known))}, got {value!r}")
    return value


def number(
    name: str,
    value: Any,
    *,
    least: float = 0.0,
    below: float = math.inf,
    most: float = math.inf,
    above: bool = False,
    infinite: bool = False,
) -> float:
    """Return `value` as a float if it is a finite number from `least` (above it with `above`) to `most` or `below`.

    With `infinite`, infinity will do too.
    """
    fits = _is_number(value, Real) and (least < value if above else least <= value) and value <= most
    fits = fits and (value < below or infinite)
    if not fits or (isinstance(value, int) and value > sys.float_info.max):
        low = f"above {least:g}" if above else f"of at least {least:g}"
        high = f" and below {below:g}" if below < math.inf else f" and at most {most:g}" if most < math.inf else ""
        kind = "number" if high or infinite else "finite number"
        raise ValueError(f"{name} must be a {kind} {low}{high}, got {value!r}{_hint(value)}")
    return float(value)


def integer(name: str, value: Any, *, least: int, most: float = math.inf) -> int:
    """Return `value` as an int if it is an integer in [least, most]."""
    if not _is_number(value, Integral) or not least <= value <= most:
        high = "" if most == math.inf else f" and at most {most}"
        raise ValueError(f"{name} must be an integer of at least {least}{high}, got {value!r}{_hint(value)}")
    return int(value)


def boolean(name: str, value: Any) -> bool:
    """Return `value` if it is True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}")
    return value


def input_range(value: Any) -> tuple[float, float]:
    """Return (black, white) as floats if they are two finite numbers with black < white."""
    try:
        low, high = (float(bound) for bound in value)
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"input_range must be two numbers (black, white) such as (0, 1), got {value!r}") from None
    if not -math.inf < low < high < math.inf:
        raise ValueError(f"input_range must be finite (black, white) with black < white, got {value!r}")
    return low, high


def names(what: str, given: Iterable[Any], known: Iterable[str]) -> None:
    """Raise where one of `given` is not among `known`."""
    known = list(known)
    unknown = sorted(str(name) for name in given if name not in known)
    if unknown:
        raise ValueError(f"unknown {what} {', '.join(unknown)}; known are {', '.join(known)}")


def generator(value: Any) -> None:
    """Raise unless `value` is a `torch.Generator` or None."""
    if value is not None and not isinstance(value, torch.Generator):
        raise TypeError(f"generator must be a torch.Generator or None, got {value!r}")


def image(name: str, value: Any, least_size: int = 1) -> None:
    """Raise unless `value` is a dense floating-point tensor (B, 3, H, W) with H, W of at least `least_size`."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    if value.layout is not torch.strided or value.is_nested:
        kind = "a nested tensor" if value.is_nested else str(value.layout)
        raise TypeError(f"{name} must be a dense tensor, got {kind}; pad or crop the images to one size")
    if not value.is_floating_point():
        raise TypeError(
            f"{name} must be a floating-point tensor, got {value.dtype}; "
            f"for 8-bit images use {name}.float() / 255 and input_range=(0, 1)"
        )
    shape = tuple(value.shape)
    if value.ndim != 4:
        remedy = {
            3: f"; for one image use {name}[None]",
            5: f"; for video (B, T, 3, H, W) flatten time into the batch, {name}.flatten(0, 1)",
        }.get(value.ndim, "")
        raise ValueError(f"{name} must have shape (B, 3, H, W), got {shape}{remedy}")
    if shape[1] != 3:
        remedy = {
            1: f"; for grey images use {name}.expand(-1, 3, -1, -1)",
            4: f"; drop alpha with {name}[:, :3], or decode latents to images first",
        }.get(shape[1], "")
        raise ValueError(f"{name} must have 3 channels (RGB), got {shape[1]} (shape {shape}){remedy}")
    if shape[0] < 1:
        raise ValueError(f"{name} must hold at least one image, got shape {shape}")
    if min(shape[-2:]) < least_size:
        raise ValueError(f"{name} must be at least {least_size} x {least_size}, got shape {shape}")


def pair(sr: Any, gt: Any, least_size: int = 1) -> None:
    """Raise unless `sr` and `gt` are images of one shape on one device, and not swapped."""
    image("sr", sr, least_size)
    image("gt", gt, least_size)
    if sr.shape != gt.shape:
        raise ValueError(f"sr and gt must have the same shape, got sr {tuple(sr.shape)} and gt {tuple(gt.shape)}")
    if sr.device != gt.device:
        raise ValueError(f"sr and gt must be on the same device, got sr on {sr.device} and gt on {gt.device}")
    if torch.is_grad_enabled() and gt.requires_grad and not sr.requires_grad:
        raise ValueError(
            "gt requires a gradient and sr does not, but gradient flows to sr alone: are the two swapped? "
            "Expected criterion(sr, gt); if the order is meant, pass gt.detach()"
        )


def mask(value: Any, sr: Tensor) -> None:
    """Raise unless `value` is a mask, boolean or of floating point, that expands from one channel to `sr`."""
    if not isinstance(value, Tensor):
        raise TypeError(f"mask must be a torch.Tensor, got {type(value).__name__}")
    if value.dtype != torch.bool and not value.is_floating_point():
        raise TypeError(f"mask must be boolean or a floating-point tensor of weights, got {value.dtype}")
    batch, _, height, width = sr.shape
    if value.ndim != 4 or value.shape[0] not in (1, batch) or value.shape[1:] != (1, height, width):
        raise ValueError(f"mask must have shape ({batch} or 1, 1, {height}, {width}), got {tuple(value.shape)}")
    if value.device != sr.device:
        raise ValueError(f"mask must be on the device of sr, got mask on {value.device} and sr on {sr.device}")


# Arguments of other libraries' losses, and what to use here.
FOREIGN = {
    "data_range": "use input_range=(black, white), for instance input_range=(0, 255)",
    "normalize": "use input_range=(0, 1) for images in [0, 1], input_range=(-1, 1) for images in [-1, 1]",
    "loss_weight": "multiply the loss, 0.5 * criterion(sr, gt); only the losses of a trainer take loss_weight",
    "weight": "multiply the loss, 0.5 * criterion(sr, gt), or pass a weight map as criterion(sr, gt, mask=...)",
    "size_average": 'use reduction="mean" or "sum"',
}


def foreign(name: str, given: Iterable[str]) -> None:
    """Raise where one of the keywords `given` is another library's word for what has its own here."""
    for keyword in given:
        if keyword in FOREIGN:
            raise TypeError(f"{name} has no argument {keyword!r}: {FOREIGN[keyword]}")


def levels(sr_level: Tensor, gt_level: Tensor, channel_weights: Tensor | None) -> None:
    """Raise unless the features of one level fit each other, (B, C, H, W), and the channel weights them, (B, C)."""
    if sr_level.ndim != 4 or sr_level.shape != gt_level.shape:
        raise ValueError(
            "sr_level and gt_level must have the same shape (B, C, H, W), "
            f"got {tuple(sr_level.shape)} and {tuple(gt_level.shape)}"
        )
    if channel_weights is not None and channel_weights.shape != sr_level.shape[:2]:
        raise ValueError(
            f"channel_weights must have shape (B, C) = {tuple(sr_level.shape[:2])}, got {tuple(channel_weights.shape)}"
        )


def warn_of_range(gt: Tensor, black: float, white: float) -> None:
    """Warn where `gt` leaves [black, white] by 5 %, stays below 1 of 255, or has nothing below 0 where it may."""
    low, high = (bound.item() for bound in gt.detach().aminmax())
    unit = white - black
    outside = low < black - 0.05 * unit or high > white + 0.05 * unit
    if outside or (unit > 2 and high < black + 0.02 * unit) or low >= 0 > black:
        warnings.warn(
            f"the first GT has values from {low:.4g} to {high:.4g}, while input_range is ({black:g}, {white:g}): "
            "unless these images are meant to be so, set input_range to what the data set gives",
            stacklevel=2,
        )


def _is_number(value: Any, kind: type) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


def _hint(value: Any) -> str:
    """YAML 1.1 reads 5e-2 as text."""
    if not isinstance(value, str):
        return ""
    try:
        float(value)
    except ValueError:
        return ""
    return "; YAML takes numbers like 5e-2 for text, write 0.05"
