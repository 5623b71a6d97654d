"""A level of the network as a linear map: Haar step, then mixings and given scales, one pass forward and one back.

With x (B, 3, 2h, 2w), the details d (9 channels) and low-pass (3) of its Haar step, mixings M_k and scales s_k of the
first n1 channels,

    d <- M_k d,   d1 <- s_k d1,   k = 0, 1, ...

With the scales of GT this maps sr - gt to the difference of their features; without mixings it is the Haar step.
The transpose of the map is the backward pass; matrices and scales get no gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .convolution import convolution
from .statistics import first_derivative


def linear_level_formula(x: Tensor, matrices: Sequence[Tensor], scales: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Details (B, 9, h, w) and low-pass (B, 3, h, w)."""
    with torch.autocast(x.device.type, enabled=False):
        a, b, c, d = (0.5 * x[:, :, row::2, column::2] for row in (0, 1) for column in (0, 1))
        # left minus right, top minus bottom, diagonal, as FrEIA's module has them
        details = torch.stack((a - b + c - d, a + b - c - d, a - b - c + d), 2).flatten(1, 2)
        for matrix, scale in zip(matrices, scales, strict=True):
            n1 = scale.shape[1]
            mixed = convolution(details, matrix[:, :, None, None])
            details = torch.cat((mixed[:, :n1] * scale, mixed[:, n1:]), 1)
        return details, a + b + c + d


def transpose_formula(details: Tensor, low: Tensor, matrices: Sequence[Tensor], scales: Sequence[Tensor]) -> Tensor:
    """Gradient (B, 3, 2h, 2w) of x from those of the details and the low-pass."""
    with torch.autocast(details.device.type, enabled=False):
        for matrix, scale in zip(reversed(matrices), reversed(scales), strict=True):
            n1 = scale.shape[1]
            scaled = torch.cat((details[:, :n1] * scale, details[:, n1:]), 1)
            details = convolution(scaled, matrix.T[:, :, None, None])
        vertical, horizontal, diagonal = (0.5 * details).unflatten(1, (-1, 3)).unbind(2)
        low = 0.5 * low
        pixels = torch.stack(
            (
                low + vertical + horizontal + diagonal,
                low - vertical + horizontal - diagonal,
                low + vertical - horizontal - diagonal,
                low - vertical - horizontal + diagonal,
            ),
            2,
        )
        return F.pixel_shuffle(pixels.flatten(1, 2), 2)


operator = torch.library.custom_op("mghf_loss::linear_level", linear_level_formula, mutates_args=())
transpose_operator = torch.library.custom_op("mghf_loss::linear_level_transpose", transpose_formula, mutates_args=())


@operator.register_fake
def _(x: Tensor, matrices: Sequence[Tensor], scales: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    batch, channels, height, width = x.shape
    size = (height // 2, width // 2)
    return x.new_empty((batch, 3 * channels, *size)), x.new_empty((batch, channels, *size))


@transpose_operator.register_fake
def _(details: Tensor, low: Tensor, matrices: Sequence[Tensor], scales: Sequence[Tensor]) -> Tensor:
    batch, channels, height, width = low.shape
    return low.new_empty((batch, channels, 2 * height, 2 * width))


def _keep(ctx: Any, inputs: Any, output: Any) -> None:
    _, matrices, scales = inputs
    ctx.couplings = len(matrices)
    ctx.save_for_backward(*matrices, *scales)


def _backward(ctx: Any, details: Tensor, low: Tensor) -> tuple[Any, ...]:
    saved = ctx.saved_tensors
    matrices, scales = saved[: ctx.couplings], saved[ctx.couplings :]
    nothing = [None] * ctx.couplings
    return first_derivative(transpose_operator, details, low, list(matrices), list(scales)), nothing, nothing


operator.register_autograd(_backward, setup_context=_keep)


def linear_level(x: Tensor, matrices: Sequence[Tensor] = (), scales: Sequence[Tensor] = ()) -> tuple[Tensor, Tensor]:
    """Map x (B, 3, 2h, 2w) to details (B, 9, h, w) and low-pass (B, 3, h, w), in float32 on every device.

    Gradient flows to `x` only.

    Args:
        x: an image, or a low-pass band, or the difference of two.
        matrices: of the mixings, (9, 9) each.
        scales: of the couplings, (B, n1, h, w) each.
    """
    return operator(x, [matrix.detach() for matrix in matrices], [scale.detach() for scale in scales])
