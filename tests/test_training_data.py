"""Crops for training: a function of (seed, slot), from folders and data sets, damaged images named and counted."""

from __future__ import annotations

import io
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mghf_loss.training.data import (
    Cropping,
    FolderCrops,
    batches,
    list_images,
    open_dataset,
    open_folder,
    read_example,
    read_held_out,
)
from mghf_loss.training.dead_leaves import dead_leaves

pytestmark = pytest.mark.train


def crops_of(folder: Path, cropping: Cropping | None = None, **options) -> FolderCrops:
    return FolderCrops(list_images(folder), cropping or Cropping(16), **options)


def parquet(folder: Path, contents: list[bytes | None], shards: int = 2) -> Path:
    """A data set of encoded images in the layout of the Hub."""
    import datasets

    out = folder / "dataset"
    out.mkdir()
    features = datasets.Features({"label": datasets.Value("int64"), "picture": datasets.Image()})
    for shard in range(shards):
        part = contents[shard::shards]
        rows = {"label": [0] * len(part), "picture": [data and {"bytes": data, "path": None} for data in part]}
        datasets.Dataset.from_dict(rows, features=features).to_parquet(out / f"train-{shard:05d}.parquet")
    return out


def encoded(value: int, size: tuple[int, int] = (24, 20)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, (value, value, value)).save(buffer, "png")
    return buffer.getvalue()


def test_crops_are_a_function_of_seed_and_slot(image_folder):
    cropping = Cropping(16, seed=3)
    crops, uncached = crops_of(image_folder, cropping), crops_of(image_folder, cropping, cache_bytes=0)
    for slot in (0, 4, 9):
        assert torch.equal(crops.crop(slot), uncached.crop(slot))
        assert crops.crop(slot).shape == (3, 16, 16)
    assert not uncached.cache
    assert not torch.equal(crops.crop(0), crops.crop(1))
    assert not torch.equal(crops.crop(0), crops_of(image_folder, Cropping(16, seed=4)).crop(0))
    assert crops.crop(0).abs().max() <= 1


def test_crops_hold_8_bit_values_at_every_scale(image_folder):
    crops = crops_of(image_folder, Cropping(16, least_scale=0.5))
    for slot in range(8):
        levels = (crops.crop(slot) + 1) * 127.5
        assert (levels - levels.round()).abs().max() < 1e-3


def test_the_scale_is_drawn_from_the_asked_range(tmp_path):
    """On a ramp of one grey level a pixel, the slope of a crop tells by how much the image was reduced."""
    ramp = np.broadcast_to(np.arange(200, dtype=np.uint8)[None, :, None], (200, 200, 3))
    Image.fromarray(np.ascontiguousarray(ramp)).save(tmp_path / "ramp.png")

    def slopes(least_scale: float) -> list[float]:
        crops = crops_of(tmp_path, Cropping(64, least_scale))
        return [
            float((crops.crop(slot)[0, 32, 48] - crops.crop(slot)[0, 32, 16]).abs() * 127.5 / 32) for slot in range(40)
        ]

    assert slopes(1.0) == pytest.approx([1.0] * 40, abs=1e-3)
    drawn = slopes(0.5)
    assert min(drawn) > 0.95
    assert max(drawn) < 2.05
    assert min(drawn) < 1.2 < 1.7 < max(drawn)


def test_an_image_smaller_than_the_scaled_region_is_reduced_less(tmp_path):
    Image.new("RGB", (18, 30), "red").save(tmp_path / "a.png")
    crops = crops_of(tmp_path, Cropping(16, least_scale=0.1))
    for slot in range(4):
        assert torch.equal(crops.crop(slot)[:, 0, 0], torch.tensor([1.0, -1.0, -1.0]))


def test_images_are_drawn_in_proportion_to_their_area(tmp_path):
    Image.new("RGB", (16, 16), "black").save(tmp_path / "a.png")
    Image.new("RGB", (48, 16), "white").save(tmp_path / "b.png")
    crops = crops_of(tmp_path)
    white = sum(bool(crops.crop(slot).mean() > 0) for slot in range(400))
    assert 0.68 < white / 400 < 0.82


def test_damaged_and_small_images_are_skipped_by_name_and_counted(image_folder):
    (image_folder / "broken.png").write_bytes(b"no image")
    Image.new("RGB", (8, 40)).save(image_folder / "small.png")
    with pytest.warns(UserWarning, match="skipped image") as warnings:
        crops = crops_of(image_folder)
    messages = " ".join(str(warning.message) for warning in warnings)
    assert "broken.png" in messages
    assert "small.png: 8 x 40 is smaller than a crop of 16" in messages
    assert crops.damaged == {str(image_folder / "broken.png"), str(image_folder / "small.png")}
    assert len(crops.files) == 3


def test_an_image_whose_body_is_damaged_is_met_when_it_is_drawn(image_folder):
    whole = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(whole, "png")
    truncated = image_folder / "truncated.png"
    truncated.write_bytes(whole.getvalue()[:2000])
    crops = crops_of(image_folder)
    assert not crops.damaged  # its header is fine
    with pytest.warns(UserWarning, match=r"skipped image .*truncated\.png") as warnings:
        drawn = [crops.crop(slot) for slot in range(20)]
    assert len(warnings) == 1
    assert crops.damaged == {str(truncated)}
    again = crops_of(image_folder)
    with pytest.warns(UserWarning, match="truncated"):
        drawn_again = [again.crop(slot) for slot in range(20)]
    assert all(torch.equal(a, b) for a, b in zip(drawn, drawn_again, strict=True))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes, and no bytes in file names")
def test_pipes_link_loops_damaged_formats_and_names_that_are_no_text_do_not_end_a_run(image_folder, damaged):
    name = os.fsdecode(b"caf\xe9")
    readable = image_folder / f"{name}.png"
    readable.write_bytes((image_folder / "nested" / "0.png").read_bytes())
    (image_folder / f"{name}.jpg").write_bytes(damaged)
    os.mkfifo(image_folder / "pipe.png")
    (image_folder / "loop.png").symlink_to("loop.png")
    (image_folder / "folder.png").mkdir()

    def draw() -> FolderCrops:
        source, _ = open_folder(image_folder, Cropping(16), 0, except_below=image_folder / "out")
        assert all(source.crop(slot).shape == (3, 16, 16) for slot in range(20))
        return source

    with pytest.warns(UserWarning, match="skipped image"):
        source = draw()
    assert str(readable) in {file.name for file in source.files}
    assert {Path(each).name for each in source.damaged} == {f"{name}.jpg", "pipe.png", "loop.png"}


def test_nothing_but_damaged_images_is_an_error(tmp_path):
    whole = encoded(3, (64, 64))
    (tmp_path / "a.png").write_bytes(whole[: len(whole) - 40])
    crops = crops_of(tmp_path)
    with pytest.warns(UserWarning, match=r"a\.png"), pytest.raises(ValueError, match=r"could not be read.*a\.png"):
        crops.crop(0)


def test_folders_without_images_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=f"no images .* below {tmp_path}"):
        list_images(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no folder .*nowhere"):
        list_images(tmp_path / "nowhere")
    Image.new("RGB", (8, 8)).save(tmp_path / "small.png")
    with pytest.warns(UserWarning, match=r"small\.png"), pytest.raises(ValueError, match="at least 16 x 16"):
        crops_of(tmp_path)


def test_held_out_images_are_not_trained_on(image_folder):
    source, held_out = open_folder(image_folder, Cropping(16), 2)
    assert len(held_out) == 2
    assert not {str(path) for path in held_out} & {file.name for file in source.files}
    assert len(source.files) == 1
    with pytest.raises(ValueError, match="cannot hold out 3 of 3 images"):
        open_folder(image_folder, Cropping(16), 3)


@pytest.mark.parametrize("threads", [0, 3])
def test_processes_and_resumed_runs_see_the_same_slots(image_folder, threads):
    source = crops_of(image_folder)
    whole = list(batches(source, 0, 3, 4, threads=threads))
    assert [tuple(batch.shape) for batch in whole] == [(4, 3, 16, 16)] * 3
    for rank in range(2):
        part = list(batches(source, 0, 3, 4, rank, 2, threads))
        for want, got in zip(whole, part, strict=True):
            assert torch.equal(want[2 * rank : 2 * rank + 2], got)
    assert torch.equal(next(batches(source, 2, 3, 4, threads=threads)), whole[2])


@pytest.mark.parametrize("streaming", [True, False])
def test_a_data_set_is_read_epoch_after_epoch_and_resumed_where_it_was(tmp_path, streaming):
    values = list(range(10, 90, 10))
    path = parquet(tmp_path, [encoded(value) for value in values])
    source, held_out = open_dataset(str(path), None, "train", streaming, Cropping(16, seed=1), 2)
    kept = {int(read_example(example)[0, 0, 0]) for example in held_out}
    assert len(kept) == 2

    def seen(start: int, steps: int) -> list[int]:
        got = torch.cat(list(batches(source, start, steps, 3, threads=2)))
        assert torch.equal(got.amax((1, 2, 3)), got.amin((1, 2, 3)))  # every image has one grey
        return ((got[:, 0, 0, 0] + 1) * 127.5).round().int().tolist()

    whole = seen(0, 4)
    assert set(whole) == set(values) - kept  # two epochs of six
    assert sorted(whole[:6]) == sorted(whole[6:]) == sorted(set(values) - kept)
    assert whole[:6] != whole[6:]
    assert seen(2, 4) == whole[6:]


def test_processes_share_a_stream(tmp_path):
    values = list(range(10, 90, 10))
    path = parquet(tmp_path, [encoded(value) for value in values])
    source, _ = open_dataset(str(path), None, "train", True, Cropping(16), 0)
    parts = [torch.cat(list(batches(source, 0, 2, 4, rank, 2))) for rank in range(2)]
    greys = [((part[:, 0, 0, 0] + 1) * 127.5).round().int().tolist() for part in parts]
    assert sorted(greys[0] + greys[1]) == values


def test_damaged_images_of_a_stream_are_replaced_and_counted(tmp_path):
    path = parquet(tmp_path, [encoded(50), b"no image", None, encoded(60, (8, 30)), encoded(70)], shards=1)
    source, _ = open_dataset(str(path), None, "train", True, Cropping(16), 0)
    with pytest.warns(UserWarning, match="skipped image") as warnings:
        (batch,) = batches(source, 0, 1, 5)
    messages = " ".join(str(warning.message) for warning in warnings)
    assert "8 x 30 is smaller than a crop of 16" in messages
    assert "cannot read image without a path" in messages
    assert "holds no image" in messages
    assert len(source.damaged) == 3
    assert batch.shape == (5, 3, 16, 16)
    constant = (batch.amax((1, 2, 3)) == batch.amin((1, 2, 3))).sum()
    assert constant == 2  # dead leaves are not


def test_a_stream_without_a_usable_image_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[FolderCrops.__module__], "TRIES", 5)  # an epoch ends with a pause of the library's
    path = parquet(tmp_path, [encoded(value, (8, 8)) for value in range(3)], shards=1)
    source, _ = open_dataset(str(path), None, "train", True, Cropping(16), 0)
    with pytest.warns(UserWarning, match="8 x 8"), pytest.raises(ValueError, match="5 images of the stream in a row"):
        list(batches(source, 0, 50, 1))
    assert len(source.damaged) == 3


def test_held_out_images_are_cut_and_keep_nothing_else_in_memory(tmp_path):
    Image.new("RGB", (90, 50)).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"no image")
    damaged: set[str] = set()
    with pytest.warns(UserWarning, match=r"b\.png"):
        (image,) = read_held_out([tmp_path / "a.png", tmp_path / "b.png"], 64, 8, damaged)
    assert image.shape == (3, 48, 64)
    assert image.untyped_storage().nbytes() == image.numel()
    assert damaged == {str(tmp_path / "b.png")}


def test_a_data_set_without_images_is_refused(tmp_path):
    import datasets

    (tmp_path / "text").mkdir()
    datasets.Dataset.from_dict({"text": ["a"]}).to_parquet(tmp_path / "text" / "train-00000.parquet")
    with pytest.raises(ValueError, match=r"no image column; its columns are \['text'\]"):
        open_dataset(str(tmp_path / "text"), None, "train", True, Cropping(16), 0)


def test_dead_leaves_are_images_with_edges_and_scale_invariant_contrast():
    images = torch.stack([dead_leaves(64, torch.Generator().manual_seed(seed)) for seed in range(32)])
    assert torch.equal(images[3], dead_leaves(64, torch.Generator().manual_seed(3)))
    assert images.abs().max() <= 1
    levels = (images + 1) * 127.5
    assert (levels - levels.round()).abs().max() < 1e-3  # 8-bit values
    assert images.std() > 0.3
    differences = (images[..., 1:] - images[..., :-1]).abs()
    assert (differences < 0.02).float().mean() > 0.5  # surfaces
    assert differences.amax((1, 2, 3)).min() > 0.3  # edges
    # Photographs have about equal contrast at every scale: halving changes the differences little.
    half = torch.nn.functional.avg_pool2d(images, 2)
    ratio = (half[..., 1:] - half[..., :-1]).std() / (images[..., 1:] - images[..., :-1]).std()
    assert 0.9 < ratio < 1.6


@pytest.mark.parametrize(("fraction", "low", "high"), [(0.0, 0, 0), (0.5, 60, 140), (1.0, 200, 200)])
def test_dead_leaves_are_mixed_in_at_the_asked_rate(tmp_path, fraction, low, high):
    Image.new("RGB", (20, 20), "black").save(tmp_path / "black.png")
    crops = crops_of(tmp_path, Cropping(8, dead_leaves=fraction))
    synthetic = sum(bool(crops.crop(slot).max() > -1) for slot in range(200))
    assert low <= synthetic <= high


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"least_scale": 0.0}, "least_scale must be a number above 0 and at most 1, got 0"),
        ({"dead_leaves": 1.5}, "dead_leaves must be a number of at least 0 and at most 1, got 1.5"),
        ({"seed": -1}, "seed must be"),
    ],
)
def test_bad_cropping_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Cropping(16, **options)
