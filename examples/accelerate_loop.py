"""The loss under Accelerate: several processes, mixed precision, gradient accumulation.

    accelerate launch examples/accelerate_loop.py --steps 200
    accelerate launch --multi_gpu --num_processes 2 --mixed_precision bf16 examples/accelerate_loop.py

With `ACCELERATE_USE_CPU=true` in the environment the second starts two processes on a CPU.
The loss is not prepared: it has nothing to train, and `.to(accelerator.device)` is all that it needs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import set_seed
from crops import RandomCrops, options
from torch.utils.data import DataLoader

from mghf_loss import MGHFLoss
from mghf_loss.toy import SmallSR, downscale


def main() -> None:
    """Train a small x4 model."""
    parser = options("A training loop under Accelerate.", steps=50)
    parser.add_argument("--accumulate", type=int, default=1, help="batches of an optimiser step")
    arguments = parser.parse_args()
    accelerator = Accelerator(gradient_accumulation_steps=arguments.accumulate)
    accelerator.print(f"{accelerator.num_processes} processes, {accelerator.device}, {accelerator.mixed_precision}")
    set_seed(arguments.seed)
    model = SmallSR()
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-3)
    batches = arguments.steps * arguments.accumulate * accelerator.num_processes
    crops = RandomCrops(arguments.images, batches * arguments.batch, seed=arguments.seed)
    model, optimiser, loader = accelerator.prepare(model, optimiser, DataLoader(crops, arguments.batch))
    criterion = MGHFLoss().to(accelerator.device)
    places = torch.Generator(accelerator.device).manual_seed(arguments.seed + accelerator.process_index)

    for index, gt in enumerate(loader):
        with accelerator.accumulate(model):
            sr = model(downscale(gt))  # in the precision that was asked for; SR comes back in float32
            loss = F.l1_loss(sr, gt) + 0.05 * criterion(sr, gt, generator=places)
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 0.2)
            optimiser.step()
            optimiser.zero_grad()
        mean = accelerator.reduce(loss.detach(), "mean")
        assert isinstance(mean, torch.Tensor)
        if index % 10 == 0 or index + 1 == len(loader):
            accelerator.print(f"batch {index}  loss {mean.item():.6f}")
    accelerator.end_training()


if __name__ == "__main__":
    main()
