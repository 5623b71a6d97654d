"""Judge the images of any model, SinSR's or OSEDiff's for instance: `python -m studies.judge SR_DIR GT_DIR`.

Files belong together whose paths below the two folders are equal; the suffix does not count.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from benchmarks.machine import provenance
from mghf_loss._files import check_output, read_image, write_table
from mghf_loss.training.data import list_images

from . import command, photographs, tables
from .metrics import Judge, mean


def by_name(folder: Path) -> dict[str, Path]:
    """The images below `folder` by their paths without suffix."""
    paths = list_images(folder)
    names = [path.relative_to(folder).with_suffix("").as_posix() for path in paths]
    twice = sorted({each for each in names if names.count(each) > 1})
    if twice:
        raise ValueError(f"{folder} holds images that differ in their suffix only: {twice[:5]}")
    return dict(zip(names, paths, strict=True))


def judge_folders(sr_folder: Path, gt_folder: Path, device: str = "cpu") -> dict[str, float]:
    """Every metric that can be had, over all pairs."""
    srs, gts = by_name(sr_folder), by_name(gt_folder)
    if set(gts) != set(srs):
        only_one = sorted(set(gts) ^ set(srs))
        raise ValueError(f"{sr_folder} and {gt_folder} must hold images of the same names, only one has {only_one[:5]}")
    photographs.check(gt_folder, photographs.LEAST_SIDE)
    judge = Judge([read_image(path).to(device) for path in gts.values()])
    return {name: mean(values) for name, values in judge([read_image(srs[name]).to(device) for name in gts]).items()}


def work(arguments: argparse.Namespace) -> None:
    torch.set_num_threads(arguments.threads)
    if arguments.csv is not None:
        check_output(arguments.csv, {".csv"})
    scores = judge_folders(arguments.sr, arguments.gt, arguments.device)
    if arguments.csv is not None:
        write_table(arguments.csv, [{"sr": arguments.sr, **scores, **provenance(arguments.device)}])
    print(tables.markdown([{"metric": tables.heading(name), "value": f"{each:.4g}"} for name, each in scores.items()]))


def main() -> None:
    parser = command.parser("studies.judge", __doc__)
    parser.add_argument("sr", type=Path, help="folder of super-resolved images")
    parser.add_argument("gt", type=Path, help="folder of originals with the same names")
    parser.add_argument("--csv", type=Path, help="file for the row")
    command.run(parser, work)


if __name__ == "__main__":
    main()
