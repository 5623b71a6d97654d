"""BasicSR's own `train_pipeline`, from a YAML file: training, logs per term, validation, checkpoint, resumption."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

pytestmark = pytest.mark.train

if importlib.util.find_spec("basicsr") is None:
    pytest.skip("BasicSR is not installed: its sdist does not build on Python 3.13", allow_module_level=True)

OPTIONS = """
name: run
model_type: MGHFSRModel
scale: 4
num_gpu: 0
manual_seed: 0
datasets:
  train:
    name: train
    type: PairedImageDataset
    dataroot_gt: gt
    dataroot_lq: lq
    io_backend: {type: disk}
    gt_size: 32
    use_hflip: true
    use_rot: true
    use_shuffle: true
    num_worker_per_gpu: 0
    batch_size_per_gpu: 2
    dataset_enlarge_ratio: 1
    prefetch_mode: ~
  val:
    name: val
    type: PairedImageDataset
    dataroot_gt: gt
    dataroot_lq: lq
    io_backend: {type: disk}
network_g: {type: MSRResNet, num_in_ch: 3, num_out_ch: 3, num_feat: 8, num_block: 1, upscale: 4}
path: {pretrain_network_g: ~, strict_load_g: true, resume_state: ~}
train:
  ema_decay: 0
  optim_g: {type: Adam, lr: !!float 1e-3, betas: [0.9, 0.99]}
  scheduler: {type: MultiStepLR, milestones: [100], gamma: 0.5}
  total_iter: 4
  warmup_iter: -1
  pixel_opt: {type: MGHFLoss, preset: paper, loss_weight: 0.1, coefficients: {patch_nce: 0}}
  perceptual_opt: {type: MGHFPerceptualLoss, preset: paper, perceptual_weight: 0.05, style_weight: 0.02}
val:
  val_freq: 4
  save_img: false
  metrics:
    psnr: {type: calculate_psnr, crop_border: 4, test_y_channel: false}
logger: {print_freq: 1, save_checkpoint_freq: 4, use_tb_logger: true, wandb: {project: ~}}
dist_params: {backend: gloo, port: 29500}
"""

# The same data, network and seed, with the losses and the steps written by hand.
BARE = """
import json, yaml, torch
import mghf_loss.integrations.basicsr  # for torchvision's sake alone
from basicsr.archs import build_network
from basicsr.data import build_dataloader, build_dataset
from basicsr.data.data_sampler import EnlargedSampler
from basicsr.utils import set_random_seed
from mghf_loss import MGHFLoss

torch.set_num_threads(1)
opt = yaml.safe_load(open("options.yml").read())
set_random_seed(0)
data_opt = {**opt["datasets"]["train"], "phase": "train", "scale": 4}
dataset = build_dataset(data_opt)
sampler = EnlargedSampler(dataset, 1, 0, 1)
loader = build_dataloader(dataset, data_opt, num_gpu=0, dist=False, sampler=sampler, seed=0)
network = build_network(opt["network_g"])
first, second = MGHFLoss("paper", coefficients={"patch_nce": 0.0}), MGHFLoss("paper")
optimiser = torch.optim.Adam(network.parameters(), 1e-3, betas=(0.9, 0.99))
rows = []
for epoch in range(3):
    sampler.set_epoch(epoch)
    for batch in loader:
        sr = network(batch["lq"])
        pixel, terms = first(sr, batch["gt"], return_terms=True)
        values = {name: value.mean() for name, value in second.term_values(sr, batch["gt"]).items()}
        percep = 5 * values["content"] + values["correlation"] + 0.008 * values["patch_nce"]
        row = {"l_pix": 0.1 * pixel, "l_percep": 0.05 * percep, "l_style": 0.02 * 600 * values["style"]}
        optimiser.zero_grad()
        sum(row.values()).backward()
        optimiser.step()
        row |= {f"l_pix_{name}": value for name, value in terms.items()}
        row |= {f"l_perceptual_{name}": value for name, value in values.items()}
        rows.append({name: value.item() for name, value in row.items()})
print("ROWS", json.dumps(rows))
"""

TRAIN = """
import torch
import mghf_loss.integrations.basicsr
import mghf_loss.integrations.basicsr  # as often as one likes
from basicsr.train import train_pipeline

torch.set_num_threads(1)
if not torch.cuda.is_available():  # BasicSR moves the resumed state to a GPU without asking
    torch.cuda.current_device = lambda: 0
    torch.UntypedStorage.cuda = lambda storage, *_: storage
train_pipeline(".")
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("basicsr")
    rng = np.random.default_rng(0)
    for name in ("gt", "lq"):
        (folder / name).mkdir()
    for index in range(2):
        coarse = Image.fromarray(rng.integers(0, 256, (12, 12, 3), dtype=np.uint8))
        image = coarse.resize((48, 48), Image.Resampling.BICUBIC)
        image.save(folder / "gt" / f"{index}.png")
        image.resize((12, 12), Image.Resampling.BICUBIC).save(folder / "lq" / f"{index}.png")
    (folder / "options.yml").write_text(OPTIONS)
    (folder / "bare.py").write_text(BARE)
    (folder / "train.py").write_text(TRAIN)
    return folder


def run(folder: Path, *arguments: str) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=environment, text=True, capture_output=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def trained(folder) -> str:
    return run(folder, "train.py", "-opt", "options.yml")


def scalars(folder: Path) -> dict[str, list[float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tb_logger" / "run"))
    events.Reload()
    return {tag: [event.value for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # TensorBoard's own
def test_logged_values_are_those_of_a_loop_written_by_hand(folder, trained):
    bare = json.loads(run(folder, "bare.py").split("ROWS", 1)[1].strip().splitlines()[0])
    logged = scalars(folder)
    terms = {f"l_perceptual_{name}" for name in ("content", "style", "correlation", "patch_nce")}
    terms |= {f"l_pix_{name}" for name in ("content", "style", "correlation")}
    assert set(bare[0]) == {"l_pix", "l_percep", "l_style"} | terms
    assert len(bare) == 3
    for name in bare[0]:
        assert logged[f"losses/{name}"][:3] == pytest.approx([row[name] for row in bare], rel=1e-5), name
        assert len(re.findall(rf"\b{name}: \d", trained)) == 4  # in the text log, too


def test_it_validates_and_saves_the_model_alone(folder, trained):
    assert re.search(r"# psnr: \d+\.\d+", trained)
    assert "colours may drift" in trained  # the pixel slot has MGHFLoss
    state = torch.load(folder / "experiments" / "run" / "models" / "net_g_4.pth", weights_only=True)
    assert all(key.startswith(("conv", "body", "upconv")) for key in state["params"])


def test_it_resumes(folder, trained):
    resumed = run(folder, "train.py", "-opt", "options.yml", "--auto_resume", "--force_yml", "train:total_iter=6")
    assert "Resuming training from epoch: 3, iter: 4." in resumed
    assert [int(i) for i in re.findall(r"iter: +(\d+), lr", resumed)] == [5, 6]
    assert re.search(r"iter: +6, .* l_perceptual_patch_nce: \d", resumed)
