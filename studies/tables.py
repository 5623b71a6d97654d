"""Markdown tables and the statistics in their cells."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from .metrics import METRICS, Values, badness

ARROWS = {"higher": "↑", "lower": "↓", "one": "→1", "zero": "→0"}
OPTIMISED = "°"
SAMPLES = 2000  # of a bootstrap
POOLED = ("kid", "kid_lite2")  # figures of all photographs together


def markdown(table: Sequence[Mapping[str, str]]) -> str:
    columns = list(table[0])
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    return "\n".join(lines + ["| " + " | ".join(row[column] for column in columns) + " |" for row in table])


def heading(metric: str) -> str:
    """A metric's name with the direction of the better."""
    return f"{metric.replace('_', ' ')} {ARROWS[METRICS[metric].better]}"


def over_seeds(values: Sequence[Values]) -> Tensor:
    """One metric of one loss: (photographs,), (photographs, 2), or (seeds,) of a figure of all photographs together."""
    if isinstance(values[0], float):
        return torch.tensor(values, dtype=torch.double)
    each = [[math.nan if value is None else value for value in seed] for seed in values]  # pyright: ignore
    return torch.tensor(each, dtype=torch.double).mean(0)


def statistic(values: Tensor) -> Tensor:
    """Mean, or ratio of sums, over the photographs (..., n) or (..., n, 2)."""
    if values.shape[-1] == 2 and values.ndim > 1:
        return values[..., 0].sum(-1) / values[..., 1].sum(-1)
    return values.nanmean(-1)


def difference(values: Tensor, reference: Tensor, is_pooled: bool) -> tuple[float, float, float]:
    """Statistic minus that of the reference, and its paired 95 % interval over photographs.

    A figure of all photographs together has no such interval: its range over seeds stands there.
    """
    if values.ndim == 1 and not is_pooled:  # of the photographs that both have
        known = (values + reference).isfinite()
        values, reference = values[known], reference[known]
    middle = (statistic(values) - statistic(reference)).item()
    if not len(values):
        return math.nan, math.nan, math.nan
    if is_pooled:
        each = values - reference if len(values) == len(reference) else values - reference.mean()
        return (middle, each.min().item(), each.max().item()) if len(each) > 1 else (middle, math.nan, math.nan)
    chosen = torch.randint(len(values), (SAMPLES, len(values)), generator=torch.Generator().manual_seed(0))
    if values.ndim == 2:
        samples = statistic(values[chosen]) - statistic(reference[chosen])
    else:
        samples = (values - reference)[chosen].nanmean(1)
    low, high = samples[samples.isfinite()].quantile(torch.tensor([0.025, 0.975], dtype=samples.dtype)).tolist()
    return middle, low, high


def difference_text(metric: str, change: tuple[float, float, float]) -> str:
    """A change with its interval, bold where the whole interval is better; a range over seeds is none."""
    middle, low, high = change
    text = f"{middle:+.3g}" + ("" if math.isnan(low) else f" [{low:+.2g}, {high:+.2g}]")
    better = {"higher": low > 0, "lower": high < 0}.get(METRICS[metric].better, False) and metric not in POOLED
    return f"**{text}**" if better else text


def best_in_bold(metric: str, figures: Mapping[str, float], optimised: set[str]) -> dict[str, str]:
    """The cells of a column by row; rows that optimise the metric are marked, and are never the best."""
    judged = {row: badness(metric, value) for row, value in figures.items() if row not in optimised}
    best = min(judged.values(), default=math.nan)

    def cell(row: str, value: float) -> str:
        text = f"{value:.4g}"
        if row in optimised:
            return text + OPTIMISED
        return f"**{text}**" if judged[row] == best else text

    return {row: cell(row, value) for row, value in figures.items()}


Point = tuple[float, float, Mapping[str, Tensor]]  # ratio, drop of PSNR, values by metric


def at_drop(curve: Sequence[Point], drop: float) -> tuple[float, dict[str, Tensor]] | None:
    """Ratio and values where a drop of PSNR is reached, between the points of a curve that starts at L1.

    Linear in the drop, and in the logarithm of the ratio; from L1 (ratio 0) to the first point linear in the ratio.
    None where the curve does not come to the drop.
    """
    for (low, at_low, before), (high, at_high, after) in itertools.pairwise(curve):
        if at_low <= drop < at_high and math.isfinite(at_high):
            share = (drop - at_low) / (at_high - at_low)
            ratio = share * high if low == 0 else low * (high / low) ** share
            return ratio, {name: torch.lerp(before[name], after[name], share) for name in before if name in after}
    return None
