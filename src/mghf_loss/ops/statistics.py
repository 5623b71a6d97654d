"""Gram difference, variances and covariance of SR and GT: all of content, style and correlation, in one pass.

With x, y (B, C, N) the features of SR and GT at N locations, and means over the locations,

    gram_difference = (x x^T - y y^T) / (C N) = (d m^T + m d^T) / (2 C N),   d = x - y, m = x + y,
    squared_error   = mean d^2,   variance = mean (x - mean x)^2,   covariance = mean (x - mean x)(y - mean y).

One product gives the difference of two Gram matrices, and nothing cancels when SR is close to GT: at a distance of
1e-3 the difference of two Gram matrices in tf32 is off by 2 %, this form by 3e-5. The squared error is summed by
itself; from the diagonals of Gram matrices it would cancel in the same way. Variances are of centred values.

The backward pass is one pass too: with A = (g + g^T) / (C N) of the gradient g of gram_difference,

    dx = A x + (2 g_error d + 2 g_variance (x - mean x) + g_covariance (y - mean y) + g_mean) / N,

and 0 for pruned channels. GT gets no gradient. Channel weights multiply statistics, not features, so they cost nothing
here: (w_c w_d) times gram_difference, w_c^2 times squared_error; a channel of weight 0 is not read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .. import _checks

# Of the matrix products in the operators' kernels: "fast" rounds the operands to tf32 (statistics) or takes fp16 unit
# vectors (PatchNCE), "high" is as accurate as float32. Sums, and all on a CPU, are in float32 at least. The torch
# formula on CUDA follows `torch.set_float32_matmul_precision` instead.
Precision = Literal["fast", "high"]


class SecondOrderStatistics(NamedTuple):
    """Statistics of one level, in float32 at least; 0 for the channels that were pruned."""

    gram_difference: Tensor | None  # (B, C, C), None where it was not asked for; the rest (B, C)
    mean_sr: Tensor
    mean_gt: Tensor
    variance_sr: Tensor
    variance_gt: Tensor
    covariance: Tensor
    squared_error: Tensor


def second_order_statistics(
    sr: Tensor,
    gt: Tensor,
    channel_weights: Tensor | None = None,
    *,
    gram: bool = True,
    precision: Precision = "fast",
) -> SecondOrderStatistics:
    """Gram difference, means, variances, covariance and squared error: (B, C, ...) of SR and GT -> (B, C, C), (B, C).

    Gradient flows to `sr` only. A kernel reads both inputs once forward and once backward, beyond 128 channels (64 off
    Hopper) once for each block of channels.

    Args:
        sr: features of SR, any floating dtype; float64 stays float64, all else is computed in float32.
        gt: features of GT, of the same shape.
        channel_weights: (B, C); not multiplied in, but where they are 0 the channel is not read.
        gram: also compute the Gram difference.
        precision: of the products with C x C matrices on CUDA, everything else is float32 always. `"fast"`: tf32, one
            operand with its remainder (relative error 3e-4 at most); `"high"`: float32. That is the kernels' promise;
            the torch formula takes float32 for both, on CUDA as `torch.set_float32_matmul_precision` has it.

    Raises:
        ValueError, TypeError: shapes, dtypes or options do not fit, naming what came.
    """
    gram_difference, moments = _measure(sr, gt, channel_weights, gram, precision)
    return SecondOrderStatistics(gram_difference if gram else None, *moments.unbind(1))


def stacked_statistics(
    levels: Iterable[tuple[Tensor, Tensor, Tensor | None]], *, gram: bool = True, precision: Precision = "fast"
) -> SecondOrderStatistics:
    """Stack the statistics of levels of as many channels: sr, gt and channel weights each -> (L, B, C, C), (L, B, C).

    One tensor of small numbers for all levels: on a GPU, what is computed from them takes as long for one level.
    """
    gram_differences, moments = zip(*(_measure(*level, gram, precision) for level in levels), strict=True)
    return SecondOrderStatistics(torch.stack(gram_differences) if gram else None, *torch.stack(moments).unbind(2))


def _measure(
    sr: Tensor, gt: Tensor, channel_weights: Tensor | None, gram: bool, precision: Precision
) -> tuple[Tensor, Tensor]:
    """As `statistics_formula`, of checked arguments and with a derivative."""
    if sr.ndim < 3 or sr.shape != gt.shape:
        raise ValueError(f"sr and gt must have one shape (B, C, ...), got {tuple(sr.shape)} and {tuple(gt.shape)}")
    if sr.shape[1:].numel() == 0:
        raise ValueError(f"sr and gt must have at least one channel and location, got shape {tuple(sr.shape)}")
    if not (sr.is_floating_point() and gt.is_floating_point()):
        raise TypeError(f"sr and gt must be floating-point tensors, got {sr.dtype} and {gt.dtype}")
    if channel_weights is not None and channel_weights.shape != sr.shape[:2]:
        raise ValueError(f"channel_weights must have shape {tuple(sr.shape[:2])}, got {tuple(channel_weights.shape)}")
    for name, tensor in (("gt", gt), ("channel_weights", channel_weights)):
        if tensor is not None and tensor.device != sr.device:
            raise ValueError(f"sr and {name} must be on one device, got {sr.device} and {tensor.device}")
    keep = None if channel_weights is None else channel_weights.detach() != 0
    _checks.one_of("precision", precision, Precision)
    compute = functional if torch._C._are_functorch_transforms_active() else operator
    if forward_ad.unpack_dual(sr).tangent is not None:
        compute = statistics_formula  # operators drop tangents
    return compute(sr, gt.detach(), keep, gram, precision)


def statistics_formula(
    sr: Tensor, gt: Tensor, keep: Tensor | None, gram: bool, precision: str
) -> tuple[Tensor, Tensor]:
    """Gram difference (B, C, C), or an empty tensor, and moments (B, 6, C) in the order of the named tuple."""
    with torch.autocast(sr.device.type, enabled=False):
        x, y = _maps(sr, gt)
        channels, locations = x.shape[1:]
        difference = x - y
        gram_difference = x.new_empty(0)
        if gram:
            scale = (channels * locations) ** -0.5  # before the product: no overflow, no lost digits
            product = torch.bmm(difference * scale, ((x + y) * scale).transpose(1, 2))
            gram_difference = 0.5 * (product + product.transpose(1, 2))
        mean_x, mean_y = x.mean(2, keepdim=True), y.mean(2, keepdim=True)
        squared_error = difference.square_().mean(2)
        x, y = x - mean_x, y - mean_y
        moments = [mean_x.squeeze(2), mean_y.squeeze(2), x.square().mean(2), y.square().mean(2), (x * y).mean(2)]
        moments = torch.stack([*moments, squared_error], 1)
        if keep is not None:
            moments = torch.where(keep[:, None], moments, 0)
            if gram:
                gram_difference = torch.where(keep[:, None] & keep[:, :, None], gram_difference, 0)
    return gram_difference, moments


def backward_formula(
    sr: Tensor,
    gt: Tensor,
    keep: Tensor | None,
    moments: Tensor,
    gram_gradient: Tensor | None,
    moment_gradient: Tensor,
    precision: str,
) -> Tensor:
    """Gradient of `sr`, in its shape and dtype, from those of the Gram difference and of the moments."""
    with torch.autocast(sr.device.type, enabled=False):
        x, y = _maps(sr, gt)
        channels, locations = x.shape[1:]
        coefficients = moment_gradient / locations
        if keep is not None:
            coefficients = torch.where(keep[:, None], coefficients, 0)
        of_mean, _, of_variance, _, of_covariance, of_error = coefficients[..., None].unbind(1)
        mean_x, mean_y = moments[:, 0, :, None], moments[:, 1, :, None]
        # Differences stay explicit: as factors of x and y, the coefficients would cancel when SR is close to GT.
        gradient = torch.addcmul(of_mean, x - mean_x, of_variance, value=2)
        gradient = gradient.addcmul_(y - mean_y, of_covariance).addcmul_(x - y, of_error, value=2)
        if gram_gradient is not None:
            mixing = (gram_gradient + gram_gradient.transpose(1, 2)) / (channels * locations)
            if keep is not None:
                mixing = torch.where(keep[:, None] & keep[:, :, None], mixing, 0)
            gradient = gradient.baddbmm_(mixing, x)
    return gradient.to(sr.dtype).contiguous().reshape(sr.shape)


operator = torch.library.custom_op("mghf_loss::second_order_statistics", statistics_formula, mutates_args=())
backward_operator = torch.library.custom_op(
    "mghf_loss::second_order_statistics_backward", backward_formula, mutates_args=()
)


@operator.register_fake
def _(sr: Tensor, gt: Tensor, keep: Tensor | None, gram: bool, precision: str) -> tuple[Tensor, Tensor]:
    batch, channels = sr.shape[:2]
    dtype = compute_dtype(sr, gt)
    return (
        sr.new_empty((batch, channels, channels) if gram else 0, dtype=dtype),
        sr.new_empty((batch, 6, channels), dtype=dtype),
    )


@backward_operator.register_fake
def _(sr: Tensor, *rest: Any) -> Tensor:
    return torch.empty_like(sr, memory_format=torch.contiguous_format)


def differentiable(
    operator: Any, setup_context: Callable[..., None], backward: Callable[..., Any]
) -> Callable[..., Any]:
    """Register the derivative of `operator`; return it for `torch.func`, which does not see what is registered."""
    operator.register_autograd(backward, setup_context=setup_context)
    static = {"forward": operator, "setup_context": setup_context, "backward": backward}
    attributes = {"generate_vmap_rule": True, **{name: staticmethod(function) for name, function in static.items()}}
    return type("Functional", (torch.autograd.Function,), attributes).apply  # type: ignore[attr-defined]


def first_derivative(operator: Callable[..., Tensor], *arguments: Any) -> Tensor:
    """Call an operator that computes a derivative; a second derivative is refused, not left out."""
    return _FirstDerivative.apply(operator, *arguments)  # type: ignore[return-value]


class _FirstDerivative(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(operator: Callable[..., Tensor], *arguments: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        return operator(*arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise NotImplementedError("the operators of mghf_loss have no second derivative")


def _keep_inputs(ctx, inputs, output) -> None:
    sr, gt, keep, ctx.gram, ctx.precision = inputs
    ctx.save_for_backward(sr, gt, keep, output[1])


def _backward(ctx, gram_gradient: Tensor, moment_gradient: Tensor) -> tuple[Tensor | None, ...]:
    arguments = *ctx.saved_tensors, gram_gradient if ctx.gram else None, moment_gradient, ctx.precision
    return first_derivative(backward_operator, *arguments), *[None] * 4


functional = differentiable(operator, _keep_inputs, _backward)


def compute_dtype(sr: Tensor, gt: Tensor) -> torch.dtype:
    """Return the dtype of all computation on `sr` and `gt`: float32 at least."""
    return torch.promote_types(torch.promote_types(sr.dtype, gt.dtype), torch.float32)


def _maps(sr: Tensor, gt: Tensor) -> tuple[Tensor, Tensor]:
    """Features as (B, C, N) in float32 at least."""
    dtype = compute_dtype(sr, gt)
    return sr.flatten(2).to(dtype), gt.flatten(2).to(dtype)
