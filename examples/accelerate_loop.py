"""The loss under Accelerate: several processes, mixed precision, gradient accumulation, a picture at the end.

    pip install ".[demo,train]"
    accelerate launch examples/accelerate_loop.py --steps 200 --images DIR
    accelerate launch --multi_gpu --num_processes 2 --mixed_precision bf16 examples/accelerate_loop.py

With `ACCELERATE_USE_CPU=true` in the environment the second command starts two processes on a CPU.
The loss is not prepared: it has nothing to train, and `.to(accelerator.device)` is all that it needs.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch.utils.data import DataLoader
from tqdm import tqdm

from mghf_loss import MGHFLoss
from mghf_loss.toy import Crops, SmallSR, downscale, photograph, save_images, upscale


def main() -> None:
    """Train a small x4 model."""
    parser = argparse.ArgumentParser(description="Train a small x4 model with L1 + MGHFLoss under Accelerate.")
    parser.add_argument("--images", type=Path, help="folder of photographs [scikit-image's]")
    parser.add_argument("--steps", type=int, default=200, help="optimiser steps")
    parser.add_argument("--batch", type=int, default=4, help="crops per process and batch")
    parser.add_argument("--accumulate", type=int, default=1, help="batches per optimiser step")
    parser.add_argument("--seed", type=int, default=0, help="seed of initialisation and crops")
    parser.add_argument("--out", type=Path, default=Path("accelerate.png"), help="picture of an unseen photograph")
    arguments = parser.parse_args()
    accelerator = Accelerator(gradient_accumulation_steps=arguments.accumulate)
    accelerator.print(f"{accelerator.num_processes} processes, {accelerator.device}, {accelerator.mixed_precision}")
    set_seed(arguments.seed)
    model = SmallSR()
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-3)
    batches = arguments.steps * arguments.accumulate * accelerator.num_processes
    crops = Crops(arguments.images, batches * arguments.batch, seed=arguments.seed)
    model, optimiser, loader = accelerator.prepare(model, optimiser, DataLoader(crops, arguments.batch))
    criterion = MGHFLoss().to(accelerator.device)

    progress = tqdm(loader, unit="batch", disable=not accelerator.is_main_process)
    for index, gt in enumerate(progress):
        with accelerator.accumulate(model):
            sr = model(downscale(gt))  # in the chosen precision; SR comes back in float32
            loss = F.l1_loss(sr, gt) + criterion(sr, gt)
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 0.2)
            optimiser.step()
            optimiser.zero_grad()
        mean = accelerator.reduce(loss.detach(), "mean")
        assert isinstance(mean, torch.Tensor)
        if accelerator.is_main_process and (index % 10 == 0 or index + 1 == len(loader)):
            progress.write(f"batch {index}  loss {mean.item():.6f}")

    if accelerator.is_main_process:
        gt = photograph("chelsea")[..., 80:208, 100:228].to(accelerator.device)
        lr = downscale(gt)
        with torch.no_grad():
            sr = accelerator.unwrap_model(model)(lr)
        save_images(arguments.out, {"bicubic": upscale(lr), "SR": sr, "ground truth": gt})
    accelerator.end_training()


if __name__ == "__main__":
    main()
