"""Files: images read with Pillow, tables written as CSV, everything written whole or not at all."""

from __future__ import annotations

import csv
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import torch
from torch import Tensor

try:
    import fcntl
except ImportError:  # Windows, where temporary files of killed programs stay
    fcntl = None

if TYPE_CHECKING:
    from PIL import Image

TEMPORARY = ".mghf-partial-"


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Call `write` with a temporary file beside `path`, then move it there: a kill leaves the old or the new.

    The next write into the folder removes the temporary file that a kill leaves.
    """
    if fcntl is not None:
        for abandoned in path.parent.glob(f"{TEMPORARY}*"):
            with suppress(OSError), abandoned.open("rb") as file:  # gone, or its writer has the lock
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                abandoned.unlink()
    temporary = path.with_name(f"{TEMPORARY}{secrets.token_hex(8)}{path.suffix}")
    file = temporary.open("xb")  # as a plain open does, for the same permissions
    try:
        if fcntl is None:
            file.close()  # Windows moves no open file
        else:
            with suppress(OSError):  # a file system without locks
                fcntl.flock(file, fcntl.LOCK_EX)
        write(temporary)
        temporary.replace(path)
    finally:
        file.close()
        temporary.unlink(missing_ok=True)


def write_table(path: Path, table: Sequence[Mapping[str, object]]) -> None:
    """Write rows of one set of columns as CSV, whole or not at all."""

    def write(temporary: Path) -> None:
        with temporary.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(table[0]))
            writer.writeheader()
            writer.writerows(table)

    write_atomically(path, write)


def format_table(table: Sequence[Mapping[str, object]]) -> str:
    """Align the rows in columns."""
    rows = [[f"{value:.4g}" if isinstance(value, float) else str(value) for value in row.values()] for row in table]
    rows.insert(0, list(table[0]))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )


@contextmanager
def open_image(source: str | Path | BinaryIO, name: str | None = None) -> Iterator[Image.Image]:
    """Open an image file with Pillow; raise `OSError`, with `name` or else the path, where that or its use fails."""
    from PIL import Image

    try:
        with Image.open(source) as image:
            yield image
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise OSError(f"cannot read image {name or source}: {error}") from error


def read_pixels(source: str | Path | BinaryIO, name: str | None = None) -> Tensor:
    """Read an image file as (3, H, W) RGB, uint8; grey is repeated, transparency laid on white.

    Needs Pillow. Raises `OSError`, with `name` or else the path, where it is missing, damaged or no image.
    """
    import numpy as np
    from PIL import Image

    with open_image(source, name) as image:
        if image.mode.startswith(("I", "F")):
            raise OSError(f"{image.mode} pixels are not supported, expected 8 bits a channel")
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        pixels = np.asarray(image.convert("RGB"))
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1)


def read_image(path: str | Path) -> Tensor:
    """Read an image file as (1, 3, H, W) RGB in [0, 1]; see `read_pixels`."""
    return read_pixels(path)[None].float() / 255
