"""Choose the invertible network by what its loss does to trained SR models, not by likelihood alone.

    python benchmarks/choose_inn.py --train DIR --val DIR --out DIR

1. Every candidate network is trained on the photographs of --train with equal steps, batch, crop and seed. The
   candidates differ from `BASE` in one factor each; the bundled network competes as it is.
2. For every candidate and seed a small x4 SR model learns with L1 + factor * MGHFLoss(inn=candidate), and with L1
   alone for reference: equal steps, crops that depend on seed and step only, the demo's model, factor and optimiser.
3. Every model enlarges the photographs of --val, which `metrics.judge` compares with the originals.

Equal gradient budget: the features of the candidates have other scales, so that one set of coefficients would compare
scales. Each term's coefficient is set so that the median norm of its gradient with respect to SR, at bicubic x4 of
some crops of --train, is that of the bundled network with the default coefficients:

    c(term) = default(term) * median |d term(bundled) / d SR| / median |d term(candidate) / d SR|

All that is finished is kept in --out and skipped when the same command runs again: a kill loses the runs in progress.
The table goes to results/inn-choice.csv, the figure to docs/inn-choice.png; crops of the photographs stay in --out.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import statistics
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from coefficients import gradient_norms
from metrics import METRICS, judge
from runs import (
    photographs,
    provenance,
    random_crops,
    read_json,
    run_all,
    slug,
    spread,
    step_generator,
    unit_range,
    write_json,
)
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mghf_loss import HighFrequencyINN, INNConfig, MGHFLoss, checkpoints
from mghf_loss._files import format_table, write_atomically, write_table
from mghf_loss.demo import MGHF_WEIGHT
from mghf_loss.mghf import COEFFICIENTS
from mghf_loss.toy import SmallSR, downscale, upscale
from mghf_loss.training.loop import TrainConfig, train_inn
from mghf_loss.training.objective import add_noise, code_length

REFERENCE = "L1"
BUNDLED = "bundled"
BASE = INNConfig(noise_floor=6.0)
CANDIDATES = {
    "base": BASE,
    "packet": replace(BASE, variant="packet"),
    "couplings 1": replace(BASE, couplings=1),
    "couplings 4": replace(BASE, couplings=4),
    "noise 0": replace(BASE, noise_floor=0.0),
    "noise 2": replace(BASE, noise_floor=2.0),
    "noise 4": replace(BASE, noise_floor=4.0),
    "noise 8": replace(BASE, noise_floor=8.0),
    "noise 12": replace(BASE, noise_floor=12.0),
    "clamp 0.5": replace(BASE, clamp=0.5),
    "clamp 1": replace(BASE, clamp=1.0),
}
NAMES = (REFERENCE, BUNDLED, *CANDIDATES)

SR_BATCH, SR_CROP = 8, 64
LEAST_SR_STEPS = 20  # OneCycleLR divides by the length of its warm-up, a tenth of them, less one
CALIBRATION_CROPS = 32
INN_BATCH, INN_CROP, INN_LEARNING_RATE = 16, 64, 2e-3
COST_SIZE, COST_ROUNDS, COST_WARM_UP = 128, 40, 4
REPOSITORY = Path(__file__).parents[1]


@dataclass(frozen=True)
class Settings:
    """What all runs of one output folder have in common."""

    train: Path
    val: Path
    out: Path
    inn_steps: int
    sr_steps: int
    device: str

    def identity(self) -> dict[str, Any]:
        """What a result is only good for: stored with it, compared before it is used again."""
        return {
            "train": str(self.train.resolve()),
            "val": str(self.val.resolve()),
            "inn_steps": self.inn_steps,
            "sr_steps": self.sr_steps,
            "bundled_sha256": checkpoints.load(BUNDLED).sha256,
        }

    def network(self, name: str) -> str:
        """Where a candidate's network is, as `MGHFLoss(inn=...)` takes it."""
        return BUNDLED if name == BUNDLED else str(self.out / "inn" / slug(name))

    def candidate_file(self, name: str) -> Path:
        """What is known of a candidate before an SR model is trained with it."""
        return self.out / "candidates" / f"{slug(name)}.json"

    def run_file(self, name: str, seed: int) -> Path:
        """The result of one SR training; the model is beside it, with the suffix .safetensors."""
        return self.out / "runs" / f"{slug(name)}-seed{seed}.json"

    def finished(self, path: Path) -> bool:
        """Whether `path` holds a result of these settings; raises where it holds one of others."""
        if not path.exists():
            return False
        stored, now = read_json(path)["settings"], self.identity()
        changed = [key for key, value in stored.items() if now[key] != value]
        if changed:
            raise SystemExit(f"{path} is of another comparison (different: {', '.join(changed)}); choose another --out")
        return True


# Stage 1: the candidates.


def describe(settings: Settings, name: str) -> None:
    """Train a candidate, unless it is the bundled network, and measure what needs no SR model."""
    if name in CANDIDATES:
        training = TrainConfig(
            images=settings.train,
            out=Path(settings.network(name)),
            steps=settings.inn_steps,
            batch=INN_BATCH,
            crop=INN_CROP,
            learning_rate=INN_LEARNING_RATE,
            seed=0,
        )
        log = settings.out / "inn" / f"{slug(name)}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        # Progress bars of several workers would write over one another.
        with log.open("a", encoding="utf-8") as file, contextlib.redirect_stderr(file):
            train_inn(training, CANDIDATES[name], cpu=settings.device == "cpu")
    network = HighFrequencyINN.from_pretrained(settings.network(name)).to(settings.device)
    crops = random_crops(photographs(settings.train), CALIBRATION_CROPS, SR_CROP, torch.Generator().manual_seed(0))
    gt = unit_range(crops, settings.device)
    wanted = median_norms(MGHFLoss().to(settings.device), gt)
    norms = median_norms(MGHFLoss(inn=copy.deepcopy(network)).to(settings.device), gt)
    write_json(
        settings.candidate_file(name),
        {
            "name": name,
            "config": asdict(network.config),
            "parameters": sum(parameter.numel() for parameter in network.parameters()),
            "code_length": held_out_code_length(network, photographs(settings.val), settings.device),
            "cost_ratio": cost_ratio(network.config),
            "coefficients": {term: COEFFICIENTS["paper"][term] * wanted[term] / norms[term] for term in norms},
            "settings": {key: value for key, value in settings.identity().items() if key != "sr_steps"},
        },
    )


def median_norms(criterion: MGHFLoss, gt: Tensor) -> dict[str, float]:
    """Median over images of the norm of each unweighted term's gradient with respect to SR, at bicubic x4."""
    norms = gradient_norms(criterion, gt, torch.Generator(gt.device).manual_seed(0))
    return {term: norms[term].median().item() for term in criterion.coefficients}


@torch.no_grad()
def held_out_code_length(network: HighFrequencyINN, images: Iterable[Tensor], device: str) -> float:
    """Bits per detail value of 8-bit photographs with the noise that the network is made for, mean over photographs."""
    lengths = []
    for index, image in enumerate(images):
        height, width = (side // network.stride * network.stride for side in image.shape[-2:])
        noisy = add_noise(
            2 * unit_range(image[:, :height, :width], device) - 1,
            network.config.noise_floor,
            torch.Generator().manual_seed(index),
        )
        lengths.append(code_length(network(noisy), network.config.variant).item())
    return statistics.mean(lengths)


def cost_ratio(config: INNConfig) -> float:
    """Time of MGHFLoss forward and backward on 1 x 3 x 128^2 and one CPU thread over that with the base's network.

    CPU time, medians of rounds that run both in turn. It does not depend on the parameters.
    """
    gt = torch.rand(1, 3, COST_SIZE, COST_SIZE, generator=torch.Generator().manual_seed(0))
    sr = (0.9 * gt).requires_grad_()
    criteria = [MGHFLoss(inn=HighFrequencyINN(each)) for each in (config, BASE)]
    times: list[list[float]] = [[], []]
    for index in range(COST_WARM_UP + COST_ROUNDS):
        for which in (0, 1) if index % 2 else (1, 0):
            start = time.thread_time()  # not counting when another process has the core
            torch.autograd.grad(criteria[which](sr, gt), sr)
            if index >= COST_WARM_UP:
                times[which].append(time.thread_time() - start)
    candidate, base = map(statistics.median, times)
    return candidate / base


# Stages 2 and 3: an SR model, judged.


def train_and_judge(settings: Settings, name: str, seed: int) -> None:
    """Train one SR model and store it with its figures."""
    start, path = time.perf_counter(), settings.run_file(name, seed)
    criterion = None
    if name != REFERENCE:
        coefficients = read_json(settings.candidate_file(name))["coefficients"]
        criterion = MGHFLoss(coefficients=coefficients, inn=settings.network(name)).to(settings.device)
    model = train_sr(photographs(settings.train), criterion, settings.sr_steps, seed, settings.device)
    gts = [unit_range(image, settings.device) for image in photographs(settings.val)]
    with torch.no_grad():
        scores = judge([model(downscale(gt)) for gt in gts], gts)
    path.parent.mkdir(parents=True, exist_ok=True)
    state = {key: value.cpu().contiguous() for key, value in model.state_dict().items()}
    write_atomically(path.with_suffix(".safetensors"), partial(save_file, state))
    write_json(
        path,
        {
            "name": name,
            "seed": seed,
            "metrics": scores,
            "seconds": time.perf_counter() - start,
            **provenance(settings.device),
            "settings": settings.identity(),
        },
    )


def train_sr(images: list[Tensor], criterion: MGHFLoss | None, steps: int, seed: int, device: str) -> SmallSR:
    """Train as the demo does: L1, plus `MGHF_WEIGHT` times `criterion` where there is one."""
    torch.manual_seed(seed)
    model = SmallSR().to(device)
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, max_lr=1.5e-3, total_steps=steps, pct_start=0.1)
    patches = torch.Generator(device).manual_seed(seed)
    for step in range(steps):
        crops = random_crops(images, SR_BATCH, SR_CROP, step_generator(seed, step))
        gt = unit_range(crops, device)
        sr = model(downscale(gt))
        loss = F.l1_loss(sr, gt)
        if criterion is not None:
            loss = loss + MGHF_WEIGHT * criterion(sr, gt, generator=patches)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.2, error_if_nonfinite=True)
        optimiser.step()
        schedule.step()
    return model


# The report.


def load_runs(out: Path) -> list[dict[str, Any]]:
    """One row a run, in the order of `NAMES` and seeds."""
    candidates = [read_json(path) for path in (out / "candidates").glob("*.json")]
    described = {candidate["name"]: candidate for candidate in candidates}
    runs = [read_json(path) for path in (out / "runs").glob("*.json")]
    if not runs:
        raise SystemExit(f"no finished run below {out}")
    rows = []
    for run in sorted(runs, key=lambda run: (NAMES.index(run["name"]), run["seed"])):
        candidate = described.get(run["name"], {"config": {}, "coefficients": {}})  # L1 has no network
        rows.append(
            {
                "candidate": run["name"],
                "seed": run["seed"],
                **{name: candidate["config"].get(name, "") for name in asdict(BASE)},
                **{name: candidate.get(name, "") for name in ("parameters", "code_length", "cost_ratio")},
                **{name: run["metrics"].get(name, "") for name in METRICS},
                **{f"c_{name}": candidate["coefficients"].get(name, "") for name in COEFFICIENTS["paper"]},
                "inn_steps": run["settings"]["inn_steps"],
                "sr_steps": run["settings"]["sr_steps"],
                "device": run["device"],
                "torch": run["torch"],
                "date": run["date"],
            }
        )
    return rows


def summarise(rows: list[dict[str, Any]]) -> dict[str, dict[str, tuple[float, float]]]:
    """Mean and half range over seeds of each metric that was measured, by candidate and metric."""
    measured = [name for name in METRICS if all(row[name] != "" for row in rows)]
    names = dict.fromkeys(row["candidate"] for row in rows)
    return {
        name: {metric: spread([row[metric] for row in rows if row["candidate"] == name]) for metric in measured}
        for name in names
    }


def print_report(rows: list[dict[str, Any]]) -> None:
    first = {row["candidate"]: row for row in reversed(rows)}
    arrows = {"higher": "↑", "lower": "↓", "one": "→1"}
    table = []
    for name, metrics in summarise(rows).items():
        row = first[name]
        figures = {f"{key} {arrows[METRICS[key]]}": f"{mean:.4g} ±{half:.2g}" for key, (mean, half) in metrics.items()}
        bits, cost = (f"{row[key]:.3f}" if row[key] != "" else "" for key in ("code_length", "cost_ratio"))
        table.append({"candidate": name, **figures, "bits": bits, "cost": cost, "parameters": row["parameters"]})
    print(format_table(table))
    seeds = sorted({row["seed"] for row in rows})
    print(f"mean ± half the range over seeds {seeds}; bits per detail value at the candidate's own noise floor")


def print_coefficients(settings: Settings, names: Iterable[str]) -> None:
    table = []
    for name in names:
        coefficients = read_json(settings.candidate_file(name))["coefficients"]
        table.append(
            {
                "candidate": name,
                **{term: f"{c:.3g} (x{c / COEFFICIENTS['paper'][term]:.2f})" for term, c in coefficients.items()},
            }
        )
    print("coefficients of equal gradient budget (times the default)")
    print(format_table(table))


def plot(path: Path, rows: list[dict[str, Any]]) -> None:
    """Perception against distortion, a marker a candidate, bars over the range of the seeds."""
    from matplotlib import pyplot as plt

    summary = summarise(rows)
    perception = [name for name in ("kid", "spectrum_error_high", "niqe") if name in next(iter(summary.values()))]
    figure, axes = plt.subplots(
        1, len(perception), figsize=(5 * len(perception), 4.5), layout="constrained", squeeze=False
    )
    for axis, metric in zip(axes[0], perception, strict=True):
        for index, (name, metrics) in enumerate(summary.items()):
            (x, dx), (y, dy) = metrics["psnr"], metrics[metric]
            axis.errorbar(x, y, xerr=dx, yerr=dy, fmt="osD^v"[index % 5], color=f"C{index % 10}", label=name, capsize=2)
            axis.annotate(name, (x, y), (5, 4), textcoords="offset points", fontsize=8)
        axis.set_xlabel("PSNR in dB (more is better)")
        axis.set_ylabel(f"{metric.replace('_', ' ')} (less is better)")
        axis.margins(0.15)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda temporary: figure.savefig(temporary, dpi=110))
    plt.close(figure)


@torch.no_grad()
def plot_crops(settings: Settings, names: list[str], seed: int, count: int = 4, side: int = 96) -> None:
    """The most detailed place of the first photographs: GT, bicubic, then every model of `seed`."""
    from matplotlib import pyplot as plt

    models = {}
    for name in names:
        models[name] = SmallSR()
        models[name].load_state_dict(load_file(settings.run_file(name, seed).with_suffix(".safetensors")))
    images = photographs(settings.val)[:count]
    figure, axes = plt.subplots(
        len(images),
        len(models) + 2,
        figsize=(2 * (len(models) + 2), 2.1 * len(images)),
        layout="constrained",
        squeeze=False,
    )
    for row, image in zip(axes, images, strict=True):
        gt = unit_range(image, "cpu")
        detail = F.avg_pool2d((gt - upscale(downscale(gt))).square().mean(1, keepdim=True), side, stride=4)[0, 0]
        top, left = (4 * int(place) for place in torch.unravel_index(detail.argmax(), detail.shape))
        lr = downscale(gt)
        versions = {"GT": gt, "bicubic": upscale(lr), **{name: model(lr) for name, model in models.items()}}
        for axis, (name, version) in zip(row, versions.items(), strict=True):
            crop = version[0, :, top : top + side, left : left + side].clamp(0, 1)
            axis.imshow(crop.permute(1, 2, 0).numpy(), interpolation="nearest")
            axis.set_axis_off()
            axis.set_title(name, fontsize=8)
    write_atomically(settings.out / "crops.png", lambda temporary: figure.savefig(temporary, dpi=110))
    plt.close(figure)


def parse_arguments() -> argparse.Namespace:
    def positive(text: str) -> int:
        if int(text) < 1:
            raise ValueError
        return int(text)

    def enough(text: str) -> int:
        if int(text) < LEAST_SR_STEPS:
            raise argparse.ArgumentTypeError(f"must be at least {LEAST_SR_STEPS}, got {text}")
        return int(text)

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=Path, help="folder of photographs to train on")
    parser.add_argument("--val", type=Path, help="folder of photographs to judge on")
    parser.add_argument("--out", type=Path, required=True, help="folder for networks, models and results")
    parser.add_argument("--inn-steps", type=positive, default=3000, help="of each network (default %(default)s)")
    parser.add_argument("--sr-steps", type=enough, default=1500, help="of each SR model (default %(default)s)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1], help="of the SR models (default 0 1)")
    parser.add_argument("--workers", type=positive, default=2, help="processes of one thread (default %(default)s)")
    parser.add_argument(
        "--only", nargs="+", metavar="NAME", choices=NAMES, default=NAMES, help=f"of: {', '.join(NAMES)}"
    )
    parser.add_argument("--device", default="cpu", help="torch device (default %(default)s)")
    parser.add_argument("--csv", type=Path, default=REPOSITORY / "benchmarks" / "results" / "inn-choice.csv")
    parser.add_argument("--figure", type=Path, default=REPOSITORY / "docs" / "inn-choice.png")
    parser.add_argument("--report", action="store_true", help="only table and figure, of the finished runs in --out")
    arguments = parser.parse_args()
    if not arguments.report and not (arguments.train and arguments.val):
        parser.error("--train and --val are required, except with --report")
    return arguments


def main() -> None:
    arguments = parse_arguments()
    if not arguments.report:
        settings = Settings(
            arguments.train, arguments.val, arguments.out, arguments.inn_steps, arguments.sr_steps, arguments.device
        )
        names = [name for name in NAMES if name in arguments.only]
        networks = [name for name in names if name != REFERENCE]
        candidates = {
            name: partial(describe, settings, name)
            for name in networks
            if not settings.finished(settings.candidate_file(name))
        }
        run_all(candidates, arguments.workers, "candidates")
        if networks:
            print_coefficients(settings, networks)
        runs = {
            f"{name}, seed {seed}": partial(train_and_judge, settings, name, seed)
            for seed in arguments.seeds  # all candidates with one seed first: a table as early as possible
            for name in names
            if not settings.finished(settings.run_file(name, seed))
        }
        run_all(runs, arguments.workers, "SR models")
        plot_crops(settings, names, arguments.seeds[0])
    rows = load_runs(arguments.out)
    print_report(rows)
    arguments.csv.parent.mkdir(parents=True, exist_ok=True)
    write_table(arguments.csv, rows)
    plot(arguments.figure, rows)
    print(f"wrote {arguments.csv} and {arguments.figure}")


if __name__ == "__main__":
    main()
