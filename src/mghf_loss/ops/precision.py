"""Precision of the matrix products of the operators' kernels; sums, and everything on a CPU, are in float32 at least.

- `"fast"`, the default: operands rounded to tf32 (statistics) or fp16 unit vectors (PatchNCE).
- `"high"`: as accurate as float32.

The torch formula on CUDA follows `torch.set_float32_matmul_precision` instead.
"""

from __future__ import annotations

from typing import Literal, get_args

Precision = Literal["fast", "high"]
PRECISIONS = get_args(Precision)


def check_precision(precision: Precision) -> Precision:
    """Return `precision`, or raise `ValueError` naming the known ones."""
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {PRECISIONS}, got {precision!r}")
    return precision
