"""The losses inside trainers: BasicSR, neosr, traiNNer-redux, Lightning; logs; a metric. One file each.

A file imports its framework and nothing imports the file but you: `import mghf_loss` needs none of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def needs(framework: str, install: str) -> Iterator[None]:
    """Turn the `ModuleNotFoundError` of a missing `framework` into one that says how to `install` it."""
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name != framework:  # the framework is there and misses something of its own
            raise
        raise ModuleNotFoundError(
            f"this integration of mghf-loss needs {framework}, which is not installed: {install}", name=framework
        ) from error
