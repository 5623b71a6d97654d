"""Run the Triton kernels in Triton's interpreter, on a CPU, and print their errors against float64 as JSON.

    TRITON_INTERPRET=1 python tests/triton_interpreted.py [matrix]

A program of its own, because the variable must be set before Triton is imported. For every case it prints the
relative errors (Euclidean norm) of the kernels, and of the torch formula in float32, against the formula in float64.
"""

from __future__ import annotations

import json
import sys
from itertools import product

import torch
from torch import Tensor

from mghf_loss import HighFrequencyINN, INNConfig, MGHFLoss
from mghf_loss import coupling as coupling_module
from mghf_loss.coupling import Bottleneck
from mghf_loss.ops import (
    couplings,
    couplings_triton,
    cuda,
    linear,
    linear_triton,
    local,
    local_triton,
    nce,
    nce_triton,
    statistics,
    statistics_triton,
)
from mghf_loss.ops.convolution import uses_operators
from mghf_loss.ops.statistics_triton import backward_triton


def relative(found: Tensor, exact: Tensor) -> float:
    return ((found.double() - exact).norm() / exact.norm().clamp_min(1e-300)).item()


def report(operator: str, name: str, precision: str, kernel: dict[str, float], native: dict[str, float]) -> None:
    row = {"operator": operator, "case": name, "precision": precision, "kernel": kernel, "native": native}
    print(json.dumps(row), flush=True)


def statistics_case(name: str, shape: tuple[int, ...], precision: str, **options) -> None:
    gt = options.get("mean", 0.0) + torch.randn(shape)
    sr = gt + options.get("noise", 0.3) * torch.randn(shape)
    if options.get("channels_last"):
        sr, gt = (level.contiguous(memory_format=torch.channels_last) for level in (sr, gt))
    sr, gt = (level.to(options.get("dtype", torch.float32)) for level in (sr, gt))
    keep = torch.rand(shape[:2]) > 0.3 if options.get("pruned") else None
    gram = options.get("gram", True)
    arguments = (keep, gram, precision)
    exact_gram, exact_moments = statistics.statistics_formula(sr.double(), gt.double(), *arguments)
    gram_gradient = torch.randn(*shape[:2], shape[1]) if gram else None
    moment_gradient = torch.zeros(shape[0], 6, shape[1])
    moment_gradient[:, [0, 2, 4, 5]] = torch.randn(shape[0], 4, shape[1])  # GT's mean and variance have no gradient
    wide = (exact_moments, None if gram_gradient is None else gram_gradient.double(), moment_gradient.double())
    exact_gradient = statistics.backward_formula(sr.double(), gt.double(), keep, *wide, precision)

    def errors(forward, backward) -> dict[str, float]:
        gram_difference, moments = forward(sr, gt, *arguments)
        gradient = backward(sr, gt, keep, exact_moments.float(), gram_gradient, moment_gradient, precision)
        names = statistics.SecondOrderStatistics._fields[1:]
        found = {name: relative(moments[:, i], exact_moments[:, i]) for i, name in enumerate(names)}
        for i, level in enumerate((sr, gt)):  # a mean near 0 is as exact as the values are
            found[names[i]] *= (exact_moments[:, i].norm() / level.double().square().mean((2, 3)).sqrt().norm()).item()
        if gram:
            found["gram_difference"] = relative(gram_difference, exact_gram)
        if sr.dtype == torch.float32:  # a 16-bit gradient is as exact as its dtype
            found["gradient"] = relative(gradient, exact_gradient)
        return found

    kernel = errors(statistics_triton.statistics_triton, backward_triton)
    native = errors(statistics.statistics_formula, statistics.backward_formula)
    report("statistics", name, precision, kernel, native)


def patch_nce_case(name: str, shape: tuple[int, int, int], precision: str, **options) -> None:
    nce_triton.STORED_PLACES = 512 if options.get("stored", True) else 0
    gt = torch.randn(shape)
    sr = (gt + 0.7 * torch.randn(shape)) * options.get("scale", 1.0)
    if options.get("zeros"):
        sr[..., 0] = gt[..., 1] = 0
    arguments = (
        0.07,
        options.get("modulation", "hard"),
        options.get("eps", 1.0),
        options.get("negative_weight", 1.0),
        options.get("iterations", 8),
        0.0,
        True,
        precision,
    )
    exact = nce.patch_nce_formula(sr.double(), gt.double(), *arguments)

    def errors(function) -> dict[str, float]:
        found = function(sr, gt, *arguments)
        return {key: relative(f, e) for key, f, e in zip(("loss", "gradient"), found, exact, strict=True)}

    report("patch_nce", name, precision, errors(nce_triton.patch_nce_triton), errors(nce.patch_nce_formula))


def early_stop_case(stored: bool) -> None:
    """Both ways to iterate stop early: at a tolerance that the first iterations meet, all of 50 change little."""
    nce_triton.STORED_PLACES = 512 if stored else 0
    sr, gt = torch.randn(2, 2, 9, 40).unbind(0)

    def loss(iterations: int, tolerance: float) -> Tensor:
        arguments = (0.07, "hard", 1.0, 1.0, iterations, tolerance, False, "high")
        return nce_triton.patch_nce_triton(sr, gt, *arguments)[0]

    converged, stopped, three, one = loss(12, 0.0), loss(12, 1e-3), loss(3, 0.0), loss(1, 0.0)
    print(
        json.dumps(
            {
                "operator": "early stop",
                "case": "stored" if stored else "streaming",
                "stopped": (stopped - converged).abs().max().item(),
                "three": (three - converged).abs().max().item(),
                "one": (one - converged).abs().max().item(),
                "same as full": torch.equal(stopped, converged),
            }
        ),
        flush=True,
    )


def nan_case() -> None:
    """A NaN of all ones, of either sign, survives the rounding to tf32, through which it reaches the other channels."""
    sr, gt = torch.randn(2, 1, 9, 4, 5).unbind(0)
    sr.view(torch.int32)[0, 3, 1, 2] = 0x7FFFFFFF  # such as a GPU makes
    sr.view(torch.int32)[0, 5, 2, 3] = -1
    arguments = (None, torch.zeros(1, 6, 9), torch.randn(1, 9, 9), torch.randn(1, 6, 9), "fast")
    found, expected = (
        backward(sr, gt, *arguments).isnan() for backward in (backward_triton, statistics.backward_formula)
    )
    print(json.dumps({"operator": "nan", "same": torch.equal(found, expected), "count": found.sum().item()}))


def coupling_case(name: str, size: tuple[int, int], precision: str, hidden: int = 32) -> None:
    torch.manual_seed(1)
    phi, rho_eta = Bottleneck(8, hidden, 4), Bottleneck(7, hidden, 10)
    for block in (phi, rho_eta):
        torch.nn.init.normal_(block[-1].weight, std=0.3)
    x, low, matrix = torch.randn(2, 9, *size), torch.rand(2, 3, *size), torch.randn(9, 9) / 3

    def run(function, dtype: torch.dtype) -> dict[str, Tensor]:
        blocks = [[parameter.detach().to(dtype) for parameter in block.parameters()] for block in (phi, rho_eta)]
        found = function(x.to(dtype), low.to(dtype), matrix.to(dtype), *blocks, 2.0, precision)
        return dict(zip(("z", "scale"), found, strict=True))

    exact = run(couplings.coupling_formula, torch.double)
    kernel, native = (
        {key: relative(value, exact[key]) for key, value in run(function, torch.float32).items()}
        for function in (couplings_triton.coupling_triton, couplings.coupling_formula)
    )
    if hidden > 32:
        report("coupling", name, precision, kernel, native)
        return

    # With gradient: what is kept, and the way back from what the formula kept.
    def blocks_in(dtype: torch.dtype) -> list[list[Tensor]]:
        return [[parameter.detach().to(dtype) for parameter in block.parameters()] for block in (phi, rho_eta)]

    gradient = torch.randn_like(x)
    inputs = (x.double(), low.double(), matrix.double(), *blocks_in(torch.double), 2.0, precision)
    _, scale, z1, signs = couplings.kept_formula(*inputs)
    wanted = couplings.kept_backward_formula(gradient.double(), scale, z1, signs, *inputs[2:])
    narrow = (x, low, matrix, *blocks_in(torch.float32), 2.0, precision)
    kept = couplings_triton.kept_triton(*narrow)
    assert (kept[3] == signs).float().mean() > 0.99  # a hidden value near 0 may have either sign
    kernel |= {"z1": relative(kept[2], z1)}
    native |= {"z1": relative(couplings.kept_formula(*narrow)[2], z1)}
    for errors, function in (
        (kernel, couplings_triton.kept_backward_triton),
        (native, couplings.kept_backward_formula),
    ):
        found = function(gradient, scale.float(), z1.float(), signs, *narrow[2:])
        errors |= {key: relative(f, e) for key, f, e in zip(("x", "low"), found, wanted, strict=True)}
    report("coupling", name, precision, kernel, native)


def linear_case(name: str, size: tuple[int, int], count: int) -> None:
    """A level as a linear map, and its transpose."""
    torch.manual_seed(1)
    height, width = size
    x, details, low = torch.randn(2, 3, 2 * height, 2 * width), torch.randn(2, 9, *size), torch.randn(2, 3, *size)
    matrices, scales = torch.randn(count, 9, 9) / 3, torch.rand(count, 2, 5, *size) + 0.5

    def run(forward, transpose, dtype: torch.dtype) -> list[Tensor]:
        given = [list(tensors.to(dtype).unbind(0)) for tensors in (matrices, scales)]
        back = [transpose(details.to(dtype), given_low, *given) for given_low in (low.to(dtype), None)]
        return [*forward(x.to(dtype), *given), *back]

    formula = (linear.linear_level_formula, linear.transpose_formula)
    exact, names = run(*formula, torch.double), ("details", "low", "transpose", "transpose of details")
    kernel, native = (
        {key: relative(f, e) for key, f, e in zip(names, found, exact, strict=True)}
        for found in (
            run(linear_triton.linear_level_triton, linear_triton.transpose_triton, torch.float32),
            run(*formula, torch.float32),
        )
    )
    report("linear_level", name, "high", kernel, native)


def local_case(name: str, shape: tuple[int, ...], window: int, squared_error: bool = True, **options) -> None:
    torch.manual_seed(1)
    gt = torch.randn(shape)
    sr = gt + 0.3 * torch.randn(shape)
    sr[0, 0, -1] = gt[0, 0, -1]  # windows of equal strength: the kink
    if options.get("channels_last"):
        sr, gt = (level.contiguous(memory_format=torch.channels_last) for level in (sr, gt))
    sr, gt = sr.to(options.get("dtype", torch.float32)), gt.to(options.get("dtype", torch.float32))
    exact_errors, exact_slope = local.local_formula(sr.double(), gt.double(), window, 0.05, squared_error)
    upstream, second = torch.randn(*shape[:2], 5 + squared_error), gt if squared_error else None
    wide = None if second is None else second.double()
    exact_gradient = local.backward_formula(sr.double(), wide, exact_slope, upstream.double(), window)

    def errors(forward, backward) -> dict[str, float]:
        found_errors, slope = forward(sr, gt, window, 0.05, squared_error)
        gradient = backward(sr, second, exact_slope.float(), upstream, window)
        found = {"slope": relative(slope, exact_slope)}
        for name, part in (("texture", slice(0, 1)), ("phases", slice(1, 5)), ("squared_error", slice(5, 6))):
            found[name] = relative(found_errors[..., part], exact_errors[..., part])
        if sr.dtype == torch.float32:  # a 16-bit gradient is as exact as its dtype
            found["gradient"] = relative(gradient, exact_gradient)
        return found

    kernel = errors(local_triton.local_triton, local_triton.local_backward_triton)
    native = errors(local.local_formula, local.backward_formula)
    report("local_errors", name, "high", kernel, native)


def whole_loss_case(precision: str, conditioning: str) -> None:
    """MGHFLoss by the kernels against MGHFLoss by the formula."""
    nce_triton.STORED_PLACES = 512
    torch.manual_seed(0)
    inn = HighFrequencyINN(INNConfig(hidden=8))
    options = {"coefficients": {"texture": 0.1}, "patches": 40, "precision": precision, "conditioning": conditioning}
    criterion = MGHFLoss("paper", inn=inn, **options)
    gt = torch.rand(1, 3, 24, 24)
    sr = (gt + 0.2 * torch.randn_like(gt)).requires_grad_()

    def run() -> tuple[Tensor, Tensor]:
        torch.manual_seed(1)
        loss = criterion(sr, gt)
        return loss.detach(), torch.autograd.grad(loss, sr)[0]

    expected = run()
    before, cuda.reason_against_kernels = cuda.reason_against_kernels, lambda device: None
    coupling_module.uses_operators = linear.uses_operators = lambda x: True
    library = torch.library.Library("mghf_loss", "IMPL")
    for name, _, formula in cuda.OPERATORS:
        library.impl(name, cuda.with_fallback(name, name, formula), "CPU")
    found = run()
    library._destroy()
    cuda.reason_against_kernels = before
    coupling_module.uses_operators = linear.uses_operators = uses_operators
    assert not cuda.failures, cuda.failures
    assert not torch.equal(found[1], expected[1])  # it was the kernels
    errors = {key: relative(f, e.double()) for key, f, e in zip(("loss", "gradient"), found, expected, strict=True)}
    report("MGHFLoss", conditioning, precision, errors, {})


def matrix() -> None:
    """Every tile of sm_80 and sm_90 at many sizes: aligned and not, pruned, 16 bits, channels_last, both precisions."""
    for capability in ((8, 0), (9, 0)):
        statistics_triton.device_properties = nce_triton.device_properties = lambda _, found=capability: (found, 4)
        where = f"sm_{capability[0]}0"
        for channels, size, precision in product((9, 45, 96, 189, 300), ((16, 16), (13, 11)), ("fast", "high")):
            statistics_case(f"C={channels} {size}, {where}", (2, channels, *size), precision)
        for channels, precision in product((9, 96), ("fast", "high")):
            label, shape = f"C={channels}, {where}", (2, channels, 16, 16)
            statistics_case(f"{label}, bf16", shape, precision, dtype=torch.bfloat16, pruned=True)
            statistics_case(f"{label}, channels_last", shape, precision, channels_last=True)
        for channels, places, precision in product((9, 45, 189), (2, 129), ("fast", "high")):
            label, shape = f"C={channels} N={places}, {where}", (2, channels, places)
            patch_nce_case(f"{label}, plain", shape, precision, modulation="plain")
            for stored in (True, False):
                patch_nce_case(f"{label}, stored {stored}", shape, precision, iterations=2, stored=stored)


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    if sys.argv[1:] == ["matrix"]:
        return matrix()
    for precision in ("fast", "high"):
        statistics_case("one place", (2, 3, 1, 1), precision)
        statistics_case("C=9", (2, 9, 7, 9), precision)
        statistics_case("C=12, pruned", (2, 12, 13, 11), precision, pruned=True)
        statistics_case("C=45, several splits", (1, 45, 25, 23), precision)
        statistics_case("C=45, close", (1, 45, 9, 7), precision, noise=1e-3)
        statistics_case("channels_last", (2, 9, 7, 9), precision, channels_last=True)
        statistics_case("without gram", (2, 9, 7, 9), precision, gram=False)
        statistics_case("fp16", (1, 12, 7, 9), precision, dtype=torch.float16)
        statistics_case("bf16", (1, 45, 7, 9), precision, dtype=torch.bfloat16)
    statistics_case("mean 1000", (1, 16, 25, 23), "high", mean=1000.0)
    for precision in ("fast", "high"):
        for stored in (True, False):
            way = "stored" if stored else "streaming"
            patch_nce_case(f"C=9 N=33, {way}", (2, 9, 33), precision, stored=stored)
            patch_nce_case(f"C=12 N=131, {way}", (1, 12, 131), precision, stored=stored, iterations=4)
            patch_nce_case(
                f"easy, Q=2, {way}",
                (1, 45, 37),
                precision,
                stored=stored,
                modulation="easy",
                negative_weight=2.0,
                eps=0.5,
            )
            patch_nce_case(f"eps=0.05, {way}", (1, 45, 67), precision, stored=stored, eps=0.05)
        patch_nce_case("tiny and zero vectors", (1, 9, 20), precision, scale=1e-9, zeros=True)
        patch_nce_case("huge vectors", (1, 9, 20), precision, scale=1e30)
    patch_nce_case("two places", (4, 9, 2), "fast", stored=False)
    patch_nce_case("one place", (4, 9, 1), "fast")
    for capability, precision in product(((8, 0), (9, 0)), ("fast", "high")):  # more than 64 channels: other tiles
        statistics_triton.device_properties = nce_triton.device_properties = lambda _, found=capability: (found, 2)
        where = f"sm_{capability[0]}0"
        statistics_case(f"C=96, aligned, {where}", (1, 96, 4, 8), precision)
        statistics_case(f"C=189, {where}", (1, 189, 5, 7), precision, pruned=True)
        statistics_case(f"C=300, aligned, {where}", (1, 300, 4, 4), precision)
        patch_nce_case(f"plain C=189, {where}", (1, 189, 70), precision, modulation="plain", stored=False)
        patch_nce_case(f"C=189, {where}", (1, 189, 70), precision, iterations=2, stored=False)
    for size in ((9, 21), (2, 19), (1, 7), (5, 70)):
        for precision in ("fast", "high"):
            coupling_case(f"{size}", size, precision)
    for precision in ("fast", "high"):
        coupling_case("7 hidden channels", (5, 6), precision, hidden=7)
        coupling_case("48 hidden channels", (5, 6), precision, hidden=48)
    for size, window in product(((8, 16), (13, 11), (1, 3), (5, 1), (1, 1)), (1, 4, 5)):
        local_case(f"{size}, window {window}", (2, 3, *size), window)
    local_case("several programs", (1, 2, 50, 150), 4)
    local_case("one window", (1, 2, 3, 1100), 2000)
    local_case("channels_last", (2, 3, 9, 8), 4, channels_last=True)
    local_case("bf16", (2, 3, 9, 8), 4, dtype=torch.bfloat16)
    local_case("fp16", (2, 3, 5, 2), 2, dtype=torch.float16)
    local_case("no squared error", (2, 3, 9, 8), 4, squared_error=False)
    for size, count in product(((5, 7), (8, 9), (11, 13)), (0, 2, 4)):
        linear_case(f"{size}, {count} couplings", size, count)
    nan_case()
    early_stop_case(True)
    early_stop_case(False)
    for precision in ("fast", "high"):
        for conditioning in ("own", "gt"):
            whole_loss_case(precision, conditioning)


if __name__ == "__main__":
    main()
