"""What a loss is like, without training a model: minutes on a CPU.

    python -m studies.diagnose                                   # the losses of studies/diagnose.toml
    python -m studies.diagnose --config FILE --images DIR        # your losses, your photographs

- Recovery: PSNR of what Adam on the pixels makes of a degraded image in 150 steps with the loss alone. A loss that
  gives some error no weight does not come back to GT.
- Direction: cosine of the descent direction -d loss / d sr with gt - sr.
- Gradient: norm of d loss / d sr over that of L1, with a factor of 1; of our losses term by term too.
- Response: the loss over the severity of a distortion. It should rise, and not stop rising.
- Phase: the loss of one pair at the 64 phases of an 8 x 8 grid, as largest over least.
"""

from __future__ import annotations

import argparse
import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from kornia.filters import gaussian_blur2d
from torch import Tensor
from tqdm import tqdm

from benchmarks.machine import provenance
from mghf_loss._files import check_output
from mghf_loss.mghf import PRESETS
from mghf_loss.toy import downscale, middle, photograph, upscale

from . import command, config, losses, photographs, tables, tasks
from .config import L1, LossSpec
from .store import write_json

HERE = Path(__file__).parent
PHOTOGRAPHS = ("astronaut", "chelsea", "coffee", "stereo_motorcycle")
SIDE = 96
PERIOD = 8
STEPS, LEARNING_RATE = 150, 0.005
DRAWS, RANDOM = 16, 0.01  # of a loss whose value differs by more than this from draw to draw
FALL = 0.01  # of a response, relative to its largest value: less is no fall


def blurred(image: Tensor, sigma: float) -> Tensor:
    side = 2 * math.ceil(3 * sigma) + 1
    return gaussian_blur2d(image, (side, side), (sigma, sigma))


def noisy(image: Tensor, sigma: float) -> Tensor:
    return tasks.add_noise(image, torch.full((len(image),), sigma), torch.Generator().manual_seed(0))


def compressed(image: Tensor, quality: float) -> Tensor:
    return tasks.jpeg(image, torch.full((len(image),), quality))


def blocks(image: Tensor) -> Tensor:
    return F.interpolate(F.avg_pool2d(image, PERIOD), scale_factor=PERIOD)


STATES: dict[str, Callable[[Tensor], Tensor]] = {
    "noise 25": partial(noisy, sigma=25.0),
    "blur 1.5": partial(blurred, sigma=1.5),
    "JPEG 20": partial(compressed, quality=20.0),
    "bicubic x4": lambda image: upscale(downscale(image)),
}
# From weak to strong.
RESPONSES: dict[str, tuple[Callable[[Tensor, float], Tensor], tuple[float, ...]]] = {
    "noise": (noisy, (2, 5, 10, 25, 50, 100)),
    "blur": (blurred, (0.4, 0.7, 1, 1.5, 2, 3)),
    "JPEG": (compressed, (90, 70, 50, 30, 10, 5)),
    "blockiness": (lambda image, amount: image.lerp(blocks(image), amount), (0.1, 0.2, 0.4, 0.6, 0.8, 1)),
    "shift": (lambda image, pixels: image.roll(int(pixels), -1), (1, 2, 3, 4, 6, 8)),
    "brightness": (torch.add, (0.02, 0.05, 0.1, 0.2, 0.3, 0.4)),
    "contrast": (
        lambda image, factor: image.mean((1, 2, 3), keepdim=True).lerp(image, factor),
        (0.95, 0.9, 0.8, 0.6, 0.4, 0.2),
    ),
}


def psnr(sr: Tensor, gt: Tensor) -> float:
    """Mean over images, unclamped."""
    return (-10 * (sr - gt).square().mean((1, 2, 3)).log10()).mean().item()


def value(loss: losses.Loss, sr: Tensor, gt: Tensor, seed: int = 0) -> Tensor:
    return loss(sr, gt, torch.Generator().manual_seed(seed))


def recovery(loss: losses.Loss, start: Tensor, gt: Tensor, steps: int = STEPS) -> float:
    """PSNR after Adam on the pixels, whose learning rate falls to 0; random draws differ from step to step."""
    sr = start.clone().requires_grad_()
    optimiser = torch.optim.Adam([sr], lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    for step in range(steps):
        optimiser.zero_grad()
        loss(sr, gt, torch.Generator().manual_seed(step)).backward()
        optimiser.step()
        schedule.step()
    return psnr(sr.detach(), gt)


def direction(loss: losses.Loss, sr: Tensor, gt: Tensor) -> float:
    """Cosine of -d loss / d sr with gt - sr, mean over images."""
    leaf = sr.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(value(loss, leaf, gt), leaf)
    return F.cosine_similarity(-gradient.flatten(1), (gt - sr).flatten(1)).mean().item()


@torch.no_grad()
def response(loss: losses.Loss, gt: Tensor) -> dict[str, list[float]]:
    """Values over the severities of every distortion."""
    return {
        name: [value(loss, distort(gt, severity), gt).item() for severity in severities]
        for name, (distort, severities) in RESPONSES.items()
    }


def describe_response(values: list[float]) -> str:
    """Rises all the way, stops rising, falls, or is none."""
    largest = max(values)
    if not all(map(math.isfinite, values)):
        return "not finite"
    if largest <= 0:
        return "no response"
    if any(b < a - FALL * largest for a, b in itertools.pairwise(values)):
        return "falls"
    return "saturates" if values[-1] - values[-3] < 0.1 * largest else "rises"


@torch.no_grad()
def phases(loss: losses.Loss, sr: Tensor, gt: Tensor) -> list[list[float]]:
    """The loss of the pair, rolled to the 8 x 8 phases of a grid; the mean over draws where these matter."""
    first, second = (value(loss, sr, gt, seed).item() for seed in range(2))
    draws = DRAWS if abs(first - second) > RANDOM * abs(first) else 1

    def at(*shift: int) -> float:
        sr_there, gt_there = (image.roll(shift, (-2, -1)) for image in (sr, gt))
        return sum(value(loss, sr_there, gt_there, seed).item() for seed in range(draws)) / draws

    return [[at(top, left) for left in range(PERIOD)] for top in range(PERIOD)]


def term_specs(specs: Mapping[str, LossSpec]) -> dict[str, LossSpec]:
    """Each term alone of the losses of several."""
    found = {}
    for name, spec in specs.items():
        if spec.type == "MGHFLoss":
            preset = PRESETS[spec.options.get("preset", "balanced")].coefficients
            coefficients = {**preset, **spec.options.get("coefficients", {})}
            for term, factor in coefficients.items():
                if factor:
                    alone = {other: factor if other == term else 0.0 for other in coefficients}
                    found[f"{name}: {term}"] = replace(spec, options={**spec.options, "coefficients": alone})
    return found


def diagnose(spec: LossSpec, gt: Tensor, device: str, steps: int = STEPS) -> dict[str, Any]:
    """Every figure of one loss."""
    loss = losses.build(spec.type, spec.options, device)
    states = {name: degrade(gt) for name, degrade in STATES.items()}
    wide = upscale(downscale(gt))
    return {
        "recovery": {name: recovery(loss, sr, gt, steps) for name, sr in states.items()},
        "direction": {name: direction(loss, sr, gt) for name, sr in states.items()},
        "gradient": {name: losses.gradient_ratio(loss, sr, gt) for name, sr in states.items()},
        "response": response(loss, gt),
        "phases": phases(loss, wide, gt),
    }


def report(found: Mapping[str, Mapping[str, Any]], terms: Mapping[str, Mapping[str, float]], gt: Tensor) -> str:
    """The tables, as Markdown."""
    text = []

    def add(title: str, cells: Mapping[str, Mapping[str, Any]], form: str = "") -> None:
        rows = [{"loss": name, **{key: format(cell, form) for key, cell in row.items()}} for name, row in cells.items()]
        text.append(f"## {title}\n\n" + tables.markdown(rows))

    start = {"(start)": {name: psnr(degrade(gt), gt) for name, degrade in STATES.items()}}
    of = {kind: {name: figures[kind] for name, figures in found.items()} for kind in next(iter(found.values()))}
    add(f"Recovery: PSNR in dB after {STEPS} steps on the pixels", {**start, **of["recovery"]}, ".1f")
    add("Direction: cosine of descent with gt - sr", of["direction"], ".2f")
    add("Gradient: norm over that of L1, factor 1", {**of["gradient"], **terms}, ".3g")
    for kinds in (list(RESPONSES)[:4], list(RESPONSES)[4:]):
        responses = of["response"].items()
        add("Response", {name: {kind: describe_response(each[kind]) for kind in kinds} for name, each in responses})
    phase = {name: torch.tensor(values) for name, values in of["phases"].items()}
    spread = {
        name: {"largest / least": (each.max() / each.min()).item(), "std / mean": (each.std() / each.mean()).item()}
        for name, each in phase.items()
    }
    add("Phase of the grid, bicubic x4", spread, ".3f")
    return "\n\n".join(text) + "\n"


def images(folder: Path | None, device: str) -> Tensor:
    """The middles of four photographs, (4, 3, SIDE, SIDE)."""
    if folder is None:
        pixels = [(255 * photograph(name)[0]).round().byte() for name in PHOTOGRAPHS]
    else:
        photographs.check(folder, SIDE)
        pixels = photographs.load(folder)[: len(PHOTOGRAPHS)]
    return photographs.unit_range(torch.stack([middle(image, SIDE) for image in pixels]), device)


def work(arguments: argparse.Namespace) -> None:
    torch.set_num_threads(arguments.threads)
    gt = images(arguments.images, arguments.device)
    known = {L1: LossSpec("l1"), **config.read(arguments.config, needs_tracks=False).losses}
    for name in arguments.losses or ():
        config.check_known("loss", name, known)
    specs = {name: known[name] for name in arguments.losses or known}
    specs = {name: spec for name, spec in specs.items() if spec.type not in losses.TRAINING_FREE}
    check_output(arguments.out)  # before minutes of work
    found: dict[str, dict[str, Any]] = {}
    for name, spec in tqdm(specs.items(), desc="diagnose", unit="loss"):
        try:
            found[name] = diagnose(spec, gt, arguments.device)
        except Exception as error:  # a peer may fail in any way
            tqdm.write(f"skipped {name}: {' '.join(f'{type(error).__name__}: {error}'.split())[:200]}")
    states = {name: degrade(gt) for name, degrade in STATES.items()}
    terms = {}
    for name, spec in tqdm(term_specs({name: specs[name] for name in found}).items(), desc="terms", unit="term"):
        loss = losses.build(spec.type, spec.options, arguments.device)
        terms[name] = {state: losses.gradient_ratio(loss, sr, gt) for state, sr in states.items()}
    if not found:
        raise ValueError("no loss could be built: see what was skipped")
    path = arguments.out / "diagnose.json"
    write_json(path, {**provenance(arguments.device), "losses": found, "terms": terms})
    print(report(found, terms, gt))
    print(f"wrote {path}")


def main() -> None:
    parser = command.parser("studies.diagnose", __doc__)
    parser.add_argument("--config", type=Path, default=HERE / "diagnose.toml", help="file with a table of losses")
    parser.add_argument("--losses", nargs="+", metavar="NAME", help="names of losses (default all)")
    parser.add_argument("--images", type=Path, help="folder of photographs (default four of scikit-image)")
    parser.add_argument("--out", type=Path, default=HERE / "results", help="folder (default %(default)s)")
    command.run(parser, work)


if __name__ == "__main__":
    main()
