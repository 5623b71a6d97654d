"""Measure a network on photographs: code length, inverse error, features, response to distortions."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from .._files import check_output, read_image, read_pixels, write_atomically, write_table
from ..checkpoints import BUNDLED_NAMES
from ..inn import HighFrequencyINN
from .data import list_images, read_or_skip
from .objective import add_noise, bits_per_detail, code_length

Row = dict[str, Any]
SHIFT = "shift by one pixel"
LEVEL_NAMES = ("fine", "medium", "coarse")
FEATURE_STATISTICS = ("std", "std_without_noise", "excess_kurtosis", "neighbour_correlation")
TOLERANCE = 0.1  # how near to the asked mean squared error a distortion must come to be compared with the others
RESPONSE_SIDE = 256  # responses are measured on the middle of a photograph


@dataclass(frozen=True)
class Evaluation:
    """Tables of `evaluate`, each a list of rows: one per coder and noise, per level, per distortion.

    A value that does not exist is None. `photographs` is the number of those measured, `skipped` names the others.
    """

    coders: list[Row]
    levels: list[Row]
    responses: list[Row]
    inverse_error: float
    photographs: int
    skipped: list[str]


@torch.no_grad()
def evaluate(
    network: HighFrequencyINN,
    paths: Sequence[Path],
    noises: Sequence[float],
    device: str,
    *,
    stride: int | None = None,
    files: bool = True,
) -> Evaluation:
    """Measure a network on image files, at full size, cut to multiples of `stride`, by default 2^levels.

    - Code length: bits per value of photographs with Gaussian noise of standard deviation `noises` (1/255), rounded
      and clipped to 8 bits, by the network and, with `files`, by PNG and WebP (both lossless, at their best setting),
      on the very same pixels, headers included. The network codes the details; its low-pass values are charged at
      8 + levels bits, their raw cost. One draw of dequantisation noise makes its figure an upper bound in the mean.
    - Inverse error: largest |inverse(forward(image)) - image| of the photographs in [-1, 1].
    - Levels, with noise of the network's floor: standard deviation, excess kurtosis (0 if normal), correlation of
      neighbours (mean |r| over channels and both directions, 0 if white), code length, and share of all bits. The
      levels of a packet transform the finer ones again: only its last level, which codes all details, has a share.
    - Response: mean squared feature error (MGHF-n, the mean of the levels) of each distortion over that of white
      noise with equal pixel MSE, that of a shift by one pixel, on the middle 256 x 256. Photographs on which a
      distortion cannot reach that MSE within 10 % are left out and counted. A mean of ratios.

    Photographs that cannot be read or have a side below 4 * 2^levels are skipped with a warning that names them.
    """
    levels, stride = network.config.levels, stride or network.stride
    coded: dict[tuple[str, float], list[float]] = {}
    statistics: list[Tensor] = []
    ratios: dict[str, list[Tensor]] = {name: [] for name in (*DISTORTIONS, SHIFT)}
    inverse_error = 0.0
    skipped: set[str] = set()
    for index, path in enumerate(tqdm(paths, desc="eval-inn", unit="image")):
        pixels = read_or_skip(path, 4 * stride, skipped)  # smaller ones have too few places for statistics
        if pixels is None:
            continue
        height, width = (side // stride * stride for side in pixels.shape[-2:])
        pixels = pixels[None, :, :height, :width]
        generator = torch.Generator().manual_seed(index)
        for noise in noises:
            noisy = noisy_pixels(pixels, noise, generator)
            bits = {"INN": network_bits(network, noisy, generator, device)}
            if files:
                bits["PNG"] = file_bits(noisy, "png", optimize=True)
                bits["WebP"] = file_bits(noisy, "webp", lossless=True, quality=100, method=6)
            for coder, value in bits.items():
                coded.setdefault((coder, noise), []).append(value)
        image = pixels.to(device) / 127.5 - 1
        inverse_error = max(inverse_error, (network.inverse(network(image)) - image).abs().max().item())
        statistics.append(_level_statistics(network, image, generator))
        for name, ratio in _responses(network, pixels.float() / 255, generator, device).items():
            ratios[name].append(ratio)

    if not statistics:
        raise ValueError(f"none of the {len(paths)} images is readable and at least {4 * stride} x {4 * stride}")
    coders: list[Row] = [
        {"coder": coder, "noise": noise, "bits_per_value": float(np.mean(values))}
        for (coder, noise), values in coded.items()
    ]
    stacked = torch.stack(statistics)
    mean, count = stacked.nanmean(0), stacked[..., 1].sum(0)
    bits_of_level = (stacked[..., 0] * stacked[..., 1]).sum(0).tolist()
    low_count = count[-1].item() / (4**levels - 1 if network.config.variant == "packet" else 3)
    low_bits = low_count * (8 + levels)
    if network.config.variant == "packet":
        bits_of_level = [math.nan] * (levels - 1) + bits_of_level[-1:]
    all_bits = float(np.nansum(bits_of_level)) + low_bits
    rows: list[Row] = []
    for i in range(levels):
        row: Row = {"level": level_name(i, levels), "bits_per_value": mean[i, 0].item()}
        row["share_of_bits"] = _known(bits_of_level[i] / all_bits)
        row.update(zip(FEATURE_STATISTICS, map(_known, mean[i, 2:].tolist()), strict=True))
        rows.append(row)
    low_pass: Row = {"level": "low-pass", "bits_per_value": 8.0 + levels, "share_of_bits": low_bits / all_bits}
    rows.append(low_pass | dict.fromkeys(FEATURE_STATISTICS))
    responses: list[Row] = []
    for name, values in ratios.items():
        average = torch.stack(values).mean(0) if values else torch.full((levels + 1,), math.nan)
        row: Row = {"distortion": name, "photographs": len(values), "over_noise": _known(average[-1].item())}
        row.update({level_name(i, levels): _known(average[i].item()) for i in range(levels)})
        responses.append(row)
    return Evaluation(coders, rows, responses, inverse_error, len(statistics), sorted(skipped))


def _known(value: float) -> float | None:
    return None if math.isnan(value) else value


def _number(value: object) -> float:
    return math.nan if value is None else float(str(value))


def level_name(index: int, levels: int) -> str:
    """`fine`, `medium`, `coarse` for three levels, `level 1` ... for others."""
    return LEVEL_NAMES[index] if levels == len(LEVEL_NAMES) else f"level {index + 1}"


def noisy_pixels(pixels: Tensor, noise: float, generator: torch.Generator) -> Tensor:
    """Add N(0, noise^2) in 1/255 to uint8 pixels, round and clip to uint8."""
    gaussian = torch.randn(pixels.shape, generator=generator)
    return (pixels + noise * gaussian).round().clamp(0, 255).to(torch.uint8)


def network_bits(network: HighFrequencyINN, pixels: Tensor, generator: torch.Generator, device: str) -> float:
    """Bits per value of one 8-bit image (1, 3, H, W) with H, W multiples of 2^levels, low-pass values included."""
    latent = network(add_noise(pixels / 127.5 - 1, 0.0, generator).to(device))
    low = latent.low_pass.numel()
    # An orthonormal Haar step doubles the range of the low-pass band: 8 + levels bits at unit resolution.
    bits = code_length(latent, network.config.variant).item() * (pixels.numel() - low)
    return (bits + low * (8 + network.config.levels)) / pixels.numel()


def file_bits(pixels: Tensor, suffix: str, **options: object) -> float:
    """Bits per value of an 8-bit image (1, 3, H, W) as a file."""
    buffer = io.BytesIO()
    _to_pil(pixels).save(buffer, suffix, **options)
    return 8 * buffer.getbuffer().nbytes / pixels.numel()


def _to_pil(pixels: Tensor) -> Image.Image:
    return Image.fromarray(pixels[0].permute(1, 2, 0).cpu().numpy())


def _level_statistics(network: HighFrequencyINN, image: Tensor, generator: torch.Generator) -> Tensor:
    """Per level: bits per detail, number of values, std, std without noise, excess kurtosis, correlation, (L, 6)."""
    config = network.config
    latent = network(add_noise(image.cpu(), config.noise_floor, generator).to(image.device))
    bits = bits_per_detail(latent, config.variant)[0]
    rows = []
    for i, (noisy, clean) in enumerate(zip(latent.features, network.features(image), strict=True)):
        centred = noisy - noisy.mean((2, 3), keepdim=True)
        variance = centred.square().mean((2, 3))
        kurtosis = (centred.pow(4).mean((2, 3)) / variance.square() - 3).mean()
        products = [x[..., 1:] * x[..., :-1] for x in (centred.mT, centred)]
        neighbours = torch.stack([(product.mean((2, 3)) / variance).abs().mean() for product in products]).mean()
        row = (bits[i], noisy.numel(), noisy.std(), clean.std(), kurtosis, neighbours)
        rows.append([float(value) for value in row])
    return torch.tensor(rows)


def _responses(network: HighFrequencyINN, image: Tensor, generator: torch.Generator, device: str) -> dict[str, Tensor]:
    """Feature MSE of each distortion over that of white noise of the same pixel MSE: (levels, then their mean)."""
    top, left = (max(0, (side - RESPONSE_SIDE) // 2) for side in image.shape[-2:])
    image = image[..., top : top + RESPONSE_SIDE, left : left + RESPONSE_SIDE]
    shifted, image = image[..., :-1], image[..., 1:]
    if image.shape[-1] < network.stride:
        return {}
    target = (shifted - image).square().mean().item()
    reference = network.features(2 * image.to(device) - 1)

    def feature_errors(distorted: Tensor) -> Tensor:
        features = network.features(2 * distorted.to(device) - 1)
        errors = torch.stack([(a - b).square().mean() for a, b in zip(features, reference, strict=True)]).cpu()
        return torch.cat((errors, errors.mean()[None]))

    found = {name: at_mse(make(image, generator), image, target) for name, make in DISTORTIONS.items()}
    found[SHIFT] = shifted
    errors = {
        name: feature_errors(distorted)
        for name, distorted in found.items()
        if abs((distorted - image).square().mean().item() - target) < TOLERANCE * target
    }
    if "white noise" not in errors:
        return {}
    return {name: error / errors["white noise"] for name, error in errors.items()}


def at_mse(distort: Callable[[float], Tensor], image: Tensor, target: float) -> Tensor:
    """Bisect the strength in [0, 1] of a distortion for the pixel MSE `target`."""
    low, high = 0.0, 1.0
    for _ in range(16):
        middle = (low + high) / 2
        if (distort(middle) - image).square().mean().item() < target:
            low = middle
        else:
            high = middle
    return distort(high)


def _white_noise(image: Tensor, generator: torch.Generator) -> Callable[[float], Tensor]:
    noise = torch.randn(image.shape, generator=generator)
    return lambda strength: (image + strength * noise).clamp(0, 1)


def _blur(image: Tensor, generator: torch.Generator) -> Callable[[float], Tensor]:
    def blur(strength: float) -> Tensor:
        sigma = 0.1 + 16 * strength**2
        radius = min(math.ceil(3 * sigma), *(side - 1 for side in image.shape[-2:]))
        kernel = torch.exp(-0.5 * (torch.arange(-radius, radius + 1) / sigma).square())
        kernel = (kernel / kernel.sum()).expand(3, 1, 1, -1)
        padded = F.pad(image, (radius,) * 4, mode="reflect")
        return F.conv2d(F.conv2d(padded, kernel, groups=3), kernel.transpose(2, 3), groups=3)

    return blur


def _jpeg(image: Tensor, generator: torch.Generator) -> Callable[[float], Tensor]:
    pil = _to_pil((image * 255).round().to(torch.uint8))

    def jpeg(strength: float) -> Tensor:
        buffer = io.BytesIO()
        pil.save(buffer, "jpeg", quality=round(100 - 99 * strength))
        return read_pixels(buffer)[None].float() / 255

    return jpeg


def _brightness(image: Tensor, generator: torch.Generator) -> Callable[[float], Tensor]:
    return lambda strength: (image + strength).clamp(0, 1)


def _contrast(image: Tensor, generator: torch.Generator) -> Callable[[float], Tensor]:
    mean = image.mean((1, 2, 3), keepdim=True)
    return lambda strength: mean + (1 - strength) * (image - mean)


DISTORTIONS = {
    "white noise": _white_noise,
    "blur": _blur,
    "JPEG": _jpeg,
    "brightness": _brightness,
    "contrast": _contrast,
}


def plot_evaluation(path: Path, evaluation: Evaluation) -> None:
    """Draw code lengths, the features of each level and the responses."""
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(15, 4), layout="constrained")
    noises = sorted({row["noise"] for row in evaluation.coders})
    bits: dict[str, list[float]] = {}
    for row in sorted(evaluation.coders, key=lambda row: row["noise"]):
        bits.setdefault(str(row["coder"]), []).append(_number(row["bits_per_value"]))
    _grouped_bars(left, [f"noise {noise:g}/255" for noise in noises], bits, legend_columns=len(bits))
    left.set_ylabel("bits per value")
    left.set_title("code length of the same 8-bit pixels")
    networks = list(dict.fromkeys(row["network"] for row in evaluation.levels))
    levels = [row for row in evaluation.levels if row["network"] == networks[0] and row["std"] is not None]
    statistics = {key.replace("_", " "): [_number(row[key]) for row in levels] for key in FEATURE_STATISTICS}
    _grouped_bars(middle, [str(row["level"]) for row in levels], statistics, legend_columns=2)
    middle.set_title(f"features of {networks[0]} (normal and white: std 1, others 0)")
    for i, name in enumerate(networks):
        responses = [row for row in evaluation.responses if row["network"] == name]
        places = np.arange(len(responses)) + (i - (len(networks) - 1) / 2) * 0.8 / len(networks)
        values = [_number(row["over_noise"]) for row in responses]
        right.barh(places, values, 0.75 / len(networks), label=str(name))
        right.set_yticks(range(len(responses)), [str(row["distortion"]) for row in responses])
    if len(networks) > 1:
        right.legend()
    right.set_xscale("log")
    right.axvline(1, color="black", linewidth=0.8)
    right.set_title("feature MSE over that of white noise,\nat the pixel MSE of a one-pixel shift")
    write_atomically(path, lambda temporary: figure.savefig(temporary, dpi=110))
    plt.close(figure)


def _grouped_bars(axis: Axes, groups: list[str], series: dict[str, list[float]], legend_columns: int) -> None:
    width = 0.8 / len(series)
    for i, (label, heights) in enumerate(series.items()):
        left = np.arange(len(groups)) - 0.4 + i * width
        bars = axis.bar(left, heights, 0.95 * width, align="edge", label=label)
        axis.bar_label(bars, fmt="%.2f", fontsize=7)
    axis.set_xticks(range(len(groups)), groups)
    axis.margins(y=0.25)
    axis.legend(ncols=legend_columns, loc="upper center")


@torch.no_grad()
def plot_features(path: Path, network: HighFrequencyINN, image: Tensor) -> None:
    """Draw an image (1, 3, H, W) in [0, 1] and, per level, the RMS over channels and the first three channels."""
    features = network.features(2 * image - 1)
    aspect = image.shape[-2] / image.shape[-1]
    figure, axes = plt.subplots(
        len(features), 5, figsize=(15, 3 * aspect * len(features) + 0.6), layout="constrained", squeeze=False
    )
    for axis in axes.flat:
        axis.set_axis_off()
    axes[0, 0].imshow(image[0].permute(1, 2, 0).cpu().numpy())
    axes[0, 0].set_title("image")
    for i, (row, level) in enumerate(zip(axes, features, strict=True)):
        level = level[0].cpu().numpy()
        name = f"{level_name(i, len(features))}, {level.shape[0]} x {level.shape[1]} x {level.shape[2]}"
        shown = row[1].imshow(np.sqrt(np.square(level).mean(0)), cmap="inferno", vmin=0, vmax=3)
        row[1].set_title(f"{name}: RMS")
        figure.colorbar(shown, ax=row[1], shrink=0.8)
        for channel, axis in enumerate(row[2:]):
            shown = axis.imshow(level[channel], cmap="RdBu", vmin=-3, vmax=3)
            axis.set_title(f"channel {channel}")
        figure.colorbar(shown, ax=row[-1], shrink=0.8)
    write_atomically(path, lambda temporary: figure.savefig(temporary, dpi=80))
    plt.close(figure)


def _evaluate_beside_bundled(
    inn: str, network: HighFrequencyINN, paths: Sequence[Path], noises: Sequence[float], device: str
) -> Evaluation:
    is_bundled = inn in BUNDLED_NAMES
    networks = {"bundled" if is_bundled else Path(inn).name: network}
    if not is_bundled:
        if "bundled" in networks:  # a folder of that name
            networks = {inn: network}
        networks["bundled"] = HighFrequencyINN.from_pretrained("bundled").to(device)
    noises = noises or sorted({network.config.noise_floor, 0.0}, reverse=True)
    stride = max(each.stride for each in networks.values())
    found: dict[str, Evaluation] = {}
    for name, each in networks.items():
        skipped = {path for other in found.values() for path in other.skipped}
        usable = [path for path in paths if str(path) not in skipped]
        found[name] = evaluate(each, usable, noises, device, stride=stride, files=not found)
    first = next(iter(found.values()))
    coders = [
        {**row, "coder": name if row["coder"] == "INN" else row["coder"]}
        for name, evaluation in found.items()
        for row in evaluation.coders
    ]
    return replace(
        first,
        coders=coders,
        levels=_beside({name: evaluation.levels for name, evaluation in found.items()}),
        responses=_beside({name: evaluation.responses for name, evaluation in found.items()}),
    )


def _beside(tables: dict[str, list[Row]]) -> list[Row]:
    """Join tables of several networks, whose columns differ where their numbers of levels do."""
    columns = list(dict.fromkeys(name for table in tables.values() for row in table for name in row))
    return [
        {"network": network, **{name: row.get(name) for name in columns}}
        for network, table in tables.items()
        for row in table
    ]


def eval_inn(
    inn: str, folder: Path, out: Path, noises: Sequence[float], device: str, features_of: Path | None = None
) -> Evaluation:
    """Evaluate checkpoint `inn` on the images below `folder`; write three tables and two figures to `out`.

    The tables show the bundled network beside another one, on the same pixels.
    """
    network = HighFrequencyINN.from_pretrained(inn).to(device)
    paths = list_images(folder, except_below=out)
    picture = features_of and read_image(features_of)  # a missing picture or folder shows before the work
    check_output(out)
    evaluation = _evaluate_beside_bundled(inn, network, paths, noises, device)
    write_table(out / "coders.csv", evaluation.coders)
    write_table(out / "levels.csv", evaluation.levels)
    write_table(out / "responses.csv", evaluation.responses)
    plot_evaluation(out / "evaluation.png", evaluation)
    if picture is None:
        picture = read_image(next(path for path in paths if str(path) not in evaluation.skipped))
    plot_features(out / "features.png", network, picture.to(device))
    return evaluation
