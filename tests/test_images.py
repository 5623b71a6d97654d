"""Range conversion, padding, image files, outputs."""

from __future__ import annotations

import io
import os
import re
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from PIL import ExifTags, Image

from mghf_loss._files import check_output, image_size, locked, read_image, read_pixels
from mghf_loss.criterion import rescale
from mghf_loss.inn import pad_to_multiple


def test_rescale_by_hand():
    image = torch.tensor([0.0, 127.5, 255.0, 510.0])
    torch.testing.assert_close(rescale(image, (0, 255), (-1, 1)), torch.tensor([-1.0, 0.0, 1.0, 3.0]))
    assert rescale(image, (0, 255), (0, 255)) is image


def test_padding_reflects_at_bottom_and_right():
    image = torch.arange(15.0).reshape(1, 1, 3, 5)
    padded = pad_to_multiple(image, 4)
    expected = np.pad(image.numpy(), ((0, 0), (0, 0), (0, 1), (0, 3)), mode="reflect")
    np.testing.assert_array_equal(padded.numpy(), expected)
    assert pad_to_multiple(padded, 4) is padded


def save(path: Path, pixels: np.ndarray, **options) -> Path:
    Image.fromarray(pixels, **options).save(path)
    return path


def test_reading_colour_grey_palette_and_transparency(tmp_path):
    rng = np.random.default_rng(0)
    colour = rng.integers(0, 256, (6, 5, 3), dtype=np.uint8)
    image = read_image(save(tmp_path / "colour.png", colour))
    assert image.shape == (1, 3, 6, 5)
    np.testing.assert_array_equal((image[0].permute(1, 2, 0) * 255).round().numpy(), colour)

    grey = read_image(save(tmp_path / "grey.png", colour[..., 0]))
    assert torch.equal(grey[:, 0], grey[:, 2])

    palette = tmp_path / "palette.png"
    Image.fromarray(colour).quantize(16).save(palette)
    assert read_image(palette).shape == (1, 3, 6, 5)

    transparent = np.zeros((4, 4, 4), dtype=np.uint8)
    transparent[0, 0] = (255, 0, 0, 255)
    image = read_image(save(tmp_path / "transparent.png", transparent))
    assert image[0, :, 0, 0].tolist() == [1, 0, 0]
    assert image[0, :, 1, 1].tolist() == [1, 1, 1]


def test_unreadable_files_are_named(tmp_path):
    text = tmp_path / "text.png"
    text.write_text("no image")
    truncated = save(
        tmp_path / "truncated.png", np.zeros((64, 64, 3), np.uint8) + np.arange(64, dtype=np.uint8)[:, None]
    )
    truncated.write_bytes(truncated.read_bytes()[:60])
    float_ = save(tmp_path / "float.tif", np.zeros((8, 8), np.float32))
    for path in (text, truncated, float_, tmp_path / "missing.png", tmp_path):
        with pytest.raises(OSError, match=rf"cannot read image .*{path.name}"):
            read_image(path)


def test_decoders_raise_what_they_like_and_the_file_is_named(damaged, tmp_path):
    path = tmp_path / "web.png"
    path.write_bytes(damaged)
    with pytest.raises(OSError, match=r"cannot read image .*web\.png"):
        read_image(path)


@pytest.mark.parametrize(
    ("suffix", "channels"), [("png", 1), ("png", 2), ("png", 3), ("png", 4), ("tif", 1), ("tif", 3), ("tif", 4)]
)
def test_16_bits_are_read_exactly_and_never_cut_to_8(suffix, channels, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 65536, (6, 5, channels), dtype=np.uint16)
    path = tmp_path / f"deep.{suffix}"
    path.write_bytes(deep_png(pixels) if suffix == "png" else deep_tiff(pixels))
    expected = pixels / 65535.0
    if channels in {2, 4}:
        alpha = expected[..., -1:]
        expected = expected[..., :-1] * alpha + 1 - alpha
    expected = np.broadcast_to(expected, (6, 5, 3)).transpose(2, 0, 1)[None]
    np.testing.assert_allclose(read_image(path).numpy(), expected, rtol=0, atol=1e-6)
    with pytest.raises(OSError, match=rf"cannot read image .*deep\.{suffix}: more than 8 bits a channel"):
        read_pixels(path)  # bytes


@pytest.mark.parametrize(
    "options",
    [
        {"photometric": "rgb", "planarconfig": "separate"},
        {"photometric": "miniswhite"},
        {"photometric": "minisblack", "extratags": [(274, 3, 1, 6, True)]},
    ],
    ids=["planar", "inverted", "turned"],
)
def test_16_bits_that_opencv_would_misread_are_refused(options, tmp_path):
    shape = (3, 6, 5) if options["photometric"] == "rgb" else (6, 5)
    tifffile.imwrite(tmp_path / "deep.tif", np.ones(shape, np.uint16), **options)
    with pytest.raises(OSError, match=r"deep\.tif: 16 bits a channel that are planar, inverted or turned"):
        read_image(tmp_path / "deep.tif")


def test_other_numbers_than_16_bits_are_named(tmp_path):
    tifffile.imwrite(tmp_path / "wide.tif", np.ones((6, 5), np.int32))
    with pytest.raises(OSError, match=r"wide\.tif: it is of int32, expected unsigned integers of 16 bits"):
        read_image(tmp_path / "wide.tif")
    (tmp_path / "cut.png").write_bytes(deep_png(np.ones((64, 64, 3), np.uint16))[:60])
    with pytest.raises(OSError, match=r"cut\.png: image file is truncated"):
        read_image(tmp_path / "cut.png")


def test_the_size_of_a_file_is_that_of_the_upright_image(tmp_path):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    Image.new("RGB", (32, 16)).save(tmp_path / "turned.png", exif=exif)
    assert image_size(tmp_path / "turned.png") == read_image(tmp_path / "turned.png").shape[2:] == (32, 16)


def deep_png(pixels: np.ndarray) -> bytes:
    """Encode (H, W, channels), uint16, which Pillow does for grey alone."""
    height, width, channels = pixels.shape
    rows = np.concatenate((np.zeros((height, 1), np.uint8), pixels.astype(">u2").reshape(height, -1).view(np.uint8)), 1)
    header = struct.pack(">IIBBBBB", width, height, 16, {1: 0, 2: 4, 3: 2, 4: 6}[channels], 0, 0, 0)
    chunks = (b"IHDR" + header, b"IDAT" + zlib.compress(rows.tobytes()), b"IEND")
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk)) for chunk in chunks
    )


def deep_tiff(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    tifffile.imwrite(file, pixels.squeeze(), photometric="rgb" if pixels.shape[2] > 1 else "minisblack")
    return file.getvalue()


@pytest.mark.parametrize("suffix", ["jpg", "png", "tif", "webp"])
def test_images_are_turned_upright(suffix, tmp_path):
    pixels = np.zeros((16, 32, 3), np.uint8)
    pixels[:, :16] = 255  # left, and on top once turned
    turned = Image.fromarray(pixels)
    exif = turned.getexif()
    exif[ExifTags.Base.Orientation] = 6
    turned.save(tmp_path / f"turned.{suffix}", exif=exif)
    image = read_image(tmp_path / f"turned.{suffix}")
    assert image.shape == (1, 3, 32, 16)
    assert image[..., :16, :].min() > 0.9
    assert image[..., 16:, :].max() < 0.1


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes")
def test_a_pipe_is_not_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(OSError, match=r"pipe\.png: not a regular file"):
        read_image(tmp_path / "pipe.png")


def test_outputs_that_cannot_be_written_are_refused(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder.png").mkdir()
    no_text = os.fsdecode(b"caf\xe9") if os.name == "posix" else "\ud800"
    for folder in ("file", "file/below", no_text):
        with pytest.raises(OSError, match=re.escape(f"cannot write {tmp_path / folder}: ")):
            check_output(tmp_path / folder)
    for file, reason in {
        "heat": r"expected one of \.png, \.pdf at the end, got none",
        "heat.doc": r"got \.doc",
        "none/heat.png": "No such file",
        "folder.png": "is a folder",
        f"{no_text}.png": "can't encode",
    }.items():
        with pytest.raises(OSError, match=f"cannot write .*{reason}"):
            check_output(tmp_path / file, (".png", ".pdf"))
    check_output(tmp_path / "new" / "folder")
    check_output(tmp_path / "new" / "HEAT.PNG", (".png",))
    assert [path.name for path in tmp_path.rglob("*")].count("folder") == 1
    assert not list((tmp_path / "new" / "folder").iterdir())


def test_a_folder_is_kept_to_one_run(tmp_path):
    with locked(tmp_path), pytest.raises(OSError, match=f"{tmp_path} is in use by another run"), locked(tmp_path):
        pass
    with locked(tmp_path):
        pass
