"""The losses on features of the invertible network: MGHF-n and MGHF-c."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import Tensor, nn

from . import _checks, _random, terms
from ._gt_cache import GTCache
from .criterion import Criterion, Memory, merged_coefficients, rescale
from .dino import DEFAULT_MODEL, DinoJSDLoss
from .frozen import Frozen
from .ops.local import stacked_local_errors
from .ops.statistics import Precision, stacked_statistics

if TYPE_CHECKING:
    from .inn import HighFrequencyINN

Preset = Literal["balanced", "sharp", "gan", "denoise", "paper"]
Conditioning = Literal["gt", "own", "mixed"]
Shift = Literal["random", "average", "none"]
Weighting = Literal["uniform", "entropy"]


@dataclass(frozen=True)
class Settings:
    """What a preset stands for: options of `MGHFLoss` by name."""

    coefficients: Mapping[str, float]
    conditioning: Conditioning = "own"
    shift: Shift = "random"
    weighting: Weighting = "uniform"
    prune: float = 0.0
    style_delta: float = 0.005


# What compares places, by GT's scales with mixed conditioning, and what compares statistics, by SR's own.
BY_PLACE, BY_STATISTICS = {"content", "texture", "grid"}, {"style", "correlation", "patch_nce"}
OFF = dict.fromkeys(("content", "style", "correlation", "texture", "grid", "patch_nce", "dino_jsd"), 0.0)
PRESETS: dict[Preset, Settings] = {
    "balanced": Settings(
        OFF | {"content": 0.1, "style": 300.0, "correlation": 0.5, "texture": 0.15, "grid": 0.1}, conditioning="gt"
    ),
    "sharp": Settings(
        OFF | {"content": 0.06, "style": 200.0, "correlation": 0.035, "texture": 0.06, "grid": 0.1},
        conditioning="mixed",
        weighting="entropy",
    ),
    "gan": Settings(
        OFF | {"content": 0.05, "style": 130.0, "correlation": 0.03, "texture": 0.05, "grid": 0.1},
        conditioning="mixed",
        weighting="entropy",
    ),
    "denoise": Settings(OFF | {"content": 0.05}),
    "paper": Settings(
        OFF | {"content": 5.0, "style": 600.0, "correlation": 1.0, "patch_nce": 0.008},
        shift="none",
        weighting="entropy",
        prune=0.25,
        style_delta=math.inf,
    ),
}


class GTLevel(NamedTuple):
    """What one level of the comparison takes from GT.

    Attributes:
        features: (B, C, H, W).
        channel_weights: (B, C), or None where all are 1.
    """

    features: Tensor
    channel_weights: Tensor | None


class LevelPair(NamedTuple):
    """SR's features (B, C, H, W) of one level beside GT's side; two sets of them with mixed conditioning.

    Attributes:
        by_place: for content, texture and grid, which compare places.
        by_statistics: for style, correlation and PatchNCE, which compare statistics.
        gt: what GT contributes.
    """

    by_place: Tensor
    by_statistics: Tensor
    gt: GTLevel


class GTPyramid(NamedTuple):
    """What one shift of the comparison takes from GT: its levels, fine to coarse, and the scales of its couplings."""

    levels: list[GTLevel]
    scales: list[list[Tensor]] | None


class FeatureCriterion(Criterion):
    """What MGHF-n and MGHF-c share: features of shifted images, terms of every level, their mean."""

    weighting: Weighting = "uniform"
    prune: float = 0.0

    def __init__(
        self,
        coefficients: Mapping[str, float],
        inn: str | Path | HighFrequencyINN,
        conditioning: Conditioning,
        shift: Shift,
        input_range: tuple[float, float],
        reduction: terms.Reduction,
        memory: Memory,
        cache_gt: bool,
        needs_inn: bool = True,
    ) -> None:
        super().__init__(coefficients, input_range, reduction)
        self.conditioning: Conditioning = _checks.one_of("conditioning", conditioning, Conditioning)
        self.shift: Shift = _checks.one_of("shift", shift, Shift)
        self.memory: Memory = _checks.one_of("memory", memory, Memory)
        self.gt_pyramids: GTCache[list[GTPyramid]] = GTCache(cache_gt)
        self.inn = _load(inn) if needs_inn else None

    @abstractmethod
    def _stack_terms(self, levels: list[LevelPair], seed: Tensor) -> dict[str, Tensor]:
        """Terms by name, (L, B), of levels with equal numbers of channels: all of a pyramid, one of a packet."""

    def _terms(self, sr: Tensor, gt: Tensor, generator: torch.Generator | None) -> dict[str, Tensor]:
        inn = self.inn
        if inn is None:
            return {}
        seed = _random.seed(rescale(inn.like(gt), self.input_range, (0.0, 255.0)), generator)
        shifts = self._shifts(seed, gt)

        def pyramids(gt: Tensor) -> list[GTPyramid]:
            gt = self._normalised(gt)
            return [self._gt_pyramid(_shifted(gt, shift)) for shift in shifts]

        settings = *inn.identity(), self.input_range, self.conditioning, self.shift, self.weighting, self.prune
        of_generator = None if generator is None else generator.initial_seed()
        gt_pyramids = self.gt_pyramids.get(gt, pyramids, *settings, of_generator)
        by_place, by_statistics = self._sides()
        difference = self._difference(sr, gt) if by_place else None
        own = self._normalised(sr) if by_statistics else None
        found = []
        for shift, gt_pyramid in zip(shifts, gt_pyramids, strict=True):
            levels = self._levels(own, difference, shift, gt_pyramid)
            stacks = [levels] if inn.network.config.variant == "pyramid" else [[level] for level in levels]
            found += [self._stack_terms(stack, seed) for stack in stacks]
        stacked = [torch.stack(list(stack.values())) for stack in found]
        mean = (torch.cat(stacked, 1) if len(stacked) > 1 else stacked[0]).mean(1)
        return dict(zip(found[0], mean, strict=True))

    def _sides(self) -> tuple[bool, bool]:
        """Whether SR's features are needed by the difference from GT, and by SR itself."""
        return self.conditioning == "gt", self.conditioning == "own"

    def _normalised(self, image: Tensor) -> Tensor:
        """An image in the network's dtype, float32 at least, and range."""
        assert self.inn is not None
        return rescale(self.inn.like(image), self.input_range, (-1.0, 1.0))

    def _offsets(self, seed: Tensor, stride: int) -> list[Tensor | None]:
        """Shifts (B, 2) of the images, in pixels, over which terms are averaged."""
        if self.shift == "none":
            return [None]
        if self.shift == "random":
            return [_random.integers(seed, 2) % stride]
        # A (0, m, 2)-net, Hammersley's: at every level, rows and columns meet every phase equally often.
        bits = stride.bit_length() - 1
        net = [(k, int(f"{k:0{bits}b}"[::-1], 2)) for k in range(stride)]
        return [seed.new_tensor(point).expand(len(seed), 2) for point in net]

    def _shifts(self, seed: Tensor, gt: Tensor) -> list[_random.Shift | None]:
        assert self.inn is not None
        offsets = self._offsets(seed, self.inn.network.stride)
        return [None if offset is None else _random.shift_of(offset, *gt.shape[2:]) for offset in offsets]

    def _gt_pyramid(self, gt: Tensor) -> GTPyramid:
        assert self.inn is not None
        if self.conditioning == "own":
            features, scales = self.inn.network.features(gt), None
        else:
            features, scales = self.inn.network.conditioning(gt)
        weights = self._channel_weights(features) if self.weighting == "entropy" else [None] * len(features)
        return GTPyramid([GTLevel(*level) for level in zip(features, weights, strict=True)], scales)

    def _channel_weights(self, features: list[Tensor]) -> list[Tensor]:
        """Weights (B, C) of every level; those of a pyramid, whose levels have equal numbers of channels, at once."""
        entropies = [terms.channel_entropy(level) for level in features]
        if len({entropy.shape[1] for entropy in entropies}) == 1:
            return list(terms.entropy_weights_of(torch.stack(entropies), self.prune).unbind(0))
        return [terms.entropy_weights_of(entropy, self.prune) for entropy in entropies]

    def _difference(self, sr: Tensor, gt: Tensor) -> Tensor:
        """sr - gt in the units of [-1, 1]."""
        assert self.inn is not None
        low, high = self.input_range
        return rescale(self.inn.like(sr) - self.inn.like(gt.detach()), (0.0, high - low), (0.0, 2.0))

    def _levels(
        self, sr: Tensor | None, difference: Tensor | None, shift: _random.Shift | None, gt: GTPyramid
    ) -> list[LevelPair]:
        """Pair the features of SR, by SR itself and by the difference from GT, with those of GT."""
        assert self.inn is not None
        network = self.inn.network
        by_place: list[Tensor] = []
        by_statistics: list[Tensor] = []
        if difference is not None and gt.scales is not None:
            differences = network.difference(_shifted(difference, shift), gt.scales)
            by_place = [level.features + d for level, d in zip(gt.levels, differences, strict=True)]
        if sr is not None:
            by_statistics = network.features(_shifted(sr, shift), recompute=self.memory == "low")
        sides = by_place or by_statistics, by_statistics or by_place
        return [LevelPair(*level) for level in zip(*sides, gt.levels, strict=True)]


class MGHFnLoss(FeatureCriterion):
    """Compare the high-frequency details of SR and GT by one squared error (MGHF-n).

    sr, gt (B, 3, H, W), H and W at least 8 with the bundled network -> 0-d tensor in [0, inf), 0 iff all
    details are equal. The low-pass band below the coarsest level is not compared: keep a pixel loss beside it.

    >>> sr, gt = torch.rand(2, 1, 3, 64, 64)
    >>> criterion = MGHFnLoss()
    >>> criterion(sr, gt) > criterion(gt, gt)
    tensor(True)

    Args:
        inn: `"bundled"`, or `"bundled-0.1"`, which no release changes; `"org/name"` or `"org/name@revision"` on the
            Hub; a folder; a .safetensors file; or a `HighFrequencyINN`, which is taken over: frozen, in eval mode.
        conditioning: what the couplings of SR's features take their shift and scale from: `"gt"`, from GT, which
            makes the loss a convex quadratic form in SR and needs no network on SR's side
            (`HighFrequencyINN.difference`), or `"own"`, from SR, as in the paper.
        shift: of the Haar grid, common to SR and GT: `"random"` follows from GT and the generator's seed,
            `"average"` takes the mean over 2^levels shifts, for a value to report, `"none"` is the paper's.
        input_range: values of black and white; values outside are taken as they are, never clamped.
        reduction: `"mean"`, `"sum"` or `"none"` (per image).
        memory: `"low"` computes SR's features again in the backward pass instead of keeping what is inside each
            coupling: the same gradient with about three tenths of the memory from forward to backward pass, in about
            1.5 times the time. With `conditioning="gt"` there is nothing to keep.
        cache_gt: keep what was computed from the last GT between calls, for a step that compares several SR images
            with one GT tensor. See `mghf_loss._gt_cache.GTCache` for when it is used and when not.

    Raises:
        ValueError, TypeError: from the constructor or `forward`, naming what came and what was expected.
        CheckpointError: the network cannot be loaded or is damaged.

    The loss is the mean over levels of mean (F_sr - F_gt)^2. The features F of a frozen invertible network are
    whitened: an error of 1 is one standard deviation of what the coarse image leaves open, so texture masks errors and
    flat areas do not.

    Reference: arXiv 2411.13548 (MGHF), naive variant. The paper sums over modules; the mean over levels, the shift and
    GT conditioning are our choice.
    """

    def __init__(
        self,
        inn: str | Path | HighFrequencyINN = "bundled",
        *,
        conditioning: Literal["gt", "own"] = "gt",
        shift: Shift = "random",
        input_range: tuple[float, float] = (0.0, 1.0),
        reduction: terms.Reduction = "mean",
        memory: Memory = "normal",
        cache_gt: bool = False,
    ) -> None:
        _checks.one_of("conditioning", conditioning, Literal["gt", "own"])
        super().__init__({"content": 1.0}, inn, conditioning, shift, input_range, reduction, memory, cache_gt)

    def _stack_terms(self, levels: list[LevelPair], seed: Tensor) -> dict[str, Tensor]:
        return {"content": terms.content_of(_stacked_squared_error(levels), None)}


class MGHFLoss(FeatureCriterion):
    """Compare the high-frequency details, textures and structure of SR and GT by a weighted sum of terms (MGHF-c).

    sr, gt (B, 3, H, W), H and W at least 8 with the bundled network -> 0-d tensor in [0, inf), 0 at sr == gt where
    PatchNCE is off. The low-pass band below the coarsest level is not compared: keep a pixel loss beside it.

    >>> sr, gt = torch.rand(2, 1, 3, 64, 64)
    >>> criterion = MGHFLoss(coefficients={"style": 300})
    >>> loss, terms = criterion(sr, gt, return_terms=True)
    >>> list(terms)
    ['content', 'style', 'correlation', 'texture', 'grid']

    Args:
        preset: a set of the options below, chosen by the studies of docs/evidence.md for use beside an L1 loss at
            weight 1: `"balanced"` costs less than 0.05 dB at x4; `"sharp"` gives up 0.1 to 0.2 dB for sharper details;
            `"gan"` stands beside an adversarial loss; `"denoise"` is for inputs with noise, and gains little;
            `"paper"` is the composition of arXiv 2411.13548, for weight 0.05.
        coefficients: factor of each term, updating the preset's; a term with 0 is neither computed nor its
            network loaded.
        inn: `"bundled"`, or `"bundled-0.1"`, which no release changes; `"org/name"` or `"org/name@revision"` on the
            Hub; a folder; a .safetensors file; or a `HighFrequencyINN`, which is taken over: frozen, in eval mode.
        dino: the DINO term's model; see `DinoJSDLoss`.
        conditioning: see `MGHFnLoss`; with `"mixed"` content, texture and grid, which compare places, take GT's, and
            style, correlation and PatchNCE, which compare statistics, SR's own. None for the preset's, as for the next
            four.
        shift: see `MGHFnLoss`.
        weighting: of channels: `"uniform"`, or by the `"entropy"` of GT's.
        prune: fraction of channels, those of least entropy, that are dropped, in [0, 1), with `weighting="entropy"`.
        style_delta: distance of the Gram matrices above which `style` grows with its first power, see `terms.style`;
            `math.inf` for the paper's square everywhere.
        patches: random locations of PatchNCE per level; None for all of them.
        modulation: of PatchNCE's negatives: `"hard"`, `"easy"` or `"plain"`.
        temperature: of PatchNCE's similarities.
        precision: of the terms' matrix products in the CUDA kernels: `"fast"` (tf32 and fp16 operands, float32 sums) or
            `"high"` (as accurate as float32). The invertible network is always as accurate as float32.
        input_range: see `MGHFnLoss`, as for the next three.
        reduction: `"mean"`, `"sum"` or `"none"` (per image).
        memory: `"normal"` or `"low"`. The DINO term recomputes its blocks with `"low"`.
        cache_gt: keep what was computed from the last GT.

    Raises:
        ValueError, TypeError: from the constructor or `forward`, naming what came and what was expected.
        CheckpointError: a network that the terms need cannot be loaded or is damaged.

    The terms, each a mean over the network's levels, are `content` (MSE), `style` (Gram matrices), `correlation`
    (1 - Pearson's r), `texture` (local strength), `grid` (what repeats) and `patch_nce` (modulated PatchNCE) of
    `mghf_loss.terms`; `dino_jsd` is `DinoJSDLoss`.

    Reference: arXiv 2411.13548 (MGHF), comprehensive variant; terms cite their own sources. All presets but "paper",
    and the terms `texture` and `grid`, are ours.
    """

    def __init__(
        self,
        preset: Preset = "balanced",
        *,
        coefficients: Mapping[str, float] | None = None,
        inn: str | Path | HighFrequencyINN = "bundled",
        dino: str | nn.Module = DEFAULT_MODEL,
        conditioning: Conditioning | None = None,
        shift: Shift | None = None,
        weighting: Weighting | None = None,
        prune: float | None = None,
        style_delta: float | None = None,
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
        settings = PRESETS[_checks.one_of("preset", preset, Preset)]
        factors = merged_coefficients(settings.coefficients, {} if coefficients is None else coefficients)
        active = {name for name, factor in factors.items() if factor}
        super().__init__(
            factors,
            inn,
            settings.conditioning if conditioning is None else conditioning,
            settings.shift if shift is None else shift,
            input_range,
            reduction,
            memory,
            cache_gt,
            needs_inn=bool(active - {"dino_jsd"}),
        )
        self.weighting = _checks.one_of("weighting", weighting or settings.weighting, Weighting)
        self.prune = settings.prune if prune is None else _checks.number("prune", prune, below=1)
        if prune and self.weighting == "uniform":
            raise ValueError(f"prune needs weighting='entropy', got prune={prune!r} and weighting='uniform'")
        self.style_delta = settings.style_delta
        if style_delta is not None:
            self.style_delta = _checks.number("style_delta", style_delta, least=terms.LEAST_DELTA, infinite=True)
        self.patches = None if patches is None else _checks.integer("patches", patches, least=2)
        self.modulation: terms.Modulation = _checks.one_of("modulation", modulation, terms.Modulation)
        self.temperature = _checks.number("temperature", temperature, above=True)
        self.precision: Precision = _checks.one_of("precision", precision, Precision)
        self.dino = None
        if "dino_jsd" in active:
            self.dino = DinoJSDLoss(dino, input_range=input_range, memory=memory, cache_gt=cache_gt)

    def _is_available(self, term: str) -> bool:
        return (self.dino if term == "dino_jsd" else self.inn) is not None

    def _terms(self, sr: Tensor, gt: Tensor, generator: torch.Generator | None) -> dict[str, Tensor]:
        wanted = self._wanted()
        values = super()._terms(sr, gt, generator) if wanted - {"dino_jsd"} else {}
        if self.dino is not None and "dino_jsd" in wanted:
            values |= self.dino._terms(sr, gt, generator)
        return values

    def _wanted(self) -> set[str]:
        return {name for name, factor in self._coefficients.items() if factor}

    def _sides(self) -> tuple[bool, bool]:
        if self.conditioning != "mixed":
            return super()._sides()
        wanted = self._wanted()
        return not wanted.isdisjoint(BY_PLACE), not wanted.isdisjoint(BY_STATISTICS)

    def _stack_terms(self, levels: list[LevelPair], seed: Tensor) -> dict[str, Tensor]:
        """Content shares one pass over the features with style and correlation, or with texture and grid."""
        wanted, values, statistics, local = self._wanted(), {}, None, None
        per_level = [level.gt.channel_weights for level in levels if level.gt.channel_weights is not None]
        weights = torch.stack(per_level) if per_level else None
        if wanted & {"style", "correlation"}:
            features = [(level.by_statistics, level.gt.features, level.gt.channel_weights) for level in levels]
            statistics = stacked_statistics(features, gram="style" in wanted, precision=self.precision)
        content_by_place = "content" in wanted and (statistics is None or self.conditioning == "mixed")
        if wanted & {"texture", "grid"}:
            pairs = [(level.by_place, level.gt.features) for level in levels]
            local = stacked_local_errors(pairs, squared_error=content_by_place)
        if "content" in wanted:
            shared = local if content_by_place else statistics
            error = None if shared is None else shared.squared_error
            values["content"] = terms.content_of(_stacked_squared_error(levels) if error is None else error, weights)
        if statistics is not None and "style" in wanted:
            values["style"] = terms.style_of(statistics, weights, self.style_delta)
        if statistics is not None and "correlation" in wanted:
            values["correlation"] = terms.correlation_of(statistics, weights)
        if local is not None and "texture" in wanted:
            values["texture"] = terms.texture_of(local.texture, weights)
        if local is not None and "grid" in wanted:
            values["grid"] = terms.grid_of(local.phases, weights)
        if "patch_nce" in wanted:
            values["patch_nce"] = torch.stack(
                [self._patch_nce(level.by_statistics, *level.gt, seed) for level in levels]
            )
        return values

    def _patch_nce(self, sr: Tensor, gt: Tensor, channel_weights: Tensor | None, seed: Tensor) -> Tensor:
        return terms.patch_nce(
            sr,
            gt,
            channel_weights,
            locations=terms.random_locations(seed, sr.shape[2] * sr.shape[3], self.patches),
            modulation=self.modulation,
            temperature=self.temperature,
            reduction="none",
            precision=self.precision,
        )


def _load(inn: str | Path | HighFrequencyINN) -> Frozen[HighFrequencyINN]:
    from .inn import HighFrequencyINN  # FrEIA brings scipy: not before a loss is built

    if not isinstance(inn, (str, Path, HighFrequencyINN)):
        raise TypeError(f"inn must be a checkpoint's name or path, or a HighFrequencyINN, got {inn!r}")
    return Frozen(inn if isinstance(inn, HighFrequencyINN) else HighFrequencyINN.from_pretrained(inn))


def _stacked_squared_error(levels: list[LevelPair]) -> Tensor:
    """Squared errors (L, B, C), place by place, of all levels."""
    return torch.stack([terms.squared_error(level.by_place, level.gt.features) for level in levels])


def _shifted(image: Tensor, shift: _random.Shift | None) -> Tensor:
    return image if shift is None else _random.shifted(image, shift)
