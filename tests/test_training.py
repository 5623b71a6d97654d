"""Training the network: objective, resume after a kill, several processes, checkpoints written whole."""

from __future__ import annotations

import math
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from conftest import perturbed_inn
from mghf_loss import HighFrequencyINN, INNConfig, checkpoints
from mghf_loss._files import LOCK_FILE
from mghf_loss.coupling import Bottleneck
from mghf_loss.training.data import Cropping, FolderCrops, list_images, slot_seed
from mghf_loss.training.loop import SAMPLES_FILE, STATE_FILE, TrainConfig, train_inn
from mghf_loss.training.objective import GREY_LEVEL, add_noise, bits_per_detail, code_length

pytestmark = pytest.mark.train

NETWORK = INNConfig(levels=2, hidden=8, couplings=1)
SMALL = ["--crop", "16", "--batch", "2", "--levels", "2", "--hidden", "8", "--couplings", "1", "--cpu"]


def configuration(folder: Path, **changes) -> TrainConfig:
    options = {"steps": 6, "batch": 2, "crop": 16, "save_every": 2, "ema": 0.5, **changes}
    return TrainConfig(folder, folder.parent / "out", **options)


def train(config: TrainConfig, network: INNConfig = NETWORK) -> HighFrequencyINN:
    return train_inn(config, network, cpu=True)


def bits(network: HighFrequencyINN, image: torch.Tensor) -> float:
    return bits_per_detail(network(image), network.config.variant).mean().item()


@pytest.mark.parametrize("variant", ["pyramid", "packet"])
def test_bits_are_the_exact_density_of_the_change_of_variables(variant):
    network = perturbed_inn(variant=variant, levels=2, hidden=4).double()
    image = torch.rand(1, 3, 8, 8, dtype=torch.double) * 2 - 1
    latent = network(image)
    per_level = bits_per_detail(latent, variant)
    details = latent.features if variant == "pyramid" else latent.features[-1:]
    z = torch.cat([level.flatten() for level in details])
    normal = torch.distributions.Normal(torch.zeros((), dtype=torch.double), 1.0)
    nats = -normal.log_prob(z).sum() - latent.log_det_jac.sum() - z.numel() * math.log(GREY_LEVEL)
    counts = torch.tensor([level.numel() for level in latent.features], dtype=torch.double)
    total = (per_level * counts).sum() if variant == "pyramid" else per_level[0, -1] * counts[-1]
    assert total.item() == pytest.approx(nats.item() / math.log(2), rel=1e-9)
    assert code_length(latent, variant).item() == pytest.approx(nats.item() / math.log(2) / z.numel(), rel=1e-9)


def test_bits_of_pure_noise_reach_its_entropy():
    """White noise of s grey levels has log2(s sqrt(2 pi e)) bits; the right linear map must attain them."""
    network = HighFrequencyINN(INNConfig(levels=1, couplings=1, hidden=4))
    sigma = 10.0
    noise = add_noise(torch.zeros(4, 3, 64, 64), sigma)
    with torch.no_grad():
        network.levels[0].flow[0].matrix.mul_(1 / (8 * sigma * GREY_LEVEL))
    entropy = math.log2(sigma * math.sqrt(2 * math.pi * math.e))
    assert bits(network, noise) == pytest.approx(entropy, abs=0.02)


def test_bits_need_a_determinant():
    latent = perturbed_inn()(torch.rand(1, 3, 8, 8), log_det_jac=False)
    with pytest.raises(ValueError, match="log_det_jac"):
        bits_per_detail(latent, "pyramid")


def test_noise_has_the_asked_standard_deviation():
    noise = add_noise(torch.zeros(1, 3, 200, 200), 6.0, torch.Generator().manual_seed(0)) / GREY_LEVEL
    assert noise.std().item() == pytest.approx(math.sqrt(36 + 1 / 12), rel=0.02)
    dequantised = add_noise(torch.zeros(1, 3, 200, 200), 0.0) / GREY_LEVEL
    assert dequantised.abs().max() <= 0.5


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_training_lowers_the_code_length_and_saves_a_loadable_network(image_folder, precision):
    config = configuration(image_folder, steps=80, batch=4, learning_rate=5e-3, precision=precision)
    _reset_accelerate()
    network = train(config)
    crops = FolderCrops(list_images(image_folder), Cropping(16, seed=99))
    images = torch.stack([crops.crop(slot) for slot in range(8)])
    noisy = add_noise(images, NETWORK.noise_floor, torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert bits(network, noisy) < bits(HighFrequencyINN(NETWORK), noisy) - 0.5
        assert (network.inverse(network(images)) - images).abs().max() < 1e-5  # nothing is left in bfloat16
    loaded = HighFrequencyINN.from_pretrained(config.out)
    assert loaded.config == NETWORK
    for got, want in zip(loaded.features(images), network.features(images), strict=True):
        assert torch.equal(got, want)
    assert not [path.name for path in config.out.iterdir() if path.name.startswith(".")]
    _reset_accelerate()


def _reset_accelerate() -> None:
    """Accelerate keeps one precision a process."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)


def test_bfloat16_is_for_conditioners_in_training_only():
    network = perturbed_inn()
    image = torch.rand(1, 3, 16, 16)
    exact = network.features(image)
    for module in network.modules():
        if isinstance(module, Bottleneck):
            module.training_dtype = torch.bfloat16
    rounded = network.features(image)
    assert all(level.dtype == torch.float32 for level in rounded)
    assert any(not torch.equal(a, b) for a, b in zip(rounded, exact, strict=True))
    torch.testing.assert_close(rounded, exact, rtol=0.05, atol=0.05)
    assert all(torch.equal(a, b) for a, b in zip(network.eval().features(image), exact, strict=True))


def test_held_out_images_are_evaluated_logged_and_drawn(image_folder, capsys):
    config = configuration(image_folder, held_out=1, tensorboard=True, steps=4)
    train(config)
    lines = [line for line in capsys.readouterr().out.splitlines() if "held-out" in line]
    assert len(lines) == 2
    numbers = r"[\d.]+ bits per detail value, lower is better \(stride 2: [\d.]+"
    assert re.match(rf"step 4: held-out {numbers}", lines[1])
    with Image.open(config.out / SAMPLES_FILE) as sheet:
        assert sheet.size == (256, 512)
    logged = b"".join(path.read_bytes() for path in (config.out / "logs").rglob("events*"))
    for tag in (b"train/bits", b"train/learning_rate", b"train/gradient_norm", b"held-out/bits", b"sampled details"):
        assert tag in logged


def test_skipped_images_are_counted_at_the_end(image_folder, capsys):
    (image_folder / "broken.png").write_bytes(b"no image")
    with pytest.warns(UserWarning, match=r"skipped image .*broken\.png"):
        train(configuration(image_folder, steps=1))
    assert "1 images were skipped: " in capsys.readouterr().out


class KilledError(Exception):
    pass


@pytest.mark.parametrize("stream", [False, True])
def test_an_interrupted_run_resumes_to_the_same_parameters(image_folder, stream, monkeypatch):
    """From a folder, and from a data set, of which what was consumed is passed over; between two saves."""
    config = configuration(image_folder, steps=5)
    if stream:
        options = {"dataset": str(image_folder / "nested"), "streaming": True, "dead_leaves": 0.3, "held_out": 1}
        config = replace(config, images=None, **options)
    undisturbed = train(config)
    resumed_config = replace(config, out=config.out.parent / "resumed")
    steps = 0
    step = torch.optim.Adam.step

    def dying_step(self, *args, **kwargs):
        nonlocal steps
        if steps == 3:
            raise KilledError
        steps += 1
        return step(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.Adam, "step", dying_step)
        with pytest.raises(KilledError):
            train(resumed_config)
    resumed = train(resumed_config)
    for got, want in zip(resumed.parameters(), undisturbed.parameters(), strict=True):
        assert torch.equal(got, want)


@pytest.mark.process
def test_stopped_processes_are_one_line_free_their_folder_and_resume_to_the_same_parameters(image_folder, tmp_path):
    """Ctrl-C, then SIGKILL, whenever they come; in PyTorch's deterministic mode."""
    program = (
        "import sys, torch; torch.use_deterministic_algorithms(True); torch.set_num_threads(1);"
        "from mghf_loss.cli import main; sys.exit(main())"
    )
    config = configuration(image_folder, steps=150, save_every=7)
    undisturbed, stopped = config.out, tmp_path / "stopped"
    options = ["--out", str(stopped), "--steps", "150", "--save-every", "7", "--ema", "0.5"]
    command = [sys.executable, "-c", program, "train-inn", "--images", str(image_folder), *SMALL, *options]
    train(config)

    def step() -> int:
        return torch.load(stopped / STATE_FILE, weights_only=True)["step"] if (stopped / STATE_FILE).exists() else 0

    for number, code in ((signal.SIGINT, 130), (signal.SIGKILL, -signal.SIGKILL)):
        before = step()
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
            while step() == before:
                assert process.poll() is None
                time.sleep(0.01)
            with pytest.raises(OSError, match=f"{stopped} is in use by another run"):
                train(replace(config, out=stopped))
            process.send_signal(number)
            _, errors = process.communicate()
        assert process.returncode == code
        assert "Traceback" not in errors
        if code == 130:
            assert errors.endswith("\nmghf-loss: interrupted; the same command resumes from the last checkpoint\n")
        assert step() < 150
    train(replace(config, out=stopped))
    for name in (checkpoints.MODEL_FILE, checkpoints.CONFIG_FILE):
        assert (stopped / name).read_bytes() == (undisturbed / name).read_bytes()


def test_a_network_that_was_lost_after_the_run_is_written_again(image_folder):
    config = configuration(image_folder, steps=2)
    trained = train(config)
    (config.out / checkpoints.MODEL_FILE).unlink()
    train(config)
    again = HighFrequencyINN.from_pretrained(config.out)
    for got, want in zip(again.parameters(), trained.parameters(), strict=True):
        assert torch.equal(got, want)


def test_two_processes_train_one_checkpoint(image_folder):
    """Through `accelerate launch`: together they see the crops that one process sees, and average gradients.

    Only the first one's folder exists for the resumption: as on nodes that do not see its disk.
    """
    (image_folder / "z-broken.png").write_bytes(b"no image")
    one = configuration(image_folder, steps=5, batch=4, save_every=5, held_out=1)
    with pytest.warns(UserWarning, match=r"z-broken\.png"):
        train(one)
    out = image_folder.parent / "two"
    program = image_folder.parent / "train.py"
    program.write_text(
        "import os, sys, torch; torch.set_num_threads(1)\n"
        "from mghf_loss.cli import main\n"
        "out = sys.argv.index('--out') + 1\n"
        "sys.argv[out] += '' if os.environ['RANK'] == '0' else '-elsewhere'\n"
        "if '--stop' in sys.argv:\n"
        "    sys.argv.remove('--stop')\n"
        "    step, count = torch.optim.Adam.step, [0]\n"
        "    def stopping(*args, **kwargs):\n"
        "        count[0] += 1\n"
        "        if count[0] > 3: os._exit(9)\n"
        "        return step(*args, **kwargs)\n"
        "    torch.optim.Adam.step = stopping\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    launch += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", str(program)]
    options = ["--out", str(out), "--steps", "5", "--save-every", "2", "--ema", "0.5", "--held-out", "1"]
    arguments = ["train-inn", "--images", str(image_folder), *SMALL, "--batch", "4", *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    stopped = subprocess.run([*launch, *arguments, "--stop"], capture_output=True, text=True, env=environment)
    assert stopped.returncode != 0
    assert torch.load(out / STATE_FILE, weights_only=True)["step"] == 2
    done = subprocess.run([*launch, *arguments], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("UserWarning: skipped image") == 2  # there were two processes
    assert done.stdout.count("step 5: held-out") == done.stdout.count("wrote ") == 1  # of which one speaks
    assert "1 images were skipped" in done.stdout
    assert not (image_folder.parent / "two-elsewhere").exists()
    saved = sorted(path.name for path in out.iterdir())
    assert saved == ["README.md", "config.json", "model.safetensors", SAMPLES_FILE, STATE_FILE, LOCK_FILE]
    together, alone = HighFrequencyINN.from_pretrained(out), HighFrequencyINN.from_pretrained(one.out)
    assert together.config == alone.config
    for got, want in zip(together.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)


def test_noise_and_crop_of_a_slot_are_independent():
    seeds = {slot_seed(purpose, seed, slot) for purpose in ("crop", "noise") for seed in (0, 1) for slot in range(1000)}
    assert len(seeds) == 4000
    assert max(seeds) < 2**32  # more bits of a seed the CPU generator ignores
    drawn = [torch.randn(100, generator=torch.Generator().manual_seed(seed)) for seed in sorted(seeds)[:200]]
    correlation = torch.corrcoef(torch.stack(drawn)).fill_diagonal_(0)
    assert correlation.abs().max() < 0.6


def test_a_folder_that_changed_is_another_run(image_folder):
    config = configuration(image_folder, steps=2)
    train(config)
    train(config)  # nothing changed: nothing to do
    Image.new("RGB", (40, 40)).save(image_folder / "new.png")
    with pytest.raises(ValueError, match=r"another run \(different: files\)"):
        train(config)


def test_a_folder_that_holds_the_output_does_not_train_on_it(image_folder):
    config = replace(configuration(image_folder, steps=2, held_out=1), out=image_folder / "out")
    train(config)
    assert (config.out / SAMPLES_FILE).exists()
    train(config)


def test_a_gradient_that_is_not_finite_names_step_and_rate(image_folder, monkeypatch):
    monkeypatch.setattr("mghf_loss.training.loop.bits_per_detail", lambda latent, _: latent.features[0] * math.nan)
    with pytest.raises(RuntimeError, match=r"step 0: the gradient is not finite; lower the learning rate \(0\.002\)"):
        train(configuration(image_folder))


def test_held_out_images_that_cannot_be_used_are_named(image_folder, tmp_path):
    validation = tmp_path / "validation"
    validation.mkdir()
    Image.new("RGB", (3, 40)).save(validation / "strip.png")
    config = configuration(image_folder, validation=validation, steps=1)
    with pytest.warns(UserWarning, match=r"strip\.png"), pytest.raises(ValueError, match="none of the 1 held-out"):
        train(config)


def test_a_state_of_another_run_is_refused(image_folder):
    config = configuration(image_folder, steps=2)
    train(config)
    with pytest.raises(ValueError, match=r"another run \(different: batch, hidden\)"):
        train(replace(config, batch=1), replace(NETWORK, hidden=4))


def test_what_does_not_change_the_parameters_may_differ(image_folder):
    config = configuration(image_folder, steps=2)
    want = train(config)
    moved = replace(config, save_every=5, threads=0, validation=image_folder, precision="no")
    for got, parameter in zip(train(moved).parameters(), want.parameters(), strict=True):
        assert torch.equal(got, parameter)


def test_a_damaged_state_is_an_error_and_left_alone(image_folder):
    config = configuration(image_folder, steps=2)
    train(config)
    state = config.out / STATE_FILE
    state.write_bytes(state.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"cannot resume from .* delete it to start anew"):
        train(config)
    assert state.stat().st_size == 1000


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"crop": 18}, r"crop must be a multiple of 2\^levels = 4, got 18"),
        ({"dataset": "x"}, "either images or dataset"),
        ({"streaming": True}, "streaming needs a dataset"),
        ({"validation": Path("x"), "held_out": 1}, "give validation or held_out"),
        ({"ema": 1.0}, "ema must be a number of at least 0 and below 1, got 1"),
        ({"held_out": -1}, "held_out must be an integer of at least 0, got -1"),
        ({"precision": "fp16"}, "precision must be one of .*, got 'fp16'"),
        ({"least_scale": 2.0}, "least_scale must be"),
        ({"steps": True}, "steps must be an integer of at least 1, got True"),
        ({"learning_rate": "2e-3"}, "learning_rate must be .*got '2e-3'; YAML"),
        ({"seed": 2**32}, "seed must be an integer of at least 0 and at most 4294967295, got 4294967296"),
    ],
)
def test_bad_options_are_refused(image_folder, options, message):
    with pytest.raises(ValueError, match=message):
        train(configuration(image_folder, **options))
    assert not (image_folder.parent / "out").exists()


def test_a_kill_while_writing_leaves_the_old_file(tmp_path):
    path = tmp_path / "file.txt"
    path.write_text("old")

    def half(temporary: Path) -> None:
        temporary.write_text("ha")
        raise KilledError

    with pytest.raises(KilledError):
        checkpoints.write_atomically(path, half)
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["file.txt"]


def test_the_average_forgets_its_start_early(image_folder):
    """With a decay of 0.999 an average of 60 steps would still be the initialisation without a warm-up."""
    config = configuration(image_folder, steps=60, ema=0.999, learning_rate=5e-3)
    averaged = train(config)
    state = torch.load(config.out / STATE_FILE, weights_only=True)
    torch.manual_seed(config.seed)
    start = HighFrequencyINN(NETWORK).state_dict()
    gap = np.mean([float((averaged.state_dict()[k] - v).norm()) for k, v in state["network"].items()])
    way = np.mean([float((start[k] - v).norm()) for k, v in state["network"].items()])
    assert gap < 0.5 * way
