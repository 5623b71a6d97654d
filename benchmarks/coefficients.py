"""How MGHFLoss's default coefficients were found: gradient norms of every term at the start of training.

At the start of training from bicubic x4, SR is the bicubic enlargement. This prints the norm of each term's
gradient with respect to it, per crop, next to that of L1 and of MGHFLoss with its default coefficients:

    python benchmarks/coefficients.py --images DIR
"""

from __future__ import annotations

import argparse
import datetime
from pathlib import Path

import torch
import torch.nn.functional as F
from losses import device_name
from torch import Tensor
from tqdm import trange

import mghf_loss
from mghf_loss._files import write_table
from mghf_loss.mghf import COEFFICIENTS
from mghf_loss.toy import downscale, upscale
from mghf_loss.training.data import Cropping, FolderCrops, list_images


def gradient_norms(
    criterion: mghf_loss.MGHFLoss, gt: Tensor, generator: torch.Generator | None = None
) -> dict[str, Tensor]:
    """Norm per image, (B,), of the gradient of L1 and of every unweighted term at bicubic x4."""
    sr = upscale(downscale(gt)).requires_grad_()
    values = {"l1": F.l1_loss(sr, gt, reduction="none").mean((1, 2, 3)), **criterion.term_values(sr, gt, generator)}
    norms = {}
    for name, value in values.items():
        (gradient,) = torch.autograd.grad(value.sum(), sr, retain_graph=True)
        norms[name] = gradient.flatten(1).norm(dim=1)
    return norms


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, required=True, help="folder of photographs")
    parser.add_argument("--crops", type=int, default=256)
    parser.add_argument("--crop", type=int, default=128)
    parser.add_argument("--csv", type=Path, default=Path(__file__).parent / "results" / "coefficients.csv")
    options = parser.parse_args()

    torch.manual_seed(0)
    terms = [name for name in COEFFICIENTS["paper"] if name != "dino_jsd"]
    criterion = mghf_loss.MGHFLoss(coefficients=dict.fromkeys(terms, 1.0))
    crops = FolderCrops(list_images(options.images), Cropping(options.crop, least_scale=1.0))
    collected: dict[str, list[Tensor]] = {name: [] for name in ["l1", *terms]}
    for start in trange(0, options.crops, 8, desc="gradient norms", unit="batch"):
        gt = torch.stack([crops.crop(slot) for slot in range(start, min(start + 8, options.crops))]) / 2 + 0.5
        for name, norms in gradient_norms(criterion, gt).items():
            collected[name].append(norms)

    rows = []
    print(f"{'term':<12}{'p10':>11}{'median':>11}{'p90':>11}{'coefficient':>13}{'product':>11}{'/ L1':>8}")
    l1 = torch.cat(collected["l1"]).median().item()
    for name, norms in collected.items():
        p10, median, p90 = torch.cat(norms).quantile(torch.tensor([0.1, 0.5, 0.9])).tolist()
        coefficient = COEFFICIENTS["paper"].get(name, 1.0)
        product = coefficient * median
        print(
            f"{name:<12}{p10:>11.3g}{median:>11.3g}{p90:>11.3g}{coefficient:>13.4g}{product:>11.3g}{product / l1:>8.2f}"
        )
        rows.append(
            {
                "term": name,
                "p10": p10,
                "median": median,
                "p90": p90,
                "coefficient": coefficient,
                "product": product,
                "crops": options.crops,
                "crop": options.crop,
                "device": device_name(torch.device("cpu")),
                "torch": torch.__version__,
                "package": mghf_loss.__version__,
                "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
            }
        )

    options.csv.parent.mkdir(parents=True, exist_ok=True)
    write_table(options.csv, rows)
    print(f"wrote {options.csv}")


if __name__ == "__main__":
    main()
