"""Judging super-resolved photographs: distortion against GT, perception against the statistics of photographs.

    judge = Judge(gts)
    judge(srs) -> {"psnr": [27.9, ...], "detail_energy": [[3.1, 4.0], ...], "kid": 0.21, ...}
    mean(judge(srs)["psnr"]) -> 27.9

A value is a list with one figure a photograph, a list of [numerator, denominator] whose sums are divided (so that one
flat photograph cannot own the mean), or one figure of all photographs together. `METRICS` says which is better.

Distortion measures compare each SR image with its GT, perception measures compare distributions: no method can be
best in both (Blau and Michaeli, CVPR 2018, arXiv 1711.06077), so the figures belong side by side. Every judge sees
what a viewer would: values clamped to [0, 1] and rounded to 8 bits, with a border of 4 pixels cut, in RGB unless it
says luma.
"""

from __future__ import annotations

import functools
import math
import socket
import statistics
import sys
import warnings
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.peers import PEERS
from mghf_loss import HighFrequencyINN

from . import efficientnet
from .photographs import LEAST_SIDE

Values: TypeAlias = "float | list[float | None] | list[list[float]]"

BORDER = 4
CONNECTION_TIMEOUT = 10  # seconds, of a download of weights
RINGS = 32  # of a radial spectrum, from 0 to the Nyquist frequency of 1/2 cycle per pixel
LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601
SHIFTS = 4  # of the grid of an x4 model
PERIOD, WINDOW = 4, 60  # of a pattern; the window holds whole periods of one more and one less too
DISPLAY = "standard_4k"


class Judge:
    """Judges images by their ground truths, (1, 3, H, W) in [0, 1] with H, W >= 200, whose features it keeps.

    A metric whose package or weights cannot be had is left out, and a line says so, once in a process.

    Raises:
        ValueError: naming the pair that does not fit and why.
    """

    def __init__(self, gts: Sequence[Tensor], names: Sequence[str] | None = None) -> None:
        for index, gt in enumerate(gts):
            if gt.ndim != 4 or gt.shape[:2] != (1, 3) or min(gt.shape[2:]) < LEAST_SIDE:
                raise ValueError(f"gt {index}: expected (1, 3, H, W) with H, W >= {LEAST_SIDE}, got {tuple(gt.shape)}")
        self.names = tuple(METRICS) if names is None else names
        self.gts = [as_seen(gt) for gt in gts]
        self.known: dict[str, Any] = {}

    def features(self, name: str, of: Callable[[list[Tensor]], Any]) -> Any:
        """`of` the ground truths, computed once."""
        if name not in self.known:
            self.known[name] = of(self.gts)
        return self.known[name]

    @torch.no_grad()
    def __call__(self, srs: Sequence[Tensor]) -> dict[str, Values]:
        """All metrics of the super-resolved images, in the order of the ground truths; values outside are clamped."""
        for index, (sr, gt) in enumerate(zip(srs, self.gts, strict=True)):
            wanted = (1, 3, *(side + 2 * BORDER for side in gt.shape[2:]))
            if sr.shape != wanted or not sr.isfinite().all():
                raise ValueError(f"sr {index}: expected finite values of shape {wanted}, got shape {tuple(sr.shape)}")
        seen, results = [as_seen(sr) for sr in srs], {}
        for name in self.names:
            try:
                results[name] = METRICS[name].measure(self, seen)
            except ImportError as error:
                _left_out(name, str(error))
        return results


def mean(values: Values) -> float:
    """What the values of one metric say of all photographs."""
    if isinstance(values, (int, float)):
        return float(values)
    known = torch.tensor([value for value in values if value is not None], dtype=torch.double)
    if not len(known):
        return math.nan
    return (known[:, 0].sum() / known[:, 1].sum() if known.ndim == 2 else known.mean()).item()


def badness(metric: str, value: float) -> float:
    """Less is better, whatever the metric."""
    return {"higher": -value, "lower": value, "one": abs(value - 1), "zero": abs(value)}[METRICS[metric].better]


def as_seen(image: Tensor) -> Tensor:
    """Clamp to [0, 1], round to 8 bits, cut the border."""
    image = (image.float().clamp(0, 1) * 255).round() / 255
    return image[..., BORDER:-BORDER, BORDER:-BORDER]


@functools.cache  # once in a process, not once a call
def _left_out(name: str, reason: str) -> None:
    print(f"left out {name}: {reason}", flush=True)


def per_pair(measure: Callable[[Tensor, Tensor], Any]) -> Callable[[Judge, list[Tensor]], Values]:
    """A metric of one pair, or its numerator and denominator."""

    def measure_all(judge: Judge, srs: list[Tensor]) -> Values:
        found = [measure(sr, gt) for sr, gt in zip(srs, judge.gts, strict=True)]
        return [list(map(float, each)) if isinstance(each, tuple) else float(each) for each in found]  # pyright: ignore

    return measure_all


def by_piq(name: str) -> Callable[[Judge, list[Tensor]], Values]:
    """A function of piq, https://github.com/photosynthesis-team/piq."""
    return per_pair(lambda sr, gt: getattr(import_module("piq"), name)(sr, gt, data_range=1.0))


def by_peer(name: str) -> Callable[[Judge, list[Tensor]], Values]:
    """LPIPS or DISTS by its authors' package and weights, which are downloaded."""

    def measure(sr: Tensor, gt: Tensor) -> Tensor:
        module = _peer(name, str(sr.device))
        if isinstance(module, Exception):
            raise ImportError(" ".join(f"{type(module).__name__}: {module}".split())[:200])
        return PEERS[name].call(module, sr, gt)

    return per_pair(measure)


@functools.cache  # a failure too: no second attempt to download
def _peer(name: str, device: str) -> nn.Module | Exception:
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(CONNECTION_TIMEOUT)
    try:
        return PEERS[name].build().to(device)
    except Exception as error:  # of whatever a download raises
        return error
    finally:
        socket.setdefaulttimeout(before)


@functools.cache
def _colour_video_vdp(device: str) -> Any:
    return import_module("pycvvdp").cvvdp(display_name=DISPLAY, device=torch.device(device))


def jod(sr: Tensor, gt: Tensor) -> float:
    """Just objectionable differences below 10 on a 4K display, by ColorVideoVDP.

    Reference: Mantiuk et al., SIGGRAPH 2024, https://github.com/gfxdisp/ColorVideoVDP.
    """
    metric = _colour_video_vdp(str(sr.device))
    return metric.predict(sr[0], gt[0], dim_order="CHW", frames_per_second=0)[0].item()


def niqe(image: Tensor) -> float | None:
    """NIQE by BasicSR's `calculate_niqe` and the authors' pristine model inside that package; None for flat images.

    On MATLAB's luma (`convert_to="y"`: 16-235) in blocks of 96 x 96, of which two must not be constant; the border is
    cut already (`crop_border=0`).

    Reference: Mittal et al., "Making a completely blind image quality analyzer", SPL 2013.
    """
    import numpy as np

    calculate = _basicsr_niqe()
    bgr = (image[0] * 255).round().permute(1, 2, 0).flip(-1).cpu().numpy()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # constant blocks give nan, which NIQE leaves out
        try:
            score = float(calculate(bgr, crop_border=0, input_order="HWC", convert_to="y"))
        except np.linalg.LinAlgError:  # fewer than two blocks are left
            return None
    return score if math.isfinite(score) else None


@functools.cache
def _basicsr_niqe() -> Callable[..., float]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its old imports
        # BasicSR 1.4.2 imports a module by the name that it had before torchvision 0.17.
        tensors = import_module("torchvision.transforms._functional_tensor")
        sys.modules.setdefault("torchvision.transforms.functional_tensor", tensors)
        return import_module("basicsr.metrics.niqe").calculate_niqe


def radial_spectrum(image: Tensor) -> Tensor:
    """Mean power of luma in rings of frequency, (RINGS,), in grey levels^2 per pixel; ring 0 holds the mean.

    P(k) = mean over k <= 2 RINGS |f| < k + 1 of |FFT(w (Y - mean Y))|^2 / sum w^2, f in cycles per pixel, w a Hann
    window, so that white noise of variance v has P = v. The 1/12 of 8-bit rounding is added, as what cannot
    be seen: a spectrum is never 0.
    """
    luma = 255 * (image[0] * torch.tensor(LUMA).to(image)[:, None, None]).sum(0)
    height, width = luma.shape
    row, column = (torch.hann_window(side, periodic=False).to(image) for side in (height, width))
    window = row[:, None] * column
    power = torch.fft.fft2(window * (luma - luma.mean())).abs().square() / window.square().sum()
    frequency = torch.hypot(torch.fft.fftfreq(height)[:, None], torch.fft.fftfreq(width)[None]).to(image)
    ring = (2 * RINGS * frequency).long().flatten()
    total, count = (torch.bincount(ring, weights.flatten()) for weights in (power, torch.ones_like(power)))
    return (total / count)[:RINGS] + 1 / 12  # the corners beyond Nyquist are of diagonals only


def spectrum_error(sr: Tensor, gt: Tensor) -> Tensor:
    """RMS over rings, but ring 0, of log10 P_sr(k) - log10 P_gt(k), in decades."""
    return (radial_spectrum(sr) / radial_spectrum(gt)).log10()[1:].square().mean().sqrt()


def detail_energy(sr: Tensor, gt: Tensor) -> tuple[float, float]:
    """Energies of the two finest Haar detail levels of SR and GT; more than GT's is too much detail.

    The Haar basis is orthonormal, so that this energy is what block means leave: sum (x - mean of its 4 x 4 block)^2.
    """

    def energy(image: Tensor) -> float:
        height, width = (side // 4 * 4 for side in image.shape[-2:])
        image = image[..., :height, :width].double()
        return (image - F.interpolate(F.avg_pool2d(image, 4), scale_factor=4)).square().sum().item()

    return energy(sr), energy(gt)


@functools.cache
def _network(device: str) -> HighFrequencyINN:
    return HighFrequencyINN.from_pretrained("bundled").requires_grad_(False).to(device)


def _phases(image: Tensor) -> list[list[Tensor]]:
    """Features of the levels at diagonal shifts 0 to 3."""
    height, width = (side // 8 * 8 - 8 for side in image.shape[-2:])
    network = _network(str(image.device))
    return [network.features(2 * image[..., s : s + height, s : s + width] - 1) for s in range(SHIFTS)]


def _others_and_at_phase(sr: list[list[Tensor]], gt: list[list[Tensor]]) -> tuple[float, float]:
    at_phase, *others = (
        statistics.fmean(F.mse_loss(*level).item() for level in zip(*levels, strict=True))
        for levels in zip(sr, gt, strict=True)
    )
    return sum(others) / len(others), at_phase


def grid_locks(judge: Judge, srs: list[Tensor]) -> Values:
    """Mean content (MGHF-n) at diagonal shifts 1 to 3, and content at shift 0, the phase of training."""
    gts = judge.features("phases", lambda images: [_phases(image) for image in images])
    return [list(_others_and_at_phase(_phases(sr), gt)) for sr, gt in zip(srs, gts, strict=True)]


def pattern(sr: Tensor, gt: Tensor) -> tuple[float, float]:
    """Energy of SR's details that repeats every 4 pixels, beyond what repeats every 3 and 5, and all of it.

    Details are luma minus its mean over 5 x 5; what repeats every p pixels is their mean over the places of equal
    phase, (row mod p, column mod p), in windows of 60 x 60. A pixel shuffle, a transposed convolution or a loss on a
    grid may leave such a pattern, and NIQE, KID and the spectrum take it for detail. Edges repeat a little at every
    period: the neighbouring periods say how much. A texture of 4 pixels in the photograph counts too, and one of 3 or
    5 counts below 0, so compare with an L1 model. A pattern in colour alone is not seen.
    """
    luma = torch.einsum("bchw,c->bhw", sr.double(), sr.new_tensor(LUMA).double())
    details = luma - F.avg_pool2d(F.pad(luma, (2, 2, 2, 2), mode="replicate"), 5, 1)
    windows = F.unfold(details[:, None], WINDOW, stride=WINDOW)[0].T

    def repeating(period: int) -> float:
        cells = windows.unflatten(1, (WINDOW // period, period, WINDOW // period, period)).mean((1, 3)).flatten(1)
        return cells.var(1, correction=0).sum().item()

    excess = repeating(PERIOD) - (repeating(PERIOD - 1) + repeating(PERIOD + 1)) / 2
    return excess, windows.square().mean(1).sum().item()


def kid(sr_features: Tensor, gt_features: Tensor) -> float:
    """Kernel distance (squared MMD) of two sets of n features (n, d), k(a, b) = (a.b / d + 1)^3.

    sum_{i != j} (k(x_i, x_j) + k(y_i, y_j) - 2 k(x_i, y_j)) / (n (n - 1))

    The unbiased estimate for samples in pairs, x_i and y_i being of one location: k(x_i, y_i) is left out like
    k(x_i, x_i), so that equal sets have the distance 0. All samples at once, no random subsets.

    Reference: Bińkowski et al., arXiv 1801.01401 (KID); Gretton et al., JMLR 2012, equation 4.
    """
    n, d = gt_features.shape

    def total(a: Tensor, b: Tensor) -> Tensor:
        kernel = (a @ b.T / d + 1) ** 3
        return kernel.sum(dtype=torch.double) - kernel.diagonal().sum(dtype=torch.double)

    cross = total(sr_features, gt_features)
    return ((total(sr_features, sr_features) + total(gt_features, gt_features) - 2 * cross) / (n * (n - 1))).item()


def patch_kid(number: int, judge: Judge, srs: list[Tensor]) -> Values:
    """`kid` of the patches of all images in EfficientNet-Lite0 or -Lite2."""
    of = functools.partial(efficientnet.patch_features, number=number)
    return kid(of(srs), judge.features(f"patches {number}", of))


def feature_distance(judge: Judge, srs: list[Tensor]) -> Values:
    """Mean over locations of |u_sr - u_gt|^2, u the unit vector over channels, mean over depths, in [0, 4].

    LPIPS without its learned weights, on EfficientNet-Lite0's maps at strides 2 to 16.

    Reference: Zhang et al., CVPR 2018 (LPIPS).
    """

    def directions(images: list[Tensor]) -> list[list[Tensor]]:
        return [[F.normalize(level, dim=1) for level in efficientnet.maps(image)] for image in images]

    def distance(sr: list[Tensor], gt: list[Tensor]) -> float:
        levels = [(s - g).square().sum(1).mean() for s, g in zip(sr, gt, strict=True)]
        return torch.stack(levels).mean().item()

    return [distance(*pair) for pair in zip(directions(srs), judge.features("maps", directions), strict=True)]


class Metric(NamedTuple):
    """A measure, and whether more is better, less, or nearer to 1 or 0."""

    better: Literal["higher", "lower", "one", "zero"]
    measure: Callable[[Judge, list[Tensor]], Values]


# Distortion first, then perception.
METRICS = {
    "psnr": Metric("higher", by_piq("psnr")),
    "ssim": Metric("higher", by_piq("ssim")),
    "ms_ssim": Metric("higher", by_piq("multi_scale_ssim")),
    "gmsd": Metric("lower", by_piq("gmsd")),
    "mdsi": Metric("lower", by_piq("mdsi")),
    "haarpsi": Metric("higher", by_piq("haarpsi")),
    "vif": Metric("higher", by_piq("vif_p")),
    "jod": Metric("higher", per_pair(jod)),
    "feature_distance": Metric("lower", feature_distance),
    "lpips": Metric("lower", by_peer("lpips")),
    "dists": Metric("lower", by_peer("dists")),
    "niqe": Metric("lower", lambda judge, srs: [niqe(sr) for sr in srs]),
    "kid": Metric("lower", functools.partial(patch_kid, 0)),
    "kid_lite2": Metric("lower", functools.partial(patch_kid, 2)),
    "spectrum_error": Metric("lower", per_pair(spectrum_error)),
    "detail_energy": Metric("one", per_pair(detail_energy)),
    "grid_lock": Metric("lower", grid_locks),
    "pattern": Metric("zero", per_pair(pattern)),
}
