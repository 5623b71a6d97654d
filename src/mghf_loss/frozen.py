"""A frozen network inside a loss: in eval mode for ever, without gradients, out of every state dict, never rounded."""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

Network = TypeVar("Network", bound=nn.Module)


class Frozen(nn.Module, Generic[Network]):
    """Holds `network` beside the module tree, so that a training module may own it and never notice.

    The network is not registered as a submodule: `parameters()`, `state_dict()`, `train()`, optimisers, DDP, FSDP
    and summaries do not see it, and a strict `load_state_dict` takes checkpoints with or without its keys (theirs are
    ignored: the network's parameters come from its own checkpoint).

    Whatever converts or moves the parent tells the network its device and its dtype, and never its values: `.cuda()`
    and `.double()` are followed, `.half()` and `.bfloat16()` leave float32, `.to("meta")` leaves the network where it
    is, and `.to_empty(device=...)` moves it with its values.

    Raises:
        TypeError: what is assigned to `network` is no module.
        ValueError: its parameters have no values (meta device) or take part in no gradient (inference mode).
    """

    network: Network

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.network = network

    def __setattr__(self, name: str, value: Any) -> None:
        """Keep a network out of the module tree, where plain assignment would register it."""
        if name != "network":
            super().__setattr__(name, value)
            return
        if not isinstance(value, nn.Module):
            raise TypeError(f"network must be a torch.nn.Module, got {type(value).__name__}")
        for tensor in chain(value.parameters(), value.buffers()):
            if tensor.is_meta or tensor.is_inference():
                where = "the meta device" if tensor.is_meta else "torch.inference_mode()"
                raise ValueError(f"the frozen {type(value).__name__} was built under {where}: build it outside of that")
        dtype = next(value.parameters()).dtype
        self.__dict__["network"] = value.to(torch.promote_types(dtype, torch.float32)).requires_grad_(False).eval()

    def like(self, image: Tensor) -> Tensor:
        """Return `image` in the network's dtype, float32 at least; raise where it is on another device."""
        parameter = next(self.network.parameters())
        if image.device != parameter.device:
            raise ValueError(
                f"the images are on {image.device}, the loss is on {parameter.device}: "
                f"move it once, criterion.to({str(image.device)!r})"
            )
        return image.to(parameter.dtype)

    def identity(self) -> tuple[nn.Module, torch.dtype]:
        """What the network's results depend on beside its input, for a cache of them."""
        return self.network, next(self.network.parameters()).dtype

    @torch.inference_mode(False)  # parameters converted there would take part in no gradient
    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Frozen[Network]:
        parameter = next(self.network.parameters())
        probe: Tensor = fn(torch.zeros(1, dtype=parameter.dtype, device=parameter.device))
        if not probe.is_meta:
            self.network.to(probe.device, torch.promote_types(probe.dtype, torch.float32))
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        """Ignore every key: none is missing, none unexpected."""

    def _replicate_for_data_parallel(self) -> Any:
        raise RuntimeError(
            "nn.DataParallel does not copy the frozen network of a loss: call the loss outside of it, "
            "or use DistributedDataParallel"
        )

    def extra_repr(self) -> str:
        """Name the hidden network and its size."""
        size = sum(parameter.numel() for parameter in self.network.parameters())
        return f"{type(self.network).__name__}, {size} frozen parameters"
