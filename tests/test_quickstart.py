"""docs/quickstart.ipynb: it runs from beginning to end, and the outputs in it are those of its code."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

pytestmark = pytest.mark.docs
NOTEBOOK = Path(__file__).parents[1] / "docs" / "quickstart.ipynb"


def code_cells(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def printed(cell: nbformat.NotebookNode) -> str:
    return "".join(output.text for output in cell.outputs if output.output_type == "stream")


def pictures(notebook: nbformat.NotebookNode) -> Iterator[str]:
    for cell in code_cells(notebook):
        yield from (output.data["image/png"] for output in cell.outputs if output.output_type == "display_data")


def test_it_runs_and_says_what_is_committed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """With four steps of training: what comes before the training must be the committed output."""
    committed = nbformat.read(NOTEBOOK, as_version=4)
    fresh = nbformat.read(NOTEBOOK, as_version=4)
    for cell in code_cells(fresh):
        cell.outputs = []
    monkeypatch.setenv("QUICKSTART_STEPS", "4")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    NotebookClient(fresh, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}).execute()

    assert len(list(pictures(fresh))) == len(list(pictures(committed))) == 4
    of_the_loss, of_the_committed_loss = (printed(code_cells(notebook)[1]) for notebook in (fresh, committed))
    numbers = [float(number) for number in re.findall(r"[\d.]+(?:e-\d+)?", of_the_loss)]
    assert len(numbers) == 16
    expected = [float(number) for number in re.findall(r"[\d.]+(?:e-\d+)?", of_the_committed_loss)]
    assert numbers == pytest.approx(expected, rel=0.02)  # shares are rounded
    rows = [line.split("  ")[0] for line in printed(code_cells(fresh)[-2]).splitlines()]
    assert rows == ["loss", "bicubic", "L1", "L1 + MGHFLoss"]


def test_committed_outputs_are_whole_and_of_no_machine():
    assert NOTEBOOK.stat().st_size < 1_500_000
    committed = nbformat.read(NOTEBOOK, as_version=4)
    cells = code_cells(committed)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))  # in order, by one run
    for cell in cells:
        assert all(output.get("name") != "stderr" for output in cell.outputs)
        assert not re.search(r"/(root|home|tmp|Users)/", printed(cell) + cell.source)
