"""The invertible modules of the network: channel mixing and affine coupling, with the blocks that condition them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from FrEIA.modules import InvertibleModule
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .ops.convolution import convolution, uses_operators
from .ops.couplings import (
    MAX_DETAILS,
    MAX_HIDDEN,
    MAX_HIDDEN_WITH_GRADIENT,
    Kept,
    bottleneck,
    bottleneck_backward,
    couple,
    couple_backward,
    coupling,
    pad,
    pad_mode,
)


class Bottleneck(nn.Sequential):
    """1x1, depthwise 3x3, 1x1 convolution with ReLU between: (B, C_in, h, w) -> (B, C_out, h, w).

    Starts as the zero function, so that a new coupling is the identity.
    """

    # Of the convolutions in training mode, bfloat16 for instance; None is that of the input. A coupling is a
    # bijection whatever computes its scale and shift, and its determinant follows from the scale as computed.
    training_dtype: torch.dtype | None = None

    def __init__(self, in_channels: int, hidden: int, out_channels: int) -> None:
        super().__init__(
            nn.Conv2d(in_channels, hidden, 1),
            nn.ReLU(inplace=True),
            nn.Conv2d(hidden, hidden, 3, groups=hidden),
            nn.ReLU(inplace=True),
            nn.Conv2d(hidden, out_channels, 1),
        )
        for parameter in self[-1].parameters():
            nn.init.zeros_(parameter)

    def forward(self, input: Tensor) -> Tensor:
        """Apply the block; every map keeps its height and width."""
        if self.training and self.training_dtype is not None:
            with torch.autocast(input.device.type, self.training_dtype):
                return super().forward(pad(input)).to(input.dtype)
        parameters = tuple(self.parameters())
        frozen = input.requires_grad and not any(parameter.requires_grad for parameter in parameters)
        # A trace holds no functions of Python.
        if frozen and not torch.jit.is_tracing():  # pyright: ignore[reportPrivateImportUsage]
            return _FrozenBottleneck.apply(input, *parameters)[0]  # type: ignore[index]
        return bottleneck(pad(input), *parameters)[0]


def _is_positive(hidden: Tensor) -> Tensor:
    """After ReLU, as 1 and 0: bool() is several times as fast as > 0, and a CPU vectorises products with uint8."""
    return hidden.bool().view(torch.uint8)


class _FrozenBottleneck(torch.autograd.Function):
    """`Bottleneck` with constant parameters: the backward pass needs the signs of the hidden maps only.

    Autograd would keep the maps themselves, as inputs of convolutions whose weights need no gradient: four times
    the memory, and most of what a loss keeps.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, *parameters: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        output, first, second = bottleneck(pad(x), *parameters)
        return output, _is_positive(first), _is_positive(second)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.set_materialize_grads(False)  # no zeros for the signs
        ctx.mark_non_differentiable(*output[1:])
        ctx.pad_mode = pad_mode(inputs[0])
        ctx.save_for_backward(*output[1:], *inputs[1::2])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        with torch.autocast(gradients[0].device.type, enabled=False):  # the caller's, where backward() is inside
            gradient = bottleneck_backward(gradients[0], *ctx.saved_tensors, mode=ctx.pad_mode)
        return gradient, *[None] * 6


class ChannelMixing(InvertibleModule):
    """z = W x in every place, W a square matrix that starts as `gain` times a random rotation.

    log|det| = h * w * log|det W|.
    """

    def __init__(
        self,
        dims_in: Any,
        dims_c: Any = None,
        *,
        learned: bool = True,
        gain: float = 1.0,
    ) -> None:
        super().__init__(dims_in, dims_c)
        channels = self.dims_in[0][0]
        rotation = nn.init.orthogonal_(torch.empty(channels, channels, dtype=torch.float32))  # no QR in half precision
        self.matrix = nn.Parameter((gain * rotation).to(torch.get_default_dtype()), requires_grad=learned)

    def forward(
        self,
        x_or_z: Iterable[Tensor],
        c: Iterable[Tensor] | None = None,
        rev: bool = False,
        jac: bool = True,
    ) -> tuple[tuple[Tensor], Any]:
        """See `FrEIA.modules.InvertibleModule.forward`."""
        (x,) = x_or_z
        log_det_jac = 0.0
        if jac:
            # Linear algebra has no half-precision kernels.
            matrix = self.matrix.to(torch.promote_types(self.matrix.dtype, torch.float32))
            log_det_jac = x.shape[-2] * x.shape[-1] * torch.linalg.slogdet(matrix).logabsdet
            log_det_jac = -log_det_jac if rev else log_det_jac
        # Inverted in float64: for 189 channels a float32 inverse would be off by 4e-5.
        inverse = torch.linalg.inv(self.matrix.double()).to(x.dtype) if rev else None
        return (self.transform(x, inverse),), log_det_jac

    def transform(self, x: Tensor, matrix: Tensor | None = None) -> Tensor:
        """Return W x, or `matrix` x."""
        return convolution(x, (self.matrix if matrix is None else matrix)[:, :, None, None])

    def output_dims(self, input_dims: list[Any]) -> list[Any]:
        """Unchanged."""
        return input_dims


class AffineCoupling(InvertibleModule):
    """z2 <- z2 + phi(z1, low); z1 <- z1 * exp(rho(z2, low)) + eta(z2, low), the low-pass band a condition.

    The coupling of the paper (section 3, invertible modules), with one choice of ours: the low-pass band is
    not transformed but given, so that the network is a density of the details given the coarse image.
    rho and eta come from one bottleneck block, rho bounded by clamp * tanh(rho / clamp).
    """

    def __init__(
        self,
        dims_in: Any,
        dims_c: Any,
        *,
        hidden: int,
        clamp: float,
    ) -> None:
        super().__init__(dims_in, dims_c)
        channels, condition = self.dims_in[0][0], self.dims_c[0][0]
        self.clamp = clamp
        self.split = (channels - channels // 2, channels // 2)
        n1, n2 = self.split
        self.phi = Bottleneck(n1 + condition, hidden, n2)
        self.rho_eta = Bottleneck(n2 + condition, hidden, 2 * n1)

    def forward(
        self,
        x_or_z: Iterable[Tensor],
        c: Iterable[Tensor] | None = None,
        rev: bool = False,
        jac: bool = True,
    ) -> tuple[tuple[Tensor], Any]:
        """See `FrEIA.modules.InvertibleModule.forward`."""
        if c is None:
            raise ValueError("AffineCoupling needs the low-pass band as its condition c, got None")
        (x,), (low,) = x_or_z, c
        if rev:
            z1, z2 = x.split(self.split, dim=1)
            log_scale, eta = self._log_scale_and_shift(z2, low)
            z1 = (z1 - eta) * torch.exp(-log_scale)
            z, log_scale = torch.cat((z1, z2 - self.phi(torch.cat((z1, low), dim=1))), dim=1), -log_scale
        else:
            z, log_scale = self.transform(x, low)
        return (z,), log_scale.flatten(1).sum(1) if jac else 0.0

    def transform(self, x: Tensor, low: Tensor) -> tuple[Tensor, Tensor]:
        """Return what becomes of the details x, and log s (B, n1, h, w), the log-scale of their first n1 channels."""
        z1, z2 = x.split(self.split, dim=1)
        z2 = z2 + self.phi(torch.cat((z1, low), dim=1))
        log_scale, eta = self._log_scale_and_shift(z2, low)
        return torch.cat((z1 * torch.exp(log_scale) + eta, z2), dim=1), log_scale

    def _log_scale_and_shift(self, z2: Tensor, low: Tensor) -> tuple[Tensor, Tensor]:
        rho, eta = self.rho_eta(torch.cat((z2, low), dim=1)).chunk(2, dim=1)
        return self.clamp * torch.tanh(rho / self.clamp), eta

    def output_dims(self, input_dims: list[Any]) -> list[Any]:
        """Unchanged."""
        return input_dims


def frozen_coupling(
    mixing: ChannelMixing, affine: AffineCoupling, x: Tensor, low: Tensor
) -> tuple[Tensor, Tensor] | None:
    """What becomes of the details x, and the scale s, a constant, with constant parameters; None in training."""
    matrix, phi, rho_eta = mixing.matrix, list(affine.phi.parameters()), list(affine.rho_eta.parameters())
    if torch.is_grad_enabled() and any(parameter.requires_grad for parameter in (matrix, *phi, *rho_eta)):
        return None
    if affine.training and affine.phi.training_dtype is not None:
        return None
    differentiated = torch.is_grad_enabled() and (x.requires_grad or low.requires_grad)
    most = MAX_HIDDEN_WITH_GRADIENT if differentiated else MAX_HIDDEN
    if uses_operators(x) and x.shape[1] <= MAX_DETAILS and len(phi[0]) <= most:
        return coupling(x, low, matrix, phi, rho_eta, affine.clamp)
    # A trace holds no functions of Python.
    if differentiated and not torch.jit.is_tracing():  # pyright: ignore[reportPrivateImportUsage]
        return _FrozenCoupling.apply(x, low, affine.clamp, matrix, *phi, *rho_eta)[:2]  # type: ignore[index]
    z, kept = couple(x, low, matrix, phi, rho_eta, affine.clamp)
    return z, kept.scale.detach()


class _FrozenCoupling(torch.autograd.Function):
    """`couple` with constant parameters: what `_FrozenBottleneck` is for a block, with less for autograd to follow."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, low: Tensor, clamp: float, matrix: Tensor, *blocks: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        z, (scale, z1, hidden) = couple(x, low, matrix, blocks[:6], blocks[6:], clamp, keep=_is_positive)
        # Not a view, which would keep all details.
        return z, scale, z1.clone(memory_format=torch.contiguous_format), *hidden

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        _, _, ctx.clamp, *parameters = inputs
        ctx.set_materialize_grads(False)  # no zeros for what is kept
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(*output[1:], *parameters)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        scale, z1, *rest = ctx.saved_tensors
        kept, matrix, blocks = Kept(scale, z1, rest[:4]), rest[4], rest[5:]
        return *couple_backward(gradients[0], kept, matrix, blocks[:6], blocks[6:], ctx.clamp), *[None] * 14
