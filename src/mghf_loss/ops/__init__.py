"""Operators with a forward and a backward of their own, registered with `torch.library`."""

from .patch_nce import patch_nce

__all__ = ["active_path", "patch_nce"]


def active_path() -> str:
    """Name the implementation that the operators run on."""
    return "torch formula (CPU and CUDA; dense PatchNCE in blocks of rows)"
