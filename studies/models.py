"""The models that are trained: a small CNN, a small transformer, a published one, a one-step student, a critic.

Each maps a task's input to an image, (B, 3, H, W). All but the published one start at what needs no training: the
bicubic enlargement, or the input itself.
"""

from __future__ import annotations

import itertools
import warnings
from typing import Any

import torch
import torch.nn.functional as F
from kornia.filters import gaussian_blur2d
from torch import Tensor, nn

from mghf_loss import HighFrequencyINN
from mghf_loss.toy import SCALE, SmallSR, upscale

from .tasks import is_sr

MODELS = ("small-sr", "small-swinir", "safmn", "one-step")
SR_ONLY = ("safmn", "one-step")
BLOCK = 2  # of pixels, as channels, where input and photograph have one size


def build(name: str, task: str) -> nn.Module:
    """Return a new model of `name` for `task`."""
    if name in SR_ONLY and not is_sr(task):
        raise ValueError(f"model {name!r} is for SR tasks, got {task!r}")
    if name == "small-sr":
        return SmallSR() if is_sr(task) else Restorer()
    if name == "small-swinir":
        return SwinIRResidual(task)
    if name == "safmn":
        from spandrel.architectures.SAFMN import SAFMN

        # As published for x4. Reference: Sun et al., ICCV 2023.
        return SAFMN(dim=36, n_blocks=8, ffn_scale=2.0, upscaling_factor=SCALE)
    if name == "one-step":
        return OneStep()
    raise ValueError(f"unknown model {name!r}, known are {', '.join(MODELS)}")


class Restorer(SmallSR):
    """The small EDSR for inputs of the photograph's size: it sees 2 x 2 blocks of pixels as channels.

    Blocks of 4 x 4 would have more channels than the network is wide, and their noise could not pass.
    """

    def __init__(self) -> None:
        super().__init__(blocks=3, in_channels=3 * BLOCK**2, scale=BLOCK)

    def forward(self, lr: Tensor) -> Tensor:
        """Restore (B, 3, H, W), H, W multiples of 2."""
        return lr + self.residual(F.pixel_unshuffle(lr, BLOCK))


class OneStep(SmallSR):
    """A one-step diffusion student on residual shifting: x_T = up(LR) + kappa n, SR = x_T + f(x_T, LR).

    The last state of a chain that shifts GT to the bicubic enlargement plus noise, taken back in a single step; as
    in a distilled student the noise is drawn anew in each call, so that SR is a sample.

    Reference: Yue et al., ResShift, NeurIPS 2023; Wang et al., SinSR, CVPR 2024. In pixel space and tiny: ours.
    """

    kappa = 0.1

    def __init__(self) -> None:
        super().__init__(in_channels=3 + 3 * SCALE**2)

    def forward(self, lr: Tensor) -> Tensor:
        """Upscale (B, 3, h, w) to (B, 3, 4h, 4w)."""
        start = upscale(lr)
        start = start + self.kappa * torch.randn_like(start)
        return start + self.residual(torch.cat((lr, F.pixel_unshuffle(start, SCALE)), dim=1))


class SwinIRResidual(nn.Module):
    """SwinIR of spandrel, 2 x 2 blocks of 32 channels, added to the starting point.

    As `Restorer`, it sees 2 x 2 blocks of pixels as channels where input and photograph have one size.
    """

    def __init__(self, task: str) -> None:
        super().__init__()
        from spandrel.architectures.SwinIR import SwinIR

        self.enlarges = is_sr(task)
        options: dict[str, Any] = {"upscale": SCALE, "upsampler": "pixelshuffledirect"} if self.enlarges else {}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.meshgrid")
            self.network = SwinIR(
                img_size=24,
                window_size=8,
                in_chans=3 if self.enlarges else 3 * BLOCK**2,
                embed_dim=32,
                depths=[2, 2],
                num_heads=[2, 2],
                mlp_ratio=2,
                drop_path_rate=0.0,
                **options,
            )
        last = self.network.upsample[0] if self.enlarges else self.network.conv_last
        for parameter in last.parameters():
            nn.init.zeros_(parameter)

    def forward(self, degraded: Tensor) -> Tensor:
        """Restore (B, 3, h, w), h, w multiples of 2 where the size stays."""
        if self.enlarges:
            return upscale(degraded) + self.network(degraded) - self.network.mean  # SwinIR adds its data set's mean
        # Of equal sizes, SwinIR adds its input itself.
        return F.pixel_shuffle(self.network(F.pixel_unshuffle(degraded, BLOCK)), BLOCK)


def critic() -> nn.Module:
    """A patch discriminator for the hinge loss: (B, 3, H, W) -> (B, 1, H / 8, W / 8), spectrally normalised.

    Reference: Isola et al., CVPR 2017 (PatchGAN); Miyato et al., ICLR 2018 (spectral normalisation).
    """
    widths = (3, 32, 64, 128)
    layers: list[nn.Module] = []
    for wide_in, wide_out in itertools.pairwise(widths):
        layers += [nn.utils.parametrizations.spectral_norm(nn.Conv2d(wide_in, wide_out, 4, 2, 1)), nn.LeakyReLU(0.2)]
    return nn.Sequential(*layers, nn.utils.parametrizations.spectral_norm(nn.Conv2d(widths[-1], 1, 3, padding=1)))


class UnsharpMask(nn.Module):
    """sr + amount * (sr - blurred sr): what sharpening without any training gives."""

    def __init__(self, model: nn.Module, amount: float, sigma: float = 1.0) -> None:
        super().__init__()
        self.model, self.amount, self.sigma = model, amount, sigma

    def forward(self, degraded: Tensor) -> Tensor:
        """Restore and sharpen."""
        sr = self.model(degraded)
        side = 2 * round(3 * self.sigma) + 1
        return sr + self.amount * (sr - gaussian_blur2d(sr, (side, side), (self.sigma, self.sigma)))


class LatentGain(nn.Module):
    """Features of sr times (sigma_gt / sigma_sr)^amount for every channel, and back to an image.

    What the invertible network knows of the statistics of photographs, without any training.
    """

    def __init__(self, model: nn.Module, amount: float) -> None:
        super().__init__()
        self.model, self.amount = model, amount
        self.inn = HighFrequencyINN.from_pretrained("bundled").requires_grad_(False)
        self.gains: list[Tensor] = []

    @torch.no_grad()
    def fit(self, sr: Tensor, gt: Tensor) -> None:
        """Measure the gains on pairs (B, 3, H, W)."""
        pairs = zip(*(self.inn.features(2 * image - 1) for image in (sr, gt)), strict=True)
        self.gains = [(g.std((0, 2, 3)) / s.std((0, 2, 3)))[:, None, None] for s, g in pairs]

    def forward(self, degraded: Tensor) -> Tensor:
        """Restore and amplify."""
        latent = self.inn(2 * self.model(degraded) - 1, log_det_jac=False)
        amplified = [feature * gain**self.amount for feature, gain in zip(latent.features, self.gains, strict=True)]
        return self.inn.inverse(latent._replace(features=amplified)) / 2 + 0.5


# Of the images of an L1 model, in place of training: `losses.TRAINING_FREE`.
CHANGES: dict[str, Any] = {"unsharp-mask": UnsharpMask, "latent-gain": LatentGain}
