"""Train SR and restoration models with one loss each, judge them, and say which loss is worth it.

    python benchmarks/quality.py run benchmarks/photographs.toml --train DIR --val DIR --out DIR
    python benchmarks/quality.py report benchmarks/photographs.toml --out DIR
    python benchmarks/quality.py judge SR_DIR GT_DIR     # images of any model, SinSR's or OSEDiff's for instance

`run` does what the configuration says, in four stages:

1. Every loss that is not given a factor is measured: the norm of its gradient with respect to SR over that of L1,
   at the starting point of the tuning task (medians over crops). A "ratio" is a factor in units of L1's gradient.
2. The sweep: one model per loss and ratio, L1 + factor * loss, one seed.
3. The choice, by photographs of --train that no model is trained on: of the factors that cost at most
   `psnr_allowance` dB against L1 alone, the one with the least mean of log(measure / measure of L1) over NIQE, KID and
   spectrum error; where every factor costs more, the least one. Every loss gets the same budget.
4. The grids: models x tasks x losses x seeds at the chosen factors. What a sweep has trained is not trained again.

All runs have equal steps, crops that depend on seed and step only, one optimiser and the pixel term L1. Every finished
run is one file below --out: a kill loses the runs in progress, and the same command goes on. A loss that cannot be had
(no weights, no package) is a printed skip, listed by the report too; a loss that diverges is a result.

To be kept in mind: NIQE, KID and spectrum error choose the factors and judge too, on other photographs. KID is in the
features of EfficientNet-Lite0, which the loss of that name minimises; the report marks such cells and leaves them out
of the fronts. The bundled network of MGHF was trained on, and chosen by, photographs as well: judge on others.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cache, partial
from pathlib import Path
from typing import Any

import models
import peers
import torch
import torch.nn.functional as F
from metrics import LEAST_SIDE, judge
from runs import (
    photographs,
    provenance,
    random_crops,
    read_json,
    run_all,
    slug,
    step_generator,
    steps_bar,
    unit_range,
    write_json,
)
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tasks import TASKS, degrade, is_sr, starting_point
from torch import Tensor, nn

from mghf_loss import checkpoints
from mghf_loss._files import format_table, open_image, read_image, write_atomically, write_table
from mghf_loss.training.data import list_images

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PIXEL = "L1"
OURS = ("MGHFLoss", "MGHFnLoss")
PERCEPTION = ("niqe", "kid", "spectrum_error")  # what the choice of a factor looks at
CALIBRATION_CROPS = 32
TUNING_SIDE = 320
ADVERSARIAL_FACTOR = 0.005
LEAST_STEPS = 20  # OneCycleLR divides by the length of its warm-up, a tenth of them, less one


@dataclass(frozen=True)
class Training:
    """How every model is trained."""

    steps: int
    batch: int = 4
    crop: int = 96
    learning_rate: float = 1.5e-3
    clip: float = 0.2


@dataclass(frozen=True)
class Tuning:
    """How the factors are chosen: on `photographs` of --train, one model, task and seed, one run a ratio."""

    ratios: tuple[float, ...]
    photographs: int = 8
    model: str = "edsr"
    task: str = "sr-bicubic"
    seed: int = 0
    psnr_allowance: float = 0.5


@dataclass(frozen=True)
class LossSpec:
    """A loss of the configuration; `factor` fixes it, `factor_of` takes another loss's, else it is tuned."""

    type: str
    options: Mapping[str, Any] = field(default_factory=dict)
    factor: float | None = None
    factor_of: str | None = None


@dataclass(frozen=True)
class Grid:
    """One table: models x tasks x losses x seeds, compared with `reference`; with a critic where `adversarial`."""

    name: str
    losses: tuple[str, ...]
    models: tuple[str, ...] = ("edsr",)
    tasks: tuple[str, ...] = ("sr-bicubic",)
    seeds: tuple[int, ...] = (0, 1)
    adversarial: bool = False
    reference: str = PIXEL


@dataclass(frozen=True)
class Config:
    """A configuration file."""

    training: Training
    tuning: Tuning
    losses: Mapping[str, LossSpec]
    grids: tuple[Grid, ...]


@dataclass(frozen=True)
class Run:
    """One model: what it is trained with, and where it is kept."""

    model: str
    task: str
    loss: str
    seed: int
    factor: float
    adversarial: bool = False

    @property
    def name(self) -> str:
        """Also the name of its files."""
        critic = " adversarial" if self.adversarial else ""
        factor = f" x{self.factor:.4g}" if self.factor else ""
        return f"{self.model}{critic} {self.task} {self.loss}{factor} seed{self.seed}"

    def file(self, out: Path) -> Path:
        """The result; the model is beside it, with the suffix .safetensors."""
        return out / "runs" / f"{slug(self.name)}.json"


@dataclass(frozen=True)
class Place:
    """Where the photographs and the results are, and what computes."""

    train: Path
    val: Path
    out: Path
    device: str = "cpu"


def read_config(path: Path) -> Config:
    """Read and check a configuration; raise ValueError naming what came and what was expected."""

    def section(kind: type, content: Any, where: str) -> Any:
        known = {each.name for each in fields(kind)}
        if not isinstance(content, dict):
            raise ValueError(f"{path}: {where} must be a table, got {content!r}")
        if set(content) - known:
            raise ValueError(f"{path}: {where}: unknown keys {sorted(set(content) - known)}, known are {sorted(known)}")
        values = {key: tuple(value) if isinstance(value, list) else value for key, value in content.items()}
        try:
            return kind(**values)
        except TypeError as error:
            raise ValueError(f"{path}: {where}: {error}") from error

    with path.open("rb") as file:
        content = tomllib.load(file)
    if set(content) != {"training", "tuning", "losses", "grid"}:
        raise ValueError(f"{path}: expected the tables training, tuning, losses and grid, got {sorted(content)}")
    config = Config(
        section(Training, content["training"], "training"),
        section(Tuning, content["tuning"], "tuning"),
        {name: section(LossSpec, loss, f"losses.{name!r}") for name, loss in content["losses"].items()},
        tuple(section(Grid, grid, "grid") for grid in content["grid"]),
    )
    try:
        check(config)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from error
    return config


def check(config: Config) -> None:
    """Raise ValueError or TypeError unless every value is of its type and range, and every name is known, once."""

    def number(name: str, value: Any, kind: type, least: float) -> None:
        if isinstance(value, bool) or not isinstance(value, (int, kind)) or not least <= value < math.inf:
            what = "a whole number" if kind is int else "a number"
            raise ValueError(f"{name} must be {what} of at least {least:g}, got {value!r}")

    training, tuning = config.training, config.tuning
    number("training.steps", training.steps, int, LEAST_STEPS)
    number("training.batch", training.batch, int, 1)
    number("training.crop", training.crop, int, 32)
    if training.crop % 4:
        raise ValueError(f"training.crop must be a multiple of 4, got {training.crop}")
    number("training.learning_rate", training.learning_rate, float, 1e-9)
    number("training.clip", training.clip, float, 1e-9)
    number("tuning.photographs", tuning.photographs, int, 1)
    number("tuning.psnr_allowance", tuning.psnr_allowance, float, 0)
    if not isinstance(tuning.ratios, tuple) or not tuning.ratios:
        raise ValueError(f"tuning.ratios must be a list of numbers, got {tuning.ratios!r}")
    for ratio in tuning.ratios:
        number("tuning.ratios", ratio, float, 1e-9)
    for name, loss in config.losses.items():
        if loss.type not in peers.BUILDERS:
            raise ValueError(f"losses.{name!r}.type must be one of {list(peers.BUILDERS)}, got {loss.type!r}")
        if name == PIXEL:
            raise ValueError(f"losses.{name!r}: the name is that of the pixel term alone")
        if loss.factor is not None:
            number(f"losses.{name!r}.factor", loss.factor, float, 0)
            if loss.factor_of is not None:
                raise ValueError(f"losses.{name!r} has factor and factor_of; one of them is meant")
        leads_to, seen = name, set()
        while (source := config.losses[leads_to].factor_of) is not None:
            if source not in config.losses:
                raise ValueError(f"losses.{leads_to!r}.factor_of names no loss: {source!r}")
            if source in seen:
                raise ValueError(f"losses.{name!r}.factor_of goes in a circle")
            seen.add(source)
            leads_to = source
    for kind, names in (("losses", list(config.losses)), ("grids", [grid.name for grid in config.grids])):
        files = [slug(name) for name in names]
        twice = sorted({name for name, file in zip(names, files, strict=True) if files.count(file) > 1})
        if twice:
            raise ValueError(f"{kind} {twice} have names that make the same file name")
    for grid in (*config.grids, Grid("tuning", (), (tuning.model,), (tuning.task,), (tuning.seed,))):
        for kind, given, known in (
            ("losses", (*grid.losses, grid.reference), (PIXEL, *config.losses)),
            ("models", grid.models, models.MODELS),
            ("tasks", grid.tasks, TASKS),
        ):
            unknown = [each for each in given if each not in known]
            if unknown:
                raise ValueError(f"grid {grid.name!r}: unknown {kind} {unknown}, known are {list(known)}")
        if not isinstance(grid.seeds, tuple):
            raise ValueError(f"grid {grid.name!r}: seeds must be a list of whole numbers, got {grid.seeds!r}")
        for seed in grid.seeds:
            number(f"grid {grid.name!r}: seeds", seed, int, 0)
        if "one-step" in grid.models and not all(map(is_sr, grid.tasks)):
            raise ValueError(f"grid {grid.name!r}: the one-step model is for SR tasks, got {list(grid.tasks)}")


def check_place(config: Config, place: Place) -> None:
    """Raise before anything is trained: no such folder or device, an unreadable file, too few or small photographs."""
    torch.empty(0, device=place.device)
    for folder, least in ((place.train, max(config.training.crop, LEAST_SIDE)), (place.val, LEAST_SIDE)):
        paths = list_images(folder)
        for path in paths:
            with open_image(path) as image:
                if min(image.size) < least:
                    raise ValueError(f"{path} must be at least {least} x {least} pixels, got {image.size}")
        if folder == place.train and len(paths) <= config.tuning.photographs:
            raise ValueError(f"{folder} must hold more than {config.tuning.photographs} photographs, got {len(paths)}")


def split(place: Place, tuning: Tuning) -> tuple[list[Tensor], list[Tensor]]:
    """Photographs to train on, and the middles of evenly spaced ones that are set aside for tuning."""
    images = photographs(place.train)
    step = len(images) / tuning.photographs
    aside = {int(index * step) for index in range(tuning.photographs)}
    middles = [middle(images[i], TUNING_SIDE) for i in sorted(aside)]
    return [image for i, image in enumerate(images) if i not in aside], middles


def middle(image: Tensor, side: int) -> Tensor:
    """The middle of (3, H, W), at most `side` high and wide."""
    top, left = (max(0, length - side) // 2 for length in image.shape[-2:])
    return image[:, top : top + side, left : left + side]


# Stage 1: gradients.


def gradient_ratio(loss: peers.Loss, gt: Tensor, sr: Tensor) -> float:
    """Median over images of |d loss / d SR| over that of L1: the ratio of a factor of 1."""

    def norms(value: peers.Loss) -> Tensor:
        generator = torch.Generator(gt.device).manual_seed(0)
        each = []
        for s, g in zip(sr.split(1), gt.split(1), strict=True):
            leaf = s.detach().requires_grad_()
            each.append(torch.autograd.grad(value(leaf, g, generator), leaf)[0].norm())
        return torch.stack(each)

    pixel = norms(lambda s, g, _: F.l1_loss(s, g))
    return (norms(loss).median() / pixel.median()).item()


def measure_gradient(config: Config, place: Place, name: str) -> None:
    """Store a loss's `gradient_ratio` at the starting point of the tuning task."""
    train, _ = split(place, config.tuning)
    generator = torch.Generator().manual_seed(0)
    gt = unit_range(random_crops(train, CALIBRATION_CROPS, config.training.crop, generator), place.device)
    sr = starting_point(degrade(gt, config.tuning.task, generator), config.tuning.task)
    spec = config.losses[name]
    ratio = gradient_ratio(peers.build(spec.type, spec.options, place.device), gt, sr)
    found = {"loss": name, "gradient_ratio": ratio, "settings": gradient_settings(config, place, name)}
    write_json(gradient_file(place.out, name), {**found, **provenance(place.device)})


def gradient_file(out: Path, name: str) -> Path:
    return out / "gradients" / f"{slug(name)}.json"


def gradient_settings(config: Config, place: Place, name: str) -> dict[str, Any]:
    """What a `gradient_ratio` is only good for."""
    tuning = config.tuning
    found = {"task": tuning.task, "crop": config.training.crop, "tuning_photographs": tuning.photographs}
    return {**found, "train": digest(place.train), **loss_settings(config, name)}


def loss_settings(config: Config, name: str) -> dict[str, Any]:
    """What a loss is: its options, and for ours the coefficients and the network that they stand for."""
    spec = config.losses.get(name)
    if spec is None:
        return {"type": None, "options": {}}
    found: dict[str, Any] = {"type": spec.type, "options": dict(spec.options)}
    if spec.type in OURS:
        found["inn"] = network_sha256(spec.options.get("inn", "bundled"))
        found["coefficients"] = peers.coefficients(spec.options) if spec.type == "MGHFLoss" else {}
    return found


@cache
def network_sha256(inn: str) -> str:
    return checkpoints.load(inn).sha256


@cache
def digest(folder: Path) -> str:
    """Of the names and sizes of the images below `folder`: whether they are the same, without reading them all."""
    files = [f"{path.relative_to(folder).as_posix()} {path.stat().st_size}" for path in list_images(folder)]
    return hashlib.sha256("\n".join(files).encode()).hexdigest()[:16]


# One run.


def train_and_judge(config: Config, place: Place, run: Run) -> None:
    """Train one model, unless it is there, and store its figures."""
    path = run.file(place.out)
    train, tuning = split(place, config.tuning)
    try:
        model, seconds = trained_model(config, place, run, train)
    except DivergenceError as error:
        figures: dict[str, Any] = {"failure": str(error), "val": {}}
    else:
        figures = {"seconds": seconds, "val": judge_model(model, run.task, photographs(place.val), place.device)}
        if is_sweep(config, run):
            figures["tuning"] = judge_model(model, run.task, tuning, place.device)
    identity = {each.name: getattr(run, each.name) for each in fields(Run)}
    write_json(path, {**identity, "settings": settings(config, place, run), **figures, **provenance(place.device)})


def trained_model(config: Config, place: Place, run: Run, images: list[Tensor]) -> tuple[nn.Module, float]:
    """The model of `run` and the seconds that its training took: from its file, or trained and stored now."""
    path = run.file(place.out).with_suffix(".safetensors")
    identity = json.dumps(settings(config, place, run), sort_keys=True)
    if path.exists():
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
        if metadata["settings"] == identity:
            return load_model(run, place.out).to(place.device), float(metadata["seconds"])
    spec, start = config.losses.get(run.loss), time.perf_counter()
    loss = None if spec is None else peers.build(spec.type, spec.options, place.device)
    model = train_model(config.training, run, loss, images, place.device)
    seconds = time.perf_counter() - start
    path.parent.mkdir(parents=True, exist_ok=True)
    state = {key: value.cpu().contiguous() for key, value in model.state_dict().items()}
    metadata = {"settings": identity, "seconds": f"{seconds:.2f}"}
    write_atomically(path, lambda temporary: save_file(state, temporary, metadata))
    return model, seconds


class DivergenceError(RuntimeError):
    """A gradient that is not finite."""


def train_model(training: Training, run: Run, loss: peers.Loss | None, images: list[Tensor], device: str) -> nn.Module:
    """Minimise L1 + factor * loss, and where the run is adversarial the generator's hinge loss."""
    torch.manual_seed(run.seed)
    model = models.build(run.model, run.task).to(device)
    optimiser = torch.optim.Adam(model.parameters(), lr=training.learning_rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, max_lr=training.learning_rate, total_steps=training.steps, pct_start=0.1
    )
    critic = models.critic().to(device) if run.adversarial else None
    critic_optimiser = torch.optim.Adam(critic.parameters(), lr=4e-4, betas=(0.0, 0.9)) if critic else None
    patches = torch.Generator(device).manual_seed(run.seed)
    for step in steps_bar(training.steps, run.name):
        generator = step_generator(run.seed, step)
        gt = unit_range(random_crops(images, training.batch, training.crop, generator), device)
        sr = model(degrade(gt, run.task, generator))
        value = F.l1_loss(sr, gt)
        if loss is not None:
            value = value + run.factor * loss(sr, gt, patches)
        if critic is not None:
            value = value - ADVERSARIAL_FACTOR * critic(sr).mean()
        optimiser.zero_grad(set_to_none=True)
        value.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), training.clip)
        if not torch.isfinite(norm):
            raise DivergenceError(f"the gradient was not finite in step {step}")
        optimiser.step()
        schedule.step()
        if critic is not None and critic_optimiser is not None:
            critic_optimiser.zero_grad(set_to_none=True)
            (F.relu(1 - critic(gt)).mean() + F.relu(1 + critic(sr.detach())).mean()).backward()
            critic_optimiser.step()
    return model


@torch.no_grad()
def restore(model: nn.Module, task: str, image: Tensor, index: int, device: str) -> Tensor:
    """What `model` makes of one degraded photograph, (3, H, W), uint8 -> (1, 3, H, W) in [0, 1]."""
    degraded = degrade(unit_range(image, device), task, torch.Generator().manual_seed(index))
    torch.manual_seed(index)  # of a model that draws noise
    return model(degraded).clamp(0, 1)


def judge_model(model: nn.Module, task: str, images: Sequence[Tensor], device: str) -> dict[str, float]:
    srs = [restore(model.eval(), task, image, index, device) for index, image in enumerate(images)]
    return judge(srs, [unit_range(image, device) for image in images])


def load_model(run: Run, out: Path) -> nn.Module:
    """A trained model of `run`, on the CPU."""
    model = models.build(run.model, run.task)
    model.load_state_dict(load_file(run.file(out).with_suffix(".safetensors")))
    return model.eval()


def settings(config: Config, place: Place, run: Run) -> dict[str, Any]:
    """What a result is only good for: stored with it, compared before it is used again."""
    return {
        "train": digest(place.train),
        "val": digest(place.val),
        **{each.name: getattr(config.training, each.name) for each in fields(Training)},
        "tuning_photographs": config.tuning.photographs,
        "factor": run.factor,
        **loss_settings(config, run.loss),
    }


def is_sweep(config: Config, run: Run) -> bool:
    """Whether a run is judged on the photographs that choose the factors."""
    tuning = config.tuning
    return (run.model, run.task, run.seed, run.adversarial) == (tuning.model, tuning.task, tuning.seed, False)


def finished(path: Path, now: Mapping[str, Any]) -> bool:
    """Whether the result at `path` is there; raises where it is of other settings."""
    if not path.exists():
        return False
    stored = read_json(path)["settings"]
    changed = sorted(key for key in {*now, *stored} if stored.get(key) != now.get(key))
    if changed:
        raise ValueError(f"{path} is of another comparison (different: {', '.join(changed)}); choose another --out")
    return True


# Stages 2 to 4.


def available(config: Config, place: Place) -> list[str]:
    """Losses that can be had, each tried on a pair of crops; the others are printed, and kept with the reason."""
    reasons: dict[str, str] = {}
    gt = torch.rand(1, 3, config.training.crop, config.training.crop, generator=torch.Generator().manual_seed(0))
    for name, spec in config.losses.items():
        try:
            sr = (0.9 * gt).requires_grad_()
            peers.build(spec.type, spec.options, "cpu")(sr, gt, torch.Generator()).backward()
        except Exception as error:  # a peer may fail in any way
            reasons[name] = " ".join(f"{type(error).__name__}: {error}".split())[:300]
    for name in config.losses:
        source = factor_source(config, name)
        if name not in reasons and source in reasons:
            reasons[name] = f"its factor is that of {source}, which was skipped"
    for name, reason in reasons.items():
        print(f"skipped {name}: {reason}", flush=True)
    write_json(place.out / "skipped.json", reasons)
    return [name for name in config.losses if name not in reasons]


def factor_source(config: Config, name: str) -> str:
    """The loss whose factor `name` has: itself, or the end of its chain of `factor_of`."""
    while (source := config.losses[name].factor_of) is not None:
        name = source
    return name


def tuned(config: Config) -> list[str]:
    """Losses whose factor is chosen by the sweep."""
    return [name for name, spec in config.losses.items() if spec.factor is None and spec.factor_of is None]


def sweep_runs(config: Config, out: Path, name: str) -> dict[float, Run]:
    """The runs that choose the factor of a loss, by ratio."""
    unit = read_json(gradient_file(out, name))["gradient_ratio"]
    return {
        ratio: Run(config.tuning.model, config.tuning.task, name, config.tuning.seed, float(f"{ratio / unit:.3g}"))
        for ratio in config.tuning.ratios
    }


def pixel_run(config: Config) -> Run:
    """L1 alone, which the sweep is compared with."""
    return Run(config.tuning.model, config.tuning.task, PIXEL, config.tuning.seed, 0.0)


def perception_score(result: Mapping[str, float], pixel: Mapping[str, float]) -> float:
    """Mean of log(measure / measure of L1) over what of `PERCEPTION` was measured: less is better, L1 has 0."""
    measures = [name for name in PERCEPTION if name in result and name in pixel]
    if not measures or "psnr" not in result:
        raise ValueError(
            f"psnr and one of {', '.join(PERCEPTION)} must be measured to choose a factor: see what was left out"
        )
    least = 1e-6  # an unbiased KID may be below 0
    ratios = [max(result[name], least) / max(pixel[name], least) for name in measures]
    return sum(map(math.log, ratios)) / len(ratios)


def choose(config: Config, out: Path, name: str) -> tuple[float, list[dict[str, Any]]]:
    """The factor of a loss by the tuning photographs, and a row for each one that was tried."""
    pixel = read_json(pixel_run(config).file(out)).get("tuning")
    if pixel is None:
        raise ValueError(f"{PIXEL} alone diverged: there is nothing to compare with; lower training.learning_rate")
    rows = []
    for ratio, run in sweep_runs(config, out, name).items():
        result = read_json(run.file(out)).get("tuning")
        rows.append(
            {
                "loss": name,
                "ratio": ratio,
                "factor": run.factor,
                "psnr_change": result["psnr"] - pixel["psnr"] if result else -math.inf,
                "score": perception_score(result, pixel) if result else math.inf,
            }
        )
    allowed = [row for row in rows if row["psnr_change"] >= -config.tuning.psnr_allowance]
    chosen = min(allowed, key=lambda row: row["score"]) if allowed else min(rows, key=lambda row: row["ratio"])
    for row in rows:
        row["chosen"] = row is chosen
    return chosen["factor"], rows


def factors(config: Config, out: Path, names: Sequence[str]) -> dict[str, float]:
    """The factor of every loss of `names`, and of L1."""
    source = {name: factor_source(config, name) for name in names}
    factor: dict[str, float] = {}
    for name in dict.fromkeys(source.values()):  # a choice reads a file a run: once, however many share it
        fixed = config.losses[name].factor
        factor[name] = choose(config, out, name)[0] if fixed is None else fixed
    return {PIXEL: 0.0, **{name: factor[source[name]] for name in names}}


def grid_runs(grid: Grid, factor: Mapping[str, float]) -> list[Run]:
    """The runs of a table, seed by seed: a complete table as early as possible."""
    return [
        Run(model, task, loss, seed, factor[loss], grid.adversarial)
        for seed in grid.seeds
        for model in grid.models
        for task in grid.tasks
        for loss in grid.losses
        if loss in factor
    ]


def run_config(config: Config, place: Place, workers: int, only: Sequence[str] = ()) -> None:
    """Do all stages; what is finished is not done again."""
    unknown = sorted(set(only) - {grid.name for grid in config.grids})
    if unknown:
        raise ValueError(f"--only: unknown grids {unknown}, known are {[grid.name for grid in config.grids]}")
    check_place(config, place)
    names = available(config, place)
    sweep = [name for name in tuned(config) if name in names]
    gradients = {
        name: partial(measure_gradient, config, place, name)
        for name in sweep
        if not finished(gradient_file(place.out, name), gradient_settings(config, place, name))
    }
    run_all(gradients, workers, "gradients")

    def train_all(runs: Sequence[Run], title: str) -> None:
        jobs = {
            run.name: partial(train_and_judge, config, place, run)
            for run in dict.fromkeys(runs)
            if not finished(run.file(place.out), settings(config, place, run))
        }
        run_all(jobs, workers, title)

    by_ratio = [sweep_runs(config, place.out, name) for name in sweep]
    train_all([pixel_run(config), *(runs[r] for r in config.tuning.ratios for runs in by_ratio)], "sweep")
    factor = factors(config, place.out, names)
    for grid in config.grids:
        if not only or grid.name in only:
            train_all(grid_runs(grid, factor), grid.name)


# The command line.


def judge_folders(sr_folder: Path, gt_folder: Path, name: str, csv: Path | None) -> None:
    """Judge the images of any model: files of equal paths (the suffix does not count) in two folders."""

    def by_name(folder: Path) -> dict[str, Path]:
        paths = list_images(folder)
        names = [path.relative_to(folder).with_suffix("").as_posix() for path in paths]
        twice = sorted({each for each in names if names.count(each) > 1})
        if twice:
            raise ValueError(f"{folder} holds images that differ in their suffix only: {twice[:5]}")
        return dict(zip(names, paths, strict=True))

    srs, gts = by_name(sr_folder), by_name(gt_folder)
    if set(gts) != set(srs):
        only_one = sorted(set(gts) ^ set(srs))
        raise ValueError(f"{sr_folder} and {gt_folder} must hold images of the same names, only one has {only_one[:5]}")
    if csv is not None:
        csv.parent.mkdir(parents=True, exist_ok=True)
    scores = judge([read_image(srs[each]) for each in gts], [read_image(path) for path in gts.values()])
    row = {"model": name, "images": len(gts), **scores, **provenance("cpu")}
    print(format_table([{"metric": key, "value": value} for key, value in scores.items()]))
    if csv is not None:
        write_table(csv, [row])
        print(f"wrote {csv}")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="train and judge what a configuration says")
    run.add_argument("config", type=Path)
    run.add_argument("--train", type=Path, required=True, help="folder of photographs to train on")
    run.add_argument("--val", type=Path, required=True, help="folder of photographs to judge on")
    run.add_argument("--out", type=Path, required=True, help="folder for models and results")
    run.add_argument("--workers", type=int, default=2, help="processes of one thread (default %(default)s)")
    run.add_argument("--device", default="cpu", help="torch device (default %(default)s)")
    run.add_argument("--only", nargs="+", default=[], metavar="GRID", help="grids to run (default all)")
    report = commands.add_parser("report", help="tables and figures of the finished runs")
    report.add_argument("config", type=Path)
    report.add_argument("--out", type=Path, required=True, help="folder of `run`")
    report.add_argument("--csv", type=Path, help="table of all runs (default OUT/quality.csv)")
    report.add_argument("--figures", type=Path, help="folder for the figures (default OUT)")
    folders = commands.add_parser("judge", help="judge a folder of images of any model")
    folders.add_argument("sr", type=Path, help="folder of super-resolved images")
    folders.add_argument("gt", type=Path, help="folder of originals with the same names")
    folders.add_argument("--name", default="model", help="of the row")
    folders.add_argument("--csv", type=Path, help="write the row there")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    try:
        run_command(arguments)
    except (ValueError, OSError, RuntimeError) as error:
        raise SystemExit(f"quality.py: error: {' '.join(str(error).split())}") from error
    except KeyboardInterrupt:
        print("\nquality.py: interrupted; the same command goes on", file=sys.stderr)
        raise SystemExit(130) from None


def run_command(arguments: argparse.Namespace) -> None:
    if arguments.command == "judge":
        judge_folders(arguments.sr, arguments.gt, arguments.name, arguments.csv)
        return
    config = read_config(arguments.config)
    if arguments.command == "report":
        from quality_report import write_report

        write_report(config, arguments.out, arguments.csv or arguments.out / "quality.csv", arguments.figures)
        return
    place = Place(arguments.train, arguments.val, arguments.out, arguments.device)
    run_config(config, place, arguments.workers, arguments.only)
    print(f"finished; python benchmarks/quality.py report {arguments.config} --out {arguments.out}")


if __name__ == "__main__":
    main()
