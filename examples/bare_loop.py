"""The loss in a loop of plain PyTorch: terms in the log, clipped gradients, a picture at the end.

pip install ".[demo]"
python examples/bare_loop.py --steps 200 --images DIR
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader
from tqdm import tqdm

from mghf_loss import MGHFLoss
from mghf_loss.toy import Crops, SmallSR, downscale, photograph, save_images, upscale


def main() -> None:
    """Train a small x4 model."""
    parser = argparse.ArgumentParser(description="Train a small x4 model with L1 + MGHFLoss.")
    parser.add_argument("--images", type=Path, help="folder of photographs [scikit-image's]")
    parser.add_argument("--preset", default="balanced", help="preset of MGHFLoss")
    parser.add_argument("--steps", type=int, default=200, help="optimiser steps")
    parser.add_argument("--batch", type=int, default=4, help="crops per step")
    parser.add_argument("--seed", type=int, default=0, help="seed of initialisation and crops")
    parser.add_argument("--out", type=Path, default=Path("bare-loop.png"), help="picture of an unseen photograph")
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(arguments.seed)
    model = SmallSR().to(device)  # your model
    crops = Crops(arguments.images, arguments.steps * arguments.batch, seed=arguments.seed)  # your data
    criterion = MGHFLoss(arguments.preset).to(device)
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-3)

    progress = tqdm(DataLoader(crops, arguments.batch), unit="step")
    for step, batch in enumerate(progress):
        gt = batch.to(device)
        sr = model(downscale(gt))
        mghf, terms = criterion(sr, gt, return_terms=True)
        loss = F.l1_loss(sr, gt) + mghf
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.2)
        optimiser.step()
        if step % 10 == 0 or step + 1 == arguments.steps:
            logged = "  ".join(f"{name} {value.item():.4g}" for name, value in terms.items())
            progress.write(f"step {step}  loss {loss.item():.6f}  {logged}")

    gt = photograph("chelsea")[..., 80:208, 100:228].to(device)
    lr = downscale(gt)
    with torch.no_grad():
        save_images(arguments.out, {"bicubic": upscale(lr), "SR": model(lr), "ground truth": gt})


if __name__ == "__main__":
    main()
