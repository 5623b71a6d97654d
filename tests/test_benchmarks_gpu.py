"""benchmarks.gpu as a command: the dry run on the CPU; the imports of benchmarks/."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
import tarfile
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

REPOSITORY = Path(__file__).parents[1]
# A file may import files of lower floors only.
FLOORS = {"machine": 0, "peers": 0, "trace": 0, "losses": 1, "ops": 1, "ops_checks": 2, "gpu": 3}


def command(out: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}  # it finds src by itself
    line = [sys.executable, "-m", "benchmarks.gpu", str(out), *arguments]
    return subprocess.run(line, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.triton
@pytest.mark.bench
@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
def test_the_dry_run_goes_through_every_part(tmp_path):
    from benchmarks.gpu import LIMITS

    out = tmp_path / "results"
    finished = command(out, "--dry-run")
    assert finished.returncode == 0, finished.stdout[-3000:] + finished.stderr
    status = (out / "status.txt").read_text().splitlines()
    assert [line.partition(":")[0] for line in status] == list(LIMITS)
    assert all("exit 0" in line for line in status), status
    with tarfile.open(tmp_path / "results.tar.gz") as archive:
        names = archive.getnames()
    for part in LIMITS:
        assert f"results/{part}.txt" in names
        if (out / f"{part}.json").exists():
            found = json.loads((out / f"{part}.json").read_text())
            assert found["environment"]["torch"]
            assert "FAILED" not in json.dumps(found), found


@pytest.mark.process
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_it_says_so(tmp_path):
    finished = command(tmp_path / "results")
    assert finished.returncode == 1
    assert "nothing to measure: no CUDA device" in finished.stderr


def test_imports_in_benchmarks_point_down():
    files = {path.stem: path for path in (REPOSITORY / "benchmarks").glob("*.py")}
    assert files.keys() == FLOORS.keys()
    for name, path in files.items():
        for node in ast.walk(ast.parse(path.read_text())):
            modules = []
            if isinstance(node, ast.ImportFrom) and node.module:
                modules = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
            elif isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            for module in modules:
                package, _, imported = module.partition(".")
                if package == "benchmarks" and imported:
                    assert FLOORS[imported.partition(".")[0]] < FLOORS[name], f"{name} imports {imported}"


@pytest.mark.bench
def test_a_trace_counts_fewer_kernels_and_bytes_with_our_operators():
    from benchmarks.trace import trace
    from mghf_loss import MGHFLoss

    criterion = MGHFLoss()
    ours, plain = (trace(criterion, 2, 32, operators) for operators in (True, False))
    # three levels of two couplings: two launches each; a Haar step of GT; a linear level of SR, forward and backward
    assert ours.kernels["coupling"] == 12
    assert ours.kernels["linear_level"] == 6
    assert ours.kernels["linear_level_transpose"] == 3
    assert ours.kernels["_convolution"] == 0 < plain.kernels["_convolution"]
    assert ours.kernels.total() <= 150 < plain.kernels.total()  # the goal
    assert ours.bytes.total() < 0.5 * plain.bytes.total()
