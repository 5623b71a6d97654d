"""What `memory="low"` saves and costs: the losses with and without, on one pair of images.

    python benchmarks/memory.py --size 128 --threads 1

Saved, peak and time are those of `losses.py`, forward and backward together; a loss and its twin have the same network
and run in turn. `gradient_error` is |g_low - g_normal| / |g_normal| over the gradient to SR.
"""

from __future__ import annotations

import argparse
from datetime import datetime, timezone
from functools import partial
from importlib.metadata import version
from pathlib import Path

import torch
from losses import MIB, OURS, Candidate, Entry, build_all, device_name, dino, measure_times
from torch import Tensor

from mghf_loss import DinoJSDLoss, MGHFLoss, MGHFnLoss
from mghf_loss.memory import Memory
from mghf_loss.tables import format_table, write_table

MEMORY: tuple[Memory, ...] = ("normal", "low")


def dino_twin(memory: Memory) -> DinoJSDLoss:
    torch.manual_seed(0)  # one network
    criterion = dino()
    assert isinstance(criterion, DinoJSDLoss)
    return DinoJSDLoss(criterion.network.network, memory=memory)


def entries() -> dict[str, Entry]:
    losses = {"MGHFnLoss": MGHFnLoss, "MGHFLoss": MGHFLoss, "DinoJSDLoss": dino_twin}
    return {
        f"{name} {memory}": Entry(OURS, partial(build, memory=memory))
        for name, build in losses.items()
        for memory in MEMORY
    }


def gradient(candidate: Candidate) -> Tensor:
    torch.manual_seed(0)  # the same places
    return torch.autograd.grad(candidate.forward(), candidate.sr)[0].double()


def main() -> None:
    parser = argparse.ArgumentParser(description='Time and memory of memory="low", forward and backward.')
    parser.add_argument("--size", type=int, default=128, help="height and width (default %(default)s)")
    parser.add_argument("--batch", type=int, default=1, help="images in a batch (default %(default)s)")
    parser.add_argument("--device", default="cpu", help="torch device (default %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=30, help="rounds that count (default %(default)s)")
    parser.add_argument("--csv", type=Path, help="file to replace (default benchmarks/results/memory-low-<device>.csv)")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    device = torch.device(arguments.device)
    gt = torch.rand(arguments.batch, 3, arguments.size, arguments.size, device=device)
    sr = (gt + 0.1 * torch.randn_like(gt)).clamp(0, 1).requires_grad_()
    candidates = {candidate.name: candidate for candidate in build_all(entries(), sr, gt)}
    times = measure_times(list(candidates.values()), arguments.rounds, warmup=3)
    date = datetime.now(timezone.utc).isoformat(timespec="seconds")
    rows = []
    for name, candidate in candidates.items():
        twin = candidates[f"{name.rsplit(maxsplit=1)[0]} normal"]
        expected = gradient(twin)
        rows.append(
            {
                "loss": name.rsplit(maxsplit=1)[0],
                "memory": name.rsplit(maxsplit=1)[1],
                "median_ms": f"{times[name][1]:.3f}",
                "time_ratio": f"{times[name][1] / times[twin.name][1]:.3f}",
                "saved_mib": f"{candidate.saved_bytes() / MIB:.3f}",
                "saved_ratio": f"{candidate.saved_bytes() / twin.saved_bytes():.3f}",
                "peak_mib": f"{candidate.peak_bytes() / MIB:.3f}",
                "peak_ratio": f"{candidate.peak_bytes() / twin.peak_bytes():.3f}",
                "gradient_error": f"{((gradient(candidate) - expected).norm() / expected.norm()).item():.2g}",
                "batch": arguments.batch,
                "size": arguments.size,
                "device": device_name(device),
                "threads": arguments.threads,
                "rounds": arguments.rounds,
                "torch": torch.__version__,
                "mghf_loss": version(OURS),
                "date": date,
            }
        )
    path = arguments.csv or Path(__file__).parent / "results" / f"memory-low-{device.type}.csv"
    write_table(path, rows)
    print(format_table([dict(list(row.items())[:9]) for row in rows]))


if __name__ == "__main__":
    main()
