"""A frozen network inside a loss: in eval mode for ever, without gradients, out of every state dict."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, TypeVar

from torch import nn

Network = TypeVar("Network", bound=nn.Module)


class Frozen(nn.Module, Generic[Network]):
    """Holds `network` beside the module tree, so that a training module may own it and never notice.

    The network is not registered as a submodule: `parameters()`, `state_dict()`, `train()`, optimisers, DDP
    and summaries do not see it, and a strict `load_state_dict` takes checkpoints with or without its keys
    (theirs are ignored: the network's parameters come from its own checkpoint). `.to()`, `.cuda()`, `.half()`
    and the like still move and convert it.
    """

    network: Network

    def __init__(self, network: Network) -> None:
        super().__init__()
        # Assignment would register a submodule.
        self.__dict__["network"] = network.requires_grad_(False).eval()

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Frozen[Network]:
        self.network._apply(fn, recurse)
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        """Ignore every key: none is missing, none unexpected."""

    def extra_repr(self) -> str:
        """Name the hidden network and its size."""
        size = sum(parameter.numel() for parameter in self.network.parameters())
        return f"{type(self.network).__name__}, {size} frozen parameters"
