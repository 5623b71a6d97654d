"""Tables and figures of a study's finished runs: `python -m studies.report --config FILE --out DIR`.

Writes DIR/report.md, DIR/rows.jsonl (one row a run, with the judges' values of every photograph) and figures. A track
that nobody has judged yet is shown with the values of the tuning photographs.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mghf_loss._files import write_atomically
from mghf_loss.toy import downscale, upscale

from . import command, config, losses, photographs, tables
from .config import L1, Track
from .metrics import METRICS
from .protocol import DROPS, SCORE, Folders, Run, Study
from .store import check_protocol, read_json, slug
from .training import restore

# At most six columns each, the loss among them.
GROUPS = (
    ("psnr", "ssim", "ms_ssim", "haarpsi", "jod"),
    ("niqe", "kid", "kid_lite2", "spectrum_error", "detail_energy"),
    ("vif", "gmsd", "mdsi", "feature_distance"),
    ("grid_lock", "pattern", "lpips", "dists"),
)
CROP, CROPS = 96, 3
CROP_DROP = 0.1
MOST_DROP = 0.6  # that a figure over the factor shows


@dataclass(frozen=True)
class Entry:
    """A row of a track's tables: the judges' values, or the tuning photographs', over the finished seeds."""

    label: str
    title: str
    loss: str
    ratio: float
    reference: str
    seeds: int
    values: dict[str, Tensor]

    def figure(self, metric: str) -> float:
        return tables.statistic(self.values[metric]).item()


def is_judged(study: Study, track: Track) -> bool:
    """Whether L1 is judged; before, a track's tables show what the tuning photographs say."""
    return study.is_done("judged", Run(track.model, track.task, track.seeds[0]))


def entry(
    study: Study, track: Track, loss: str, ratio: float, critic: float = 0.0, seeds: int | None = None
) -> Entry | None:
    """The row of a loss, once one of the first `seeds` of it is judged and none diverged."""
    if is_judged(study, track):
        kind, chosen = "judged", track.seeds[:seeds]
    else:
        kind, chosen = "runs", track.seeds[:1]  # the other seeds are not looked at in full
    runs = [Run(track.model, track.task, seed, loss, ratio, critic) for seed in chosen]
    judged = [study.figures(kind, run) for run in runs if study.is_done(kind, run)]
    if not judged or not all(judged):
        return None
    names = [name for name in METRICS if all(name in values for values in judged)]
    values = {name: tables.over_seeds([each[name] for each in judged]) for name in names}
    weight = f", GAN {critic:g}" if critic else ""
    part = "" if len(judged) == len(runs) else f" ({len(judged)} of {len(runs)} seeds)"
    return Entry(loss + weight, loss + weight + part, loss, ratio, L1 + weight, len(judged), values)


def lines(study: Study, track: Track, whole: bool) -> dict[str, list[Entry]]:
    """The rows of every loss at its chosen factor; of the first seed at all that were judged, if `whole`.

    Over the GAN weight, if there is one.
    """
    source = study.config.track(track.factors_of) if track.factors_of else track
    found = {}
    for loss in (L1, *study.available(track)):
        chosen = 0.0 if loss == L1 else study.chosen(source, loss)
        ratios = [] if chosen is None else [chosen]
        if whole and track.factors_of is None and loss != L1:
            ratios = study.compared_ratios(track, loss)
        seeds = 1 if whole else None
        weights = track.critic or (0.0,)
        points = [entry(study, track, loss, ratio, critic, seeds) for critic in weights for ratio in ratios]
        found[loss] = [point for point in points if point is not None]
    return {loss: points for loss, points in found.items() if points}


def drop(point: Entry, l1: Entry) -> float:
    return l1.figure("psnr") - point.figure("psnr")


def is_optimised(study: Study, loss: str, metric: str) -> bool:
    """Whether a loss minimises what a metric measures."""
    return loss != L1 and metric in losses.OPTIMISED.get(study.config.losses[loss].type, ())


def value_tables(study: Study, entries: Sequence[Entry]) -> Iterator[str]:
    """What the judges say, a table a group of them."""
    for group in GROUPS:
        columns = {}
        for metric in group:
            figures = {e.label: e.figure(metric) for e in entries if metric in e.values}
            optimised = {e.label for e in entries if is_optimised(study, e.loss, metric)}
            if figures:
                columns[tables.heading(metric)] = tables.best_in_bold(metric, figures, optimised)
        if columns:
            rows = [{name: cells.get(e.label, "") for name, cells in columns.items()} for e in entries]
            yield tables.markdown([{"loss": e.title, **row} for e, row in zip(entries, rows, strict=True)])


def changes(
    study: Study, loss: str, values: Mapping[str, Tensor], l1: Mapping[str, Tensor], metrics: Sequence[str]
) -> dict[str, str]:
    """Cells of differences from L1, with 95 % intervals."""
    cells = {}
    for metric in metrics:
        if metric in values and metric in l1:
            text = tables.difference_text(
                metric, tables.difference(values[metric], l1[metric], metric in tables.POOLED)
            )
            cells[tables.heading(metric)] = text + tables.OPTIMISED * is_optimised(study, loss, metric)
    return cells


def equal_psnr_tables(study: Study, track: Track) -> Iterator[str]:
    """What each loss changes where it costs the same PSNR, by interpolation between its judged factors. First seed."""
    (l1,) = lines(study, track, whole=True)[L1]
    for target in DROPS:
        rows = []
        for loss, points in lines(study, track, whole=True).items():
            curve = [(p.ratio, drop(p, l1), p.values) for p in (l1, *points)]
            if loss != L1 and (found := tables.at_drop(curve, target)) is not None:
                cells = changes(study, loss, found[1], l1.values, SCORE)
                fixed = study.config.losses[loss].factor is not None  # a straight line from L1
                rows.append(
                    {"loss": loss, "ratio": f"{found[0]:.2g} of its factor" if fixed else f"{found[0]:.3g}", **cells}
                )
        if rows:
            yield f"### At -{target:g} dB\n\n" + tables.markdown(rows)


def choice_table(study: Study, track: Track) -> Iterator[str]:
    """The choice of the factors on the tuning photographs."""
    rows = []
    for loss in study.available(track):
        chosen, scored = study.chosen(track, loss), study.scored(track, loss)
        if chosen is None or scored is None or study.config.losses[loss].factor is not None:
            continue
        scores, drops = scored
        is_inside = min(scores) < chosen < max(scores)
        notes = ["" if is_inside else ", at the end", "" if scores[chosen] <= 0 else ", no better than L1"]
        rows.append(
            {
                "loss": loss,
                "ratios": ", ".join(f"{ratio:g}" for ratio in sorted(scores)),
                "chosen": f"{chosen:g}{''.join(notes)}",
                "factor": f"{study.factor(Run(track.model, track.task, track.seeds[0], loss, chosen)):.3g}",
                "PSNR, dB": f"{-drops[chosen]:+.2f}",
                "score": f"{scores[chosen]:+.3f}",
            }
        )
    if rows:
        yield "### Factors, chosen on the tuning photographs\n\n" + tables.markdown(rows)


def track_report(study: Study, track: Track, figures: Path) -> str:
    """The tables of a track; its figures are drawn."""
    parts = [f"## {track.name}: {track.model}, {track.task}"]
    entries = [point for points in lines(study, track, whole=False).values() for point in points]
    l1 = entry(study, track, L1, 0.0)
    judged = is_judged(study, track)
    if l1 is None or not entries or (track.factors_of and not judged):
        return "\n\n".join([*parts, "Not judged yet.", *([] if track.factors_of else choice_table(study, track))])
    if judged:
        parts.append(f"Seeds: {', '.join(map(str, sorted({e.seeds for e in entries})))} of {len(track.seeds)}.")
    else:
        parts.append("Not judged yet: all tables are of the tuning photographs, first seed.")
    parts += [] if track.factors_of else choice_table(study, track)
    parts += ["### At the chosen factor", *value_tables(study, entries)]
    references = {e.label: e for e in (l1, *entries)}
    for metrics in (("psnr", "ssim", "haarpsi", "jod"), ("niqe", "kid_lite2", "spectrum_error", "feature_distance")):
        rows = [
            {"against L1": e.title, **changes(study, e.loss, e.values, references[e.reference].values, metrics)}
            for e in entries
            if e.loss != L1 and e.reference in references
        ]
        parts += [tables.markdown(rows)] if rows else []
    if track.factors_of is None:
        parts += equal_psnr_tables(study, track)
        plot_factors(study, track, figures / f"{slug(track.name)}-factors.png")
    plot_front(study, track, figures / f"{slug(track.name)}-front.png")
    return "\n\n".join(parts)


def plot_front(study: Study, track: Track, path: Path) -> None:
    """Perception against distortion, first seed, a labelled line a loss; on the photographs of the tables."""
    from matplotlib import pyplot as plt

    l1 = entry(study, track, L1, 0.0, seeds=1)
    assert l1 is not None
    most = math.inf if track.critic else MOST_DROP
    figure, axes = plt.subplots(2, 2, figsize=(9, 7.6), layout="constrained")
    for axis, metric in zip(axes.flat, SCORE, strict=True):
        if metric not in l1.values:
            axis.set_axis_off()
            continue
        axis.plot(0, l1.figure(metric), "k*", markersize=12, zorder=5)
        for loss, points in lines(study, track, whole=True).items():
            if loss != L1 or track.critic:
                known = [p for p in points if metric in p.values and drop(p, l1) < most]
                draw_line(axis, [(-drop(p, l1), p.figure(metric)) for p in known], loss, is_ours(study, loss))
        axis.margins(x=0.3)  # for the names
        axis.set_xlabel("PSNR against L1, dB")
        axis.set_ylabel(tables.heading(metric))
    over = "the GAN weight" if track.critic else "the factor"
    where = "" if is_judged(study, track) else ", tuning photographs"
    figure.suptitle(f"{track.name}{where}: lines over {over}; star: L1", fontsize=10)
    save(figure, path)


def plot_factors(study: Study, track: Track, path: Path) -> None:
    """Drop of PSNR and score over the factor, on the tuning photographs, first seed; nothing where all are fixed."""
    from matplotlib import pyplot as plt

    chosen = [loss for loss in study.available(track) if study.config.losses[loss].factor is None]
    curves = {loss: study.scored(track, loss) for loss in chosen}
    if not any(curves.values()):
        return
    figure, axes = plt.subplots(1, 2, figsize=(9, 4), layout="constrained")
    labels = ("score, less is better, L1 has 0", "drop of PSNR, dB")
    for which, (axis, label) in enumerate(zip(axes, labels, strict=True)):
        for loss, scored in curves.items():
            if scored is not None:
                points = sorted((ratio, value) for ratio, value in scored[which].items() if math.isfinite(value))
                draw_line(axis, points, loss, is_ours(study, loss))
        axis.set_xscale("log", base=4)
        axis.set_xlabel("factor, multiples of equal gradients")
        axis.set_ylabel(label)
    save(figure, path)


def is_ours(study: Study, loss: str) -> bool:
    """Whether a loss is one of ours at the weight that we recommend."""
    return loss != L1 and study.config.losses[loss].type in losses.OURS and study.config.losses[loss].factor == 1


def draw_line(axis: Any, points: Sequence[tuple[float, float]], label: str, strong: bool) -> None:
    """A line with its name at the end, red and in front if it is one of ours."""
    color, order = ("tab:red", 4) if strong else ("0.45", 3)
    if points:
        axis.plot(*zip(*points, strict=True), marker=".", color=color, linewidth=2 if strong else 1, zorder=order)
        axis.annotate(label, points[-1], (4, 0), textcoords="offset points", fontsize=8, color=color, zorder=order)
    axis.grid(alpha=0.3)


def crop_runs(study: Study, track: Track, names: Sequence[str]) -> dict[str, Run]:
    """What crops show beside L1: the judged factor nearest to -0.1 dB, or beside a critic the middle GAN weight."""
    l1 = Run(track.model, track.task, track.seeds[0])
    shown, judged = {L1: l1}, lines(study, track, whole=True)
    if track.critic:
        weight = track.critic[len(track.critic) // 2]
        for loss in (L1, *names):
            for point in judged.get(loss, ()):
                run = replace(l1, loss=loss, ratio=point.ratio, critic=weight)
                if study.figures("judged", run):
                    shown[f"{loss}, GAN {weight:g}"] = run
        return shown
    reference = entry(study, track, L1, 0.0, seeds=1)
    for loss in names:
        if reference is not None and loss in judged:
            drops = {point.ratio: drop(point, reference) for point in judged[loss]}
            nearest = min(drops, key=lambda ratio: abs(drops[ratio] - CROP_DROP))
            shown[f"{loss}, {-drops[nearest]:+.2f} dB"] = replace(l1, loss=loss, ratio=nearest)
    return shown


def plot_crops(study: Study, track: Track, path: Path, names: Sequence[str]) -> None:
    """The most detailed windows of the judging photographs."""
    from matplotlib import pyplot as plt

    if not is_judged(study, track):
        return
    shown = crop_runs(study, track, names)
    if len(shown) < 2:
        return
    models = {label: study.restorer(run) for label, run in shown.items()}
    gts = study.gts(study.folders.judge, study.config.protocol.judge_side)
    detail = [windows((gt - upscale(downscale(gt))).abs()).mean((1, 2, 3)) for gt in gts]
    chosen = sorted(range(len(gts)), key=lambda index: -detail[index].max().item())[:CROPS]
    figure, axes = plt.subplots(
        len(chosen),
        len(models) + 1,
        figsize=(1.7 * (len(models) + 1), 1.8 * len(chosen)),
        layout="constrained",
        squeeze=False,
    )
    for row, index in zip(axes, chosen, strict=True):
        window = int(detail[index].argmax())
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
    write_atomically(path, lambda temporary: figure.savefig(temporary, dpi=140))
    plt.close(figure)


def rows(study: Study) -> Iterator[dict[str, Any]]:
    """One row a finished run, with what judged it."""
    for track in study.config.tracks:
        for run in dict.fromkeys(study.track_runs(track)):
            if study.is_done("runs", run):
                row: dict[str, Any] = {"track": track.name, **asdict(run), **read_json(study.path("runs", run))}
                row["tuning"] = row.pop("values")
                row["judged"] = study.figures("judged", run)
                yield json.loads(json.dumps(row), parse_float=lambda text: float(f"{float(text):.5g}"))


def write_report(study: Study, crops: Sequence[str]) -> Path:
    """Write report, rows and figures; return the report's path."""
    out = study.out
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
        if crops:
            plot_crops(study, track, out / f"{slug(track.name)}-crops.png", [c for c in crops if c in track.losses])
    lines_of_json = "\n".join(json.dumps(row) for row in finished) + "\n"
    write_atomically(out / "rows.jsonl", lambda path: path.write_text(lines_of_json, "utf-8"))
    write_atomically(out / "report.md", lambda path: path.write_text("\n\n".join(text) + "\n", "utf-8"))
    return out / "report.md"


def work(arguments: argparse.Namespace) -> None:
    judge = arguments.judge or Path()
    study = Study(config.read(arguments.config), Folders(judge, judge, judge), arguments.out, arguments.device)
    about = asdict(study.config.protocol)
    if arguments.crops:
        if arguments.judge is None:
            raise ValueError("--crops needs --judge, the folder of photographs that judge")
        photographs.check(judge, photographs.LEAST_SIDE)
        about["judge"] = photographs.digest(judge)
        for name in arguments.crops:
            config.check_known("loss", name, study.config.losses)
    check_protocol(study.out, about, is_part=True)
    torch.set_num_threads(arguments.threads)
    path = write_report(study, arguments.crops)
    print(path.read_text("utf-8"))
    print(f"wrote {path}, rows.jsonl and figures beside it")


def main() -> None:
    parser = command.parser("studies.report", __doc__)
    parser.add_argument("--config", type=Path, required=True, help="configuration of the study")
    parser.add_argument("--out", type=Path, required=True, help="folder of its results")
    parser.add_argument("--crops", nargs="+", default=[], metavar="LOSS", help="losses of the crops, with --judge")
    parser.add_argument("--judge", type=Path, help="folder of photographs that judge, for the crops")
    command.run(parser, work)


if __name__ == "__main__":
    main()
