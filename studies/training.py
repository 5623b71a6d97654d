"""Training one model, and what a model makes of a photograph."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from . import losses, models, photographs
from .config import Protocol
from .tasks import degrade


class DivergenceError(RuntimeError):
    """A gradient or an image that is not finite."""


@dataclass(frozen=True)
class Objective:
    """L1 + factor * loss - critic * critic(sr)."""

    loss: losses.Loss | None = None
    factor: float = 0.0
    critic: float = 0.0


def train(
    model: nn.Module,
    task: str,
    images: list[Tensor],
    protocol: Protocol,
    optimiser: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
    steps: range,
    seed: int,
    title: str,
    objective: Objective | None = None,
) -> None:
    """Minimise the objective; what a step sees depends on seed and step alone, whatever is compared."""
    objective = objective or Objective()
    device = str(next(model.parameters()).device)
    torch.manual_seed(seed)  # of a model that draws noise, and of the critic
    critic = models.critic().to(device) if objective.critic else None
    critic_optimiser = torch.optim.Adam(critic.parameters(), lr=4e-4, betas=(0.0, 0.9)) if critic else None
    draws = torch.Generator().manual_seed(seed)
    model.train()
    for step in tqdm(steps, desc=title, unit="step", leave=False, disable=None):
        generator = torch.Generator().manual_seed(1_000_003 * (seed + 1) + step)
        crops = photographs.random_crops(images, protocol.batch, protocol.crop, generator)
        gt = photographs.unit_range(crops, device)
        sr = model(degrade(gt, task, generator))
        value = F.l1_loss(sr, gt)
        if objective.loss is not None:
            value = value + objective.factor * objective.loss(sr, gt, draws)
        if critic is not None:
            value = value - objective.critic * critic(sr).mean()
        optimiser.zero_grad(set_to_none=True)
        value.backward()
        if not torch.isfinite(nn.utils.clip_grad_norm_(model.parameters(), protocol.clip)):
            raise DivergenceError(f"the gradient was not finite in step {step - steps.start}")
        optimiser.step()
        schedule.step()
        if critic is not None and critic_optimiser is not None:
            critic_optimiser.zero_grad(set_to_none=True)
            (F.relu(1 - critic(gt)).mean() + F.relu(1 + critic(sr.detach())).mean()).backward()
            critic_optimiser.step()


@torch.no_grad()
def restore(model: nn.Module, task: str, gt: Tensor, index: int) -> Tensor:
    """What `model` makes of photograph number `index`, (1, 3, H, W), degraded."""
    degraded = degrade(gt, task, torch.Generator().manual_seed(index))
    torch.manual_seed(index)  # of a model that draws noise
    sr = model.eval()(degraded)
    if not sr.isfinite().all():
        raise DivergenceError("the model's images are not finite")
    return sr
