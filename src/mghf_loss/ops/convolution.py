"""Convolutions of the network: float32 on every device.

cuDNN multiplies float32 in tf32 unless `torch.backends.cudnn` says otherwise: features would be off by 1e-3 to 3e-3,
gradients by 0.3 to 2 % (simulated). The setting is the caller's, so it is overruled in each call, not switched.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: int = 1,
    groups: int = 1,
    padding: int = 0,
    transposed: bool = False,
) -> Tensor:
    """`F.conv2d`, or `F.conv_transpose2d` with `transposed`, on CUDA without tf32.

    So is its gradient where `weight` is constant and there are neither bias nor padding; the gradient of parameters
    follows `torch.backends.cudnn`.
    """
    frozen = x.requires_grad and not weight.requires_grad and bias is None and not padding
    # A trace holds no functions of Python.
    if frozen and torch.is_grad_enabled() and not torch.jit.is_tracing():  # pyright: ignore[reportPrivateImportUsage]
        return _FrozenConvolution.apply(x, weight, stride, groups, transposed)  # type: ignore[return-value]
    return _convolve(x, weight, bias, stride, groups, padding, transposed)


def _convolve(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, groups: int, padding: int, transposed: bool
) -> Tensor:
    if not uses_cudnn(x):
        function = F.conv_transpose2d if transposed else F.conv2d
        return function(x, weight, bias, stride=stride, padding=padding, groups=groups)
    cudnn, two = torch.backends.cudnn, [1, 1]
    settings = cudnn.benchmark, cudnn.deterministic, cudnn.enabled
    allow_tf32 = False
    padding_sizes, strides = [padding, padding], [stride, stride]
    return torch.ops.aten._convolution(
        x, weight, bias, strides, padding_sizes, two, transposed, [0, 0], groups, *settings, allow_tf32
    )


def channels_last(x: Tensor) -> Tensor:
    """Lay out `x` for a block of convolutions on a CPU: a depthwise one takes half the time then. vmap cannot."""
    if x.device.type != "cpu" or uses_cudnn(x) or _in_vmap(x):
        return x
    return x.contiguous(memory_format=torch.channels_last)


def _in_vmap(x: Tensor) -> bool:
    if torch._C._are_functorch_transforms_active():
        return True
    # The vmap of `torch.autograd.functional` and `is_grads_batched`, which Dynamo does not know.
    functorch: Any = torch._C._functorch  # pyright: ignore[reportAttributeAccessIssue]
    return not torch.compiler.is_compiling() and functorch.is_legacy_batchedtensor(x)


def uses_cudnn(x: Tensor) -> bool:
    """Whether convolutions of `x` may be in tf32."""
    return x.is_cuda


def uses_operators(x: Tensor) -> bool:
    """Whether the network maps `x` by its own operators, which are kernels: in float32 on CUDA."""
    return x.is_cuda and x.dtype == torch.float32 and not torch._C._are_functorch_transforms_active()


class _FrozenConvolution(torch.autograd.Function):
    """With a constant weight: the gradient is the transposed convolution, in the same precision."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weight: Tensor, stride: int, groups: int, transposed: bool) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        return _convolve(x, weight, None, stride, groups, 0, transposed)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        _, weight, *ctx.options = inputs
        ctx.save_for_backward(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        (weight,), (stride, groups, transposed) = ctx.saved_tensors, ctx.options
        with torch.autocast(weight.device.type, enabled=False):  # the caller's, where backward() is inside
            if weight.shape[2:].numel() == 1 and groups == 1:  # of 1x1; several times as fast on a CPU
                gradient = _convolve(gradients[0], weight.transpose(0, 1), None, 1, 1, 0, False)
            else:
                gradient = _convolve(gradients[0], weight, None, stride, groups, 0, not transposed)
        return gradient, None, None, None, None
