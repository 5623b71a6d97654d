"""Draw the pictures of the documentation from scikit-image's photographs: `python docs/figures.py [FOLDER]`.

The loss pages say what each picture shows. Seeded: two runs on one machine draw the same.
A picture is at most 6 inches wide with print of 9 points and more, so that it can be read on a telephone.
"""

from __future__ import annotations

import csv
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from focal_frequency_loss import FocalFrequencyLoss
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from PIL import Image
from skimage.metrics import structural_similarity
from torch import Tensor

from mghf_loss import HighFrequencyINN, MGHFLoss, MGHFnLoss
from mghf_loss._files import write_atomically
from mghf_loss.metric import distance
from mghf_loss.toy import downscale, photograph, upscale
from mghf_loss.training.evaluation import DISTORTIONS, LEVEL_NAMES, at_mse

DOCS = Path(__file__).parent
OURS, OTHER = "tab:red", "tab:gray"  # one strong colour everywhere
DPI = 125
CHOICE = {"psnr": "PSNR ↑", "kid": "KID ↓", "spectrum_error": "spectrum ↓", "niqe": "NIQE ↓"}  # inn-choice.csv
CHOSEN = "noise 12"


def main() -> None:
    """Write every picture to the folder of the command line, docs/figures by default."""
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else DOCS / "figures"
    folder.mkdir(parents=True, exist_ok=True)
    gt = photograph("chelsea")[..., 60:252, 90:282]
    for draw in (equal_psnr, mghf_n, conditioning, shift, distortions, heatmap, inn_features, inn_choice):
        torch.manual_seed(0)
        figure = draw(gt)
        write_atomically(folder / f"{draw.__name__.replace('_', '-')}.png", lambda path, f=figure: save(f, path))
        plt.close(figure)


def save(figure: Figure, path: Path) -> None:
    """Write 256 colours: photographs and colour maps look the same at a third of the size."""
    figure.canvas.draw()
    pixels = np.asarray(figure.canvas.buffer_rgba())  # type: ignore[attr-defined]
    Image.fromarray(pixels).convert("RGB").quantize(256, dither=Image.Dither.NONE).save(path, "png", optimize=True)


def panel(axis: Axes, image: Tensor, title: str, **options: Any) -> Any:
    """Show (1, 3, H, W) in [0, 1], or a map (H, W)."""
    if image.ndim == 4:
        image = image[0].permute(1, 2, 0).clamp(0, 1)
    axis.set_axis_off()
    axis.set_title(title, fontsize=10)
    return axis.imshow(image.numpy(), interpolation="nearest", **options)


def panels(rows: int, columns: int, title: float = 0.3, aspect: float = 1, width: float = 6) -> tuple[Figure, Any]:
    """Make panels of one aspect (height over width) with room for titles, and for a colour bar on the right."""
    side = aspect * width / (columns + 0.35)
    return plt.subplots(rows, columns, figsize=(width, rows * (side + title)), layout="constrained", dpi=DPI)


def blur(image: Tensor, strength: float) -> Tensor:
    """Blur by the Gaussian of standard deviation 0.1 + 16 strength^2 pixels."""
    return DISTORTIONS["blur"](image, torch.Generator())(strength)


def moved_details(image: Tensor) -> Tensor:
    """Return the image with its details 6 pixels down and to the right of where they belong."""
    low = blur(image, 0.35)  # 2.1 pixels
    return low + (image - low).roll((6, 6), (2, 3))


@torch.no_grad()
def mghf_n(gt: Tensor) -> Figure:
    """One channel of each level for GT and bicubic, and the squared difference, averaged over channels."""
    network = HighFrequencyINN.from_pretrained("bundled")
    sr = upscale(downscale(gt)).clamp(0, 1)
    figure, axes = panels(3, 4)
    for row, (name, image) in zip(axes, {"GT": gt, "bicubic": sr}.items(), strict=False):
        panel(row[0], image, name)
        levels = zip(row[1:], network.features(2 * image - 1), LEVEL_NAMES, strict=True)
        for axis, level, level_name in levels:
            panel(axis, level[0, 0], level_name, cmap="RdBu", vmin=-2, vmax=2)
        figure.colorbar(row[-1].images[0], ax=row[-1], shrink=0.9)
    axes[2, 0].set_axis_off()
    pairs = zip(*(network.features(2 * image - 1) for image in (sr, gt)), strict=True)
    for axis, (s, g) in zip(axes[2, 1:], pairs, strict=True):
        error = (s - g)[0].square().mean(0)
        panel(axis, error, f"error {error.mean():.2f}", cmap="inferno", vmin=0, vmax=2)
    figure.colorbar(axes[2, -1].images[0], ax=axes[2, -1], shrink=0.9)
    return figure


def distorted(gt: Tensor) -> dict[str, Tensor]:
    """Five distortions of equal pixel MSE, that of JPEG near 26 dB."""
    make = {name: distort(gt, torch.Generator().manual_seed(0)) for name, distort in DISTORTIONS.items()}
    jpeg = at_mse(make["JPEG"], gt, 10**-2.6)  # quality comes in steps, so the others follow
    target = (jpeg - gt).square().mean().item()
    images = {name: at_mse(distort, gt, target) for name, distort in make.items() if name != "JPEG"}
    return {"brighter": images["brightness"], "less contrast": images["contrast"]} | {
        "noise": images["white noise"],
        "JPEG": jpeg,
        "blur": images["blur"],
    }


def psnr(sr: Tensor, gt: Tensor) -> float:
    """In dB."""
    return -10 * math.log10((sr - gt).square().mean())


@torch.no_grad()
def equal_psnr(gt: Tensor) -> Figure:
    """Five distortions of equal PSNR with SSIM, focal frequency loss and MGHFLoss."""
    loss, focal = MGHFLoss(shift="average"), FocalFrequencyLoss()
    gt_pixels = gt[0].permute(1, 2, 0).numpy()
    figure, axes = panels(2, 3, title=0.75, width=5.5)
    images = distorted(gt)
    figure.suptitle(f"Five errors of equal PSNR ({psnr(images['JPEG'], gt):.1f} dB)", fontsize=12)
    panel(axes[0, 0], gt, "ground truth\n\n\n")
    for axis, (name, image) in zip(axes.flat[1:], images.items(), strict=True):
        ssim = structural_similarity(gt_pixels, image[0].permute(1, 2, 0).numpy(), data_range=1, channel_axis=2)
        panel(axis, image, f"{name}\nSSIM {ssim:.2f}\nFFL {focal(image, gt).item():.4f}\n")
        text = f"MGHFLoss {loss(image, gt).item():.2f}"
        axis.text(0.5, 1.02, text, transform=axis.transAxes, ha="center", color=OURS, weight="bold")
    return figure


@torch.no_grad()
def conditioning(gt: Tensor) -> Figure:
    """Content of noise over its variance: own conditioning hides strong noise, GT conditioning does not."""
    levels = [2, 4, 8, 12, 16, 25, 35, 50]
    figure, axis = plt.subplots(figsize=(5.5, 3), layout="constrained", dpi=DPI)
    noise = torch.randn(gt.shape)
    own, of_gt = MGHFnLoss(conditioning="own", shift="none"), MGHFnLoss(conditioning="gt", shift="none")
    for criterion, label, colour in ((own, "from SR itself", OTHER), (of_gt, "from GT", OURS)):
        values = [criterion(gt + level / 255 * noise, gt).item() / level**2 for level in levels]
        ratios = [value / values[0] for value in values]
        axis.plot(levels, ratios, "o-", color=colour)
        axis.annotate(label, (levels[-2], ratios[-2]), xytext=(6, 6), textcoords="offset points", color=colour)
    axis.set_xlabel("standard deviation of noise, in 1/255")
    axis.set_ylabel("content / variance of noise\n(1 at the left)")
    axis.set_ylim(0, 1.15)
    return figure


@torch.no_grad()
def shift(gt: Tensor) -> Figure:
    """Content of an image of 4 x 4 blocks against the phase of the Haar grid."""
    blocks = torch.nn.functional.interpolate(torch.nn.functional.avg_pool2d(gt, 4), scale_factor=4)
    fixed, average = (MGHFnLoss(shift=name) for name in ("none", "average"))
    values = [fixed(blocks.roll((s, s), (2, 3)), gt.roll((s, s), (2, 3))).item() for s in range(9)]
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(6, 2.6), layout="constrained", dpi=DPI, gridspec_kw={"width_ratios": (1, 1.6)}
    )
    panel(left, blocks[..., 40:104, 60:124], "SR with stairs")
    right.plot(range(9), values, "o-", color=OTHER)
    mean = average(blocks, gt).item()
    right.annotate('shift="none"', (2, values[2]), xytext=(0, 6), textcoords="offset points", ha="center", color=OTHER)
    right.axhline(mean, color=OURS)
    right.annotate('shift="average"', (4, mean), xytext=(0, 5), textcoords="offset points", ha="center", color=OURS)
    right.set_xlabel("both images moved by so many pixels")
    right.set_ylabel("MGHFnLoss")
    right.set_ylim(0, 1.2 * max(values))
    return figure


@torch.no_grad()
def distortions(gt: Tensor) -> Figure:
    """Every term for distortions of equal pixel MSE, over that of white noise."""
    criterion = MGHFLoss(coefficients={"patch_nce": 0.008})
    terms = {name: distance(criterion, image, gt)[1] for name, image in distorted(gt).items()}
    noise = terms["noise"]
    ratios = np.array([[(row[term] / noise[term]).item() for term in noise] for row in terms.values()])
    ratios[ratios < 1e-6] = 0  # rounding
    figure, axis = plt.subplots(figsize=(6, 2.6), layout="constrained", dpi=DPI)
    axis.imshow(ratios.clip(1 / 30), cmap="RdBu_r", norm=LogNorm(1 / 30, 30, clip=True), aspect="auto")
    for (row, column), ratio in np.ndenumerate(ratios):
        dark = abs(math.log(max(ratio, 1e-9))) > 2
        axis.text(column, row, f"{ratio:.2g}", ha="center", va="center", color="white" if dark else "black")
    axis.set_xticks(range(len(noise)), list(noise))
    axis.set_yticks(range(len(terms)), list(terms))
    return figure


def heatmap(gt: Tensor) -> Figure:
    """Heat maps of the terms but grid for an image with a different fault in three of its quarters."""
    sr = gt.clone()
    middle = gt.shape[-1] // 2
    sr[..., :middle, :middle] += 0.05 * torch.randn(gt.shape)[..., :middle, :middle]
    sr[..., :middle, middle:] = blur(gt, 0.3)[..., :middle, middle:]
    sr[..., middle:, :middle] = moved_details(gt)[..., middle:, :middle]
    maps = MGHFLoss().heatmap(sr, gt)
    del maps["grid"]  # about the same everywhere
    figure, axes = panels(2, 3, title=0.5)
    panel(axes[0, 0], sr, "SR: noise | blur\nmoved | equal to GT")
    for axis, (name, heat) in zip(axes.flat[1:], maps.items(), strict=True):
        panel(axis, heat[0], name, cmap="inferno", vmin=0, vmax=heat.quantile(0.99).item())
    return figure


@torch.no_grad()
def inn_features(_: Tensor) -> Figure:
    """RMS and two channels of every level of the bundled network, for a photograph that has not trained it."""
    image = photograph("coffee")
    features = HighFrequencyINN.from_pretrained("bundled").features(2 * image - 1)
    figure, axes = panels(len(features), 4, aspect=image.shape[-2] / image.shape[-1])
    for axis in axes[:, 0]:
        axis.set_axis_off()
    panel(axes[0, 0], image, "image")
    for row, level, level_name in zip(axes, features, LEVEL_NAMES, strict=True):
        panel(row[1], level[0].square().mean(0).sqrt(), f"{level_name}: RMS", cmap="inferno", vmin=0, vmax=3)
        for channel, axis in enumerate(row[2:]):
            panel(axis, level[0, channel], f"channel {channel}", cmap="RdBu", vmin=-3, vmax=3)
        for axis in (row[1], row[-1]):
            figure.colorbar(axis.images[0], ax=axis, shrink=0.9)
    return figure


def inn_choice(_: Tensor) -> Figure:
    """Measures of the SR models that the candidates for the bundled network trained: mean and range over seeds."""
    with (DOCS.parent / "benchmarks" / "results" / "inn-choice.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    names = list(dict.fromkeys(row["candidate"] for row in rows))
    figure, axes = plt.subplots(1, len(CHOICE), figsize=(6, 3.8), layout="constrained", dpi=DPI, sharey=True)
    for axis, (metric, label) in zip(axes, CHOICE.items(), strict=True):
        for place, name in enumerate(names):
            values = [float(row[metric]) for row in rows if row["candidate"] == name]
            colour = OURS if name == CHOSEN else OTHER
            axis.plot([min(values), max(values)], [place, place], color=colour)
            axis.plot(np.mean(values), place, "o", color=colour)
        axis.set_title(label, fontsize=10)
        axis.grid(alpha=0.3)
        axis.locator_params(axis="x", nbins=3, steps=[1, 3, 10])
    axes[0].set_yticks(range(len(names)), names)
    axes[0].invert_yaxis()
    return figure


if __name__ == "__main__":
    main()
