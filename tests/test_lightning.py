"""A Lightning `Trainer` with bfloat16 and gradient accumulation against a loop written by hand; the callback."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader

from mghf_loss import MGHFLoss
from mghf_loss.demo import SmallSR, downscale
from test_integrations import read

lightning = pytest.importorskip("lightning")

from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger  # noqa: E402

from mghf_loss.integrations.lightning import MGHFLogger  # noqa: E402

# Lightning's and TensorBoard's own, about workers, devices and their dependencies.
pytestmark = pytest.mark.filterwarnings("ignore")


EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture
def example(monkeypatch):
    """The example's module."""
    monkeypatch.syspath_prepend(EXAMPLES)
    import lightning_trainer

    return lightning_trainer


def batches(count: int, size: int) -> DataLoader:
    return DataLoader([torch.rand(3, size, size) for _ in range(count)], 2)


class Losses(lightning.Callback):
    def __init__(self) -> None:
        self.values: list[float] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self.values.append(outputs["loss"].item())


def fit(module, loader, tmp_path, **options):
    losses = Losses()
    callbacks = [losses, *options.pop("callbacks", [])]
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_epochs=1,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        **{"logger": TensorBoardLogger(tmp_path), "callbacks": callbacks, **options},
    )
    trainer.fit(module, loader, *([loader] if options.get("limit_val_batches", 1) else []))
    return losses.values


def test_values_are_those_of_a_loop_written_by_hand(example, tmp_path):
    loader = batches(8, 32)
    torch.manual_seed(0)
    module = example.SR()
    hand = SmallSR()
    hand.load_state_dict(module.model.state_dict())
    module.criterion = MGHFLoss({"patch_nce": 0.0})  # no random places
    got = fit(module, loader, tmp_path, precision="bf16-mixed", accumulate_grad_batches=2, limit_val_batches=0)

    optimiser = torch.optim.Adam(hand.parameters(), lr=1e-3)
    criterion, expected = MGHFLoss({"patch_nce": 0.0}), []
    for index, gt in enumerate(loader):
        with torch.autocast("cpu", torch.bfloat16):
            sr = hand(downscale(gt))
            loss = F.l1_loss(sr, gt) + 0.05 * criterion(sr, gt)
        (loss / 2).backward()
        if index % 2:
            optimiser.step()
            optimiser.zero_grad()
        expected.append(loss.item())
    assert len(got) == 4
    # Lightning reports a loss divided by the number of accumulated batches.
    assert [2 * value for value in got] == pytest.approx(expected, rel=1e-5)


def test_the_callback_writes_each_chosen_step_once(example, tmp_path):
    loader = batches(16, 16)
    fit(example.SR(), loader, tmp_path, accumulate_grad_batches=2, callbacks=[MGHFLogger(every=2, images=1)])
    ((folder),) = (tmp_path / "lightning_logs").iterdir()
    events = read(folder)
    assert [event.step for event in events.Scalars("mghf/train/term/content")] == [2, 4]  # of 4 steps in 8 batches
    assert [event.step for event in events.Scalars("mghf/val/term/content")] == [4]
    assert [event.step for event in events.Images("mghf/train/heatmap/total")] == [2, 4]


def test_the_callback_may_leave_out_training(example, tmp_path):
    fit(example.SR(), batches(2, 16), tmp_path, callbacks=[MGHFLogger(every=None, images=0)])
    ((folder),) = (tmp_path / "lightning_logs").iterdir()
    tags = read(folder).Tags()
    assert "mghf/val/loss" in tags["scalars"]
    assert not [tag for tag in tags["scalars"] if tag.startswith("mghf/train")]
    assert tags["images"] == []


def test_mistakes_are_named_before_they_cost_time(example, tmp_path):
    loader = batches(2, 16)
    with pytest.raises(ValueError, match="MGHFLogger needs a TensorBoardLogger"):
        fit(example.SR(), loader, tmp_path, logger=CSVLogger(tmp_path), callbacks=[MGHFLogger()])
    with pytest.raises(TypeError, match=r"SR\.loss must be an MGHFLoss"):
        fit(example.SR(), loader, tmp_path, callbacks=[MGHFLogger("loss")])
    module = example.SR()
    module.training_step = lambda gt, batch_idx: module.criterion(module.model(downscale(gt)), gt)
    with pytest.raises(TypeError, match='training_step must return a dictionary with "sr" and "gt"'):
        fit(module, loader, tmp_path, callbacks=[MGHFLogger(every=1)])
    for options, message in (({"every": 0}, "every must be at least 1"), ({"images": -1}, "images must be at least 0")):
        with pytest.raises(ValueError, match=message):
            MGHFLogger(**options)


def test_the_example_runs_with_bf16_and_accumulation(tmp_path):
    """As a user would."""
    command = [sys.executable, str(EXAMPLES / "lightning_trainer.py"), "--steps", "2", "--batch", "2", "--out", "runs"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=tmp_path, env=environment, text=True, capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    (folder,) = (tmp_path / "runs" / "lightning_logs").iterdir()
    (checkpoint,) = folder.rglob("*.ckpt")
    state = torch.load(checkpoint, weights_only=True)
    assert state["global_step"] == 2  # of two batches each
    assert all(key.startswith("model.") for key in state["state_dict"])
    tags, terms = read(folder).Tags(), ["content", "style", "correlation", "patch_nce"]
    assert {f"train/{name}" for name in ["loss", *terms]} <= set(tags["scalars"])
    for stage in ("train", "val"):
        assert {f"mghf/{stage}/term/{name}" for name in terms} <= set(tags["scalars"])
        assert f"mghf/{stage}/energy/level3_sr" in tags["scalars"]
        assert {f"mghf/{stage}/heatmap/{name}" for name in [*terms, "total"]} <= set(tags["images"])
