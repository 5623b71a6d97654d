"""Draw the pictures of the documentation from scikit-image's photographs: `python docs/figures.py [FOLDER]`.

The loss pages say what each picture shows. Seeded: two runs on one machine draw the same.
"""

from __future__ import annotations

import csv
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from mghf_loss import HighFrequencyINN, MGHFLoss
from mghf_loss._files import write_atomically
from mghf_loss.dino import jensen_shannon
from mghf_loss.ops.nce import transport_potentials
from mghf_loss.terms import channel_entropy, entropy_channel_weights
from mghf_loss.toy import downscale, photograph, upscale
from mghf_loss.training.evaluation import DISTORTIONS, LEVEL_NAMES, at_mse

DOCS = Path(__file__).parent
COEFFICIENTS = DOCS.parent / "benchmarks" / "results" / "coefficients.csv"


def main() -> None:
    """Write every picture to the folder of the command line, docs/figures by default."""
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else DOCS / "figures"
    folder.mkdir(parents=True, exist_ok=True)
    gt = photograph("chelsea")[..., 60:252, 90:282]
    for draw in (mghf_n, distortions, heatmap, channel_weights, patch_nce, dino_jsd, gradient_norms):
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


def panels(rows: int, columns: int, width: float = 10, title: float = 0.3) -> tuple[Figure, Any]:
    """Make square panels with room for titles, and for a colour bar on the right."""
    side = width / (columns + 0.35)
    return plt.subplots(rows, columns, figsize=(width, rows * (side + title)), layout="constrained", dpi=110)


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
    figure, axes = panels(3, 4, width=8)
    for row, (name, image) in zip(axes, {"GT": gt, "SR (bicubic)": sr}.items(), strict=False):
        panel(row[0], image, name)
        levels = zip(row[1:], network.features(2 * image - 1), LEVEL_NAMES, strict=True)
        for axis, level, level_name in levels:
            panel(axis, level[0, 0], f"{level_name}, channel 0", cmap="RdBu", vmin=-2, vmax=2)
        figure.colorbar(row[-1].images[0], ax=row[-1], shrink=0.9)
    axes[2, 0].set_axis_off()
    pairs = zip(*(network.features(2 * image - 1) for image in (sr, gt)), strict=True)
    for axis, (s, g) in zip(axes[2, 1:], pairs, strict=True):
        error = (s - g)[0].square().mean(0)
        panel(axis, error, f"squared error, mean {error.mean():.2f}", cmap="inferno", vmin=0, vmax=2)
    figure.colorbar(axes[2, -1].images[0], ax=axes[2, -1], shrink=0.9)
    return figure


@torch.no_grad()
def distortions(gt: Tensor) -> Figure:
    """Every term for distortions of equal pixel MSE, that of details moved by 6 pixels, over that of white noise."""
    moved = moved_details(gt)
    target = (moved - gt).square().mean().item()
    generator = torch.Generator().manual_seed(0)
    names = {"white noise": "white noise", "blur": "blur", "JPEG": "JPEG", "contrast": "lower contrast"}
    images = {name: at_mse(DISTORTIONS[key](gt, generator), gt, target) for key, name in names.items()}
    images["details moved"] = moved
    psnr = {name: -10 * math.log10((image - gt).square().mean()) for name, image in images.items()}

    criterion = MGHFLoss()
    terms = {name: _terms(criterion, image, gt) for name, image in images.items()}
    noise = terms["white noise"]
    ratios = np.array([[row[term] / noise[term] for term in noise] for row in terms.values()])

    figure = plt.figure(figsize=(10, 5.1), layout="constrained", dpi=110)
    rows: Any = figure.subfigures(2, 1, height_ratios=(1, 1.45))
    top, bottom = rows
    for axis, (name, image) in zip(top.subplots(1, 6), {"GT": gt, **images}.items(), strict=True):
        panel(axis, image, f"{name}\n{psnr[name]:.1f} dB" if name in psnr else name)
    axis = bottom.subplots()
    shown = axis.imshow(ratios, cmap="RdBu_r", norm=LogNorm(1 / 30, 30), aspect="auto")
    for (row, column), ratio in np.ndenumerate(ratios):
        dark = abs(math.log(ratio)) > 2 if ratio else True
        axis.text(column, row, f"{ratio:.2g}", ha="center", va="center", color="white" if dark else "black")
    axis.set_xticks(range(len(noise)), list(noise))
    axis.set_yticks(range(len(terms)), list(terms))
    bottom.colorbar(shown, ax=axis, label="term / that of white noise")
    return figure


def _terms(criterion: MGHFLoss, sr: Tensor, gt: Tensor) -> Mapping[str, float]:
    _, terms = criterion(sr, gt, return_terms=True)
    return {name: value.item() for name, value in terms.items()}


def heatmap(gt: Tensor) -> Figure:
    """Heat maps of every term for an image with a different fault in three of its quarters."""
    sr = gt.clone()
    middle = gt.shape[-1] // 2
    sr[..., :middle, :middle] += 0.05 * torch.randn(gt.shape)[..., :middle, :middle]
    sr[..., :middle, middle:] = blur(gt, 0.3)[..., :middle, middle:]
    sr[..., middle:, :middle] = moved_details(gt)[..., middle:, :middle]
    maps = MGHFLoss().heatmap(sr, gt)
    figure, axes = panels(1, 1 + len(maps), title=0.5)
    panel(axes[0], sr, "SR: noise | blur\nmoved | equal to GT")
    for axis, (name, heat) in zip(axes[1:], maps.items(), strict=True):
        panel(axis, heat[0], name, cmap="inferno", vmin=0, vmax=heat.quantile(0.99).item())
    return figure


def channel_weights(gt: Tensor) -> Figure:
    """Entropy of each channel of GT's features, and the weight that it becomes."""
    figure, axes = plt.subplots(1, 3, figsize=(10, 2.6), layout="constrained", dpi=110, sharey=True)
    features = HighFrequencyINN.from_pretrained("bundled").features(2 * gt - 1)
    for axis, level, name in zip(axes, features, LEVEL_NAMES, strict=True):
        entropy, weights = channel_entropy(level)[0], entropy_channel_weights(level)[0]
        channels = np.arange(len(entropy))
        axis.bar(channels - 0.2, entropy, 0.4, label="entropy, nats", color="tab:gray")
        axis.bar(channels + 0.2, weights.detach(), 0.4, label="weight", color="tab:orange")
        axis.set_title(name, fontsize=10)
        axis.set_xlabel("channel")
        axis.set_xticks(channels)
    axes[0].set_ylim(0, 4.6)
    axes[0].legend(fontsize=8, loc="upper left", ncols=2)
    return figure


@torch.no_grad()
def patch_nce(gt: Tensor) -> Figure:
    """Similarity of one location of SR to all of GT on the medium level, and the weights of the negatives."""
    network = HighFrequencyINN.from_pretrained("bundled")
    sr = upscale(downscale(gt)).clamp(0, 1)
    levels = [network.features(2 * image - 1)[1] for image in (sr, gt)]
    weights = entropy_channel_weights(levels[1])[..., None]
    height, width = levels[0].shape[-2:]
    query, key = (torch.nn.functional.normalize(level.flatten(2) * weights, dim=1) for level in levels)
    row, column = 17, 10  # the edge of an eye
    location = row * width + column
    similarity = query[0, :, location] @ key[0]
    figure, axes = panels(1, 4, width=9)
    panel(axes[0], sr, "SR and the location")
    axes[0].plot(column * 4 + 2, row * 4 + 2, "o", markersize=9, fillstyle="none", color="yellow")
    shown = panel(
        axes[1], similarity.reshape(height, width), "similarity to GT's locations", cmap="RdBu", vmin=-1, vmax=1
    )
    figure.colorbar(shown, ax=axes[1], shrink=0.7)
    for axis, (name, sign) in zip(axes[2:], {"hard": 1.0, "easy": -1.0}.items(), strict=True):
        f, g = transport_potentials(query, key, sign, 50, 1e-4)
        negatives = (len(similarity) - 1) * (f[0, location] + sign * similarity + g[0]).exp()
        negatives[location] = 0  # the positive is no negative
        shown = panel(axis, negatives.reshape(height, width), f'weights, "{name}"', cmap="inferno", vmin=0, vmax=2.5)
        figure.colorbar(shown, ax=axis, shrink=0.7)
    return figure


def dino_jsd(gt: Tensor) -> Figure:
    """What the divergence does to an embedding; random numbers in place of DINOv2's."""
    del gt
    embedding = torch.randn(384)
    direction = torch.randn(384)
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 2.8), layout="constrained", dpi=110)
    channels = np.arange(24)
    for name, shift, offset in (("p: softmax(e)", 0.0, -0.2), ("q: softmax(e + d)", 0.5, 0.2)):
        left.bar(channels + offset, (embedding + shift * direction).softmax(0)[:24], 0.4, label=name)
    left.set_xlabel("dimension (24 of 384)")
    left.legend(fontsize=8)
    distances = torch.linspace(0, 8, 81)
    for temperature in (0.5, 1.0, 2.0):
        moved = (embedding + distances[:, None] * direction) / temperature
        right.plot(distances, jensen_shannon(moved, embedding / temperature), label=f"T = {temperature:g}")
    right.axhline(math.log(2), color="black", linewidth=0.8, linestyle="--", label="ln 2")
    right.set_xlabel("standard deviation of d, which is added to e")
    right.set_ylabel("JSD, nats")
    right.legend(fontsize=8)
    return figure


def gradient_norms(gt: Tensor) -> Figure:
    """Gradient norm of coefficient times term at bicubic x4, from the benchmark's rows."""
    del gt
    with COEFFICIENTS.open() as file:
        rows = list(csv.DictReader(file))
    figure, axis = plt.subplots(figsize=(8, 2.4), layout="constrained", dpi=110)
    for place, row in enumerate(rows):
        low, median, high = (float(row["coefficient"]) * float(row[key]) for key in ("p10", "median", "p90"))
        axis.plot([low, high], [place, place], linewidth=6, color="tab:orange", alpha=0.5)
        axis.plot(median, place, "o", color="black")
        axis.annotate(f"{median:.2g}", (median, place), xytext=(0, 6), textcoords="offset points", fontsize=8)
    axis.set_yticks(range(len(rows)), [f"{float(row['coefficient']):g} x {row['term']}" for row in rows])
    axis.set_ylim(len(rows) - 0.5, -0.8)
    axis.set_xscale("log")
    axis.set_xlabel("norm of the gradient with respect to SR: median and 10th to 90th percentile of the crops")
    return figure


if __name__ == "__main__":
    main()
