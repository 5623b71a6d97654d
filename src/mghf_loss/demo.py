"""`mghf-loss demo`: train a small x4 SR model with and without MGHFLoss on photographs inside scikit-image."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib import pyplot as plt
from matplotlib.patches import Rectangle
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torch import Tensor, nn
from tqdm import tqdm

from ._files import check_output, write_atomically, write_table
from .metric import distance
from .mghf import MGHFLoss, Preset
from .toy import TRAINING_PHOTOGRAPHS, SmallSR, downscale, photograph, random_crop, upscale

UNSEEN_PHOTOGRAPHS = {"chelsea": (110, 130), "coffee": (160, 330)}  # with the corner of the crop to zoom into
PRESETS: tuple[Preset, ...] = ("balanced", "sharp")
ZOOM = 72
EVALUATIONS = 12


@dataclass
class Run:
    """One trained model with its terms on the unseen photographs after so many steps of training."""

    name: str
    model: nn.Module
    terms: dict[int, dict[str, float]] = field(default_factory=dict)


def run_demo(out: Path, steps: int, seed: int, device: str) -> list[dict[str, object]]:
    """Train with L1 alone and beside MGHFLoss from one seed, write table and pictures to `out`, return the table."""
    check_output(out)
    train = [photograph(name).to(device) for name in TRAINING_PHOTOGRAPHS]
    unseen = [photograph(name).to(device) for name in UNSEEN_PHOTOGRAPHS]
    judge = MGHFLoss().to(device)
    runs = [_train(preset, judge, train, unseen, steps, seed) for preset in (None, *PRESETS)]
    images = {"bicubic": [upscale(downscale(gt)).clamp(0, 1) for gt in unseen]}
    images |= {run.name: _restore(run.model, unseen) for run in runs}
    table = [_judge(name, srs, unseen, judge) for name, srs in images.items()]
    write_table(out / "table.csv", table)
    _plot_crops(out / "crops.png", images, unseen)
    _plot_terms(out / "terms.png", runs)
    return table


def _train(
    preset: Preset | None, judge: MGHFLoss, train: list[Tensor], unseen: list[Tensor], steps: int, seed: int
) -> Run:
    """Train with L1, or with L1 + MGHFLoss(preset)."""
    torch.manual_seed(seed)
    device = unseen[0].device
    run = Run("L1" if preset is None else f"L1 + {preset}", SmallSR().to(device))
    criterion = None if preset is None else MGHFLoss(preset).to(device)
    optimiser = torch.optim.Adam(run.model.parameters(), lr=1e-3)
    warm_up = 0.1 if steps > 10 else 0.3  # OneCycleLR divides by steps * warm_up - 1
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, max_lr=1.5e-3, total_steps=steps, pct_start=warm_up)
    crops = torch.Generator().manual_seed(seed)
    progress = tqdm(range(steps), desc=run.name, unit="step")
    for step in progress:
        gt = torch.cat([random_crop(train, crops) for _ in range(8)])
        sr = run.model(downscale(gt))
        loss = F.l1_loss(sr, gt)
        if criterion is not None:
            loss = loss + criterion(sr, gt)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        # The style term grows with the fourth power of the features: one crop must not throw Adam off.
        nn.utils.clip_grad_norm_(run.model.parameters(), 0.2)
        optimiser.step()
        schedule.step()
        if step % max(1, steps // EVALUATIONS) == 0 or step + 1 == steps:
            run.terms[step + 1] = _terms(_restore(run.model, unseen), unseen, judge)
            progress.set_postfix(loss=f"{loss.item():.4f}")
    return run


@torch.no_grad()
def _restore(model: nn.Module, gts: list[Tensor]) -> list[Tensor]:
    return [model(downscale(gt)).clamp(0, 1) for gt in gts]


@torch.no_grad()
def _terms(srs: list[Tensor], gts: list[Tensor], judge: MGHFLoss) -> dict[str, float]:
    """Mean of each term over the photographs."""
    per_image = [distance(judge, sr, gt)[1] for sr, gt in zip(srs, gts, strict=True)]
    return {name: float(np.mean([terms[name].item() for terms in per_image])) for name in per_image[0]}


def _pixels(image: Tensor) -> np.ndarray:
    """(1, 3, H, W) as rows, columns, colours."""
    return image[0].permute(1, 2, 0).cpu().numpy()


def _judge(name: str, srs: list[Tensor], gts: list[Tensor], judge: MGHFLoss) -> dict[str, object]:
    pairs = [(_pixels(sr), _pixels(gt)) for sr, gt in zip(srs, gts, strict=True)]
    psnr = [peak_signal_noise_ratio(gt, sr, data_range=1) for sr, gt in pairs]
    ssim = [structural_similarity(gt, sr, data_range=1, channel_axis=2) for sr, gt in pairs]
    return {"loss": name, "PSNR": float(np.mean(psnr)), "SSIM": float(np.mean(ssim)), **_terms(srs, gts, judge)}


def _plot_crops(path: Path, images: dict[str, list[Tensor]], gts: list[Tensor]) -> None:
    """One row a photograph: ground truth with the crop marked, then the crop in every version."""
    columns = {**images, "ground truth": gts}
    figure, axes = plt.subplots(
        len(gts), len(columns) + 1, figsize=(3.2 * (len(columns) + 1), 3.2 * len(gts)), layout="constrained"
    )
    for row, (gt, (top, left)) in enumerate(zip(gts, UNSEEN_PHOTOGRAPHS.values(), strict=True)):
        axes[row, 0].imshow(_pixels(gt))
        axes[row, 0].add_patch(Rectangle((left, top), ZOOM, ZOOM, fill=False, edgecolor="yellow", linewidth=2))
        for axis, (name, versions) in zip(axes[row, 1:], columns.items(), strict=True):
            crop = versions[row][..., top : top + ZOOM, left : left + ZOOM]
            axis.imshow(_pixels(crop), interpolation="nearest")
            if row == 0:
                axis.set_title(name)
    for axis in axes.flat:
        axis.set_axis_off()
    write_atomically(path, lambda temporary: figure.savefig(temporary, dpi=110))
    plt.close(figure)


def _plot_terms(path: Path, runs: list[Run]) -> None:
    """Every term on the unseen photographs against training steps, one line a run."""
    names = list(runs[0].terms[1])
    figure, axes = plt.subplots(1, len(names), figsize=(3.4 * len(names), 3), layout="constrained")
    for axis, name in zip(axes, names, strict=True):
        for run in runs:
            axis.plot(list(run.terms), [terms[name] for terms in run.terms.values()], label=run.name)
        axis.set_title(name)
        axis.set_xlabel("training step")
    axes[0].set_ylabel("term on unseen photographs")
    axes[0].legend()
    write_atomically(path, lambda temporary: figure.savefig(temporary, dpi=110))
    plt.close(figure)
