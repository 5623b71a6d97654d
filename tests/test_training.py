"""Training the network: data, objective, resume, checkpoints written whole."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from conftest import perturbed_inn
from mghf_loss import HighFrequencyINN, INNConfig, checkpoints
from mghf_loss.training.data import RandomCrops
from mghf_loss.training.loop import STATE_FILE, TrainConfig, train_inn
from mghf_loss.training.objective import GREY_LEVEL, add_noise, bits_per_detail, objective

NETWORK = INNConfig(levels=2, hidden=8, couplings=1)


@pytest.fixture
def folder(tmp_path) -> Path:
    """Smooth random photographs-to-be, so that details are predictable to a degree."""
    rng = np.random.default_rng(0)
    images = tmp_path / "images" / "nested"
    images.mkdir(parents=True)
    for index in range(3):
        coarse = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8))
        coarse.resize((64, 48), Image.Resampling.BICUBIC).save(images / f"{index}.png")
    return tmp_path / "images"


def configuration(folder: Path, **changes) -> TrainConfig:
    options = {"steps": 6, "batch": 2, "crop": 16, "save_every": 2, "ema": 0.5, **changes}
    return TrainConfig(folder, folder.parent / "out", **options)


@pytest.mark.parametrize("variant", ["pyramid", "packet"])
def test_bits_are_the_exact_density_of_the_change_of_variables(variant):
    network = perturbed_inn(variant=variant, levels=2, hidden=4).double()
    image = torch.rand(1, 3, 8, 8, dtype=torch.double) * 2 - 1
    latent = network(image)
    bits = bits_per_detail(network, latent)
    details = latent.features if variant == "pyramid" else latent.features[-1:]
    z = torch.cat([level.flatten() for level in details])
    normal = torch.distributions.Normal(torch.zeros((), dtype=torch.double), 1.0)
    nats = -normal.log_prob(z).sum() - latent.log_det_jac.sum() - z.numel() * math.log(GREY_LEVEL)
    counts = torch.tensor([level.numel() for level in latent.features], dtype=torch.double)
    total = (bits * counts).sum() if variant == "pyramid" else bits[0, -1] * counts[-1]
    assert total.item() == pytest.approx(nats.item() / math.log(2), rel=1e-9)


def test_bits_of_pure_noise_reach_its_entropy():
    """White noise of s grey levels has log2(s sqrt(2 pi e)) bits; the right linear map must attain them."""
    network = HighFrequencyINN(INNConfig(levels=1, couplings=1, hidden=4))
    sigma = 10.0
    noise = add_noise(torch.zeros(4, 3, 64, 64), sigma)
    with torch.no_grad():
        network.levels[0].flow[0].matrix.mul_(1 / (8 * sigma * GREY_LEVEL))
    entropy = math.log2(sigma * math.sqrt(2 * math.pi * math.e))
    assert objective(network, noise).item() == pytest.approx(entropy, abs=0.02)


def test_bits_need_a_determinant():
    network = perturbed_inn()
    with pytest.raises(ValueError, match="log_det_jac"):
        bits_per_detail(network, network(torch.rand(1, 3, 8, 8), log_det_jac=False))


def test_noise_has_the_asked_standard_deviation():
    noise = add_noise(torch.zeros(1, 3, 200, 200), 6.0, torch.Generator().manual_seed(0)) / GREY_LEVEL
    assert noise.std().item() == pytest.approx(math.sqrt(36 + 1 / 12), rel=0.02)
    dequantised = add_noise(torch.zeros(1, 3, 200, 200), 0.0) / GREY_LEVEL
    assert dequantised.abs().max() <= 0.5


def test_crops_are_a_function_of_seed_and_index(folder):
    crops = RandomCrops(folder, 16, 10, seed=3)
    uncached = RandomCrops(folder, 16, 10, seed=3, cache_bytes=0)
    for index in (0, 4, 9):
        assert torch.equal(crops[index], uncached[index])
        assert crops[index].shape == (3, 16, 16)
    assert not torch.equal(crops[0], crops[1])
    assert not torch.equal(crops[0], RandomCrops(folder, 16, 10, seed=4)[0])
    assert crops[0].min() >= -1
    assert crops[0].max() <= 1
    with pytest.raises(IndexError, match="crop 10 of 10"):
        crops[10]


def test_damaged_and_small_images_are_left_out_by_name(folder):
    (folder / "broken.png").write_bytes(b"no image")
    Image.new("RGB", (8, 40)).save(folder / "small.png")
    with pytest.warns(UserWarning, match="left out") as warnings:
        crops = RandomCrops(folder, 16, 10)
    messages = " ".join(str(warning.message) for warning in warnings)
    assert "broken.png" in messages
    assert "small.png: 8 x 40 is smaller than a crop of 16" in messages
    assert len(crops.paths) == 3


def test_folders_without_images_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=f"no images .* below {tmp_path}"):
        RandomCrops(tmp_path, 16, 10)
    Image.new("RGB", (8, 8)).save(tmp_path / "small.png")
    with pytest.warns(UserWarning, match=r"small\.png"), pytest.raises(ValueError, match="at least 16 x 16"):
        RandomCrops(tmp_path, 16, 10)


def test_training_lowers_the_code_length_and_saves_a_loadable_network(folder):
    config = configuration(folder, steps=80, batch=4, learning_rate=5e-3)
    network = train_inn(config, NETWORK)
    crops = torch.stack([RandomCrops(folder, 16, 8, seed=99)[i] for i in range(8)])
    noisy = add_noise(crops, NETWORK.noise_floor, torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert objective(network, noisy) < objective(HighFrequencyINN(NETWORK), noisy) - 0.5
    loaded = HighFrequencyINN.from_pretrained(config.out)
    assert loaded.config == NETWORK
    for got, want in zip(loaded.features(crops), network.features(crops), strict=True):
        assert torch.equal(got, want)
    assert not [path.name for path in config.out.iterdir() if path.name.startswith(".")]


class KilledError(Exception):
    pass


@pytest.mark.parametrize("kill_after", [1, 3, 5])
def test_a_killed_run_resumes_to_the_same_parameters(folder, kill_after, monkeypatch):
    config = configuration(folder)
    undisturbed = train_inn(config, NETWORK)
    resumed_config = replace(config, out=folder.parent / "resumed")

    steps = 0
    step = torch.optim.Adam.step

    def dying_step(self, *args, **kwargs):
        nonlocal steps
        if steps == kill_after:
            raise KilledError
        steps += 1
        return step(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.Adam, "step", dying_step)
        with pytest.raises(KilledError):
            train_inn(resumed_config, NETWORK)
    resumed = train_inn(resumed_config, NETWORK)
    for got, want in zip(resumed.parameters(), undisturbed.parameters(), strict=True):
        assert torch.equal(got, want)


def test_a_state_of_another_run_is_refused(folder):
    config = configuration(folder, steps=2)
    train_inn(config, NETWORK)
    with pytest.raises(ValueError, match=r"another run \(different: batch, hidden\)"):
        train_inn(replace(config, batch=1), replace(NETWORK, hidden=4))


def test_a_damaged_state_is_an_error_and_left_alone(folder):
    config = configuration(folder, steps=2)
    train_inn(config, NETWORK)
    state = config.out / STATE_FILE
    state.write_bytes(state.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"cannot resume from .* delete it to start anew"):
        train_inn(config, NETWORK)
    assert state.stat().st_size == 1000


def test_a_crop_that_the_levels_do_not_divide_is_refused(folder):
    with pytest.raises(ValueError, match=r"crop must be a multiple of 2\^levels = 4, got 18"):
        train_inn(configuration(folder, crop=18), NETWORK)


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
