"""What comparisons that train many models have in common: photographs in memory, a pool of runs, results on disk.

A run writes its result whole or not at all, and what is finished is not run again: a kill loses the runs in progress.
"""

from __future__ import annotations

import json
import os
import signal
import statistics
import threading
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from datetime import datetime, timezone
from functools import cache
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Any

import torch
from losses import device_name
from torch import Tensor
from tqdm import tqdm

import mghf_loss
from mghf_loss._files import read_pixels, write_atomically
from mghf_loss.training.data import list_images


def slug(name: str) -> str:
    """`name` as part of a file's name."""
    return "".join(letter if letter.isalnum() or letter in ".-" else "-" for letter in name)


def write_json(path: Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda temporary: temporary.write_text(json.dumps(content, indent=2) + "\n", "utf-8"))


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def provenance(device: str) -> dict[str, str]:
    """What every result is stored with."""
    return {
        "device": device_name(torch.device(device)),
        "torch": torch.__version__,
        "mghf_loss": mghf_loss.__version__,
        "date": datetime.now(timezone.utc).date().isoformat(),
    }


@cache  # once in a worker; as bytes, because all of them as floats would not fit
def photographs(folder: Path, least: int = 64) -> list[Tensor]:
    """The images below `folder`, (3, H, W), uint8, cut to multiples of 4; raises where one is smaller than `least`."""
    images = []
    for path in list_images(folder):
        image = read_pixels(path)
        if min(image.shape[-2:]) < least:
            raise ValueError(f"{path} is smaller than {least} x {least}: {tuple(image.shape)}")
        images.append(image)
    return [image[:, : image.shape[-2] // 4 * 4, : image.shape[-1] // 4 * 4] for image in images]


def unit_range(pixels: Tensor, device: str) -> Tensor:
    """(3, H, W) or (B, 3, H, W), uint8, to (B, 3, H, W) in [0, 1]."""
    return pixels.reshape(-1, *pixels.shape[-3:]).to(device).float() / 255


def random_crops(images: list[Tensor], count: int, size: int, generator: torch.Generator) -> Tensor:
    """Draw (count, 3, size, size), uint8: a photograph, then a place in it."""
    crops = []
    for _ in range(count):
        image = images[int(torch.randint(len(images), (), generator=generator))]
        top, left = (int(torch.randint(side - size + 1, (), generator=generator)) for side in image.shape[-2:])
        crops.append(image[:, top : top + size, left : left + size])
    return torch.stack(crops)


def step_generator(seed: int, step: int) -> torch.Generator:
    """Of one training step: what it draws depends on seed and step alone, whatever is compared."""
    return torch.Generator().manual_seed(1_000_003 * (seed + 1) + step)


def spread(values: list[float]) -> tuple[float, float]:
    """Mean and half the range."""
    return statistics.mean(values), (max(values) - min(values)) / 2


_line = 1  # of this worker's progress bar


def start_worker(lines: Any, bars: Any) -> None:
    """One thread a worker, which ends with its parent, even a killed one; a line of `lines` for its progress bar."""
    global _line
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's, which ends its workers
    torch.set_num_threads(1)
    tqdm.set_lock(bars)
    _line = lines.get()
    parent = parent_process()
    assert parent is not None

    def leave_with_parent() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=leave_with_parent, daemon=True).start()


def steps_bar(steps: int, title: str) -> tqdm[int]:
    """Progress of one run, on a line of its own below that of all runs; nothing where there is no terminal."""
    return tqdm(range(steps), desc=title, unit="step", position=_line, leave=False, disable=None)


def run_all(jobs: dict[str, Callable[[], None]], workers: int, title: str) -> None:
    """Run the jobs in processes of their own; the first failure ends what has not begun, and is raised."""
    if not jobs:
        return
    context = get_context("spawn")
    lines = context.Queue()
    for line in range(1, workers + 1):
        lines.put(line)
    with ProcessPoolExecutor(workers, context, start_worker, (lines, context.RLock())) as pool:
        futures = {pool.submit(job): label for label, job in jobs.items()}
        try:
            for future in tqdm(as_completed(futures), total=len(futures), desc=title, unit="run"):
                try:
                    future.result()
                except Exception as error:
                    raise RuntimeError(f"{futures[future]} failed: {error}") from error
        except BaseException:
            workers_now = list((pool._processes or {}).values())
            pool.shutdown(wait=False, cancel_futures=True)
            for worker in workers_now:  # results are whole or not there: nothing is lost but the runs in progress
                worker.terminate()
            raise
