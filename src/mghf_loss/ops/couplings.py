"""A channel mixing and affine coupling of the network without gradient, as one operator.

With x the details, M the mixing, low the low-pass band, and phi, rho_eta bottleneck blocks (1x1, ReLU, depthwise 3x3,
ReLU, 1x1 convolution, reflection padding),

    z = M x,   z2 <- z2 + phi(z1, low),   (rho, eta) of (z2, low),
    z1 <- s z1 + eta,   s = exp(clamp tanh(rho / clamp)).

GT's features need no gradient. As convolutions this moves every hidden map, 32 channels for the 9 that count, through
memory six times. A kernel holds the hidden maps of a row in registers and writes z and s only.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .convolution import convolution
from .statistics import Precision

MAX_DETAILS, MAX_HIDDEN = 13, 64  # of the kernel; a pyramid has 9


def coupling_formula(
    x: Tensor,
    low: Tensor,
    matrix: Tensor,
    phi: Sequence[Tensor],
    rho_eta: Sequence[Tensor],
    clamp: float,
    precision: str,
) -> tuple[Tensor, Tensor]:
    """z (B, C, h, w) and the scale s (B, n1, h, w) of its first n1 channels, in the dtype of `x`."""
    channels = x.shape[1]
    n1 = channels - channels // 2
    with torch.autocast(x.device.type, enabled=False):
        z1, z2 = convolution(x, matrix[:, :, None, None]).split((n1, channels - n1), dim=1)
        z2 = z2 + bottleneck(pad(torch.cat((z1, low), dim=1)), *phi)[0]
        rho, eta = bottleneck(pad(torch.cat((z2, low), dim=1)), *rho_eta)[0].chunk(2, dim=1)
        scale = torch.exp(clamp * torch.tanh(rho / clamp))
        return torch.cat((z1 * scale + eta, z2), dim=1), scale


operator = torch.library.custom_op("mghf_loss::coupling", coupling_formula, mutates_args=())


@operator.register_fake
def _(
    x: Tensor,
    low: Tensor,
    matrix: Tensor,
    phi: Sequence[Tensor],
    rho_eta: Sequence[Tensor],
    clamp: float,
    precision: str,
) -> tuple[Tensor, Tensor]:
    batch, channels, height, width = x.shape
    return x.new_empty(x.shape), x.new_empty((batch, channels - channels // 2, height, width))


def coupling(
    x: Tensor,
    low: Tensor,
    matrix: Tensor,
    phi: Sequence[Tensor],
    rho_eta: Sequence[Tensor],
    clamp: float,
    precision: Precision = "high",
) -> tuple[Tensor, Tensor]:
    """Mix and couple details (B, C, h, w), given their low-pass band (B, 3, h, w), without gradient -> z, s.

    Args:
        x: details; contiguous, as is `low`.
        low: the condition.
        matrix: M, (C, C).
        phi: weight and bias of the three convolutions of phi.
        rho_eta: likewise.
        clamp: bound of the log-scale.
        precision: of the products on CUDA: `"high"`, as accurate as float32 (each operand as two tf32 numbers), or
            `"fast"`, one operand in tf32 (relative error 3e-4 at most).
    """
    return operator(x, low, matrix, list(phi), list(rho_eta), clamp, precision)


def pad_mode(x: Tensor) -> str:
    """A map of one row or column has nothing to reflect."""
    return "reflect" if min(x.shape[-2:]) > 1 else "replicate"


def pad(x: Tensor) -> Tensor:
    """By one location; padding the few input channels rather than the hidden ones saves a copy of the hidden map."""
    # Reflection padding commutes with a 1x1 convolution and ReLU.
    return F.pad(x, (1, 1, 1, 1), mode=pad_mode(x))


def bottleneck(x: Tensor, *parameters: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A bottleneck block's output from its padded input, and its hidden maps."""
    w1, b1, w2, b2, w3, b3 = parameters
    first = convolution(x, w1, b1).relu_()
    second = convolution(first, w2, b2, groups=w2.shape[0]).relu_()
    return convolution(second, w3, b3), first, second
