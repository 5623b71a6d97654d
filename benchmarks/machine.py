"""What every result is stored with, and how memory is measured."""

from __future__ import annotations

import functools
import json
import platform
import re
import subprocess
import tempfile
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

import mghf_loss


def device_name(device: str | torch.device) -> str:
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    information = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", information.read_text()) if information.exists() else None
    return found[1].strip() if found else platform.processor() or platform.machine()


def file_label(device: str | torch.device) -> str:
    """The device as part of a file's name."""
    device = torch.device(device)
    return re.sub(r"[^a-z0-9]+", "-", device_name(device).lower()).strip("-") if device.type == "cuda" else device.type


@functools.cache
def commit() -> str:
    """The state of this repository, or nothing outside of one."""
    command = ["git", "describe", "--always", "--dirty"]
    found = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    return found.stdout.strip()


def provenance(device: str | torch.device) -> dict[str, str]:
    """Device, versions, commit and date of a result."""
    device = torch.device(device)
    return {
        "device": device_name(device),
        "threads": "" if device.type == "cuda" else str(torch.get_num_threads()),
        "torch": torch.__version__,
        "mghf_loss": mghf_loss.__version__,
        "commit": commit(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_bytes(run: Callable[[], object], device: torch.device) -> int:
    """Most bytes allocated on `device` during `run`, above those before."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder, "trace.json")
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    memory = sorted((event for event in events if event["name"] == "[memory]"), key=lambda event: event["ts"])
    before = memory[0]["args"]["Total Allocated"] - memory[0]["args"]["Bytes"]
    return max(event["args"]["Total Allocated"] for event in memory) - before


def samples(run: Callable[[], object], device: torch.device, sample: float, budget: float) -> list[float]:
    """Milliseconds of a call, of several samples of `sample` seconds within `budget` seconds."""

    def seconds(calls: int) -> float:
        synchronize(device)
        start = time.perf_counter()
        for _ in range(calls):
            run()
        synchronize(device)
        return time.perf_counter() - start

    run()
    calls = max(1, round(sample / max(seconds(1), 1e-7)))
    found: list[float] = []
    start = time.perf_counter()
    while len(found) < 5 or (len(found) < 50 and time.perf_counter() - start < budget):
        found.append(seconds(calls) / calls * 1e3)
        if time.perf_counter() - start > 4 * budget:
            break
    return found


def percentiles(values: list[float]) -> list[float]:
    """20th, 50th and 80th."""
    levels = torch.tensor([0.2, 0.5, 0.8], dtype=torch.double)
    return torch.tensor(values, dtype=torch.double).quantile(levels).tolist()
