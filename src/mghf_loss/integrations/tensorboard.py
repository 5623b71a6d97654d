"""TensorBoard: what the loss sees, as scalars and pictures.

    from torch.utils.tensorboard import SummaryWriter
    from mghf_loss.integrations.tensorboard import log_pair

    writer = SummaryWriter("runs/sr")
    if step % 500 == 0:
        log_pair(writer, criterion, sr, gt, step)

Needs a writer with `add_scalar` and `add_images` (`torch.utils.tensorboard`, tensorboardX), and no package itself.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..criterion import Criterion, rescale

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


def log_pair(
    writer: SummaryWriter,
    criterion: Criterion,
    sr: Tensor,
    gt: Tensor,
    step: int,
    *,
    tag: str = "mghf",
    images: int = 4,
) -> None:
    """Write the terms, heat maps and feature energies of `sr` against `gt`, both (B, 3, H, W), at `step`.

    For all three losses; the energies for the two that have an invertible network.

    - `<tag>/loss`, `<tag>/term/<name>`: the loss, and its terms without coefficients, over the batch.
    - `<tag>/energy/level<l>_sr`, `..._gt`: mean F^2 of the network's features at stride 2^l. GT's is about 1 where the
      network knows the kind of image; SR's far below GT's means that detail is missing, far above that it is made up.
    - `<tag>/sr`, `<tag>/gt`, `<tag>/heatmap/<name>` and `.../total`: pictures of the first `images` images; a heat map
      shows where a step would change SR (`Criterion.heatmap`), from black over red and yellow to white, which is the
      largest of its batch but for one pixel in a hundred: every picture has its own scale.

    Costs a forward pass and, for the pictures, a backward pass for each term; `images=0` leaves the pictures out.
    PatchNCE's locations follow from `step`. No random number is drawn, so the training is that of a run without logs.
    Also inside `torch.inference_mode()`.

    Raises:
        ValueError, TypeError: as `criterion(sr, gt)`, and where `criterion` or `images` are not as above.
    """
    criterion = uncompiled(criterion)
    if not isinstance(criterion, Criterion):
        raise TypeError(f"criterion must be a loss of this package, got {type(criterion).__name__}")
    if images < 0:
        raise ValueError(f"images must be at least 0, got {images!r}")
    for name, value in {**loss_and_terms(criterion, sr, gt, step), **energies(criterion, sr, gt)}.items():
        writer.add_scalar(f"{tag}/{name}", value, step)
    if images:
        log_pictures(writer, criterion, sr[:images], gt[:images], step, tag)


@torch.no_grad()
def loss_and_terms(criterion: Criterion, sr: Tensor, gt: Tensor, seed: int) -> dict[str, float]:
    """Return `loss` and `term/<name>`, the unweighted terms, over a batch; `seed` decides PatchNCE's locations."""
    loss, terms = criterion(sr, gt, return_terms=True, generator=torch.Generator().manual_seed(seed))
    return {"loss": loss.mean().item(), **{f"term/{name}": value.mean().item() for name, value in terms.items()}}


@torch.no_grad()
def energies(criterion: Criterion, sr: Tensor, gt: Tensor) -> dict[str, float]:
    """Return `energy/level<l>_sr` and `..._gt`, mean F^2 of the invertible network's features; nothing without one."""
    inn = getattr(criterion, "inn", None)
    found: dict[str, float] = {}
    if inn is not None:
        for name, image in (("sr", sr), ("gt", gt)):
            image = rescale(inn.like(image), criterion.input_range, (-1.0, 1.0))
            for level, features in enumerate(inn.network.features(image), 1):
                found[f"energy/level{level}_{name}"] = features.square().mean().item()
    return found


def log_pictures(writer: SummaryWriter, criterion: Criterion, sr: Tensor, gt: Tensor, step: int, tag: str) -> None:
    """Write the images of a batch and their heat maps; see `log_pair`."""
    generator = torch.Generator().manual_seed(step)
    for name, image in (("sr", sr), ("gt", gt)):
        shown = rescale(image.detach().float(), criterion.input_range, (0.0, 1.0)).clamp(0, 1)
        writer.add_images(f"{tag}/{name}", shown, step)
    for name, heat in criterion.heatmap(sr, gt, generator=generator).items():
        # One pixel in a hundred may saturate, so that a single speck does not darken the rest. Sorted, as `quantile`
        # takes 16 million values at most in older versions of PyTorch, and `kthvalue` is not deterministic on CUDA.
        high = heat.flatten().sort().values[max(1, round(0.99 * heat.numel())) - 1].clamp(min=1e-30)
        # Red, green and blue rise one after the other: Matplotlib's "hot", nearly.
        colours = torch.stack([3 * heat / high - channel for channel in range(3)], dim=1)
        writer.add_images(f"{tag}/heatmap/{name}", colours.clamp(0, 1).float(), step)


def uncompiled(criterion: Any) -> Any:
    """The loss inside what `torch.compile` returns; anything else as it is."""
    return getattr(criterion, "_orig_mod", criterion)
