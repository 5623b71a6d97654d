"""Every example as a user runs it; trainers against the bare loop; a compiled training step."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from mghf_loss import MGHFLoss

EXAMPLES = Path(__file__).parents[1] / "examples"
SMALL = ["--steps", "2", "--batch", "2", "--crop", "32"]
TERMS = ["content", "style", "correlation", "patch_nce"]


def run(folder: Path, *command: str, **environment: str) -> str:
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", **environment}
    done = subprocess.run(
        [sys.executable, *command], cwd=folder, env=variables, text=True, capture_output=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def steps(output: str) -> list[dict[str, float]]:
    rows = [line.split()[2:] for line in output.splitlines() if line.startswith("step ")]
    return [{name: float(value) for name, value in (pair.split("=") for pair in row)} for row in rows]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def example(name: str) -> str:
    return str(EXAMPLES / f"{name}.py")


@pytest.mark.parametrize(
    ("name", "columns"),
    [
        ("bare_loop", ["loss", "mghf", *TERMS]),
        ("gan_step", ["loss_g", "mghf", "adversarial", "loss_d"]),
        ("one_step_diffusion", ["loss", "latent", "mghf"]),
    ],
)
def test_an_example_runs_on_a_folder_of_images(name, columns, image_folder, tmp_path):
    rows = steps(run(tmp_path, "-W", "error", example(name), *SMALL, "--images", str(image_folder)))
    assert [list(row) for row in rows] == [columns] * 2
    assert all(0 < value < 1000 for row in rows for value in row.values())


def test_examples_are_complete():
    """A new one needs a test."""
    names = {path.stem for path in EXAMPLES.glob("*.py")}
    assert names == {"toy", "bare_loop", "gan_step", "one_step_diffusion", "accelerate_loop", "lightning_trainer"}


def test_accelerate_with_two_processes_computes_what_the_bare_loop_does(tmp_path):
    """Two images a process against four: the same losses, the same network after a step."""
    launch = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"]
    launch += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", str(free_port())]
    together = run(tmp_path, *launch, example("accelerate_loop"), *SMALL, ACCELERATE_USE_CPU="true")
    alone = run(tmp_path, example("bare_loop"), *SMALL, "--batch", "4")
    got, expected = steps(together), steps(alone)
    assert len(got) == len(expected) == 2
    for one, other in zip(got, expected, strict=True):
        assert one == pytest.approx(other, rel=1e-4)


def test_a_compiled_training_step_trains_as_the_eager_one(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    from toy import SmallSR

    criterion = MGHFLoss({"patch_nce": 0.0}, memory="low", cache_gt=True)
    torch._dynamo.reset()

    def train(compiled: bool) -> tuple[list[float], list[torch.Tensor]]:
        torch.manual_seed(0)
        model = SmallSR(8)
        optimiser = torch.optim.Adam(model.parameters(), lr=1e-3)

        def step(lr: torch.Tensor, gt: torch.Tensor) -> torch.Tensor:
            sr = model(lr)
            return F.l1_loss(sr, gt) + 0.05 * criterion(sr, gt)

        step = torch.compile(step, fullgraph=True, backend="aot_eager") if compiled else step
        losses = []
        for _ in range(3):
            gt = torch.rand(2, 3, 32, 32)
            loss = step(F.avg_pool2d(gt, 4), gt)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            losses.append(loss.item())
        return losses, [parameter.detach() for parameter in model.parameters()]

    (got, got_parameters), (expected, expected_parameters) = train(True), train(False)
    assert got == pytest.approx(expected, rel=1e-4)
    for one, other in zip(got_parameters, expected_parameters, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


def test_lightning_example_runs_with_bf16_and_accumulation(tmp_path):
    pytest.importorskip("lightning")
    from test_integrations import read

    run(tmp_path, example("lightning_trainer"), *SMALL, "--out", "runs")
    (folder,) = (tmp_path / "runs" / "lightning_logs").iterdir()
    (checkpoint,) = folder.rglob("*.ckpt")
    state = torch.load(checkpoint, weights_only=True)
    assert state["global_step"] == 2  # of two batches each
    assert all(key.startswith("model.") for key in state["state_dict"])
    tags = read(folder).Tags()
    assert {f"train/{name}" for name in ["loss", *TERMS]} <= set(tags["scalars"])
    for stage in ("train", "val"):
        assert {f"mghf/{stage}/term/{name}" for name in TERMS} <= set(tags["scalars"])
        assert f"mghf/{stage}/energy/level3_sr" in tags["scalars"]
        assert {f"mghf/{stage}/heatmap/{name}" for name in [*TERMS, "total"]} <= set(tags["images"])


def test_a_docstring_shows_how_every_example_is_run():
    for path in EXAMPLES.glob("*.py"):
        if path.stem != "toy":
            assert re.search(rf"^ *(python|accelerate launch) examples/{path.name}", path.read_text(), re.MULTILINE)
