"""studies/: measures computed by hand, the choice of a factor, tables, and who imports whom."""

from __future__ import annotations

import ast
import math
import sys
from pathlib import Path

import pytest
import torch

REPOSITORY = Path(__file__).parents[1]
sys.path.insert(0, str(REPOSITORY))
pytest.importorskip("kornia", reason="needs the extra bench")

from mghf_loss import toy  # noqa: E402
from studies import config, diagnose, metrics, protocol, tables, wavelets  # noqa: E402
from studies.store import claim, read_json, write_json  # noqa: E402

pytestmark = pytest.mark.bench


def imports(path: Path) -> set[str]:
    """The modules of benchmarks and studies that a file imports, anywhere in it."""
    package, found = path.parent.name, set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(filter(None, (package if node.level else "", node.module or "")))
            found |= {base, *(f"{base}.{alias.name}" for alias in node.names)}
    modules = {f"{p.parent.name}.{p.stem}" for folder in ("benchmarks", "studies") for p in files(folder)}
    return found & modules


def files(folder: str) -> list[Path]:
    return sorted((REPOSITORY / folder).glob("*.py"))


def test_no_circle_of_imports_and_benchmarks_know_no_study():
    graph = {f"{path.parent.name}.{path.stem}": imports(path) for path in (*files("benchmarks"), *files("studies"))}
    assert any(graph.values())
    for name, imported in graph.items():
        if name.startswith("benchmarks."):
            assert not [other for other in imported if other.startswith("studies.")], name
    while graph:  # take away those that import nothing that is left
        leaves = {name for name, imported in graph.items() if not imported & graph.keys()}
        assert leaves, f"a circle within {sorted(graph)}"
        graph = {name: imported for name, imported in graph.items() if name not in leaves}


def test_the_factor_is_bracketed():
    first = (2.0, 4.0)
    assert protocol.bracket({}, {}, first, 2.0) == [2.0, 4.0]
    flat = {2.0: 0.3, 4.0: 0.3, 8.0: 0.3}
    assert protocol.bracket({2.0: 2.0, 4.0: 1.0}, {2.0: 0.0, 4.0: 0.3}, first, 2.0) == [8.0]  # the best is an end
    assert protocol.bracket({2.0: 1.0, 4.0: 2.0}, {2.0: 0.3, 4.0: 0.3}, first, 2.0) == [1.0]
    assert protocol.bracket({2.0: 2.0, 4.0: 1.0, 8.0: 3.0}, flat, first, 2.0) == []


def test_a_point_at_equal_psnr_lies_between_its_neighbours():
    curve = [
        (ratio, drop, {"niqe": torch.tensor([value])})
        for ratio, drop, value in ((0, 0, 8.0), (2, 0.1, 7.0), (8, 0.3, 5.0))
    ]
    ratio, values = tables.at_drop(curve, 0.2) or (math.nan, {})
    assert ratio == pytest.approx(4)
    assert values["niqe"].item() == pytest.approx(6)
    assert (tables.at_drop(curve, 0.05) or (math.nan,))[0] == pytest.approx(1)
    assert tables.at_drop(curve, 0.4) is None


def test_paired_intervals_hold_the_difference_and_narrow_with_it():
    reference = torch.linspace(20, 30, 16, dtype=torch.double)
    middle, low, high = tables.difference(reference + 0.5, reference, is_pooled=False)
    assert (middle, low, high) == pytest.approx((0.5, 0.5, 0.5))
    noisy = reference + 0.5 + torch.linspace(-1, 1, 16, dtype=torch.double)
    middle, low, high = tables.difference(noisy, reference, is_pooled=False)
    assert low < middle < high
    assert high - low == pytest.approx(2 * 1.96 * 0.615 / 4, rel=0.25)


def test_one_flat_photograph_does_not_own_detail_energy():
    texture, flat = torch.rand(1, 3, 32, 32), torch.full((1, 3, 32, 32), 0.5)
    flat_sr = flat + 0.001 * torch.randn_like(flat)
    values = [metrics.detail_energy(texture, texture), metrics.detail_energy(flat_sr, flat)]
    assert metrics.mean(values) == pytest.approx(1, abs=1e-3)
    assert metrics.detail_energy(0.5 * texture, texture)[0] == pytest.approx(
        0.25 * metrics.detail_energy(texture, texture)[1]
    )


def test_spectra_of_white_noise_and_of_lost_detail():
    noise = 0.1 * torch.randn(1, 3, 256, 256)
    spectrum = metrics.radial_spectrum(0.5 + noise)[1:]
    variance = (255 * 0.1) ** 2 * sum(weight**2 for weight in metrics.LUMA)
    assert spectrum.mean().item() == pytest.approx(variance, rel=0.05)
    assert metrics.spectrum_error(noise, noise) == 0
    assert metrics.spectrum_error(0.1 * noise, noise).item() == pytest.approx(2, abs=0.05)  # two decades of power


def test_kid_is_zero_for_equal_sets_and_grows_with_distance():
    features = torch.randn(64, 8)
    assert metrics.kid(features, features) == pytest.approx(0, abs=1e-9)
    near, far = metrics.kid(features + 0.1, features), metrics.kid(features + 1, features)
    assert 0 < near < far


def test_grid_lock_tells_stairs_from_noise():
    gt = toy.middle(toy.photograph("astronaut"), 208)
    judge = metrics.Judge([gt], ["grid_lock"])
    stairs = torch.nn.functional.interpolate(torch.nn.functional.avg_pool2d(gt, 4), scale_factor=4)
    ((others, at_phase),) = judge([gt + 0.05 * torch.randn_like(gt)])["grid_lock"]
    assert others / at_phase == pytest.approx(1, abs=0.05)
    ((others, at_phase),) = judge([stairs])["grid_lock"]
    assert others / at_phase > 1.05


def test_a_pattern_is_what_repeats_every_four_pixels():
    photograph = toy.middle(toy.photograph("astronaut"), 240)
    repeats = {}
    for period in (3, 4, 5):
        cell = torch.randn(period, period, generator=torch.Generator().manual_seed(period)) / 50
        tiles = (-(-240 // period), -(-240 // period))
        excess, details = metrics.pattern(photograph + cell.repeat(tiles)[:240, :240], photograph)
        repeats[period] = excess / details
    excess, details = metrics.pattern(photograph, photograph)
    assert abs(excess / details) < 0.005  # edges do not count
    assert repeats[4] > 0.05
    assert repeats[3] < 0
    assert repeats[5] < 0


def test_an_undecimated_level_holds_the_decimated_one():
    gt = torch.rand(1, 3, 48, 48)
    decimated, undecimated = (wavelets.details(gt, "haar", option)[-1] for option in (False, True))

    def energy(details: torch.Tensor) -> torch.Tensor:
        return details.square().sum((0, 1))

    torch.testing.assert_close(energy(undecimated)[::2, ::2], energy(decimated), rtol=1e-4, atol=1e-4)
    loss = wavelets.build("cpu", undecimated=True, shift=True)
    assert loss(gt, gt, torch.Generator()).item() == pytest.approx(0, abs=1e-5)
    assert loss((gt + 0.1).roll(1, 3), gt, torch.Generator()) > 0.1


def test_recovery_by_the_squared_error_and_what_a_response_is_called():
    gt = torch.rand(1, 3, 16, 16)

    def squared_error(sr: torch.Tensor, gt: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        return (sr - gt).square().mean()

    start = (gt + 0.1 * torch.randn_like(gt)).clamp(0, 1)
    assert diagnose.recovery(squared_error, start, gt, steps=100) > diagnose.psnr(start, gt) + 10
    assert diagnose.direction(squared_error, start, gt) == pytest.approx(1, abs=1e-4)
    assert diagnose.describe_response([0, 1, 2, 3]) == "rises"
    assert diagnose.describe_response([0, 1, 1.01, 1.02]) == "saturates"
    assert diagnose.describe_response([0, 2, 1, 3]) == "falls"
    assert diagnose.describe_response([0, 0, 0, 0]) == "no response"
    assert diagnose.describe_response([0, 1, math.nan, 3]) == "not finite"


@pytest.mark.parametrize("name", ["main.toml", "denoise.toml", "ablation.toml", "quick.toml", "wavelets.toml"])
def test_shipped_configurations_are_read(name):
    assert config.read(REPOSITORY / "studies" / name).tracks
    assert config.read(REPOSITORY / "studies" / "diagnose.toml", needs_tracks=False).losses


@pytest.mark.parametrize(
    ("old", "new", "named"),
    [
        ("seeds = [0]", "seeds = [0, 0]", "seeds must be different numbers"),
        ('"MGHF-n", "focal frequency"]', '"MGHF-n", "MGHF-n"]', "losses must be a list of different names"),
        ('name = "x4"', "name = 5", "name must be a word or more"),
        ('name = "x4"', 'title = "x4"', "unknown keys"),
        ("factor = 0.1", "ratios = [100, 400]", "two numbers or more from 0.25 to 64"),
        ('type = "MGHFnLoss"', "type = 5", "type must be a name"),
        ('type = "MGHFnLoss", ', "", r"losses.'MGHF-n' : missing keys \['type'\]"),
    ],
)
def test_a_wrong_configuration_is_named(tmp_path, old, new, named):
    text = (REPOSITORY / "studies" / "quick.toml").read_text()
    assert old in text
    (tmp_path / "mine.toml").write_text(text.replace(old, new))
    with pytest.raises(ValueError, match=named):
        config.read(tmp_path / "mine.toml")


def test_differences_are_of_photographs_that_both_have():
    values, reference = (torch.tensor(each, dtype=torch.double) for each in ([1, 2, math.nan], [2, 3, 90]))
    middle, low, high = tables.difference(values, reference, is_pooled=False)
    assert (middle, low, high) == (-1, -1, -1)
    nothing = torch.full((3,), math.nan, dtype=torch.double)
    assert math.isnan(tables.difference(nothing, reference, is_pooled=False)[0])
    assert tables.difference_text("kid", (-1, -1, -1)).startswith("-")  # a range over seeds is no interval


def test_an_unknown_loss_is_named_before_anything_is_trained(tmp_path):
    text = (REPOSITORY / "studies" / "quick.toml").read_text().replace('type = "MGHFnLoss"', 'type = "NoLoss"')
    (tmp_path / "mine.toml").write_text(text)
    with pytest.raises(ValueError, match="NoLoss"):
        config.read(tmp_path / "mine.toml")


def test_a_result_is_made_by_one_process_and_a_finished_one_by_none(tmp_path):
    result = tmp_path / "a.json"
    with claim(result) as mine, claim(result) as twice:
        assert mine
        assert not twice
    write_json(result, {"a": 1})
    with claim(result) as mine:
        assert not mine
    assert read_json(result) == {"a": 1}
