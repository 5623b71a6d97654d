"""benchmarks/quality.py: tasks, models and peers; a whole grid, killed and resumed; the choice and the front.

Needs the extra `bench`; skipped without it.
"""

from __future__ import annotations

import csv
import json
import math
import os
import re
import shlex
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

pytest.importorskip("kornia")
pytest.importorskip("piq")
pytest.importorskip("spandrel")
pytest.importorskip("ptwt")
pytest.importorskip("focal_frequency_loss")
pytest.importorskip("pytorch_msssim")

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import models
import peers
import quality
import quality_report
import tasks

pytestmark = pytest.mark.bench
BENCHMARKS = Path(quality.__file__).parent
CONFIG = """
[training]
steps = 20
batch = 2
crop = 72

[tuning]
ratios = [1, 4]
photographs = 1

[losses]
SSIM = { type = "ssim" }
MGHF-n = { type = "MGHFnLoss" }
"no style" = { type = "MGHFLoss", options = { times = { style = 0 } }, factor = 0.05 }
broken = { type = "MGHFLoss", options = { inn = "no/such/folder" }, factor = 1 }
"like broken" = { type = "MGHFLoss", factor_of = "broken" }

[[grid]]
name = "losses"
losses = ["L1", "SSIM", "MGHF-n", "no style", "broken", "like broken"]
"""


@pytest.fixture
def config_file(tmp_path) -> Path:
    path = tmp_path / "quality.toml"
    path.write_text(CONFIG)
    return path


@pytest.fixture
def photographs(tmp_path) -> Path:
    """Folders `train` (3) and `val` (1) of textured images that NIQE's and KID's windows fit in."""
    rng = np.random.default_rng(0)
    for folder, count in (("train", 3), ("val", 1)):
        (tmp_path / folder).mkdir()
        for index in range(count):
            coarse = Image.fromarray(rng.integers(0, 256, (26, 27, 3), dtype=np.uint8))
            image = np.asarray(coarse.resize((216, 208), Image.Resampling.BICUBIC)).astype(int)
            noisy = np.clip(image + rng.integers(-12, 13, image.shape), 0, 255).astype(np.uint8)
            Image.fromarray(noisy).save(tmp_path / folder / f"{index}.png")
    return tmp_path


def images(count: int = 2, side: int = 96) -> torch.Tensor:
    coarse = torch.rand(count, 3, side // 8, side // 8)
    return (
        tasks.F.interpolate(coarse, scale_factor=8, mode="bicubic") + 0.05 * torch.randn(count, 3, side, side)
    ).clamp(0, 1)


@pytest.mark.parametrize("task", tasks.TASKS)
def test_a_task_degrades_alike_for_one_seed_and_keeps_to_8_bits(task):
    gt = images()
    degraded, again, other = (tasks.degrade(gt, task, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert degraded.shape == (2, 3, 24, 24) if tasks.is_sr(task) else gt.shape
    assert torch.equal(degraded, again)
    assert torch.equal(degraded, other) == (task == "sr-bicubic")  # the only one without chance
    torch.testing.assert_close(255 * degraded, (255 * degraded).round(), atol=1e-4, rtol=0)
    assert tasks.starting_point(degraded, task).shape == gt.shape
    assert not torch.equal(tasks.starting_point(degraded, task), gt)


def test_what_a_task_does_is_what_its_name_says():
    gt = torch.full((2, 3, 96, 96), 0.5)
    generator = torch.Generator().manual_seed(0)
    noise = tasks.degrade(gt, "denoise", generator) - gt
    assert 255 * noise.std().item() == pytest.approx(25, rel=0.03)
    holes = tasks.degrade(gt, "inpaint", generator)
    assert (holes == 0).float().mean().item() == pytest.approx(0.25, abs=0.08)
    assert ((holes - 0.5).abs() < 0.01).logical_or(holes == 0).all()
    kernels = tasks.motion_kernels(5, generator)
    torch.testing.assert_close(kernels.sum((1, 2)), torch.ones(5))
    assert 255 * (tasks.degrade(gt, "deblur", generator) - gt).std().item() == pytest.approx(2, rel=0.1)  # flat: noise
    with pytest.raises(ValueError, match="unknown task 'sr-film'"):
        tasks.degrade(gt, "sr-film", generator)


@pytest.mark.parametrize("task", ["sr-bicubic", "denoise"])
@pytest.mark.parametrize("name", ["edsr", "swinir"])
@pytest.mark.filterwarnings("ignore:torch.meshgrid")
def test_a_new_model_is_its_starting_point_and_learns(name, task):
    gt = images()
    degraded = tasks.degrade(gt, task, torch.Generator().manual_seed(0))
    model = models.build(name, task)
    sr = model(degraded)
    torch.testing.assert_close(sr, tasks.starting_point(degraded, task), atol=1e-5, rtol=0)
    (sr - gt).abs().mean().backward()
    assert any(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in model.parameters())


def test_the_one_step_model_draws_its_noise_anew():
    lr = tasks.degrade(images(), "sr-bicubic", torch.Generator())
    model = models.build("one-step", "sr-bicubic")
    first, second = model(lr), model(lr)
    assert (first - second).std().item() == pytest.approx(model.kappa * math.sqrt(2), rel=0.05)
    with pytest.raises(ValueError, match="for SR tasks, got 'denoise'"):
        models.build("one-step", "denoise")
    with pytest.raises(ValueError, match="unknown model 'vdsr'"):
        models.build("vdsr", "denoise")


OFFLINE = [kind for kind in peers.BUILDERS if kind not in {"lpips", "dists", "DinoJSDLoss"}]


@pytest.mark.parametrize("kind", OFFLINE)
def test_a_peer_prefers_the_photograph_and_passes_a_gradient(kind):
    if kind == "efficientnet":
        pytest.importorskip("efficientnet_lite_pytorch")
    loss = peers.build(kind, {}, "cpu")
    gt = images()
    sr = (0.8 * gt + 0.1 + 0.05 * torch.randn_like(gt)).requires_grad_()
    far = loss(sr, gt, torch.Generator().manual_seed(0))
    (gradient,) = torch.autograd.grad(far, sr)
    near = loss(gt.clone(), gt, torch.Generator().manual_seed(0))
    assert far.shape == ()
    assert near < far
    if kind != "MGHFLoss":  # PatchNCE is not 0 for equal images
        assert near.abs() < 1e-5
    assert torch.isfinite(gradient).all()
    assert gradient.abs().sum() > 0


def test_dct_and_wavelet_of_a_constant_difference_are_0():
    gt = images()
    for kind in ("dct", "wavelet"):
        assert peers.build(kind, {}, "cpu")(gt + 0.1, gt, torch.Generator()) < 1e-6


def test_mghf_takes_multiples_of_its_defaults():
    gt, generator = images(), torch.Generator()
    sr = 0.9 * gt
    everything, without, double = (
        peers.build("MGHFLoss", {"times": {"style": times, "patch_nce": 0}}, "cpu")(sr, gt, generator)
        for times in (1, 0, 2)
    )
    torch.testing.assert_close(double - everything, everything - without)
    assert everything > without


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("steps = 20", "steps = 5"), "training.steps must be a whole number of at least 20, got 5"),
        (("steps = 20", 'steps = "20"'), "training.steps must be a whole number of at least 20, got '20'"),
        (("crop = 72", "crop = 70"), "training.crop must be a multiple of 4, got 70"),
        (("ratios = [1, 4]", "ratios = []"), r"tuning.ratios must be a list of numbers, got \(\)"),
        (("ratios = [1, 4]", "ratios = [-1]"), "tuning.ratios must be a number of at least 1e-09, got -1"),
        (("factor = 0.05", 'factor = 0.05, factor_of = "SSIM"'), "has factor and factor_of"),
        (("factor = 0.05", 'factor_of = "no style"'), "factor_of goes in a circle"),
        (("SSIM = {", '"MGHF n" = { type = "ssim" }\nSSIM = {'), r"\['MGHF n', 'MGHF-n'\] have names that make"),
        (("SSIM = {", 'L1 = { type = "ssim" }\nSSIM = {'), "the name is that of the pixel term alone"),
        (('name = "losses"', 'name = "losses"\nseeds = 1'), "seeds must be a list of whole numbers, got 1"),
        (
            ('name = "losses"', 'name = "losses"\nmodels = ["one-step"]\ntasks = ["denoise"]'),
            "the one-step model is for SR tasks",
        ),
        (("batch = 2", "bacth = 2"), r"training: unknown keys \['bacth'\], known are"),
        (('type = "ssim"', 'type = "sism"'), "losses.'SSIM'.type must be one of"),
        (('"MGHF-n", "no style"', '"MGHF-m"'), r"unknown losses \['MGHF-m'\]"),
        (("factor = 0.05", 'factor_of = "x"'), "factor_of names no loss: 'x'"),
        (("photographs = 1", 'photographs = 1\ntask = "sr-x8"'), r"unknown tasks \['sr-x8'\]"),
    ],
)
def test_a_wrong_configuration_is_named(config_file, change, message):
    config_file.write_text(CONFIG.replace(*change))
    with pytest.raises(ValueError, match=message):
        quality.read_config(config_file)


@pytest.mark.parametrize("path", sorted(BENCHMARKS.glob("*.toml")), ids=lambda path: path.name)
def test_shipped_configurations_are_read_and_their_losses_can_be_built(path):
    config = quality.read_config(path)
    for spec in config.losses.values():
        if spec.type in {"MGHFLoss", "MGHFnLoss"} and "dino_jsd" not in str(spec.options):
            assert callable(peers.build(spec.type, spec.options, "cpu"))


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-W", "ignore", str(BENCHMARKS / "quality.py"), *map(str, arguments)]


ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1"}


def finish(arguments: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(arguments, env=ENVIRONMENT, capture_output=True, text=True, check=False)


def test_a_grid_killed_and_resumed_loses_the_run_in_progress_only(config_file, photographs):
    out = photographs / "out"
    run = command(
        "run", config_file, "--train", photographs / "train", "--val", photographs / "val", "--out", out, "--workers", 1
    )
    with subprocess.Popen(run, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        while len(list((out / "runs").glob("*.json"))) < 2:
            assert process.poll() is None, process.stdout and process.stdout.read()
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
    before = {path: path.stat().st_mtime_ns for path in (out / "runs").glob("*.json")}
    assert all(json.loads(path.read_text())["val"]["psnr"] > 10 for path in before)

    resumed = finish(run)
    assert resumed.returncode == 0, resumed.stderr
    assert "skipped broken: CheckpointError" in resumed.stdout
    assert "skipped like broken: its factor is that of broken, which was skipped" in resumed.stdout
    assert {path: path.stat().st_mtime_ns for path in before} == before
    # L1, two losses at two ratios and a fixed one; of the second seed L1 and one factor each.
    assert len(list((out / "runs").glob("*.json"))) == (1 + 2 * 2 + 1) + (1 + 2 + 1)

    report = finish(command("report", config_file, "--out", out))
    assert report.returncode == 0, report.stderr
    assert "Skipped: broken (CheckpointError" in report.stdout
    with (out / "quality.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 10
    assert {row["loss"] for row in rows} == {"L1", "SSIM", "MGHF-n", "no style"}
    assert all(float(row["psnr"]) > 10 and row["device"] and row["torch"] and row["date"] for row in rows)
    assert {path.name for path in out.glob("*.png")} == {
        "quality-crops.png",
        "quality-curves.png",
        "quality-losses--edsr--sr-bicubic.png",
    }

    config_file.write_text(CONFIG.replace("batch = 2", "batch = 3"))
    for command_line in (run, command("report", config_file, "--out", out)):
        changed = finish(command_line)
        assert changed.returncode != 0
        assert "(different: batch)" in changed.stderr
        assert "Traceback" not in changed.stderr
    config_file.write_text(CONFIG)
    (photographs / "val" / "0.png").rename(photographs / "val" / "1.png")
    assert "(different: val)" in finish(run).stderr


def test_the_commands_of_the_readme_run(config_file, photographs):
    """With these photographs and a small configuration in the place of the shipped one."""
    config_file.write_text(
        CONFIG.split("[losses]")[0]
        + """
[losses]
MGHF-n = { type = "MGHFnLoss" }

[[grid]]
name = "losses"
losses = ["L1", "MGHF-n"]
seeds = [0]
"""
    )
    places = {
        "benchmarks/photographs.toml": config_file,
        "DIR": photographs / "train",
        "OTHER": photographs / "val",
        "runs/quality": photographs / "out",
        "SR_DIR": photographs / "val",
        "GT_DIR": photographs / "val",
        "mine.csv": photographs / "mine.csv",
        "python": sys.executable,
        "benchmarks/quality.py": BENCHMARKS / "quality.py",
    }
    readme = (BENCHMARKS.parent / "README.md").read_text()
    lines = re.findall(r"^python benchmarks/quality\.py .*$", readme, re.MULTILINE)
    assert [line.split()[2] for line in lines] == ["run", "report", "judge"]
    for line in lines:
        done = finish([str(places.get(word, word)) for word in shlex.split(line, comments=True)])
        assert done.returncode == 0, done.stderr
    assert len(list((photographs / "out").glob("*.png"))) == 3
    with (photographs / "mine.csv").open() as file:
        (row,) = csv.DictReader(file)
    assert row["model"] == "mine"
    assert float(row["feature_distance"]) < 1e-9  # of equal images


def test_an_interrupt_ends_the_workers_with_one_line(config_file, photographs):
    out = photographs / "out"
    run = command("run", config_file, "--train", photographs / "train", "--val", photographs / "val", "--out", out)
    with subprocess.Popen(run, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        while not list((out / "runs").glob("*.json")):
            assert process.poll() is None, process.stderr and process.stderr.read()
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    finished = set((out / "runs").glob("*.json"))
    assert process.returncode == 130
    assert "quality.py: interrupted; the same command goes on" in errors
    assert "Traceback" not in errors
    time.sleep(1)
    assert set((out / "runs").glob("*.json")) == finished  # nobody goes on


def test_two_equal_runs_train_the_same_model(config_file, photographs):
    config = quality.read_config(config_file)
    place = quality.Place(photographs / "train", photographs / "val", photographs / "out")
    train, aside = quality.split(place, config.tuning)
    assert (len(train), len(aside)) == (2, 1)
    run = quality.Run("one-step", "sr-bicubic", "no style", 0, 0.05, adversarial=True)
    spec = config.losses[run.loss]
    first, second = (
        quality.train_model(config.training, run, peers.build(spec.type, spec.options, "cpu"), train, "cpu")
        for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    quality.trained_model(config, place, replace(run, adversarial=False), train)
    stored, _ = quality.trained_model(config, place, replace(run, adversarial=False), train)
    assert not torch.equal(next(stored.parameters()), next(first.parameters()))  # the critic has an influence


def test_a_loss_that_diverges_is_a_result(config_file, photographs, monkeypatch):
    config = quality.read_config(config_file)
    place = quality.Place(photographs / "train", photographs / "val", photographs / "out")
    run = quality.Run("edsr", "sr-bicubic", "SSIM", 0, 0.05)
    monkeypatch.setattr(peers, "build", lambda *_: lambda sr, gt, generator: (sr * math.inf).mean())
    quality.train_and_judge(config, place, run)
    result = json.loads(run.file(place.out).read_text())
    assert result["failure"] == "the gradient was not finite in step 0"
    assert result["val"] == {}
    summary = quality_report.summarise([run], {run.file(place.out): result}, place.out)
    assert summary == {"SSIM": {}}
    assert quality_report.figure_text(summary, "SSIM", "psnr", config) == "diverged"
    assert quality_report.figure_text({"SSIM": {"psnr": (30.0, 0.0)}}, "SSIM", "niqe", config) == "not measured"


def test_the_gradient_ratio_of_twice_l1_is_2():
    gt = images(4)
    sr = (gt + 0.1 * torch.randn_like(gt)).clamp(0, 1)
    ratio = quality.gradient_ratio(lambda s, g, _: 2 * (s - g).abs().mean(), gt, sr)
    assert ratio == pytest.approx(2, rel=1e-5)


def test_the_choice_takes_the_best_score_within_the_allowance(config_file, tmp_path):
    config, out = quality.read_config(config_file), tmp_path / "out"
    config = replace(config, tuning=replace(config.tuning, ratios=(1, 4, 16)))
    quality.write_json(quality.gradient_file(out, "SSIM"), {"gradient_ratio": 2.0})
    quality.write_json(quality.pixel_run(config).file(out), {"tuning": {"psnr": 30.0, "niqe": 6.0, "kid": 1.0}})
    runs = quality.sweep_runs(config, out, "SSIM")
    assert [run.factor for run in runs.values()] == [0.5, 2.0, 8.0]
    for run, psnr, niqe in zip(runs.values(), (30.1, 29.6, 29.4), (5.9, 5.0, 3.0), strict=True):
        quality.write_json(run.file(out), {"tuning": {"psnr": psnr, "niqe": niqe, "kid": 1.0}})
    factor, rows = quality.choose(config, out, "SSIM")
    assert factor == 2.0  # 8 is better still, and costs 0.6 dB
    assert [row["chosen"] for row in rows] == [False, True, False]
    assert rows[1]["score"] == pytest.approx(math.log(5 / 6) / 2)
    for run in runs.values():
        quality.write_json(run.file(out), {"tuning": {"psnr": 20.0, "niqe": 6.0, "kid": 1.0}})
    assert quality.choose(config, out, "SSIM")[0] == 0.5  # none is allowed: the least


def test_the_front_is_what_nothing_beats_in_both(config_file):
    config = quality.read_config(config_file)
    points = {"a": (30, 5.0), "b": (29, 4.0), "c": (29, 4.5), "d": (28, 3.0), "e": (27, 3.5)}
    summary = {name: {"psnr": (psnr, 0.0), "niqe": (niqe, 0.0)} for name, (psnr, niqe) in points.items()}
    assert quality_report.front(summary, "niqe", config) == ["a", "b", "d"]
    assert quality_report.badness("detail_energy", 1.2) == pytest.approx(0.2)
    # A loss that is judged by itself is marked, and is on no front.
    assert quality_report.figure_text({"SSIM": {"ssim": (0.9, 0.01)}}, "SSIM", "ssim", config) == "0.9 ± 0.01°"
    summary = {name: {"psnr": (30.0, 0.0), "ssim": (0.9, 0.0)} for name in ("SSIM", "MGHF-n")}
    assert quality_report.front(summary, "ssim", config) == ["MGHF-n"]


def test_a_loss_with_a_chain_of_factors_has_that_at_its_end(config_file, tmp_path):
    config = quality.read_config(config_file)
    assert quality.factor_source(config, "like broken") == "broken"
    assert quality.factors(config, tmp_path, ["like broken", "no style"]) == {
        "L1": 0,
        "like broken": 1,
        "no style": 0.05,
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "CONFIG", "--train", "nowhere", "--val", "val"], "nowhere"),
        (["run", "CONFIG", "--train", "train", "--val", "small"], "must be at least 200 x 200 pixels, got (64, 64)"),
        (["run", "CONFIG", "--train", "val", "--val", "val"], "must hold more than 1 photographs, got 1"),
        (["run", "CONFIG", "--train", "train", "--val", "val", "--only", "lozzes"], "unknown grids ['lozzes']"),
        (["run", "CONFIG", "--train", "train", "--val", "val", "--device", "cuda:99"], "error"),
        (["report", "CONFIG"], "no finished run below"),
    ],
)
def test_a_mistake_is_one_line_before_anything_is_trained(photographs, config_file, monkeypatch, arguments, message):
    monkeypatch.chdir(photographs)
    (photographs / "small").mkdir()
    Image.new("RGB", (64, 64)).save("small/0.png")
    words = [str(config_file) if word == "CONFIG" else word for word in arguments]
    wrong = finish(command(*words, "--out", "out"))
    assert wrong.returncode == 1
    assert wrong.stderr.splitlines()[-1].startswith("quality.py: error: ")
    assert message in wrong.stderr
    assert "Traceback" not in wrong.stderr
    assert not Path("out").exists()


def test_judging_folders_needs_equal_names(photographs):
    wrong = finish(command("judge", photographs / "val", photographs / "train"))
    assert wrong.returncode != 0
    assert "must hold images of the same names" in wrong.stderr
    table = photographs / "row.csv"
    right = finish(command("judge", photographs / "val", photographs / "val", "--name", "copy", "--csv", table))
    assert right.returncode == 0, right.stderr
    with table.open() as file:
        (row,) = csv.DictReader(file)
    assert row["model"] == "copy"
    assert float(row["ssim"]) == pytest.approx(1)
