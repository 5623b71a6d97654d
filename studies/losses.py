"""The losses that are compared: ours, controls, peers by their public API.

`build(type, options, device)` returns a function (sr, gt, generator) -> 0-d tensor of images (B, 3, H, W) in [0, 1];
`generator` is for what is drawn at random. A type may also be `"module:function"`, of a function that is called with
`device` and the options.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.peers import PEERS
from mghf_loss import HighFrequencyINN, INNConfig, MGHFLoss, MGHFnLoss, calibrate
from mghf_loss.coupling import Bottleneck, ChannelMixing

from . import efficientnet

Loss = Callable[[Tensor, Tensor, torch.Generator], Tensor]
Difference = Callable[[Tensor, Tensor], Tensor]
DCT_BLOCK = 8
VARIANCE_BLOCK = 8
DIRECTIONS, PATCH_SIDES = 16, (3, 7)  # of random projections, new in each step, and of their patches

# Judges that a loss of this type minimises, or that look at the features that it minimises.
OPTIMISED: dict[str, set[str]] = {
    "mse": {"psnr"},
    "ssim": {"ssim", "ms_ssim"},
    "ms-ssim": {"ssim", "ms_ssim"},
    "efficientnet": {"feature_distance", "kid"},
    "lpips": {"lpips"},
    "dists": {"dists"},
    "fft-l1": {"spectrum_error"},
    "focal-frequency": {"spectrum_error"},
}


def build(kind: str, options: Mapping[str, Any] | None = None, device: str = "cpu") -> Loss:
    """Return the loss of `kind`; raise what its package raises where it cannot be had."""
    options = dict(options or {})
    if kind in OURS:
        return ours(OURS[kind], device, **options)
    if kind in PEERS:
        peer = PEERS[kind]
        module = peer.build(**options).to(device).requires_grad_(False)
        return lambda sr, gt, generator: peer.call(module, sr, gt)
    if kind in FORMULAS:
        formula = functools.partial(FORMULAS[kind], **options)
        return lambda sr, gt, generator: formula(sr, gt)
    if kind in RANDOM:
        return functools.partial(RANDOM[kind], **options)
    if ":" in kind:
        module, _, function = kind.partition(":")
        return getattr(import_module(module), function)(device=device, **options)
    raise ValueError(f"unknown loss type {kind!r}, known are {', '.join(TYPES)} and module:function")


def gradient_ratio(loss: Loss, sr: Tensor, gt: Tensor) -> float:
    """Median over images of the norm of d loss / d sr, over that of L1: 1 / this is the factor of equal gradients."""
    return calibrate.gradient_ratio(lambda s, g: loss(s, g, torch.Generator().manual_seed(0)), [(sr, gt)])


def l1(sr: Tensor, gt: Tensor, generator: torch.Generator | None = None) -> Tensor:
    return F.l1_loss(sr, gt)


# Ours.


def ours(
    loss: type[MGHFLoss] | type[MGHFnLoss],
    device: str,
    *,
    network: str = "bundled",
    dense: bool = False,
    **options: Any,
) -> Loss:
    """One of our losses with its constructor's options, and what a configuration cannot say.

    Args:
        loss: the class.
        device: where.
        network: "haar" (plain details, scaled), "untrained", or what `inn` takes.
        dense: `patches=None`.
        options: the constructor's.
    """
    if dense:
        options["patches"] = None
    criterion = loss(inn=inn(network), **options).to(device)
    return lambda sr, gt, generator: criterion(sr, gt, generator=generator)


def inn(network: str) -> str | HighFrequencyINN:
    """The network of a loss, or the name of its checkpoint; see `ours`."""
    if network == "haar":
        haar = HighFrequencyINN(INNConfig(couplings=1, mixing="fixed"))  # new couplings are the identity
        for module in haar.modules():
            if isinstance(module, ChannelMixing):
                module.matrix.data = 8 * torch.eye(len(module.matrix))
        return haar
    if network == "untrained":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            untrained = HighFrequencyINN(HighFrequencyINN.from_pretrained("bundled").config)
            for module in untrained.modules():
                if isinstance(module, Bottleneck):  # whose last layer starts at 0
                    last = module[-1]
                    assert isinstance(last, nn.Conv2d)
                    last.reset_parameters()
        return untrained
    return network


# Controls and peers that are formulas.


def mse(sr: Tensor, gt: Tensor) -> Tensor:
    return F.mse_loss(sr, gt)


def fft_l1(sr: Tensor, gt: Tensor) -> Tensor:
    """Mean |FFT(sr) - FFT(gt)|. Reference: Cho et al., ICCV 2021 (MIMO-UNet)."""
    return torch.fft.rfft2(sr - gt, norm="ortho").abs().mean()


@functools.cache
def _dct_kernels() -> Tensor:
    import numpy as np
    from scipy.fft import dct as transform

    rows = torch.as_tensor(np.asarray(transform(np.eye(DCT_BLOCK), norm="ortho", axis=0)))  # (frequency, location)
    basis = torch.einsum("uy,vx->uvyx", rows, rows).reshape(-1, 1, DCT_BLOCK, DCT_BLOCK)[1:]
    return basis.float().repeat(3, 1, 1, 1)


def dct(sr: Tensor, gt: Tensor) -> Tensor:
    """Mean |DCT(sr) - DCT(gt)| over the 63 alternating coefficients of 8 x 8 blocks (orthonormal DCT-II)."""
    return F.conv2d(sr - gt, _dct_kernels().to(sr), stride=DCT_BLOCK, groups=3).abs().mean()


def wavelet(sr: Tensor, gt: Tensor, name: str = "db2", levels: int = 3) -> Tensor:
    """Mean |W(sr) - W(gt)| over the details of an orthonormal wavelet, mean over levels."""
    from ptwt.conv_transform_2 import wavedec2

    _, *details = wavedec2(sr - gt, name, level=levels)  # linear: the transform of the difference
    return torch.stack([torch.stack(list(bands)).abs().mean() for bands in details]).mean()


def gradient_variance(sr: Tensor, gt: Tensor) -> Tensor:
    """MSE of the variances of Sobel gradients in 8 x 8 blocks of luma. Reference: Abrahamyan et al., ICASSP 2022."""
    from kornia.color import rgb_to_grayscale
    from kornia.filters import spatial_gradient

    def variances(image: Tensor) -> Tensor:
        gradients = spatial_gradient(rgb_to_grayscale(image), normalized=False)[:, 0]
        blocks = F.unfold(gradients, VARIANCE_BLOCK, stride=VARIANCE_BLOCK)
        return blocks.unflatten(1, (2, -1)).var(2)

    return F.mse_loss(variances(sr), variances(gt))


def deep_features(sr: Tensor, gt: Tensor) -> Tensor:
    """Mean |F_sr - F_gt| / mean |F_gt| of the maps of EfficientNet-Lite0, mean over depths."""
    with torch.no_grad():
        gt_maps = efficientnet.maps(gt)
    pairs = zip(efficientnet.maps(sr), gt_maps, strict=True)
    return torch.stack([(s - g).abs().mean() / g.abs().mean() for s, g in pairs]).mean()


def _projections(image: Tensor, kernels: Tensor) -> Tensor:
    """Random projections of all patches, (B, DIRECTIONS, n)."""
    return F.conv2d(image, kernels.to(image)).flatten(2)


def _random_kernels(side: int, generator: torch.Generator) -> Tensor:
    kernels = torch.randn(DIRECTIONS, 3, side, side, generator=generator)
    return kernels / kernels.flatten(1).norm(dim=1)[:, None, None, None]


def patch_swd(sr: Tensor, gt: Tensor, generator: torch.Generator) -> Tensor:
    """Sliced Wasserstein distance of patches, new directions each call. Reference: Elnekave and Weiss, CVPR 2022."""
    distances = []
    for side in PATCH_SIDES:
        kernels = _random_kernels(side, generator)
        s, g = (_projections(image, kernels).sort(dim=2).values for image in (sr, gt))
        distances.append(F.l1_loss(s, g))
    return torch.stack(distances).mean()


def random_feature_mmd(sr: Tensor, gt: Tensor, generator: torch.Generator) -> Tensor:
    """Squared MMD of patches in random Fourier features of a Gaussian kernel of the patches' spread.

    Reference: Rahimi and Recht, NeurIPS 2007; Gretton et al., JMLR 2012.
    """
    distances = []
    for side in PATCH_SIDES:
        kernels = _random_kernels(side, generator)
        phase = 2 * torch.pi * torch.rand(DIRECTIONS, 1, generator=generator).to(sr)
        s, g = (_projections(image, kernels) for image in (sr, gt))
        scale = g.std(2, keepdim=True) + 1e-3
        s, g = ((projected / scale + phase).cos().mean(2) for projected in (s, g))
        distances.append(F.mse_loss(s, g))
    return torch.stack(distances).mean()


OURS: dict[str, type[MGHFLoss] | type[MGHFnLoss]] = {"MGHFLoss": MGHFLoss, "MGHFnLoss": MGHFnLoss}
FORMULAS: dict[str, Callable[..., Tensor]] = {
    "l1": l1,
    "mse": mse,
    "fft-l1": fft_l1,
    "dct": dct,
    "wavelet": wavelet,
    "gradient-variance": gradient_variance,
    "efficientnet": deep_features,
}
RANDOM: dict[str, Callable[..., Tensor]] = {"patch-swd": patch_swd, "random-mmd": random_feature_mmd}
# These change the images of the L1 model instead of training it: see `studies.models`.
TRAINING_FREE = ("unsharp-mask", "latent-gain")
TYPES = (*OURS, *PEERS, *FORMULAS, *RANDOM, *TRAINING_FREE)
