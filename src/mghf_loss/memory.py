"""How much of SR's features a loss keeps for the backward pass."""

from __future__ import annotations

from typing import Literal, get_args

Memory = Literal["normal", "low"]


def check_memory(memory: Memory) -> Memory:
    """Return `memory`, or raise `ValueError` naming the known ones."""
    if memory not in get_args(Memory):
        raise ValueError(f"memory must be one of {get_args(Memory)}, got {memory!r}")
    return memory
