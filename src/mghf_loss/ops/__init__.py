"""Operators with a forward and a backward of their own, registered with `torch.library`."""

from .cuda import active_path
from .nce import patch_nce
from .statistics import SecondOrderStatistics, second_order_statistics

__all__ = ["SecondOrderStatistics", "active_path", "patch_nce", "second_order_statistics"]
