"""What only a GPU can show: the kernels against float64 at full speed, run to run, and beside the torch formula.

pytest tests/test_cuda.py, or, where there is no pytest, python tests/test_cuda.py
"""

from __future__ import annotations

import os
import warnings
from itertools import product

import torch
from torch import Tensor

from mghf_loss import HighFrequencyINN, INNConfig, MGHFLoss
from mghf_loss.ops import active_path, cuda, patch_nce, second_order_statistics
from mghf_loss.ops.local import local_errors

try:
    import pytest
except ModuleNotFoundError:
    pytest = None

DEVICE = "cuda"
reason = None
if not torch.cuda.is_available():
    reason = "needs a CUDA device"
elif cuda.reason_against_kernels(torch.device("cuda", torch.cuda.current_device())):
    reason = "needs a CUDA device that the kernels run on"
if pytest is not None:
    pytestmark = pytest.mark.skipif(reason is not None, reason=reason or "")

BOUNDS = {"fast": (3e-4, 2e-3), "high": (2e-6, 2e-5)}  # statistics, PatchNCE
TEXTURE = {"texture": 0.1}  # so that all terms of "paper" and this one are on
SIZES = [(9, 7, 9), (12, 64, 64), (45, 33, 35), (64, 48, 48), (96, 16, 16), (189, 13, 17), (189, 32, 32), (300, 9, 9)]


def relative(found: Tensor, exact: Tensor) -> float:
    return ((found.double() - exact).norm() / exact.norm().clamp_min(1e-300)).item()


def pair(*shape: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    gt = torch.randn(*shape, device=DEVICE)
    return (gt + 0.3 * torch.randn_like(gt)).to(dtype), gt.to(dtype)


def statistics_and_gradient(sr: Tensor, gt: Tensor, weights: Tensor, precision: str) -> list[Tensor]:
    sr = sr.detach().requires_grad_()
    found = second_order_statistics(sr, gt, weights, precision=precision)
    generator = torch.Generator(DEVICE).manual_seed(5)
    upstream = [torch.randn(value.shape, device=DEVICE, generator=generator) for value in found]
    total = sum((value * g).sum() for value, g in zip(found, upstream, strict=True))
    return [value.detach() for value in found] + [torch.autograd.grad(total, sr)[0]]


def nce_and_gradient(sr: Tensor, gt: Tensor, precision: str, **options) -> list[Tensor]:
    sr = sr.detach().requires_grad_()
    loss = patch_nce(sr, gt, precision=precision, **options)
    return [loss.detach(), torch.autograd.grad(loss.sum(), sr)[0]]


def test_the_kernels_are_active_and_stay_so():
    assert "Triton" in active_path(), active_path()
    assert not cuda.failures, cuda.failures


def test_statistics_against_float64():
    torch.manual_seed(0)
    for (channels, *size), dtype, precision in product(
        SIZES, (torch.float32, torch.float16, torch.bfloat16), ("fast", "high")
    ):
        if dtype != torch.float32 and (precision == "high" or channels not in (9, 45, 189)):
            continue  # every variant compiles for a second
        sr, gt = pair(2, channels, *size, dtype=dtype)
        weights = (torch.rand(2, channels, device=DEVICE) > 0.25).float()
        exact = statistics_and_gradient(sr.double(), gt.double(), weights, precision)
        found = statistics_and_gradient(sr, gt, weights, precision)
        where = f"{channels} x {size}, {dtype}, {precision}"
        rms = sr.double().square().mean().sqrt()
        for name, value, want in zip(
            ("gram", "x", "y", "vx", "vy", "cov", "sse", "gradient"), found, exact, strict=True
        ):
            bound = BOUNDS[precision][0]
            if name == "gradient" and dtype != torch.float32:
                bound = {torch.float16: 2e-3, torch.bfloat16: 1e-2}[dtype]
            if name in ("x", "y"):  # a mean near 0 is as exact as the values are
                assert (value.double() - want).abs().max() <= 2e-6 * rms, f"{where}, {name}"
            else:
                assert relative(value, want) <= bound, f"{where}, {name}: {relative(value, want):.1e}"
    assert not cuda.failures, cuda.failures


def test_local_errors_against_float64():
    torch.manual_seed(0)
    for (channels, *size), dtype, window in product(SIZES, (torch.float32, torch.bfloat16), (4, 5)):
        sr, gt = pair(2, channels, *size, dtype=dtype)
        upstream = torch.randn(2, channels, 6, device=DEVICE)
        found, exact = [], []
        for results, wide in ((found, dtype), (exact, torch.double)):
            level = sr.detach().to(wide).requires_grad_()
            texture, phases, squared_error = local_errors(level, gt.to(wide), window)
            error = torch.cat((texture[..., None], phases, squared_error[..., None]), 2)
            results += [error.detach(), torch.autograd.grad((error * upstream.to(error.dtype)).sum(), level)[0]]
        for name, value, want, bound in zip(
            ("error", "gradient"), found, exact, (2e-6, 2e-6 if dtype == torch.float32 else 1e-2), strict=True
        ):
            where = f"{channels} x {size}, {dtype}, window {window}, {name}"
            assert relative(value, want) <= bound, f"{where}: {relative(value, want):.1e}"
    assert not cuda.failures, cuda.failures


def test_patch_nce_against_float64():
    torch.manual_seed(0)
    for channels, places, modulation, precision in product(
        (9, 45, 96, 189), (2, 100, 256, 513, 1500), ("plain", "hard", "easy"), ("fast", "high")
    ):
        sr, gt = pair(2, channels, places)
        options = {"modulation": modulation, "iterations": 10, "tolerance": 0.0}
        exact = nce_and_gradient(sr.double(), gt.double(), precision, **options)
        found = nce_and_gradient(sr, gt, precision, **options)
        bound = BOUNDS[precision][1] * (5 if places == 2 else 1)  # so few values do not average rounding errors
        for name, value, want in zip(("loss", "gradient"), found, exact, strict=True):
            error = relative(value, want)
            assert error <= bound, f"{channels} x {places}, {modulation}, {precision}, {name}: {error:.1e}"
    sr, gt = pair(1, 45, 700)
    options = {"eps": 0.05, "iterations": 20, "tolerance": 0.0}  # the running maximum
    exact, found = (
        nce_and_gradient(sr.double(), gt.double(), "high", **options),
        nce_and_gradient(sr, gt, "high", **options),
    )
    assert max(map(relative, found, exact)) <= 2e-5
    assert not cuda.failures, cuda.failures


def test_two_runs_agree_bit_for_bit():
    for channels, size in ((9, 48), (45, 64), (189, 32)):
        sr, gt = pair(4, channels, size, size)
        weights = torch.ones(4, channels, device=DEVICE)
        first, second = (statistics_and_gradient(sr, gt, weights, "fast") for _ in range(2))
        assert all(map(torch.equal, first, second)), channels
        for places in (256, size * size):
            vectors = sr.flatten(2)[..., :places], gt.flatten(2)[..., :places]
            first, second = (nce_and_gradient(*vectors, "fast") for _ in range(2))
            assert all(map(torch.equal, first, second)), (channels, places)


def test_the_number_of_stages_changes_nothing():
    from mghf_loss.ops.nce_triton import patch_nce_triton
    from mghf_loss.ops.statistics_triton import statistics_triton

    for channels in (9, 45, 189):
        sr, gt = pair(2, channels, 40, 40)
        results = [statistics_triton(sr, gt, None, True, "fast", stages=stages) for stages in (1, 2, 3)]
        assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True)), channels
        arguments = (0.07, "hard", 1.0, 1.0, 5, 0.0, True, "fast")
        vectors = sr.flatten(2), gt.flatten(2)
        results = [patch_nce_triton(*vectors, *arguments, stages=stages) for stages in (1, 2)]
        assert all(map(torch.equal, *results)), channels


def test_sinkhorn_stops_on_the_device():
    for places in (256, 1024):
        sr, gt = pair(2, 45, places)
        early, late, one = (
            patch_nce(sr, gt, precision="high", tolerance=tolerance, iterations=iterations)
            for tolerance, iterations in ((1e-2, 50), (0.0, 50), (0.0, 1))
        )
        torch.testing.assert_close(early, late, rtol=2e-2, atol=2e-2)
        assert not torch.equal(early, late), f"{places} places: all iterations ran"
        assert not torch.equal(early, one), f"{places} places: one iteration ran"


def test_strides_and_the_second_device_do_not_matter():
    sr, gt = pair(2, 12, 24, 24)
    weights = torch.ones(2, 12, device=DEVICE)
    expected = statistics_and_gradient(sr, gt, weights, "high")
    last = [level.contiguous(memory_format=torch.channels_last) for level in (sr, gt)]
    for found, want in zip(statistics_and_gradient(*last, weights, "high"), expected, strict=True):
        torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-5)
    if torch.cuda.device_count() > 1:
        found = second_order_statistics(sr.to("cuda:1"), gt.to("cuda:1"), precision="high")
        torch.testing.assert_close(found.covariance.to(sr.device), expected[5])


def test_compile_and_autocast():
    sr, gt = pair(2, 12, 300)

    def value(sr: Tensor, gt: Tensor) -> Tensor:
        return patch_nce(sr, gt).mean() + second_order_statistics(sr, gt).squared_error.mean()

    sr.requires_grad_()
    expected = torch.autograd.grad(value(sr, gt), sr)[0]
    torch._dynamo.reset()
    compiled = torch.compile(value, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(torch.autograd.grad(compiled(sr, gt), sr)[0], expected)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        torch.testing.assert_close(torch.autograd.grad(value(sr, gt), sr)[0], expected)


def mghfloss(precision: str, patches: int | None) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    inn = HighFrequencyINN(INNConfig(hidden=8))
    criterion = MGHFLoss("paper", coefficients=TEXTURE, inn=inn, patches=patches, precision=precision).to(DEVICE)
    gt = torch.rand(2, 3, 64, 80, device=DEVICE)
    sr = (gt + 0.1 * torch.randn_like(gt)).requires_grad_()
    loss = criterion(sr, gt, generator=torch.Generator(DEVICE).manual_seed(1))
    return loss.detach(), torch.autograd.grad(loss, sr)[0]


def test_both_paths_of_mghfloss_agree():
    for (precision, bound), patches in product((("high", 1e-5), ("fast", 2e-3)), (256, None)):
        kernels = mghfloss(precision, patches)
        os.environ["MGHF_LOSS_OPS"] = "torch"
        try:
            plain = mghfloss(precision, patches)
        finally:
            del os.environ["MGHF_LOSS_OPS"]
        for found, want in zip(kernels, plain, strict=True):
            error = relative(found, want.double())
            assert error <= bound, f"{precision}, {patches}: {error:.1e}"
    assert not cuda.failures, cuda.failures


def network() -> HighFrequencyINN:
    return HighFrequencyINN.from_pretrained().to(DEVICE).requires_grad_(False)


def test_features_are_float32_whatever_cudnn_is_set_to():
    inn, image = network(), torch.rand(2, 3, 67, 130, device=DEVICE) * 2 - 1
    with torch.no_grad():
        exact = network().double().features(image.double())
        for allowed in (True, False):
            with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=False, allow_tf32=allowed):
                for level, want in zip(inn.features(image), exact, strict=True):
                    assert relative(level, want) <= 2e-6, f"tf32 {allowed}: {relative(level, want):.1e}"
    assert not cuda.failures, cuda.failures


def test_gt_conditioned_differences_against_float64():
    inn, exact = network(), network().double()
    gt = torch.rand(2, 3, 64, 96, device=DEVICE) * 2 - 1
    difference = (0.1 * torch.randn_like(gt)).requires_grad_()
    wide = difference.detach().double().requires_grad_()
    for level, want in zip(
        inn.difference(difference, inn.conditioning(gt).scales),
        exact.difference(wide, exact.conditioning(gt.double()).scales),
        strict=True,
    ):
        upstream = torch.randn_like(level)
        (gradient,) = torch.autograd.grad((level * upstream).sum(), difference, retain_graph=True)
        (expected,) = torch.autograd.grad((want * upstream.double()).sum(), wide, retain_graph=True)
        assert relative(level, want) <= 2e-6
        assert relative(gradient, expected) <= 2e-6
    assert not cuda.failures, cuda.failures


def loss_and_images() -> tuple[MGHFLoss, Tensor, Tensor]:
    torch.manual_seed(0)
    criterion = MGHFLoss("paper", coefficients=TEXTURE, inn=HighFrequencyINN(INNConfig(hidden=8))).to(DEVICE)
    gt = torch.rand(2, 3, 64, 80, device=DEVICE)
    return criterion, (gt + 0.1 * torch.randn_like(gt)).requires_grad_(), gt


def test_the_loss_is_deterministic():
    criterion, sr, gt = loss_and_images()
    torch.use_deterministic_algorithms(True)
    try:
        first, second = (torch.autograd.grad(criterion(sr, gt), sr)[0] for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(first, second)


def test_the_loss_in_a_cuda_graph_follows_its_inputs():
    criterion, sr, gt = loss_and_images()
    graphed = torch.cuda.make_graphed_callables(lambda sr, gt: criterion(sr, gt), (sr, gt))
    for _ in range(2):
        gt = torch.rand_like(gt)
        sr = (gt + 0.1 * torch.randn_like(gt)).requires_grad_()
        (found,) = torch.autograd.grad(graphed(sr, gt), sr)
        (expected,) = torch.autograd.grad(criterion(sr, gt), sr)
        torch.testing.assert_close(found, expected)


def test_the_compiled_loss_has_the_same_gradient():
    criterion, sr, gt = loss_and_images()
    (expected,) = torch.autograd.grad(criterion(sr, gt), sr)
    torch._dynamo.reset()
    (found,) = torch.autograd.grad(torch.compile(criterion)(sr, gt), sr)
    assert relative(found, expected.double()) <= 1e-4


def test_too_many_channels_fall_back_with_a_warning():
    sr, gt = pair(1, 300, 40)
    cuda._warned.clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        first, second = patch_nce(sr, gt), patch_nce(sr, gt)
    cuda.failures.clear()
    assert torch.equal(first, second)
    assert [str(w.message) for w in caught if "300 channels" in str(w.message)][1:] == []
    assert any("300 channels" in str(w.message) for w in caught)


def main() -> None:
    if reason is not None:
        raise SystemExit(reason)
    failed = 0
    for name, test in list(globals().items()):
        if name.startswith("test_"):
            try:
                test()
                print(f"passed {name}", flush=True)
            except Exception as error:  # the next test still tells something
                failed += 1
                print(f"FAILED {name}: {type(error).__name__}: {error}", flush=True)
    raise SystemExit(failed)


if __name__ == "__main__":
    main()
