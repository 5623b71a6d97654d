"""The protocol: a stored L1 model, fine-tuned with every loss at factors that bracket the best one, then judged.

1. One L1 model for each architecture, task and seed (one for all noises), trained until its PSNR on the tuning
   photographs stops rising.
2. For every loss the ratio of its gradient to L1's, with respect to the L1 model's images: a factor is given as a
   multiple of the one that makes the two equal.
3. Every loss fine-tunes the L1 model for the same steps on the same crops: L1 + factor * loss. "L1" is L1 alone.
4. The first seed tries factors until the best one is inside of the range, and until the range reaches the deepest of
   `DROPS`. The other seeds repeat the chosen factor: the tables have all seeds, the curves over the factor one.
5. Those models are judged, once, on photographs that chose nothing.

`Study.ready` lists what can be done now; several processes may work on one study at once.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mghf_loss import checkpoints
from mghf_loss._files import write_atomically
from mghf_loss.mghf import PRESETS
from mghf_loss.toy import middle

from . import losses, models, photographs
from .config import L1, LEAST_RATIO, MOST_RATIO, Config, Track
from .metrics import METRICS, Judge, Values, mean
from .store import open_folder, read_json, result_path
from .tasks import degrade, of_base
from .training import DivergenceError, Objective, restore, train

TUNING_SIDE = 320
CALIBRATION_CROPS = 32
DROPS = (0.05, 0.1, 0.2)  # of PSNR against L1, in dB, at which losses are compared
# What the tuning photographs tell, and what of it makes the score.
TUNING_METRICS = (
    "psnr",
    "ssim",
    "haarpsi",
    "jod",
    "niqe",
    "kid",
    "kid_lite2",
    "spectrum_error",
    "detail_energy",
    "feature_distance",
    "grid_lock",
    "pattern",
)
SCORE = ("jod", "niqe", "kid_lite2", "spectrum_error")


@dataclass(frozen=True)
class Folders:
    """Photographs to train on, to choose with, to judge with."""

    train: Path
    tune: Path
    judge: Path


@dataclass(frozen=True)
class Run:
    """One model. `ratio` is 0 for L1, else the factor in multiples of equal gradients, or of a training-free change."""

    model: str
    task: str
    seed: int
    loss: str = L1
    ratio: float = 0.0
    critic: float = 0.0

    @property
    def name(self) -> str:
        critic = f" critic {self.critic:g}" if self.critic else ""
        ratio = f" x{self.ratio:.4g}" if self.ratio else ""
        return f"{self.model} {self.task} {self.loss}{ratio}{critic} seed {self.seed}"


@dataclass(frozen=True)
class Job:
    """Something that makes the result at `path`."""

    name: str
    path: Path
    work: Callable[[], dict[str, Any]]


def score(figures: Mapping[str, float], of_l1: Mapping[str, float], allowance: float) -> float:
    """Mean of log(measure / measure of L1) over `SCORE`, with 10 - JOD for JOD: less is better, and L1 has 0.

    Infinite where PSNR falls by more than the allowance.
    """
    if not figures or figures["psnr"] < of_l1["psnr"] - allowance:
        return math.inf
    names = [name for name in SCORE if name in figures and name in of_l1]
    if not names:
        raise ValueError(f"none of {', '.join(SCORE)} could be measured: there is nothing to choose a factor by")

    def measure(values: Mapping[str, float], name: str) -> float:
        return max(10 - values[name] if name == "jod" else values[name], 1e-6)  # an unbiased KID may be below 0

    return sum(math.log(measure(figures, name) / measure(of_l1, name)) for name in names) / len(names)


def bracket(
    scores: Mapping[float, float], drops: Mapping[float, float], first: tuple[float, ...], grow: float
) -> list[float]:
    """The ratios to try next: `first`, then one beyond an end while the best ratio is there.

    Upwards also until the deepest drop of PSNR is reached, at which losses are compared.
    """
    missing = [ratio for ratio in first if ratio not in scores]
    if missing:
        return missing
    low, high = min(scores), max(scores)
    best = min(scores, key=lambda ratio: (scores[ratio], ratio))
    above, below = neighbour(high, grow), neighbour(low, 1 / grow)
    if (best == high or max(drops.values()) < max(DROPS)) and above <= MOST_RATIO:
        return [above]
    return [below] if best == low and below >= LEAST_RATIO else []


def neighbour(ratio: float, times: float) -> float:
    """The next ratio of a bracket."""
    return float(f"{ratio * times:.4g}")


class Study:
    """What a configuration asks for, where its results are, what is still to do."""

    def __init__(self, config: Config, folders: Folders, out: Path, device: str = "cpu", judged: bool = True) -> None:
        self.config, self.folders, self.device, self.judged = config, folders, device, judged
        self.out = out
        self._read: dict[Path, dict[str, Any]] = {}  # a result never changes

    def open(self) -> None:
        """Check photographs and losses, then the folder of results; nothing is trained before."""
        torch.empty(0, device=self.device)
        photographs.check(self.folders.train, self.config.protocol.crop)
        for folder in (self.folders.tune, self.folders.judge):
            photographs.check(folder, photographs.LEAST_SIDE)
        judge = self.folders.judge.resolve()
        for folder in (self.folders.train.resolve(), self.folders.tune.resolve()):
            if judge.is_relative_to(folder) or folder.is_relative_to(judge):
                raise ValueError(f"photographs that judge must choose nothing, but {judge} shares some with {folder}")
        data = {name: photographs.digest(folder) for name, folder in asdict(self.folders).items()}
        open_folder(self.out, {**data, **asdict(self.config.protocol)})

    @cached_property
    def skipped(self) -> dict[str, str]:
        """Losses that cannot be had here, each tried on a pair of crops, with the reason."""
        reasons = {}
        gt = torch.rand(1, 3, 96, 96, generator=torch.Generator().manual_seed(0))
        for name, spec in self.config.losses.items():
            try:
                if spec.type in losses.TRAINING_FREE:
                    models.CHANGES[spec.type](nn.Identity(), 1.0, **spec.options)
                    continue
                sr = (0.9 * gt).requires_grad_()
                losses.build(spec.type, spec.options)(sr, gt, torch.Generator()).backward()
            except Exception as error:  # a peer may fail in any way
                reasons[name] = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        return reasons

    # Where things are.

    def base(self, run: Run) -> Run:
        """The L1 model that a run starts from."""
        return Run(run.model, of_base(run.task), run.seed)

    def l1(self, run: Run) -> Run:
        """That model after the same steps of L1."""
        return Run(run.model, run.task, run.seed)

    def identity(self, run: Run) -> dict[str, Any]:
        """What a result is only good for."""
        found = asdict(run)
        if run.loss != L1:
            spec = self.config.losses[run.loss]
            found |= {"type": spec.type, "options": dict(spec.options), "factor": spec.factor}
            if spec.type == "MGHFLoss":  # a preset may change; a term that is off, and may be new, changes nothing
                preset = PRESETS[spec.options.get("preset", "balanced")]
                active = {term: factor for term, factor in preset.coefficients.items() if factor}
                found["preset"] = asdict(replace(preset, coefficients=active))
            if spec.type in losses.OURS:
                found["inn"] = _network_sha256(str(spec.options.get("network", "bundled")))
            del found["loss"]
        return found

    def path(self, kind: str, run: Run) -> Path:
        """Where a run's figures are: "bases", "calibrations", "runs" or "judged"."""
        return result_path(self.out / kind, run.name, self.identity(run))

    def figures(self, kind: str, run: Run) -> dict[str, Values]:
        """The stored values of a run; none where it is not finished or diverged."""
        path = self.path(kind, run)
        if path not in self._read and path.exists():
            self._read[path] = read_json(path)
        return self._read[path]["values"] if path in self._read else {}

    def means(self, run: Run) -> dict[str, float]:
        """What the tuning photographs say."""
        return {name: mean(values) for name, values in self.figures("runs", run).items()}

    def is_done(self, kind: str, run: Run) -> bool:
        return self.path(kind, run).exists()

    def load(self, run: Run, kind: str = "runs") -> nn.Module:
        """A stored model."""
        model = models.build(run.model, run.task)
        model.load_state_dict(load_file(self.path(kind, run).with_suffix(".safetensors")))
        return model.to(self.device)

    def restorer(self, run: Run) -> nn.Module:
        """What makes a run's images: its model, or the L1 model and a training-free change."""
        if not self.is_training_free(run):
            return self.load(run)
        spec, l1 = self.config.losses[run.loss], self.load(self.l1(run))
        change = models.CHANGES[spec.type](l1, self.factor(run), **spec.options).to(self.device)
        if isinstance(change, models.LatentGain):
            change.fit(*self.calibration_images(l1, run.task))
        return change

    def save(self, path: Path, model: nn.Module) -> None:
        state = {key: value.detach().cpu().contiguous() for key, value in model.state_dict().items()}
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path.with_suffix(".safetensors"), partial(save_file, state))

    # What can be done now.

    def ready(self) -> list[Job]:
        """Everything that is unfinished and needs nothing unfinished; nothing once the study is complete."""
        wanted = [("runs", run) for track in self.config.tracks for run in self.track_runs(track)]
        if self.judged:
            wanted += [("judged", run) for track in self.config.tracks for run in self.judged_runs(track)]
        jobs = [job for each in wanted if (job := self._next(*each)) is not None]
        return list({job.path: job for job in reversed(jobs)}.values())[::-1]

    def prerequisites(self, kind: str, run: Run) -> list[tuple[str, Run]]:
        """The results that a result is made of."""
        if kind == "bases":
            return []
        if kind == "judged":
            return [("runs", run)]
        needed = [("bases", self.base(run))]
        if kind == "runs" and (calibration := self.calibration(run)) is not None:
            needed.append(("calibrations", calibration))
        if kind == "runs" and self.is_training_free(run):
            needed.append(("runs", self.l1(run)))
        return needed

    def _next(self, kind: str, run: Run) -> Job | None:
        """What is to do first for a result; nothing where it is there."""
        if self.is_done(kind, run):
            return None
        for needed in self.prerequisites(kind, run):
            if (job := self._next(*needed)) is not None:
                return job
        make = {
            "bases": self.make_base,
            "calibrations": self.calibrate,
            "runs": self.make_run,
            "judged": self.make_judged,
        }
        return Job(f"{run.name} ({kind})", self.path(kind, run), partial(make[kind], run))

    def track_runs(self, track: Track) -> Iterator[Run]:
        """The runs that a track is known to need; more of them once these are done."""
        first = Run(track.model, track.task, track.seeds[0])
        yield first
        others = [replace(first, seed=seed) for seed in track.seeds[1:]]
        if track.factors_of is not None:
            source = self.config.track(track.factors_of)
            chosen = {L1: 0.0, **{loss: self.chosen(source, loss) for loss in self.available(track)}}
            for run, weight in itertools.product((first, *others), track.critic or (0.0,)):
                for loss, ratio in chosen.items():
                    if ratio is not None:
                        yield replace(run, loss=loss, ratio=ratio, critic=weight)
            return
        for loss in self.available(track):
            for ratio in self.ratios(track, loss):
                yield replace(first, loss=loss, ratio=ratio)
        for run in others:
            yield run
            for loss in self.available(track):
                if (chosen := self.chosen(track, loss)) is not None:
                    yield replace(run, loss=loss, ratio=chosen)

    def judged_runs(self, track: Track) -> Iterator[Run]:
        """The runs of a track that are judged."""
        for run in self.track_runs(track):
            is_tried = run.loss != L1 and track.factors_of is None and run.seed == track.seeds[0]
            if not is_tried or run.ratio in self.compared_ratios(track, run.loss):
                yield run

    def available(self, track: Track) -> list[str]:
        return [loss for loss in track.losses if loss not in self.skipped]

    def scored(self, track: Track, loss: str) -> tuple[dict[float, float], dict[float, float]] | None:
        """Score and drop of PSNR by ratio, of the first seed; none before L1 is done."""
        first = Run(track.model, track.task, track.seeds[0])
        if not self.is_done("runs", first):
            return None
        of_l1 = self.means(first)
        if not of_l1:
            raise ValueError(f"{first.name} diverged: there is nothing to compare with")
        spec = self.config.losses[loss]
        tried = [1.0] if spec.factor is not None else sorted({*spec.ratios, *_grown(spec.ratios, spec.grow)})
        runs = {ratio: replace(first, loss=loss, ratio=ratio) for ratio in tried}
        curve = {ratio: self.means(run) for ratio, run in runs.items() if self.is_done("runs", run)}
        scores = {ratio: score(figures, of_l1, self.config.protocol.allowance) for ratio, figures in curve.items()}
        return scores, {ratio: of_l1["psnr"] - figures.get("psnr", -math.inf) for ratio, figures in curve.items()}

    def ratios(self, track: Track, loss: str) -> list[float]:
        """The ratios of the first seed: what is done and what comes next."""
        spec, scored = self.config.losses[loss], self.scored(track, loss)
        if scored is None:
            return []
        if spec.factor is not None:
            return [1.0]
        return [*scored[0], *bracket(*scored, spec.ratios, spec.grow)]

    def chosen(self, track: Track, loss: str) -> float | None:
        """The best ratio, once it is found; the least one where every one costs too much PSNR."""
        scored = self.scored(track, loss)
        if scored is None or any(ratio not in scored[0] for ratio in self.ratios(track, loss)):
            return None
        scores, drops = scored
        return min(scores, key=lambda ratio: (scores[ratio], drops[ratio] if math.isinf(scores[ratio]) else ratio))

    def compared_ratios(self, track: Track, loss: str) -> list[float]:
        """The chosen ratio, and those between which the drops of PSNR lie; nothing before the choice. First seed."""
        chosen = self.chosen(track, loss)
        if chosen is None:
            return []
        scored = self.scored(track, loss)
        assert scored is not None
        drops = sorted(scored[1].items())
        wanted = {chosen}
        for drop in DROPS:
            for (low, at_low), (high, at_high) in itertools.pairwise(drops):
                if at_low <= drop < at_high < math.inf:
                    wanted |= {low, high}
        if drops[0][1] > min(DROPS):  # between L1 and the least ratio
            wanted.add(drops[0][0])
        return sorted(wanted)

    def calibration(self, run: Run) -> Run | None:
        """The run that stands for a loss's gradient: the first seed's; none where nothing needs it."""
        spec = self.config.losses.get(run.loss)
        if spec is None or spec.type in losses.TRAINING_FREE or spec.factor is not None:
            return None
        seeds = [t.seeds[0] for t in self.config.tracks if (t.model, t.task) == (run.model, run.task) and not t.critic]
        return Run(run.model, run.task, seeds[0] if seeds else run.seed, run.loss)

    def is_training_free(self, run: Run) -> bool:
        """Whether a run changes the images of an L1 model, and has no model of its own."""
        return run.loss != L1 and self.config.losses[run.loss].type in losses.TRAINING_FREE

    def chooses(self, run: Run) -> bool:
        """Whether a run is one of those that choose a factor."""
        tracks = [t for t in self.config.tracks if t.factors_of is None]
        return not run.critic and (run.model, run.task, run.seed) in [(t.model, t.task, t.seeds[0]) for t in tracks]

    # The work.

    @cached_property
    def train_images(self) -> list[Tensor]:
        return photographs.load(self.folders.train)

    def gts(self, folder: Path, side: int) -> list[Tensor]:
        return [photographs.unit_range(middle(i, side), self.device) for i in photographs.load(folder)]

    @cached_property
    def tuning_judge(self) -> tuple[list[Tensor], Judge]:
        gts = self.gts(self.folders.tune, TUNING_SIDE)
        return gts, Judge(gts, TUNING_METRICS)

    @cached_property
    def final_judge(self) -> tuple[list[Tensor], Judge]:
        gts = self.gts(self.folders.judge, self.config.protocol.judge_side)
        return gts, Judge(gts, tuple(METRICS))

    def judge(self, model: nn.Module, task: str, panel: tuple[list[Tensor], Judge]) -> dict[str, Values]:
        gts, judge = panel
        return judge([restore(model, task, gt, index) for index, gt in enumerate(gts)])

    def calibration_images(self, model: nn.Module, task: str) -> tuple[Tensor, Tensor]:
        """What an L1 model makes of crops of training photographs, and the crops."""
        generator = torch.Generator().manual_seed(0)
        crops = photographs.random_crops(self.train_images, CALIBRATION_CROPS, self.config.protocol.crop, generator)
        gt = photographs.unit_range(crops, self.device)
        torch.manual_seed(0)
        with torch.no_grad():
            return model.eval()(degrade(gt, task, generator)), gt

    def make_base(self, run: Run) -> dict[str, Any]:
        """Train the L1 model of `run` until its PSNR on the tuning photographs stops rising, then let it anneal."""
        protocol = self.config.protocol
        torch.manual_seed(run.seed)
        model = models.build(run.model, run.task).to(self.device)
        gts, _ = self.tuning_judge
        judge = Judge(gts, ["psnr"])
        optimiser = torch.optim.Adam(model.parameters(), lr=protocol.base_learning_rate)
        trace: list[float] = []

        def one_round(schedule: torch.optim.lr_scheduler.LRScheduler, count: int) -> None:
            steps = range(protocol.round * len(trace), protocol.round * len(trace) + count)
            title = f"{run.name}, base, round {len(trace) + 1}"
            train(model, run.task, self.train_images, protocol, optimiser, schedule, steps, run.seed, title)
            trace.append(mean(self.judge(model, run.task, (gts, judge))["psnr"]))

        while len(trace) < protocol.most_rounds:
            one_round(torch.optim.lr_scheduler.ConstantLR(optimiser, 1.0), protocol.round)
            before = trace[: -protocol.patience]
            if before and max(trace) < max(before) + protocol.rise:
                break
        annealing = 2 * protocol.round
        one_round(torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, annealing), annealing)
        self.save(self.path("bases", run), model)
        return {**self.identity(run), "psnr_of_rounds": trace}

    def calibrate(self, run: Run) -> dict[str, Any]:
        """Measure a loss's gradient ratio at the L1 model's images."""
        spec = self.config.losses[run.loss]
        sr, gt = self.calibration_images(self.load(self.base(run), "bases"), run.task)
        ratio = losses.gradient_ratio(losses.build(spec.type, spec.options, self.device), sr, gt)
        if not 0 < ratio < math.inf:
            raise ValueError(f"loss {run.loss!r} has no gradient to choose a factor by: {ratio} times L1's")
        return {**self.identity(run), "loss": run.loss, "gradient_ratio": ratio}

    def factor(self, run: Run) -> float:
        """What a run multiplies its loss by."""
        if run.loss == L1:
            return 0.0
        fixed = self.config.losses[run.loss].factor
        calibration = self.calibration(run)
        if fixed is not None or calibration is None:
            return run.ratio if fixed is None else fixed
        return run.ratio / read_json(self.path("calibrations", calibration))["gradient_ratio"]

    def make_run(self, run: Run) -> dict[str, Any]:
        """Fine-tune the L1 model and look at the tuning photographs; a diverged run is a result.

        Only what chooses a factor is measured there in full: the judges take longer than the training.
        """
        found = {**self.identity(run), "loss": run.loss, "applied_factor": self.factor(run)}
        try:
            if not self.is_training_free(run):
                self.save(self.path("runs", run), self.fine_tune(run))
            gts, judge = self.tuning_judge
            panel = gts, judge if self.chooses(run) else Judge(gts, ["psnr"])
            return {**found, "values": self.judge(self.restorer(run), run.task, panel)}
        except DivergenceError as error:
            return {**found, "failure": str(error), "values": {}}

    def fine_tune(self, run: Run) -> nn.Module:
        """Return the L1 model after the steps of a run."""
        spec, protocol = self.config.losses.get(run.loss), self.config.protocol
        model = self.load(self.base(run), "bases")
        loss = None if spec is None else losses.build(spec.type, spec.options, self.device)
        optimiser = torch.optim.Adam(model.parameters(), lr=protocol.learning_rate)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimiser, protocol.learning_rate, total_steps=protocol.steps + 1, pct_start=0.1
        )
        first = protocol.round * (protocol.most_rounds + 2)  # crops that no L1 model has seen
        steps, objective = range(first, first + protocol.steps), Objective(loss, self.factor(run), run.critic)
        train(model, run.task, self.train_images, protocol, optimiser, schedule, steps, run.seed, run.name, objective)
        return model

    def make_judged(self, run: Run) -> dict[str, Any]:
        """Judge a model on photographs that chose nothing."""
        found = {**self.identity(run), "loss": run.loss, "applied_factor": self.factor(run), "values": {}}
        if self.figures("runs", run):
            try:
                found["values"] = self.judge(self.restorer(run), run.task, self.final_judge)
            except DivergenceError as error:
                found["failure"] = str(error)
        return found


@cache
def _network_sha256(network: str) -> str:
    return network if network in ("haar", "untrained") else checkpoints.load(network).sha256


def _grown(first: tuple[float, ...], grow: float) -> Iterator[float]:
    """The ratios that a bracket may come to."""
    for ratio, times in ((min(first), 1 / grow), (max(first), grow)):
        while LEAST_RATIO <= ratio <= MOST_RATIO:
            yield ratio
            ratio = neighbour(ratio, times)
