"""Fixtures shared by the tests: everything offline, seeded, single-threaded."""

from __future__ import annotations

import io
import os
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mghf_loss import HighFrequencyINN, INNConfig


def pytest_configure(config: pytest.Config) -> None:
    """Run all of the files that the command line names: the fast tier is for `pytest` alone."""
    if hasattr(config, "workerinput"):
        return  # of xdist: the first process has decided
    # The user's cache may hold code for an operator's last schema, which is not in the cache's keys.
    compiled = tempfile.TemporaryDirectory(prefix="inductor-")
    config.add_cleanup(compiled.cleanup)
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = compiled.name
    given = config.invocation_params.args
    if config.args_source is pytest.Config.ArgsSource.ARGS and not any(str(word).startswith("-m") for word in given):
        config.option.markexpr = ""


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)


def perturbed_inn(**config) -> HighFrequencyINN:
    """An untrained network that is not the identity: couplings start as the zero function."""
    network = HighFrequencyINN(INNConfig(**{"hidden": 8, **config}))
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn_like(parameter) / len(parameter) ** 0.5  # well-conditioned
    return network


@pytest.fixture
def inn() -> HighFrequencyINN:
    return perturbed_inn()


def saved_bytes(criterion: torch.nn.Module, sr: torch.Tensor, gt: torch.Tensor) -> int:
    """Bytes of the distinct storages that autograd keeps, parameters and images aside."""
    networks = [module.network for module in criterion.modules() if hasattr(module, "network")]
    networks = [network for network in networks if not hasattr(network, "network")]
    known = {tensor.untyped_storage().data_ptr() for network in networks for tensor in network.parameters()}
    known |= {sr.untyped_storage().data_ptr(), gt.untyped_storage().data_ptr()}
    kept: list[torch.Tensor] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor.detach())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        criterion(sr, gt)
    sizes = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in kept}
    return sum(size for address, size in sizes.items() if address not in known)


@pytest.fixture
def tiny_dino() -> torch.nn.Module:
    """DINOv2's architecture with random weights, small enough for a test."""
    import timm

    network = timm.create_model(
        "vit_small_patch14_dinov2.lvd142m",
        pretrained=False,
        num_classes=0,
        dynamic_img_size=True,
        img_size=28,
        embed_dim=32,
        depth=2,
        num_heads=2,
    )
    for name, parameter in network.named_parameters():
        if name.endswith("gamma"):  # layer scales start at 1e-5: an untrained class token would not see the image
            torch.nn.init.ones_(parameter)
    return network.eval()


@pytest.fixture(params=["avif", "dds"])
def damaged(request) -> bytes:
    """A damaged image for which Pillow raises no `OSError`."""
    if f".{request.param}" not in Image.registered_extensions():
        pytest.skip(f"this Pillow has no {request.param}")
    buffer = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, request.param)
    data = buffer.getvalue()
    if request.param == "dds":  # of an unknown pixel format
        return data[:76] + b"\x20\0\0\0\x04\0\0\0ABCD" + data[88:]
    start = data.index(b"mdat") + 4
    return data[:start] + 200 * b"\xff" + data[start + 200 :]


@pytest.fixture
def image_folder(tmp_path) -> Path:
    """Three smooth random images, so that details are predictable to a degree."""
    rng = np.random.default_rng(0)
    images = tmp_path / "images" / "nested"
    images.mkdir(parents=True)
    for index in range(3):
        coarse = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8))
        coarse.resize((64, 48), Image.Resampling.BICUBIC).save(images / f"{index}.png")
    return tmp_path / "images"
