"""The parts of studies/: losses and controls, tasks, models, changes without training."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("kornia")
pytest.importorskip("efficientnet_lite_pytorch")
pytest.importorskip("spandrel")

sys.path.insert(0, str(Path(__file__).parents[1]))

from mghf_loss.mghf import OFF
from studies import losses, models, tasks

pytestmark = pytest.mark.bench
DOWNLOADED = ("lpips", "dists")


def texture(count: int = 2, side: int = 96) -> Tensor:
    coarse = torch.rand(count, 3, side // 8, side // 8)
    return (0.1 + 0.8 * F.interpolate(coarse, size=side, mode="bicubic")).clamp(0.1, 0.9)


@pytest.mark.parametrize("kind", [each for each in losses.TYPES if each not in (*losses.TRAINING_FREE, *DOWNLOADED)])
def test_a_loss_is_least_at_equality_and_repeats_with_the_seed(kind):
    loss, gt = losses.build(kind), texture()
    sr = (gt + 0.05 * torch.randn_like(gt)).requires_grad_()
    first, again = (loss(sr, gt, torch.Generator().manual_seed(1)) for _ in range(2))
    assert first.shape == ()
    assert first == again
    assert first > loss(gt, gt, torch.Generator().manual_seed(1)) - 1e-6
    (gradient,) = torch.autograd.grad(first, sr)
    assert gradient.isfinite().all()
    assert gradient.norm() > 0


def test_an_unknown_loss_is_named():
    with pytest.raises(ValueError, match="unknown loss type 'nothing', known are MGHFLoss, MGHFnLoss, lpips"):
        losses.build("nothing")


def test_haar_control_has_the_energy_of_haar_details_and_the_untrained_one_is_no_haar():
    gt = texture(1, 64)
    features = losses.inn("haar").features(gt)
    lost = gt - F.interpolate(F.avg_pool2d(gt, 2), scale_factor=2)
    assert (features[0] / 8).square().sum().item() == pytest.approx(lost.square().sum().item(), rel=1e-4)
    untrained, again = (losses.inn("untrained").features(gt) for _ in range(2))
    torch.testing.assert_close(untrained, again)
    assert not torch.allclose(untrained[0].square().sum(), features[0].square().sum(), rtol=0.01)


def test_coefficients_are_of_the_constructor_and_a_shift_is_common():
    gt = texture()
    sr = (gt + 0.05 * torch.randn_like(gt)).clamp(0, 1)
    whole, half = (losses.build("MGHFLoss", {"coefficients": OFF | {"content": factor}}) for factor in (1.0, 0.5))
    generator = torch.Generator
    assert half(sr, gt, generator()).item() == pytest.approx(whole(sr, gt, generator()).item() / 2)
    shifted = losses.build("MGHFnLoss", {"shift": "random"})
    assert shifted(gt, gt, generator().manual_seed(3)) == 0
    assert len({shifted(sr, gt, generator().manual_seed(seed)).item() for seed in range(4)}) > 1


def test_equal_gradients_by_the_ratio():
    gt = texture()
    sr = (gt + 0.05 * torch.randn_like(gt)).clamp(0, 1)
    assert losses.gradient_ratio(losses.l1, sr, gt) == pytest.approx(1)
    assert losses.gradient_ratio(lambda s, g, generator: 3 * losses.l1(s, g), sr, gt) == pytest.approx(3, rel=1e-3)


@pytest.mark.parametrize("task", tasks.TASKS)
@pytest.mark.parametrize("name", models.MODELS)
def test_every_model_restores_every_task_that_it_takes(name, task):
    gt = texture(1, 64)
    degraded = tasks.degrade(gt, task, torch.Generator().manual_seed(0))
    assert degraded.shape[-1] == (16 if tasks.is_sr(task) else 64)
    assert torch.equal(degraded, tasks.degrade(gt, task, torch.Generator().manual_seed(0)))
    torch.testing.assert_close(degraded, (255 * degraded).round() / 255)
    if name in models.SR_ONLY and not tasks.is_sr(task):
        with pytest.raises(ValueError, match=f"{name}.*{task}"):
            models.build(name, task)
        return
    with torch.no_grad():
        assert models.build(name, task)(degraded).shape == gt.shape


def test_changes_without_training_do_nothing_at_amount_0_and_sharpen_above():
    gt = texture(2, 64)
    blurred = F.interpolate(F.avg_pool2d(gt, 4), scale_factor=4, mode="bicubic")
    for change in models.CHANGES.values():
        sharpened = []
        for amount in (0.0, 0.5):
            model = change(torch.nn.Identity(), amount)
            if isinstance(model, models.LatentGain):
                model.fit(blurred, gt)
            sharpened.append(model(blurred))
        torch.testing.assert_close(sharpened[0], blurred, atol=1e-4, rtol=1e-4)
        assert sharpened[1].std() > blurred.std()
