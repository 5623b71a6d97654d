"""The examples, run as a user would, on small settings; what they print agrees with the losses by hand."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from mghf_loss import MGHFLoss
from mghf_loss.demo import SmallSR, downscale

EXAMPLES = Path(__file__).parents[1] / "examples"
SMALL = ["--steps", "2", "--batch", "2"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
LAUNCH = [sys.executable, "-m", "accelerate.commands.launch", "--num_machines", "1", "--dynamo_backend", "no"]


def run(*command: str, **environment: str) -> str:
    finished = subprocess.run(
        command, env={**ENVIRONMENT, **environment}, capture_output=True, text=True, check=False, timeout=300
    )
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


def example(name: str, *arguments: str) -> str:
    return run(sys.executable, str(EXAMPLES / f"{name}.py"), *SMALL, *arguments)


def figures(output: str, name: str) -> list[float]:
    return [float(value) for value in re.findall(rf"\b{name} (-?[\d.e-]+)", output)]


@pytest.fixture
def by_hand() -> float:
    """The first loss of the bare loop, written without it."""
    sys.path.insert(0, str(EXAMPLES))
    from crops import RandomCrops

    crops = RandomCrops(None, 2)
    gt = torch.stack([crops[0], crops[1]])
    torch.manual_seed(0)
    sr = SmallSR()(downscale(gt))
    return (F.l1_loss(sr, gt) + 0.05 * MGHFLoss()(sr, gt, generator=torch.Generator().manual_seed(0))).item()


def test_the_bare_loop_and_accelerate_have_the_loss_by_hand(by_hand):
    bare, prepared = example("bare_loop"), example("accelerate_loop")
    assert figures(bare, "loss")[0] == pytest.approx(by_hand, abs=2e-6)
    assert figures(prepared, "loss") == figures(bare, "loss")
    assert all(len(figures(bare, term)) == 2 for term in ("content", "style", "correlation", "patch_nce"))


def test_accelerate_with_two_processes_accumulates_in_bfloat16(image_folder):
    options = [*SMALL, "--accumulate", "2", "--images", str(image_folder)]
    for image in image_folder.glob("nested/*"):  # crops are 64 x 64
        from PIL import Image

        Image.open(image).resize((96, 80)).save(image)
    launch = [*LAUNCH, "--multi_gpu", "--num_processes", "2", "--mixed_precision", "bf16"]
    output = run(*launch, str(EXAMPLES / "accelerate_loop.py"), *options, ACCELERATE_USE_CPU="true")
    losses = figures(output, "loss")
    assert len(losses) == 2  # the first and the last of four batches, printed by one process
    assert all(0 < loss < 10 for loss in losses)


def test_the_gan_step_logs_every_term_and_computes_a_ground_truth_once():
    output = example("gan_step")
    for name in ("pixel", "mghf", "mghf_half", "critic"):
        assert len(figures(output, name)) == 2
        assert all(0 < value < 10 for value in figures(output, name))


def test_the_one_step_student_learns_alike_with_less_memory():
    few = ["--autoencoder-steps", "3"]
    low, normal = (example("one_step_diffusion", "--memory", memory, *few) for memory in ("low", "normal"))
    assert low == normal
    assert len(figures(low, "mghf")) == 2


# Dynamo looks at .grad of the loss where it goes on after the backward pass.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
def test_a_compiled_training_step_has_the_values_of_an_eager_one():
    """Model, loss, backward and all: the whole step is what a user compiles."""
    torch.compiler.reset()
    gt = torch.rand(2, 3, 32, 32)
    criterion = MGHFLoss({"patch_nce": 0})  # random places differ under a compiler

    def losses(compiled: bool) -> list[float]:
        torch.manual_seed(0)
        model = SmallSR(width=8, blocks=1)
        optimiser = torch.optim.SGD(model.parameters(), lr=0.01)

        def step(gt: torch.Tensor) -> torch.Tensor:
            sr = model(downscale(gt))
            loss = F.l1_loss(sr, gt) + 0.05 * criterion(sr, gt)
            loss.backward()
            return loss.detach()

        step = torch.compile(step, backend="aot_eager") if compiled else step
        values = []
        for _ in range(3):
            optimiser.zero_grad()
            values.append(step(gt).item())
            optimiser.step()
        return values

    eager = losses(compiled=False)
    assert losses(compiled=True) == pytest.approx(eager, rel=1e-4)
    assert eager[2] < eager[0]
