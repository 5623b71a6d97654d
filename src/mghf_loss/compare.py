"""`mghf-loss compare`: PSNR, SSIM and the terms of image files, with bicubic interpolation as a yardstick."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch.nn.functional as F
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torch import Tensor
from tqdm import tqdm

from ._files import image_size, read_image, write_atomically, write_table
from .criterion import Criterion
from .metric import TILE, distances, tile_slices
from .training.data import list_images

SCALE = 4  # of the yardstick
SSIM_WINDOW = 11
HIGHER_IS_BETTER = {"psnr", "ssim"}
LABELS = {"psnr": "PSNR", "ssim": "SSIM"}
ARROWS = "↑↓"  # higher, lower is better
Values = dict[str, float | None]


@dataclass(frozen=True)
class Pair:
    """An SR image and its GT, with the name that the two share."""

    name: str
    sr: Path
    gt: Path


@dataclass(frozen=True)
class Measured:
    """The values of one pair, by name: of SR, and of GT after bicubic reduction and enlargement by 4."""

    name: str
    sr: Values
    bicubic: Values


@dataclass(frozen=True)
class Comparison:
    """Values of all pairs in the order of their names, and why the other files were skipped, by name."""

    images: list[Measured]
    skipped: dict[str, str]

    @property
    def mean(self) -> Measured:
        """The mean over images, of PSNR in dB."""
        columns = [[image.sr for image in self.images], [image.bicubic for image in self.images]]
        return Measured("mean", *({name: _mean([row[name] for row in rows]) for name in rows[0]} for rows in columns))


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def measure(
    criterion: Criterion,
    sr: Tensor,
    gt: Tensor,
    name: str = "",
    *,
    tile: int = TILE,
    progress: Callable[[], object] = lambda: None,
) -> Measured:
    """Measure one pair, (1, 3, H, W) in [0, 1]: what `mghf-loss compare` prints of it.

    PSNR in dB and SSIM are those of scikit-image on RGB, without a border cut off. SSIM has the Gaussian window of Wang
    et al. (2004), and is None below 11 x 11. The terms and `total` are `mghf_loss.metric.distance` with `tile`.
    """
    yardstick = bicubic(gt)
    values = []
    for image, (total, terms) in zip(
        (sr, yardstick), distances(criterion, [sr, yardstick], gt, tile=tile, progress=progress), strict=True
    ):
        by_name = {term: value.item() for term, value in terms.items()}
        values.append({**_pixel_metrics(image, gt), **by_name, "total": total.item()})
    return Measured(name, *values)


def bicubic(gt: Tensor) -> Tensor:
    """Reduce to a quarter, bicubic and antialiased, and enlarge again to the same size: detail that no model added."""
    small = [math.ceil(side / SCALE) for side in gt.shape[-2:]]
    reduced = F.interpolate(gt, small, mode="bicubic", antialias=True, align_corners=False)
    return F.interpolate(reduced, gt.shape[-2:], mode="bicubic", align_corners=False).clamp(0, 1)


def _pixel_metrics(image: Tensor, gt: Tensor) -> Values:
    a, b = (tensor[0].permute(1, 2, 0).cpu().numpy() for tensor in (image, gt))
    equal = np.array_equal(a, b)
    psnr = math.inf if equal else float(peak_signal_noise_ratio(b, a, data_range=1))
    if min(a.shape[:2]) < SSIM_WINDOW:
        return {"psnr": psnr, "ssim": None}
    window = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    return {"psnr": psnr, "ssim": float(np.mean(structural_similarity(b, a, data_range=1, channel_axis=2, **window)))}


def find_pairs(sr: Path, gt: Path) -> tuple[list[Pair], dict[str, str]]:
    """Return the pairs of two files or of two folders, and why the other files are left out, by name.

    Files below two folders, searched recursively, belong together where their paths agree but for the suffix.

    Raises:
        OSError: one of two files cannot be read, or a folder holds no images.
        ValueError: a file is given with a folder, or a folder holds two images of one name.
    """
    if sr.is_dir() != gt.is_dir():
        raise ValueError(f"give two files or two folders, got {sr} and {gt}")
    if not sr.is_dir():
        for path in (sr, gt):
            image_size(path)
        return [Pair(sr.name, sr, gt)], {}
    srs, gts = _by_name(sr), _by_name(gt)
    pairs: list[Pair] = []
    skipped = dict.fromkeys(gts.keys() - srs.keys(), f"{sr} has no image of this name")
    skipped |= dict.fromkeys(srs.keys() - gts.keys(), f"{gt} has no image of this name")
    for name in srs.keys() & gts.keys():
        try:
            sizes = [image_size(path) for path in (srs[name], gts[name])]
        except OSError as error:
            skipped[name] = str(error)
            continue
        if sizes[0] == sizes[1]:
            pairs.append(Pair(name, srs[name], gts[name]))
        else:
            sr_size, gt_size = (f"{width} x {height}" for height, width in sizes)
            skipped[name] = f"SR is {sr_size} pixels, GT is {gt_size}"
    return sorted(pairs, key=lambda pair: pair.name), skipped


def _by_name(folder: Path) -> dict[str, Path]:
    paths: dict[str, Path] = {}
    for path in list_images(folder):
        name = path.relative_to(folder).with_suffix("").as_posix()
        if name in paths:
            raise ValueError(f"two images of one name: {paths[name]} and {path}")
        paths[name] = path
    return paths


def compare_files(
    criterion: Criterion,
    sr: Path,
    gt: Path,
    *,
    tile: int = TILE,
    device: str = "cpu",
    each: Callable[[Measured, Tensor, Tensor], object] = lambda *_: None,
) -> Comparison:
    """Measure two files or two folders of images, with a progress bar over their tiles.

    `each` is called with the values of a pair and its images.

    Raises:
        OSError, ValueError: as `find_pairs`; one of two files cannot be compared; no pair of two folders can.
    """
    pairs, skipped = find_pairs(sr, gt)
    measured = []
    tiles = {pair.name: len(tile_slices(*image_size(pair.gt), tile, criterion.least_size)) for pair in pairs}
    # On the terminal alone, and gone at the end: a log needs no bar.
    with tqdm(total=sum(tiles.values()), desc="compare", unit="tile", leave=False, disable=None) as progress:
        done = 0
        for pair in pairs:
            try:
                sr_image, gt_image = (read_image(path).to(device) for path in (pair.sr, pair.gt))
                values = measure(criterion, sr_image, gt_image, pair.name, tile=tile, progress=progress.update)
            except (OSError, ValueError) as error:  # damaged, or too small
                if not sr.is_dir():
                    raise
                skipped[pair.name] = str(error)
            else:
                measured.append(values)
                each(values, sr_image, gt_image)
            done += tiles[pair.name]
            progress.update(done - progress.n)
    if not measured:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in sorted(skipped.items()))
        raise ValueError(f"there is no pair to compare: {reasons}")
    return Comparison(measured, dict(sorted(skipped.items())))


def pair_table(values: Measured, coefficients: Mapping[str, float], arrows: str = ARROWS) -> list[dict[str, object]]:
    """Return a row for each value of one pair: SR's and the yardstick's, and its share in the total."""
    total = values.sr["total"]
    rows: list[dict[str, object]] = []
    for name, value in values.sr.items():
        higher = name in HIGHER_IS_BETTER
        row: dict[str, object] = {"": LABELS.get(name, name), "SR": value, "bicubic x4": values.bicubic[name]}
        row["better"] = f"{arrows[not higher]} {'higher' if higher else 'lower'}"
        row |= {"coefficient": coefficients.get(name), "share": None}
        if name in coefficients and total and value is not None:
            row["share"] = f"{coefficients[name] * value / total:.1%}"
        rows.append(row)
    return rows


def folder_table(comparison: Comparison, arrows: str = ARROWS) -> list[dict[str, object]]:
    """Return a row for each pair of two folders, then their mean and that of the yardstick."""
    mean = comparison.mean
    headers = {name: f"{LABELS.get(name, name)} {arrows[name not in HIGHER_IS_BETTER]}" for name in mean.sr}
    rows = {image.name: image.sr for image in comparison.images}
    rows |= {"mean": mean.sr, "mean of bicubic x4": mean.bicubic}
    return [
        {"image": label, **{header: values[name] for name, header in headers.items()}} for label, values in rows.items()
    ]


def write_csv(path: Path, comparison: Comparison) -> None:
    """Write a row for each image; the yardstick's columns begin with `bicubic_`, and a missing value is empty."""
    rows = []
    for image in comparison.images:
        bicubic = {f"bicubic_{name}": value for name, value in image.bicubic.items()}
        rows.append({"image": image.name, **image.sr, **bicubic})
    write_table(path, rows)


def write_json(path: Path, comparison: Comparison, settings: Mapping[str, object]) -> None:
    """Write settings, values of each image, their means, and what was skipped; an infinite PSNR is null, as in JSON."""
    rows = [{"image": image.name, "sr": image.sr, "bicubic": image.bicubic} for image in comparison.images]
    mean = comparison.mean
    content = {
        "settings": dict(settings),
        "images": [{key: _finite(value) for key, value in row.items()} for row in rows],
        "mean": {"sr": _finite(mean.sr), "bicubic": _finite(mean.bicubic)},
        "skipped": comparison.skipped,
    }
    text = json.dumps(content, indent=2, allow_nan=False) + "\n"
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def _finite(values: str | Values) -> str | Values:
    if isinstance(values, str):
        return values
    return {name: value if value is not None and math.isfinite(value) else None for name, value in values.items()}


def plot_heatmap(path: Path, sr: Tensor, gt: Tensor, maps: Mapping[str, Tensor]) -> None:
    """Draw SR, GT, |SR - GT| and the heat maps (1, H, W), one screen pixel for each pixel of the image.

    The heat maps share one scale, which ends where one pixel in a hundred of `total` is above it. Images below
    256 pixels are enlarged by a whole number.
    """
    from matplotlib import pyplot as plt
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    height, width = sr.shape[-2:]
    zoom = max(1, 256 // max(height, width))
    height, width = zoom * height, zoom * width
    error = (sr - gt).abs().mean(1)[0].cpu().numpy()
    heat = {name: maps[name][0].cpu().numpy() for name in ("total", *(name for name in maps if name != "total"))}
    scales = {
        "mean over colours of |SR - GT|": Normalize(0, max(float(np.quantile(error, 0.99)), 1e-30)),
        "|d(coefficient x term) / d SR|": Normalize(0, max(float(np.quantile(heat["total"], 0.99)), 1e-30)),
    }
    error_scale, heat_scale = scales.values()
    panels = {"SR": (sr, None), "GT": (gt, None), "|SR - GT|": (error, error_scale)}
    panels |= {name: (panel, heat_scale) for name, panel in heat.items()}
    columns = math.ceil(len(panels) / 2)

    text = max(14, height // 24)  # pixels
    line, dpi = 2 * text, 100
    sheet_width, sheet_height = columns * (width + text) + 9 * text, 2 * (height + line) + text
    figure = plt.figure(figsize=(sheet_width / dpi, sheet_height / dpi), dpi=dpi)
    points = text * 72 / dpi

    def place(left: float, top: float, width: float, height: float) -> tuple[float, float, float, float]:
        bottom = sheet_height - top - height
        return left / sheet_width, bottom / sheet_height, width / sheet_width, height / sheet_height

    for index, (name, (panel, scale)) in enumerate(panels.items()):
        row, column = divmod(index, columns)
        axis = figure.add_axes(place(text + column * (width + text), line + row * (height + line), width, height))
        axis.set_axis_off()
        axis.set_title(name, fontsize=points, pad=points / 4)
        if isinstance(panel, Tensor):
            axis.imshow(panel[0].permute(1, 2, 0).cpu().numpy().clip(0, 1), interpolation="nearest", aspect="auto")
        else:
            axis.imshow(panel, cmap="inferno", norm=scale, interpolation="nearest", aspect="auto")
    for row, (label, scale) in enumerate(scales.items()):
        axis = figure.add_axes(place(columns * (width + text) + text, line + row * (height + line), text, height))
        bar = figure.colorbar(ScalarMappable(scale, "inferno"), cax=axis, extend="max")
        bar.ax.tick_params(labelsize=points * 0.7)
        bar.ax.yaxis.get_offset_text().set_fontsize(points * 0.7)
        bar.set_label(label, fontsize=points * 0.7)
    write_atomically(path, lambda temporary: figure.savefig(temporary, dpi=dpi))
    plt.close(figure)
