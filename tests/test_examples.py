"""The examples, run as a user would, on small settings; what they print agrees with the losses by hand."""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import DataLoader

from mghf_loss import HighFrequencyINN, MGHFLoss
from mghf_loss.toy import Crops, SmallSR, downscale, upscale

pytestmark = pytest.mark.train

EXAMPLES = Path(__file__).parents[1] / "examples"
SMALL = ["--steps", "2", "--batch", "2"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
LAUNCH = [sys.executable, "-m", "accelerate.commands.launch", "--num_machines", "1", "--dynamo_backend", "no"]


def run(*command: str, folder: Path, **environment: str) -> str:
    finished = subprocess.run(
        command, cwd=folder, env={**ENVIRONMENT, **environment}, capture_output=True, text=True, timeout=600
    )
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


def figures(output: str, name: str) -> list[float]:
    return [float(value) for value in re.findall(rf"\b{name} (-?[\d.e-]+)", output)]


def picture(path: Path) -> np.ndarray:
    """Pixels of the picture that an example wrote: three images side by side."""
    pixels = np.asarray(Image.open(path).convert("RGB"))
    assert pixels.shape[1] > 2.5 * pixels.shape[0]
    assert pixels.std() > 20
    return pixels


@pytest.fixture
def module(monkeypatch):
    """An example as a module, to run its `main` in this process."""
    monkeypatch.syspath_prepend(EXAMPLES)
    return importlib.import_module


@pytest.fixture
def main(module, monkeypatch, capsys, tmp_path):
    """Run an example's `main` in a folder of its own, return what it prints."""

    def main(name: str, *arguments: str) -> str:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [name, *SMALL, *arguments])
        module(name).main()
        return capsys.readouterr().out

    return main


def test_the_bare_loop_and_accelerate_have_the_loss_by_hand(main, tmp_path):
    crops = Crops(None, 2)
    gt = torch.stack([crops[0], crops[1]])
    torch.manual_seed(0)
    sr = SmallSR()(downscale(gt))
    by_hand = F.l1_loss(sr, gt) + MGHFLoss()(sr, gt)
    bare = main("bare_loop")
    prepared = run(sys.executable, str(EXAMPLES / "accelerate_loop.py"), *SMALL, folder=tmp_path)
    assert figures(bare, "loss")[0] == pytest.approx(by_hand.item(), abs=2e-6)
    assert figures(prepared, "loss") == figures(bare, "loss")
    assert all(len(figures(bare, term)) == 2 for term, factor in MGHFLoss().coefficients.items() if factor)
    assert np.array_equal(picture(tmp_path / "bare-loop.png"), picture(tmp_path / "accelerate.png"))


def test_accelerate_with_two_processes_has_the_losses_by_hand(image_folder, tmp_path):
    """Gradients averaged over processes and accumulated batches, bfloat16 in the model alone."""
    for path in image_folder.glob("nested/*"):  # crops are 64 x 64
        Image.open(path).resize((96, 80)).save(path)
    launch = [*LAUNCH, "--multi_gpu", "--num_processes", "2", "--mixed_precision", "bf16"]
    options = [*SMALL, "--accumulate", "2", "--images", str(image_folder)]
    script = str(EXAMPLES / "accelerate_loop.py")
    output = run(*launch, script, *options, folder=tmp_path, ACCELERATE_USE_CPU="true")

    crops = Crops(image_folder, 16)
    torch.manual_seed(0)
    model, criterion = SmallSR(), MGHFLoss()
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-3)
    means = []
    for index in range(4):
        losses = []
        for process in range(2):
            first = 2 * (2 * index + process)  # batches go round
            gt = torch.stack([crops[first], crops[first + 1]])
            with torch.autocast("cpu", torch.bfloat16):
                sr = model(downscale(gt))
            loss = F.l1_loss(sr.float(), gt) + criterion(sr.float(), gt)
            (loss / 4).backward()
            losses.append(loss.item())
        means.append(sum(losses) / 2)
        if index % 2:
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.2)
            optimiser.step()
            optimiser.zero_grad()
    # The first and the last of four batches, printed by one process.
    assert figures(output, "loss") == pytest.approx([means[0], means[3]], rel=1e-4)


def test_esrgan_has_the_losses_by_hand_and_computes_a_ground_truth_once(module, main, monkeypatch, tmp_path):
    example, passes = module("esrgan"), []
    method = HighFrequencyINN.conditioning
    monkeypatch.setattr(HighFrequencyINN, "conditioning", lambda self, gt: passes.append(gt) or method(self, gt))
    output = main("esrgan")
    assert len(passes) == 2  # once a step of the second phase, for two outputs

    crops = [Crops(None, 4, seed=seed) for seed in (0, 1)]
    torch.manual_seed(0)
    generator, discriminator, criterion = SmallSR(), example.critic(), MGHFLoss("gan")
    optimiser = torch.optim.Adam(generator.parameters(), lr=1e-3)
    for batch in DataLoader(crops[0], 2):
        optimiser.zero_grad()
        F.l1_loss(generator(downscale(batch)), batch).backward()
        optimiser.step()
    g_optimiser = torch.optim.Adam(generator.parameters(), lr=2e-4)
    d_optimiser = torch.optim.Adam(discriminator.parameters(), lr=4e-4, betas=(0.0, 0.9))
    for step, gt in enumerate(DataLoader(crops[1], 2)):
        sr = generator(downscale(gt))
        real, fake = discriminator(gt).detach(), discriminator(sr)
        adversarial = 0.03 * 0.5 * (F.softplus(real.mean() - fake).mean() + F.softplus(real - fake.mean()).mean())
        pixel, mghf = F.l1_loss(sr, gt), criterion(sr, gt)
        g_optimiser.zero_grad()
        (pixel + mghf + adversarial).backward()
        torch.nn.utils.clip_grad_norm_(generator.parameters(), 0.2)
        g_optimiser.step()
        real, fake = discriminator(gt), discriminator(sr.detach())
        critic = 0.5 * (F.softplus(fake.mean() - real).mean() + F.softplus(fake - real.mean()).mean())
        d_optimiser.zero_grad()
        critic.backward()
        d_optimiser.step()
        expected = {"pixel": pixel, "mghf": mghf, "adversarial": adversarial, "critic": critic}
        for name, value in expected.items():
            assert figures(output, name)[step] == pytest.approx(value.item(), rel=1e-3, abs=2e-5), (name, step)
    assert figures(output, "mghf_average")[0] < figures(output, "mghf")[0]  # after the step
    picture(tmp_path / "esrgan.png")


def test_the_one_step_student_has_the_losses_by_hand_through_a_frozen_decoder(module, main, monkeypatch, tmp_path):
    example, built, trained = module("one_step_diffusion"), [], []
    train = example.train_autoencoder
    monkeypatch.setattr(example, "MGHFLoss", lambda **options: built.append(options) or MGHFLoss(**options))
    monkeypatch.setattr(example, "train_autoencoder", lambda *given: trained.append(train(*given)) or trained[-1])
    few = ["--autoencoder-steps", "3"]
    low, normal = main("one_step_diffusion", *few), main("one_step_diffusion", *few, "--memory", "normal")
    for name in ("latent", "mghf"):
        assert figures(low, name) == pytest.approx(figures(normal, name), rel=1e-4)
    assert [options["memory"] for options in built] == ["low", "normal"]
    picture(tmp_path / "one-step.png")

    torch.manual_seed(0)
    autoencoder = train(DataLoader(Crops(None, 6, seed=1), 2), "cpu")
    for parameter, after in zip(autoencoder.parameters(), trained[0].parameters(), strict=True):
        assert torch.equal(parameter, after)  # the student's training leaves it as it was
        assert not after.requires_grad
        assert torch.equal(parameter.grad, after.grad)  # of its own training
    student = torch.nn.Sequential(*example.convolutions(16, 64, 64, 8))
    criterion = MGHFLoss(input_range=(-1, 1))
    optimiser = torch.optim.Adam(student.parameters(), lr=1e-3)
    for step, batch in enumerate(DataLoader(Crops(None, 4), 2)):
        gt = 2 * batch - 1
        condition = autoencoder.encode(upscale(downscale(gt)))
        start = condition + 0.3 * torch.randn_like(condition)
        z = start - student(torch.cat((start, condition), 1))
        latent, mghf = F.mse_loss(z, autoencoder.encode(gt)), criterion(autoencoder.decode(z), gt)
        assert figures(low, "latent")[step] == pytest.approx(latent.item(), abs=2e-5)
        assert figures(low, "mghf")[step] == pytest.approx(mghf.item(), rel=1e-4)
        optimiser.zero_grad()
        (latent + mghf).backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 0.2)
        optimiser.step()


def test_denoising_has_the_losses_by_hand(module, main, tmp_path):
    output = main("denoise", "--noise", "15")
    torch.manual_seed(0)
    model = module("denoise").Denoiser()
    gt = next(iter(DataLoader(Crops(None, 4), 2)))  # draws a seed
    restored = model(gt + 15 / 255 * torch.randn_like(gt))
    assert figures(output, "pixel")[0] == pytest.approx(F.l1_loss(restored, gt).item(), rel=1e-4)
    assert figures(output, "mghf")[0] == pytest.approx(MGHFLoss("denoise")(restored, gt).item(), rel=1e-4)
    assert figures(output, "pixel")[1] != figures(output, "pixel")[0]
    picture(tmp_path / "denoise.png")


@pytest.mark.skipif(importlib.util.find_spec("basicsr") is None, reason="BasicSR is not installed")
def test_basicsr_trains_from_the_example_s_options(tmp_path):
    rng = np.random.default_rng(0)
    for name, size in {"gt": 48, "lq": 12, "val_gt": 48, "val_lq": 12}.items():
        (tmp_path / "datasets" / name).mkdir(parents=True)
        coarse = Image.fromarray(rng.integers(0, 256, (12, 12, 3), dtype=np.uint8))
        for index in range(2):
            coarse.resize((size, size), Image.Resampling.BICUBIC).save(tmp_path / "datasets" / name / f"{index}.png")
    small = (
        "num_gpu=0 datasets:train:gt_size=32 datasets:train:batch_size_per_gpu=2 "
        "datasets:train:num_worker_per_gpu=0 network_g:num_feat=8 network_g:num_block=1 train:total_iter=2 "
        "val:val_freq=2 logger:print_freq=1 logger:save_checkpoint_freq=2 dist_params:backend=gloo"
    )
    script, options = (str(EXAMPLES / "basicsr" / name) for name in ("train.py", "options.yml"))
    command = [sys.executable, script, "-opt", options, "--force_yml", *shlex.split(small)]
    run(*command, folder=tmp_path, CUDA_VISIBLE_DEVICES="")
    (experiment,) = (tmp_path / "experiments").iterdir()
    (log,) = experiment.glob("train_*.log")
    lines = [line for line in log.read_text().splitlines() if "l_percep:" in line]
    assert len(lines) == 2
    assert all(f"l_perceptual_{term}:" in lines[0] for term, factor in MGHFLoss().coefficients.items() if factor)
    assert len(list(experiment.glob("visualization/**/*.png"))) == 4  # two images in step 2 and at the end


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
            loss = F.l1_loss(sr, gt) + criterion(sr, gt)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            return loss.detach()

        step = torch.compile(step, backend="aot_eager") if compiled else step
        return [step(gt).item() for _ in range(3)]

    eager = losses(compiled=False)
    assert losses(compiled=True) == pytest.approx(eager, rel=1e-4)
    assert eager[2] < eager[0]
