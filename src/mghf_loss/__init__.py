"""MGHF: multi-granular high-frequency perceptual losses for super-resolution.

    criterion = MGHFLoss()
    loss = F.l1_loss(sr, gt) + criterion(sr, gt)  # (B, 3, H, W) in [0, 1] -> 0-d tensor

Reference: arXiv 2411.13548. The public names are imported when they are first asked for: FrEIA, timm and
huggingface_hub are heavy, and the command line has to be there before torch is.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from . import functional, metric, terms
    from .checkpoints import CheckpointError
    from .dino import DinoJSDLoss
    from .inn import HighFrequencyINN, INNConfig
    from .mghf import MGHFLoss, MGHFnLoss

__version__ = "0.1.0"
__all__ = [
    "CheckpointError",
    "DinoJSDLoss",
    "HighFrequencyINN",
    "INNConfig",
    "MGHFLoss",
    "MGHFnLoss",
    "__version__",
    "functional",
    "metric",
    "terms",
]
_MODULES = {"functional", "metric", "terms"}
_HOMES = {
    "CheckpointError": "checkpoints",
    "DinoJSDLoss": "dino",
    "HighFrequencyINN": "inn",
    "INNConfig": "inn",
    "MGHFLoss": "mghf",
    "MGHFnLoss": "mghf",
}


def __dir__() -> list[str]:
    return __all__


def __getattr__(name: str) -> object:
    if name in _MODULES:
        return import_module(f"{__name__}.{name}")
    if name in _HOMES:
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
