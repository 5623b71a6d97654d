"""A Lightning `Trainer` with bfloat16 and gradient accumulation against a loop written by hand; the callback."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader

from mghf_loss import MGHFLoss
from mghf_loss.toy import SmallSR, downscale
from test_integrations import read

lightning = pytest.importorskip("lightning")

from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger  # noqa: E402

from mghf_loss.integrations.lightning import MGHFLogger  # noqa: E402

# Lightning's and TensorBoard's own, about workers, devices and their dependencies.
pytestmark = [pytest.mark.train, pytest.mark.filterwarnings("ignore")]


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


def trainer(tmp_path, **options):
    defaults = {
        "accelerator": "cpu",
        "max_epochs": 1,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "logger": TensorBoardLogger(tmp_path),
    }
    return lightning.Trainer(**{**defaults, **options})


def fit(module, loader, tmp_path, **options):
    losses = Losses()
    loop = trainer(tmp_path, **{**options, "callbacks": [losses, *options.pop("callbacks", [])]})
    loop.fit(module, loader, *([loader] if options.get("limit_val_batches", 1) else []))
    return losses.values


def logged(tmp_path):
    return read(tmp_path / "lightning_logs" / "version_0")


def test_values_are_those_of_a_loop_written_by_hand(example, tmp_path):
    loader = batches(8, 32)
    torch.manual_seed(0)
    module = example.SR()
    hand = SmallSR()
    hand.load_state_dict(module.model.state_dict())
    got = fit(module, loader, tmp_path, precision="bf16-mixed", accumulate_grad_batches=2, limit_val_batches=0)

    optimiser = torch.optim.Adam(hand.parameters(), lr=1e-3)
    criterion, expected = MGHFLoss(), []
    for index, gt in enumerate(loader):
        with torch.autocast("cpu", torch.bfloat16):
            sr = hand(downscale(gt))
            loss = F.l1_loss(sr, gt) + criterion(sr, gt)
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
    events = logged(tmp_path)
    assert [event.step for event in events.Scalars("mghf/train/term/content")] == [2, 4]  # of 4 steps in 8 batches
    # Lightning's own step of what a module logs: that of the last batch, counted from 0.
    assert [event.step for event in events.Scalars("mghf/val/term/content")] == [3]
    assert [event.step for event in events.Images("mghf/train/heatmap/total")] == [2, 4]


def test_the_callback_may_leave_out_training(example, tmp_path):
    fit(example.SR(), batches(2, 16), tmp_path, callbacks=[MGHFLogger(every=None, images=0)])
    tags = logged(tmp_path).Tags()
    assert "mghf/val/loss" in tags["scalars"]
    assert not [tag for tag in tags["scalars"] if tag.startswith("mghf/train")]
    assert tags["images"] == []


def test_the_callback_writes_every_loader_to_every_writer_in_inference_mode(example, tmp_path):
    """`Trainer.validate` runs in inference mode, the validation within `fit` does not."""
    loggers = [TensorBoardLogger(tmp_path / name) for name in ("first", "second")]
    module = example.SR()
    step = module.validation_step
    module.validation_step = lambda gt, batch_idx, dataloader_idx: step(gt, batch_idx)
    loop = trainer(tmp_path, logger=loggers, callbacks=[MGHFLogger(images=3)])
    loop.validate(module, [batches(4, 16), batches(2, 24)])
    for logger in loggers:
        events = read(logger.log_dir)
        for tag in ("mghf/val", "mghf/val1"):
            assert len(events.Scalars(f"{tag}/term/content")) == 1
            (heat,) = events.Images(f"{tag}/heatmap/total")
            assert max(heat.width, heat.height) == 2 * min(heat.width, heat.height)  # both images of the batch


def test_the_callback_writes_on_the_first_process_alone(example, tmp_path, monkeypatch):
    """Validation goes through Lightning, which averages over processes."""
    monkeypatch.setattr(lightning.Trainer, "is_global_zero", property(lambda trainer: False))
    fit(example.SR(), batches(2, 16), tmp_path, callbacks=[MGHFLogger(every=1)])
    tags = logged(tmp_path).Tags()
    assert not [tag for tag in tags["scalars"] if tag.startswith("mghf/train")]
    assert "mghf/val/loss" in tags["scalars"]
    assert tags["images"] == []


def test_any_logger_gets_each_term_once(example, tmp_path):
    """Beside Lightning's own interval, which is larger; validation has the mean over its batches."""
    module, loader = example.SR(), batches(6, 16)
    loop = trainer(tmp_path, logger=CSVLogger(tmp_path), callbacks=[MGHFLogger(every=2)], log_every_n_steps=50)
    loop.fit(module, loader, loader)
    loop.logger.save()
    with Path(loop.logger.log_dir, "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    train = [row for row in rows if row["mghf/train/term/content"]]
    assert [int(row["step"]) for row in train] == [2]
    (val,) = [row for row in rows if row["mghf/val/term/content"]]
    terms = {name.rsplit("/", 1)[1] for name in rows[0] if "/term/" in name}
    assert terms == {"content", "style", "correlation", "texture", "grid"}
    for name in terms:
        assert [column for column in rows[0] if column.endswith(f"/{name}")] == [
            f"mghf/{stage}/term/{name}" for stage in ("train", "val") if f"mghf/{stage}/term/{name}" in rows[0]
        ]
    with torch.no_grad():
        seed = torch.Generator().manual_seed(3)  # the callback's: the step
        expected = [module.criterion(module.model(downscale(gt)), gt, generator=seed).item() for gt in loader]
    assert float(val["mghf/val/loss"]) == pytest.approx(sum(expected) / len(expected), rel=1e-4)
    assert float(loop.callback_metrics["mghf/val/loss"]) == pytest.approx(float(val["mghf/val/loss"]), rel=1e-6)


class TwoOptimisers(lightning.LightningModule):
    """A generator that waits for the second batch, and a critic: `global_step` is 1, 3, 5, ..."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.model, self.critic, self.criterion = SmallSR(8, 1), torch.nn.Conv2d(3, 1, 3), MGHFLoss()

    def configure_optimizers(self):
        return [torch.optim.Adam(part.parameters()) for part in (self.model, self.critic)]

    def training_step(self, gt, batch_idx):
        sr = self.model(downscale(gt))
        for index, optimiser in enumerate(self.optimizers()):
            optimiser.zero_grad()
            self.manual_backward(self.criterion(sr, gt) if index == 0 else self.critic(gt).mean())
            if index or batch_idx:
                optimiser.step()
        return {"sr": sr, "gt": gt}


def test_the_callback_counts_the_steps_of_several_optimisers(tmp_path):
    trainer(tmp_path, callbacks=[MGHFLogger(every=4, images=0)]).fit(TwoOptimisers(), batches(16, 16))
    assert [event.step for event in logged(tmp_path).Scalars("mghf/train/loss")] == [5, 9, 13]


def test_the_callback_goes_on_after_a_resumption(example, tmp_path):
    """Step 2, that of the checkpoint, was logged before it."""
    first = trainer(tmp_path, max_steps=2, logger=False)
    first.fit(example.SR(), batches(4, 16))
    first.save_checkpoint(tmp_path / "two.ckpt")
    options = {"max_epochs": 3, "accumulate_grad_batches": 2, "callbacks": [MGHFLogger(every=2, images=0)]}
    trainer(tmp_path, **options).fit(example.SR(), batches(8, 16), ckpt_path=tmp_path / "two.ckpt")
    assert [event.step for event in logged(tmp_path).Scalars("mghf/train/loss")] == [4, 6]


def test_the_callback_passes_over_what_a_step_leaves_out(example, tmp_path):
    module = example.SR()
    step = module.training_step
    module.training_step = lambda gt, batch_idx: None if batch_idx in (0, 3) else step(gt, batch_idx)
    module.validation_step = lambda gt, batch_idx: None
    loop = trainer(tmp_path, callbacks=[MGHFLogger(every=1, images=0)])
    loop.fit(module, batches(10, 16), batches(2, 16))
    events = logged(tmp_path)
    assert len(events.Scalars("mghf/train/loss")) == 3
    assert "mghf/val/loss" not in events.Tags()["scalars"]


def test_the_loss_may_be_built_late_compiled_and_logged_in_training_alone(example, tmp_path):
    class Late(example.SR):
        def __init__(self) -> None:
            super().__init__()
            self.criterion = None

        def configure_model(self) -> None:
            if self.criterion is None:
                self.criterion = torch.compile(MGHFLoss(), backend="eager")

        def validation_step(self, gt, batch_idx):
            return self.model(downscale(gt)).mean()

    fit(Late(), batches(2, 16), tmp_path, callbacks=[MGHFLogger(every=1, validation=False)])
    tags = logged(tmp_path).Tags()["scalars"]
    assert "mghf/train/loss" in tags
    assert "mghf/val/loss" not in tags


def test_a_test_needs_no_logger(example, tmp_path):
    module = example.SR()
    module.test_step = lambda gt, batch_idx: module.log("loss", module.criterion(module.model(downscale(gt)), gt))
    (metrics,) = trainer(tmp_path, logger=False, callbacks=[MGHFLogger()]).test(module, batches(2, 16))
    assert metrics["loss"] > 0


def test_a_dry_run_needs_no_logger(example, tmp_path):
    assert len(fit(example.SR(), batches(2, 16), tmp_path, callbacks=[MGHFLogger(every=1)], fast_dev_run=True)) == 1


def test_mistakes_are_named_before_they_cost_time(example, tmp_path):
    loader = batches(2, 16)
    with pytest.raises(ValueError, match="MGHFLogger needs a logger"):
        fit(example.SR(), loader, tmp_path, logger=False, callbacks=[MGHFLogger()])
    with pytest.raises(TypeError, match=r"SR\.loss must be a loss of mghf-loss"):
        fit(example.SR(), loader, tmp_path, callbacks=[MGHFLogger("loss")])
    module = example.SR()
    module.training_step = lambda gt, batch_idx: module.criterion(module.model(downscale(gt)), gt)
    with pytest.raises(TypeError, match='training_step must return a dictionary with "sr" and "gt"'):
        fit(module, loader, tmp_path, callbacks=[MGHFLogger(every=1000)])  # at the first batch
    module = example.SR()
    module.validation_step = lambda gt, batch_idx: module.criterion(module.model(downscale(gt)), gt)
    with pytest.raises(TypeError, match='validation_step must return a dictionary with "sr" and "gt"'):
        fit(module, loader, tmp_path, callbacks=[MGHFLogger()], num_sanity_val_steps=1)
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
    tags = read(folder).Tags()
    terms = [name for name, factor in MGHFLoss().coefficients.items() if factor]
    assert {"train/loss", "val/psnr"} <= set(tags["scalars"])
    assert not {f"train/{name}" for name in terms} & set(tags["scalars"])  # each term once
    for stage in ("train", "val"):
        assert {f"mghf/{stage}/term/{name}" for name in terms} <= set(tags["scalars"])
        assert f"mghf/{stage}/energy/level3_sr" in tags["scalars"]
        assert {f"mghf/{stage}/heatmap/{name}" for name in [*terms, "total"]} <= set(tags["images"])
