"""The operators on CUDA: Triton kernels where they can run, else the torch formula, with one warning that says why.

Triton is imported when an operator first meets a CUDA tensor, not before. `MGHF_LOSS_OPS=torch` in the environment
chooses the torch formula. float64 always takes it: the kernels compute in float32.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from .patch_nce import operator as patch_nce_operator
from .patch_nce import patch_nce, patch_nce_formula
from .statistics import backward_formula, backward_operator, second_order_statistics, statistics_formula
from .statistics import operator as statistics_operator

LEAST_CAPABILITY = (8, 0)  # tensor cores with tf32, asynchronous copies
failures: dict[tuple[str, torch.device, int], str] = {}  # why a kernel failed, by operator, device and channels
_warned: set[str] = set()


def active_path() -> str:
    """Name the implementation that the operators run on, for each device, after a trial."""
    lines = ["torch formula on the CPU"]
    for index in range(torch.cuda.device_count()):
        device = torch.device("cuda", index)
        reason = _try(device)
        path = f"Triton {_triton_version()} kernels" if reason is None else f"torch formula ({reason})"
        lines.append(f"{path} on {device} ({torch.cuda.get_device_name(device)})")
    return "; ".join(lines)


def reason_against_kernels(device: torch.device) -> str | None:
    """Why the kernels are not used on `device`, or None.

    Raises:
        ValueError: the environment's MGHF_LOSS_OPS is neither `torch` nor empty.
    """
    choice = os.environ.get("MGHF_LOSS_OPS", "")
    if choice not in ("", "torch"):
        raise ValueError(f"MGHF_LOSS_OPS must be 'torch' or unset, got {choice!r}")
    return "MGHF_LOSS_OPS=torch" if choice else _reason_of_hardware(device)


@cache
def _reason_of_hardware(device: torch.device) -> str | None:
    if torch.version.hip:
        return "ROCm, the kernels are for NVIDIA GPUs"
    if find_spec("triton") is None:
        return "Triton is not installed"
    capability = torch.cuda.get_device_capability(device)
    if capability < LEAST_CAPABILITY:
        return f"compute capability {capability[0]}.{capability[1]}, the kernels need 8.0"
    if capability[0] == 10:
        # Two products into one sum: triton-lang/triton#10821.
        return f"compute capability {capability[0]}.{capability[1]}, for which Triton miscompiles chained products"
    return None


def with_fallback(name: str, kernel: str, formula: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that calls `kernel` of the Triton files, or `formula` where that cannot run."""

    def run(sr: Tensor, gt: Tensor, *arguments: Any) -> Any:
        if torch.float64 in (sr.dtype, gt.dtype):
            return formula(sr, gt, *arguments)
        key = (name, sr.device, sr.shape[1])
        reason = reason_against_kernels(sr.device) or failures.get(key)
        if reason is None:
            try:
                with torch.cuda.device_of(sr):  # Triton launches on the current device
                    return getattr(_kernels(), kernel)(sr, gt, *arguments)
            except torch.cuda.OutOfMemoryError:
                raise
            except Exception as error:  # of the compiler, the assembler, the C compiler or the driver
                reason = failures[key] = f"{type(error).__name__}: {error}"
        if reason != "MGHF_LOSS_OPS=torch" and reason not in _warned:
            _warned.add(reason)
            warnings.warn(
                f"mghf_loss::{name} runs as torch formula on {sr.device}, slower and with more memory: {reason}",
                RuntimeWarning,
                stacklevel=2,
            )
        return formula(sr, gt, *arguments)

    return run


def _triton_version() -> str:
    import triton

    return triton.__version__


class _Kernels:
    """The launchers by name; made when first needed."""

    def __init__(self) -> None:
        from .patch_nce_triton import patch_nce_triton
        from .statistics_triton import backward_triton, statistics_triton

        self.patch_nce = patch_nce_triton
        self.statistics = statistics_triton
        self.statistics_backward = backward_triton


_kernels = cache(_Kernels)

statistics_operator.register_kernel("cuda")(with_fallback("second_order_statistics", "statistics", statistics_formula))
backward_operator.register_kernel("cuda")(
    with_fallback("second_order_statistics_backward", "statistics_backward", backward_formula)
)
patch_nce_operator.register_kernel("cuda")(with_fallback("patch_nce", "patch_nce", patch_nce_formula))


def _try(device: torch.device) -> str | None:
    """Run both operators on a small input; return why one fell back, or None."""
    sr = torch.rand(1, 12, 64, device=device, requires_grad=True)
    gt = torch.rand(1, 12, 64, device=device)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        second_order_statistics(sr, gt).squared_error.sum().backward()
        patch_nce(sr, gt).sum().backward()
    reason = reason_against_kernels(device)
    return reason or next((text for (_, where, _), text in failures.items() if where == device), None)
