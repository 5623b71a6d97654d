"""Train, bracket and judge what a configuration says; the same command goes on where it was stopped.

    python -m studies.run --config studies/main.toml --train DIR --tune DIR --judge DIR --out DIR
    python -m studies.report --config studies/main.toml --out DIR

Start the command twice, or more often, to use more cores: the processes share the work.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from pathlib import Path

import torch
from tqdm import tqdm

from benchmarks.machine import provenance

from . import command, config
from .protocol import Folders, Study
from .store import claim, write_json


def run(study: Study) -> None:
    """Do what is ready until nothing is left; what another process does is waited for at the end only."""
    for name, reason in study.skipped.items():
        tqdm.write(f"skipped {name}: {reason}", sys.stderr)
    while jobs := list(study.ready()):
        for job in jobs:
            with claim(job.path) as mine:
                if mine:
                    start = time.perf_counter()
                    write_json(job.path, {**job.work(), **provenance(study.device)})
                    seconds = time.perf_counter() - start
                    tqdm.write(f"{job.name}: {seconds:.0f} s; {len(jobs) - 1} or more to go", sys.stderr)
                    break
        else:
            time.sleep(1)  # all are in progress elsewhere


def work(arguments: argparse.Namespace) -> None:
    torch.set_num_threads(arguments.threads)
    warnings.filterwarnings("ignore", module="torchvision")  # of the peers' old calls
    folders = Folders(arguments.train, arguments.tune, arguments.judge)
    study = Study(config.read(arguments.config), folders, arguments.out, arguments.device, not arguments.no_judge)
    study.open()
    run(study)


def main() -> None:
    parser = command.parser("studies.run", __doc__)
    parser.add_argument("--config", type=Path, required=True, help="what to train, see studies/README.md")
    parser.add_argument("--train", type=Path, required=True, help="folder of photographs to train on")
    parser.add_argument("--tune", type=Path, required=True, help="folder of photographs that choose the factors")
    parser.add_argument("--judge", type=Path, required=True, help="folder of photographs that judge")
    parser.add_argument("--out", type=Path, required=True, help="folder for models and results")
    parser.add_argument("--no-judge", action="store_true", help="leave the photographs that judge alone")
    command.run(parser, work)


if __name__ == "__main__":
    main()
