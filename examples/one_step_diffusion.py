"""One-step diffusion on the pattern of SinSR: the loss on decoded images, its gradient through a frozen decoder.

    python examples/one_step_diffusion.py --images DIR --steps 1000

The residual-shifting forward process (ResShift, Yue et al., NeurIPS 2023) ends at z_T = z_lr + kappa * noise, z_lr the
latent of the enlarged LR image; a student maps z_T and z_lr to the latent of the SR image in one step (SinSR, Wang et
al., CVPR 2024). SinSR trains it to follow a teacher, of which there is none here: the target is GT's latent. To the
latent error comes 0.2 times `MGHFnLoss` of the decoded images, as in the training code of the paper (arXiv 2411.13548).
`memory="low"` recomputes the invertible network in the backward pass, `checkpoint` the decoder.

`Autoencoder` stands for the VQ-VAE of SinSR: any frozen `encode` and `decode` will do.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader
from toy import SCALE, Pairs, line, parser

from mghf_loss import MGHFnLoss

KAPPA = 2.0
CHANNELS = 3 * SCALE**2


class Autoencoder(nn.Module):
    """Images in [-1, 1] <-> latents of a quarter of their size: blocks of pixels, turned by a fixed rotation."""

    rotation: Tensor

    def __init__(self) -> None:
        super().__init__()
        rotation = nn.init.orthogonal_(torch.empty(CHANNELS, CHANNELS))
        self.register_buffer("rotation", rotation[:, :, None, None])

    def encode(self, image: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, 48, H/4, W/4)."""
        return F.conv2d(F.pixel_unshuffle(image, SCALE), self.rotation)

    def decode(self, latent: Tensor) -> Tensor:
        """Undo `encode`."""
        return F.pixel_shuffle(F.conv2d(latent, self.rotation.transpose(0, 1)), SCALE)


class Student(nn.Module):
    """z_T, z_lr -> z_0, all (B, 48, h, w)."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(2 * CHANNELS, width, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(width, width, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(width, CHANNELS, 3, padding=1),
        )

    def forward(self, noisy: Tensor, condition: Tensor) -> Tensor:
        """Make the one step."""
        return condition + self.body(torch.cat((noisy, condition), dim=1))


def main() -> None:
    """Train the student and print its losses."""
    options = parser(__doc__).parse_args()
    torch.manual_seed(options.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    loader = DataLoader(Pairs(options.images, options.steps * options.batch, options.crop), options.batch)
    autoencoder = Autoencoder().to(device).requires_grad_(False).eval()
    student = Student().to(device)
    optimiser = torch.optim.Adam(student.parameters(), lr=5e-4)
    criterion = MGHFnLoss(input_range=(-1, 1), memory="low").to(device)

    for step, (lr, gt) in enumerate(loader):
        lr, gt = 2 * lr.to(device) - 1, 2 * gt.to(device) - 1
        with torch.no_grad():
            z_gt = autoencoder.encode(gt)
            z_lr = autoencoder.encode(F.interpolate(lr, scale_factor=SCALE, mode="bicubic"))
        z_sr = student(z_lr + KAPPA * torch.randn_like(z_lr), z_lr)
        sr = checkpoint(autoencoder.decode, z_sr, use_reentrant=False)
        latent, mghf = F.mse_loss(z_sr, z_gt), criterion(sr, gt)
        loss = latent + 0.2 * mghf
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimiser.step()
        print(line(step, loss=loss, latent=latent, mghf=mghf))


if __name__ == "__main__":
    main()
