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


def all_terms(sr: Tensor, gt: Tensor, wavelet: str, undecimated: bool) -> dict[str, Tensor]:
    """Every term by name, mean over levels."""
    pairs = list(zip(details(sr, wavelet, undecimated), details(gt, wavelet, undecimated), strict=True))
    return {name: torch.stack([term(*pair) for pair in pairs]).mean() for name, term in TERMS.items()}


def build(device: str, wavelet: str = "haar", undecimated: bool = False, shift: bool = False) -> Loss:
    """The terms with the gradients, relative to L1's, that they have in the preset "balanced"."""
    if undecimated and wavelet != "haar":
        raise ValueError(f"undecimated is of Haar alone, got wavelet {wavelet!r}")
    of = partial(all_terms, wavelet=wavelet, undecimated=undecimated)
    gts = [toy.middle(toy.photograph(name), SIDE) for name in ("astronaut", "chelsea", "coffee")]
    pairs = [(degrade(gt, "sr", torch.Generator()), gt) for gt in gts]
    ratios = {name: gradient_ratio(lambda sr, gt, name=name: of(sr, gt)[name], pairs) for name in TERMS}
    coefficients = {name: RATIOS["balanced"][name] / ratio for name, ratio in ratios.items()}

    def loss(sr: Tensor, gt: Tensor, generator: torch.Generator) -> Tensor:
        if shift:
            top, left = torch.randint(STRIDE, (2,), generator=generator).tolist()
            sr, gt = (F.pad(i, (left, STRIDE - left, top, STRIDE - top), mode="reflect") for i in (sr, gt))
        return torch.stack([coefficients[name] * value for name, value in of(sr, gt).items()]).sum()

    return loss
