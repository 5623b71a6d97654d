"""The models that quality.py trains: a small CNN, a small transformer, a one-step diffusion student, a critic.

Each maps a task's input to an image, (B, 3, H, W), and starts at what needs no training: the bicubic enlargement, or
the input itself.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
import torch.nn.functional as F
from tasks import is_sr
from torch import Tensor, nn

from mghf_loss.toy import SCALE, SmallSR, upscale

MODELS = ("edsr", "swinir", "one-step")


def build(name: str, task: str) -> nn.Module:
    """Return a new model of `name` for `task`."""
    if name == "edsr":
        return SmallSR() if is_sr(task) else Restorer()
    if name == "swinir":
        return SwinIRResidual(task)
    if name == "one-step":
        if not is_sr(task):
            raise ValueError(f"the one-step model is for SR tasks, got {task!r}")
        return OneStep()
    raise ValueError(f"unknown model {name!r}; known are {', '.join(MODELS)}")


class Restorer(SmallSR):
    """The small EDSR for inputs of the photograph's size: it sees 4 x 4 blocks of pixels as channels."""

    def __init__(self) -> None:
        super().__init__(in_channels=3 * SCALE**2)

    def forward(self, lr: Tensor) -> Tensor:
        """Restore (B, 3, H, W), H, W multiples of 4."""
        return lr + self.residual(F.pixel_unshuffle(lr, SCALE))


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

    As `Restorer`, it sees 4 x 4 blocks of pixels as channels where input and photograph have one size.
    """

    def __init__(self, task: str) -> None:
        super().__init__()
        from spandrel.architectures.SwinIR import SwinIR

        self.enlarges = is_sr(task)
        options: dict[str, Any] = {"upscale": SCALE, "upsampler": "pixelshuffledirect"} if self.enlarges else {}
        self.network = SwinIR(
            img_size=24,
            window_size=8,
            in_chans=3 if self.enlarges else 3 * SCALE**2,
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
        """Restore (B, 3, h, w), h, w multiples of 4 where the size stays."""
        if self.enlarges:
            return upscale(degraded) + self.network(degraded) - self.network.mean  # SwinIR adds its data set's mean
        # Of equal sizes, SwinIR adds its input itself.
        return F.pixel_shuffle(self.network(F.pixel_unshuffle(degraded, SCALE)), SCALE)


def critic() -> nn.Module:
    """A patch discriminator for the hinge loss: (B, 3, H, W) -> (B, 1, H / 8, W / 8), spectrally normalised.

    Reference: Isola et al., CVPR 2017 (PatchGAN); Miyato et al., ICLR 2018 (spectral normalisation).
    """
    widths = (3, 32, 64, 128)
    layers: list[nn.Module] = []
    for wide_in, wide_out in itertools.pairwise(widths):
        layers += [nn.utils.parametrizations.spectral_norm(nn.Conv2d(wide_in, wide_out, 4, 2, 1)), nn.LeakyReLU(0.2)]
    return nn.Sequential(*layers, nn.utils.parametrizations.spectral_norm(nn.Conv2d(widths[-1], 1, 3, padding=1)))
