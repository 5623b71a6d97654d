"""`eval-inn`: code lengths that can be worked out, statistics of known noise, responses at equal error."""

from __future__ import annotations

import io
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mghf_loss import HighFrequencyINN, INNConfig
from mghf_loss._files import format_table
from mghf_loss.training import evaluation
from mghf_loss.training.evaluation import evaluate, file_bits, network_bits, noisy_pixels
from mghf_loss.training.objective import GREY_LEVEL

SIGMA = 10.0


@pytest.fixture
def whitener() -> HighFrequencyINN:
    """The network of white noise with a standard deviation of SIGMA grey levels: Haar, a rotation, a scale."""
    network = HighFrequencyINN(INNConfig(levels=3, couplings=1, hidden=4, noise_floor=SIGMA)).eval()
    with torch.no_grad():
        for level in network.levels:
            level.flow[0].matrix.mul_(1 / (8 * SIGMA * GREY_LEVEL))
    return network


@pytest.fixture
def grey_folder(tmp_path) -> Path:
    for index in range(2):
        Image.new("RGB", (133, 90), (128, 128, 128)).save(tmp_path / f"{index}.png")
    return tmp_path


@pytest.fixture
def textured_folder(tmp_path) -> Path:
    rng = np.random.default_rng(0)
    pixels = (128 + 20 * rng.standard_normal((96, 128, 3))).clip(30, 225).astype(np.uint8)
    Image.fromarray(pixels).save(tmp_path / "texture.png")
    return tmp_path


def test_white_noise_costs_its_entropy_and_the_low_pass_its_range(whitener):
    """63 of 64 values at log2(sigma sqrt(2 pi e)) bits, one at 8 + levels bits."""
    grey = torch.full((1, 3, 256, 256), 128, dtype=torch.uint8)
    generator = torch.Generator().manual_seed(0)
    pixels = noisy_pixels(grey, SIGMA, generator)
    assert pixels.float().std().item() == pytest.approx(SIGMA, rel=0.02)
    bits = network_bits(whitener, pixels, generator, "cpu")
    entropy = math.log2(SIGMA * math.sqrt(2 * math.pi * math.e))
    assert bits == pytest.approx((63 * entropy + 11) / 64, abs=0.01)
    # No lossless coder can have fewer bits than the entropy of white noise.
    for suffix, options in (("png", {"optimize": True}), ("webp", {"lossless": True})):
        assert file_bits(pixels, suffix, **options) > entropy


def test_the_bits_of_a_file_are_those_on_the_disk(tmp_path):
    pixels = torch.randint(0, 256, (1, 3, 40, 24), dtype=torch.uint8)
    path = tmp_path / "a.png"
    Image.fromarray(pixels[0].permute(1, 2, 0).numpy()).save(path, optimize=True)
    assert file_bits(pixels, "png", optimize=True) == 8 * path.stat().st_size / pixels.numel()
    buffer = io.BytesIO()
    evaluation._to_pil(pixels).save(buffer, "webp", lossless=True)
    with Image.open(buffer) as decoded:  # lossless indeed
        assert np.array_equal(np.asarray(decoded), pixels[0].permute(1, 2, 0).numpy())


def test_without_noise_pixels_stay_as_they_are():
    pixels = torch.randint(0, 256, (1, 3, 8, 8), dtype=torch.uint8)
    assert torch.equal(noisy_pixels(pixels, 0.0, torch.Generator()), pixels)


def test_features_of_white_noise_are_normal_and_white(whitener, grey_folder):
    result = evaluate(whitener, sorted(grey_folder.glob("*.png")), [SIGMA], "cpu")
    assert result.photographs == 2
    assert result.inverse_error < 1e-5
    *levels, low_pass = result.levels
    assert low_pass["bits_per_value"] == 11
    for row in levels:
        assert row["std"] == pytest.approx(1, abs=0.1)
        assert row["std_without_noise"] == pytest.approx(0, abs=1e-5)
        assert row["excess_kurtosis"] == pytest.approx(0, abs=0.6)
        assert row["neighbour_correlation"] < 0.1
    assert sum(row["share_of_bits"] for row in result.levels) == pytest.approx(1)
    # A constant image moves by one pixel without an error: nothing to compare.
    assert all(row["photographs"] == 0 and row["over_noise"] is None for row in result.responses)


def test_responses_of_an_orthonormal_map_are_shares_of_the_error(whitener, textured_folder):
    """With details merely rotated, an offset of brightness costs nothing and errors of full bandwidth cost alike."""
    paths = list(textured_folder.glob("*.png"))
    responses = {row["distortion"]: row for row in evaluate(whitener, paths, [0.0], "cpu").responses}
    assert set(responses) == {"white noise", "blur", "JPEG", "brightness", "contrast", "shift by one pixel"}
    assert responses["white noise"]["over_noise"] == 1
    assert responses["white noise"]["photographs"] == 1
    assert responses["brightness"]["over_noise"] < 0.02
    # The difference of two neighbours of white noise is blue noise: most of it in the fine details.
    shift = responses["shift by one pixel"]
    assert 0.9 < shift["fine"] < 1.3
    assert shift["fine"] > shift["medium"] > shift["coarse"]
    assert shift["over_noise"] == pytest.approx((shift["fine"] + shift["medium"] + shift["coarse"]) / 3, rel=0.05)


@pytest.mark.parametrize("name", list(evaluation.DISTORTIONS))
def test_distortions_grow_with_strength_up_to_the_asked_error(name):
    image = torch.nn.functional.interpolate(torch.rand(1, 3, 16, 16), size=64, mode="bicubic").clamp(0.1, 0.9)
    distort = evaluation.DISTORTIONS[name](image, torch.Generator().manual_seed(0))
    errors = [(distort(strength) - image).square().mean().item() for strength in (0.05, 0.2, 0.6, 1.0)]
    assert errors == sorted(errors)
    target = (errors[0] * errors[-1]) ** 0.5
    reached = (evaluation.at_mse(distort, image, target) - image).square().mean().item()
    assert reached == pytest.approx(target, rel=0.15 if name == "JPEG" else 0.01)


def test_what_cannot_be_measured_is_skipped_by_name(whitener, grey_folder):
    Image.new("RGB", (40, 31)).save(grey_folder / "strip.png")
    (grey_folder / "broken.png").write_bytes(b"no image")
    paths = sorted(grey_folder.glob("*.png"))
    with pytest.warns(UserWarning, match="skipped image") as warnings:
        result = evaluate(whitener, paths, [0.0], "cpu")
    messages = " ".join(str(warning.message) for warning in warnings)
    assert "strip.png: 40 x 31 is smaller than 32 x 32" in messages
    assert result.photographs == 2
    assert result.skipped == [str(grey_folder / "broken.png"), str(grey_folder / "strip.png")]
    with pytest.warns(UserWarning, match="skipped"), pytest.raises(ValueError, match="none of the 1 images"):
        evaluate(whitener, [grey_folder / "strip.png"], [0.0], "cpu")


def test_the_picture_is_of_the_first_readable_image(grey_folder, tmp_path):
    (grey_folder / "-broken.png").write_bytes(b"no image")
    with pytest.warns(UserWarning, match=r"skipped image .*-broken\.png"):
        result = evaluation.eval_inn("bundled", grey_folder, tmp_path / "out", [0.0], "cpu")
    assert result.photographs == 2
    assert (tmp_path / "out" / "features.png").exists()


def test_a_packet_has_one_share_for_all_details(grey_folder):
    network = HighFrequencyINN(INNConfig(levels=2, couplings=1, hidden=4, variant="packet")).eval()
    fine, coarse, low_pass = evaluate(network, sorted(grey_folder.glob("*.png")), [6.0], "cpu").levels
    assert fine["share_of_bits"] is None
    assert coarse["share_of_bits"] + low_pass["share_of_bits"] == pytest.approx(1)
    assert low_pass["share_of_bits"] == pytest.approx(10 / (10 + 15 * coarse["bits_per_value"]))


def test_the_bundled_network_is_shown_beside_another_on_the_same_pixels(textured_folder, tmp_path, capsys):
    yours = HighFrequencyINN(INNConfig(levels=4, couplings=1, hidden=4))
    yours.save_pretrained(tmp_path / "my-inn")
    out = tmp_path / "out"
    result = evaluation.eval_inn(str(tmp_path / "my-inn"), textured_folder, out, [0.0], "cpu")
    assert [row["coder"] for row in result.coders] == ["my-inn", "PNG", "WebP", "bundled"]
    assert len({row["bits_per_value"] for row in result.coders}) == 4
    levels = [(row["network"], row["level"]) for row in result.levels]
    assert levels[:5] == [("my-inn", name) for name in ("level 1", "level 2", "level 3", "level 4", "low-pass")]
    assert levels[5:] == [("bundled", name) for name in ("fine", "medium", "coarse", "low-pass")]
    assert len(result.responses) == 12
    for name in ("coders", "levels", "responses"):
        with (out / f"{name}.csv").open() as file:
            text = file.read()
        assert "nan" not in text
    # On the same pixels, cut for the larger stride.
    bundled = HighFrequencyINN.from_pretrained("bundled")
    alone = evaluate(bundled, list(textured_folder.glob("*.png")), [0.0], "cpu", stride=16, files=False)
    assert [row["bits_per_value"] for row in alone.coders] == [result.coders[3]["bits_per_value"]]
    assert "nan" not in format_table(result.levels) + format_table(result.responses)


def test_a_dash_stands_for_a_missing_value_and_an_empty_column_is_left_out():
    table = [{"name": "a", "x": 1.0, "none": None}, {"name": "b", "x": None, "none": None}]
    assert format_table(table).split() == ["name", "x", "a", "1", "b", "-"]
