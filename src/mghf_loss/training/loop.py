"""The training run through Accelerate: Adam, cosine schedule, EMA, held-out code length, exact resume."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from PIL import Image
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from .. import _checks, _files
from ..coupling import Bottleneck
from ..inn import HighFrequencyINN, INNConfig
from .data import Cropping, Source, batches, list_images, open_dataset, open_folder, read_held_out, slot_seed
from .objective import add_noise, bits_per_detail, code_length

STATE_FILE = "training-state.pt"
SAMPLES_FILE = "samples.png"
VALIDATION_SIDE = 256  # held-out images are cut to this, from the middle
PICTURES = 4

Precision = Literal["no", "bf16"]
# What may differ between a run and its continuation: none of these changes the parameters.
FREE = {"out", "save_every", "validation", "threads", "tensorboard"}


@dataclass(frozen=True)
class TrainConfig:
    """One training run: everything that, with the images, determines its result.

    The fields are the options of `mghf-loss train-inn`, and its help says what they are. Beyond that:

    Args:
        images: or None, and `dataset`.
        out: gets the network (EMA parameters), the state to resume from, sample pictures and logs.
        crop: a multiple of 2^levels.
        learning_rate: peak of the cosine schedule, after a linear warm-up of 200 steps at most.
        ema: decay of the exponential moving average of the parameters, reached by (1 + n) / (10 + n) after n steps.
        precision: `"bf16"` runs the convolutions that condition the map in bfloat16; the map itself and the
            likelihood stay in float32. None takes what `accelerate launch` was told.
    """

    images: Path | None
    out: Path
    dataset: str | None = None
    dataset_config: str | None = None
    split: str = "train"
    streaming: bool = False
    validation: Path | None = None
    held_out: int = 0
    steps: int = 20_000
    batch: int = 16
    crop: int = 96
    least_scale: float = 0.5
    dead_leaves: float = 0.0
    learning_rate: float = 2e-3
    ema: float = 0.999
    precision: Precision | None = None
    seed: int = 0
    save_every: int = 500
    threads: int = 2
    tensorboard: bool = False

    def __post_init__(self) -> None:
        if (self.images is None) == (self.dataset is None):
            raise ValueError(f"give either images or dataset, got images={self.images} and dataset={self.dataset}")
        if self.streaming and self.dataset is None:
            raise ValueError("streaming needs a dataset, got images")
        if self.validation is not None and self.held_out:
            raise ValueError(f"give validation or held_out, got {self.validation} and {self.held_out}")
        for name, least in {"steps": 1, "batch": 1, "crop": 1, "save_every": 1, "held_out": 0, "threads": 0}.items():
            _checks.integer(name, getattr(self, name), least=least)
        _checks.number("learning_rate", self.learning_rate, above=True)
        _checks.number("ema", self.ema, below=1)
        _checks.one_of("precision", self.precision, (None, *get_args(Precision)))
        _ = self.cropping  # which checks the rest

    @property
    def cropping(self) -> Cropping:
        """How crops are cut."""
        return Cropping(self.crop, self.least_scale, self.dead_leaves, self.seed)


def train_inn(config: TrainConfig, network_config: INNConfig, cpu: bool = False) -> HighFrequencyINN:
    """Train by maximum likelihood and return the network with its averaged parameters, also saved in `config.out`.

    One process or many: under `accelerate launch` every process calls this, gradients are averaged and the main
    process saves. A run that was stopped is continued where `config.out` holds its state; a state of another
    configuration raises `ValueError`. `cpu` keeps a run off the GPU.
    """
    if config.crop % 2**network_config.levels:
        raise ValueError(f"crop must be a multiple of 2^levels = {2**network_config.levels}, got {config.crop}")
    logs = {"log_with": "tensorboard", "project_dir": config.out} if config.tensorboard else {}
    accelerator = Accelerator(cpu=cpu, mixed_precision=config.precision, **logs)
    _checks.one_of("precision", accelerator.mixed_precision, Precision)
    if config.batch % accelerator.num_processes:
        raise ValueError(f"batch {config.batch} cannot be split over {accelerator.num_processes} processes")
    with ExitStack() as stack:
        _everywhere(lambda: stack.enter_context(_files.locked(config.out)), accelerator)
        return _train(config, network_config, accelerator)


def _train(config: TrainConfig, network_config: INNConfig, accelerator: Accelerator) -> HighFrequencyINN:
    main = accelerator.is_main_process
    source, held_out = _open(config, 2**network_config.levels, main)

    torch.manual_seed(config.seed)
    network = HighFrequencyINN(network_config).to(accelerator.device)
    average = AveragedModel(network, multi_avg_fn=partial(_average, config.ema))
    averaged: HighFrequencyINN = average.module  # type: ignore[assignment]
    if accelerator.mixed_precision == "bf16":
        for module in network.modules():
            if isinstance(module, Bottleneck):
                module.training_dtype = torch.bfloat16
    optimiser = torch.optim.Adam([p for p in network.parameters() if p.requires_grad], lr=config.learning_rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: _learning_rate_factor(step, config.steps))
    state = {"network": network, "average": average, "optimiser": optimiser, "schedule": schedule}
    run = _identity(config, source, accelerator) | asdict(network_config)
    keys, start = {*state, "step", "run", "damaged"}, 0
    if saved := _everywhere(lambda: _load(config.out / STATE_FILE, keys, run), accelerator):
        for name, part in state.items():
            part.load_state_dict(saved[name])
        source.damaged.update(saved["damaged"])
        start = saved["step"]
    if main and start == config.steps:  # nothing else would write a network that was lost since
        averaged.save_pretrained(config.out)
    parallel, optimiser = accelerator.prepare(network, optimiser)

    accelerator.wait_for_everyone()
    if config.tensorboard:
        import tensorboard  # noqa: F401  Accelerate would leave the logs out without a word

        accelerator.init_trackers("logs")
    steps = range(start, config.steps)
    progress = tqdm(steps, "train-inn", initial=start, total=config.steps, unit="step", disable=not main)
    rank, processes = accelerator.process_index, accelerator.num_processes
    if main:
        resumed = f", resumed at step {start}" if start else ""
        tqdm.write(f"processes: {processes}, device: {accelerator.device}, batch: {config.batch}{resumed}")
    crops = batches(source, start, config.steps, config.batch, rank, processes, config.threads)
    for step, batch in zip(progress, crops, strict=True):
        first_slot = step * config.batch + rank * len(batch)
        noisy = _add_noise(batch.to(accelerator.device), network_config.noise_floor, config.seed, first_slot)
        bits = bits_per_detail(parallel(noisy), network_config.variant).mean()  # every level counts as much
        optimiser.zero_grad(set_to_none=True)
        accelerator.backward(bits)
        norm = nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        if not norm.isfinite():  # on every process: the gradients are averaged already
            raise RuntimeError(
                f"step {step}: the gradient is not finite; lower the learning rate ({config.learning_rate}) and choose "
                "another output folder"
            )
        optimiser.step()
        schedule.step()
        average.update_parameters(network)
        if step % 20 == 0:
            progress.set_postfix(bits=f"{bits.item():.3f}", skipped=len(source.damaged))
            values = {"train/bits": bits.item(), "train/gradient_norm": norm.item()}
            accelerator.log({**values, "train/learning_rate": schedule.get_last_lr()[0]}, step=step + 1)
        if (step + 1) % config.save_every == 0 or step + 1 == config.steps:
            if main:
                snapshot = {name: part.state_dict() for name, part in state.items()}
                snapshot |= {"step": step + 1, "run": run, "damaged": sorted(source.damaged.copy())}
                # The network first: a kill in between repeats some steps, and no state is ahead of its network.
                averaged.save_pretrained(config.out)
                _files.write_atomically(config.out / STATE_FILE, partial(torch.save, snapshot))
                if held_out:
                    _evaluate(averaged, held_out, step + 1, config.out, accelerator)
            accelerator.wait_for_everyone()
    damaged = sorted(set(gather_object(sorted(source.damaged))))
    if main and damaged:
        print(f"{len(damaged)} images were skipped: {', '.join(damaged[:5])}{' ...' if len(damaged) > 5 else ''}")
    if main:
        print(f"wrote {config.out}; use it with MGHFLoss(inn={str(config.out)!r})")
    accelerator.end_training()
    return averaged.eval()


def _open(config: TrainConfig, stride: int, main: bool) -> tuple[Source, list[Tensor]]:
    """Return the source of crops and, on the main process, which evaluates, the held-out images."""
    if config.images is not None:
        source, held_out = open_folder(config.images, config.cropping, config.held_out, config.out)
    else:
        assert config.dataset is not None
        source, held_out = open_dataset(
            config.dataset, config.dataset_config, config.split, config.streaming, config.cropping, config.held_out
        )
    if config.validation is not None:
        held_out = list_images(config.validation, config.out)
    if not main or not held_out:
        return source, []
    images = read_held_out(held_out, VALIDATION_SIDE, stride, source.damaged)
    if not images:
        raise ValueError(f"none of the {len(held_out)} held-out images is readable and at least {stride} x {stride}")
    return source, images


def _average(decay: float, means: Any, values: Any, updates: Tensor | int) -> None:
    # A young average forgets faster, or it would remember the initialisation for thousands of steps.
    count = int(updates)
    get_ema_multi_avg_fn(min(decay, (1 + count) / (10 + count)))(means, values, count)


def _learning_rate_factor(step: int, steps: int) -> float:
    """Linear warm-up, then cosine."""
    warm_up = min(200, steps // 10 + 1)
    if step < warm_up:
        return (1 + (warm_up - 1) * step / warm_up) / warm_up
    return 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(1, steps - warm_up)))


def _add_noise(batch: Tensor, noise_floor: float, seed: int, first_slot: int) -> Tensor:
    """Add noise that is a function of (seed, slot), like the crops."""
    generator = torch.Generator(batch.device)
    noisy = []
    for slot, image in enumerate(batch, first_slot):
        generator.manual_seed(slot_seed("noise", seed, slot))
        noisy.append(add_noise(image, noise_floor, generator))
    return torch.stack(noisy)


@torch.no_grad()
def _evaluate(network: HighFrequencyINN, images: list[Tensor], step: int, out: Path, accelerator: Accelerator) -> None:
    """Log the held-out code length, and pictures of details sampled given the coarse image."""
    network.eval()
    config, device = network.config, accelerator.device
    totals, per_level, pictures = [], [], []
    for index, pixels in enumerate(images):
        generator = torch.Generator(device).manual_seed(index)
        image = pixels.to(device)[None] / 127.5 - 1
        latent = network(add_noise(image, config.noise_floor, generator))
        totals.append(code_length(latent, config.variant))
        per_level.append(bits_per_detail(latent, config.variant))
        if index < PICTURES:
            drawn = [torch.randn(f.shape, generator=generator, device=device) for f in latent.features]
            sample = network.inverse(latent._replace(features=drawn))
            pair = torch.cat((image, sample), dim=2)[0].clamp(-1, 1) / 2 + 0.5
            pictures.append(F.pad(pair, (0, VALIDATION_SIDE - pair.shape[2], 0, 2 * VALIDATION_SIDE - pair.shape[1])))
    total, levels = torch.cat(totals).mean().item(), torch.cat(per_level).mean(0).tolist()
    by_level = ", ".join(f"stride {2 ** (i + 1)}: {bits:.3f}" for i, bits in enumerate(levels))
    tqdm.write(f"step {step}: held-out {total:.4f} bits per detail value, lower is better ({by_level})")
    accelerator.log(
        {"held-out/bits": total} | {f"held-out/bits_level_{i}": bits for i, bits in enumerate(levels)}, step=step
    )
    sheet = (torch.cat(pictures, dim=2) * 255).round().byte().permute(1, 2, 0).cpu().numpy()
    _files.write_atomically(out / SAMPLES_FILE, Image.fromarray(sheet).save)
    for tracker in accelerator.trackers:
        tracker.log_images({"held-out and sampled details": sheet[None]}, step=step, dataformats="NHWC")  # type: ignore[attr-defined]


def _identity(config: TrainConfig, source: Source, accelerator: Accelerator) -> dict[str, Any]:
    """What makes two runs the same run, as plain values."""
    values = {field.name: getattr(config, field.name) for field in fields(config) if field.name not in FREE}
    return {
        **values,
        "images": config.images and str(config.images.resolve()),
        "files": source.digest,
        "precision": accelerator.mixed_precision,
        "processes": accelerator.num_processes if config.dataset else 0,  # they share a stream, not a folder's slots
    }


def _everywhere(work: Callable[[], Any], accelerator: Accelerator) -> Any:
    """Do `work` on the main process; return or raise on every process what it gave.

    The others may be on nodes that do not see its disk.
    """
    found: list[Any] = [None]
    if accelerator.is_main_process:
        try:
            found = [work()]
        except (OSError, ValueError) as error:
            found = [error]
    broadcast_object_list(found)
    if isinstance(found[0], Exception):
        raise found[0]
    return found[0]


def _load(path: Path, keys: set[str], run: dict[str, Any]) -> dict[str, Any] | None:
    """Read the state of the run `run`; None where there is none."""
    if not path.exists():
        return None
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a damaged archive raises
        raise ValueError(f"cannot resume from {path}: {error}; delete it to start anew") from error
    if not isinstance(saved, dict) or set(saved) != keys:
        raise ValueError(f"cannot resume from {path}: it is no state of train-inn; choose another output folder")
    if saved["run"] != run:
        changed = sorted(key for key in run if saved["run"].get(key) != run[key])
        raise ValueError(
            f"{path} belongs to another run (different: {', '.join(changed)}); choose another output folder"
        )
    return saved
