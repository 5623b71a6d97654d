"""The loss beside an adversarial one, and one ground truth for several outputs.

    python examples/gan_step.py --steps 200

The generator answers twice a step: SR for the losses, and a coarser SR of its first half as deep supervision. Both are
compared with the same `gt`, whose features `cache_gt=True` computes once.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from crops import RandomCrops, options
from torch import Tensor, nn
from torch.utils.data import DataLoader

from mghf_loss import MGHFLoss
from mghf_loss.toy import SmallSR, downscale, upscale


class Generator(SmallSR):
    """The small model with a second output half way."""

    def forward(self, lr: Tensor) -> tuple[Tensor, Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Return SR, and SR after half of the blocks."""
        x, outputs = self.head(lr), []
        for index, block in enumerate(self.blocks, start=1):
            x = x + block(x)
            if index in (len(self.blocks) // 2, len(self.blocks)):
                outputs.append(upscale(lr) + F.pixel_shuffle(self.tail(x), 4))
        half, sr = outputs
        return sr, half


def critic() -> nn.Module:
    """A patch discriminator."""
    layers: list[nn.Module] = []
    for wide_in, wide_out in ((3, 32), (32, 64)):
        layers += [nn.utils.parametrizations.spectral_norm(nn.Conv2d(wide_in, wide_out, 4, 2, 1)), nn.LeakyReLU(0.2)]
    return nn.Sequential(*layers, nn.Conv2d(64, 1, 3, padding=1))


def main() -> None:
    """Train generator and critic in turn."""
    arguments = options("A GAN step.", steps=50).parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(arguments.seed)
    generator, discriminator = Generator().to(device), critic().to(device)
    criterion = MGHFLoss(cache_gt=True).to(device)
    places = torch.Generator(device).manual_seed(arguments.seed)
    g_optimiser = torch.optim.Adam(generator.parameters(), lr=5e-4)
    d_optimiser = torch.optim.Adam(discriminator.parameters(), lr=2e-4, betas=(0.0, 0.9))

    crops = RandomCrops(arguments.images, arguments.steps * arguments.batch, seed=arguments.seed)
    for step, batch in enumerate(DataLoader(crops, arguments.batch)):
        gt = batch.to(device)
        sr, half = generator(downscale(gt))
        losses = {
            "pixel": F.l1_loss(sr, gt),
            "mghf": 0.05 * criterion(sr, gt, generator=places),
            "mghf_half": 0.01 * criterion(half, gt, generator=places),  # gt's features are known
            "adversarial": -0.005 * discriminator(sr).mean(),
        }
        g_optimiser.zero_grad(set_to_none=True)
        torch.stack(list(losses.values())).sum().backward()
        nn.utils.clip_grad_norm_(generator.parameters(), 0.2)
        g_optimiser.step()

        d_loss = F.relu(1 - discriminator(gt)).mean() + F.relu(1 + discriminator(sr.detach())).mean()
        d_optimiser.zero_grad(set_to_none=True)
        d_loss.backward()
        d_optimiser.step()
        if step % 10 == 0 or step + 1 == arguments.steps:
            logged = "  ".join(f"{name} {value.item():.5f}" for name, value in losses.items())
            print(f"step {step}  {logged}  critic {d_loss.item():.4f}")


if __name__ == "__main__":
    main()
