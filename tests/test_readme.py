"""Every code block of the README and of the pages in docs/ runs here, or stands in `NOT_RUN` with the reason."""

from __future__ import annotations

import ast
import io
import re
import runpy
import shlex
import sys
from collections.abc import Iterator
from contextlib import redirect_stdout
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import timm
import yaml
from accelerate.state import AcceleratorState
from markdown_it import MarkdownIt
from markdown_it.token import Token
from PIL import Image
from safetensors.torch import save as save_tensors
from skimage import data

from conftest import perturbed_inn
from hub import Client, Hub
from mghf_loss import MGHFLoss, cli
from mghf_loss.dino import DEFAULT_MODEL

pytestmark = pytest.mark.docs
REPOSITORY = Path(__file__).parents[1]
PAGES = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").rglob("*.md"))]
# "{.python}" is a whole file, included when the site is built: ruff, which formats Python in Markdown, leaves it alone.
LANGUAGES = {"python", "{.python}", "bash", "yaml", "toml", "bibtex"}

# Commands and programs that cannot run here, by how they begin, and why.
NOT_RUN = {
    'pip install ".[demo]" && mghf-loss demo': "installs; .ci/run takes it from the README and runs it as it stands",
    'pip install -e ".[test]" && pytest': "installs, and is this suite; .ci/run takes it from the README too",
    "pip install basicsr==1.4.2": "installs; the extra `test` has it",
    "pip install lightning tensorboard": "installs; the extra `test` has them",
    "step = torch.cuda.make_graphed_callables(": "a CUDA graph; tests/test_cuda.py makes one where there is a GPU",
    "python -m benchmarks.gpu ": "measures on an NVIDIA GPU; it refuses to start without one",
    "accelerate launch --multi_gpu --num_processes 8 ": "eight GPUs; tests/test_training.py launches two CPU processes",
    "# neosr/losses/mghf_loss.py": "a file of neosr, which is not on PyPI",
    "# traiNNer/losses/mghf_loss.py": "a file of traiNNer-redux, which is not on PyPI",
}
# What makes a command a matter of seconds: options that come last win.
SMALL = {
    "demo": ["--steps", "2"],
    "train-inn": shlex.split("--steps 1 --batch 1 --crop 16 --hidden 4 --couplings 1 --threads 1 --cpu"),
}
# What BasicSR's perceptual slot takes in place of `loss_weight`.
FACTORS = ("perceptual_weight", "style_weight")
# What the README's Python takes for granted, as the reader's program has it.
GIVEN = """
import torch
from mghf_loss.toy import SmallSR, downscale

torch.manual_seed(0)
device = "cpu"
model = SmallSR(width=4, blocks=1)
gt = torch.rand(2, 3, 32, 32)
lr = downscale(gt)
loader = torch.utils.data.DataLoader([(lr[0], gt[0])] * 4, batch_size=2)
images = gt
"""


def blocks(page: Path) -> list[Token]:
    """Return the fenced blocks of a page."""
    tokens = MarkdownIt("commonmark").parse(page.read_text())
    # An indented block has no language: nobody would know what it is, least of all this test.
    assert not [token.map for token in tokens if token.type == "code_block"], f"{page}: fence indented blocks"
    return [token for token in tokens if token.type == "fence"]


def page_name(page: Path) -> str:
    return str(page.relative_to(REPOSITORY))


def pages_with(*languages: str) -> list[Any]:
    pages = [page for page in PAGES if any(block.info in languages for block in blocks(page))]
    return [pytest.param(page, id=page_name(page)) for page in pages]


def is_named(text: str) -> bool:
    return text.startswith(tuple(NOT_RUN))


def program(page: Path) -> str:
    """Return the Python blocks of a page as one program whose line numbers are the page's."""
    lines = [""] * len(page.read_text().splitlines())
    for block in blocks(page):
        if block.info == "python" and block.map and not is_named(block.content):
            content = block.content.splitlines()
            lines[block.map[0] + 1 : block.map[0] + 1 + len(content)] = content
    return "\n".join(lines)


def commands(page: Path) -> list[str]:
    """Return the commands of a page's shell blocks, continued lines joined, without lines of comment."""
    text = "\n".join(block.content for block in blocks(page) if block.info == "bash").replace("\\\n", " ")
    return [re.sub(r"\s+", " ", line).strip() for line in text.splitlines() if line.strip() and line[0] != "#"]


def test_the_readme_is_short_and_renders_anywhere():
    text = (REPOSITORY / "README.md").read_text()
    assert len(text.splitlines()) <= 120
    assert len(text.split()) <= 800
    assert len(text[: text.index("pip install")].split()) <= 60
    assert len(text[: text.index("import ")].split()) <= 90
    targets = re.findall(r"\]\(([^)]+)\)", text)
    assert targets
    assert all(target.startswith("https://") for target in targets)  # a package index knows no other files
    for path in re.findall(r"https://[\w./-]+/mghf-loss/(?:blob/|tree/|)main/([\w./-]+)", text):
        assert (REPOSITORY / path).exists(), path


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_every_block_says_what_it_is(page: Path):
    assert {block.info for block in blocks(page)} <= LANGUAGES


def test_reasons_for_not_running_are_of_commands_that_exist():
    everything = [command for page in PAGES for command in commands(page)]
    everything += [block.content for page in PAGES for block in blocks(page) if block.info == "python"]
    for beginning in NOT_RUN:
        assert any(text.startswith(beginning) for text in everything), beginning


@pytest.mark.parametrize("page", pages_with("{.python}"))
def test_included_programs_are_examples_that_a_test_runs(page: Path):
    run_by_tests = examples_run_by_tests()
    for block in blocks(page):
        if block.info == "{.python}":
            match = re.fullmatch(r'--8<-- "examples/([\w/]+)\.py"\n', block.content)
            assert match
            assert (REPOSITORY / "examples" / f"{match[1]}.py").is_file()
            assert Path(match[1]).name in run_by_tests


def examples_run_by_tests() -> set[str]:
    """Return what test functions give to `example` and `main`, and the names of the files in their commands."""
    names = set()
    for file in ("examples", "lightning"):
        for test in ast.walk(ast.parse((REPOSITORY / "tests" / f"test_{file}.py").read_text())):
            if not isinstance(test, ast.FunctionDef) or not test.name.startswith("test_"):
                continue
            for node in ast.walk(test):
                match node:
                    case ast.Call(ast.Name("example" | "main"), [ast.Constant(str(name)), *_]):
                        names.add(name)
                    case ast.Constant(str(name)) if name.endswith(".py"):
                        names.add(Path(name).stem)
    return names


@pytest.mark.parametrize("page", pages_with("yaml", "toml"))
def test_options_of_trainers_build_the_loss(page: Path):
    built = 0
    for block in blocks(page):
        if block.info == "yaml":
            options = yaml.safe_load(block.content)
        elif block.info == "toml":
            options = pytest.importorskip("tomllib", reason="Python 3.11 has it").loads(block.content)
        else:
            continue
        for slot in losses_in(options):
            if "mghf" in slot.pop("type").lower():
                factors = [slot.pop(name) for name in ("loss_weight", *FACTORS) if name in slot]
                assert all(factors), slot
                MGHFLoss(**slot)
                built += 1
    assert built


def losses_in(options: Any) -> Iterator[dict[str, Any]]:
    """Yield every table with a type, at any depth."""
    if isinstance(options, dict) and "type" in options:
        yield options
    elif isinstance(options, (dict, list)):
        for value in options.values() if isinstance(options, dict) else options:
            yield from losses_in(value)


@pytest.fixture(scope="module")
def python_outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What became of every page's Python, run in one process with a Hub on the loopback, by page."""
    folders = {page.values[0]: tmp_path_factory.mktemp("page") for page in pages_with("python")}
    network = perturbed_inn(levels=1, hidden=4, couplings=1)
    requests = []
    for page, folder in folders.items():
        network.save_pretrained(folder / "runs" / "inn")
        requests.append(["python", str(folder), GIVEN, program(page)])
    files = {file.name: file.read_bytes() for file in (folder / "runs" / "inn").iterdir()}
    dino = timm.create_model(DEFAULT_MODEL, pretrained=False, num_classes=0)
    weights = save_tensors({name: tensor.half() for name, tensor in dino.state_dict().items()})
    with Hub() as hub:
        for revision in ("main", "revision"):
            hub.add("org/name", files, revision)
        hub.add(f"timm/{DEFAULT_MODEL}", {"model.safetensors": weights})
        with Client(requests, url=hub.url, home=tmp_path_factory.mktemp("home")) as client:
            return {
                page_name(page): outcome
                for page, outcome in zip(folders, client.outcomes(timeout=600).values(), strict=True)
            }


@pytest.mark.xdist_group("readme")  # shares the fixture
@pytest.mark.parametrize("page", pages_with("python"))
def test_python_runs(page: Path, python_outcomes: dict[str, dict[str, Any]]):
    if page.stem == "basicsr" and not find_spec("basicsr"):
        pytest.skip("BasicSR is not installed")
    outcome = python_outcomes[page_name(page)]
    assert "error" not in outcome, outcome["message"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with what the commands name: a pair of images and folders of them."""
    photograph = Image.fromarray(data.astronaut()[100:164, 150:214])
    for name in ("DIR", "OTHER"):
        (tmp_path / name).mkdir()
        for index in range(2):
            photograph.rotate(90 * index).save(tmp_path / name / f"{index}.png")
    photograph.save(tmp_path / "gt.png")
    photograph.resize((16, 16)).resize((64, 64), Image.Resampling.BICUBIC).save(tmp_path / "sr.png")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("page", pages_with("bash"))
def test_commands_run(page: Path, folder: Path):
    for command in commands(page):
        run(command, folder)


def run(command: str, folder: Path) -> None:
    """Run a command of the documentation with settings that make it quick, or fail."""
    words = shlex.split(command, comments=True)
    if is_named(command):
        if words[0] == "accelerate":  # at least its options are the command's
            cli._parser().parse_args(words[words.index("mghf-loss)") + 1 :])
    elif words[0] == "mghf-loss":
        AcceleratorState._reset_state(reset_partial_state=True)  # a process has one precision, the page has two
        words = [str(folder / "DIR") if word == "imagenet-1k" else word for word in words[1:]]
        held_out = ["--held-out", "1"] if "--held-out" in words else []
        assert cli.main([*words, *SMALL.get(words[0], []), *held_out]) == 0, command
    elif words[0] == "python" or words[:2] == ["accelerate", "launch"]:
        # Programs of the repository have tests of their own: here, that they exist and know these options.
        script, *options = shlex.split(re.sub("^(python( -m)?|accelerate launch) ", "", command).replace("#", " "))
        usage = help_of(script)
        for option in options:
            assert not option.startswith("--") or option.strip(",;") in usage, f"{script} has no {option}"
    else:
        raise AssertionError(f"say in `run` or `NOT_RUN` what becomes of: {command}")


def help_of(script: str) -> str:
    """Return what a script or module prints for --help; in this process, which has PyTorch already."""
    output = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(output):
        patch.delitem(sys.modules, script, raising=False)
        path = REPOSITORY / script
        is_file = path.suffix == ".py"
        patch.syspath_prepend(path.parent if is_file else REPOSITORY)
        start = partial(runpy.run_path, str(path)) if is_file else partial(runpy.run_module, script)
        patch.setattr(sys, "argv", [script, "--help"])
        try:
            with pytest.raises(SystemExit) as stopped:
                start(run_name="__main__")
        except ModuleNotFoundError as error:  # .ci/run repeats this test with the extra of the benchmarks
            pytest.skip(str(error))
    assert stopped.value.code == 0
    return output.getvalue()
