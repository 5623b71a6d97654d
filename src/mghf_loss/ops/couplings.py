"""A channel mixing and affine coupling of the frozen network as one operator.

With x the details, M the mixing, low the low-pass band, and phi, rho_eta bottleneck blocks (1x1, ReLU, depthwise 3x3,
ReLU, 1x1 convolution, reflection padding),

    z = M x,   z2 <- z2 + phi(z1, low),   (rho, eta) of (z2, low),
    z1 <- s z1 + eta,   s = exp(clamp tanh(rho / clamp)).

As convolutions this moves every hidden map, 32 channels for the 9 that count, through memory six times, and twice as
often with a backward pass. A kernel holds the hidden maps of a row in registers and writes z and s only. For a gradient
it also writes z1 before the scaling, and the signs of the hidden maps, a bit a channel: all that the way back needs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .convolution import channels_last, convolution
from .statistics import Precision

# Of the kernels; a pyramid has 9 details. A gradient takes 32 hidden channels at most, a bit of a number each.
MAX_DETAILS, MAX_HIDDEN, MAX_HIDDEN_WITH_GRADIENT = 13, 64, 32


class Kept(NamedTuple):
    """What the backward pass of a coupling needs.

    Attributes:
        scale: s, (B, n1, h, w).
        z1: before the scaling, (B, n1, h, w).
        hidden: where the four hidden maps are positive, two of phi and two of rho_eta, the first of each padded by one
            location: (B, hidden, h, w) as 1 and 0, or what `couple` was told to keep.
    """

    scale: Tensor
    z1: Tensor
    hidden: list[Tensor]


def couple(
    x: Tensor,
    low: Tensor,
    matrix: Tensor,
    phi: Sequence[Tensor],
    rho_eta: Sequence[Tensor],
    clamp: float,
    keep: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Tensor, Kept]:
    """z (B, C, h, w) and, for its gradient, what `keep` makes of each hidden map; in the dtype of `x`."""
    channels, hidden = x.shape[1], []
    n1 = channels - channels // 2

    def block(z: Tensor, parameters: Sequence[Tensor]) -> Tensor:
        output, *maps = bottleneck(pad(torch.cat((z, low), dim=1)), *parameters)
        hidden.extend(keep(each) for each in maps if keep is not None)
        return output

    with torch.autocast(x.device.type, enabled=False):
        z1, z2 = convolution(x, matrix[:, :, None, None]).split((n1, channels - n1), dim=1)
        z2 = z2 + block(z1, phi)
        rho, eta = block(z2, rho_eta).chunk(2, dim=1)
        scale = torch.exp(clamp * torch.tanh(rho / clamp))
        return torch.cat((z1 * scale + eta, z2), dim=1), Kept(scale, z1, hidden)


def couple_backward(
    gradient: Tensor, kept: Kept, matrix: Tensor, phi: Sequence[Tensor], rho_eta: Sequence[Tensor], clamp: float
) -> tuple[Tensor, Tensor]:
    """Gradients of x and of the low-pass band from that of z."""
    scale, z1, hidden = kept
    n1, mode = scale.shape[1], pad_mode(gradient)
    with torch.autocast(gradient.device.type, enabled=False):
        first, second = gradient[:, :n1], gradient[:, n1:]
        rho = first * z1 * scale * (1 - (scale.log() / clamp).square())
        both = bottleneck_backward(torch.cat((rho, first), 1), *hidden[2:], *rho_eta[::2], mode=mode)
        second, low = second + both[:, : second.shape[1]], both[:, second.shape[1] :]
        both = bottleneck_backward(second, *hidden[:2], *phi[::2], mode=mode)
        mixed = torch.cat((first * scale + both[:, :n1], second), 1)
        return convolution(mixed, matrix.T[:, :, None, None]), low + both[:, n1:]


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
    z, kept = couple(x, low, matrix, phi, rho_eta, clamp)
    return z, kept.scale


def kept_formula(
    x: Tensor,
    low: Tensor,
    matrix: Tensor,
    phi: Sequence[Tensor],
    rho_eta: Sequence[Tensor],
    clamp: float,
    precision: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """z, s, z1 before the scaling, and the signs of the four hidden maps, (B, 4, h, w) int32, a bit a channel."""
    z, (scale, z1, signs) = couple(x, low, matrix, phi, rho_eta, clamp, keep=_packed)
    signs[::2] = [padded[:, 1:-1, 1:-1] for padded in signs[::2]]
    return z, scale, z1.clone(memory_format=torch.contiguous_format), torch.stack(signs, 1)


def kept_backward_formula(
    gradient: Tensor,
    scale: Tensor,
    z1: Tensor,
    signs: Tensor,
    matrix: Tensor,
    phi: Sequence[Tensor],
    rho_eta: Sequence[Tensor],
    clamp: float,
    precision: str,
) -> tuple[Tensor, Tensor]:
    """Gradients of x and of the low-pass band from that of z."""

    def hidden(k: int) -> Tensor:
        positive = _unpacked(signs[:, k], len(phi[0])).to(gradient.dtype)
        return (positive if k % 2 else pad(positive)).to(torch.uint8)

    kept = Kept(scale, z1, [hidden(k) for k in range(4)])
    return couple_backward(gradient, kept, matrix, phi, rho_eta, clamp)


def _packed(hidden: Tensor) -> Tensor:
    bits = torch.arange(hidden.shape[1], device=hidden.device, dtype=torch.int32)
    return ((hidden > 0).to(torch.int32) << bits[:, None, None]).sum(1, dtype=torch.int32)


def _unpacked(signs: Tensor, hidden: int) -> Tensor:
    bits = torch.arange(hidden, device=signs.device, dtype=torch.int32)
    return signs[:, None] >> bits[:, None, None] & 1


operator = torch.library.custom_op("mghf_loss::coupling", coupling_formula, mutates_args=())


@operator.register_fake
def _(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    batch, channels, height, width = x.shape
    return x.new_empty(x.shape), x.new_empty((batch, channels - channels // 2, height, width))


kept_operator = torch.library.custom_op("mghf_loss::coupling_kept", kept_formula, mutates_args=())
kept_backward_operator = torch.library.custom_op(
    "mghf_loss::coupling_kept_backward", kept_backward_formula, mutates_args=()
)


@kept_operator.register_fake
def _(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, channels, height, width = x.shape
    scale = x.new_empty((batch, channels - channels // 2, height, width))
    signs = x.new_empty((batch, 4, height, width), dtype=torch.int32)
    return x.new_empty(x.shape), scale, torch.empty_like(scale), signs


@kept_backward_operator.register_fake
def _(gradient: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    batch, _, height, width = gradient.shape
    return gradient.new_empty(gradient.shape), gradient.new_empty((batch, 3, height, width))


def _keep(ctx: Any, inputs: Any, output: Any) -> None:
    _, _, matrix, phi, rho_eta, ctx.clamp, ctx.precision = inputs
    ctx.set_materialize_grads(False)  # no zeros for what is kept
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*output[1:], matrix, *phi, *rho_eta)


def _backward(ctx: Any, gradient: Tensor, *_: Any) -> tuple[Any, ...]:
    kept, blocks = ctx.saved_tensors[:4], ctx.saved_tensors[4:]
    arguments = (gradient.contiguous(), *kept, list(blocks[:6]), list(blocks[6:]), ctx.clamp, ctx.precision)
    x, low = _FirstDerivatives.apply(*arguments)  # type: ignore[misc]
    return x, low, None, [None] * 6, [None] * 6, None, None


class _FirstDerivatives(torch.autograd.Function):
    """The backward operator; a second derivative is refused, not left out."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        return kept_backward_operator(*arguments)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        raise NotImplementedError("the operators of mghf_loss have no second derivative")


kept_operator.register_autograd(_backward, setup_context=_keep)


def coupling(
    x: Tensor,
    low: Tensor,
    matrix: Tensor,
    phi: Sequence[Tensor],
    rho_eta: Sequence[Tensor],
    clamp: float,
    precision: Precision = "high",
) -> tuple[Tensor, Tensor]:
    """Mix and couple details (B, C, h, w), given their low-pass band (B, 3, h, w) -> z, s.

    Gradient flows from z to `x` and `low`.

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
    parameters = (matrix, list(phi), list(rho_eta), clamp, precision)
    if torch.is_grad_enabled() and (x.requires_grad or low.requires_grad):
        z, scale, _, _ = kept_operator(x, low, *parameters)
        return z, scale
    return operator(x, low, *parameters)


def pad_mode(x: Tensor) -> str:
    """A map of one row or column has nothing to reflect."""
    return "reflect" if min(x.shape[-2:]) > 1 else "replicate"


def pad(x: Tensor) -> Tensor:
    """By one location; padding the few input channels rather than the hidden ones saves a copy of the hidden map."""
    # Reflection padding commutes with a 1x1 convolution and ReLU.
    return F.pad(x, (1, 1, 1, 1), mode=pad_mode(x))


def unpad(gradient: Tensor, mode: str) -> Tensor:
    """Gradient of `pad`, added in one order: torch's own adds in any order on CUDA, and is slower on a CPU."""
    edge = int(mode == "reflect")
    gradient = gradient.clone(memory_format=torch.contiguous_format)
    rows = gradient[..., 1:-1, :]
    rows[..., edge, :] += gradient[..., 0, :]
    rows[..., -1 - edge, :] += gradient[..., -1, :]
    columns = rows[..., 1:-1]
    columns[..., edge] += rows[..., 0]
    columns[..., -1 - edge] += rows[..., -1]
    return columns


def bottleneck(x: Tensor, *parameters: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A bottleneck block's output from its padded input, and its hidden maps."""
    w1, b1, w2, b2, w3, b3 = parameters
    # Gradients of weights would have strides that DDP copies.
    first = convolution(x if w1.requires_grad else channels_last(x), w1, b1).relu_()
    second = convolution(first, w2, b2, groups=w2.shape[0]).relu_()
    return convolution(second, w3, b3).contiguous(), first, second


def bottleneck_backward(
    gradient: Tensor, first: Tensor, second: Tensor, w1: Tensor, w2: Tensor, w3: Tensor, *, mode: str
) -> Tensor:
    """Gradient of x in `bottleneck(pad(x), ...)`, given where the hidden maps are positive, as 1 and 0."""
    # The transpose of a convolution: channels swapped, taps flipped, full padding.
    gradient = convolution(channels_last(gradient), w3.transpose(0, 1)).mul_(second)
    gradient = convolution(gradient, w2.flip(-2, -1), padding=2, groups=w2.shape[0]).mul_(first)
    return unpad(convolution(gradient, w1.transpose(0, 1)), mode)
