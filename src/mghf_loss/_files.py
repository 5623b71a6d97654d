"""Files: images read, tables written as CSV; outputs are checked before the work, and written whole or not at all."""

from __future__ import annotations

import csv
import secrets
import stat
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, BinaryIO

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
    """Keep `folder` to this process; raise `OSError` where another has it. The system frees it for a killed process."""
    # A file, as network file systems lock no folder. It stays: who removes a lock may remove that of another.
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
    """Read an image file as (3, H, W) RGB, uint8, 16 bits rounded; otherwise like `read_image`."""
    pixels = _decode(source, name)
    return pixels if pixels.dtype == torch.uint8 else (pixels.float() / 257).round().byte()


def read_image(path: str | Path) -> Tensor:
    """Read an image file as (1, 3, H, W) RGB in [0, 1], upright; grey is repeated, transparency laid on white.

    Needs Pillow. Raises `OSError`, with the path, where it is missing, damaged, no image, or of more bits a channel
    than are read: 16 of a PNG, 8 of other formats.
    """
    pixels = _decode(path)
    return pixels[None].float() / torch.iinfo(pixels.dtype).max


def _decode(source: str | Path | BinaryIO, name: str | None = None) -> Tensor:
    """(3, H, W), uint8 or, of 16 bits a channel, uint16."""
    import numpy as np
    from PIL import Image, ImageOps

    with open_image(source, name) as image:
        if image.mode.startswith(("I", "F")) or ";16" in str(image.tile):  # Pillow would cut colours to 8 bits
            if image.format != "PNG" or image.fp is None:
                raise OSError(f"{image.format} of more than 8 bits a channel is not supported, save it as PNG")
            return _decode_deep_png(image.fp)
        image = ImageOps.exif_transpose(image)
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        pixels = np.asarray(image.convert("RGB"))
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1)


def _decode_deep_png(file: IO[bytes]) -> Tensor:
    from torchvision.io import ImageReadMode, decode_image  # timm needs torchvision

    file.seek(0)
    data = torch.frombuffer(bytearray(file.read()), dtype=torch.uint8)
    pixels = decode_image(data, ImageReadMode.RGB_ALPHA, apply_exif_orientation=True).double()
    alpha = pixels[3:] / 65535
    return (65535 + alpha * (pixels[:3] - 65535)).round().to(torch.uint16)
