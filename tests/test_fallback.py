"""Which implementation runs, and what is said about it. Needs no GPU: the functions that choose are called directly."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mghf_loss import ops
from mghf_loss.ops import cuda

SR, GT = torch.rand(2, 1, 3, 8).unbind(0)


@pytest.fixture(autouse=True)
def _fresh(monkeypatch):
    monkeypatch.delenv("MGHF_LOSS_OPS", raising=False)
    monkeypatch.setattr(cuda, "failures", {})
    monkeypatch.setattr(cuda, "_warned", set())


def choose(monkeypatch, kernel) -> Callable[..., Any]:
    """An operator of the kernel and a formula that returns its name, on a device that can run kernels."""
    monkeypatch.setattr(cuda, "_reason_of_hardware", lambda device: None)
    monkeypatch.setattr(cuda, "_kernels", lambda: SimpleNamespace(kernel=kernel))
    run = cuda.with_fallback("op", "kernel", lambda *_: "formula")
    return lambda sr, gt, precision="fast": run(sr, gt, precision)


def fail(error: Exception) -> None:
    raise error


def test_the_kernel_runs_where_it_can(monkeypatch):
    assert choose(monkeypatch, lambda *_: "kernel")(SR, GT) == "kernel"


def test_an_empty_batch_takes_the_formula_without_a_word(monkeypatch):
    assert choose(monkeypatch, lambda *_: "kernel")(SR[:0], GT[:0]) == "formula"


def test_float64_takes_the_formula_without_a_word(monkeypatch):
    run = choose(monkeypatch, lambda *_: "kernel")
    assert run(SR.double(), GT) == "formula"
    assert run(SR, GT.double()) == "formula"


def test_the_environment_forces_the_formula_without_a_word(monkeypatch):
    monkeypatch.setenv("MGHF_LOSS_OPS", "torch")
    assert choose(monkeypatch, lambda *_: "kernel")(SR, GT) == "formula"


def test_an_unknown_choice_in_the_environment_is_named(monkeypatch):
    monkeypatch.setenv("MGHF_LOSS_OPS", "cuda")
    with pytest.raises(ValueError, match="MGHF_LOSS_OPS must be 'torch' or unset, got 'cuda'"):
        choose(monkeypatch, lambda *_: "kernel")(SR, GT)


def test_a_failing_kernel_falls_back_with_one_warning_and_is_not_tried_again(monkeypatch):
    calls = []

    def kernel(*_):
        calls.append(1)
        raise RuntimeError("out of resource: shared memory")

    run = choose(monkeypatch, kernel)
    with pytest.warns(RuntimeWarning, match="op runs as torch formula on cpu.*RuntimeError: out of resource") as caught:
        assert run(SR, GT) == "formula"
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert run(SR, GT) == "formula"
    assert len(calls) == 1


def test_a_failure_counts_for_what_was_compiled(monkeypatch):
    def kernel(sr, gt, precision):
        return "kernel" if sr.dtype == torch.float16 or precision == "high" else fail(RuntimeError("too large"))

    run = choose(monkeypatch, kernel)
    with pytest.warns(RuntimeWarning, match="too large"):
        assert run(SR, GT) == "formula"
    assert run(SR.half(), GT.half()) == "kernel"
    assert run(SR, GT, "high") == "kernel"


@pytest.mark.parametrize("mistake", cuda.MISTAKES)
def test_our_own_mistakes_do_not_hide_behind_the_formula(mistake, monkeypatch):
    with pytest.raises(mistake, match="ours"):
        choose(monkeypatch, lambda *_: fail(mistake("ours")))(SR, GT)
    assert not cuda.failures


def test_mistakes_inside_triton_fall_back(monkeypatch):
    inside = {"__name__": "triton.backends.nvidia.driver"}
    exec("def kernel(*_): raise AttributeError('no such symbol')", inside)
    with pytest.warns(RuntimeWarning, match="AttributeError: no such symbol"):
        assert choose(monkeypatch, inside["kernel"])(SR, GT) == "formula"


def test_a_compilation_error_falls_back_and_is_told_with_its_cause(monkeypatch):
    errors = pytest.importorskip("triton.compiler.errors")

    def kernel(*_):
        try:
            fail(TypeError("the cause"))
        except TypeError as cause:
            raise errors.CompilationError(None, None, "cannot compile") from cause

    with pytest.warns(RuntimeWarning, match=r"CompilationError: (.|\n)*\(from TypeError: the cause\)"):
        assert choose(monkeypatch, kernel)(SR, GT) == "formula"


@pytest.mark.parametrize(
    "error",
    [
        torch.cuda.OutOfMemoryError("no memory"),
        RuntimeError("Triton Error [CUDA]: out of memory"),
        RuntimeError("CUDA error: operation not permitted when stream is capturing"),
    ],
)
def test_what_may_pass_is_raised_and_not_remembered(error, monkeypatch):
    with pytest.raises(type(error)):
        choose(monkeypatch, lambda *_: fail(error))(SR, GT)
    assert not cuda.failures


def test_more_images_than_a_grid_has_rows_take_the_formula(monkeypatch):
    run = choose(monkeypatch, lambda *_: "kernel")
    sr, gt = torch.rand(2, 65536, 1, 1).unbind(0)
    assert run(sr[1:], gt[1:]) == "kernel"
    assert run(sr, gt) == "formula"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"hip": "6.0"}, "ROCm"),
        ({"triton": None}, "Triton is not installed"),
        ({"capability": (7, 5)}, "compute capability 7.5, the kernels need 8.0"),
        ({"capability": (10, 0)}, "compute capability 10.0, for which Triton miscompiles"),
        ({}, None),
    ],
)
def test_reasons_of_the_hardware(changes, reason, monkeypatch):
    monkeypatch.setattr(torch.version, "hip", changes.get("hip"))
    monkeypatch.setattr(cuda, "find_spec", lambda name: changes.get("triton", "there"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: changes.get("capability", (9, 0)))
    cuda._reason_of_hardware.cache_clear()
    found = cuda.reason_against_kernels(torch.device("cuda", 0))
    cuda._reason_of_hardware.cache_clear()
    assert found is None if reason is None else reason in found


def test_active_path_names_every_device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert ops.active_path() == "torch formula on the CPU"
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"GPU {device.index}")
    monkeypatch.setattr(cuda, "_try", lambda device: "too old" if device.index else None)
    monkeypatch.setattr(cuda, "_triton_version", lambda: "3.9.0")
    path = ops.active_path()
    assert "Triton 3.9.0 kernels on cuda:0 (GPU 0)" in path
    assert "torch formula (too old) on cuda:1 (GPU 1)" in path


CPU = torch.device("cpu")
EARLIER = ("patch_nce", CPU, 300, torch.float32, torch.float32, "fast")


def test_the_trial_reports_its_own_failures_only(monkeypatch):
    monkeypatch.setattr(cuda, "_reason_of_hardware", lambda device: None)
    cuda.failures[EARLIER] = "300 channels"
    assert cuda._try(CPU) is None
    assert cuda.failures == {EARLIER: "300 channels"}

    def kernel(*_):
        fail(RuntimeError("no compiler"))

    run = choose(monkeypatch, kernel)
    monkeypatch.setattr(cuda, "patch_nce", lambda sr, gt: (run(sr, gt), sr)[1])
    assert cuda._try(CPU) == "RuntimeError: no compiler"
    assert not cuda._warned  # the warning is still to come


def test_an_error_of_the_trial_is_told_not_raised(monkeypatch):
    monkeypatch.setattr(cuda, "patch_nce", lambda *_: fail(torch.cuda.OutOfMemoryError("no memory")))
    assert cuda._try(CPU) == "the trial failed, OutOfMemoryError: no memory"
