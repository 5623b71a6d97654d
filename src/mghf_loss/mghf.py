"""The losses on features of the invertible network: MGHF-n and MGHF-c."""

from __future__ import annotations

import math
from collections.abc import Mapping
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from . import images, terms
from .channel_weights import entropy_channel_weights
from .criterion import Criterion
from .dino import DEFAULT_MODEL, DinoJSDLoss
from .frozen import Frozen
from .gt_cache import GTCache
from .memory import Memory, check_memory
from .ops import second_order_statistics
from .ops.precision import Precision, check_precision

if TYPE_CHECKING:
    from .inn import HighFrequencyINN

DEFAULT_COEFFICIENTS: dict[str, float] = {
    "content": 5.0,
    "style": 600.0,
    "correlation": 1.0,
    "patch_nce": 0.008,
    "dino_jsd": 0.0,
}


class MGHFnLoss(Criterion):
    """MGHF-n: mean over levels of mean (F_sr - F_gt)^2, sr, gt (B, 3, H, W) -> scalar in [0, inf).

    F are the multi-granular detail features of a frozen invertible network. They are whitened: an error of 1
    is one standard deviation of what the coarse image leaves open, so texture masks errors and flat areas do
    not. The value is 0 iff the detail features are equal; the low-pass band below the coarsest level is not
    compared, so keep a pixel loss beside it.

    Args:
        inn: `"bundled"`, `"org/name"` or `"org/name@revision"` on the Hub, a folder, a .safetensors file, or a
            `HighFrequencyINN`, which is taken over: frozen and set to eval mode.
        input_range: values of black and white; values outside are taken as they are, never clamped.
        reduction: `"mean"`, `"sum"` or `"none"` (per image).
        memory: `"low"` computes SR's features again in the backward pass instead of keeping what is inside each
            coupling: the same gradient with 17 % of the bytes that wait for the backward pass, 73 % of the peak,
            in 1.6 times the time (1 x 3 x 128^2, one CPU thread; `benchmarks/losses.py`).
        cache_gt: keep the features of the last GT between calls, for a step that compares several SR images with one
            GT tensor. See `mghf_loss.gt_cache.GTCache` for when they are used and when not.

    Raises:
        ValueError, TypeError: from the constructor or `forward`, naming what came and what was expected.
        CheckpointError: the network cannot be had or is damaged.

    Reference: arXiv 2411.13548 (MGHF), naive variant. The paper sums over modules; the mean over levels is our
    choice.
    """

    def __init__(
        self,
        inn: str | Path | HighFrequencyINN = "bundled",
        input_range: tuple[float, float] = (0.0, 1.0),
        reduction: terms.Reduction = "mean",
        memory: Memory = "normal",
        cache_gt: bool = False,
    ) -> None:
        super().__init__()
        self.coefficients = {"content": 1.0}
        self.input_range = images.check_range(input_range)
        self.reduction = terms.check_reduction(reduction)
        self.memory: Memory = check_memory(memory)
        self.gt_features: GTCache[list[Tensor]] = GTCache(cache_gt)
        self.inn = _frozen_inn(inn)

    def term_values(self, sr: Tensor, gt: Tensor, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """`content` per image (B,), differentiable in `sr`; nothing is random here."""
        network = self.inn.network
        images.check_pair(sr, gt, least_size=network.stride)
        gt_features = self.gt_features.get(
            gt, lambda gt: _features(network, gt, self.input_range), *_settings(network), self.input_range
        )
        sr_features = _features(network, sr, self.input_range, self.memory)
        per_level = [terms.content(s, g, reduction="none") for s, g in zip(sr_features, gt_features, strict=True)]
        return {"content": _mean(per_level)}


class MGHFLoss(Criterion):
    """MGHF-c: sum of coefficient * term on weighted features, sr, gt (B, 3, H, W) -> scalar in [0, inf).

    The terms, each a mean over the network's levels, are `content` (MSE), `style` (Gram matrices),
    `correlation` (1 - Pearson's r) and `patch_nce` (modulated PatchNCE) of `mghf_loss.terms`, on features
    weighted by the entropy of the GT's channels; `dino_jsd` is `DinoJSDLoss`. The low-pass band below the
    coarsest level is not compared, so keep a pixel loss beside it.

    Args:
        coefficients: factor of each term, updating the defaults; a term with 0 is neither computed nor its
            network loaded. The defaults balance the gradients at the start of training (see the README).
        inn: `"bundled"`, `"org/name"` or `"org/name@revision"` on the Hub, a folder, a .safetensors file, or a
            `HighFrequencyINN`, which is taken over: frozen and set to eval mode.
        input_range: values of black and white; values outside are taken as they are, never clamped.
        patches: places of PatchNCE, drawn at random anew in each call; None for all of them.
        modulation: of PatchNCE's negatives: `"hard"`, `"easy"` or `"plain"`.
        temperature: of PatchNCE's similarities.
        prune: fraction of channels, those of least entropy, that are dropped, in [0, 1).
        reduction: `"mean"`, `"sum"` or `"none"` (per image).
        dino: the DINO term's model; see `DinoJSDLoss`.
        precision: of the terms' matrix products in the CUDA kernels: `"fast"` (tf32 and fp16 operands, float32 sums) or
            `"high"` (as accurate as float32). The networks, and everything on a CPU, compute in float32 either way.
        memory: `"low"` computes SR's features again in the backward pass instead of keeping what is inside each
            coupling: the same gradient with 22 % of the bytes that wait for the backward pass, 68 % of the peak,
            in 1.4 times the time (1 x 3 x 128^2, one CPU thread; `benchmarks/losses.py`).
            The DINO term recomputes its blocks.
        cache_gt: keep the features and channel weights of the last GT between calls, for a step that compares several
            SR images with one GT tensor. See `mghf_loss.gt_cache.GTCache` for when they are used and when not.

    Raises:
        ValueError, TypeError: from the constructor or `forward`, naming what came and what was expected.
        CheckpointError: a network that the terms need cannot be had or is damaged.

    Reference: arXiv 2411.13548 (MGHF), comprehensive variant; terms cite their own sources.
    """

    def __init__(
        self,
        coefficients: Mapping[str, float] | None = None,
        inn: str | Path | HighFrequencyINN = "bundled",
        input_range: tuple[float, float] = (0.0, 1.0),
        patches: int | None = 256,
        modulation: terms.Modulation = "hard",
        temperature: float = 0.07,
        prune: float = 0.25,
        reduction: terms.Reduction = "mean",
        dino: str | nn.Module = DEFAULT_MODEL,
        precision: Precision = "fast",
        memory: Memory = "normal",
        cache_gt: bool = False,
    ) -> None:
        super().__init__()
        self.coefficients = _check_coefficients(coefficients)
        self.input_range = images.check_range(input_range)
        self.patches = terms.check_patches(patches)
        self.modulation: terms.Modulation = terms.check_modulation(modulation)
        self.temperature = terms.check_positive("temperature", temperature)
        if not isinstance(prune, Real) or not 0 <= prune < 1:
            raise ValueError(f"prune must be a fraction in [0, 1), got {prune!r}")
        self.prune = prune
        self.reduction = terms.check_reduction(reduction)
        self.precision: Precision = check_precision(precision)
        self.memory: Memory = check_memory(memory)
        self.gt_levels: GTCache[list[tuple[Tensor, Tensor]]] = GTCache(cache_gt)
        self.inn = _frozen_inn(inn) if set(self.coefficients) - {"dino_jsd"} else None
        self.dino = None
        if "dino_jsd" in self.coefficients:
            self.dino = DinoJSDLoss(dino, input_range=input_range, memory=memory, cache_gt=cache_gt)

    def term_values(self, sr: Tensor, gt: Tensor, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """Unweighted terms that have a coefficient, by name and per image (B,), differentiable in `sr`."""
        values: dict[str, Tensor] = {}
        if self.inn is not None:
            network = self.inn.network
            images.check_pair(sr, gt, least_size=network.stride)
            gt_levels = self.gt_levels.get(
                gt, lambda gt: self._gt_levels(network, gt), *_settings(network), self.input_range, self.prune
            )
            sr_features = _features(network, sr, self.input_range, self.memory)
            levels = zip(sr_features, gt_levels, strict=True)
            per_level = [self._level_terms(sr, gt, weights, generator) for sr, (gt, weights) in levels]
            values = {name: _mean([level[name] for level in per_level]) for name in per_level[0]}
        if self.dino is not None:
            values |= self.dino.term_values(sr, gt)
        return values

    def _gt_levels(self, network: HighFrequencyINN, gt: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Features (B, C, H, W) and channel weights (B, C) of every level of the GT."""
        features = _features(network, gt, self.input_range)
        return [(level, entropy_channel_weights(level, self.prune)) for level in features]

    def _level_terms(
        self, sr: Tensor, gt: Tensor, weights: Tensor, generator: torch.Generator | None
    ) -> dict[str, Tensor]:
        """Terms of one level by name, per image (B,); all but PatchNCE share one pass over the features."""
        wanted = self.coefficients.keys()
        values: dict[str, Tensor] = {}
        if wanted & {"content", "style", "correlation"}:
            statistics = second_order_statistics(sr, gt, weights, gram="style" in wanted, precision=self.precision)
            for name, term in (
                ("content", terms.content),
                ("style", terms.style),
                ("correlation", terms.correlation),
            ):
                if name in wanted:
                    values[name] = term(sr, gt, weights, reduction="none", statistics=statistics)
        if "patch_nce" in wanted:
            values["patch_nce"] = terms.patch_nce(
                sr,
                gt,
                weights,
                patches=self.patches,
                modulation=self.modulation,
                temperature=self.temperature,
                generator=generator,
                reduction="none",
                precision=self.precision,
            )
        return values

    def extra_repr(self) -> str:
        """Show the coefficients."""
        return ", ".join(f"{name}={value:g}" for name, value in self.coefficients.items())


def _check_coefficients(coefficients: Mapping[str, float] | None) -> dict[str, float]:
    """Merge `coefficients` into the defaults and return those that are not 0, in the terms' order."""
    if coefficients is not None and not isinstance(coefficients, Mapping):
        raise TypeError(f"coefficients must be a mapping from term to factor, got {coefficients!r}")
    given = dict(coefficients or {})
    unknown = sorted(map(str, given.keys() - DEFAULT_COEFFICIENTS.keys()))
    if unknown:
        raise ValueError(
            f"unknown term {', '.join(unknown)} in coefficients; known are {', '.join(DEFAULT_COEFFICIENTS)}"
        )
    merged = {**DEFAULT_COEFFICIENTS, **given}
    for name, value in merged.items():
        if not isinstance(value, Real) or isinstance(value, bool) or not 0 <= value < math.inf:
            raise ValueError(f"coefficients[{name!r}] must be a finite number of at least 0, got {value!r}")
    if not any(merged.values()):
        raise ValueError("all coefficients are 0: there is nothing to compute")
    return {name: float(value) for name, value in merged.items() if value}


def _frozen_inn(inn: str | Path | HighFrequencyINN) -> Frozen[HighFrequencyINN]:
    from .inn import HighFrequencyINN  # FrEIA brings scipy: not before a loss is built

    if not isinstance(inn, (str, Path, HighFrequencyINN)):
        raise TypeError(f"inn must be a checkpoint's name or path, or a HighFrequencyINN, got {inn!r}")
    return Frozen(inn if isinstance(inn, HighFrequencyINN) else HighFrequencyINN.from_pretrained(inn))


def _features(
    network: HighFrequencyINN, image: Tensor, input_range: tuple[float, float], memory: Memory = "normal"
) -> list[Tensor]:
    """Features of an image per level, in float32 at least."""
    dtype = next(network.parameters()).dtype
    image = images.rescale(image.to(dtype), input_range, (-1.0, 1.0))
    levels = network.features(image, recompute=memory == "low")
    return [level.to(torch.promote_types(dtype, torch.float32)) for level in levels]


def _settings(network: nn.Module) -> tuple[torch.dtype, torch.device]:
    """What `.to()` changes."""
    parameter = next(network.parameters())
    return parameter.dtype, parameter.device


def _mean(per_level: list[Tensor]) -> Tensor:
    return torch.stack(per_level).mean(0)
