"""The training run: Adam, cosine schedule, EMA, checkpoints written whole, resume."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, Dataset, Subset
from tqdm import tqdm

from .. import checkpoints
from ..inn import HighFrequencyINN, INNConfig
from .data import RandomCrops
from .objective import add_noise, objective

STATE_FILE = "training-state.pt"


@dataclass(frozen=True)
class TrainConfig:
    """One training run: everything that, with the images, determines its result.

    Args:
        images: folder of training images, searched recursively.
        out: folder for the network (EMA parameters) and the state to resume from.
        steps: optimiser steps.
        batch: crops per step.
        crop: side of a crop in pixels, a multiple of 2^levels.
        learning_rate: peak of the cosine schedule, after a linear warm-up of 200 steps at most.
        ema: decay of the exponential moving average of the parameters.
        seed: of initialisation, crops and noise.
        save_every: steps between checkpoints.
    """

    images: Path
    out: Path
    steps: int = 20_000
    batch: int = 16
    crop: int = 96
    learning_rate: float = 2e-3
    ema: float = 0.999
    seed: int = 0
    save_every: int = 500

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "crop", "save_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 < self.learning_rate < math.inf:
            raise ValueError(f"learning_rate must be positive, got {self.learning_rate}")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed must be in [0, 2^32), got {self.seed}")


def train_inn(config: TrainConfig, network_config: INNConfig, device: str = "cpu") -> HighFrequencyINN:
    """Train by maximum likelihood and return the network with its averaged parameters, also saved in `config.out`.

    A run that was stopped is continued where `config.out` holds its state; a state of another configuration
    raises `ValueError`.
    """
    if config.crop % 2**network_config.levels:
        raise ValueError(f"crop must be a multiple of 2^levels = {2**network_config.levels}, got {config.crop}")
    torch.manual_seed(config.seed)
    network = HighFrequencyINN(network_config).to(device)
    average = AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(config.ema))
    averaged: HighFrequencyINN = average.module  # type: ignore[assignment]
    optimiser = torch.optim.Adam([p for p in network.parameters() if p.requires_grad], lr=config.learning_rate)
    warm_up = min(200, config.steps // 10 + 1)

    def factor(step: int) -> float:
        if step < warm_up:
            return (1 + (warm_up - 1) * step / warm_up) / warm_up
        return 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(1, config.steps - warm_up)))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, factor)
    state = {"network": network, "average": average, "optimiser": optimiser, "schedule": schedule}
    crops = RandomCrops(config.images, config.crop, config.steps * config.batch, config.seed)
    config.out.mkdir(parents=True, exist_ok=True)
    run = {
        **asdict(config),
        **asdict(network_config),
        "images": str(config.images.resolve()),
        "out": "",
        "save_every": 0,
    }
    start = _restore(config.out / STATE_FILE, state, run)

    progress = tqdm(range(start, config.steps), initial=start, total=config.steps, desc="train-inn", unit="step")
    for step, batch in zip(progress, _batches(crops, start * config.batch, config.batch), strict=True):
        noise = torch.Generator().manual_seed(config.seed * 1_000_003 + step)
        bits = objective(network, add_noise(batch, network_config.noise_floor, noise).to(device))
        optimiser.zero_grad(set_to_none=True)
        bits.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0, error_if_nonfinite=True)
        optimiser.step()
        schedule.step()
        average.update_parameters(network)
        if step % 20 == 0:
            progress.set_postfix(bits=f"{bits.item():.3f}")
        if (step + 1) % config.save_every == 0 or step + 1 == config.steps:
            snapshot = {name: part.state_dict() for name, part in state.items()} | {
                "step": step + 1,
                "run": run,
            }
            # The network first: a kill in between repeats some steps, and no state is ahead of its network.
            averaged.save_pretrained(config.out)
            checkpoints.write_atomically(config.out / STATE_FILE, lambda path, s=snapshot: torch.save(s, path))
    return averaged.eval()


def _batches(crops: Dataset[torch.Tensor], start: int, size: int) -> Iterator[torch.Tensor]:
    rest = Subset(crops, range(start, len(crops)))  # type: ignore[arg-type]
    return iter(DataLoader(rest, batch_size=size))


def _restore(path: Path, state: dict, run: dict) -> int:
    """Load a saved state into the parts of `state`; return the step to go on from, 0 where there is none."""
    if not path.exists():
        return 0
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a damaged archive raises
        raise ValueError(f"cannot resume from {path}: {error}; delete it to start anew") from error
    if not isinstance(saved, dict) or set(saved) != {*state, "step", "run"}:
        raise ValueError(f"cannot resume from {path}: it is no state of train-inn; choose another output folder")
    if saved["run"] != run:
        changed = sorted(key for key in run if saved["run"].get(key) != run[key])
        raise ValueError(
            f"{path} belongs to another run (different: {', '.join(changed)}); choose another output folder"
        )
    for name, part in state.items():
        part.load_state_dict(saved[name])
    return saved["step"]
