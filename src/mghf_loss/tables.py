"""Tables of results: rows of one set of columns, written as CSV and shown as text."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

from .checkpoints import write_atomically


def write_table(path: Path, table: Sequence[Mapping[str, object]]) -> None:
    """Write rows of one set of columns as CSV, whole or not at all."""

    def write(temporary: Path) -> None:
        with temporary.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(table[0]))
            writer.writeheader()
            writer.writerows(table)

    write_atomically(path, write)


def format_table(table: Sequence[Mapping[str, object]]) -> str:
    """Align the rows in columns."""
    rows = [[f"{value:.4g}" if isinstance(value, float) else str(value) for value in row.values()] for row in table]
    rows.insert(0, list(table[0]))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )
