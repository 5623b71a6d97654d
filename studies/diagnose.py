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
from mghf_loss.mghf import COEFFICIENTS
from mghf_loss.toy import downscale, photograph, upscale

from . import config, losses, photographs, tables, tasks
from .config import L1, LossSpec
from .store import write_json

HERE = Path(__file__).parent
PHOTOGRAPHS = ("astronaut", "chelsea", "coffee", "stereo_motorcycle")
SIDE = 96
PERIOD = 8
STEPS, LEARNING_RATE = 150, 0.02
FALL = 0.01  # of a response, relative to its largest value: less is no fall


def blurred(image: Tensor, sigma: float) -> Tensor:
    side = 2 * math.ceil(3 * sigma) + 1
    return gaussian_blur2d(image, (side, side), (sigma, sigma))


def noisy(image: Tensor, sigma: float) -> Tensor:
    return tasks.add_noise(image, torch.full((len(image),), sigma), torch.Generator().manual_seed(0))


def compressed(image: Tensor, quality: float) -> Tensor:
    return tasks.jpeg(image, torch.full((len(image),), quality))


def blocky(image: Tensor, amount: float) -> Tensor:
    return image.lerp(F.interpolate(F.avg_pool2d(image, PERIOD), scale_factor=PERIOD), amount)


def moved(image: Tensor, pixels: float) -> Tensor:
    return torch.roll(image, int(pixels), dims=-1)


def contrasted(image: Tensor, factor: float) -> Tensor:
    mean = image.mean((1, 2, 3), keepdim=True)
    return mean + factor * (image - mean)


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
    "blockiness": (blocky, (0.1, 0.2, 0.4, 0.6, 0.8, 1)),
    "shift": (moved, (1, 2, 3, 4, 6, 8)),
    "brightness": (torch.add, (0.02, 0.05, 0.1, 0.2, 0.3, 0.4)),
    "contrast": (contrasted, (0.95, 0.9, 0.8, 0.6, 0.4, 0.2)),
}


def psnr(sr: Tensor, gt: Tensor) -> float:
    """Mean over images, unclamped."""
    return (-10 * (sr - gt).square().mean((1, 2, 3)).log10()).mean().item()


def value(loss: losses.Loss, sr: Tensor, gt: Tensor) -> Tensor:
    return loss(sr, gt, torch.Generator().manual_seed(0))


def recovery(loss: losses.Loss, start: Tensor, gt: Tensor, steps: int = STEPS) -> float:
    """PSNR after Adam on the pixels, whose learning rate falls to 0; random draws differ from step to step."""
    sr = start.clone().requires_grad_()
    optimiser = torch.optim.Adam([sr], lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        optimiser.zero_grad()
        loss(sr, gt, generator).backward()
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
    """Rises all the way, stops rising, or falls."""
    largest = max(values)
    if any(b < a - FALL * largest for a, b in itertools.pairwise(values)):
        return "falls"
    return "saturates" if values[-1] - values[-3] < 0.1 * largest else "rises"


@torch.no_grad()
def phases(loss: losses.Loss, sr: Tensor, gt: Tensor) -> list[list[float]]:
    """The loss of the pair, rolled to the 8 x 8 phases of a grid."""

    def at(*shift: int) -> float:
        return value(loss, *(image.roll(shift, (-2, -1)) for image in (sr, gt))).item()

    return [[at(top, left) for left in range(PERIOD)] for top in range(PERIOD)]


def term_specs(specs: Mapping[str, LossSpec]) -> dict[str, LossSpec]:
    """Each term alone of the losses of several."""
    found = {}
    for name, spec in specs.items():
        if spec.type == "MGHFLoss":
            preset = COEFFICIENTS[spec.options.get("preset", "paper")]
            times = {term: 1.0 for term, factor in preset.items() if factor} | dict(spec.options.get("times", {}))
            for term, factor in times.items():
                alone = {other: factor if other == term else 0.0 for other in times}
                if factor:
                    found[f"{name}: {term}"] = replace(spec, options={**spec.options, "times": alone})
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
    start = {name: psnr(degrade(gt), gt) for name, degrade in STATES.items()}
    rows = [{"loss": "(start)", **{name: f"{each:.1f}" for name, each in start.items()}}]
    for kind, title, form in (
        ("recovery", f"Recovery: PSNR in dB after {STEPS} steps on the pixels", ".1f"),
        ("direction", "Direction: cosine of descent with gt - sr", ".2f"),
        ("gradient", "Gradient: norm over that of L1, factor 1", ".3g"),
    ):
        shown = {**{name: figures[kind] for name, figures in found.items()}, **(terms if kind == "gradient" else {})}
        table = [
            {"loss": name, **{state: format(each, form) for state, each in figures.items()}}
            for name, figures in shown.items()
        ]
        text.append(f"## {title}\n\n" + tables.markdown((rows if kind == "recovery" else []) + table))
    table = [
        {"loss": name, **{kind: describe_response(values) for kind, values in figures["response"].items()}}
        for name, figures in found.items()
    ]
    kinds = list(RESPONSES)
    for part in (kinds[:4], kinds[4:]):
        text.append(
            f"## Response to {', '.join(part)}\n\n"
            + tables.markdown([{key: row[key] for key in ("loss", *part)} for row in table])
        )
    table = []
    for name, figures in found.items():
        values = torch.tensor(figures["phases"])
        table.append(
            {
                "loss": name,
                "largest / least": f"{(values.max() / values.min()).item():.3f}",
                "std / mean": f"{(values.std() / values.mean()).item():.3f}",
            }
        )
    text.append("## Phase of the grid, bicubic x4\n\n" + tables.markdown(table))
    return "\n\n".join(text) + "\n"


def images(folder: Path | None, device: str) -> Tensor:
    """The middles of four photographs, (4, 3, SIDE, SIDE)."""
    if folder is None:
        pixels = [(255 * photograph(name)[0]).round().byte() for name in PHOTOGRAPHS]
    else:
        photographs.check(folder, SIDE)
        pixels = photographs.load(folder)[: len(PHOTOGRAPHS)]
    return photographs.unit_range(torch.stack([photographs.middle(image, SIDE) for image in pixels]), device)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--config", type=Path, default=HERE / "diagnose.toml", help="table of losses (default %(default)s)"
    )
    parser.add_argument("--losses", nargs="+", metavar="NAME", help="names of losses (default all)")
    parser.add_argument("--images", type=Path, help="folder of photographs (default four of scikit-image)")
    parser.add_argument("--out", type=Path, default=HERE / "results", help="folder (default %(default)s)")
    parser.add_argument("--device", default="cpu", help="torch device (default %(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default %(default)s)")
    return parser.parse_args()


def run(arguments: argparse.Namespace) -> None:
    torch.set_num_threads(arguments.threads)
    gt = images(arguments.images, arguments.device)
    known = {L1: LossSpec("l1"), **config.read_losses(arguments.config)}
    for name in arguments.losses or ():
        config.check_known("loss", name, known)
    specs = {name: known[name] for name in arguments.losses or known}
    specs = {name: spec for name, spec in specs.items() if spec.type not in losses.TRAINING_FREE}
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
    text = report(found, terms, gt)
    write_json(
        arguments.out / "diagnose.json",
        {**provenance(arguments.device), "losses": found, "terms": terms},
    )
    print(text)
    print(f"wrote {arguments.out / 'diagnose.json'}")


def main() -> None:
    try:
        run(parse_arguments())
    except (ValueError, OSError, RuntimeError) as error:
        raise SystemExit(f"studies.diagnose: error: {' '.join(str(error).split())}") from error


if __name__ == "__main__":
    main()
