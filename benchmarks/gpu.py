"""What a CUDA GPU shows, in one command: python -m benchmarks.gpu OUT

Needs torch with Triton, and FrEIA, safetensors and huggingface_hub, installed or as folders on PYTHONPATH; the package
itself is taken from `src`. Ends within eight minutes, and keeps what it has when it is stopped: each part is a process
of its own with a limit, writes into OUT as it goes, and OUT is packed into OUT.tar.gz after each.

    python -m benchmarks.gpu OUT                 # all parts
    python -m benchmarks.gpu OUT --part losses   # one of them
    python -m benchmarks.gpu OUT --dry-run       # on the CPU: kernels interpreted, sizes tiny; figures mean nothing

Parts, the most telling first:

- machine: device, driver, clocks, versions, rates of a copy and of matrix products, host time of a launch.
- losses: wall time, time of a CUDA graph, GPU-busy time, kernels and peak memory of our losses and of lpips.
- operators: time in a CUDA graph against the rate of a copy, of the operators' forward and backward passes.
- profile: the kernels of one call of a loss, longest first.
- tf32: features of the network and the setting of cuDNN, which must not change them.
- checks: predictions beside measurements (ops_checks.py).
- tests: tests/test_cuda.py.
- crossover: where Sinkhorn's logits are stored and where recomputed (ops.py).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
SECONDS = 460  # of all parts; the rest of eight minutes is for starting and packing
LIMITS = {
    "machine": 40,
    "losses": 110,
    "operators": 80,
    "profile": 40,
    "tf32": 30,
    "checks": 60,
    "tests": 150,
    "crossover": 50,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder of the results")
    parser.add_argument("--part", choices=LIMITS, help="one part alone")
    parser.add_argument("--dry-run", action="store_true", help="on the CPU, in Triton's interpreter, with tiny sizes")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    if arguments.child:
        run_part(arguments.part, arguments.out, arguments.dry_run)
        return
    reason = None if arguments.dry_run else why_not()
    if reason is not None:
        raise SystemExit(f"benchmarks.gpu: nothing to measure: {reason}")
    failed = run_all([arguments.part] if arguments.part else list(LIMITS), arguments.out, arguments.dry_run)
    raise SystemExit(1 if failed else 0)


def why_not() -> str | None:
    import torch

    if not torch.cuda.is_available():
        return "no CUDA device (torch.cuda.is_available() is false)"
    if os.environ.get("MGHF_LOSS_OPS") == "torch":
        return "MGHF_LOSS_OPS=torch switches the kernels off"
    return None


def run_all(parts: list[str], out: Path, dry_run: bool) -> list[str]:
    """Run each part within its limit and what is left of all; return those that failed."""
    environment = dict(os.environ)
    paths = [str(ROOT / "src"), str(ROOT), environment.get("PYTHONPATH", "")]
    environment |= {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "TRITON_DEFAULT_FP_FUSION": "1"}
    if dry_run:
        environment |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    start, failed, status = time.monotonic(), [], []
    for part in parts:
        left = SECONDS - (time.monotonic() - start)
        limit = max(1.0, min(LIMITS[part], left)) if not dry_run else 900.0
        command = [sys.executable, "-m", "benchmarks.gpu", str(out), "--child", "--part", part]
        began = time.monotonic()
        print(f"== {part} (at most {limit:.0f} s)", flush=True)
        with (out / f"{part}.txt").open("w") as log:
            process = subprocess.Popen(
                command + ["--dry-run"] * dry_run, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT
            )
            code, ended = 1, "stopped"
            try:
                code = process.wait(limit)
                ended = f"exit {code}"
            except BaseException as error:  # the time is over, or the user ends it: the part's process must not stay
                process.kill()
                process.wait()
                if not isinstance(error, subprocess.TimeoutExpired):
                    raise
                ended = "out of time"
            finally:
                status.append(f"{part}: {ended} after {time.monotonic() - began:.0f} s")
                (out / "status.txt").write_text("\n".join(status) + "\n")
                pack(out)
        print("\n".join((out / f"{part}.txt").read_text(errors="replace").splitlines()[-25:]), flush=True)
        print(status[-1], flush=True)
        if code:
            failed.append(part)
    return failed


def pack(out: Path) -> None:
    """One archive of the folder, whole or not at all."""
    archive = out.with_name(f"{out.name}.tar.gz")
    partial_archive = archive.with_suffix(".partial")
    with tarfile.open(partial_archive, "w:gz") as tar:
        tar.add(out, out.name)
    partial_archive.replace(archive)


def run_part(part: str, out: Path, dry_run: bool) -> None:
    import torch

    device = torch.device("cpu" if dry_run else "cuda")
    if dry_run:
        interpret()
    torch.manual_seed(0)
    results = Results(out / f"{part}.json", device)
    PARTS[part](results, device, dry_run)


INTERPRETED: list[Any] = []  # a library that is deleted takes its kernels along


def interpret() -> None:
    """Let CPU tensors take the kernels, which the interpreter runs."""
    import torch

    from mghf_loss import coupling
    from mghf_loss.ops import cuda, linear

    library = torch.library.Library("mghf_loss", "IMPL")
    cuda.reason_against_kernels = lambda device: None
    coupling.uses_operators = linear.uses_operators = lambda x: x.dtype == torch.float32
    for name, _, formula in cuda.OPERATORS:
        library.impl(name, cuda.with_fallback(name, name, formula), "CPU")
    INTERPRETED.append(library)


class Results:
    """Results by name, written after each."""

    def __init__(self, path: Path, device: Any) -> None:
        from benchmarks.ops import describe

        self.path = path
        self.found: dict[str, Any] = {"environment": describe(device)}

    def add(self, name: str, measure: Callable[[], Any]) -> None:
        """Measure, print, keep; a failure is a result too."""
        try:
            value = measure()
        except Exception as error:  # the next one still tells something
            value = f"FAILED {type(error).__name__}: {str(error)[:300]}"
        self.found[name] = value
        print(f"{name}: {json.dumps(value, indent=1, default=str)}", flush=True)
        self.path.write_text(json.dumps(self.found, indent=1, default=str) + "\n")


def wall_ms(run: Callable[[], object], device: Any) -> float:
    """Median time of a call, as a user sees it; one call in a dry run."""
    from benchmarks.machine import percentiles, samples

    if device.type == "cuda":
        return percentiles(samples(run, device, 0.02, 0.5))[1]
    start = time.perf_counter()
    run()
    return (time.perf_counter() - start) * 1e3


def graph_ms(run: Callable[[], object], device: Any, calls: int = 5) -> float | None:
    """Median time of a call inside a CUDA graph: without the host."""
    import torch

    if device.type != "cuda":
        run()
        return None
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            run()
    graph.replay()
    times = []
    for _ in range(7):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / calls)
    return sorted(times)[3]


def kernels_of(run: Callable[[], object], device: Any) -> list[tuple[str, float]]:
    """Name and microseconds of each kernel of a call; on a CPU of each operator."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    run()
    on_gpu = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * on_gpu]) as profiler:
        run()
        if on_gpu:
            torch.cuda.synchronize()
    events = profiler.events() or []
    if on_gpu:
        return [(e.name, e.self_device_time_total) for e in events if e.device_type.name == "CUDA"]
    return [(e.name, e.self_cpu_time_total) for e in events]


def images(device: Any, dry_run: bool) -> tuple[Any, Any]:
    import torch

    batch, size = (1, 8) if dry_run else (16, 256)
    gt = torch.rand(batch, 3, size, size, device=device)
    return (gt + 0.1 * torch.randn_like(gt)).clamp(0, 1).requires_grad_(), gt


def machine(results: Results, device: Any, dry_run: bool) -> None:
    import torch

    from benchmarks.ops import ceilings
    from mghf_loss.ops import active_path

    results.add("path", active_path)
    query = "name,driver_version,clocks.sm,clocks.mem,temperature.gpu,power.limit"
    command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"]
    if not dry_run:
        results.add("nvidia-smi", lambda: subprocess.run(command, capture_output=True, text=True).stdout.strip())
        results.add("ceilings", partial(ceilings, device))

    def host() -> float:
        x = torch.zeros(8, device=device)
        start = time.perf_counter()
        for _ in range(2000):
            x.add_(1)
        return round((time.perf_counter() - start) / 2000 * 1e6, 2)

    results.add("host us per in-place add", host)


def losses(results: Results, device: Any, dry_run: bool) -> None:
    """Of benchmarks.losses' candidates, without its extras where they are not installed."""
    from benchmarks.losses import MIB, Candidate, entries
    from benchmarks.machine import peak_bytes

    sr, gt = images(device, dry_run)
    known = entries("bundled")
    names = ["MGHFLoss", "MGHFnLoss", "MGHFLoss paper", "MGHFLoss sharp", "lpips alex", "lpips vgg"]
    if dry_run:
        names = names[:1]

    def measure(name: str) -> dict[str, Any]:
        entry = known[name]
        loss = entry.build().to(device).requires_grad_(False)
        run = Candidate(name, entry, loss, sr, gt).forward_backward
        kernels = kernels_of(run, device)
        return {
            "wall ms": wall_ms(run, device),
            "CUDA graph ms": graph_ms(run, device, 1),
            "GPU-busy ms": sum(duration for _, duration in kernels) / 1e3,
            "kernels": len(kernels),
            "peak MiB": peak_bytes(run, device) / MIB,
        }

    for name in names:
        if name in known and find_spec(known[name].package.replace("-", "_")) is not None:
            results.add(name, partial(measure, name))


def operators(results: Results, device: Any, dry_run: bool) -> None:
    """Against a copy of the same bytes in the same run."""
    import torch

    from benchmarks.ops import make_inputs
    from mghf_loss import HighFrequencyINN
    from mghf_loss.ops import couplings, linear, patch_nce, statistics

    def of_copy(run: Callable[[], object], floats: int) -> dict[str, Any]:
        """Time, and the share of a copy's rate at which the given floats move."""
        source = torch.empty(max(1, floats // 2), device=device)
        target = torch.empty_like(source)
        copy, measured = graph_ms(lambda: target.copy_(source), device), graph_ms(run, device)
        if copy is None or measured is None:
            return {}
        return {"us": measured * 1e3, "share of copy": copy / measured}

    shapes = [(8, 64, 256), (16, 9, 128), (16, 45, 128), (16, 256, 64), (16, 189, 64)]
    for batch, channels, side in [(1, 9, 4)] if dry_run else shapes:
        sr, gt = torch.randn(2, batch, channels, side, side, device=device).unbind(0)
        gram_gradient = torch.randn(batch, channels, channels, device=device)
        moments, moment_gradient = torch.randn(2, batch, 6, channels, device=device).unbind(0)
        gradients = (moments, gram_gradient, moment_gradient)
        forward = partial(statistics.operator, sr, gt, None, True, "fast")
        backward = partial(statistics.backward_operator, sr, gt, None, *gradients, "fast")
        name = f"statistics {batch} x {channels} x {side}^2"
        results.add(f"{name}, forward", partial(of_copy, forward, 2 * sr.numel()))
        results.add(f"{name}, backward", partial(of_copy, backward, 3 * sr.numel()))
    network = HighFrequencyINN.from_pretrained().to(device).requires_grad_(False)
    batch, side = (1, 4) if dry_run else (16, 128)
    x, low = torch.randn(batch, 9, side, side, device=device), torch.rand(batch, 3, side, side, device=device)
    pairs = network.levels[0]._pairs()  # type: ignore[operator]
    mixing, affine = pairs[0]
    blocks = [list(block.parameters()) for block in (affine.phi, affine.rho_eta)]
    for precision in ("high", "fast"):
        run = partial(couplings.coupling, x, low, mixing.matrix, *blocks, affine.clamp, precision)
        results.add(f"coupling {batch} x {side}^2, {precision}", partial(of_copy, run, 26 * x[:, 0].numel()))
    matrices, scales = [m.matrix for m, _ in pairs], [torch.rand_like(x[:, :5]) for _ in pairs]
    image = torch.randn(batch, 3, 2 * side, 2 * side, device=device)
    floats = 34 * x[:, 0].numel()
    for name, run in (
        ("forward", partial(linear.operator, image, matrices, scales)),
        ("backward", partial(linear.transpose_operator, x, low, matrices, scales)),
    ):
        results.add(f"linear level {batch} x {side}^2, {name}", partial(of_copy, run, floats))
    nce_shapes = [(16, 9, 256), (16, 9, 512), (16, 64, 4096), (1, 189, 16384)]
    for batch, channels, places in [(1, 9, 20)] if dry_run else nce_shapes:
        case = {"operator": "patch_nce", "batch": batch, "channels": channels, "places": places, "dtype": "float32"}
        sr, gt = make_inputs(case, device)
        cases: list[tuple[Any, float]] = [("plain", 1e-4), ("hard", 1e-4), *[("hard", 0.0)] * (not dry_run)]
        for modulation, tolerance in cases:
            call = partial(patch_nce, sr.detach(), gt, modulation=modulation, tolerance=tolerance)
            name = f"PatchNCE {batch} x {channels} x {places}, {modulation}, tolerance {tolerance:g}"
            results.add(name, lambda call=call: {"ms": graph_ms(call, device, 2), "wall ms": wall_ms(call, device)})


def profile_part(results: Results, device: Any, dry_run: bool) -> None:
    import torch

    from mghf_loss import MGHFLoss

    sr, gt = images(device, dry_run)
    loss = MGHFLoss().to(device)
    kernels = kernels_of(lambda: torch.autograd.grad(loss(sr, gt), sr), device)
    by_name: dict[str, tuple[int, float]] = {}
    for name, duration in kernels:
        count, total = by_name.get(name[:90], (0, 0.0))
        by_name[name[:90]] = (count + 1, total + duration)
    results.add("kernels", lambda: len(kernels))
    longest = sorted(by_name.items(), key=lambda item: -item[1][1])[:40]
    results.add("longest", lambda: {name: f"{count} x, {total:.0f} us" for name, (count, total) in longest})


def tf32(results: Results, device: Any, dry_run: bool) -> None:
    import torch

    from mghf_loss import HighFrequencyINN

    network = HighFrequencyINN.from_pretrained().to(device).requires_grad_(False)
    image = images(device, dry_run)[1][:2] * 2 - 1
    exact = torch.cat([level.flatten() for level in network.double().features(image.double())])
    network.float()

    def measure(allowed: bool) -> dict[str, Any]:
        flags = torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=False, allow_tf32=allowed)
        with flags, torch.no_grad():
            found = torch.cat([level.flatten() for level in network.features(image)]).double()
            back = network.inverse(network(image, log_det_jac=False))
            elapsed = wall_ms(lambda: network.features(image), device)
        return {
            "feature error": ((found - exact).norm() / exact.norm()).item(),
            "inverse max error": (back - image).abs().max().item(),
            "features, ms": elapsed,
        }

    for allowed in (True, False):
        results.add(f"allow_tf32={allowed}", partial(measure, allowed))


def checks(results: Results, device: Any, dry_run: bool) -> None:
    if dry_run:
        from benchmarks import ops_checks

        results.add("number of checks", lambda: len(ops_checks.checks(device)))
        return
    from benchmarks.ops_checks import run

    results.add("checks", partial(run, device))


def tests(results: Results, device: Any, dry_run: bool) -> None:
    file = str(ROOT / "tests" / "test_cuda.py")
    command = [sys.executable, file]
    if find_spec("pytest") is not None:
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-o", "addopts=", file]
        command += ["-o", "filterwarnings=default"]  # FrEIA's source warns when it is first compiled
    code = subprocess.run(command, check=False).returncode
    results.add("exit code", lambda: code)
    if code not in (0, 5):  # 5: none were collected
        raise SystemExit(code)


def crossover(results: Results, device: Any, dry_run: bool) -> None:
    from benchmarks.ops import crossover as table

    if not dry_run:  # a table of times
        table(device)


PARTS: dict[str, Callable[[Results, Any, bool], None]] = {
    "machine": machine,
    "losses": losses,
    "operators": operators,
    "profile": profile_part,
    "tf32": tf32,
    "checks": checks,
    "tests": tests,
    "crossover": crossover,
}

if __name__ == "__main__":
    main()
