"""Accelerate: the same script on a CPU, a GPU, or several.

    accelerate launch examples/accelerate_loop.py --images DIR --steps 1000

The loss stays outside `prepare`: there is nothing in it to train, wrap or save. Needs `pip install accelerate`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch.utils.data import DataLoader
from toy import Pairs, SmallSR, line, parser

from mghf_loss import MGHFLoss


def main() -> None:
    """Train and print the loss and its terms, averaged over processes."""
    options = parser(__doc__).parse_args()
    accelerator = Accelerator()
    torch.manual_seed(options.seed)
    count = options.steps * options.batch * accelerator.num_processes
    model = SmallSR()
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-3)
    loader = DataLoader(Pairs(options.images, count, options.crop), options.batch)
    model, optimiser, loader = accelerator.prepare(model, optimiser, loader)
    criterion = MGHFLoss().to(accelerator.device)
    places = torch.Generator().manual_seed(options.seed)  # PatchNCE's random places, the same in every process

    for step, (lr, gt) in enumerate(loader):
        sr = model(lr)
        mghf, terms = criterion(sr, gt, return_terms=True, generator=places)
        loss = F.l1_loss(sr, gt) + 0.05 * mghf
        optimiser.zero_grad()
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 0.2)
        optimiser.step()
        values = accelerator.reduce({"loss": loss.detach(), "mghf": mghf.detach(), **terms}, reduction="mean")
        accelerator.print(line(step, **values))
    accelerator.end_training()


if __name__ == "__main__":
    main()
