"""The losses on features of the invertible network: MGHF-n and MGHF-c."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from . import _checks, terms
from ._gt_cache import GTCache
from .criterion import Criterion, Memory, rescale
from .dino import DEFAULT_MODEL, DinoJSDLoss
from .frozen import Frozen
from .ops import second_order_statistics
from .ops.statistics import Precision

if TYPE_CHECKING:
    from .inn import HighFrequencyINN

Preset = Literal["paper"]
COEFFICIENTS: dict[Preset, dict[str, float]] = {
    "paper": {"content": 5.0, "style": 600.0, "correlation": 1.0, "patch_nce": 0.008, "dino_jsd": 0.0},
}
PRUNE: dict[Preset, float] = {"paper": 0.25}


class MGHFnLoss(Criterion):
    """Compare the high-frequency details of SR and GT by one squared error (MGHF-n).

    sr, gt (B, 3, H, W), H and W at least 8 with the bundled network -> 0-d tensor in [0, inf), 0 iff all detail
    features are equal. The low-pass band below the coarsest level is not compared: keep a pixel loss beside it.

    >>> sr, gt = torch.rand(2, 1, 3, 64, 64)
    >>> criterion = MGHFnLoss()
    >>> criterion(sr, gt) > criterion(gt, gt)
    tensor(True)

    Args:
        inn: `"bundled"`, `"org/name"` or `"org/name@revision"` on the Hub, a folder, a .safetensors file, or a
            `HighFrequencyINN`, which is taken over: frozen and set to eval mode.
        input_range: values of black and white; values outside are taken as they are, never clamped.
        reduction: `"mean"`, `"sum"` or `"none"` (per image).
        memory: `"low"` computes SR's features again in the backward pass instead of keeping what is inside each
            coupling: the same gradient with about a fifth of the memory from forward to backward pass, in about
            1.5 times the time.
        cache_gt: keep the features of the last GT between calls, for a step that compares several SR images with one
            GT tensor. See `mghf_loss._gt_cache.GTCache` for when they are used and when not.

    Raises:
        ValueError, TypeError: from the constructor or `forward`, naming what came and what was expected.
        CheckpointError: the network cannot be had or is damaged.

    The loss is the mean over levels of mean (F_sr - F_gt)^2. The features F of a frozen invertible network are
    whitened: an error of 1 is one standard deviation of what the coarse image leaves open, so texture masks errors and
    flat areas do not.

    Reference: arXiv 2411.13548 (MGHF), naive variant. The paper sums over modules; the mean over levels is our
    choice.
    """

    def __init__(
        self,
        inn: str | Path | HighFrequencyINN = "bundled",
        *,
        input_range: tuple[float, float] = (0.0, 1.0),
        reduction: terms.Reduction = "mean",
        memory: Memory = "normal",
        cache_gt: bool = False,
    ) -> None:
        super().__init__({"content": 1.0}, input_range, reduction)
        self.memory: Memory = _checks.one_of("memory", memory, Memory)
        self.gt_features: GTCache[list[Tensor]] = GTCache(cache_gt)
        self.inn = _load(inn)

    def _terms(self, sr: Tensor, gt: Tensor, generator: torch.Generator | None) -> dict[str, Tensor]:
        inn = self.inn
        settings = *inn.identity(), self.input_range
        gt_features = self.gt_features.get(gt, lambda gt: _features(inn, gt, self.input_range), *settings)
        sr_features = _features(inn, sr, self.input_range, self.memory)
        per_level = [terms.content(s, g, reduction="none") for s, g in zip(sr_features, gt_features, strict=True)]
        return {"content": torch.stack(per_level).mean(0)}


class MGHFLoss(Criterion):
    """Compare the high-frequency details, textures and structure of SR and GT by a weighted sum of terms (MGHF-c).

    sr, gt (B, 3, H, W), H and W at least 8 with the bundled network -> 0-d tensor in [0, inf). The low-pass band below
    the coarsest level is not compared: keep a pixel loss beside it.

    >>> sr, gt = torch.rand(2, 1, 3, 64, 64)
    >>> criterion = MGHFLoss(coefficients={"style": 300})
    >>> loss, terms = criterion(sr, gt, return_terms=True)
    >>> list(terms)
    ['content', 'style', 'correlation', 'patch_nce']

    Args:
        preset: `"paper"`, the composition of arXiv 2411.13548; a set of coefficients and of `prune`.
        coefficients: factor of each term, updating the preset's; a term with 0 is neither computed nor its
            network loaded. The preset's balance the gradients at the start of training (see the README).
        inn: `"bundled"`, `"org/name"` or `"org/name@revision"` on the Hub, a folder, a .safetensors file, or a
            `HighFrequencyINN`, which is taken over: frozen and set to eval mode.
        dino: the DINO term's model; see `DinoJSDLoss`.
        prune: fraction of channels, those of least entropy, that are dropped, in [0, 1); None for the preset's.
        patches: random locations of PatchNCE per level; None for all of them.
        modulation: of PatchNCE's negatives: `"hard"`, `"easy"` or `"plain"`.
        temperature: of PatchNCE's similarities.
        precision: of the terms' matrix products in the CUDA kernels: `"fast"` (tf32 and fp16 operands, float32 sums) or
            `"high"` (as accurate as float32). It does not concern the networks: they hold float32, and on CUDA their
            convolutions multiply in tf32 unless `torch.backends.cudnn.allow_tf32` is False.
        input_range: values of black and white; values outside are taken as they are, never clamped.
        reduction: `"mean"`, `"sum"` or `"none"` (per image).
        memory: `"low"` computes SR's features again in the backward pass instead of keeping what is inside each
            coupling: the same gradient with about a fifth of the memory from forward to backward pass, in about
            1.5 times the time. The DINO term recomputes its blocks.
        cache_gt: keep the features and channel weights of the last GT between calls, for a step that compares several
            SR images with one GT tensor. See `mghf_loss._gt_cache.GTCache` for when they are used and when not.

    Raises:
        ValueError, TypeError: from the constructor or `forward`, naming what came and what was expected.
        CheckpointError: a network that the terms need cannot be had or is damaged.

    The terms, each a mean over the network's levels, are `content` (MSE), `style` (Gram matrices),
    `correlation` (1 - Pearson's r) and `patch_nce` (modulated PatchNCE) of `mghf_loss.terms`, on features
    weighted by the entropy of the GT's channels; `dino_jsd` is `DinoJSDLoss`.

    Reference: arXiv 2411.13548 (MGHF), comprehensive variant; terms cite their own sources.
    """

    def __init__(
        self,
        preset: Preset = "paper",
        *,
        coefficients: Mapping[str, float] | None = None,
        inn: str | Path | HighFrequencyINN = "bundled",
        dino: str | nn.Module = DEFAULT_MODEL,
        prune: float | None = None,
        patches: int | None = 256,
        modulation: terms.Modulation = "hard",
        temperature: float = 0.07,
        precision: Precision = "fast",
        input_range: tuple[float, float] = (0.0, 1.0),
        reduction: terms.Reduction = "mean",
        memory: Memory = "normal",
        cache_gt: bool = False,
    ) -> None:
        if isinstance(preset, Mapping):
            raise TypeError(f"preset must be a name, got a mapping; write MGHFLoss(coefficients={preset!r})")
        _checks.one_of("preset", preset, Preset)
        super().__init__(COEFFICIENTS[preset], input_range, reduction)
        self._change_coefficients({} if coefficients is None else coefficients)
        self.prune = PRUNE[preset] if prune is None else _checks.number("prune", prune, below=1)
        self.patches = None if patches is None else _checks.integer("patches", patches, least=2)
        self.modulation: terms.Modulation = _checks.one_of("modulation", modulation, terms.Modulation)
        self.temperature = _checks.number("temperature", temperature, above=True)
        self.precision: Precision = _checks.one_of("precision", precision, Precision)
        self.memory: Memory = _checks.one_of("memory", memory, Memory)
        self.gt_levels: GTCache[list[tuple[Tensor, Tensor]]] = GTCache(cache_gt)
        active = {name for name, factor in self.coefficients.items() if factor}
        self.inn = self.dino = None
        if active - {"dino_jsd"}:
            self.inn = _load(inn)
        if "dino_jsd" in active:
            self.dino = DinoJSDLoss(dino, input_range=input_range, memory=memory, cache_gt=cache_gt)

    def _is_available(self, term: str) -> bool:
        return (self.dino if term == "dino_jsd" else self.inn) is not None

    def _terms(self, sr: Tensor, gt: Tensor, generator: torch.Generator | None) -> dict[str, Tensor]:
        wanted = {name for name, factor in self._coefficients.items() if factor}
        values: dict[str, Tensor] = {}
        if self.inn is not None and wanted - {"dino_jsd"}:
            inn = self.inn
            settings = *inn.identity(), self.input_range, self.prune
            gt_levels = self.gt_levels.get(gt, lambda gt: self._gt_levels(inn, gt), *settings)
            sr_levels = _features(inn, sr, self.input_range, self.memory)
            seed = _seed(sr, gt, self.input_range, generator) if "patch_nce" in wanted else None
            levels = zip(sr_levels, gt_levels, strict=True)
            per_level = [self._level_terms(sr, gt, weights, wanted, seed) for sr, (gt, weights) in levels]
            values = {name: torch.stack([level[name] for level in per_level]).mean(0) for name in per_level[0]}
        if self.dino is not None and "dino_jsd" in wanted:
            values |= self.dino._terms(sr, gt, generator)
        return values

    def _gt_levels(self, inn: Frozen[HighFrequencyINN], gt: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Features (B, C, H, W) and channel weights (B, C) of every level of the GT."""
        features = _features(inn, gt, self.input_range)
        return [(level, terms.entropy_channel_weights(level, self.prune)) for level in features]

    def _level_terms(
        self, sr: Tensor, gt: Tensor, weights: Tensor, wanted: set[str], seed: Tensor | None
    ) -> dict[str, Tensor]:
        """Terms of one level by name, per image (B,); all but PatchNCE share one pass over the features."""
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
        if seed is not None:
            values["patch_nce"] = terms.patch_nce(
                sr,
                gt,
                weights,
                locations=terms.random_locations(seed, sr.shape[2] * sr.shape[3], self.patches),
                modulation=self.modulation,
                temperature=self.temperature,
                reduction="none",
                precision=self.precision,
            )
        return values


def _load(inn: str | Path | HighFrequencyINN) -> Frozen[HighFrequencyINN]:
    from .inn import HighFrequencyINN  # FrEIA brings scipy: not before a loss is built

    if not isinstance(inn, (str, Path, HighFrequencyINN)):
        raise TypeError(f"inn must be a checkpoint's name or path, or a HighFrequencyINN, got {inn!r}")
    return Frozen(inn if isinstance(inn, HighFrequencyINN) else HighFrequencyINN.from_pretrained(inn))


def _features(
    inn: Frozen[HighFrequencyINN], image: Tensor, input_range: tuple[float, float], memory: Memory = "normal"
) -> list[Tensor]:
    """Features of an image per level, in float32 at least."""
    image = rescale(inn.like(image), input_range, (-1.0, 1.0))
    return inn.network.features(image, recompute=memory == "low")


def _seed(sr: Tensor, gt: Tensor, input_range: tuple[float, float], generator: torch.Generator | None) -> Tensor:
    """One number for each pair, (B,) int64, that decides its random draws.

    It is made of the images in steps of 1/255 and the generator's seed. So nothing random is kept anywhere: a loss
    has one value for one pair, recomputation repeats it, and the program's own random numbers are left alone.
    """
    seed = 0 if generator is None else generator.initial_seed() % 2**62
    sums = [rescale(image.detach(), input_range, (0.0, 255.0)).round().long().flatten(1).sum(1) for image in (sr, gt)]
    return seed + sums[0] + 1_000_003 * sums[1]
