"""Coefficients for other images and networks: the ratios of the gradients are those of the preset."""

from __future__ import annotations

import ast

import pytest
import torch

from conftest import perturbed_inn
from mghf_loss import MGHFLoss, cli
from mghf_loss.calibrate import RATIOS, calibrate, default_task, degrade, gradient_ratio
from mghf_loss.mghf import PRESETS, Preset
from mghf_loss.toy import photograph


def photographs() -> list[torch.Tensor]:
    return [photograph(name)[..., 96:160, 160:224] for name in ("astronaut", "coffee", "chelsea")]


def test_every_preset_has_the_ratios_of_its_terms():
    for preset, settings in PRESETS.items():
        assert RATIOS[preset].keys() == {name for name, factor in settings.coefficients.items() if factor}


@pytest.mark.parametrize("preset", ["balanced", "denoise"])
def test_gradients_have_the_ratios_of_the_preset(preset: Preset):
    """On these images, and with this network, whatever the coefficients were before."""
    network, gts = perturbed_inn(levels=2), photographs()
    found = calibrate(gts, preset, inn=network)
    generator = torch.Generator().manual_seed(0)
    pairs = [(degrade(gt, default_task(preset), generator), gt) for gt in gts]
    for name, ratio in RATIOS[preset].items():
        alone = {other: found.get(other, 0.0) * (other == name) for other in PRESETS[preset].coefficients}
        criterion = MGHFLoss(preset, coefficients=alone, inn=network)
        assert gradient_ratio(criterion, pairs) == pytest.approx(ratio, rel=0.01)


@pytest.mark.parametrize("preset", ["balanced", "sharp", "gan", "denoise"])
def test_on_photographs_the_bundled_network_has_about_the_coefficients_of_the_preset(preset: Preset):
    for name, value in calibrate(photographs(), preset).items():
        assert 0.2 < value / PRESETS[preset].coefficients[name] < 5


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match="images must hold at least one image"):
        calibrate([])
    with pytest.raises(ValueError, match="at least 32 x 32"):
        calibrate([torch.rand(1, 3, 16, 64)])
    with pytest.raises(ValueError, match=r"images\[0\] must show something"):
        calibrate([torch.full((1, 3, 32, 32), 0.5)])
    with pytest.raises(ValueError, match="task must be one of 'sr', 'denoise', got 'blur'"):
        calibrate(photographs(), task="blur")  # type: ignore[arg-type]


def test_the_command_prints_what_the_constructor_takes(tmp_path, capsys):
    from torchvision.utils import save_image

    for index, image in enumerate(photographs()):
        save_image(image, tmp_path / f"{index}.png")
    assert cli.main(["calibrate", "--images", str(tmp_path), "--preset", "gan", "--device", "cpu"]) == 0
    line = capsys.readouterr().out.splitlines()[-1]
    call = ast.parse(line.split("#")[0].strip(), mode="eval").body
    assert isinstance(call, ast.Call)
    assert ast.literal_eval(call.args[0]) == "gan"
    MGHFLoss("gan", coefficients=ast.literal_eval(call.keywords[0].value))
    assert cli.main(["calibrate", "--images", str(tmp_path / "none"), "--device", "cpu"]) == 2
    assert "no folder" in capsys.readouterr().err
