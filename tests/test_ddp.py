"""Two gloo processes train a small SR model with the loss inside the wrapped module, or prepared by Accelerate."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from mghf_loss import HighFrequencyINN, INNConfig, MGHFLoss
from mghf_loss.criterion import Memory

pytestmark = pytest.mark.process


class Step(nn.Module):
    def __init__(self, memory: Memory) -> None:
        super().__init__()
        self.model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 12, 3, padding=1))
        inn = HighFrequencyINN(INNConfig(levels=2, hidden=4))
        self.criterion = MGHFLoss(coefficients={"patch_nce": 0.008}, inn=inn, patches=32, memory=memory)

    def forward(self, gt: Tensor) -> Tensor:
        lr = F.avg_pool2d(gt, 2)
        sr = F.pixel_shuffle(self.model(lr), 2)
        return F.l1_loss(sr, gt) + 0.1 * self.criterion(sr, gt)


def train(rank: int, folder: str, memory: Memory) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    try:
        torch.manual_seed(0)
        step = DistributedDataParallel(Step(memory))
        initial = [parameter.detach().clone() for parameter in step.parameters()]
        optimiser = torch.optim.Adam(step.parameters(), lr=1e-2)
        torch.manual_seed(100 + rank)  # other images and other places on each rank
        losses = []
        gt = torch.rand(2, 3, 16, 16)
        for _ in range(8):
            optimiser.zero_grad()
            loss = step(gt)
            loss.backward()
            optimiser.step()
            losses.append(loss.item())
        result = {"initial": initial, "final": [p.detach() for p in step.parameters()], "losses": losses}
        torch.save(result, f"{folder}/rank{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("memory", ["normal", "low"])
def test_ranks_train_and_agree(tmp_path: Path, memory: Memory):
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    mp.spawn(train, args=(str(tmp_path), memory), nprocs=2)
    ranks = [torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in range(2)]
    for one, other, initial in zip(ranks[0]["final"], ranks[1]["final"], ranks[0]["initial"], strict=True):
        assert torch.equal(one, other)
        assert not torch.equal(one, initial)
    for rank in ranks:
        assert rank["losses"][-1] < rank["losses"][0]
    assert ranks[0]["losses"] != ranks[1]["losses"]


def prepare(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    try:
        accelerator = Accelerator(cpu=True)
        assert accelerator.num_processes == 2
        step = accelerator.prepare(Step("normal"))
        accelerator.backward(step(torch.rand(1, 3, 16, 16)))
        assert all(parameter.grad is not None for parameter in step.parameters())
        criterion = MGHFLoss()
        with pytest.raises(RuntimeError, match="DistributedDataParallel is not needed"):  # several GPUs: taken as it is
            accelerator.prepare(criterion)
        assert criterion(*torch.rand(2, 1, 3, 16, 16).unbind(0)) > 0  # the way to use it
        Path(folder, f"rank{rank}").touch()
    finally:
        dist.destroy_process_group()


def test_accelerate_prepares_a_loss_inside_a_module_and_says_that_one_alone_needs_nothing(tmp_path: Path):
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    mp.spawn(prepare, args=(str(tmp_path),), nprocs=2)
    assert {path.name for path in tmp_path.glob("rank*")} == {"rank0", "rank1"}
