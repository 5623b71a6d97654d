"""ESRGAN's two phases: L1 alone, then L1 + MGHFLoss("gan") + an adversarial loss.

    pip install ".[demo]"
    python examples/esrgan.py --steps 2000 --images DIR

MGHFLoss takes the place of ESRGAN's VGG loss. `cache_gt=True` computes the features of a ground truth once for the
two outputs that are compared with it: the generator's and, for the log, that of its moving average.

Reference: Wang et al., ESRGAN, ECCV workshops 2018. The weights are ours.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader
from tqdm import tqdm

from mghf_loss import MGHFLoss
from mghf_loss.toy import Crops, SmallSR, downscale, photograph, save_images, upscale

Losses = dict[str, Tensor]


def critic() -> nn.Module:
    """Return a patch discriminator."""
    layers: list[nn.Module] = []
    for wide_in, wide_out in ((3, 32), (32, 64)):
        layers += [nn.utils.parametrizations.spectral_norm(nn.Conv2d(wide_in, wide_out, 4, 2, 1)), nn.LeakyReLU(0.2)]
    return nn.Sequential(*layers, nn.Conv2d(64, 1, 3, padding=1))


def relativistic(real: Tensor, fake: Tensor) -> Tensor:
    """Ask that the critic rates `real` above the mean of `fake`, and `fake` below that of `real`."""
    above, below = real - fake.mean(), fake - real.mean()
    return (F.softplus(-above).mean() + F.softplus(below).mean()) / 2


def main() -> None:
    """Train a generator with L1, then generator and critic in turn."""
    parser = argparse.ArgumentParser(description="Train a small x4 GAN in two phases.")
    parser.add_argument("--images", type=Path, help="folder of photographs [scikit-image's]")
    parser.add_argument("--steps", type=int, default=200, help="optimiser steps of each phase")
    parser.add_argument("--batch", type=int, default=4, help="crops per step")
    parser.add_argument("--gan-weight", type=float, default=0.03, help="factor of the adversarial loss")
    parser.add_argument("--seed", type=int, default=0, help="seed of initialisation and crops")
    parser.add_argument("--out", type=Path, default=Path("esrgan.png"), help="picture of an unseen photograph")
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(arguments.seed)
    generator, discriminator = SmallSR().to(device), critic().to(device)
    criterion = MGHFLoss("gan", cache_gt=True).to(device)

    def batches(name: str, seed: int) -> tqdm[Tensor]:
        crops = Crops(arguments.images, arguments.steps * arguments.batch, seed=seed)
        return tqdm(DataLoader(crops, arguments.batch), name, unit="step")

    optimiser = torch.optim.Adam(generator.parameters(), lr=1e-3)
    for batch in batches("L1", arguments.seed):
        gt = batch.to(device)
        loss = F.l1_loss(generator(downscale(gt)), gt)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()

    average = AveragedModel(generator, multi_avg_fn=get_ema_multi_avg_fn(0.99))
    g_optimiser = torch.optim.Adam(generator.parameters(), lr=2e-4)
    d_optimiser = torch.optim.Adam(discriminator.parameters(), lr=4e-4, betas=(0.0, 0.9))
    progress = batches("GAN", arguments.seed + 1)
    for step, batch in enumerate(progress):
        gt = batch.to(device)
        sr = generator(downscale(gt))
        losses: Losses = {
            "pixel": F.l1_loss(sr, gt),
            "mghf": criterion(sr, gt),
            "adversarial": arguments.gan_weight * relativistic(discriminator(sr), discriminator(gt).detach()),
        }
        g_optimiser.zero_grad(set_to_none=True)
        torch.stack(list(losses.values())).sum().backward()
        nn.utils.clip_grad_norm_(generator.parameters(), 0.2)
        g_optimiser.step()
        average.update_parameters(generator)

        losses["critic"] = relativistic(discriminator(gt), discriminator(sr.detach()))
        d_optimiser.zero_grad(set_to_none=True)
        losses["critic"].backward()
        d_optimiser.step()
        if step % 10 == 0 or step + 1 == arguments.steps:
            with torch.no_grad():
                losses["mghf_average"] = criterion(average(downscale(gt)), gt)
            logged = "  ".join(f"{name} {value.item():.5f}" for name, value in losses.items())
            progress.write(f"step {step}  {logged}")

    gt = photograph("chelsea")[..., 80:208, 100:228].to(device)
    lr = downscale(gt)
    with torch.no_grad():
        save_images(arguments.out, {"bicubic": upscale(lr), "SR": average(lr), "ground truth": gt})


if __name__ == "__main__":
    main()
