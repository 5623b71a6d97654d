"""The training objective: likelihood of the details given the coarse image, as a code length (`bits_per_detail`)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..inn import Latent, Variant

GREY_LEVEL = 2.0 / 255.0  # one 8-bit step of an image in [-1, 1]


def add_noise(image: Tensor, noise_floor: float, generator: torch.Generator | None = None) -> Tensor:
    """Add N(0, noise_floor^2) and uniform dequantisation noise of one 8-bit step to an image in [-1, 1].

    `noise_floor` is in 1/255. The uniform part makes the density of the sum a bound on the probability of
    8-bit values (Theis et al., ICLR 2016), so that code lengths stay meaningful without a noise floor.
    """
    device = image.device if generator is None else generator.device
    gaussian = torch.randn(image.shape, generator=generator, device=device).to(image)
    uniform = torch.rand(image.shape, generator=generator, device=device).to(image) - 0.5
    return image + GREY_LEVEL * (noise_floor * gaussian + uniform)


def bits_per_detail(latent: Latent, variant: Variant) -> Tensor:
    """Code length of the details of 8-bit images given their low-pass bands, in bits per detail value, (B, L).

    -log2 p(details | low-pass) = sum(z^2 / 2 + log(2 pi) / 2) / ln 2 - log2|det J| - log2(grey level)
    with z the features. For a pyramid, level l stands for its own details; for a packet, for those of level l
    and all finer ones, because it transforms them all (so the last level is the network's code length).
    """
    if latent.log_det_jac is None:
        raise ValueError("bits_per_detail needs a latent with log_det_jac, got None")
    log_det = latent.log_det_jac
    if variant == "packet":
        log_det = log_det.cumsum(1)
    squares = torch.stack([level.square().flatten(1).sum(1) for level in latent.features], dim=1)
    values = torch.tensor([level[0].numel() for level in latent.features], device=log_det.device)
    nats = (0.5 * squares - log_det) / values + 0.5 * math.log(2 * math.pi)
    return nats / math.log(2) - math.log2(GREY_LEVEL)


def code_length(latent: Latent, variant: Variant) -> Tensor:
    """Bits per detail value of the whole network, over all levels, (B,)."""
    bits = bits_per_detail(latent, variant)
    if variant == "packet":
        return bits[:, -1]
    values = torch.tensor([level[0].numel() for level in latent.features]).to(bits)
    return (bits * values).sum(1) / values.sum()
