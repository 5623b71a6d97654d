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
    """Align the rows in columns; None is a dash, and a column of nothing else is left out."""
    names = [name for name in table[0] if any(row[name] is not None for row in table)]
    rows = [[_cell(row[name]) for name in names] for row in table]
    rows.insert(0, names)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )


def _cell(value: object) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


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
    with open_image(source, name) as image:
        if _is_deep(image):
            raise OSError("more than 8 bits a channel are not supported, convert it to 8")
        return _upright_rgb(image)


def read_image(path: str | Path) -> Tensor:
    """Read an image file of 8 or 16 bits a channel as (1, 3, H, W) RGB in [0, 1], float32; else like `read_pixels`.

    OpenCV reads PNG and TIFF of 16 bits. Layouts that it reads wrongly are refused: planar or inverted TIFF, and files
    that an EXIF tag turns.
    """
    with open_image(path) as image:
        if not _is_deep(image):
            return _upright_rgb(image)[None].float().div_(255)
        tags = getattr(image, "tag_v2", {})
        if image.format not in {"PNG", "TIFF"} or image.mode.startswith("F"):
            raise OSError("more than 8 bits a channel are read from PNG and TIFF of integers only")
        if tags.get(PLANAR) == 2 or tags.get(PHOTOMETRIC) == 0 or image.getexif().get(ORIENTATION, 1) != 1:
            raise OSError("16 bits a channel that are planar, inverted or turned by EXIF: save them as plain RGB")
        image.load()  # raises where the file is cut off; OpenCV would fill it up
    return _read_16_bits(Path(path)).permute(2, 0, 1)[None].contiguous()


def image_size(path: Path) -> tuple[int, int]:
    """Return (H, W) of an image file, upright, from its header; raise `OSError` as `read_image`."""
    with open_image(path) as image:
        width, height = image.size
        return (width, height) if image.getexif().get(ORIENTATION, 1) >= 5 else (height, width)


# Tags of TIFF and EXIF.
BITS, PHOTOMETRIC, ORIENTATION, PLANAR = 258, 262, 274, 284


def _is_deep(image: ImageFile) -> bool:
    """Whether a file has more than 8 bits a channel."""
    bits = getattr(image, "tag_v2", {}).get(BITS, 8)
    most = max(bits) if isinstance(bits, tuple) else bits
    return most > 8 or image.mode.startswith(("I", "F")) or ";16" in str(image.tile)


def _upright_rgb(image: ImageFile) -> Tensor:
    import numpy as np
    from PIL import Image, ImageOps

    upright = ImageOps.exif_transpose(image)
    if upright.has_transparency_data:
        upright = upright.convert("RGBA")
        upright = Image.alpha_composite(Image.new("RGBA", upright.size, "white"), upright)
    return torch.from_numpy(np.asarray(upright.convert("RGB")).copy()).permute(2, 0, 1)


def _read_16_bits(path: Path) -> Tensor:
    """Read (H, W, 3) RGB in [0, 1]."""
    import cv2
    import numpy as np

    # Decoded from memory, because OpenCV opens no path beyond the code page of Windows.
    pixels = cv2.imdecode(np.fromfile(path, np.uint8), cv2.IMREAD_UNCHANGED)
    if pixels is None or pixels.dtype != np.uint16:
        kind = "damaged" if pixels is None else f"of {pixels.dtype}"
        raise OSError(f"cannot read image {path}: it is {kind}, expected unsigned integers of 16 bits")
    image = torch.from_numpy(pixels.astype(np.float32)) / 65535
    if image.ndim == 2:
        return image[..., None].expand(-1, -1, 3)
    colours = image[..., [2, 1, 0]]  # OpenCV's order is blue, green, red, alpha
    alpha = image[..., 3:]
    return colours * alpha + (1 - alpha) if image.shape[2] == 4 else colours
