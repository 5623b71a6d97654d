"""Files: images read, tables written as CSV; outputs are checked before the work, and written whole or not at all."""

from __future__ import annotations

import csv
import io
import secrets
import stat
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
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
    from PIL.ImageFile import ImageFile

TEMPORARY = ".mghf-partial-"
LOCK_FILE = "training.lock"


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


def check_output(path: Path, suffixes: Collection[str] | None = None) -> None:
    """Raise `OSError` unless the file `path`, of one of `suffixes`, can be written; without them, make it a folder."""
    try:
        str(path).encode()  # what writes safetensors and prints takes UTF-8 only
        if suffixes is None:
            path.mkdir(parents=True, exist_ok=True)
        elif path.suffix.lower() not in suffixes:
            raise OSError(f"expected one of {', '.join(suffixes)} at the end, got {path.suffix or 'none'}")
        elif path.is_dir():
            raise OSError("it is a folder")
        tempfile.TemporaryFile(dir=path if suffixes is None else path.parent).close()
    except (OSError, ValueError) as error:
        raise OSError(f"cannot write {path}: {error}") from error


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Make `folder` and keep it to this process; raise `OSError` where it cannot be written or another has it."""
    check_output(folder)
    # A file, as network file systems lock no folder; the system frees it for a killed process. It stays: who removes a
    # lock may remove that of another.
    with (folder / LOCK_FILE).open("wb") as file:
        try:
            if fcntl is not None:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise OSError(f"{folder} is in use by another run: wait for it, or choose another output folder") from None
        except OSError:  # a file system without locks
            pass
        yield


def write_table(path: Path, table: Sequence[Mapping[str, object]]) -> None:
    """Write rows of one set of columns as CSV, whole or not at all."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(table[0]))
    writer.writeheader()
    writer.writerows(table)
    write_atomically(path, lambda temporary: temporary.write_bytes(text.getvalue().encode()))


def format_table(table: Sequence[Mapping[str, object]]) -> str:
    """Align the rows in columns, the first to the left and the others to the right."""
    columns: list[list[str]] = []
    for name in table[0]:
        values = [row[name] for row in table]
        cells = [name, *(f"{value:.4g}" if isinstance(value, float) else str(value) for value in values)]
        width = max(map(len, cells))
        columns.append([cell.rjust(width) if columns else cell.ljust(width) for cell in cells])
    return "\n".join(map("  ".join, zip(*columns, strict=True)))


@contextmanager
def open_image(source: str | Path | BinaryIO, name: str | None = None) -> Iterator[ImageFile]:
    """Open an image file with Pillow; raise `OSError`, with `name` or else the path, where that or its use fails."""
    from PIL import Image

    try:
        # Opening a FIFO would wait for its writer.
        if isinstance(source, (str, Path)) and not stat.S_ISREG(Path(source).stat().st_mode):
            raise OSError("not a regular file")
        with Image.open(source) as image:
            yield image
    except Exception as error:  # decoders of damaged files raise what they like
        raise OSError(f"cannot read image {name or source}: {error}") from error


def read_pixels(source: str | Path | BinaryIO, name: str | None = None) -> Tensor:
    """Read an image file as (3, H, W) RGB, uint8, upright; grey is repeated, transparency laid on white.

    Needs Pillow, which cuts colours of 16 bits to 8: files of more than 8 bits a channel are refused. Raises `OSError`,
    with `name` or else the path, for those and where it is missing, damaged or no image.
    """
    import numpy as np
    from PIL import Image, ImageOps

    with open_image(source, name) as image:
        if image.mode.startswith(("I", "F")) or ";16" in str(image.tile):
            raise OSError("more than 8 bits a channel are not supported, convert it to 8")
        upright = ImageOps.exif_transpose(image)
        if upright.has_transparency_data:
            upright = upright.convert("RGBA")
            upright = Image.alpha_composite(Image.new("RGBA", upright.size, "white"), upright)
        pixels = np.asarray(upright.convert("RGB"))
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1)


def read_image(source: str | Path | BinaryIO) -> Tensor:
    """Read an image file as (1, 3, H, W) RGB in [0, 1]; see `read_pixels`."""
    return read_pixels(source)[None].float() / 255
