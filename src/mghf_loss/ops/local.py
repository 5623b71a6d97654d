"""Errors of features place by place: all of content, texture and grid, in one pass forward and one back.

With x, y the features of SR and GT at N locations, windows of k x k locations (fewer at the bottom and right), and the
four phases of a grid of 2 x 2 locations, by whether row and column are even,

    texture = mean over windows of |R_x - R_y|,   R = sqrt(mean over the window of F^2 + eps^2),
    phases = mean of x - y over the locations of each phase,
    squared_error = mean (x - y)^2.

An odd last row or column has no phase. A map of one row or column has fewer phases; the others are 0. With n the
locations of a window, W the number of windows, and M the locations of a phase,

    dx = g_texture slope x / n + g_phase / M + 2 g_error (x - y) / N,   slope = sign(R_x - R_y) / (W R_x),

so the backward pass needs the slopes, one number for k^2 features, x, and y where the squared error is wanted. GT gets
no gradient. Channel weights multiply what comes out, so they cost nothing here.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from .statistics import compute_dtype, differentiable, first_derivative

PHASES = 4
WINDOW, EPS = 4, 0.05  # of the losses


class LocalErrors(NamedTuple):
    """Errors of every channel, in float32 at least."""

    texture: Tensor  # (B, C)
    phases: Tensor  # (B, C, 4): even and odd columns of even rows, then of odd rows
    squared_error: Tensor | None  # (B, C), None where it was not asked for


def local_formula(sr: Tensor, gt: Tensor, window: int, eps: float, squared_error: bool) -> tuple[Tensor, Tensor]:
    """Errors (B, C, 5 or 6) in the order of the named tuple, and slopes (B, C, h, w), in float32 at least."""
    dtype, kernel = compute_dtype(sr, gt), _kernel(sr, window)
    with torch.autocast(sr.device.type, enabled=False):
        x, y = sr.to(dtype), gt.to(dtype)
        x_strength, y_strength = (
            (F.avg_pool2d(level.square(), kernel, ceil_mode=True) + eps**2).sqrt() for level in (x, y)
        )
        strength_difference = x_strength - y_strength
        slope = strength_difference.sign() / (x_strength * strength_difference.shape[2:].numel())
        texture = strength_difference.abs().mean((2, 3))
        difference = x - y
        phases = _phases(difference).mean((2, 4))
        phases = F.pad(phases, (0, 2 - phases.shape[3], 0, 2 - phases.shape[2])).flatten(2)
        errors = [texture[..., None], phases]
        if squared_error:
            errors.append(difference.square_().mean((2, 3))[..., None])
        return torch.cat(errors, 2), slope.contiguous()


def backward_formula(sr: Tensor, gt: Tensor | None, slope: Tensor, gradient: Tensor, window: int) -> Tensor:
    """Gradient of `sr`, in its shape and dtype, from that of the errors; `gt` where they have a squared one."""
    kernel, x = _kernel(sr, window), sr.to(slope.dtype)
    with torch.autocast(sr.device.type, enabled=False):
        of_texture, of_phases, of_squared = gradient[..., None].tensor_split((1, 1 + PHASES), 2)
        # Every location gets its window's number, divided by the locations of the window.
        spread = torch.ops.aten.avg_pool2d_backward(slope * of_texture, x, kernel, kernel, [0, 0], True, True, None)
        found = spread * x
        if gt is not None:
            scale = 2 / max(1, x.shape[2:].numel())
            found = found.addcmul(x - gt.to(slope.dtype), of_squared, value=scale)
        places = _phases(found)
        rows, columns = places.shape[3], places.shape[5]
        shares = of_phases.unflatten(2, (2, 2))[..., :rows, :columns, 0] / max(1, places.shape[2] * places.shape[4])
        places += shares[:, :, None, :, None, :]
        return found.to(sr.dtype).contiguous()


def _phases(level: Tensor) -> Tensor:
    """A view (B, C, h, 2, w, 2) of the locations that have a phase; fewer phases in a map of one row or column."""
    height, width = level.shape[2:]
    rows, columns = min(2, height), min(2, width)
    whole = level[:, :, : height - height % rows, : width - width % columns]
    return whole.unflatten(3, (-1, columns)).unflatten(2, (-1, rows))


operator = torch.library.custom_op("mghf_loss::local_errors", local_formula, mutates_args=())
backward_operator = torch.library.custom_op("mghf_loss::local_errors_backward", backward_formula, mutates_args=())


@operator.register_fake
def _(sr: Tensor, gt: Tensor, window: int, eps: float, squared_error: bool) -> tuple[Tensor, Tensor]:
    batch, channels, *size = sr.shape
    dtype = compute_dtype(sr, gt)
    windows = [-(-length // k) for length, k in zip(size, _kernel(sr, window), strict=True)]
    errors = sr.new_empty((batch, channels, 1 + PHASES + squared_error), dtype=dtype)
    return errors, sr.new_empty((batch, channels, *windows), dtype=dtype)


@backward_operator.register_fake
def _(sr: Tensor, *rest: Any) -> Tensor:
    return torch.empty_like(sr, memory_format=torch.contiguous_format)


def _keep(ctx: Any, inputs: Any, output: Any) -> None:
    sr, gt, ctx.window, _, squared_error = inputs
    ctx.set_materialize_grads(False)  # no zeros for the slopes
    ctx.save_for_backward(sr, gt if squared_error else None, output[1])
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, gradient: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
    if gradient is None:
        return None, None, None, None, None
    return first_derivative(backward_operator, *ctx.saved_tensors, gradient, ctx.window), *[None] * 4


functional = differentiable(operator, _keep, _backward)


def local_errors(
    sr: Tensor, gt: Tensor, window: int = WINDOW, eps: float = EPS, *, squared_error: bool = True
) -> LocalErrors:
    """Texture error, phases and squared error: features (B, C, H, W) of SR and GT -> (B, C), (B, C, 4), (B, C).

    Gradient flows to `sr` only. Inputs are checked by the terms.

    >>> errors = local_errors(torch.ones(1, 2, 8, 8), torch.zeros(1, 2, 8, 8))
    >>> errors.squared_error, errors.phases[0, 0]
    (tensor([[1., 1.]]), tensor([1., 1., 1., 1.]))
    """
    return _named(_compute(sr, gt, window, eps, squared_error))


def stacked_local_errors(levels: Iterable[tuple[Tensor, Tensor]], *, squared_error: bool = True) -> LocalErrors:
    """Errors of several levels (sr, gt) with equal numbers of channels, stacked: (L, B, C), ..."""
    return _named(torch.stack([_compute(sr, gt, WINDOW, EPS, squared_error) for sr, gt in levels]))


def _named(errors: Tensor) -> LocalErrors:
    if errors.shape[-1] == 1 + PHASES:
        texture, phases = errors.split((1, PHASES), -1)
        return LocalErrors(texture.squeeze(-1), phases, None)
    texture, phases, squared_error = errors.split((1, PHASES, 1), -1)
    return LocalErrors(texture.squeeze(-1), phases, squared_error.squeeze(-1))


def _compute(sr: Tensor, gt: Tensor, window: int, eps: float, squared_error: bool) -> Tensor:
    compute = functional if torch._C._are_functorch_transforms_active() else operator
    if forward_ad.unpack_dual(sr).tangent is not None:
        compute = local_formula  # operators drop tangents
    return compute(sr, gt.detach(), window, eps, squared_error)[0]


def _kernel(sr: Tensor, window: int) -> list[int]:
    """Height and width of a window, at most those of the features."""
    return [min(window, size) for size in sr.shape[2:]]
