"""studies.run from photographs to report, at a size that trains in seconds; what it refuses before it trains."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("kornia")
pytest.importorskip("efficientnet_lite_pytorch")
from PIL import Image

REPOSITORY = Path(__file__).parents[1]
sys.path.insert(0, str(REPOSITORY))

from studies import config, protocol, report, run  # noqa: E402
from studies.store import read_json, write_json  # noqa: E402

pytestmark = pytest.mark.bench
CONFIG = """
[protocol]
steps = 20
batch = 1
crop = 32
round = 20
most_rounds = 2
patience = 1

[losses]
"fixed" = { type = "MGHFLoss", factor = 0.05 }
"MSE" = { type = "mse", ratios = [1, 4] }
"unsharp" = { type = "unsharp-mask", ratios = [0.25, 0.5], grow = 2 }
"missing" = { type = "no_such_module:build" }

[[track]]
name = "x4"
losses = ["fixed", "MSE", "unsharp", "missing"]
seeds = [0, 1]

[[track]]
name = "critic"
losses = ["MSE"]
critic = [0.03]
factors_of = "x4"
seeds = [0]
"""


@pytest.fixture
def folders(tmp_path):
    """Three folders with two photographs each."""
    for name in ("train", "tune", "judge"):
        (tmp_path / name).mkdir()
        for index in range(2):
            coarse = torch.rand(1, 3, 26, 30)
            image = torch.nn.functional.interpolate(coarse, size=(208, 240), mode="bicubic").clamp(0, 1)
            pixels = (255 * image[0]).byte().permute(1, 2, 0).numpy()
            Image.fromarray(pixels).save(tmp_path / name / f"{index}.png")
    return protocol.Folders(*(tmp_path / name for name in ("train", "tune", "judge")))


@pytest.fixture
def study(tmp_path, folders, monkeypatch):
    """A study with the judges that take no time."""
    monkeypatch.setattr(protocol, "TUNING_METRICS", ("psnr", "spectrum_error"))
    monkeypatch.setattr(protocol, "METRICS", dict.fromkeys(("psnr", "spectrum_error", "detail_energy"), "lower"))
    monkeypatch.setattr(protocol, "MOST_RATIO", 16)
    (tmp_path / "study.toml").write_text(CONFIG)
    return protocol.Study(config.read(tmp_path / "study.toml"), folders, tmp_path / "out")


def test_a_study_from_photographs_to_report(study, folders, tmp_path, capsys):
    study.open()
    run.run(study)
    assert "skipped missing: ModuleNotFoundError" in capsys.readouterr().err
    assert study.ready() == []
    made = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.json")}
    kinds = [path.parent.name for path in made]
    assert kinds.count("bases") == 2
    assert kinds.count("calibrations") == 1  # one of MSE: the others have a factor, or none
    assert not list((tmp_path / "out").rglob("*.lock"))

    # What is finished is not made again; what a kill took is.
    x4 = study.config.track("x4")
    lost = study.path("judged", protocol.Run(x4.model, x4.task, 1))
    lost.unlink()
    again = protocol.Study(study.config, folders, tmp_path / "out")
    again.open()
    run.run(again)
    assert lost.exists()
    assert {path: path.stat().st_mtime_ns for path in made if path != lost} == {
        path: time for path, time in made.items() if path != lost
    }

    text = report.write_report(again, ["MSE"]).read_text()
    assert "## x4: small-sr, sr-bicubic" in text
    assert "| MSE, GAN 0.03 |" in text
    assert "Skipped: missing" in text
    rows = [json.loads(line) for line in (tmp_path / "out" / "rows.jsonl").read_text().splitlines()]
    assert {row["loss"] for row in rows} == {"L1", "fixed", "MSE", "unsharp"}
    for row in rows:
        assert {"device", "torch", "mghf_loss", "commit", "date", "seed", "applied_factor"} <= row.keys()
        assert len(row["tuning"]["psnr"]) == 2
    figures = ("x4-front", "x4-factors", "x4-crops", "critic-front", "critic-crops")
    assert all((tmp_path / "out" / f"{name}.png").exists() for name in figures)


def test_before_it_is_judged_a_track_shows_the_tuning_photographs(study, folders, tmp_path):
    unjudged = protocol.Study(study.config, folders, tmp_path / "out", judged=False)
    unjudged.open()
    run.run(unjudged)
    text = report.write_report(study, ["MSE"]).read_text()
    assert not list((tmp_path / "out").glob("*-crops.png"))  # which show the photographs that judge
    first = text.split("## critic")[0]
    assert "all tables are of the tuning photographs, first seed" in first
    l1 = protocol.Run("small-sr", "sr-bicubic", 0)
    assert f"{study.means(l1)['psnr']:.4g}" in first
    assert "### At -0.05 dB" in first
    assert "Not judged yet." in text.split("## critic")[1]


def test_a_diverged_run_is_a_result(study, monkeypatch):
    study.open()

    def diverge(*_: object) -> None:
        raise protocol.DivergenceError("the gradient was not finite in step 3")

    x4 = study.config.track("x4")
    for kind, each in (("bases", protocol.Run(x4.model, x4.task, 0)), ("runs", protocol.Run(x4.model, x4.task, 0))):
        job = study._next(kind, each)
        write_json(job.path, job.work())
    monkeypatch.setattr(study, "fine_tune", diverge)
    found = study.make_run(protocol.Run(x4.model, x4.task, 0, "fixed", 1.0))
    assert found["failure"] == "the gradient was not finite in step 3"
    assert found["values"] == {}


def test_photographs_that_judge_choose_nothing(study):
    inside = study.folders.train / "a"
    inside.mkdir()
    for path in study.folders.judge.iterdir():
        (inside / path.name).write_bytes(path.read_bytes())
    for judge in (study.folders.tune, inside, study.folders.train.parent):
        folders = dataclasses.replace(study.folders, judge=judge)
        with pytest.raises(ValueError, match="must choose nothing"):
            protocol.Study(study.config, folders, study.out).open()


def test_a_changed_preset_is_another_result(study, monkeypatch):
    x4 = study.config.track("x4")
    ours, peer = (protocol.Run(x4.model, x4.task, 0, loss, 1.0) for loss in ("fixed", "MSE"))
    before = [study.path("runs", each) for each in (ours, peer)]
    changed = dataclasses.replace(protocol.PRESETS["balanced"], style_delta=0.1)
    monkeypatch.setitem(protocol.PRESETS, "balanced", changed)
    after = [study.path("runs", each) for each in (ours, peer)]
    assert before[0] != after[0]
    assert before[1] == after[1]
    unused = dataclasses.replace(changed, coefficients={**changed.coefficients, "new": 0.0})
    monkeypatch.setitem(protocol.PRESETS, "balanced", unused)
    assert study.path("runs", ours) == after[0]


def test_a_judged_model_may_diverge_and_a_flat_loss_has_no_factor(study, monkeypatch):
    def diverge(*_: object) -> None:
        raise protocol.DivergenceError("the model's images are not finite")

    x4 = study.config.track("x4")
    monkeypatch.setattr(study, "restorer", diverge)
    monkeypatch.setattr(study, "figures", lambda *_: {"psnr": 1.0})
    assert study.make_judged(protocol.Run(x4.model, x4.task, 0, "fixed", 1.0))["values"] == {}
    monkeypatch.setattr(study, "load", lambda *_: torch.nn.Identity())
    monkeypatch.setattr(study, "calibration_images", lambda *_: torch.rand(2, 1, 3, 32, 32).unbind(0))
    monkeypatch.setattr(protocol.losses, "build", lambda *_: lambda sr, gt, generator: 0 * sr.sum())
    with pytest.raises(ValueError, match="loss 'MSE' has no gradient"):
        study.calibrate(protocol.Run(x4.model, x4.task, 0, "MSE", 1.0))


def test_all_noises_start_from_one_blind_denoiser_and_take_the_factors_of_one_of_them(study, tmp_path):
    text = CONFIG.split("[[track]]")[0]
    for noise, more in (("25", ""), ("50", 'factors_of = "25"')):
        text += f'[[track]]\nname = "{noise}"\ntask = "denoise-{noise}"\nlosses = ["fixed"]\nseeds = [0]\n{more}\n'
    (tmp_path / "noise.toml").write_text(text)
    study = protocol.Study(config.read(tmp_path / "noise.toml"), study.folders, tmp_path / "noise")
    study.open()
    base, *more = study.ready()
    assert (base.name, more) == ("small-sr denoise L1 seed 0 (bases)", [])
    run.run(study)
    assert {path.stem.split("-L1")[0] for path in (tmp_path / "noise" / "bases").glob("*.json")} == {"small-sr-denoise"}
    judged = {read_json(path)["task"] for path in (tmp_path / "noise" / "judged").glob("*fixed*.json")}
    assert judged == {"denoise-25", "denoise-50"}
    assert "## 50: small-sr, denoise-50" in report.write_report(study, []).read_text()


def spoil_protocol(folders: protocol.Folders, out: Path) -> str:
    out.mkdir()
    (out / "protocol.json").write_text('{"steps": 7}')
    return f"{out} holds results of another protocol"


def spoil_small(folders: protocol.Folders, out: Path) -> str:
    Image.new("RGB", (100, 300)).save(folders.judge / "small.png")
    return "small.png must be at least 200 x 200 pixels, got 100 x 300"


def spoil_unreadable(folders: protocol.Folders, out: Path) -> str:
    (folders.tune / "broken.png").write_bytes(b"no image")
    return "broken.png"


def spoil_truncated(folders: protocol.Folders, out: Path) -> str:
    path = folders.judge / "0.png"
    path.write_bytes(path.read_bytes()[:-2000])  # the header is whole
    return f"cannot read image {path}"


@pytest.mark.parametrize("spoil", [spoil_protocol, spoil_small, spoil_unreadable, spoil_truncated])
def test_bad_input_is_named_in_one_line_before_anything_is_trained(spoil, folders, tmp_path):
    out = tmp_path / "results"
    named = spoil(folders, out)
    (tmp_path / "study.toml").write_text(CONFIG)
    places = [f"--{name}={getattr(folders, name)}" for name in ("train", "tune", "judge")]
    finished = subprocess.run(
        [sys.executable, "-m", "studies.run", f"--config={tmp_path / 'study.toml'}", *places, f"--out={out}"],
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(["src", os.environ.get("PYTHONPATH", "")])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 1
    *_, line = finished.stderr.splitlines()
    assert line.startswith("python -m studies.run: error: ")
    assert named in line
    assert not list(tmp_path.rglob("*.safetensors"))


def test_the_study_of_networks_is_a_configuration(tmp_path):
    networks = pytest.importorskip("studies.networks")
    coefficients = {"content": 0.1, "style": 300.0}
    networks.write_config(tmp_path / "n.toml", {"balanced, a": ("balanced", "bundled", coefficients)}, "sr-bicubic")
    read = config.read(tmp_path / "n.toml")
    (track,) = read.tracks
    assert (track.losses, track.seeds) == (("balanced, a",), (0,))
    spec = read.losses["balanced, a"]
    assert spec.options == {"preset": "balanced", "network": "bundled", "coefficients": coefficients}
    assert spec.factor == 1
