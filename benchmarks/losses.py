"""Cost of our losses and their peers over resolution and batch: time, peak and saved memory, share of an SR step.

    python -m benchmarks.losses                            # 64, 128 and 256 pixels, batches of 1 and 4
    python -m benchmarks.losses --sizes 128 --batches 1    # one setting; the table keeps the others

Every loss gets the same SR and GT images in one process, and a gradient for SR. A measurement is forward and
backward together.

- Time: rounds are interleaved (each runs every loss once, in a random order), so that drift hits all alike;
  rounds of warm-up are discarded. Median, 20th and 80th percentile.
- Saved: bytes of the distinct storages that autograd keeps between forward and backward: with the images where a
  loss keeps them, without parameters and buffers, which are there anyway and have a column of their own (weights).
- Peak: most bytes allocated at once during forward and backward, above what was allocated before. CUDA: the
  caching allocator's own record. CPU: torch's allocator as the profiler records it, which sees every tensor but
  not the scratch memory that oneDNN or MKL allocate by themselves.
- Share: time of the loss over that of one training step without it, of an x4 model of EDSR-baseline's size (16 blocks
  of 64 channels) on the images that give this GT size: forward, L1 and backward, no optimiser. It is a row too.

A setting is one size and batch. Its rows replace those of the same device, threads, size and batch in the table, which
is written after each setting.

Peers go through their public API, with random weights where pretrained ones would be downloaded: they serve for
cost only. The two that always download, torchmetrics' LPIPS and DISTS, are built around that as the code says.
Every parameter is frozen, also where a peer leaves some trainable: a trainer has no use for their gradients. What
is not installed or cannot run is skipped with the reason.
"""

from __future__ import annotations

import argparse
import csv
import random
import time
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from benchmarks.machine import device_name, file_label, peak_bytes, percentiles, provenance, synchronize
from benchmarks.peers import (
    PEERS,
    Peer,
    dists,
    kornia_ssim,
    lpips,
    on_unit_range,
    one_minus,
    piq,
    ssim,
    torchmetrics_lpips,
    with_gradient,
)
from mghf_loss import DinoJSDLoss, MGHFLoss, MGHFnLoss
from mghf_loss._files import format_table, write_table
from mghf_loss.criterion import Memory
from mghf_loss.dino import DEFAULT_MODEL
from mghf_loss.frozen import Frozen
from mghf_loss.mghf import PRESETS
from mghf_loss.toy import SmallSR, downscale

OURS = "mghf-loss"
STEP = "SR step"
MIB = 2**20
SETTING = ("device", "threads", "batch", "size")


def content_and(inn: str, *terms: str) -> nn.Module:
    """MGHFLoss with the content term and `terms` alone, at their default coefficients."""
    off = [name for name in PRESETS["paper"].coefficients if name not in {"content", *terms}]
    return MGHFLoss("paper", coefficients=dict.fromkeys(off, 0.0), inn=inn)


def dino(memory: Memory = "normal") -> nn.Module:
    import timm

    network = timm.create_model(DEFAULT_MODEL, pretrained=False, dynamic_img_size=True, num_classes=0)
    return DinoJSDLoss(network, memory=memory)


class StepOfEDSR(nn.Module):
    """One training step of an x4 model, as a loss of (anything, gt) with gradients to the model's parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.model = SmallSR(width=64, blocks=16)

    def forward(self, sr: Tensor, gt: Tensor) -> Tensor:
        """L1 of the model's output; `sr` is only there for the gradient that every loss is asked for."""
        return F.l1_loss(self.model(downscale(gt)), gt) + 0 * sr.sum()


def entries(inn: str) -> dict[str, Peer]:
    return {
        "MGHFnLoss": Peer(OURS, partial(MGHFnLoss, inn=inn)),
        "MGHFLoss": Peer(OURS, partial(MGHFLoss, inn=inn)),
        "MGHFLoss paper": Peer(OURS, partial(MGHFLoss, "paper", inn=inn)),
        "MGHFLoss sharp": Peer(OURS, partial(MGHFLoss, "sharp", inn=inn)),
        "MGHFLoss sharp low memory": Peer(OURS, partial(MGHFLoss, "sharp", inn=inn, memory="low")),
        "MGHFLoss cached GT": Peer(OURS, partial(MGHFLoss, inn=inn, cache_gt=True)),  # one GT tensor in all rounds
        "MGHFLoss paper dense": Peer(OURS, partial(MGHFLoss, "paper", inn=inn, patches=None)),
        "content": Peer(OURS, partial(content_and, inn)),
        "content + style": Peer(OURS, partial(content_and, inn, "style")),
        "content + correlation": Peer(OURS, partial(content_and, inn, "correlation")),
        "content + patch_nce": Peer(OURS, partial(content_and, inn, "patch_nce")),
        "DinoJSDLoss": Peer(OURS, dino),
        "DinoJSDLoss low memory": Peer(OURS, partial(dino, memory="low")),
        "lpips alex": Peer("lpips", partial(lpips, "alex", False), on_unit_range),
        "lpips vgg": Peer("lpips", partial(lpips, "vgg", False), on_unit_range),
        "lpips squeeze": Peer("lpips", partial(lpips, "squeeze", False), on_unit_range),
        "torchmetrics lpips vgg": Peer("torchmetrics", torchmetrics_lpips, on_unit_range),
        "DISTS": Peer("DISTS-pytorch", partial(dists, False), with_gradient),
        "piq content vgg16": Peer("piq", partial(piq, "ContentLoss")),
        "piq style vgg16": Peer("piq", partial(piq, "StyleLoss")),
        "pytorch-msssim SSIM": PEERS["ssim"],
        "pytorch-msssim MS-SSIM": Peer("pytorch-msssim", partial(ssim, "MS_SSIM"), one_minus),
        "kornia SSIM": Peer("kornia", kornia_ssim),
        "focal frequency": PEERS["focal-frequency"],
        STEP: Peer(OURS, StepOfEDSR),
    }


@dataclass(frozen=True)
class Candidate:
    """A loss that is built, with the images to measure it on."""

    name: str
    entry: Peer
    loss: nn.Module
    sr: Tensor
    gt: Tensor

    def forward(self) -> Tensor:
        """The loss of `sr` against `gt`, a 0-d tensor."""
        return self.entry.call(self.loss, self.sr, self.gt)

    def forward_backward(self) -> None:
        """What is measured."""
        trained = [parameter for parameter in self.loss.parameters() if parameter.requires_grad]
        torch.autograd.grad(self.forward(), [self.sr, *trained])

    def milliseconds(self) -> float:
        """Time of one forward and backward."""
        synchronize(self.sr.device)
        start = time.perf_counter()
        self.forward_backward()
        synchronize(self.sr.device)
        return (time.perf_counter() - start) * 1e3

    def weights(self) -> dict[int, int]:
        """Bytes of each storage of parameters and buffers, by address."""
        modules = [self.loss]  # our losses hide their frozen networks from modules()
        modules += [module.network for module in self.loss.modules() if isinstance(module, Frozen)]
        return storages(tensor for module in modules for tensor in (*module.parameters(), *module.buffers()))

    def saved_bytes(self) -> int:
        """What autograd keeps after the forward pass, without the weights."""
        saved: list[Tensor] = []  # keeps the tensors alive, so that no address is given out twice

        def pack(tensor: Tensor) -> Tensor:
            saved.append(tensor.detach())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            self.forward()
        weights = self.weights()
        return sum(size for address, size in storages(saved).items() if address not in weights)


def storages(tensors: Iterable[Tensor]) -> dict[int, int]:
    """Bytes of each distinct storage, by address."""
    return {storage.data_ptr(): storage.nbytes() for storage in (tensor.untyped_storage() for tensor in tensors)}


def build_all(chosen: dict[str, Peer], device: torch.device) -> dict[str, nn.Module]:
    """Build every loss; print why a peer is left out where it cannot be had."""
    losses = {}
    for name, entry in tqdm(chosen.items(), desc="build", unit="loss"):
        try:
            losses[name] = entry.build().to(device)
        except Exception as error:  # a peer may fail in any way
            if entry.package == OURS:
                raise
            tqdm.write(f"skipped {name}: {type(error).__name__}: {error}")
            continue
        if name != STEP:
            losses[name].requires_grad_(False)
    return losses


def candidates_of(chosen: dict[str, Peer], losses: dict[str, nn.Module], sr: Tensor, gt: Tensor) -> list[Candidate]:
    """The losses that can be measured on `sr` and `gt`: each is run once; print why one is left out."""
    candidates = []
    for name, loss in losses.items():
        candidate = Candidate(name, chosen[name], loss, sr, gt)
        try:
            candidate.forward_backward()
        except Exception as error:  # images too small for a peer, memory
            if chosen[name].package == OURS and not isinstance(error, torch.OutOfMemoryError):
                raise
            tqdm.write(f"skipped {name} at {tuple(gt.shape)}: {type(error).__name__}: {error}")
        else:
            candidates.append(candidate)
    return candidates


def measure_times(candidates: list[Candidate], rounds: int, warmup: int) -> dict[str, list[float]]:
    """20th percentile, median and 80th percentile of every loss's milliseconds in the rounds after the warm-up."""
    times: dict[str, list[float]] = {candidate.name: [] for candidate in candidates}
    order, shuffle = list(candidates), random.Random(0).shuffle
    for index in tqdm(range(warmup + rounds), desc="time", unit="round"):
        shuffle(order)
        for candidate in order:
            elapsed = candidate.milliseconds()
            if index >= warmup:
                times[candidate.name].append(elapsed)
    return {name: percentiles(each) for name, each in times.items()}


def measure_setting(candidates: list[Candidate], arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of all candidates, which share their images."""
    times = measure_times(candidates, arguments.rounds, arguments.warmup)
    rows = []
    for candidate in tqdm(candidates, desc="memory", unit="loss"):
        p20, median, p80 = times[candidate.name]

        def over(other: str, median: float = median) -> str:
            return f"{median / times[other][1]:.3f}" if other in times else ""

        package = candidate.entry.package
        rows.append(
            {
                "loss": candidate.name,
                **provenance(candidate.gt.device),
                "batch": str(len(candidate.gt)),
                "size": str(candidate.gt.shape[-1]),
                "median_ms": f"{median:.3f}",
                "p20_ms": f"{p20:.3f}",
                "p80_ms": f"{p80:.3f}",
                "peak_mib": f"{peak_bytes(candidate.forward_backward, candidate.sr.device) / MIB:.2f}",
                "saved_mib": f"{candidate.saved_bytes() / MIB:.2f}",
                "weights_mib": f"{sum(candidate.weights().values()) / MIB:.2f}",
                "ratio_alex": over("lpips alex"),
                "ratio_vgg": over("lpips vgg"),
                "share_of_sr_step": over(STEP),
                "package_version": f"{package} {version(package)}",
            }
        )
    return rows


def setting_of(row: dict[str, Any]) -> tuple[str, ...]:
    return tuple(row[key] for key in SETTING)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The table so far; none where it is of other columns."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return rows if rows and {"share_of_sr_step", "commit"} <= rows[0].keys() else []


def merge(path: Path, rows: list[dict[str, Any]]) -> None:
    """Put rows of one setting into the table at `path`, in place of those of the same losses."""
    new = {row["loss"] for row in rows}
    kept = [row for row in read_rows(path) if setting_of(row) != setting_of(rows[0]) or row["loss"] not in new]
    order = list(entries(""))

    def rank(row: dict[str, Any]) -> tuple[Any, ...]:
        device, *numbers = setting_of(row)
        return device, *(int(number or 0) for number in numbers), order.index(row["loss"])

    table = sorted([*kept, *rows], key=rank)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_table(path, table)


def parse_arguments() -> argparse.Namespace:
    def positive(text: str) -> int:
        if int(text) < 1:
            raise ValueError
        return int(text)

    names = list(entries(""))
    cuda = "cuda" if torch.cuda.is_available() else "cpu"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=positive, nargs="+", default=[64, 128, 256], help="heights and widths")
    parser.add_argument("--batches", type=positive, nargs="+", default=[1, 4], help="images in a batch")
    parser.add_argument("--device", default=cuda, help="torch device (default cuda, where there is none cpu)")
    parser.add_argument("--threads", type=positive, default=1, help="CPU threads (default %(default)s)")
    parser.add_argument("--rounds", type=positive, default=15, help="rounds that count (default %(default)s)")
    parser.add_argument("--warmup", type=positive, default=3, help="rounds before them (default %(default)s)")
    parser.add_argument(
        "--only", nargs="+", metavar="NAME", choices=names, default=names, help=f"losses, of: {', '.join(names)}"
    )
    parser.add_argument("--inn", default="bundled", help="invertible network, see MGHFLoss (default %(default)s)")
    parser.add_argument("--csv", type=Path, help="table (default benchmarks/results/losses-<device>.csv)")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    device = torch.device(arguments.device)
    if device.type not in {"cpu", "cuda"}:
        raise SystemExit(f"--device must be cpu or cuda, with or without an index, got {arguments.device!r}")
    name = device_name(device)
    path = arguments.csv or Path(__file__).parent / "results" / f"losses-{file_label(device)}.csv"

    chosen = {key: entry for key, entry in entries(arguments.inn).items() if key in arguments.only}
    losses = build_all(chosen, device)
    print("DINO, LPIPS, DISTS and VGG networks have random weights: the figures are of cost, not of quality.")
    for batch in arguments.batches:
        for size in arguments.sizes:
            gt = torch.rand(batch, 3, size, size, device=device)
            sr = (gt + 0.1 * torch.randn_like(gt)).clamp(0, 1).requires_grad_()
            candidates = candidates_of(chosen, losses, sr, gt)
            if not candidates:
                raise SystemExit("nothing to measure")
            rows = measure_setting(candidates, arguments)
            merge(path, rows)
            threads = f"{arguments.threads} thread{'s' if arguments.threads > 1 else ''}"
            shape = " x ".join(map(str, gt.shape))
            print(f"\n{name}, {threads}, {shape}, float32, {arguments.rounds} rounds, forward + backward")
            hidden = {*SETTING, *provenance(device), "package_version"}
            print(format_table([{key: value for key, value in row.items() if key not in hidden} for row in rows]))
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
