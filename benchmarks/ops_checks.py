"""What only a GPU can tell about the kernels: each prediction beside its measurement.

python -m benchmarks.ops_checks --out DIR
"""

# Compile-time parameters take plain Python values.
# pyright: reportArgumentType=false

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from benchmarks.machine import file_label, peak_bytes, percentiles, samples
from benchmarks.ops import MIB, describe, fused_patch_nce, make_inputs
from mghf_loss._files import write_atomically
from mghf_loss.ops import nce, nce_triton, statistics, statistics_triton
from mghf_loss.ops.statistics_triton import _round_tf32


@triton.jit
def _tf32_kernel(a_ptr, b_ptr, out_ptr, SIZE: tl.constexpr, ROUND: tl.constexpr):
    rows = tl.arange(0, SIZE)[:, None]
    columns = tl.arange(0, SIZE)[None, :]
    a = tl.load(a_ptr + rows * SIZE + columns)
    b = tl.load(b_ptr + rows * SIZE + columns)
    if ROUND:
        a = _round_tf32(a)
        b = _round_tf32(b)
    tl.store(out_ptr + rows * SIZE + columns, tl.dot(a, b, input_precision="tf32"))


def run(device: torch.device) -> list[dict[str, str]]:
    """Make every check and print it; a failed one says so instead of ending the run."""
    found = []
    with torch.cuda.device(device):
        for name, prediction, check in checks(device):
            try:
                measured = check()
            except Exception as error:  # the next check still tells something
                measured = f"failed: {type(error).__name__}: {str(error).splitlines()[0]}"
            found.append({"check": name, "prediction": prediction, "measured": measured})
            print(f"{name}\n    predicted: {prediction}\n    measured:  {measured}", flush=True)
    return found


def checks(device: torch.device) -> list[tuple[str, str, Callable[[], str]]]:
    """Name, prediction (H100/H200, see the kernels' docstrings) and measurement."""
    listed: list[tuple[str, str, Callable[[], str]]] = [
        ("tf32 product, operands as they are", "biased by -7e-4: truncated", partial(tf32_bias, device, False)),
        ("tf32 product, operands rounded first", "bias below 1e-5", partial(tf32_bias, device, True)),
        ("statistics with num_stages 1, 2, 3", "equal bit for bit", partial(statistics_stages, device)),
        ("PatchNCE with num_stages 1, 2, 3", "equal bit for bit", partial(patch_nce_stages, device)),
        ("PatchNCE at N <= one tile (loops of no trip)", "error below 2e-3", partial(zero_trips, device)),
        ("loss and gradient, plain, 16 x 64 x 4096", "0.18 ms (floor 0.09)", partial(plain, device, 16, 64, 4096)),
    ]
    for channels, predicted in ((64, "0.11 ms (floor 0.07)"), (256, "0.29 ms (floor 0.17)")):
        check = partial(half_iteration, device, 16, channels, 4096)
        listed.append((f"half iteration of Sinkhorn, 16 x {channels} x 4096", predicted, check))
    for channels, places, predicted in ((189, 16384, "at most 64 MiB"), (64, 65536, "it runs at all")):
        check = partial(dense_memory, device, channels, places)
        listed.append((f"dense PatchNCE 1 x {channels} x {places}, memory over its inputs", predicted, check))
    for batch, channels, side, predicted in (
        (16, 64, 64, "14 / 16"),
        (8, 64, 256, "80 / 115"),
        (16, 256, 64, "60 / 75"),
    ):
        check = partial(statistics_times, device, batch, channels, side)
        listed.append((f"statistics {batch} x {channels} x {side}^2, forward / backward", f"{predicted} us", check))
    return listed


def tf32_bias(device: torch.device, rounded: bool) -> str:
    a, b = torch.rand(2, 64, 64, device=device) + 1
    out = torch.empty_like(a)
    _tf32_kernel[(1,)](a, b, out, SIZE=64, ROUND=rounded)
    exact = a.double() @ b.double()
    return f"bias {((out - exact) / exact).mean().item():.1e}"


def equal(results: list[tuple[Tensor, ...]]) -> str:
    differing = sum(not torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))
    return "equal bit for bit" if not differing else f"{differing} results differ"


def statistics_stages(device: torch.device) -> str:
    results = []
    sr, gt = torch.randn(2, 4, 45, 64, 64, device=device).unbind(0)
    for stages in (1, 2, 3):
        results.append(statistics_triton.statistics_triton(sr, gt, None, True, "fast", stages=stages))
    return equal(results)


def patch_nce_stages(device: torch.device) -> str:
    results = []
    sr, gt = torch.randn(2, 2, 45, 1024, device=device).unbind(0)
    arguments = (0.07, "hard", 1.0, 1.0, 5, 0.0, True, "fast")
    for stages in (1, 2, 3):
        results.append(nce_triton.patch_nce_triton(sr, gt, *arguments, stages=stages))
    return equal(results)


def zero_trips(device: torch.device) -> str:
    sr, gt = torch.randn(2, 2, 45, 100, device=device).unbind(0)
    arguments = (0.07, "hard", 1.0, 1.0, 20, 0.0, True, "fast")
    exact = nce.patch_nce_formula(sr.double(), gt.double(), *arguments)
    before, nce_triton.STORED_PLACES = nce_triton.STORED_PLACES, 0
    try:
        found = nce_triton.patch_nce_triton(sr, gt, *arguments)
    finally:
        nce_triton.STORED_PLACES = before
    errors = [((f.double() - e).norm() / e.norm()).item() for f, e in zip(found, exact, strict=True)]
    return f"loss {errors[0]:.1e}, gradient {errors[1]:.1e}"


def milliseconds(run: Callable[[], object], device: torch.device) -> float:
    return percentiles(samples(run, device, 0.05, 0.5))[1]


def inputs(device: torch.device, batch: int, channels: int, places: int) -> tuple[Tensor, Tensor]:
    case: dict[str, Any] = {"operator": "patch_nce", "batch": batch, "channels": channels, "places": places}
    return make_inputs(case | {"dtype": "float32"}, device)


@torch.no_grad()
def half_iteration(device: torch.device, batch: int, channels: int, places: int) -> str:
    sr, gt = inputs(device, batch, channels, places)
    modulated, unmodulated = (
        milliseconds(partial(fused_patch_nce, sr, gt, modulation, 0.0), device) for modulation in ("hard", "plain")
    )
    return f"{(modulated - unmodulated) / 100:.3f} ms"


def plain(device: torch.device, batch: int, channels: int, places: int) -> str:
    sr, gt = inputs(device, batch, channels, places)
    return f"{milliseconds(lambda: torch.autograd.grad(fused_patch_nce(sr, gt, 'plain', 0.0), sr), device):.3f} ms"


def dense_memory(device: torch.device, channels: int, places: int) -> str:
    sr, gt = inputs(device, 1, channels, places)
    peak = peak_bytes(lambda: torch.autograd.grad(fused_patch_nce(sr, gt, "hard", 1e-4), sr), device)
    return f"{peak / MIB:.1f} MiB"


def statistics_times(device: torch.device, batch: int, channels: int, side: int) -> str:
    """Of the kernels alone, and the share of a copy's rate that they reach."""
    sr, gt = torch.randn(2, batch, channels, side, side, device=device).unbind(0)
    gram_gradient = torch.randn(batch, channels, channels, device=device)
    moments, moment_gradient = torch.randn(2, batch, 6, channels, device=device).unbind(0)
    gradients = (moments, gram_gradient, moment_gradient)
    forward = milliseconds(lambda: statistics.operator(sr, gt, None, True, "fast"), device)
    backward = milliseconds(lambda: statistics.backward_operator(sr, gt, None, *gradients, "fast"), device)
    target = torch.empty_like(sr)
    copy = milliseconds(lambda: target.copy_(sr), device)  # reads one map, writes one
    return (
        f"{forward * 1e3:.0f} / {backward * 1e3:.0f} us, "
        f"{copy / forward:.0%} / {1.5 * copy / backward:.0%} of a copy's bandwidth"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder of the result")
    out = parser.parse_args().out
    device = torch.device("cuda")
    out.mkdir(parents=True, exist_ok=True)
    content = json.dumps(describe(device) | {"checks": run(device)}, indent=1) + "\n"
    write_atomically(out / f"ops-checks-{file_label(device)}.json", lambda path: path.write_text(content))


if __name__ == "__main__":
    main()
