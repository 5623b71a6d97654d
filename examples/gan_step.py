"""A GAN: the generator's loss has several terms, and it is stepped twice a batch, with GT's features computed once.

python examples/gan_step.py --images DIR --steps 1000
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader
from toy import Pairs, SmallSR, line, parser

from mghf_loss import MGHFLoss

GENERATOR_STEPS = 2


class Discriminator(nn.Sequential):
    """(B, 3, H, W) -> logits (B, 1, H/4, W/4), one a patch."""

    def __init__(self, width: int = 16) -> None:
        super().__init__(
            nn.Conv2d(3, width, 4, 2, 1),
            nn.LeakyReLU(0.2),
            nn.Conv2d(width, width, 4, 2, 1),
            nn.LeakyReLU(0.2),
            nn.Conv2d(width, 1, 3, 1, 1),
        )


def generator_step(
    generator: nn.Module,
    discriminator: nn.Module,
    criterion: MGHFLoss,
    optimiser: torch.optim.Optimizer,
    lr: Tensor,
    gt: Tensor,
) -> dict[str, Tensor]:
    """Step the generator on L1, MGHFLoss and the discriminator's opinion; return the losses."""
    sr = generator(lr)
    mghf = criterion(sr, gt)
    adversarial = F.softplus(-discriminator(sr)).mean()
    loss = F.l1_loss(sr, gt) + 0.05 * mghf + 0.005 * adversarial
    optimiser.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(generator.parameters(), 0.2)
    optimiser.step()
    return {"loss_g": loss, "mghf": mghf, "adversarial": adversarial}


def main() -> None:
    """Train both networks and print their losses."""
    options = parser(__doc__).parse_args()
    torch.manual_seed(options.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    loader = DataLoader(Pairs(options.images, options.steps * options.batch, options.crop), options.batch)
    generator, discriminator = SmallSR().to(device), Discriminator().to(device)
    optimiser_g = torch.optim.Adam(generator.parameters(), lr=1e-4)
    optimiser_d = torch.optim.Adam(discriminator.parameters(), lr=1e-4)
    criterion = MGHFLoss(cache_gt=True).to(device)
    losses: dict[str, Tensor] = {}

    for step, (lr, gt) in enumerate(loader):
        lr, gt = lr.to(device), gt.to(device)  # one tensor for all calls of this step: the cache knows it by identity

        discriminator.requires_grad_(False)
        for _ in range(GENERATOR_STEPS):
            losses = generator_step(generator, discriminator, criterion, optimiser_g, lr, gt)

        discriminator.requires_grad_(True)
        with torch.no_grad():
            sr = generator(lr)
        loss_d = F.softplus(-discriminator(gt)).mean() + F.softplus(discriminator(sr)).mean()
        optimiser_d.zero_grad()
        loss_d.backward()
        optimiser_d.step()
        print(line(step, **losses, loss_d=loss_d))


if __name__ == "__main__":
    main()
