"""`mghf-loss compare` on files and folders: the values are those of Python, and what cannot be compared is named."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from matplotlib import colormaps
from PIL import Image
from skimage import data

from mghf_loss import MGHFLoss, cli, compare
from mghf_loss._files import read_image
from mghf_loss.metric import distance, heatmap

COLUMNS = ["psnr", "ssim", "content", "style", "correlation", "texture", "grid", "total"]


def save_pair(folder: Path, name: str, top: int = 100, size: int = 48) -> tuple[Path, Path]:
    """A crop of a photograph, and the same blurred."""
    gt = Image.fromarray(data.astronaut()[top : top + size, 150 : 150 + size])
    for part in ("sr", "gt"):
        (folder / part).mkdir(exist_ok=True)
    gt.save(folder / "gt" / name)
    small = gt.resize((size // 3, size // 3), Image.Resampling.BICUBIC)
    small.resize((size, size), Image.Resampling.BICUBIC).save(folder / "sr" / name)
    return folder / "sr" / name, folder / "gt" / name


def run(*arguments: object) -> int:
    return cli.main(["compare", *map(str, arguments), "--device", "cpu"])


def table(text: str) -> dict[str, list[str]]:
    return {line.split()[0]: line.split()[1:] for line in text.splitlines() if line}


def test_values_of_two_files_are_those_of_python(tmp_path, capsys):
    sr, gt = save_pair(tmp_path, "a.png")
    assert run(sr, gt, "--json", tmp_path / "a.json", "--tile", "32") == 0
    printed = table(capsys.readouterr().out)
    (written,) = json.loads((tmp_path / "a.json").read_text())["images"]
    images = read_image(sr), read_image(gt)
    total, terms = distance(MGHFLoss(), *images, tile=32)
    assert list(written["sr"]) == COLUMNS
    for name, value in {**terms, "total": total}.items():
        assert written["sr"][name] == value.item()
        assert float(printed[name][0]) == pytest.approx(value.item(), rel=1e-3)
    mse = np.mean((images[0] - images[1]).numpy().astype(float) ** 2)
    assert written["sr"]["psnr"] == pytest.approx(-10 * math.log10(mse), rel=1e-6)
    assert 0 < written["sr"]["ssim"] < 1
    yardstick, _ = distance(MGHFLoss(), compare.bicubic(images[1]), images[1], tile=32)
    assert written["bicubic"]["total"] == yardstick.item()
    assert printed["PSNR"][2:4] == ["↑", "higher"]
    assert printed["style"][2:4] == ["↓", "lower"]
    shares = [float(printed[name][-1].rstrip("%")) for name in terms]
    assert sum(shares) == pytest.approx(100, abs=0.3)


def test_the_average_over_shifts_is_that_of_python(tmp_path):
    sr, gt = save_pair(tmp_path, "a.png", size=32)
    assert run(sr, gt, "--json", tmp_path / "a.json", "--shift", "average", "--preset", "gan") == 0
    written = json.loads((tmp_path / "a.json").read_text())
    assert written["settings"]["shift"] == "average"
    total, _ = distance(MGHFLoss("gan", shift="average"), read_image(sr), read_image(gt))
    assert written["images"][0]["sr"]["total"] == total.item()


def test_all_distances_of_equal_files_are_0(tmp_path, capsys):
    _, gt = save_pair(tmp_path, "a.png")
    assert run(gt, gt, "--json", tmp_path / "a.json") == 0
    printed = table(capsys.readouterr().out)
    assert printed["PSNR"][0] == "inf"
    assert printed["SSIM"][0] == "1"
    assert [printed[name][0] for name in COLUMNS[2:]] == ["0"] * 6
    values = json.loads((tmp_path / "a.json").read_text())["images"][0]["sr"]
    assert values["psnr"] is None  # JSON knows no infinity
    assert [values[name] for name in COLUMNS[2:]] == [0] * 6


def test_folders_are_matched_by_name_and_the_rest_is_named(tmp_path, capsys):
    for index, name in enumerate(["a.png", "b.png", "size.png", "broken.png", "cut.png", "lonely.png"]):
        save_pair(tmp_path, name, top=100 + 10 * index)
    sr, gt = tmp_path / "sr", tmp_path / "gt"
    (gt / "nested").mkdir()
    (sr / "nested").mkdir()
    (gt / "b.png").rename(gt / "nested" / "b.bmp")
    Image.open(gt / "nested" / "b.bmp").save(gt / "nested" / "b.bmp")
    (sr / "b.png").rename(sr / "nested" / "b.png")
    Image.new("RGB", (40, 48)).save(sr / "size.png")
    (sr / "broken.png").write_bytes(b"no image")
    (gt / "cut.png").write_bytes((gt / "cut.png").read_bytes()[:2000])
    (sr / "lonely.png").unlink()

    assert run(sr, gt, "--csv", tmp_path / "all.csv", "--json", tmp_path / "all.json") == 0
    captured = capsys.readouterr()
    skipped = json.loads((tmp_path / "all.json").read_text())["skipped"]
    assert list(skipped) == ["broken", "cut", "lonely", "size"]
    assert skipped["size"] == "SR is 40 x 48 pixels, GT is 48 x 48"
    assert skipped["lonely"] == f"{sr} has no image of this name"
    assert "cannot read image" in skipped["broken"]
    assert "cannot read image" in skipped["cut"]
    for name, reason in skipped.items():
        assert f"skipped {name}: {reason}" in captured.err
    assert "2 pairs compared, 4 names skipped" in captured.err

    with (tmp_path / "all.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["image"] for row in rows] == ["a", "nested/b"]
    assert list(rows[0]) == ["image", *COLUMNS, *(f"bicubic_{name}" for name in COLUMNS)]
    total, _ = distance(MGHFLoss(), read_image(sr / "nested" / "b.png"), read_image(gt / "nested" / "b.bmp"))
    assert float(rows[1]["total"]) == total.item()
    printed = captured.out.splitlines()
    assert printed[0].split()[:5] == ["image", "PSNR", "↑", "SSIM", "↑"]
    assert "total ↓" in printed[0]
    mean = np.mean([float(row["total"]) for row in rows])
    assert float(printed[3].split()[-1]) == pytest.approx(mean, rel=1e-3)
    assert printed[4].startswith("mean of bicubic x4")


def test_no_pair_at_all_is_an_error_that_says_why(tmp_path, capsys):
    save_pair(tmp_path, "a.png")
    (tmp_path / "sr" / "a.png").rename(tmp_path / "sr" / "b.png")
    assert run(tmp_path / "sr", tmp_path / "gt") == 2
    message = capsys.readouterr().err
    assert "there is no pair to compare: a: " in message
    assert "; b: " in message


def test_two_images_of_one_name_are_refused(tmp_path, capsys):
    save_pair(tmp_path, "a.png")
    save_pair(tmp_path, "a.bmp")
    assert run(tmp_path / "sr", tmp_path / "gt") == 2
    assert "two images of one name: " in capsys.readouterr().err


def test_16_bits_are_compared_as_such(tmp_path, capsys):
    """One grey level of 16 bits is a 257th of one of 8."""
    pixels = data.astronaut()[:32, :32].astype(np.uint16) * 257
    pixels[0, 0, 0] = 1000
    cv2.imwrite(str(tmp_path / "gt.png"), pixels)
    changed = pixels.copy()
    changed[0, 0, 0] += 1
    cv2.imwrite(str(tmp_path / "sr.tif"), changed)
    assert run(tmp_path / "sr.tif", tmp_path / "gt.png", "--json", tmp_path / "a.json") == 0
    values = json.loads((tmp_path / "a.json").read_text())["images"][0]["sr"]
    assert values["psnr"] == pytest.approx(20 * math.log10(65535) + 10 * math.log10(pixels.size), abs=0.1)
    assert values["content"] > 0


def test_the_yardstick_has_the_size_of_gt_and_ssim_needs_its_window():
    gt = torch.rand(1, 3, 9, 14)
    assert compare.bicubic(gt).shape == gt.shape
    ramp = torch.linspace(0.2, 0.8, 32).expand(1, 3, 32, 32)
    torch.testing.assert_close(compare.bicubic(ramp)[..., 8:-8], ramp[..., 8:-8], atol=5e-3, rtol=0)
    values = compare.measure(MGHFLoss(), gt.flip(3), gt)
    assert values.sr["ssim"] is None
    assert compare.Comparison([values], {}).mean.sr["ssim"] is None


def test_a_heat_map_shows_images_and_terms_at_their_size_on_one_scale(tmp_path, capsys):
    sr_path, gt_path = save_pair(tmp_path, "a.png", top=0, size=256)
    out = tmp_path / "heat.png"
    assert run(sr_path, gt_path, "--heatmap", out) == 0
    assert f"wrote {out}" in capsys.readouterr().out
    with Image.open(out) as picture:
        sheet = np.asarray(picture.convert("RGB"))

    def panel(row: int, column: int) -> np.ndarray:
        left, top = 14 + column * (256 + 14), 28 + row * (256 + 28)
        return sheet[top : top + 256, left : left + 256].astype(int)

    for column, path in enumerate((sr_path, gt_path)):
        with Image.open(path) as image:
            assert np.abs(panel(0, column) - np.asarray(image)).max() <= 1
    maps = heatmap(MGHFLoss(), read_image(sr_path), read_image(gt_path), tile=512)
    high = np.quantile(maps["total"].numpy(), 0.99)
    for row, column, name in ((0, 3, "total"), (0, 4, "content"), (1, 1, "correlation")):
        expected = 255 * colormaps["inferno"]((maps[name][0].numpy() / high).clip(0, 1))[..., :3]
        assert np.abs(panel(row, column) - expected).mean() < 1, name


def test_heat_maps_of_folders_are_a_folder(tmp_path):
    save_pair(tmp_path, "a.png", size=32)
    assert run(tmp_path / "sr", tmp_path / "gt", "--heatmap", tmp_path / "heat") == 0
    with Image.open(tmp_path / "heat" / "a.png") as picture:
        assert picture.size[0] > 4 * 256  # small images are enlarged


def test_arrows_that_a_terminal_cannot_print_are_replaced(tmp_path, monkeypatch, capsys):
    _, gt = save_pair(tmp_path, "a.png", size=32)
    monkeypatch.setattr(cli, "_prints", lambda text: False)
    assert run(gt, gt) == 0
    assert table(capsys.readouterr().out)["PSNR"][2:4] == ["^", "higher"]
