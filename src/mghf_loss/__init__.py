"""MGHF: multi-granular high-frequency perceptual losses for super-resolution.

    criterion = MGHFLoss()
    loss = F.l1_loss(sr, gt) + 0.05 * criterion(sr, gt)  # (B, 3, H, W) in [0, 1] -> 0-d tensor

Reference: arXiv 2411.13548. Importing this package costs little over importing torch; FrEIA, timm and
huggingface_hub are imported by what needs them.
"""

from typing import TYPE_CHECKING

from . import terms
from .checkpoints import CheckpointError
from .dino import DinoJSDLoss
from .mghf import MGHFLoss, MGHFnLoss

if TYPE_CHECKING:
    from .inn import HighFrequencyINN, INNConfig

__version__ = "0.1.0"
__all__ = [
    "CheckpointError",
    "DinoJSDLoss",
    "HighFrequencyINN",
    "INNConfig",
    "MGHFLoss",
    "MGHFnLoss",
    "__version__",
    "terms",
]


def __dir__() -> list[str]:
    return __all__


def __getattr__(name: str) -> object:
    if name in {"HighFrequencyINN", "INNConfig"}:  # FrEIA and huggingface_hub are heavy: only when asked for
        from . import inn

        return getattr(inn, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
