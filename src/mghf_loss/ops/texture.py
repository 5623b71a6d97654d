"""Error of the local strength of features, window by window: the texture term, one pass forward and one back.

With x, y the features of SR and GT, and windows of k x k locations (fewer at the bottom and right),

    R = sqrt(mean over the window of F^2 + eps^2),   error = mean over windows of |R_x - R_y|.

With n the locations of a window and W the number of windows, the gradient is the feature times one number a window:

    d error / d x = slope x / n,   slope = sign(R_x - R_y) / (W R_x),

so the backward pass needs the slopes, one number for k^2 features, and x. GT gets no gradient.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from .statistics import compute_dtype, differentiable, first_derivative


def texture_formula(sr: Tensor, gt: Tensor, window: int, eps: float) -> tuple[Tensor, Tensor]:
    """Error of each channel (B, C), and slopes (B, C, h, w), in float32 at least."""
    dtype, kernel = compute_dtype(sr, gt), _kernel(sr, window)
    with torch.autocast(sr.device.type, enabled=False):
        sr_strength, gt_strength = (
            (F.avg_pool2d(level.to(dtype).square(), kernel, ceil_mode=True) + eps**2).sqrt() for level in (sr, gt)
        )
        difference = sr_strength - gt_strength
        slope = difference.sign() / (sr_strength * difference.shape[2:].numel())
        return difference.abs().mean((2, 3)), slope.contiguous()


def backward_formula(sr: Tensor, slope: Tensor, gradient: Tensor, window: int) -> Tensor:
    """Gradient of `sr`, in its shape and dtype, from that of the error."""
    kernel, x = _kernel(sr, window), sr.to(slope.dtype)
    with torch.autocast(sr.device.type, enabled=False):
        slope = slope * gradient[..., None, None]
        # Every location gets its window's number, divided by the locations of the window.
        spread = torch.ops.aten.avg_pool2d_backward(slope, x, kernel, kernel, [0, 0], True, True, None)
        return (spread * x).to(sr.dtype).contiguous()


operator = torch.library.custom_op("mghf_loss::texture", texture_formula, mutates_args=())
backward_operator = torch.library.custom_op("mghf_loss::texture_backward", backward_formula, mutates_args=())


@operator.register_fake
def _(sr: Tensor, gt: Tensor, window: int, eps: float) -> tuple[Tensor, Tensor]:
    batch, channels, *size = sr.shape
    dtype = compute_dtype(sr, gt)
    windows = [-(-length // k) for length, k in zip(size, _kernel(sr, window), strict=True)]
    return sr.new_empty((batch, channels), dtype=dtype), sr.new_empty((batch, channels, *windows), dtype=dtype)


@backward_operator.register_fake
def _(sr: Tensor, *rest: Any) -> Tensor:
    return torch.empty_like(sr, memory_format=torch.contiguous_format)


def _keep(ctx: Any, inputs: Any, output: Any) -> None:
    sr, _, ctx.window, _ = inputs
    ctx.set_materialize_grads(False)  # no zeros for the slopes
    ctx.save_for_backward(sr, output[1])
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, gradient: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
    if gradient is None:
        return None, None, None, None
    return first_derivative(backward_operator, *ctx.saved_tensors, gradient, ctx.window), None, None, None


functional = differentiable(operator, _keep, _backward)


def texture_error(sr: Tensor, gt: Tensor, window: int = 4, eps: float = 0.05) -> Tensor:
    """Mean over windows of |R_sr - R_gt|: features (B, C, H, W) of SR and GT -> (B, C), in float32 at least.

    Gradient flows to `sr` only. Inputs are checked by `mghf_loss.terms.texture`.
    """
    compute = functional if torch._C._are_functorch_transforms_active() else operator
    if forward_ad.unpack_dual(sr).tangent is not None:
        compute = texture_formula  # operators drop tangents
    return compute(sr, gt.detach(), window, eps)[0]


def _kernel(sr: Tensor, window: int) -> list[int]:
    """Height and width of a window, at most those of the features."""
    return [min(window, size) for size in sr.shape[2:]]
