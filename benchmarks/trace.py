"""Kernels and bytes of one loss call, forward and backward, counted on a CPU: python -m benchmarks.trace

Every operator that the dispatcher sees is one kernel that reads its inputs and writes its outputs once; views and
empty tensors are none. Our operators are counted as the kernels that they launch on CUDA; `--torch` counts the torch
code that they replace.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mghf_loss import MGHFLoss, MGHFnLoss, coupling
from mghf_loss.ops import convolution, linear

# Launches of our operators (`ops/*_triton.py`); PatchNCE: of up to 512 locations, fills included.
LAUNCHES = {
    "second_order_statistics": 3,
    "second_order_statistics_backward": 1,
    "local_errors": 2,
    "local_errors_backward": 1,
    "patch_nce": 8,
    "coupling": 2,
    "coupling_kept": 2,
    "coupling_kept_backward": 2,
    "linear_level": 1,
    "linear_level_transpose": 1,
}
LOSSES: dict[str, Callable[[], torch.nn.Module]] = {
    "MGHFnLoss": MGHFnLoss,
    "MGHFLoss": MGHFLoss,
    'MGHFLoss("sharp")': lambda: MGHFLoss("sharp"),
    'MGHFLoss("paper")': lambda: MGHFLoss("paper"),
}


class Trace(TorchDispatchMode):
    """Counts kernels by operator, and their bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.name().partition("::")[2].partition(".")[0]
        given = [leaf for leaf in tree_leaves((args, kwargs or {})) if isinstance(leaf, Tensor)]
        made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        known = {tensor.untyped_storage().data_ptr() for tensor in given}
        view = not func._schema.is_mutable and all(t.untyped_storage().data_ptr() in known for t in made)
        if made and not view and not name.startswith(("empty", "new_empty", "_local_scalar")):
            self.kernels[name] += LAUNCHES.get(name, 1)
            self.bytes[name] += sum(tensor.numel() * tensor.element_size() for tensor in (*given, *made))
        return result


def trace(loss: torch.nn.Module, batch: int, size: int, operators: bool = True) -> Trace:
    """One call of `loss` at `batch` x 3 x `size` x `size`, and its gradient, as on CUDA."""
    gt = torch.rand(batch, 3, size, size)
    sr = (gt + 0.1 * torch.randn_like(gt)).requires_grad_()
    torch.autograd.grad(loss(sr, gt), sr)  # what is done once is not counted
    before = coupling.uses_operators, linear.uses_operators, convolution.uses_cudnn
    coupling.uses_operators = linear.uses_operators = lambda x: operators
    convolution.uses_cudnn = lambda x: True
    found = Trace()
    try:
        with found:
            torch.autograd.grad(loss(sr, gt), sr)
    finally:
        coupling.uses_operators, linear.uses_operators, convolution.uses_cudnn = before
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=16, help="images (default %(default)s)")
    parser.add_argument("--size", type=int, default=256, help="height and width (default %(default)s)")
    parser.add_argument("--torch", action="store_true", help="the network without our operators")
    parser.add_argument("--by-operator", action="store_true", help="the operators with most kernels, too")
    arguments = parser.parse_args()
    for name, build in LOSSES.items():
        found = trace(build(), arguments.batch, arguments.size, not arguments.torch)
        print(f"{name}: {found.kernels.total()} kernels, {found.bytes.total() / 1e9:.2f} GB", flush=True)
        if arguments.by_operator:
            for operator, count in found.kernels.most_common(25):
                print(f"    {count:4d} {operator}, {found.bytes[operator] / 1e6:.0f} MB")


if __name__ == "__main__":
    main()
