"""The command line, as a user calls it."""

from __future__ import annotations

import csv
import io
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image
from skimage import data

import mghf_loss
from mghf_loss import MGHFLoss, __version__, cli, training


@pytest.fixture
def pair(tmp_path) -> tuple[str, str]:
    for name in ("sr.png", "gt.png"):
        Image.new("RGB", (32, 32)).save(tmp_path / name)
    return str(tmp_path / "sr.png"), str(tmp_path / "gt.png")


@pytest.mark.parametrize(
    "arguments", [["--help"], ["compare", "--help"], ["train-inn", "--help"], ["--version"], ["compare"]]
)
def test_help_does_not_import_torch(arguments, monkeypatch, capsys):
    """As `main` is called by the script and by `python -m mghf_loss`, whose imports a fresh process shows below."""
    for name in [name for name in sys.modules if name.split(".")[0] in {"torch", "numpy"}]:
        monkeypatch.setitem(sys.modules, name, None)  # importing it raises
    with pytest.raises(SystemExit):
        cli.main(arguments)
    captured = capsys.readouterr()
    assert "usage" in captured.out + captured.err or __version__ in captured.out


@pytest.mark.process
def test_the_module_answers_without_torch():
    program = """
import runpy, sys
sys.argv = ["mghf-loss", "--help"]
try:
    runpy.run_module("mghf_loss", run_name="__main__")
except SystemExit:
    print(sorted({name.split(".")[0] for name in sys.modules} & {"torch", "numpy"}))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("usage: mghf-loss ")
    assert done.stdout.endswith("\n[]\n")


def test_help_of_train_inn_is_grouped_and_tells_the_time(capsys):
    with pytest.raises(SystemExit):
        cli.main(["train-inn", "--help"])
    help_text = capsys.readouterr().out
    places = [help_text.index(f"\n{group}:\n") for group in ("images", "network", "training", "output")]
    assert places == sorted(places)
    assert "about an hour" in help_text
    assert "default: None" not in help_text


def test_info_names_versions_checkpoint_and_path(capsys):
    assert cli.main(["info"]) == 0
    out = capsys.readouterr().out
    for part in (
        f"mghf-loss {__version__}",
        f"torch {version('torch')}",
        "sha256",
        "parameters",
        "ops:",
        "devices: cpu",
    ):
        assert part in out


@pytest.mark.train
def test_demo_writes_table_and_pictures(tmp_path, capsys):
    out = tmp_path / "demo"
    assert cli.main(["demo", "--steps", "10", "--out", str(out), "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    with (out / "table.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["loss"] for row in rows] == ["bicubic", "L1", "L1 + balanced", "L1 + sharp"]
    for row in rows:
        assert row["loss"] in printed
        assert 10 < float(row["PSNR"]) < 50
        assert 0 < float(row["SSIM"]) < 1
    for name in ("crops.png", "terms.png"):
        assert np.asarray(Image.open(out / name).convert("RGB")).std() > 10


def test_train_inn_trains_and_resumes_nothing_new(tmp_path, capsys):
    images = tmp_path / "images"
    images.mkdir()
    Image.fromarray(data.astronaut()[:64, :64]).save(images / "a.png")
    arguments = ["train-inn", "--images", str(images), "--out", str(tmp_path / "inn"), "--steps", "2", "--batch", "1"]
    arguments += ["--crop", "16", "--hidden", "4", "--levels", "1", "--cpu"]
    assert cli.main(arguments) == 0
    assert "MGHFLoss(inn=" in capsys.readouterr().out
    assert MGHFLoss(inn=tmp_path / "inn")(torch.rand(1, 3, 8, 8), torch.rand(1, 3, 8, 8)) > 0


@pytest.mark.train
def test_eval_inn_prints_and_writes_tables_and_figures(tmp_path, capsys):
    images, out = tmp_path / "images", tmp_path / "evaluation"
    images.mkdir()
    Image.fromarray(data.astronaut()[:66, :75]).save(images / "a.png")
    arguments = ["eval-inn", str(images), "--noise", "6", "0", "--out", str(out), "--device", "cpu"]
    assert cli.main(arguments) == 0
    printed = capsys.readouterr().out
    for name, rows in (("coders", 6), ("levels", 4), ("responses", 6)):
        with (out / f"{name}.csv").open() as file:
            table = list(csv.DictReader(file))
        assert len(table) == rows
        assert all(next(iter(row.values())) in printed for row in table)
    for name in ("evaluation.png", "features.png"):
        with Image.open(out / name) as picture:
            assert np.asarray(picture.convert("RGB")).std() > 10


def bad_commands(folder: Path) -> dict[str, tuple[list[str], str]]:
    good = folder / "good.png"
    Image.new("RGB", (32, 32)).save(good)
    Image.new("RGB", (32, 40)).save(folder / "other.png")
    Image.new("RGB", (4, 4)).save(folder / "tiny.png")
    (folder / "text.png").write_text("text")
    (folder / "empty").mkdir()
    pair = ["compare", str(good)]
    no_pair = ["compare", "none.png", "none.png"]  # an output is looked at before the images are
    two = ["compare", str(folder), str(folder)]
    return {
        "missing image": ([*pair, str(folder / "none.png")], "cannot read image"),
        "no image": ([*pair, str(folder / "text.png")], "text.png"),
        "a folder": ([*pair, str(folder)], f"give two files or two folders, got {good} and {folder}"),
        "other size": ([*pair, str(folder / "other.png")], "same shape, got sr (1, 3, 32, 32) and gt (1, 3, 40, 32)"),
        "tile of no size": ([*no_pair, "--tile", "100"], "tile must be a multiple of 8, got 100"),
        "table of another format": ([*no_pair, "--csv", "x.txt"], "cannot write x.txt: expected one of .csv"),
        "unwritable values": ([*no_pair, "--json", str(folder / "no" / "x.json")], f"cannot write {folder}/no/x.json"),
        "pictures into a file": ([*two, "--heatmap", str(good)], f"cannot write {good}"),
        "unknown preset": ([*pair, str(good), "--preset", "x"], "preset must be one of"),
        "too small": (["compare", *[str(folder / "tiny.png")] * 2], "at least 8 x 8"),
        "unknown checkpoint": ([*pair, str(good), "--inn", "not a name"], "unknown checkpoint 'not a name'"),
        "unwritable heat map": (
            [*no_pair, "--heatmap", str(folder / "no" / "x.png")],
            f"cannot write {folder}/no/x.png",
        ),
        "heat map of no format": ([*no_pair, "--heatmap", "heat"], "cannot write heat: expected one of"),
        "heat map of another format": ([*no_pair, "--heatmap", "heat.xyz"], "got .xyz"),
        "heat map that is no text": ([*no_pair, "--heatmap", "\udce9.png"], "cannot write \\udce9.png"),
        "demo that is no text": (["demo", "--out", "\udce9"], "cannot write \\udce9"),
        "demo into a file": (["demo", "--out", str(good)], f"cannot write {good}"),
        "network into a file": (["train-inn", "--images", str(folder), "--out", str(good), "--cpu"], "cannot write"),
        "network that is no text": (["train-inn", "--images", "x", "--out", "\udce9", "--cpu"], "cannot write \\udce9"),
        "evaluation into a file": (["eval-inn", str(folder), "--out", str(good / "x")], "cannot write"),
        "no training images": (["train-inn", "--images", str(folder / "empty")], "no images"),
        "bad network": (["train-inn", "--images", str(folder), "--hidden", "0"], "hidden must be"),
        "save never": (
            ["train-inn", "--images", str(folder), "--save-every", "0"],
            "save_every must be an integer of at least 1",
        ),
        "negative crop": (
            ["train-inn", "--images", str(folder), "--crop", "-8"],
            "crop must be an integer of at least 1",
        ),
        "negative rate": (["train-inn", "--images", str(folder), "--learning-rate", "-1"], "learning_rate must be"),
        "evaluation of nothing": (["eval-inn", str(folder / "empty")], "no images"),
        "negative noise": (
            ["eval-inn", str(folder), "--noise", "-1"],
            "--noise must be a finite number of at least 0, got -1",
        ),
        "noise that is no number": (["eval-inn", str(folder), "--noise", "nan"], "--noise must be a finite number"),
        "no picture to draw": (["eval-inn", str(folder), "--features-of", "none.png"], "cannot read image none.png"),
        "unknown data set": (["train-inn", "--dataset", str(folder / "empty"), "--streaming", "--cpu"], "data"),
        "no steps": (["demo", "--steps", "0"], "--steps must be an integer of at least 1"),
        "info of nothing": (["info", "--inn", str(folder / "x.safetensors")], "unknown checkpoint"),
    }


MODULES_OF_EXTRAS = ("mghf_loss.training.", "mghf_loss.compare")  # which an earlier test may have imported
BAD_COMMANDS = [
    "missing image",
    "no image",
    "a folder",
    "other size",
    "tile of no size",
    "table of another format",
    "unwritable values",
    "pictures into a file",
    "unknown preset",
    "too small",
    "unknown checkpoint",
    "unwritable heat map",
    "heat map of no format",
    "heat map of another format",
    "heat map that is no text",
    "demo that is no text",
    "demo into a file",
    "network into a file",
    "network that is no text",
    "evaluation into a file",
    "no training images",
    "bad network",
    "save never",
    "negative crop",
    "negative rate",
    "evaluation of nothing",
    "negative noise",
    "noise that is no number",
    "no picture to draw",
    "unknown data set",
    "no steps",
    "info of nothing",
]


def test_an_interrupt_is_one_line(monkeypatch, capsys):
    def interrupt(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_info", interrupt)
    assert cli.main(["info"]) == 130
    assert capsys.readouterr().err == "\nmghf-loss: interrupted\n"


@pytest.mark.process
@pytest.mark.parametrize("imported", ["torch", "mghf_loss.mghf", "matplotlib", "accelerate"])
def test_an_interrupt_of_an_import_is_one_line(imported, tmp_path):
    program = f"""
import signal, sys
class Interrupt:
    def find_spec(name, *_):
        if name == {imported!r}:
            signal.raise_signal(signal.SIGINT)
sys.meta_path.insert(0, Interrupt)
from mghf_loss.cli import main
sys.exit(main(sys.argv[1:]))
"""
    command = (
        ["train-inn", "--images", "x"] if imported == "accelerate" else ["compare", "a", "b", "--heatmap", "c.png"]
    )
    done = subprocess.run([sys.executable, "-c", program, *command], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 130
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("mghf-loss: interrupted")


def test_an_interrupt_of_the_parser_is_one_line(monkeypatch, capsys):
    def interrupt():
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_parser", interrupt)
    assert cli.main(["info"]) == 130
    assert capsys.readouterr().err == "\nmghf-loss: interrupted\n"


def test_names_that_are_no_text_are_printed(monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), "utf-8"))
    monkeypatch.setattr(cli, "_info", lambda _: print("caf\udce9"))
    assert cli.main(["info"]) == 0
    sys.stdout.seek(0)
    assert sys.stdout.read() == "caf\\udce9\n"


def test_an_unusable_device_is_named(pair, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["compare", *pair, "--device", "nosuch"])
    assert stopped.value.code == 2
    assert "cannot use device 'nosuch'" in capsys.readouterr().err


@pytest.mark.parametrize("case", BAD_COMMANDS)
def test_errors_are_one_line_and_exit_code_2(case, tmp_path, capsys):
    arguments, message = bad_commands(tmp_path)[case]
    assert cli.main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("mghf-loss: error: ")
    assert message in captured.err
    assert "Traceback" not in captured.err


@pytest.mark.parametrize(
    ("command", "module", "extra"),
    [
        ("compare", "PIL", "demo"),
        ("compare", "skimage", "demo"),
        ("train-inn", "accelerate", "train"),
        ("train-inn", "datasets", "train"),
        ("train-inn", "tensorboard", "train"),
        ("eval-inn", "matplotlib", "train"),
    ],
)
def test_a_missing_extra_is_named(command, module, extra, pair, tmp_path, monkeypatch, capsys):
    (tmp_path / "empty").mkdir()
    out = ["--out", str(tmp_path / "out")]
    small = ["--steps", "1", "--batch", "1", "--crop", "16", "--cpu", *out]
    arguments = {
        "compare": list(pair),
        "accelerate": ["--images", str(tmp_path), *small],
        "datasets": ["--dataset", "x", *small],
        "tensorboard": ["--images", str(tmp_path), "--tensorboard", *small],
        "eval-inn": [str(tmp_path), *out],
    }
    for loaded in [name for name in sys.modules if name.startswith((*MODULES_OF_EXTRAS, f"{module}."))]:
        monkeypatch.delitem(sys.modules, loaded)
    for name, value in list(vars(training).items()):
        if isinstance(value, ModuleType):  # or later tests would meet a second copy of it
            monkeypatch.delattr(training, name)
    monkeypatch.delattr(mghf_loss, "compare", raising=False)
    monkeypatch.setitem(sys.modules, module, None)
    assert cli.main([command, *arguments.get(command, arguments.get(module, []))]) == 2
    assert f"it is in the extra {extra}: pip install '.[{extra}]'" in capsys.readouterr().err


@pytest.mark.process
def test_the_installed_command_answers():
    command = Path(sys.executable).parent / "mghf-loss"
    done = subprocess.run([command, "compare", "none.png", "none.png"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "cannot read image none.png" in done.stderr
    assert "Traceback" not in done.stderr
    usage = subprocess.run([command], capture_output=True, text=True)
    assert usage.returncode == 2
