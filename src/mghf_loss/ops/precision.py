"""Precision of the matrix products of the operators' kernels; sums, and everything on a CPU, are in float32 at least.

- `"fast"`, the default: operands rounded to tf32 (statistics) or fp16 unit vectors (PatchNCE).
- `"high"`: as accurate as float32.

The torch formula on CUDA follows `torch.set_float32_matmul_precision` instead.
"""

from __future__ import annotations

from typing import Literal

Precision = Literal["fast", "high"]
