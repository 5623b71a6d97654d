"""The real Triton kernels, forward and backward at odd sizes, in Triton's interpreter against float64."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
if find_spec("triton") is not None:
    import numpy
    import triton

    versions = [tuple(map(int, module.__version__.split(".")[:2])) for module in (triton, numpy)]
    if versions[0] < (3, 7) and versions[1] >= (2, 4):
        pytestmark = pytest.mark.skip(reason="the interpreter of Triton 3.6 and older fails with NumPy 2.4")
pytestmark = [pytest.mark.triton, pytest.mark.xdist_group("interpreter"), pytestmark]  # share the rows

FAST = {"statistics": 3e-4, "patch_nce": 2e-3, "coupling": 3e-4}
HALF_UNIT = 2.0**-24  # the exact value rounded to float32 is off by this much


def interpreted(*arguments: str) -> list[dict]:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    program = [sys.executable, str(Path(__file__).with_name("triton_interpreted.py"))]
    run = subprocess.run([*program, *arguments], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return [json.loads(line) for line in run.stdout.splitlines()]


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    return interpreted()


@pytest.fixture(scope="module")
def matrix() -> list[dict]:
    return interpreted("matrix")


def errors(rows: list[dict], operator: str, precision: str) -> list[tuple[str, float, float]]:
    """Where, the kernel's error and the float32 formula's."""
    found = [
        (f"{row['case']}, {quantity}", error, row["native"][quantity])
        for row in rows
        if row["operator"] == operator and row["precision"] == precision
        for quantity, error in row["kernel"].items()
    ]
    assert len(found) > 10
    return found


@pytest.mark.parametrize("operator", [*FAST, "linear_level", "local_errors"])
def test_high_errs_no_more_than_twice_the_float32_formula(operator, rows):
    for where, error, native in errors(rows, operator, "high"):
        assert error <= 2 * native + HALF_UNIT, f"{where}: {error:.1e}, formula {native:.1e}"


@pytest.mark.parametrize("operator", FAST)
def test_fast_keeps_its_bound(operator, rows):
    for where, error, _ in errors(rows, operator, "fast"):
        assert error <= FAST[operator], f"{where}: {error:.1e}"


@pytest.mark.parametrize("operator", ["statistics", "patch_nce"])
def test_every_tile_of_both_architectures_keeps_the_bounds(operator, matrix):
    def few(where: str) -> int:
        return 5 if "N=2," in where else 1  # so few values do not average rounding errors

    for where, error, _ in errors(matrix, operator, "fast"):
        assert error <= few(where) * FAST[operator], f"{where}: {error:.1e}"
    for where, error, native in errors(matrix, operator, "high"):
        assert error <= few(where) * 2 * native + HALF_UNIT, f"{where}: {error:.1e}, formula {native:.1e}"


def test_nan_reaches_all_that_it_reaches_in_the_formula(rows):
    (row,) = (row for row in rows if row["operator"] == "nan")
    assert row["same"]
    assert row["count"] == 18


@pytest.mark.parametrize(
    ("eps", "tolerance", "iterations", "expected"),
    [(1.0, 1e-4, 50, 12), (2.0, 1e-3, 50, 12), (1.0, 1e-4, 5, 5), (1.0, 0.0, 50, 50), (0.5, 1e-4, 50, 50)],
)
def test_no_more_iterations_are_launched_than_any_features_need(eps, tolerance, iterations, expected, monkeypatch):
    from mghf_loss.ops import nce_triton

    launched = []

    class Kernel:
        def __getitem__(self, grid):
            return lambda *arguments, **options: launched.append(grid)

    monkeypatch.setattr(nce_triton, "_half_iteration_kernel", Kernel())
    vectors, potential = torch.zeros(1, 1, 128, 16, dtype=torch.float16), torch.zeros(1, 128)
    tile = nce_triton.tiles(9, "fast", (9, 0))
    arguments = (100, nce_triton.LOG2_E / eps, iterations, tolerance, tile, False, None)
    nce_triton._sinkhorn_streaming(vectors, vectors, potential, potential, *arguments)
    assert len(launched) == 2 * expected


@pytest.mark.parametrize("way", ["stored", "streaming"])
def test_sinkhorn_stops_early_on_the_device(way, rows):
    (row,) = (row for row in rows if row["operator"] == "early stop" and row["case"] == way)
    assert not row["same as full"]
    assert row["stopped"] <= row["three"] < row["one"]
    assert row["stopped"] < 1e-3


@pytest.mark.parametrize(("precision", "bound"), [("high", 1e-5), ("fast", 2e-3)])
def test_mghfloss_has_one_value_and_gradient_through_either_path(precision, bound, rows):
    found = [row for row in rows if row["operator"] == "MGHFLoss" and row["precision"] == precision]
    assert [row["case"] for row in found] == ["own", "gt"]
    for row in found:
        assert row["kernel"]["loss"] <= bound
        assert row["kernel"]["gradient"] <= bound
