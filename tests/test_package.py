"""The house: what imports what, what an import costs, what a wheel holds."""

from __future__ import annotations

import ast
import doctest
import importlib
import inspect
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch

import mghf_loss
from mghf_loss import HighFrequencyINN

SOURCE = Path(mghf_loss.__file__).parent
REPOSITORY = Path(__file__).parents[1]
# A file may import files of lower floors only.
FLOORS = {
    "_checks": 0,
    "_files": 0,
    "_gt_cache": 1,
    "_random": 0,
    "checkpoints": 1,
    "frozen": 0,
    "ops.convolution": 1,
    "ops.statistics": 1,
    "ops.couplings": 2,
    "ops.linear": 2,
    "ops.local": 2,
    "ops.nce": 2,
    "ops.statistics_triton": 2,
    "ops.local_triton": 3,
    "ops.nce_triton": 3,
    "ops.couplings_triton": 3,
    "ops.linear_triton": 4,
    "ops.cuda": 5,
    "ops": 6,
    "coupling": 5,
    "terms": 7,
    "inn": 6,
    "criterion": 8,
    "metric": 9,
    "dino": 9,
    "mghf": 10,
    "": 12,
    "training": 11,
    "training.dead_leaves": 11,
    "training.data": 12,
    "training.objective": 11,
    "training.loop": 13,
    "training.evaluation": 13,
    "integrations": 11,
    "integrations.registered": 12,
    "integrations.tensorboard": 12,
    "integrations.basicsr": 13,
    "integrations.neosr": 13,
    "integrations.trainner_redux": 13,
    "integrations.lightning": 13,
    "integrations.torchmetrics": 13,
    "functional": 11,
    "toy": 13,
    "calibrate": 14,
    "demo": 14,
    "compare": 14,
    "cli": 15,
    "__main__": 16,
}


def module_name(path: Path) -> str:
    parts = path.relative_to(SOURCE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path) -> set[str]:
    """Names of the package's own modules that a file imports, anywhere in it."""
    name, is_package = module_name(path), path.name == "__init__.py"
    parents = name.split(".") if name else []
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            module = node.module.split(".") if node.module else []
            if node.level:
                base = [*parents[: len(parents) - node.level + is_package], *module]
            elif module[0] == "mghf_loss":
                base = module[1:]
            else:
                continue
            for alias in node.names:
                candidate = ".".join([*base, alias.name])
                found.add(candidate if candidate in FLOORS else ".".join(base))
        elif isinstance(node, ast.Import):
            modules = [alias.name.split(".") for alias in node.names]
            found |= {".".join(module[1:]) for module in modules if module[0] == "mghf_loss"}
    return found


@pytest.mark.parametrize(
    ("statement", "expected"),
    [
        ("from .. import _checks", {"_checks"}),
        ("from . import nce", {"ops.nce"}),
        ("from .nce import patch_nce", {"ops.nce"}),
        ("from mghf_loss import terms, MGHFLoss", {"terms", ""}),
        ("from mghf_loss.terms import content", {"terms"}),
        ("import torch, mghf_loss.mghf as m", {"mghf"}),
        ("import mghf_loss", {""}),
        ("from torch import nn", set()),
    ],
)
def test_every_way_to_import_is_seen(statement, expected, monkeypatch):
    monkeypatch.setattr(Path, "read_text", lambda _: f"def f():\n    {statement}")
    assert imports(SOURCE / "ops" / "cuda.py") == expected


@pytest.mark.parametrize("path", sorted(SOURCE.rglob("*.py")), ids=module_name)
def test_imports_point_down(path):
    name = module_name(path)
    assert name in FLOORS, f"give {name} a floor"
    for imported in imports(path):
        assert FLOORS[imported] < FLOORS[name], f"{name} imports {imported}"


def test_nothing_imports_the_integrations_and_each_its_own_framework_alone():
    frameworks = {
        "basicsr": "basicsr",
        "neosr": "neosr",
        "traiNNer": "trainner_redux",
        "lightning": "lightning",
        "torchmetrics": "torchmetrics",
    }
    for path in SOURCE.rglob("*.py"):
        name = module_name(path)
        if not name.startswith("integrations"):
            assert not [imported for imported in imports(path) if imported.startswith("integrations")], name
        for framework, owner in frameworks.items():
            knows = re.search(rf"^\s*(import|from) {framework}\b", path.read_text(), re.MULTILINE) is not None
            documented = name == "integrations.lightning" and framework == "lightning"
            assert knows == (name == f"integrations.{owner}") or documented, f"{name} and {framework}"


def test_only_the_network_knows_freia():
    knows = [path.name for path in SOURCE.rglob("*.py") if re.search(r"(import|from) FrEIA", path.read_text())]
    assert sorted(knows) == ["coupling.py", "inn.py"]


def test_import_is_light_and_works_from_a_source_tree():
    """Without site-packages' metadata: PYTHONPATH alone knows the package."""
    program = """
import importlib.metadata, sys, torch
before = set(sys.modules)
def no_metadata(name): raise importlib.metadata.PackageNotFoundError(name)
importlib.metadata.version = importlib.metadata.distribution = no_metadata
import mghf_loss
assert mghf_loss.__file__.startswith(sys.argv[1]) and mghf_loss.__version__
new = set(sys.modules) - before
print(",".join(sorted({name.split(".")[0] for name in new})))
"""
    new = subprocess.run(
        [sys.executable, "-c", program, str(SOURCE)],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": str(SOURCE.parent)},
    ).stdout
    heavy = {
        "triton",
        "timm",
        "torchvision",
        "scipy",
        "FrEIA",
        "huggingface_hub",
        "safetensors",
        "skimage",
        "matplotlib",
        "PIL",
    }
    assert "mghf_loss" in new
    assert not heavy & set(new.strip().split(","))


def test_public_names_exist_and_are_documented():
    for name in mghf_loss.__all__:
        value = getattr(mghf_loss, name)
        assert name == "__version__" or value.__doc__, name
    assert dir(mghf_loss) == mghf_loss.__all__
    with pytest.raises(AttributeError, match="no attribute 'VGGLoss'"):
        mghf_loss.VGGLoss  # noqa: B018


@pytest.mark.parametrize("name", ["criterion", "mghf", "dino", "terms", "inn", "metric", "functional"])
def test_examples_of_docstrings_run(name):
    module = importlib.import_module(f"mghf_loss.{name}")
    losses = {loss: getattr(mghf_loss, loss) for loss in ("MGHFLoss", "MGHFnLoss")}
    results = doctest.testmod(module, extraglobs=losses)
    assert results.attempted > 0
    assert results.failed == 0


def test_what_one_calls_has_an_example():
    public = [mghf_loss.MGHFLoss, mghf_loss.MGHFnLoss, mghf_loss.DinoJSDLoss, mghf_loss.HighFrequencyINN]
    public += [mghf_loss.MGHFLoss.set_coefficients, mghf_loss.MGHFLoss.heatmap]
    functions = inspect.getmembers(mghf_loss.terms, inspect.isfunction)
    functions = [(name, f) for name, f in functions if f.__module__ == "mghf_loss.terms" and name[0] != "_"]
    # `..._of`: the formula inside a term.
    public += [f for name, f in functions if name != "reduce" and not name.endswith("_of")]
    assert [thing.__qualname__ for thing in public if ">>>" not in (thing.__doc__ or "")] == []


@pytest.mark.process
def test_sdist_holds_no_studies_and_nothing_large(tmp_path):
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "sdist", "-d", str(tmp_path)],
        cwd=REPOSITORY,
        check=True,
        capture_output=True,
    )
    (sdist,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        sizes = {member.name.split("/", 1)[1]: member.size for member in archive.getmembers()}
    assert {"pyproject.toml", "README.md", "src/mghf_loss/weights/model.safetensors"} <= sizes.keys()
    assert [name for name in sizes if name.startswith(("benchmarks/", "studies/"))] == []
    assert [name for name, size in sizes.items() if size >= 2**20] == []


@pytest.mark.process
def test_wheel_holds_checkpoint_and_type_marker(tmp_path):
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)],
        cwd=REPOSITORY,
        check=True,
        capture_output=True,
    )
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    for name in ("py.typed", "weights/model.safetensors", "weights/config.json", "weights/README.md"):
        assert f"mghf_loss/{name}" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert not [name for name in names if not name.startswith(("mghf_loss/", "mghf_loss-"))]
    assert wheel.stat().st_size < 2**20
    zipfile.ZipFile(wheel).extractall(tmp_path)
    image = torch.rand(1, 3, 24, 40)
    packed, bundled = (
        HighFrequencyINN.from_pretrained(name).features(image)
        for name in (tmp_path / "mghf_loss" / "weights", "bundled")
    )
    assert all(torch.equal(a, b) for a, b in zip(packed, bundled, strict=True))
