"""Content, style and correlation of details of other wavelets, no network: `type = "studies.wavelets:build"`.

Does a smoother or an undecimated wavelet make the random shift of the Haar grid needless? See studies/wavelets.toml.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from ptwt.conv_transform_2 import wavedec2
from torch import Tensor

from mghf_loss import terms, toy
from mghf_loss.calibrate import RATIOS, SIDE, degrade, gradient_ratio
from mghf_loss.mghf import PRESETS

from .losses import Loss

LEVELS, STRIDE = 3, 8
GAIN = 8.0  # the network's: raw details have a standard deviation of about 1/8
TERMS = {
    "content": terms.content,
    "style": partial(terms.style, delta=PRESETS["balanced"].style_delta),
    "correlation": terms.correlation,
}


def details(image: Tensor, wavelet: str, undecimated: bool) -> list[Tensor]:
    """Details of three levels, (B, 9, h, w), coarse to fine; the finest of Haar at every phase if `undecimated`."""
    image = GAIN * (2 * image - 1)
    _, *bands = wavedec2(image, wavelet, level=LEVELS, mode="reflect")
    levels = [torch.cat(list(each), 1) for each in bands]
    if undecimated:
        low, high = image.new_tensor([[1, 1], [1, -1]]) / 2**0.5
        kernels = torch.stack([torch.outer(*pair) for pair in ((low, high), (high, low), (high, high))])
        padded = F.pad(image, (0, 1, 0, 1), mode="replicate")
        levels[-1] = F.conv2d(padded, kernels[:, None].repeat(3, 1, 1, 1), groups=3)
    return levels


def term(name: str, sr: Tensor, gt: Tensor, wavelet: str, undecimated: bool) -> Tensor:
    """One term, mean over levels."""
    pairs = zip(details(sr, wavelet, undecimated), details(gt, wavelet, undecimated), strict=True)
    return torch.stack([TERMS[name](*pair) for pair in pairs]).mean()


def build(device: str, wavelet: str = "haar", undecimated: bool = False, shift: bool = False) -> Loss:
    """The terms with the gradients, relative to L1's, that they have in the preset "balanced"."""
    if undecimated and wavelet != "haar":
        raise ValueError(f"undecimated is of Haar alone, got wavelet {wavelet!r}")
    of = {name: partial(term, name, wavelet=wavelet, undecimated=undecimated) for name in TERMS}
    gts = [toy.middle(toy.photograph(name), SIDE) for name in ("astronaut", "chelsea", "coffee")]
    pairs = [(degrade(gt, "sr", torch.Generator()), gt) for gt in gts]
    coefficients = {name: RATIOS["balanced"][name] / gradient_ratio(of[name], pairs) for name in TERMS}

    def loss(sr: Tensor, gt: Tensor, generator: torch.Generator) -> Tensor:
        if shift:
            top, left = torch.randint(STRIDE, (2,), generator=generator).tolist()
            sr, gt = (F.pad(i, (left, STRIDE - left, top, STRIDE - top), mode="reflect") for i in (sr, gt))
        return torch.stack([coefficients[name] * of[name](sr, gt) for name in TERMS]).sum()

    return loss
