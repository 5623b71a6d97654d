"""The examples, run as a user would, on small settings; what they print agrees with the losses by hand."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import DataLoader

from mghf_loss import HighFrequencyINN, MGHFLoss
from mghf_loss.toy import SmallSR, downscale, upscale

pytestmark = pytest.mark.train

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
def module(monkeypatch):
    """An example as a module, to run its `main` in this process."""
    monkeypatch.syspath_prepend(EXAMPLES)
    return importlib.import_module


@pytest.fixture
def main(module, monkeypatch, capsys):
    """Run an example's `main`, return what it prints."""

    def main(name: str, *arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", [name, *SMALL, *arguments])
        module(name).main()
        return capsys.readouterr().out

    return main


def test_the_bare_loop_and_accelerate_have_the_loss_by_hand(module):
    crops = module("crops").RandomCrops(None, 2)
    gt = torch.stack([crops[0], crops[1]])
    torch.manual_seed(0)
    sr = SmallSR()(downscale(gt))
    by_hand = F.l1_loss(sr, gt) + 0.05 * MGHFLoss()(sr, gt, generator=torch.Generator().manual_seed(0))
    bare, prepared = example("bare_loop"), example("accelerate_loop")
    assert figures(bare, "loss")[0] == pytest.approx(by_hand.item(), abs=2e-6)
    assert figures(prepared, "loss") == figures(bare, "loss")
    assert all(len(figures(bare, term)) == 2 for term, factor in MGHFLoss().coefficients.items() if factor)


def test_accelerate_with_two_processes_has_the_losses_by_hand(module, image_folder):
    """Gradients averaged over processes and accumulated batches, bfloat16 in the model alone."""
    for path in image_folder.glob("nested/*"):  # crops are 64 x 64
        Image.open(path).resize((96, 80)).save(path)
    launch = [*LAUNCH, "--multi_gpu", "--num_processes", "2", "--mixed_precision", "bf16"]
    options = [*SMALL, "--accumulate", "2", "--images", str(image_folder)]
    output = run(*launch, str(EXAMPLES / "accelerate_loop.py"), *options, ACCELERATE_USE_CPU="true")

    crops = module("crops").RandomCrops(image_folder, 16)
    torch.manual_seed(0)
    model, criterion = SmallSR(), MGHFLoss()
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-3)
    places, means = [torch.Generator().manual_seed(process) for process in range(2)], []
    for index in range(4):
        losses = []
        for process in range(2):
            first = 2 * (2 * index + process)  # batches go round
            gt = torch.stack([crops[first], crops[first + 1]])
            with torch.autocast("cpu", torch.bfloat16):
                sr = model(downscale(gt))
            loss = F.l1_loss(sr.float(), gt) + 0.05 * criterion(sr.float(), gt, generator=places[process])
            (loss / 4).backward()
            losses.append(loss.item())
        means.append(sum(losses) / 2)
        if index % 2:
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.2)
            optimiser.step()
            optimiser.zero_grad()
    # The first and the last of four batches, printed by one process.
    assert figures(output, "loss") == pytest.approx([means[0], means[3]], rel=1e-4)


def test_the_gan_step_has_the_losses_by_hand_and_computes_a_ground_truth_once(module, main, monkeypatch):
    example, passes = module("gan_step"), []
    for name in ("features", "conditioning", "difference"):  # the last two with GT conditioning
        method = getattr(HighFrequencyINN, name)

        def counted(self, image, *arguments, method=method, **options):
            passes.append(image)
            return method(self, image, *arguments, **options)

        monkeypatch.setattr(HighFrequencyINN, name, counted)
    output = main("gan_step")
    assert len(passes) == 2 * 3  # a step: GT once, SR, SR of the first half

    crops, places = module("crops").RandomCrops(None, 4), torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    generator, discriminator, criterion = example.Generator(), example.critic(), MGHFLoss()
    g_optimiser = torch.optim.Adam(generator.parameters(), lr=5e-4)
    d_optimiser = torch.optim.Adam(discriminator.parameters(), lr=2e-4, betas=(0.0, 0.9))
    for step in range(2):
        gt = torch.stack([crops[2 * step], crops[2 * step + 1]])
        sr, half = generator(downscale(gt))
        pixel, adversarial = F.l1_loss(sr, gt), -0.005 * discriminator(sr).mean()
        mghf = 0.05 * criterion(sr, gt, generator=places)
        mghf_half = 0.01 * criterion(half, gt, generator=places)
        g_optimiser.zero_grad()
        (pixel + mghf + mghf_half + adversarial).backward()
        torch.nn.utils.clip_grad_norm_(generator.parameters(), 0.2)
        g_optimiser.step()
        critic = F.relu(1 - discriminator(gt)).mean() + F.relu(1 + discriminator(sr.detach())).mean()
        d_optimiser.zero_grad()
        critic.backward()
        d_optimiser.step()
        expected = {"pixel": pixel, "mghf": mghf, "mghf_half": mghf_half, "adversarial": adversarial, "critic": critic}
        for name, value in expected.items():
            assert figures(output, name)[step] == pytest.approx(value.item(), rel=1e-3, abs=2e-5), (name, step)


def test_the_one_step_student_has_the_losses_by_hand_through_a_frozen_decoder(module, main, monkeypatch):
    example, built, trained = module("one_step_diffusion"), [], []
    train, crops = example.train_autoencoder, module("crops").RandomCrops
    monkeypatch.setattr(example, "MGHFLoss", lambda **options: built.append(options) or MGHFLoss(**options))
    monkeypatch.setattr(example, "train_autoencoder", lambda *given: trained.append(train(*given)) or trained[-1])
    few = ["--autoencoder-steps", "3"]
    low, normal = main("one_step_diffusion", *few), main("one_step_diffusion", *few, "--memory", "normal")
    for name in ("latent", "mghf"):
        assert figures(low, name) == pytest.approx(figures(normal, name), rel=1e-4)
    assert [options["memory"] for options in built] == ["low", "normal"]

    torch.manual_seed(0)
    autoencoder = train(DataLoader(crops(None, 6, seed=1), 2), "cpu")
    for parameter, after in zip(autoencoder.parameters(), trained[0].parameters(), strict=True):
        assert torch.equal(parameter, after)  # the student's training leaves it as it was
        assert not after.requires_grad
        assert torch.equal(parameter.grad, after.grad)  # of its own training
    student = torch.nn.Sequential(*example.convolutions(16, 64, 64, 8))
    criterion, places = MGHFLoss(input_range=(-1, 1)), torch.Generator().manual_seed(0)
    optimiser = torch.optim.Adam(student.parameters(), lr=1e-3)
    for step, batch in enumerate(DataLoader(crops(None, 4), 2)):
        gt = 2 * batch - 1
        condition = autoencoder.encode(upscale(downscale(gt)))
        start = condition + 0.3 * torch.randn_like(condition)
        z = start - student(torch.cat((start, condition), 1))
        latent, mghf = F.mse_loss(z, autoencoder.encode(gt)), criterion(autoencoder.decode(z), gt, generator=places)
        assert figures(low, "latent")[step] == pytest.approx(latent.item(), abs=2e-5)
        assert figures(low, "mghf")[step] == pytest.approx(mghf.item(), rel=1e-4)
        optimiser.zero_grad()
        (latent + 0.05 * mghf).backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 0.2)
        optimiser.step()


# Dynamo looks at .grad of the loss where it goes on after the backward pass.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
def test_a_compiled_training_step_has_the_values_of_an_eager_one():
    """Model, loss, backward pass and optimiser: the whole step is what a user compiles."""
    torch.compiler.reset()
    gt = torch.rand(2, 3, 32, 32)
    criterion = MGHFLoss(coefficients={"patch_nce": 0.008})

    def losses(compiled: bool) -> list[float]:
        torch.manual_seed(0)
        model = SmallSR(width=8, blocks=1)
        optimiser = torch.optim.SGD(model.parameters(), lr=0.01)

        def step(gt: torch.Tensor) -> torch.Tensor:
            sr = model(downscale(gt))
            loss = F.l1_loss(sr, gt) + 0.05 * criterion(sr, gt)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            return loss.detach()

        step = torch.compile(step, backend="aot_eager") if compiled else step
        return [step(gt).item() for _ in range(3)]

    eager = losses(compiled=False)
    assert losses(compiled=True) == pytest.approx(eager, rel=1e-4)
    assert eager[2] < eager[0]
