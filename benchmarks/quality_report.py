"""Tables and figures of quality.py's finished runs: `python benchmarks/quality.py report CONFIG --out DIR`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from metrics import METRICS
from quality import (
    PIXEL,
    Config,
    Grid,
    Run,
    Training,
    choose,
    factors,
    gradient_file,
    grid_runs,
    load_model,
    loss_settings,
    pixel_run,
    restore,
    sweep_runs,
    tuned,
)
from runs import read_json, slug, spread
from torch import Tensor

from mghf_loss._files import write_atomically, write_table
from mghf_loss.toy import photograph

Summary = dict[str, dict[str, tuple[float, float]]]  # loss -> metric -> mean, half the range over seeds

ARROWS = {"higher": "↑", "lower": "↓", "one": "→1"}
FRONT_METRICS = ("niqe", "kid", "frechet", "spectrum_error", "clipiqa", "musiq")
MOST_CHANGE = 0.2  # of a matrix's colours
CROP, CROP_STRIDE = 96, 32
CROP_PHOTOGRAPHS = ("astronaut", "rocket", "stereo_motorcycle")
# What a loss of this type minimises itself, or in the same network: no judge of it.
CIRCULAR = {
    "ssim": {"ssim", "ms_ssim"},
    "ms-ssim": {"ssim", "ms_ssim"},
    "efficientnet": {"feature_distance", "kid", "frechet"},
    "lpips": {"lpips"},
    "dists": {"dists"},
}
CIRCLE = "°"


def write_report(config: Config, out: Path, csv: Path, figures: Path | None = None) -> None:
    """Write the table of all runs, OUT/report.md and the figures; say what is missing."""
    results = load_results(out)
    check_settings(config, results)
    skipped = read_json(out / "skipped.json")
    available = [name for name in config.losses if name not in skipped]
    sweep = [name for name in tuned(config) if name in available]
    if not sweep_is_finished(config, out, sweep):
        raise ValueError(f"the sweep below {out} is not finished: no factor is chosen yet")
    factor = factors(config, out, available)
    csv.parent.mkdir(parents=True, exist_ok=True)
    write_table(csv, rows_of_runs(results, out, factor))

    text = [
        describe_runs(config, results),
        *missing_metrics(results),
        *(f"Skipped: {name} ({reason})." for name, reason in skipped.items()),
    ]
    choices = [row for name in sweep for row in choose(config, out, name)[1]]
    if choices:
        text.append("## Choice of the factors\n\n" + markdown([describe_choice(row, config) for row in choices]))
    figures = figures or out
    figures.mkdir(parents=True, exist_ok=True)
    for grid in config.grids:
        for model in grid.models:
            for task in grid.tasks:
                of_task = [run for run in grid_runs(grid, factor) if (run.model, run.task) == (model, task)]
                summary = summarise(of_task, results, out)
                title = f"{grid.name}: {model}, {task}"
                if not summary:
                    text.append(f"## {title}\n\nNot run.")
                    continue
                notes = [markdown(summary_table(summary, config)), *fronts(summary, config)]
                missing = len([run for run in of_task if run.file(out) not in results])
                if missing:
                    notes.insert(1, f"{missing} of {len(of_task)} runs are not finished.")
                if (model, task, grid.adversarial) != (config.tuning.model, config.tuning.task, False):
                    notes.insert(1, f"The factors are those chosen for {config.tuning.model}, {config.tuning.task}.")
                text.append(f"## {title}\n\n" + "\n\n".join(notes))
                plot_matrix(figures / f"quality-{slug(title)}.png", title, summary, grid.reference, config)
    report = "\n\n".join(text) + "\n"
    write_atomically(out / "report.md", lambda temporary: temporary.write_text(report, "utf-8"))
    if sweep:
        plot_curves(figures / "quality-curves.png", config, out, results, factor)
    plot_crops(figures / "quality-crops.png", config, out, factor)
    print(report)
    print(f"wrote {csv}, {out / 'report.md'} and figures in {figures}")


def sweep_is_finished(config: Config, out: Path, sweep: Sequence[str]) -> bool:
    """Whether every factor can be chosen."""
    if not all(gradient_file(out, name).exists() for name in sweep):
        return False
    runs = [run for name in sweep for run in sweep_runs(config, out, name).values()]
    return not sweep or all(run.file(out).exists() for run in (pixel_run(config), *runs))


def describe_runs(config: Config, results: Mapping[Path, Mapping[str, Any]]) -> str:
    """What all runs have in common, where and when they ran, how the tables are to be read."""
    training = config.training
    devices, versions, dates = (
        sorted({result[key] for result in results.values()}) for key in ("device", "torch", "date")
    )
    return (
        f"{training.steps} steps of {training.batch} x {training.crop}²; {', '.join(devices)}; "
        f"PyTorch {', '.join(versions)}; {', '.join(dates)}. Mean ± half the range over seeds. "
        f"{CIRCLE}: the loss minimises this measure, or another in the same network. "
        "Every measure is described in benchmarks/metrics.py."
    )


def check_settings(config: Config, results: Mapping[Path, Mapping[str, Any]]) -> None:
    """Raise where a result is not of this configuration (photographs aside, which only `run` sees)."""
    for path, result in results.items():
        now = {each.name: getattr(config.training, each.name) for each in fields(Training)}
        if result["loss"] in config.losses:
            now |= loss_settings(config, result["loss"])
        changed = sorted(key for key, value in now.items() if result["settings"].get(key) != value)
        if changed:
            raise ValueError(f"{path} is of another configuration (different: {', '.join(changed)})")


def missing_metrics(results: Mapping[Path, Mapping[str, Any]]) -> list[str]:
    """A line for what no run has, and one for what only some have."""
    measured = [result["val"] for result in results.values() if "failure" not in result]
    nowhere = [name for name in METRICS if not any(name in values for values in measured)]
    partly = [name for name in METRICS if name not in nowhere and not all(name in values for values in measured)]
    lines = [f"Not measured, weights or package missing: {', '.join(nowhere)}."] if nowhere else []
    return [*lines, *([f"Measured in some runs only: {', '.join(partly)}."] if partly else [])]


def load_results(out: Path) -> dict[Path, dict[str, Any]]:
    """The finished runs below `out`, by file."""
    results = {path: read_json(path) for path in sorted((out / "runs").glob("*.json"))}
    if not results:
        raise ValueError(f"no finished run below {out}")
    return results


def rows_of_runs(
    results: Mapping[Path, Mapping[str, Any]], out: Path, factor: Mapping[str, float]
) -> list[dict[str, Any]]:
    """One row a run, in equal columns."""
    rows = []
    for result in results.values():
        gradients = gradient_file(out, result["loss"])
        unit = read_json(gradients)["gradient_ratio"] if gradients.exists() else None
        rows.append(
            {
                "model": result["model"],
                "task": result["task"],
                "loss": result["loss"],
                "adversarial": result["adversarial"],
                "seed": result["seed"],
                "factor": result["factor"],
                "gradient_ratio": "" if unit is None else f"{result['factor'] * unit:.3g}",
                "chosen": result["factor"] == factor.get(result["loss"]),
                **{name: f"{result['val'][name]:.6g}" if name in result["val"] else "" for name in METRICS},
                "failure": result.get("failure", ""),
                **{each.name: result["settings"][each.name] for each in fields(Training)},
                "training_seconds": f"{result['seconds']:.1f}" if "seconds" in result else "",
                "device": result["device"],
                **{name: result[name] for name in ("torch", "mghf_loss")},
                "date": result["date"],
            }
        )
    return rows


def summarise(runs: Sequence[Run], results: Mapping[Path, Mapping[str, Any]], out: Path) -> Summary:
    """Mean and half the range over the seeds that are finished; a loss that diverged with any seed has no figures."""
    summary: Summary = {}
    for loss in dict.fromkeys(run.loss for run in runs):
        values = [results[run.file(out)]["val"] for run in runs if run.loss == loss and run.file(out) in results]
        if values:
            summary[loss] = {
                name: spread([value[name] for value in values])
                for name in METRICS
                if all(name in value for value in values)
            }
    return summary


def measured(summary: Summary) -> list[str]:
    """Metrics that any loss has, in their usual order."""
    return [name for name in METRICS if any(name in metrics for metrics in summary.values())]


def is_circular(loss: str, metric: str, config: Config) -> bool:
    """Whether a loss minimises what the metric measures."""
    spec = config.losses.get(loss)
    return spec is not None and metric in CIRCULAR.get(spec.type, ())


def figure_text(summary: Summary, loss: str, metric: str, config: Config) -> str:
    """A cell: mean, half the range, and whether the loss is judged by itself."""
    if not summary[loss]:
        return "diverged"
    if metric not in summary[loss]:
        return "not measured"
    mean, half = summary[loss][metric]
    circle = CIRCLE if is_circular(loss, metric, config) else ""
    return f"{mean:.4g}" + (f" ± {half:.2g}" if half else "") + circle


def label(metric: str) -> str:
    """A metric's name as it is shown, with the direction of the better."""
    return f"{metric.replace('_', ' ')} {ARROWS[METRICS[metric]]}"


def summary_table(summary: Summary, config: Config) -> list[dict[str, str]]:
    return [
        {
            "loss": loss,
            **{label(name): figure_text(summary, loss, name, config) for name in measured(summary)},
        }
        for loss in summary
    ]


def describe_choice(row: Mapping[str, Any], config: Config) -> dict[str, str]:
    at_the_end = row["ratio"] in (min(config.tuning.ratios), max(config.tuning.ratios))
    return {
        "loss": row["loss"],
        "ratio": f"{row['ratio']:g}",
        "factor": f"{row['factor']:.3g}",
        "PSNR against L1, dB": f"{row['psnr_change']:+.2f}",
        "score": f"{row['score']:+.3f}",
        "chosen": ("yes, at the end of the range" if at_the_end else "yes") if row["chosen"] else "",
    }


def markdown(table: Sequence[Mapping[str, str]]) -> str:
    columns = list(table[0])
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    return "\n".join(lines + ["| " + " | ".join(row[column] for column in columns) + " |" for row in table])


def badness(metric: str, value: float) -> float:
    """Less is better, whatever the metric."""
    return {"higher": -value, "lower": value, "one": abs(value - 1)}[METRICS[metric]]


def front(summary: Summary, metric: str, config: Config) -> list[str]:
    """Losses than which no other's means are as good in PSNR and in `metric`; those judged by themselves left out."""
    points = {
        loss: (badness("psnr", metrics["psnr"][0]), badness(metric, metrics[metric][0]))
        for loss, metrics in summary.items()
        if metric in metrics and "psnr" in metrics and not is_circular(loss, metric, config)
    }
    return [
        loss
        for loss, (x, y) in points.items()
        if not any(a <= x and b <= y and (a, b) != (x, y) for a, b in points.values())
    ]


def fronts(summary: Summary, config: Config) -> list[str]:
    """A list with a line for each perception metric, or nothing where a front would be of one loss."""
    metrics = [name for name in FRONT_METRICS if name in measured(summary)]
    lines = [
        f"- Front of PSNR and {name.replace('_', ' ')}: {', '.join(front(summary, name, config))}" for name in metrics
    ]
    return ["\n".join(lines)] if lines and len(summary) > 1 else []


def plot_matrix(path: Path, title: str, summary: Summary, reference: str, config: Config) -> None:
    """Every figure of a table, coloured by how much better or worse than the reference's it is, where that is there."""
    from matplotlib import pyplot as plt

    metrics, losses = measured(summary), list(summary)
    changes = torch.zeros(len(losses), len(metrics))
    for row, loss in enumerate(losses):
        for column, metric in enumerate(metrics):
            if metric in summary[loss] and metric in summary.get(reference, {}):
                ours, theirs = (badness(metric, summary[name][metric][0]) for name in (loss, reference))
                changes[row, column] = (theirs - ours) / max(abs(theirs), 1e-12)
    figure, axis = plt.subplots(figsize=(1.15 * len(metrics) + 2, 0.36 * len(losses) + 1.4), layout="constrained")
    shown = axis.imshow(changes, cmap="PiYG", vmin=-MOST_CHANGE, vmax=MOST_CHANGE, aspect="auto")
    for row, loss in enumerate(losses):
        for column, metric in enumerate(metrics):
            text = figure_text(summary, loss, metric, config)
            on_dark = changes[row, column].abs() > 0.7 * MOST_CHANGE
            axis.text(column, row, text, ha="center", va="center", fontsize=7, color="white" if on_dark else "black")
    axis.set_xticks(range(len(metrics)), [label(name) for name in metrics])
    axis.tick_params(axis="x", labelrotation=30, labelsize=8, bottom=False, top=True, labelbottom=False, labeltop=True)
    axis.set_yticks(range(len(losses)), losses, fontsize=8)
    known = (
        f"green is better than {reference}" if summary.get(reference) else f"{reference} is not there to compare with"
    )
    axis.set_title(f"{title}; {known}; {CIRCLE} judged by itself", fontsize=9)
    bar = figure.colorbar(shown, ax=axis, shrink=0.9)
    bar.ax.yaxis.set_major_formatter(lambda value, _: f"{value:+.0%}")
    save(figure, path)


def plot_curves(
    path: Path,
    config: Config,
    out: Path,
    results: Mapping[Path, Mapping[str, Any]],
    factor: Mapping[str, float],
) -> None:
    """Perception against distortion: a curve a loss over its factor; a disc with its seeds' range at the chosen one."""
    from matplotlib import pyplot as plt

    pixel = results[pixel_run(config).file(out)]["val"]
    panels = [name for name in FRONT_METRICS if name in pixel]
    columns = 2 if len(panels) > 1 else 1
    rows = -(-len(panels) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(6.2 * columns, 4.8 * rows), layout="constrained", squeeze=False)
    names = [name for name in tuned(config) if name in factor]
    fixed = [name for name, spec in config.losses.items() if spec.factor is not None and name in factor]
    shown = Grid("", (PIXEL, *names, *fixed), (config.tuning.model,), (config.tuning.task,), all_seeds(config))
    summary = summarise(grid_runs(shown, factor), results, out)
    for axis, metric in zip(axes.flat, panels, strict=False):
        (x, dx), (y, dy) = summary[PIXEL]["psnr"], summary[PIXEL][metric]
        axis.errorbar(x, y, dy, dx, fmt="k*", markersize=13, capsize=3, label=PIXEL, zorder=5)
        for index, name in enumerate(names):
            ours = name.startswith("MGHF")
            values = [results[run.file(out)]["val"] for run in sweep_runs(config, out, name).values()]
            points = [(value["psnr"], value[metric]) for value in values if metric in value]
            style = {"color": f"C{index}", "linewidth": 2.6 if ours else 1.2, "zorder": 4 if ours else 2}
            axis.plot(*zip(*points, strict=True), marker=".", label=name, **style)
            if metric in summary.get(name, {}):
                (x, dx), (y, dy) = summary[name]["psnr"], summary[name][metric]
                axis.errorbar(x, y, dy, dx, fmt="o", color=f"C{index}", markersize=8, capsize=3, zorder=6)
        for index, name in enumerate(fixed):
            if metric in summary.get(name, {}):
                (x, dx), (y, dy) = summary[name]["psnr"], summary[name][metric]
                axis.errorbar(x, y, dy, dx, fmt="sD^v"[index % 4], color="black", capsize=3, label=name, zorder=7)
        axis.set_xlabel("PSNR in dB (more is better)")
        axis.set_ylabel(label(metric))
        axis.grid(alpha=0.3)
    for axis in axes.flat[len(panels) :]:
        axis.set_axis_off()
    axes[0, 0].legend(fontsize=8)
    ratios = ", ".join(f"{ratio:g}" for ratio in config.tuning.ratios)
    figure.suptitle(
        f"{config.tuning.model}, {config.tuning.task}: factors of {ratios} times L1's gradient, "
        f"seed {config.tuning.seed}; disc: chosen, mean and range over seeds",
        fontsize=10,
    )
    save(figure, path)


def all_seeds(config: Config) -> tuple[int, ...]:
    return tuple(sorted({seed for grid in config.grids for seed in grid.seeds} | {config.tuning.seed}))


@torch.no_grad()
def plot_crops(path: Path, config: Config, out: Path, factor: Mapping[str, float]) -> None:
    """Where the last of our losses gains and where it fails, by HaarPSI against L1: three windows of each kind.

    Models of the tuning seed, as far as they are there. The photographs are scikit-image's: no model of quality.py is
    trained on them (`mghf-loss demo`, with which our default coefficients were set, trains on them). Of each photograph
    the window of the largest gain and that of the largest loss are candidates.
    """
    import piq
    from matplotlib import pyplot as plt

    tuning = config.tuning
    shown = [name for name in (PIXEL, "EfficientNet", "MGHF-n", "MGHF-c") if name in factor]
    runs = {name: Run(tuning.model, tuning.task, name, tuning.seed, factor[name]) for name in shown}
    there = {name: run for name, run in runs.items() if run.file(out).with_suffix(".safetensors").exists()}
    losses = [name for name in there if name != PIXEL]
    if PIXEL not in there or not losses:
        print(f"left out {path.name}: the models of seed {tuning.seed} are not there")
        return
    models = {name: load_model(run, out) for name, run in there.items()}
    windows: list[tuple[float, dict[str, Tensor]]] = []
    for index, name in enumerate(CROP_PHOTOGRAPHS):
        gt = photograph(name)
        pixels = (gt[0] * 255).round().byte()
        images = {loss: restore(model, tuning.task, pixels, index, "cpu") for loss, model in models.items()}
        stacks = {key: cut(image) for key, image in {**images, "ground truth": gt}.items()}
        textured = stacks["ground truth"].std((1, 2, 3)) > 0.05
        gains = piq.haarpsi(stacks[losses[-1]], stacks["ground truth"], reduction="none") - piq.haarpsi(
            stacks[PIXEL], stacks["ground truth"], reduction="none"
        )
        for place in {int(gains.where(textured, gains.new_tensor(s * -9.0)).mul(s).argmax()) for s in (1, -1)}:
            windows.append((gains[place].item(), {key: stack[place] for key, stack in stacks.items()}))
    windows.sort(key=lambda window: -window[0])
    chosen = windows[:3] + windows[-3:]
    figure, axes = plt.subplots(
        len(chosen), len(models) + 1, figsize=(2.2 * (len(models) + 1), 2.3 * len(chosen)), layout="constrained"
    )
    for index, (row, (gain, versions)) in enumerate(zip(axes, chosen, strict=True)):
        for axis, (name, crop) in zip(row, versions.items(), strict=True):
            axis.imshow(crop.permute(1, 2, 0).numpy(), interpolation="nearest")
            axis.set_xticks([])
            axis.set_yticks([])
            if index == 0:
                axis.set_title(name, fontsize=9)
        row[0].set_ylabel(f"HaarPSI {gain:+.3f}", fontsize=8)
    figure.suptitle(
        f"scikit-image's photographs: largest gains (upper three) and losses (lower three) of {losses[-1]} "
        f"against {PIXEL}",
        fontsize=10,
    )
    save(figure, path)


def cut(image: Tensor) -> Tensor:
    """All windows of (1, 3, H, W) at a stride of 32, (n, 3, 96, 96)."""
    windows = F.unfold(image.clamp(0, 1), CROP, stride=CROP_STRIDE)[0]
    return windows.T.unflatten(1, (3, CROP, CROP))


def save(figure: Any, path: Path) -> None:
    from matplotlib import pyplot as plt

    write_atomically(path, lambda temporary: figure.savefig(temporary, dpi=110))
    plt.close(figure)
