"""Features of the last ground truth, kept between calls of a loss."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from . import _checks

Value = TypeVar("Value")


class GTCache(Generic[Value]):
    """Remembers what was computed from the last GT, as long as that very tensor lives and is not written to.

    For a loss that is called several times with one GT: a GAN step with several generator passes, several SR outputs of
    one image. A hit is the same tensor object with the same version counter and the same settings; values are never
    compared, nothing waits for a GPU. So an in-place change (`gt.mul_(2)`, `gt[0] = 0`, `gt.copy_(other)`, also through
    a view or `gt.detach()`) is seen, and a tensor that is new in every call (`batch["gt"][:, :3]`) is never found.

    The value can be stale only after writes that PyTorch does not count: by a collective (`dist.broadcast(gt, 0)`), a
    fused optimiser, through `gt.data`, NumPy or another process that shares the memory, from inside a captured CUDA
    graph that is replayed, or to the parameters of the network that computes it. After such a write pass a new tensor
    (`gt.detach()`).

    Nothing is remembered under `torch.compile`, in inference mode, for inference tensors and while a CUDA graph is
    captured. Only one GT is; its value dies with it. Copies and pickles of a cache are empty.
    """

    def __init__(self, enabled: bool) -> None:
        self.enabled = _checks.boolean("cache_gt", enabled)
        self._last = WeakTensorKeyDictionary()

    @torch.no_grad()
    def get(self, gt: Tensor, compute: Callable[[Tensor], Value], *settings: Hashable) -> Value:
        """Return `compute(gt)`, or what it returned for this GT and these `settings`; without gradient."""
        if not self.enabled or not _is_cacheable(gt):
            return compute(gt)
        device = gt.device.type
        dtype = torch.get_autocast_dtype(device)
        key = (gt._version, gt.shape, gt.dtype, torch.is_autocast_enabled(device), dtype, *settings)
        remembered = self._last.get(gt)
        if remembered is None or remembered[0] != key:
            self._last = WeakTensorKeyDictionary()  # first, so that two values are never held at once
            remembered = key, compute(gt)
            # Replaced rather than filled: whatever other threads do, there is one.
            self._last = WeakTensorKeyDictionary({gt: remembered})
        return remembered[1]

    def __reduce__(self) -> tuple[type[GTCache[Value]], tuple[bool]]:
        # Weak references cannot be pickled, and a deep copy of the value would belong to no tensor.
        return type(self), (self.enabled,)


def _is_cacheable(gt: Tensor) -> bool:
    # Inference tensors count no versions, and may not enter a later training step; a capture must hold the computation.
    return not (
        torch.compiler.is_compiling()
        or torch.is_inference_mode_enabled()
        or gt.is_inference()
        or (gt.is_cuda and torch.cuda.is_current_stream_capturing())
    )
