"""Features of a pair of images by the frozen invertible network: what the losses compare."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from . import images
from .frozen import Frozen

if TYPE_CHECKING:
    from .inn import HighFrequencyINN

Memory = Literal["normal", "low"]


class PairFeatures(Frozen["HighFrequencyINN"]):
    """sr, gt (B, 3, H, W) -> their features per level, fine to coarse, in float32 at least; GT's without gradient.

    Args:
        inn: a checkpoint's name or path, or a network, which is taken over: frozen and set to eval mode.
        input_range: values of black and white.
        memory: `"normal"` keeps what the network's backward pass needs, `"low"` computes it again there.
        cache_gt: keep GT's features as long as the very same tensor comes, unchanged.
    """

    def __init__(
        self,
        inn: str | Path | HighFrequencyINN,
        input_range: tuple[float, float] = (0.0, 1.0),
        memory: Memory = "normal",
        cache_gt: bool = False,
    ) -> None:
        from .inn import HighFrequencyINN  # FrEIA brings scipy: not before a loss is built

        if not isinstance(inn, (str, Path, HighFrequencyINN)):
            raise TypeError(f"inn must be a checkpoint's name or path, or a HighFrequencyINN, got {inn!r}")
        if memory not in get_args(Memory):
            raise ValueError(f"memory must be one of {get_args(Memory)}, got {memory!r}")
        super().__init__(inn if isinstance(inn, HighFrequencyINN) else HighFrequencyINN.from_pretrained(inn))
        self.input_range = images.check_range(input_range)
        self.memory: Memory = memory
        self.cache_gt = cache_gt
        self._known: WeakTensorKeyDictionary | None = None  # the last GT alone, for as long as it lives

    def forward(self, sr: Tensor, gt: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Return the features of `sr` and of `gt`; raise where they are no pair of images."""
        images.check_pair(sr, gt, least_size=self.network.stride)
        gt_features = self._of_gt(gt)
        return self._of(sr, recompute=self.memory == "low" and torch.is_grad_enabled()), gt_features

    def _of(self, image: Tensor, recompute: bool = False) -> list[Tensor]:
        dtype = next(self.network.parameters()).dtype
        image = images.rescale(image.to(dtype), self.input_range, (-1.0, 1.0))
        levels = self.network.features(image, recompute=recompute)
        return [level.to(torch.promote_types(dtype, torch.float32)) for level in levels]

    def _of_gt(self, gt: Tensor) -> list[Tensor]:
        # A tensor of inference mode does not count its changes; a compiler does not see which tensor comes.
        if not self.cache_gt or torch.compiler.is_compiling() or gt.is_inference():
            with torch.no_grad():
                return self._of(gt)
        parameter = next(self.network.parameters())
        state = gt._version, parameter.dtype, parameter.device
        known = None if self._known is None else self._known.get(gt)
        if known is None or known[0] != state:
            with torch.no_grad():
                known = state, self._of(gt)
            self._known = WeakTensorKeyDictionary({gt: known})
        return known[1]

    def __getstate__(self) -> dict[str, Any]:
        """Without the cache: a copy has seen no GT."""
        return {**self.__dict__, "_known": None}
