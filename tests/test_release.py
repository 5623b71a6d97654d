"""What a release needs: files that parse, versions that agree, and no promise of a package that is not there yet."""

from __future__ import annotations

import re
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import yaml

import mghf_loss
from mghf_loss.cli import EXTRAS

tomllib = pytest.importorskip("tomllib", reason="Python 3.11 has it")
REPOSITORY = Path(__file__).parents[1]
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
WORKFLOWS = REPOSITORY / ".github" / "workflows"


def read(path: Path) -> dict:
    return yaml.safe_load(path.read_text())


def steps(workflow: str) -> list[dict]:
    jobs = read(WORKFLOWS / f"{workflow}.yml")["jobs"]
    return [step for job in jobs.values() for step in job["steps"]]


def test_every_yaml_file_parses():
    files = [*REPOSITORY.glob("*.y*ml"), *REPOSITORY.glob(".*.yaml"), *(REPOSITORY / ".github").rglob("*.yml")]
    names = {path.name for path in files}
    assert {"mkdocs.yml", ".pre-commit-config.yaml", "ci.yml", "docs.yml", "release.yml", "dependabot.yml"} <= names
    for path in files:
        assert isinstance(read(path), dict), path


def test_issue_forms_have_what_github_asks_for():
    forms = [path for path in (REPOSITORY / ".github" / "ISSUE_TEMPLATE").glob("*.yml") if path.stem != "config"]
    assert len(forms) == 3
    for path in forms:
        form = read(path)
        assert form["name"]
        assert form["description"]
        ids = [item["id"] for item in form["body"]]
        assert len(set(ids)) == len(ids)
        assert all(item["type"] == "textarea" and item["attributes"]["label"] for item in form["body"])


def test_tested_versions_are_those_that_are_promised():
    versions = read(WORKFLOWS / "ci.yml")["jobs"]["fast"]["strategy"]["matrix"]["python"]
    classified = re.findall(r"Python :: (3\.\d+)", " ".join(PROJECT["classifiers"]))
    assert versions == classified == ["3.10", "3.11", "3.12", "3.13", "3.14"]
    assert PROJECT["requires-python"] == f">={versions[0]}"


def test_a_release_is_published_by_tag_without_a_token():
    text = (WORKFLOWS / "release.yml").read_text()
    workflow = read(WORKFLOWS / "release.yml")
    assert workflow[True] == {"push": {"tags": ["v*"]}}  # YAML 1.1 reads "on" as true
    assert workflow["jobs"]["publish"]["permissions"] == {"id-token": "write"}
    assert "secrets." not in text
    assert "password" not in text
    commands = [step.get("run", "") for step in steps("release")]
    assert any("python -m build" in command for command in commands)
    assert any("twine check" in command for command in commands)


def test_workflows_run_what_contributing_names():
    commands = " ".join(step.get("run", "") for step in steps("ci"))
    for command in ("pytest", "bash .ci/run", "ruff check .", "ruff format --check .", "pyright"):
        assert command in commands
        assert f"`{command}`" in (REPOSITORY / "CONTRIBUTING.md").read_text()
    assert any("mkdocs build --strict" in step.get("run", "") for step in steps("docs"))
    for path in re.findall(
        r"[`(]((?:tests|docs|src|studies|benchmarks)/[\w./]+)", (REPOSITORY / "CONTRIBUTING.md").read_text()
    ):
        assert (REPOSITORY / path).exists(), path


def test_the_version_stands_in_one_place():
    version = re.escape(mghf_loss.__version__)
    for name in ("pyproject.toml", "CITATION.cff", "mkdocs.yml"):
        assert not re.search(rf"^\s*version\W+{version}", (REPOSITORY / name).read_text(), re.MULTILINE), name


def test_the_changelog_has_the_sections_of_its_format():
    text = (REPOSITORY / "CHANGELOG.md").read_text()
    versions = re.findall(r"^## \[(.+?)\]", text, re.MULTILINE)
    assert versions[0] == "Unreleased"
    assert set(re.findall(r"^### (.+)$", text, re.MULTILINE)) <= {
        "Added",
        "Changed",
        "Deprecated",
        "Removed",
        "Fixed",
        "Security",
    }
    for version in versions:
        assert re.search(rf"^\[{re.escape(version)}\]: https://", text, re.MULTILINE)


def test_the_citation_is_of_the_paper():
    citation = read(REPOSITORY / "CITATION.cff")
    assert citation["cff-version"] == "1.2.0"
    assert citation["license"] == PROJECT["license"]
    assert citation["repository-code"] == PROJECT["urls"]["Repository"]
    assert "2411.13548" in citation["preferred-citation"]["url"]


def test_no_message_installs_from_an_index_before_there_is_a_release():
    extras = PROJECT["optional-dependencies"]
    assert {"demo", *EXTRAS.values()} <= extras.keys()
    released = "[Unreleased]" not in re.findall(r"^## (\[.+?\])", (REPOSITORY / "CHANGELOG.md").read_text(), re.M)[-1]
    if not released:
        sources = [*(REPOSITORY / "src").rglob("*.py"), REPOSITORY / "README.md", *(REPOSITORY / "docs").rglob("*.md")]
        sources += [*(REPOSITORY / "examples").glob("*.py"), REPOSITORY / "CONTRIBUTING.md"]
        found = [path for path in sources if re.search(r"pip install ['\"]?mghf[-_]loss", path.read_text())]
        assert found == []


@pytest.mark.process
def test_the_source_distribution_holds_what_a_build_needs(tmp_path):

    command = [sys.executable, "-m", "hatchling", "build", "-t", "sdist", "-d", str(tmp_path)]
    subprocess.run(command, cwd=REPOSITORY, check=True, capture_output=True)
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as file:
        names = {name.partition("/")[2] for name in file.getnames()}
    for name in (
        "CHANGELOG.md",
        "CITATION.cff",
        "CONTRIBUTING.md",
        "LICENSE",
        "src/mghf_loss/weights/model.safetensors",
    ):
        assert name in names
