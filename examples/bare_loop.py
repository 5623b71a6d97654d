"""A bare PyTorch loop with MGHFLoss beside L1.

python examples/bare_loop.py --images DIR --steps 1000
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader
from toy import Pairs, SmallSR, line, parser

from mghf_loss import MGHFLoss


def main() -> None:
    """Train and print the loss and its terms."""
    options = parser(__doc__).parse_args()
    torch.manual_seed(options.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    loader = DataLoader(Pairs(options.images, options.steps * options.batch, options.crop), options.batch)
    model = SmallSR().to(device)
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-3)
    criterion = MGHFLoss().to(device)
    places = torch.Generator().manual_seed(options.seed)  # PatchNCE's random places, the same in every run

    for step, (lr, gt) in enumerate(loader):
        lr, gt = lr.to(device), gt.to(device)
        sr = model(lr)
        mghf, terms = criterion(sr, gt, return_terms=True, generator=places)
        loss = F.l1_loss(sr, gt) + 0.05 * mghf
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.2)
        optimiser.step()
        print(line(step, loss=loss, mghf=mghf, **terms))


if __name__ == "__main__":
    main()
