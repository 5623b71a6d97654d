"""Train, bracket and judge what a configuration says; the same command goes on where it was stopped.

    python -m studies.run --config studies/main.toml --train DIR --tune DIR --judge DIR --out DIR
    python -m studies.report --config studies/main.toml --out DIR

Start the command twice, or more often, to use more cores: the processes share the work.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

from . import config
from .protocol import Folders, Study
from .store import claim


def run(study: Study) -> None:
    """Do what is ready until nothing is left; what another process does is waited for at the end only."""
    for name, reason in study.skipped.items():
        tqdm.write(f"skipped {name}: {reason}", sys.stderr)
    while jobs := list(study.ready()):
        for job in jobs:
            with claim(job.path) as mine:
                if mine:
                    start = time.perf_counter()
                    study.store.write(job.path, job.work())
                    seconds = time.perf_counter() - start
                    tqdm.write(f"{job.name}: {seconds:.0f} s; {len(jobs) - 1} or more to go", sys.stderr)
                    break
        else:
            time.sleep(1)  # all are in progress elsewhere


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True, help="what to train, see studies/README.md")
    parser.add_argument("--train", type=Path, required=True, help="folder of photographs to train on")
    parser.add_argument("--tune", type=Path, required=True, help="folder of photographs that choose the factors")
    parser.add_argument("--judge", type=Path, required=True, help="folder of photographs that judge")
    parser.add_argument("--out", type=Path, required=True, help="folder for models and results")
    parser.add_argument("--device", default="cpu", help="torch device (default %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default %(default)s)")
    parser.add_argument("--no-judge", action="store_true", help="leave the photographs that judge alone")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    folders = Folders(arguments.train, arguments.tune, arguments.judge)
    try:
        study = Study(config.read(arguments.config), folders, arguments.out, arguments.device, not arguments.no_judge)
        study.open()
        run(study)
    except (ValueError, OSError, RuntimeError) as error:
        raise SystemExit(f"studies.run: error: {' '.join(str(error).split())}") from error
    except KeyboardInterrupt:
        print("\nstudies.run: interrupted; the same command goes on", file=sys.stderr)
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
