"""Train candidates for the invertible network, and write the study that chooses among them by what their loss does.

    python -m studies.networks --train DIR --tune DIR --out DIR
    python -m studies.run --config DIR/networks.toml --train DIR --tune DIR --judge DIR --out DIR/study --no-judge

The candidates differ from `BASE` in one factor or two; the bundled network competes as it is. All are trained on the
same crops for the same steps. A candidate's features have their own scale: so each term of a preset gets the
coefficient with which its gradient is as large as the bundled network's, at bicubic x4. A finished network is not
trained again.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from tqdm import tqdm

from mghf_loss import HighFrequencyINN, INNConfig
from mghf_loss._files import format_table, write_atomically
from mghf_loss.calibrate import gradient_ratios
from mghf_loss.mghf import PRESETS, Preset
from mghf_loss.toy import downscale, middle, upscale
from mghf_loss.training.evaluation import network_bits
from mghf_loss.training.loop import TrainConfig, train_inn

from . import command, photographs
from .protocol import CALIBRATION_CROPS, TUNING_SIDE
from .store import slug

BASE = INNConfig(noise_floor=12.0)
CANDIDATES = {
    "base": BASE,
    "packet": replace(BASE, variant="packet"),
    "couplings 1": replace(BASE, couplings=1),
    "couplings 4, hidden 64": replace(BASE, couplings=4, hidden=64),
    "noise 6": replace(BASE, noise_floor=6.0),
    "noise 20": replace(BASE, noise_floor=20.0),
    "clamp 1": replace(BASE, clamp=1.0),
}
STUDIED: tuple[Preset, ...] = ("balanced", "sharp")  # features conditioned by GT, and by both images
CROP = 96


def train(name: str, images: Path, out: Path, steps: int, device: str) -> Path:
    """The folder of a candidate's network, trained where it is not there."""
    folder = out / "inn" / slug(name)
    training = TrainConfig(images=images, out=folder, steps=steps, batch=16, crop=64, save_every=steps)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "log.txt").open("a", encoding="utf-8") as log, contextlib.redirect_stderr(log):
        train_inn(training, CANDIDATES[name], cpu=device == "cpu")
    return folder


def write_config(path: Path, losses: Mapping[str, tuple[Preset, str, Mapping[str, float]]], task: str) -> None:
    """A study of losses {name: (preset, network, coefficients)}; JSON's strings and numbers are TOML's too."""
    lines = ["[losses]"]
    for name, (preset, network, factors) in losses.items():
        table = ", ".join(f"{term} = {factor:.4g}" for term, factor in factors.items())
        options = f"{{ preset = {json.dumps(preset)}, network = {json.dumps(network)}, coefficients = {{ {table} }} }}"
        lines.append(f'{json.dumps(name)} = {{ type = "MGHFLoss", options = {options}, factor = 1 }}')
    lines += [
        "",
        "[[track]]",
        'name = "networks"',
        f"task = {json.dumps(task)}",
        f"losses = {json.dumps([*losses])}",
        "seeds = [0]",
    ]
    write_atomically(path, lambda temporary: temporary.write_text("\n".join(lines) + "\n", "utf-8"))


def work(arguments: argparse.Namespace) -> None:
    torch.set_num_threads(arguments.threads)
    for folder in (arguments.train, arguments.tune):
        photographs.check(folder, CROP)
    images = photographs.load(arguments.train)
    gt = photographs.unit_range(
        photographs.random_crops(images, CALIBRATION_CROPS, CROP, torch.Generator().manual_seed(0))
    )
    pairs = [(upscale(downscale(gt)), gt)]
    tuning = [middle(image, TUNING_SIDE)[None] for image in photographs.load(arguments.tune)]
    rows: list[dict[str, object]] = []
    found: dict[str, tuple[Preset, str, Mapping[str, float]]] = {}
    wanted: dict[Preset, dict[str, float]] = {}  # of the bundled network, the first
    for name in tqdm(["bundled", *arguments.only], desc="networks", unit="network"):
        path = name
        if name != "bundled":
            path = str(train(name, arguments.train, arguments.out, arguments.steps, arguments.device).resolve())
        network = HighFrequencyINN.from_pretrained(path)
        generator = torch.Generator().manual_seed(0)
        bits = statistics.mean(network_bits(network, image, generator, "cpu") for image in tuning)
        parameters = sum(parameter.numel() for parameter in network.parameters())
        rows.append({"candidate": name, "parameters": parameters, "bits": bits})
        for preset in STUDIED:
            ratios = gradient_ratios(preset, pairs, path)
            of_bundled, preset_factors = wanted.setdefault(preset, ratios), PRESETS[preset].coefficients
            factors = {term: preset_factors[term] * of_bundled[term] / ratio for term, ratio in ratios.items()}
            found[f"{preset}, {name}"] = preset, path, factors
            rows[-1] |= {f"{preset} {term}": factor for term, factor in factors.items()}
    write_config(arguments.out / "networks.toml", found, "sr-bicubic")
    print(format_table(rows))
    print(f"wrote {arguments.out / 'networks.toml'}, a configuration of studies.run")


def main() -> None:
    parser = command.parser("studies.networks", __doc__)
    parser.add_argument("--train", type=Path, required=True, help="folder of photographs to train on")
    parser.add_argument("--tune", type=Path, required=True, help="folder of photographs for the code length")
    parser.add_argument("--out", type=Path, required=True, help="folder for networks and the configuration")
    parser.add_argument("--steps", type=int, default=3000, help="steps of each network (default %(default)s)")
    parser.add_argument("--only", nargs="+", choices=CANDIDATES, default=list(CANDIDATES), help="names of candidates")
    command.run(parser, work)


if __name__ == "__main__":
    main()
