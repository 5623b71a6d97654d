"""Cost of the operators: time, peak memory and achieved rates, against plain torch and the published formulation.

    python -m benchmarks.ops                # all shapes that the device has time for
    python -m benchmarks.ops --quick        # a few small ones
    python -m benchmarks.ops --crossover    # where storing Sinkhorn's kernel matrix stops to pay
    python -m benchmarks.ops --memory       # dense PatchNCE at 16 384 places of 189 channels

A measurement is forward and backward together, for the gradient of SR. Implementations:

- mghf-loss: the operator as it runs on the device (`mghf-loss info` says how).
- eager, compiled: plain torch code and `torch.compile` of it. Statistics: the three terms written one by one, with
  autograd. PatchNCE: the operator's torch formula, in blocks.
- published: MoNCE as its authors compute it, all logits in memory, 50 unrolled Sinkhorn iterations with gradient.

Time: median, 20th and 80th percentile over samples of as many calls as take `--sample` seconds. Peak memory: above
inputs, as in losses.py. Rates: bytes of the maps that must move (statistics: 2 read forward, 2 read and 1 written
backward) or multiply-adds that must be made (PatchNCE, one matrix product for similarities and one for the gradient;
plus one for each half iteration of Sinkhorn where the number of iterations is fixed), over the time, and as a share of
what a copy or a matrix product reached in the same run.
"""

from __future__ import annotations

import argparse
import importlib
import subprocess
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from benchmarks.machine import device_name, file_label, peak_bytes, percentiles, provenance, samples
from mghf_loss import terms
from mghf_loss._files import write_table
from mghf_loss.ops import active_path, nce, patch_nce, second_order_statistics

MIB = 2**20
Call = Callable[[Tensor, Tensor], Tensor]

# What matters most is measured first, so that a run that is cut short has it: operator, batch, channels, places.
FIRST = [
    ("statistics", 8, 64, 256**2),
    ("patch_nce", 16, 64, 4096),
    ("patch_nce", 16, 9, 256),
    ("patch_nce", 16, 189, 256),
    ("patch_nce", 1, 189, 16384),
    ("patch_nce", 1, 64, 65536),
]


def fused_statistics(sr: Tensor, gt: Tensor) -> Tensor:
    statistics = second_order_statistics(sr, gt)
    each = [term(sr, gt, statistics=statistics) for term in (terms.content, terms.style, terms.correlation)]
    return torch.stack(each).sum()


def plain_statistics(sr: Tensor, gt: Tensor) -> Tensor:
    """Content, style and correlation as one would write them."""
    x, y = sr.flatten(2).float(), gt.flatten(2).float()
    content = F.mse_loss(x, y)
    size = x.shape[1] * x.shape[2]
    style = F.mse_loss(x @ x.transpose(1, 2) / size, y @ y.transpose(1, 2) / size)
    x, y = x - x.mean(2, keepdim=True), y - y.mean(2, keepdim=True)
    r = ((x * y).mean(2) + 1e-4) * ((x.square().mean(2) + 1e-4) * (y.square().mean(2) + 1e-4)).rsqrt()
    return content + style + (1 - r).mean()


def fused_patch_nce(sr: Tensor, gt: Tensor, modulation: terms.Modulation, tolerance: float) -> Tensor:
    return patch_nce(sr, gt, modulation=modulation, tolerance=tolerance).mean()


class Formula(torch.autograd.Function):
    """The operator's torch formula, which computes its own gradient."""

    @staticmethod
    def forward(ctx, sr: Tensor, gt: Tensor, modulation: str, tolerance: float) -> Tensor:
        loss, jacobian = nce.patch_nce_formula(sr, gt, 0.07, modulation, 1.0, 1.0, 50, tolerance, True, "fast")
        ctx.save_for_backward(jacobian)
        return loss

    @staticmethod
    def backward(ctx, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (jacobian,) = ctx.saved_tensors
        return gradients[0][:, None] * jacobian, None, None, None


def plain_patch_nce(sr: Tensor, gt: Tensor, modulation: str, tolerance: float) -> Tensor:
    loss = Formula.apply(sr, gt, modulation, tolerance)
    assert isinstance(loss, Tensor)
    return loss.mean()


def published_patch_nce(sr: Tensor, gt: Tensor, modulation: str, tolerance: float) -> Tensor:
    """As the released MoNCE code: -10 on the diagonal, 50 iterations, + 1e-8, gradient through the weights."""
    query, key = F.normalize(sr.float(), dim=1).transpose(1, 2), F.normalize(gt.float(), dim=1)
    places = query.shape[1]
    similarity = query @ key
    diagonal = torch.eye(places, dtype=torch.bool, device=sr.device)
    positive = (query * key.transpose(1, 2)).sum(2, keepdim=True)
    logits = similarity / 0.07
    if modulation != "plain":
        cost = (similarity if modulation == "hard" else 1 - similarity).masked_fill(diagonal, -10.0)
        kernel = cost.exp()
        u = v = torch.ones_like(positive)
        for _ in range(50):
            u = 1 / (kernel @ v)
            v = 1 / (kernel.transpose(1, 2) @ u)
        logits = logits + ((places - 1) * u * kernel * v.transpose(1, 2) + 1e-8).log()
    logits = torch.cat([positive / 0.07, logits.masked_fill(diagonal, -10.0)], 2)
    return F.cross_entropy(logits.flatten(0, 1), torch.zeros_like(logits[..., 0].flatten(), dtype=torch.long))


def compiled(call: Call) -> Call:
    torch._dynamo.reset()
    return torch.compile(call)


def cases(quick: bool, device: torch.device) -> list[dict[str, Any]]:
    """What is measured, `FIRST` and then cheap cases first: operator, shape, dtype, modulation and tolerance."""
    on_gpu = device.type == "cuda"
    statistics = [(1, 9, 32), (1, 12, 64), (1, 45, 32), (4, 45, 64)]  # batch, channels, side
    nce = [(1, 9, 256), (4, 45, 256), (1, 12, 1024), (1, 45, 1024)]  # batch, channels, locations
    if not quick:
        statistics += [(16, 9, 48), (1, 189, 32), (2, 189, 64)]
        nce += [(16, 9, 256), (16, 189, 256), (1, 189, 1024)]
    if not quick and on_gpu:
        statistics += [(16, 64, 64), (16, 9, 256), (32, 12, 128), (16, 45, 128)]
        statistics += [(8, 64, 256), (16, 189, 64), (8, 189, 128)]
        nce += [(16, 45, 1024), (16, 12, 4096), (16, 45, 4096), (16, 64, 4096)]
        nce += [(4, 189, 4096), (1, 189, 16384), (1, 64, 65536)]
    dtypes = ["float32", "bfloat16"] if on_gpu else ["float32"]
    modulations = ("plain", "hard", "hard, 50 iterations")
    listed = [("statistics", b, c, side**2, dtype, "") for b, c, side in statistics for dtype in dtypes]
    listed += [("patch_nce", b, c, n, "float32", modulation) for b, c, n in nce for modulation in modulations]
    names = ("operator", "batch", "channels", "places", "dtype", "modulation")
    found: list[dict[str, Any]] = [dict(zip(names, each, strict=True)) for each in listed]

    def rank(case: dict[str, Any]) -> int:
        shape = (case["operator"], case["batch"], case["channels"], case["places"])
        return FIRST.index(shape) if shape in FIRST else len(FIRST)

    return sorted(found, key=rank)


def patch_nce_options(case: dict[str, Any]) -> dict[str, Any]:
    modulation = case["modulation"].split(",")[0]
    return {"modulation": modulation, "tolerance": 0.0 if "50" in case["modulation"] else 1e-4}


def compiled_implementations(case: dict[str, Any], device: torch.device) -> dict[str, Call]:
    if case["operator"] == "statistics":
        return {"compiled": compiled(plain_statistics)}
    if device.type == "cuda" and case["places"] <= 256:  # 50 unrolled iterations compile for long
        return {"compiled": compiled(partial(plain_patch_nce, **patch_nce_options(case)))}
    return {}


def implementations(case: dict[str, Any], device: torch.device) -> dict[str, Call]:
    if case["operator"] == "statistics":
        return {"mghf-loss": fused_statistics, "eager": plain_statistics}
    options = patch_nce_options(case)
    calls: dict[str, Call] = {"mghf-loss": partial(fused_patch_nce, **options)}
    pairs = case["batch"] * case["places"] ** 2
    memory = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 4 * 2**30
    if device.type == "cuda" and pairs <= 2**30:  # on a CPU the operator is this formula
        calls["eager"] = partial(plain_patch_nce, **options)
    if options["tolerance"] and pairs * 4 * 12 < memory:  # it keeps about 12 matrices of all pairs
        calls["published"] = partial(published_patch_nce, **options)
    return calls


def make_inputs(case: dict[str, Any], device: torch.device) -> tuple[Tensor, Tensor]:
    side = round(case["places"] ** 0.5)
    shape = (side, side) if case["operator"] == "statistics" else (case["places"],)
    gt = torch.randn(case["batch"], case["channels"], *shape, device=device)
    sr = gt + 0.5 * torch.randn_like(gt)
    dtype = getattr(torch, case["dtype"])
    return sr.to(dtype).requires_grad_(), gt.to(dtype)


def ceilings(device: torch.device) -> dict[str, float]:
    """Measured GB/s of a copy, read and written, and TFLOP/s of the matrix products that the kernels use."""
    on_gpu = device.type == "cuda"
    source = torch.empty((2**28 if on_gpu else 2**24,), device=device)
    target = torch.empty_like(source)
    copy = percentiles(samples(lambda: target.copy_(source), device, 0.05, 0.5))[1]
    found = {"copy_gb_s": 2 * source.numel() * 4 / copy / 1e6}
    size = 8192 if on_gpu else 768
    single, half = torch.float32, torch.float16
    for name, dtype, tf32 in (("fp32", single, False), ("tf32", single, True), ("fp16", half, False)):
        if name != "fp32" and not on_gpu:
            continue
        a = torch.randn(size, size, device=device).to(dtype)
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("high" if tf32 else "highest")
        elapsed = percentiles(samples(lambda a=a: a @ a, device, 0.05, 0.5))[1]
        torch.set_float32_matmul_precision(before)
        found[f"{name}_tflop_s"] = 2 * size**3 / elapsed / 1e9
    return found


def rates(case: dict[str, Any], median: float, ceiling: dict[str, float]) -> dict[str, str]:
    elements = case["batch"] * case["channels"] * case["places"]
    if case["operator"] == "statistics":
        achieved = 5 * elements * (2 if case["dtype"] == "bfloat16" else 4) / median / 1e6
        return {"rate": f"{achieved:.1f} GB/s", "share_of_ceiling": f"{achieved / ceiling['copy_gb_s']:.3f}"}
    if case["modulation"] == "plain":
        products = 2
    elif case["modulation"] == "hard" or case["places"] <= 512 or "fp16_tflop_s" not in ceiling:
        return {"rate": "", "share_of_ceiling": ""}  # an unknown number of iterations, or of a stored matrix
    else:
        products = 2 + 2 * 50
    achieved = 2 * elements * case["places"] * products / median / 1e9
    peak = ceiling.get("fp16_tflop_s", ceiling["fp32_tflop_s"])
    return {"rate": f"{achieved:.3f} TFLOP/s", "share_of_ceiling": f"{achieved / peak:.3f}"}


def measure(arguments: argparse.Namespace, device: torch.device, path: Path) -> list[dict[str, Any]]:
    """Measure all cases, writing the table after each."""
    ceiling = ceilings(device)
    print("ceilings:", ", ".join(f"{name} {value:.3g}" for name, value in ceiling.items()))
    environment = describe(device) | {name: f"{value:.4g}" for name, value in ceiling.items()}
    rows: list[dict[str, Any]] = []
    start = time.perf_counter()
    listed = cases(arguments.quick, device)
    rounds = [(case, implementations) for case in listed]
    if not arguments.no_compile:  # last: compiling takes longer than measuring
        rounds += [(case, compiled_implementations) for case in listed]
    for case, calls in tqdm(rounds, desc="measure", unit="case"):
        if time.perf_counter() - start > arguments.limit:
            tqdm.write(f"stopped after {arguments.limit} s")
            break
        sr, gt = make_inputs(case, device)
        for name, call in calls(case, device).items():

            def run(call: Call = call, sr: Tensor = sr, gt: Tensor = gt) -> None:
                torch.autograd.grad(call(sr, gt), sr)

            try:
                p20, median, p80 = percentiles(samples(run, device, arguments.sample, arguments.budget))
                peak = peak_bytes(run, device)
            except Exception as error:  # a peer may run out of memory, or not compile
                if name == "mghf-loss":
                    raise
                tqdm.write(f"skipped {name} of {case}: {type(error).__name__}: {str(error).splitlines()[0]}")
                continue
            times = {"median_ms": f"{median:.4f}", "p20_ms": f"{p20:.4f}", "p80_ms": f"{p80:.4f}"}
            row = {**case, "implementation": name, **times, "peak_mib": f"{peak / MIB:.2f}"}
            rows.append(row | rates(case, median, ceiling) | environment)
            write_table(path, rows)
    return rows


def describe(device: torch.device) -> dict[str, str]:
    """Provenance, with the driver and Triton."""
    try:
        triton = importlib.import_module("triton").__version__
    except ModuleNotFoundError:
        triton = ""
    driver = ""
    if device.type == "cuda":
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", f"--id={device.index or 0}"]
        try:
            driver = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
        except (OSError, subprocess.CalledProcessError):
            driver = "unknown"
    return {**provenance(device), "driver": driver, "triton": triton}


def crossover(device: torch.device) -> None:
    """Time of PatchNCE with a stored kernel matrix and with a recomputed one, 50 iterations."""
    on_gpu = device.type == "cuda"
    module: Any = importlib.import_module("mghf_loss.ops.nce_triton") if on_gpu else nce
    constant = "STORED_PLACES" if on_gpu else "BLOCK"
    before = getattr(module, constant)
    print(f"{'batch':>6}{'channels':>9}{'places':>7}{'stored, ms':>12}{'recomputed, ms':>16}")
    for batch, channels, places in [
        (b, c, n)
        for b in ((1, 16) if on_gpu else (1,))
        for c in ((9, 45, 189) if on_gpu else (9, 189))
        for n in ((128, 256, 512, 1024) if on_gpu else (512, 1024, 2048))
    ]:
        case = {"operator": "patch_nce", "batch": batch, "channels": channels, "places": places, "dtype": "float32"}
        sr, gt = make_inputs(case, device)
        found = []
        # The torch formula stores the matrix where it fits in one block.
        for value in (1024, 0) if on_gpu else (batch * places**2, batch * places**2 // 2):
            setattr(module, constant, value)
            with torch.no_grad():
                run = partial(fused_patch_nce, sr, gt, "hard", 0.0)
                found.append(percentiles(samples(run, device, 0.02, 0.5))[1])
        print(f"{batch:>6}{channels:>9}{places:>7}{found[0]:>12.3f}{found[1]:>16.3f}", flush=True)
    setattr(module, constant, before)


def memory(device: torch.device, path: Path) -> None:
    """Peak memory of dense PatchNCE at 16 384 places of 189 channels, and what the published formulation needs."""
    case = {"operator": "patch_nce", "batch": 1, "channels": 189, "places": 16384, "dtype": "float32"}
    sr, gt = make_inputs(case, device)
    matrix = 16384**2 * 4 / MIB

    def run() -> None:
        torch.autograd.grad(fused_patch_nce(sr, gt, "hard", 1e-4), sr)

    def published(sr: Tensor, gt: Tensor) -> None:
        torch.autograd.grad(published_patch_nce(sr, gt, "hard", 0.0), sr)

    rows = [{"implementation": "mghf-loss", "peak_mib": f"{peak_bytes(run, device) / MIB:.0f}", "how": "measured"}]
    # What the published formulation keeps is counted where it fits.
    fits = partial(published, *make_inputs({**case, "places": 1024}, device))
    matrices = peak_bytes(fits, device) / (1024**2 * 4)
    how = f"extrapolated: {matrices:.1f} N x N matrices, counted at N = 1024"
    rows.append({"implementation": "published", "peak_mib": f"{matrices * matrix:.0f}", "how": how})
    write_table(path, [row | describe(device) for row in rows])
    for row in rows:
        print(f"{row['implementation']}: {row['peak_mib']} MiB ({row['how']})")


def main() -> None:
    parser = argparse.ArgumentParser(description="Time, memory and rates of the operators, forward and backward.")
    cuda = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=cuda, help="torch device (default cuda, where there is none cpu)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default %(default)s)")
    parser.add_argument("--quick", action="store_true", help="a few small shapes")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--sample", type=float, default=0.02, help="seconds of a sample (default %(default)s)")
    parser.add_argument("--budget", type=float, default=0.5, help="seconds of a measurement (default %(default)s)")
    parser.add_argument("--limit", type=float, default=1e9, help="start no case after this many seconds")
    parser.add_argument("--crossover", action="store_true", help="stored against recomputed kernel matrix")
    parser.add_argument("--memory", action="store_true", help="peak memory of dense PatchNCE at 16 384 places")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder of the table")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    device = torch.device(arguments.device)
    arguments.out.mkdir(parents=True, exist_ok=True)
    slug = file_label(device)
    print(f"{device_name(device)}: {active_path()}")
    if arguments.crossover:
        crossover(device)
    elif arguments.memory:
        memory(device, arguments.out / f"ops-memory-{slug}.csv")
    else:
        path = arguments.out / f"ops-{slug}.csv"
        measure(arguments, device, path)
        print(f"wrote {path}")


if __name__ == "__main__":
    main()
