"""The losses that quality.py compares: each is called as loss(sr, gt, generator) and returns a 0-d tensor.

`sr` and `gt` are (B, 3, H, W) in [0, 1], `sr` unclamped; `generator` is for what is drawn at random. Peers go
through their public API; the two that are formulas rather than packages (`dct`, `wavelet`) stand here on a package's
transform.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from losses import focal_frequency, one_minus, ssim
from metrics import efficientnet_maps
from torch import Tensor, nn

from mghf_loss import DinoJSDLoss, MGHFLoss, MGHFnLoss
from mghf_loss.mghf import COEFFICIENTS

Loss = Callable[[Tensor, Tensor, torch.Generator], Tensor]
DCT_BLOCK = 8


def build(kind: str, options: Mapping[str, Any], device: str) -> Loss:
    """Return the loss of `kind` with the constructor's `options` on `device`; raise what its package raises."""
    if kind not in BUILDERS:
        raise ValueError(f"unknown loss type {kind!r}; known are {', '.join(BUILDERS)}")
    return BUILDERS[kind](device, **options)


def without_generator(loss: Callable[[Tensor, Tensor], Tensor]) -> Loss:
    return lambda sr, gt, generator: loss(sr, gt)


def module(build: Callable[..., nn.Module], device: str, **options: Any) -> Loss:
    """A module that is called with `sr` and `gt`."""
    return without_generator(build(**options).to(device).requires_grad_(False))


def similarity(build: Callable[..., nn.Module], device: str, **options: Any) -> Loss:
    """1 - a module that is 1 for equal images."""
    return without_generator(partial(one_minus, build(**options).to(device)))


def coefficients(options: Mapping[str, Any]) -> dict[str, float]:
    """All coefficients of a `mghf` with these options."""
    times = {term: COEFFICIENTS["paper"][term] * factor for term, factor in options.get("times", {}).items()}
    return {**COEFFICIENTS["paper"], **options.get("coefficients", {}), **times}


def mghf(device: str, dense: bool = False, **options: Any) -> Loss:
    """MGHFLoss; `times` multiplies single default coefficients, `dense` is `patches=None`, which TOML cannot say."""
    options["coefficients"] = coefficients(options)
    options.pop("times", None)
    if dense:
        options["patches"] = None
    criterion = MGHFLoss(**options).to(device)
    return lambda sr, gt, generator: criterion(sr, gt, generator=generator)


def ms_ssim(**options: Any) -> nn.Module:
    from pytorch_msssim import MS_SSIM

    # Five scales of the default window of 11 need more than 160 pixels; this one takes crops of 65 and up.
    return MS_SSIM(data_range=1.0, channel=3, win_size=5, **options)


def dct(device: str) -> Loss:
    """Mean |DCT(sr) - DCT(gt)| over the 63 alternating coefficients of 8 x 8 blocks (orthonormal DCT-II)."""
    import numpy as np
    from scipy.fft import dct as transform

    rows = torch.as_tensor(np.asarray(transform(np.eye(DCT_BLOCK), norm="ortho", axis=0)))  # [frequency, place]
    basis = torch.einsum("uy,vx->uvyx", rows, rows).reshape(-1, 1, DCT_BLOCK, DCT_BLOCK)[1:]
    kernels = basis.float().to(device).repeat(3, 1, 1, 1)

    def loss(sr: Tensor, gt: Tensor) -> Tensor:
        return F.conv2d(sr - gt, kernels, stride=DCT_BLOCK, groups=3).abs().mean()

    return without_generator(loss)


def wavelet(device: str, name: str = "db2", levels: int = 3) -> Loss:
    """Mean |W(sr) - W(gt)| over the detail coefficients of an orthonormal wavelet, mean over the levels."""
    from ptwt.conv_transform_2 import wavedec2

    def loss(sr: Tensor, gt: Tensor) -> Tensor:
        _, *details = wavedec2(sr - gt, name, level=levels)  # linear: the transform of the difference
        return torch.stack([torch.stack(list(bands)).abs().mean() for bands in details]).mean()

    return without_generator(loss)


def efficientnet(device: str) -> Loss:
    """Mean |F_sr - F_gt| / mean |F_gt| of the maps of an ImageNet-trained EfficientNet-Lite0, mean over depths."""
    efficientnet_maps(torch.rand(1, 3, 32, 32, device=device))  # raises where the package is missing

    def loss(sr: Tensor, gt: Tensor) -> Tensor:
        with torch.no_grad():
            gt_maps = efficientnet_maps(gt)
        pairs = zip(efficientnet_maps(sr), gt_maps, strict=True)
        return torch.stack([(s - g).abs().mean() / g.abs().mean() for s, g in pairs]).mean()

    return without_generator(loss)


def lpips(net: str = "alex") -> nn.Module:
    from lpips import LPIPS

    return LPIPS(net=net, verbose=False)


def lpips_on_unit_range(device: str, net: str = "alex") -> Loss:
    network = lpips(net).to(device).requires_grad_(False)
    return lambda sr, gt, generator: network(sr, gt, normalize=True).mean()


def dists(device: str) -> Loss:
    from DISTS_pytorch import DISTS

    network = DISTS().to(device).requires_grad_(False)
    return lambda sr, gt, generator: network(sr, gt, require_grad=True, batch_average=True)


BUILDERS: dict[str, Callable[..., Loss]] = {
    "ssim": partial(similarity, partial(ssim, "SSIM")),
    "ms-ssim": partial(similarity, ms_ssim),
    "focal-frequency": partial(module, focal_frequency),
    "dct": dct,
    "wavelet": wavelet,
    "efficientnet": efficientnet,
    "lpips": lpips_on_unit_range,
    "dists": dists,
    "MGHFnLoss": partial(module, MGHFnLoss),
    "MGHFLoss": mghf,
    "DinoJSDLoss": partial(module, DinoJSDLoss),
}
