"""The operators on CUDA: Triton kernels where they can run, else the torch formula, with one warning that says why.

Triton is imported when an operator first meets a CUDA tensor, not before. `MGHF_LOSS_OPS=torch` in the environment
chooses the torch formula. float64 always takes it: the kernels compute in float32. So do empty batches, and those of
more images than a CUDA grid has rows.
"""

from __future__ import annotations

import os
import traceback
import warnings
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from .couplings import (
    coupling_formula,
    kept_backward_formula,
    kept_backward_operator,
    kept_formula,
    kept_operator,
)
from .couplings import operator as coupling_operator
from .linear import linear_level_formula, transpose_formula, transpose_operator
from .linear import operator as linear_operator
from .local import backward_formula as local_backward_formula
from .local import backward_operator as local_backward_operator
from .local import local_formula
from .local import operator as local_operator
from .nce import operator as patch_nce_operator
from .nce import patch_nce, patch_nce_formula
from .statistics import backward_formula, backward_operator, second_order_statistics, statistics_formula
from .statistics import operator as statistics_operator

LEAST_CAPABILITY = (8, 0)  # tensor cores with tf32, asynchronous copies
MISTAKES = (TypeError, AttributeError, NameError, ValueError, ZeroDivisionError)  # of Python code, not of a device
TRANSIENT = ("out of memory", "captur")  # in the message: another call may succeed, and no formula would help this one
MAX_BATCH = 65535
# Why a kernel failed, by what it was compiled for: operator, device, channels, dtypes of SR and GT, precision.
failures: dict[tuple[str, torch.device, int, torch.dtype, torch.dtype, str], str] = {}
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
    """Return a function that calls `kernel` of the Triton files, or `formula` where that cannot run.

    The first argument is a tensor. What was compiled depends on its channels, on its dtype and that of a second tensor,
    and on the precision, which is last. Out of memory and failures inside the capture of a CUDA graph are raised; so
    are mistakes of our own code: a slower path would hide them.
    """

    def run(sr: Tensor, gt: Any, *arguments: Any) -> Any:
        second = gt.dtype if isinstance(gt, Tensor) else sr.dtype
        dtypes = [given.dtype for given in (sr, gt, *arguments) if isinstance(given, Tensor)]
        if torch.float64 in dtypes or sr.numel() == 0 or len(sr) > MAX_BATCH:
            return formula(sr, gt, *arguments)
        precision = arguments[-1] if isinstance(arguments[-1], str) else ""
        key = (name, sr.device, sr.shape[1], sr.dtype, second, precision)
        reason = reason_against_kernels(sr.device) or failures.get(key)
        if reason is None:
            try:
                with torch.cuda.device_of(sr):  # Triton launches on the current device
                    return getattr(_kernels(), kernel)(sr, gt, *arguments)
            except torch.cuda.OutOfMemoryError:
                raise
            except Exception as error:  # of the compiler, the assembler, the C compiler or the driver
                if _is_our_mistake(error) or any(words in str(error) for words in TRANSIENT):
                    raise
                reason = failures[key] = _told(error)
        if reason != "MGHF_LOSS_OPS=torch" and reason not in _warned:
            _warned.add(reason)
            warnings.warn(
                f"mghf_loss::{name} runs as torch formula on {sr.device}, slower and with more memory: {reason}",
                RuntimeWarning,
                stacklevel=2,
            )
        return formula(sr, gt, *arguments)

    return run


def _is_our_mistake(error: Exception) -> bool:
    """Whether Python code outside Triton is wrong; Triton's CompilationError is none of these types."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return isinstance(error, MISTAKES) and frame.f_globals.get("__name__", "").partition(".")[0] != "triton"


def _told(error: BaseException) -> str:
    """Type and message of an error, and of those that caused it."""
    told = f"{type(error).__name__}: {error}"
    return told if error.__cause__ is None else f"{told} (from {_told(error.__cause__)})"


def _triton_version() -> str:
    import triton

    return triton.__version__


class _Kernels:
    """The launchers by name; made when first needed."""

    def __init__(self) -> None:
        from .couplings_triton import coupling_triton, kept_backward_triton, kept_triton
        from .linear_triton import linear_level_triton, transpose_triton
        from .local_triton import local_backward_triton, local_triton
        from .nce_triton import patch_nce_triton
        from .statistics_triton import backward_triton, statistics_triton

        self.coupling = coupling_triton
        self.coupling_kept = kept_triton
        self.coupling_kept_backward = kept_backward_triton
        self.linear_level = linear_level_triton
        self.linear_level_transpose = transpose_triton
        self.local_errors = local_triton
        self.local_errors_backward = local_backward_triton
        self.patch_nce = patch_nce_triton
        self.second_order_statistics = statistics_triton
        self.second_order_statistics_backward = backward_triton


_kernels = cache(_Kernels)

# Name of the operator, operator, formula.
OPERATORS = (
    ("second_order_statistics", statistics_operator, statistics_formula),
    ("second_order_statistics_backward", backward_operator, backward_formula),
    ("local_errors", local_operator, local_formula),
    ("local_errors_backward", local_backward_operator, local_backward_formula),
    ("patch_nce", patch_nce_operator, patch_nce_formula),
    ("coupling", coupling_operator, coupling_formula),
    ("coupling_kept", kept_operator, kept_formula),
    ("coupling_kept_backward", kept_backward_operator, kept_backward_formula),
    ("linear_level", linear_operator, linear_level_formula),
    ("linear_level_transpose", transpose_operator, transpose_formula),
)
for _name, _operator, _formula in OPERATORS:
    _operator.register_kernel("cuda")(with_fallback(_name, _name, _formula))


def _try(device: torch.device) -> str | None:
    """Run both operators on a small input; return why one fell back or failed, or None."""
    earlier, warned = dict(failures), set(_warned)
    failures.clear()
    try:
        with warnings.catch_warnings(), torch.enable_grad():
            warnings.simplefilter("ignore")
            sr = torch.rand(1, 12, 64, device=device, requires_grad=True)
            gt = torch.rand(1, 12, 64, device=device)
            second_order_statistics(sr, gt).squared_error.sum().backward()
            patch_nce(sr, gt).sum().backward()
        return reason_against_kernels(device) or next(iter(failures.values()), None)
    except Exception as error:  # such as a full device: whoever asks wants an answer
        return f"the trial failed, {_told(error)}"
    finally:
        failures.update(earlier)
        _warned.intersection_update(warned)  # a warning that nobody has seen is still to come
