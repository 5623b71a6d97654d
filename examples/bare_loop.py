"""The loss in a loop of plain PyTorch, with its terms logged and clipped gradients.

python examples/bare_loop.py --steps 200
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from crops import RandomCrops, options
from torch.utils.data import DataLoader

from mghf_loss import MGHFLoss
from mghf_loss.toy import SmallSR, downscale


def main() -> None:
    """Train a small x4 model."""
    arguments = options("A bare training loop.", steps=50).parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(arguments.seed)
    model = SmallSR().to(device)
    criterion = MGHFLoss().to(device)  # the one line
    places = torch.Generator(device).manual_seed(arguments.seed)  # PatchNCE's, so that a run can be repeated
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-3)

    crops = RandomCrops(arguments.images, arguments.steps * arguments.batch, seed=arguments.seed)
    for step, batch in enumerate(DataLoader(crops, arguments.batch)):
        gt = batch.to(device)
        sr = model(downscale(gt))
        mghf, terms = criterion(sr, gt, return_terms=True, generator=places)
        loss = F.l1_loss(sr, gt) + 0.05 * mghf
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.2)
        optimiser.step()
        if step % 10 == 0 or step + 1 == arguments.steps:
            logged = "  ".join(f"{name} {value.item():.4g}" for name, value in terms.items())
            print(f"step {step}  loss {loss.item():.6f}  {logged}")


if __name__ == "__main__":
    main()
