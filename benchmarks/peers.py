"""The peers by their public API: how each is built, with its pretrained weights or without, and called."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest import mock

from torch import Tensor, nn


def mean_value(loss: nn.Module, sr: Tensor, gt: Tensor) -> Tensor:
    return loss(sr, gt).mean()


def one_minus(loss: nn.Module, sr: Tensor, gt: Tensor) -> Tensor:
    return 1 - loss(sr, gt)


def on_unit_range(loss: nn.Module, sr: Tensor, gt: Tensor) -> Tensor:
    """Of an LPIPS, which expects [-1, 1] and converts from [0, 1] when told so."""
    return loss(sr, gt, normalize=True).mean()


def with_gradient(loss: nn.Module, sr: Tensor, gt: Tensor) -> Tensor:
    """Of DISTS, whose default call passes no gradient through the network."""
    return loss(sr, gt, require_grad=True, batch_average=True)


def lpips(net: str = "alex", pretrained: bool = True) -> nn.Module:
    from lpips import LPIPS

    return LPIPS(net=net, pretrained=pretrained, pnet_rand=not pretrained, verbose=False)


def dists(pretrained: bool = True) -> nn.Module:
    import torchvision
    from DISTS_pytorch import DISTS

    if pretrained:
        return DISTS()
    # The constructor always asks torchvision for pretrained weights; it gets the same network without them.
    vgg = torchvision.models.vgg16(weights=None)
    with mock.patch("torchvision.models.vgg16", return_value=vgg):
        return DISTS(load_weights=False)


def piq(name: str) -> nn.Module:
    import piq
    import torchvision

    vgg = torchvision.models.vgg16(weights=None).features
    return getattr(piq, name)(feature_extractor=vgg, layers=("15",), weights=[1.0])


def torchmetrics_lpips() -> nn.Module:
    # The public class has no way around the download of the trunk.
    from torchmetrics.functional.image.lpips import _LPIPS

    return _LPIPS(net="vgg", pnet_rand=True)


def ssim(name: str, **options: Any) -> nn.Module:
    import pytorch_msssim

    return getattr(pytorch_msssim, name)(data_range=1.0, channel=3, **options)


def kornia_ssim() -> nn.Module:
    from kornia.losses import SSIMLoss

    return SSIMLoss(11)


def focal_frequency() -> nn.Module:
    from focal_frequency_loss import FocalFrequencyLoss

    return FocalFrequencyLoss()


@dataclass(frozen=True)
class Peer:
    """A loss of another distribution: how it is built and called."""

    package: str
    build: Callable[..., nn.Module]
    call: Callable[[nn.Module, Tensor, Tensor], Tensor] = mean_value


PEERS = {
    "lpips": Peer("lpips", lpips, on_unit_range),
    "dists": Peer("DISTS-pytorch", dists, with_gradient),
    "ssim": Peer("pytorch-msssim", partial(ssim, "SSIM"), one_minus),
    # Five scales of the default window of 11 need more than 160 pixels; this one takes crops of 65 and up.
    "ms-ssim": Peer("pytorch-msssim", partial(ssim, "MS_SSIM", win_size=5), one_minus),
    "focal-frequency": Peer("focal-frequency-loss", focal_frequency),
}
