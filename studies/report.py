"""Tables and figures of a study's finished runs: `python -m studies.report --config FILE --out DIR`.

Writes DIR/report.md, DIR/rows.jsonl (one row a run, with the judges' values of every photograph) and figures.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mghf_loss._files import write_atomically

from . import config, losses, photographs, tables
from .config import L1, Track
from .metrics import METRICS
from .protocol import DROPS, LEAST_RATIO, MOST_RATIO, Folders, Run, Study
from .store import read_json, slug
from .training import restore

# At most six columns each, the loss among them.
GROUPS = (
    ("psnr", "ssim", "ms_ssim", "haarpsi", "jod"),
    ("vif", "gmsd", "mdsi", "feature_distance", "grid_lock"),
    ("niqe", "kid", "kid_lite2", "spectrum_error", "detail_energy"),
    ("lpips", "dists"),
)
COMPARED = ("jod", "niqe", "kid_lite2", "spectrum_error")
POOLED = ("kid", "kid_lite2")
CROP, CROPS = 96, 3
CROP_DROP = 0.1


@dataclass(frozen=True)
class Entry:
    """A row of a track's tables: the judges' values over the finished seeds."""

    label: str
    loss: str
    ratio: float
    reference: str
    seeds: tuple[int, ...]
    values: dict[str, Tensor]

    def figure(self, metric: str) -> float:
        return tables.statistic(self.values[metric]).item()


def entry(study: Study, track: Track, loss: str, ratio: float, critic: float = 0.0) -> Entry | None:
    """The row of a loss, once a seed of it is judged and none diverged."""
    runs = [Run(track.model, track.task, seed, loss, ratio, critic) for seed in track.seeds]
    judged = {run.seed: study.figures("judged", run) for run in runs if study.is_done("judged", run)}
    if not judged or not all(judged.values()):
        return None
    names = [name for name in METRICS if all(name in values for values in judged.values())]
    values = {name: tables.over_seeds([each[name] for each in judged.values()]) for name in names}
    weight = f", GAN {critic:g}" if critic else ""
    return Entry(loss + weight, loss, ratio, L1 + weight, tuple(judged), values)


def chosen_entries(study: Study, track: Track) -> Iterator[Entry]:
    """L1 and every loss at its chosen factor."""
    source = config_track(study, track)
    for critic in (0.0, *track.critic):
        for loss in (L1, *study.available(track)):
            ratio = 0.0 if loss == L1 else study.chosen(source, loss)
            if ratio is not None and (critic or not track.critic or loss == L1):
                found = entry(study, track, loss, ratio, critic)
                if found is not None:
                    yield found


def config_track(study: Study, track: Track) -> Track:
    """The track that chooses the factors."""
    return track if track.factors_of is None else study.config.track(track.factors_of)


def curve(study: Study, track: Track, loss: str) -> list[Entry]:
    """L1 and the judged points of a loss, by ratio."""
    points = [entry(study, track, L1, 0.0)]
    points += [entry(study, track, loss, ratio) for ratio in study.compared_ratios(track, loss)]
    return [point for point in points if point is not None]


def drop(point: Entry, l1: Entry) -> float:
    return l1.figure("psnr") - point.figure("psnr")


def optimised(study: Study, entries: Sequence[Entry], metric: str) -> set[str]:
    """Labels of the rows whose loss minimises what the metric measures."""
    types = {e.label: study.config.losses[e.loss].type for e in entries if e.loss != L1}
    return {label for label, kind in types.items() if metric in losses.OPTIMISED.get(kind, ())}


def value_tables(study: Study, entries: Sequence[Entry]) -> Iterator[str]:
    """What the judges say, a table a group of them."""
    for group in GROUPS:
        columns = {}
        for metric in group:
            figures = {e.label: e.figure(metric) for e in entries if metric in e.values}
            if figures:
                columns[metric] = tables.best_in_bold(metric, figures, optimised(study, entries, metric))
        if columns:
            yield tables.markdown(
                [
                    {
                        "loss": e.label,
                        **{tables.heading(name): cells.get(e.label, "") for name, cells in columns.items()},
                    }
                    for e in entries
                ]
            )


def change_table(entries: Sequence[Entry], metrics: Sequence[str]) -> str | None:
    """Differences from the reference with 95 % intervals."""
    by_label = {e.label: e for e in entries}
    rows = []
    for e in entries:
        reference = by_label.get(e.reference)
        if e.loss == L1 or reference is None:
            continue
        row = {"loss": e.label}
        for metric in metrics:
            if metric in e.values and metric in reference.values:
                change = tables.difference(e.values[metric], reference.values[metric], metric in POOLED)
                row[tables.heading(metric)] = tables.difference_text(metric, change)
        rows.append(row)
    return tables.markdown(rows) if rows else None


def equal_psnr_tables(study: Study, track: Track) -> Iterator[str]:
    """What each loss changes where it costs the same PSNR, by interpolation between its judged factors."""
    for target in DROPS:
        rows = []
        for loss in study.available(track):
            points = curve(study, track, loss)
            if len(points) < 2:
                continue
            found = tables.at_drop([(p.ratio, drop(p, points[0]), p.values) for p in points], target)
            if found is not None:
                marks = [m for m in COMPARED if m in losses.OPTIMISED.get(study.config.losses[loss].type, ())]
                row = {"loss": loss, "ratio": f"{found[0]:.3g}"}
                for metric in COMPARED:
                    if metric in found[1]:
                        change = tables.difference(found[1][metric], points[0].values[metric], metric in POOLED)
                        mark = tables.OPTIMISED if metric in marks else ""
                        row[tables.heading(metric)] = tables.difference_text(metric, change) + mark
                rows.append(row)
        if rows:
            yield f"### At -{target:g} dB\n\n" + tables.markdown(rows)


def choice_table(study: Study, track: Track) -> str | None:
    """The choice of the factors on the tuning photographs."""
    rows = []
    for loss in study.available(track):
        chosen = study.chosen(track, loss)
        scored = study.scored(track, loss)
        if chosen is None or scored is None:
            continue
        scores, drops = scored
        at_end = "" if min(scores) < chosen < max(scores) or len(scores) == 1 else ", at the end"
        if chosen / 4 < LEAST_RATIO or chosen * 4 > MOST_RATIO:
            at_end += " of what is tried"
        helps = "none helps, " if scores[chosen] > 0 else ""
        rows.append(
            {
                "loss": loss,
                "ratios": ", ".join(f"{ratio:g}" for ratio in sorted(scores)),
                "chosen": f"{helps}{chosen:g}{at_end}",
                "factor": f"{study.factor(Run(track.model, track.task, track.seeds[0], loss, chosen)):.3g}",
                "PSNR, dB": f"{-drops[chosen]:+.2f}",
                "score": f"{scores[chosen]:+.3f}",
            }
        )
    return tables.markdown(rows) if rows else None


def track_report(study: Study, track: Track, figures: Path) -> str:
    """The tables of a track; its figures are drawn."""
    title = f"## {track.name}: {track.model}, {track.task}"
    entries = list(chosen_entries(study, track))
    if not entries:
        return f"{title}\n\nNot judged yet."
    seeds = sorted({len(e.seeds) for e in entries})
    parts = [title, f"Mean over {' to '.join(map(str, {seeds[0]: 1, seeds[-1]: 1}))} seeds."]
    if not track.critic and (choice := choice_table(study, track)):
        parts += ["### Factors, chosen on the tuning photographs", choice]
    parts += ["### At the chosen factor", *value_tables(study, entries)]
    for metrics in (("psnr", "ssim", "haarpsi", "jod"), ("niqe", "kid_lite2", "spectrum_error", "feature_distance")):
        if (changes := change_table(entries, metrics)) is not None:
            parts += [f"Against L1, {', '.join(metrics)}:", changes]
    if not track.critic:
        parts += equal_psnr_tables(study, track)
        plot_factors(study, track, figures / f"{slug(track.name)}-factors.png")
    plot_front(study, track, figures / f"{slug(track.name)}-front.png")
    return "\n\n".join(parts)


def lines(study: Study, track: Track) -> dict[str, list[Entry]]:
    """A line a loss: over the factor, or over the weight of the critic."""
    if not track.critic:
        return {loss: curve(study, track, loss) for loss in study.available(track)}
    source, found = config_track(study, track), {}
    for loss in (L1, *study.available(track)):
        ratio = 0.0 if loss == L1 else study.chosen(source, loss)
        points = [] if ratio is None else [entry(study, track, loss, ratio, critic) for critic in track.critic]
        found[loss] = [point for point in points if point is not None]
    return found


def plot_front(study: Study, track: Track, path: Path) -> None:
    """Perception against distortion on the photographs that judge, a labelled line a loss."""
    from matplotlib import pyplot as plt

    l1 = entry(study, track, L1, 0.0)
    shown = {loss: points for loss, points in lines(study, track).items() if points}
    metrics = [name for name in COMPARED if l1 is not None and name in l1.values]
    if l1 is None or not shown or not metrics:
        return
    rows = -(-len(metrics) // 2)
    figure, axes = plt.subplots(rows, 2, figsize=(13, 5.2 * rows), layout="constrained", squeeze=False)
    for axis, metric in zip(axes.flat, metrics, strict=False):
        axis.plot(0, l1.figure(metric), "k*", markersize=12, zorder=5)
        for index, (loss, points) in enumerate(shown.items()):
            is_ours = loss != L1 and study.config.losses[loss].type in losses.OURS
            places = [(-drop(point, l1), point.figure(metric)) for point in points]
            style = {"color": f"C{index % 10}", "linewidth": 2.4 if is_ours else 1.0, "marker": "."}
            axis.plot(*zip(*places, strict=True), **style)
            axis.annotate(loss, places[-1], (4, 0), textcoords="offset points", fontsize=7, color=style["color"])
        axis.set_xlabel("PSNR against L1, dB")
        axis.set_ylabel(tables.heading(metric))
        axis.set_xlim(left=-3 * max(DROPS))
        axis.grid(alpha=0.3)
    for axis in axes.flat[len(metrics) :]:
        axis.set_axis_off()
    figure.suptitle(
        f"{track.name}: lines over {'the GAN weight' if track.critic else 'the factor'}; star: L1", fontsize=10
    )
    save(figure, path)


def plot_factors(study: Study, track: Track, path: Path) -> None:
    """Drop of PSNR and score over the factor, on the tuning photographs, first seed."""
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(13, 5), layout="constrained")
    for index, loss in enumerate(study.available(track)):
        scored = study.scored(track, loss)
        if scored is None or study.config.losses[loss].factor is not None:
            continue
        for axis, values in zip(axes, (scored[1], scored[0]), strict=True):
            points = sorted((ratio, value) for ratio, value in values.items() if math.isfinite(value))
            if points:
                axis.plot(*zip(*points, strict=True), marker=".", color=f"C{index % 10}")
                axis.annotate(loss, points[-1], (4, 0), textcoords="offset points", fontsize=7, color=f"C{index % 10}")
    for axis, label in zip(
        axes, ("drop of PSNR, dB", f"score of {', '.join(COMPARED)}; less is better than L1"), strict=True
    ):
        axis.set_xscale("log", base=4)
        axis.set_xlabel("factor, multiples of equal gradients")
        axis.set_ylabel(label)
        axis.grid(alpha=0.3)
    save(figure, path)


def plot_crops(study: Study, track: Track, path: Path, names: Sequence[str]) -> None:
    """The most detailed windows of the judging photographs at the judged factor nearest to -0.1 dB."""
    from matplotlib import pyplot as plt

    shown: dict[str, Run] = {L1: Run(track.model, track.task, track.seeds[0])}
    for loss in names:
        points = curve(study, track, loss)
        if len(points) > 1:
            nearest = min(points[1:], key=lambda point: abs(drop(point, points[0]) - CROP_DROP))
            label = f"{loss}, {-drop(nearest, points[0]):+.2f} dB"
            shown[label] = replace(shown[L1], loss=loss, ratio=nearest.ratio)
    if len(shown) < 2:
        return
    models = {label: study.restorer(run) for label, run in shown.items()}
    gts = study.gts(study.folders.judge, study.config.protocol.judge_side)
    detail = [windows(gt).std((1, 2, 3)).max().item() for gt in gts]
    chosen = sorted(range(len(gts)), key=lambda index: -detail[index])[:CROPS]
    figure, axes = plt.subplots(
        len(chosen),
        len(models) + 1,
        figsize=(2.3 * (len(models) + 1), 2.4 * len(chosen)),
        layout="constrained",
        squeeze=False,
    )
    for row, index in zip(axes, chosen, strict=True):
        window = int(windows(gts[index]).std((1, 2, 3)).argmax())
        versions = {label: restore(model, track.task, gts[index], index) for label, model in models.items()}
        for axis, (label, image) in zip(row, {**versions, "ground truth": gts[index]}.items(), strict=True):
            axis.imshow(windows(image.clamp(0, 1))[window].permute(1, 2, 0).cpu().numpy(), interpolation="nearest")
            axis.set_axis_off()
            axis.set_title(label, fontsize=8)
    save(figure, path)


def windows(image: Tensor) -> Tensor:
    """All windows of (1, 3, H, W), (n, 3, CROP, CROP)."""
    return F.unfold(image, CROP, stride=CROP // 3)[0].T.unflatten(1, (3, CROP, CROP))


def save(figure: Any, path: Path) -> None:
    from matplotlib import pyplot as plt

    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda temporary: figure.savefig(temporary, dpi=110))
    plt.close(figure)


def rows(study: Study) -> Iterator[dict[str, Any]]:
    """One row a finished run, with what judged it."""
    for track in study.config.tracks:
        for run in dict.fromkeys(study.track_runs(track)):
            if study.is_done("runs", run):
                row: dict[str, Any] = {"track": track.name, **asdict(run), **read_json(study.path("runs", run))}
                row["tuning"] = rounded(row.pop("values"))
                row["judged"] = rounded(study.figures("judged", run))
                yield row


def rounded(values: Any) -> Any:
    """Five digits are enough, and a third of the bytes."""
    if isinstance(values, dict):
        return {name: rounded(value) for name, value in values.items()}
    if isinstance(values, list):
        return [rounded(value) for value in values]
    return float(f"{values:.5g}") if isinstance(values, float) else values


def write_report(study: Study, crops: Sequence[str]) -> Path:
    """Write report, rows and figures; return the report's path."""
    out = study.store.folder
    finished = list(rows(study))
    if not finished:
        raise ValueError(f"no finished run below {out}")
    about = {key: sorted({row[key] for row in finished}) for key in ("device", "torch", "mghf_loss", "commit")}
    protocol = study.config.protocol
    text = [
        f"# {out.name}",
        f"Fine-tuning: {protocol.steps} steps of {protocol.batch} x {protocol.crop}². {len(finished)} runs. "
        + "; ".join(f"{key}: {', '.join(values)}" for key, values in about.items())
        + f". Intervals: 95 %, paired over photographs; of KID the range over seeds. {tables.OPTIMISED}: the loss "
        "minimises this judge, or another in the same features. Every judge is described in studies/metrics.py.",
        *(f"Skipped: {name} ({reason})." for name, reason in study.skipped.items()),
    ]
    text += [track_report(study, track, out) for track in study.config.tracks]
    for track in study.config.tracks:
        if crops and not track.critic:
            plot_crops(study, track, out / f"{slug(track.name)}-crops.png", [c for c in crops if c in track.losses])
    lines_of_json = "\n".join(json.dumps(row) for row in finished) + "\n"
    write_atomically(out / "rows.jsonl", lambda path: path.write_text(lines_of_json, "utf-8"))
    write_atomically(out / "report.md", lambda path: path.write_text("\n\n".join(text) + "\n", "utf-8"))
    return out / "report.md"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True, help="configuration of the study")
    parser.add_argument("--out", type=Path, required=True, help="folder of its results")
    parser.add_argument("--crops", nargs="+", default=[], metavar="LOSS", help="losses of the crops, with --judge")
    parser.add_argument("--judge", type=Path, help="folder of photographs that judge, for the crops")
    arguments = parser.parse_args()
    try:
        torch.set_num_threads(1)
        judge = arguments.judge or Path()
        study = Study(config.read(arguments.config), Folders(judge, judge, judge), arguments.out)
        if arguments.crops:
            photographs.check(judge, photographs.LEAST_SIDE)
            for name in arguments.crops:
                config.check_known("loss", name, study.config.losses)
        path = write_report(study, arguments.crops)
    except (ValueError, OSError, RuntimeError) as error:
        raise SystemExit(f"studies.report: error: {' '.join(str(error).split())}") from error
    print(path.read_text("utf-8"))
    print(f"wrote {path}, rows.jsonl and figures beside it")


if __name__ == "__main__":
    main()
