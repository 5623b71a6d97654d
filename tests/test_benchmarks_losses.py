"""benchmarks.losses as a command: every setting a set of rows, other settings kept, peers that fail skipped."""

from __future__ import annotations

import csv
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.bench
REPOSITORY = Path(__file__).parents[1]


def measure(table: Path, *arguments: str) -> tuple[str, list[dict[str, str]]]:
    command = [sys.executable, "-m", "benchmarks.losses", "--rounds", "1", "--warmup", "1", "--csv", str(table)]
    finished = subprocess.run([*command, *arguments], capture_output=True, text=True, check=False, cwd=REPOSITORY)
    assert finished.returncode == 0, finished.stderr
    with table.open() as file:
        return finished.stdout, list(csv.DictReader(file))


def test_settings_are_measured_and_merged(tmp_path):
    table = tmp_path / "losses.csv"
    ours = ["MGHFLoss", "MGHFLoss sharp", "MGHFLoss sharp low memory", "SR step"]
    _, rows = measure(table, "--sizes", "16", "24", "--batches", "1", "2", "--only", *ours)
    assert [(row["batch"], row["size"], row["loss"]) for row in rows] == [
        (batch, size, loss) for batch in "12" for size in ("16", "24") for loss in ours
    ]
    for row in rows:
        assert row["device"]
        assert row["torch"]
        assert row["date"]
        assert float(row["median_ms"]) > 0
        assert float(row["share_of_sr_step"]) > 0
        assert (float(row["share_of_sr_step"]) == 1) == (row["loss"] == "SR step")
    saved = {row["loss"]: float(row["saved_mib"]) for row in rows if (row["batch"], row["size"]) == ("2", "24")}
    assert 0 < saved["MGHFLoss sharp low memory"] < saved["MGHFLoss sharp"]

    _, again = measure(table, "--sizes", "24", "--batches", "1", "--only", "content")
    assert len(again) == len(rows) + 1  # a loss more, and nothing else is lost
    assert [row for row in again if row["loss"] != "content"] == rows


def test_a_table_of_other_columns_is_replaced(tmp_path):
    table = tmp_path / "losses.csv"
    table.write_text("loss,median_ms\nMGHFnLoss,1\n")
    _, rows = measure(table, "--sizes", "16", "--batches", "1", "--only", "MGHFnLoss")
    assert [row["share_of_sr_step"] for row in rows] == [""]  # there is no step to compare with
