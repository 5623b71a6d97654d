"""Random crops of photographs, from a folder, a data set or a stream; every crop a function of (seed, slot).

A training run of S steps with a batch of B consumes the slots 0 ... S * B - 1, whatever the number of processes, and a
resumed run sees what an undisturbed one would have seen. From a folder, two processes see together what one would
have; of a stream each process reads its own share.
"""

from __future__ import annotations

import hashlib
import io
import os
import threading
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import count, islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _checks
from .._files import open_image, read_pixels
from .dead_leaves import dead_leaves

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"}
SHUFFLE_BUFFER = 1000  # undecoded examples of a stream
CACHE_BYTES = 2**31  # of decoded images
TRIES = 100  # damaged images in a row before a run gives up


def slot_seed(purpose: str, seed: int, slot: int) -> int:
    """Return a seed for one purpose in one slot: 32 bits, which is all that PyTorch's CPU generator keeps of a seed."""
    digest = hashlib.blake2b(f"{purpose} {seed} {slot}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "big")


@dataclass(frozen=True)
class Cropping:
    """How a crop is cut: `size` pixels a side, at a random scale, flipped at random, with the random numbers of `seed`.

    Images are first reduced by a factor from [least_scale, 1], log-uniform, so that the 8 x 8 blocks and the ringing of
    compressed photographs do not become the statistics. The fraction `dead_leaves` of the crops is synthetic.
    """

    size: int
    least_scale: float = 0.5
    dead_leaves: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        _checks.integer("size", self.size, least=1)
        _checks.number("least_scale", self.least_scale, above=True, most=1)
        _checks.number("dead_leaves", self.dead_leaves, most=1)
        _checks.integer("seed", self.seed, least=0, most=2**32 - 1)

    def crop(self, slot: int, draw: Callable[[torch.Generator], Tensor | None]) -> Tensor:
        """Make the crop of a slot from the image that `draw` returns, or of dead leaves where it returns None."""
        generator = torch.Generator().manual_seed(slot_seed("crop", self.seed, slot))
        is_synthetic = torch.rand((), generator=generator) < self.dead_leaves
        pixels = None if is_synthetic else draw(generator)
        return dead_leaves(self.size, generator) if pixels is None else self.cut(pixels, generator)

    def cut(self, pixels: Tensor, generator: torch.Generator) -> Tensor:
        """Cut (3, size, size) in [-1, 1] with 8-bit values from (3, H, W) uint8 with H, W >= size."""
        sides = pixels.shape[-2:]
        scale = self.least_scale ** float(torch.rand((), generator=generator))
        region = min(round(self.size / scale), min(sides))
        top, left = (int(torch.randint(side - region + 1, (), generator=generator)) for side in sides)
        patch = pixels[:, top : top + region, left : left + region].float()
        if region != self.size:
            patch = F.interpolate(patch[None], (self.size, self.size), mode="bicubic", antialias=True)[0]
            patch = patch.round().clamp(0, 255)  # training counts on 8-bit values
        patch = patch / 127.5 - 1
        return patch.flip(-1) if torch.rand((), generator=generator) < 0.5 else patch


class ImageFile(NamedTuple):
    """A training image before it is decoded; the shorter of its sides is the first."""

    name: str
    sides: list[int]


class FolderCrops:
    """Crops of image files; every pixel position is equally likely, as images are drawn in proportion to area.

    Unreadable files and images smaller than a crop are skipped with a warning that names them: those whose
    header tells at construction, the others when they are drawn, and another image is drawn instead.

    Attributes:
        damaged: names of the images that could not be used, so far.
        digest: tells one set of images from another.
    """

    def __init__(self, paths: Iterable[Path], cropping: Cropping, cache_bytes: int = CACHE_BYTES) -> None:
        self.cropping, self.cache_bytes = cropping, cache_bytes
        self.cache: dict[int, Tensor] = {}
        self.damaged: set[str] = set()
        self.lock = threading.Lock()
        self.files: list[ImageFile] = []
        for path in paths:
            try:
                with open_image(path) as image:  # the header only
                    sides = sorted(image.size)  # not every header tells which way up the image is
                _check_sides(sides, cropping.size)
            except OSError as error:
                _skip(self.damaged, str(path), error)
            else:
                self.files.append(ImageFile(str(path), sides))
        if not self.files:
            raise ValueError(f"no training image is readable and at least {cropping.size} x {cropping.size}")
        areas = torch.tensor([float(short * long) for short, long in (file.sides for file in self.files)])
        self.ends = areas.double().cumsum(0)
        listing = "\n".join(f"{Path(file.name).name} {file.sides}" for file in self.files)
        self.digest = hashlib.sha256(os.fsencode(listing)).hexdigest()[:16]

    def jobs(self, slots: Iterable[int], rank: int, processes: int, skip: int) -> Iterator[Callable[[], Tensor]]:
        """Yield a function that makes the crop, for each of this process's slots; `skip` came before them."""
        return (partial(self.crop, slot) for slot in slots)

    def crop(self, slot: int) -> Tensor:
        """Make the crop of a slot."""
        return self.cropping.crop(slot, self._draw)

    def _draw(self, generator: torch.Generator) -> Tensor:
        index = 0
        for _ in range(TRIES):
            position = torch.rand((), generator=generator, dtype=torch.double) * self.ends[-1]
            index = min(int(torch.searchsorted(self.ends, position)), len(self.files) - 1)
            pixels = self._read(index)
            if pixels is not None:
                return pixels
        raise ValueError(f"{TRIES} images drawn in a row could not be read, the last: {self.files[index].name}")

    def _read(self, index: int) -> Tensor | None:
        name = self.files[index].name
        if index in self.cache or name in self.damaged:
            return self.cache.get(index)
        try:
            pixels = read_pixels(name)
        except OSError as error:
            _skip(self.damaged, name, error)
            return None
        # Decoding dominates a step on a CPU; decoded images are kept as far as they fit.
        with self.lock:
            if index not in self.cache and self.cache_bytes >= pixels.numel():
                self.cache[index] = pixels
                self.cache_bytes -= pixels.numel()
        return pixels


class StreamedCrops:
    """One crop of each image of a stream, shuffled in a buffer, epoch after epoch.

    The n-th image of a process is the n-th of its share of the stream: resuming reads those consumed again, without
    decoding them. Where an image is damaged or smaller than a crop, dead leaves take its slot.

    `stream` is a `datasets.IterableDataset` whose images, in its column `column`, are not decoded. Images with a key of
    `held_out` (see `example_key`) are not trained on.
    """

    def __init__(self, stream: Any, column: str, cropping: Cropping, held_out: frozenset[str] = frozenset()) -> None:
        self.stream, self.column, self.cropping, self.held_out = stream, column, cropping, held_out
        self.damaged: set[str] = set()
        self.digest = ""
        self.failures = 0  # since the last good image

    def jobs(self, slots: Iterable[int], rank: int, processes: int, skip: int) -> Iterator[Callable[[], Tensor]]:
        """See `FolderCrops.jobs`."""
        examples = islice(self._examples(rank, processes), skip, None)
        draws = (partial(self._read, example) for example in examples)
        return (partial(self.cropping.crop, slot, draw) for slot, draw in zip(slots, draws, strict=False))

    def _read(self, example: dict[str, Any] | None, _: torch.Generator) -> Tensor | None:
        try:
            pixels = read_example(example)
            _check_sides(sorted(pixels.shape[-2:]), self.cropping.size)
        except OSError as error:
            _skip(self.damaged, example_name(example), error)
            self.failures += 1
            if self.failures >= TRIES:
                message = f"{TRIES} images of the stream in a row could not be used, the last: {error}"
                raise ValueError(message) from None
            return None
        self.failures = 0
        return pixels

    def _examples(self, rank: int, processes: int) -> Iterator[dict[str, Any] | None]:
        from datasets.distributed import split_dataset_by_node

        stream = self.stream.shuffle(seed=self.cropping.seed, buffer_size=SHUFFLE_BUFFER)
        stream = split_dataset_by_node(stream, rank=rank, world_size=processes)
        for epoch in count():
            stream.set_epoch(epoch)
            is_empty = True
            for example in stream:
                if not self.held_out or example_key(example[self.column]) not in self.held_out:
                    is_empty = False
                    yield example[self.column]
            if is_empty:
                raise ValueError("the stream holds no image to train on (those held out for validation do not count)")


Source = FolderCrops | StreamedCrops


def list_images(folder: str | Path, except_below: Path | None = None) -> list[Path]:
    """Return the image files below `folder`, sorted, except those below another folder, which a command writes to.

    The suffix alone decides: who reads them names those that are damaged, pipes or links to nowhere.

    Raises `FileNotFoundError` where there are none, or no such folder.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {folder}")
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and not path.is_dir())
    if except_below is not None:
        below = except_below.resolve()
        paths = [path for path in paths if not Path(os.path.realpath(path)).is_relative_to(below)]
    if not paths:
        raise FileNotFoundError(f"no images ({', '.join(sorted(SUFFIXES))}) below {folder}")
    return paths


def open_folder(
    folder: Path, cropping: Cropping, held_out: int, except_below: Path | None = None
) -> tuple[FolderCrops, list[Path]]:
    """Return crops of the images below `folder`, and `held_out` of the images, evenly spaced, for validation."""
    paths = list_images(folder, except_below)
    if held_out and held_out >= len(paths):
        raise ValueError(f"cannot hold out {held_out} of {len(paths)} images below {folder}")
    chosen = [paths[i * len(paths) // held_out] for i in range(held_out)]
    return FolderCrops(sorted(set(paths).difference(chosen)), cropping), chosen


def open_dataset(
    name: str, config: str | None, split: str, streaming: bool, cropping: Cropping, held_out: int
) -> tuple[StreamedCrops, list[dict[str, Any]]]:
    """Return crops of a data set of the `datasets` library, and its first `held_out` examples for validation.

    Without `streaming` the data set is downloaded first, then read like a stream.
    """
    import datasets
    from datasets.exceptions import DatasetsError

    try:
        dataset = datasets.load_dataset(name, config, split=split, streaming=streaming)
    except DatasetsError as error:
        raise ValueError(f"cannot load the data set {name!r}: {error}") from error
    if isinstance(dataset, datasets.Dataset):
        dataset = dataset.to_iterable_dataset(num_shards=min(len(dataset), 64))
    columns = [key for key, feature in (dataset.features or {}).items() if isinstance(feature, datasets.Image)]
    if not columns:
        raise ValueError(f"data set {name!r} has no image column; its columns are {sorted(dataset.features or {})}")
    column = columns[0]
    dataset = dataset.select_columns([column]).cast_column(column, datasets.Image(decode=False))
    first = [example[column] for example in dataset.take(held_out)] if held_out else []
    return StreamedCrops(dataset, column, cropping, frozenset(map(example_key, first))), first


def read_example(example: dict[str, Any] | None) -> Tensor:
    """Decode an example `{"bytes": ..., "path": ...}` of a data set as (3, H, W), uint8, or raise `OSError`."""
    if example is None:
        raise OSError("the example holds no image")
    data = example.get("bytes")
    if data is None:
        import fsspec  # remote paths, archives; the datasets library brings it

        try:
            with fsspec.open(example["path"], "rb") as file:
                data = file.read()  # type: ignore[attr-defined]
        except Exception as error:  # remote file systems raise what they like
            raise OSError(f"cannot read image {example_name(example)}: {error}") from error
    return read_pixels(io.BytesIO(data), example_name(example))


def example_key(example: dict[str, Any] | None) -> str:
    """Tell examples apart: by a hash of their bytes, or by path where the bytes lie elsewhere."""
    data = (example or {}).get("bytes")
    return str((example or {}).get("path")) if data is None else hashlib.sha256(data).hexdigest()


def example_name(example: dict[str, Any] | None) -> str:
    """Name an example to a human: its path, or the start of its key."""
    return (example or {}).get("path") or f"without a path ({example_key(example)[:12]})"


def read_or_skip(image: Path | dict[str, Any], least: int, damaged: set[str]) -> Tensor | None:
    """Decode a file or an example as (3, H, W), uint8; None, with a warning, where it is damaged or below `least`."""
    try:
        pixels = read_pixels(image) if isinstance(image, Path) else read_example(image)
        height, width = pixels.shape[-2:]
        if min(height, width) < least:
            raise OSError(f"{width} x {height} is smaller than {least} x {least}")
    except OSError as error:
        _skip(damaged, str(image) if isinstance(image, Path) else example_name(image), error)
        return None
    return pixels


def read_held_out(held_out: Iterable[Path | dict[str, Any]], side: int, stride: int, damaged: set[str]) -> list[Tensor]:
    """Decode validation images, (3, h, w), uint8: the middle, at most `side` pixels, h and w multiples of `stride`.

    Those that cannot be read or are smaller than `stride` are skipped by name.
    """
    images = []
    for each in held_out:
        pixels = read_or_skip(each, stride, damaged)
        if pixels is None:
            continue
        height, width = (min(length, side) // stride * stride for length in pixels.shape[-2:])
        top, left = (pixels.shape[-2] - height) // 2, (pixels.shape[-1] - width) // 2
        images.append(pixels[:, top : top + height, left : left + width].clone())  # a view would keep all of it
    return images


def batches(
    source: Source, start: int, steps: int, batch: int, rank: int = 0, processes: int = 1, threads: int = 1
) -> Iterator[Tensor]:
    """Yield this process's part (batch / processes, 3, size, size) of the batches of the steps start ... steps - 1.

    Crops are made ahead by `threads` threads (decoders release the interpreter), in order.
    """
    local = batch // processes
    slots = (step * batch + rank * local + i for step in range(start, steps) for i in range(local))
    jobs = source.jobs(slots, rank, processes, start * local)
    crops = _ahead(jobs, threads, 2 * local)
    for _ in range(start, steps):
        yield torch.stack(list(islice(crops, local)))


def _ahead(jobs: Iterator[Callable[[], Tensor]], threads: int, ahead: int) -> Iterator[Tensor]:
    """Yield the jobs' results in order while the next `ahead` are under way."""
    if threads < 1:
        yield from (job() for job in jobs)
        return
    pool = ThreadPoolExecutor(threads)
    try:
        pending = deque(pool.submit(job) for job in islice(jobs, ahead))
        while pending:
            result = pending.popleft().result()
            pending.extend(pool.submit(job) for job in islice(jobs, 1))
            yield result
    finally:
        pool.shutdown(cancel_futures=True)


def _check_sides(sides: list[int], crop: int) -> None:
    if sides[0] < crop:
        raise OSError(f"{sides[0]} x {sides[1]} is smaller than a crop of {crop}")


def _skip(damaged: set[str], name: str, reason: object) -> None:
    if name not in damaged:
        damaged.add(name)
        warnings.warn(f"skipped image {name}: {reason}", stacklevel=2)
