"""Range conversion, padding, reading image files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mghf_loss._files import read_image
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
    deep = save(tmp_path / "deep.png", np.zeros((8, 8), np.uint16))
    for path in (text, truncated, deep, tmp_path / "missing.png", tmp_path):
        with pytest.raises(OSError, match=rf"cannot read image .*{path.name}"):
            read_image(path)
