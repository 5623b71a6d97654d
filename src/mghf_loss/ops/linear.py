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
from torch import Tensor
from torch.autograd.function import once_differentiable

from .convolution import convolution, uses_operators
from .statistics import first_derivative


def linear_level_formula(x: Tensor, matrices: Sequence[Tensor], scales: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Details (B, 9, h, w) and low-pass (B, 3, h, w)."""
    with torch.autocast(x.device.type, enabled=False):
        x = 0.5 * x
        a, b, c, d = (x[:, :, row::2, column::2] for row in (0, 1) for column in (0, 1))
        top, top_difference, bottom, bottom_difference = a + b, a - b, c + d, c - d
        # left minus right, top minus bottom, diagonal, as FrEIA's module has them
        bands = top_difference + bottom_difference, top - bottom, top_difference - bottom_difference
        details = torch.stack(bands, 2).flatten(1, 2)
        for matrix, scale in zip(matrices, scales, strict=True):
            n1 = scale.shape[1]
            mixed = convolution(details, matrix[:, :, None, None])
            details = torch.cat((mixed[:, :n1] * scale, mixed[:, n1:]), 1)
        return details, top + bottom


def transpose_formula(
    details: Tensor, low: Tensor | None, matrices: Sequence[Tensor], scales: Sequence[Tensor]
) -> Tensor:
    """Gradient (B, 3, 2h, 2w) of x from those of the details and of the low-pass, which the last level has not."""
    with torch.autocast(details.device.type, enabled=False):
        for matrix, scale in zip(reversed(matrices), reversed(scales), strict=True):
            n1 = scale.shape[1]
            scaled = torch.cat((details[:, :n1] * scale, details[:, n1:]), 1)
            details = convolution(scaled, matrix.T[:, :, None, None])
        batch, channels, height, width = details.shape
        bands = (0.5 * details).reshape(batch, channels // 3, 3, height, width)
        vertical, horizontal, diagonal = bands.unbind(2)
        low, rows = torch.zeros_like(vertical) if low is None else 0.5 * low, []
        for sign in (1, -1):
            mean = torch.add(low, horizontal, alpha=sign)
            difference = torch.add(vertical, diagonal, alpha=sign)
            rows.append(torch.stack((mean + difference, mean - difference), -1))
        return torch.stack(rows, 3).reshape(batch, channels // 3, 2 * height, 2 * width)


operator = torch.library.custom_op("mghf_loss::linear_level", linear_level_formula, mutates_args=())
transpose_operator = torch.library.custom_op("mghf_loss::linear_level_transpose", transpose_formula, mutates_args=())


@operator.register_fake
def _(x: Tensor, matrices: Sequence[Tensor], scales: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    batch, channels, height, width = x.shape
    size = (height // 2, width // 2)
    return x.new_empty((batch, 3 * channels, *size)), x.new_empty((batch, channels, *size))


@transpose_operator.register_fake
def _(details: Tensor, low: Tensor | None, matrices: Sequence[Tensor], scales: Sequence[Tensor]) -> Tensor:
    batch, channels, height, width = details.shape
    return details.new_empty((batch, channels // 3, 2 * height, 2 * width))


def _keep(ctx: Any, inputs: Any, output: Any) -> None:
    _, matrices, scales = inputs
    ctx.couplings = len(matrices)
    ctx.set_materialize_grads(False)  # no zeros for the last low-pass
    ctx.save_for_backward(*matrices, *scales)


def _backward(ctx: Any, details: Tensor | None, low: Tensor | None) -> tuple[Any, ...]:
    saved, gradient = ctx.saved_tensors, None
    matrices, scales = list(saved[: ctx.couplings]), list(saved[ctx.couplings :])
    if details is None and low is not None:  # of a level whose features nobody used
        batch, channels, *size = low.shape
        details = low.new_zeros((batch, 3 * channels, *size))
    if details is not None:
        gradient = first_derivative(transpose_operator, details, low, matrices, scales)
    return gradient, [None] * ctx.couplings, [None] * ctx.couplings


operator.register_autograd(_backward, setup_context=_keep)


def linear_level(x: Tensor, matrices: Sequence[Tensor] = (), scales: Sequence[Tensor] = ()) -> tuple[Tensor, Tensor]:
    """Map x (B, 3, 2h, 2w) to details (B, 9, h, w) and low-pass (B, 3, h, w), without tf32 on CUDA.

    Gradient flows to `x` only.

    Args:
        x: an image, or a low-pass band, or the difference of two.
        matrices: of the mixings, (9, 9) each.
        scales: of the couplings, (B, n1, h, w) each.
    """
    matrices, scales = [matrix.detach() for matrix in matrices], [scale.detach() for scale in scales]
    if uses_operators(x):
        return operator(x, matrices, scales)
    # A trace holds no functions of Python.
    if x.requires_grad and torch.is_grad_enabled() and not torch.jit.is_tracing():  # pyright: ignore[reportPrivateImportUsage]
        return _LinearLevel.apply(x, *matrices, *scales)  # type: ignore[return-value]
    return linear_level_formula(x, matrices, scales)


class _LinearLevel(torch.autograd.Function):
    """The formula with its transpose: on a CPU, less work than the operator's dispatch or autograd's way back."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, *constants: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        couplings = len(constants) // 2
        return linear_level_formula(x, constants[:couplings], constants[couplings:])

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs[1:])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, details: Tensor, low: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        constants = ctx.saved_tensors  # once: a checkpoint unpacks them once
        couplings = len(constants) // 2
        gradient = transpose_formula(details, low, constants[:couplings], constants[couplings:])
        return gradient, *[None] * len(constants)
