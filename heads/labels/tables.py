"""CSV files that pandas reads as they are: one header line, lists of labels joined."""

import csv
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from mmc.heads.formats import SEPARATORS
from mmc.store.errors import InputError


def separator(label_set: Sequence[str]) -> str:
    """What joins several labels in a cell: the first of ``| ; , tab`` that is in no label.

    Raises:
        InputError: each is in some label.
    """
    for candidate in SEPARATORS:
        if not any(candidate in label for label in label_set):
            return candidate
    raise InputError(f"every separator ({' '.join(map(repr, SEPARATORS))}) occurs in a label name")


def cell(value: Any, joined: str) -> str:
    """A value as text: floats with four places, lists joined; empty where there is nothing."""
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.4f}"
    if isinstance(value, list):
        return joined.join(value)
    return str(value)


def write_table(
    path: Path, columns: Sequence[str], rows: Iterable[Mapping[str, Any]], joined: str
) -> None:
    """Write ``columns`` of the rows into a new file, as they come."""
    with path.open("x", encoding="utf-8", errors="backslashreplace", newline="") as file:
        # A line end of its own makes Python quote both CR and LF in cells; lines end in LF.
        writer = csv.writer(_Lines(file), lineterminator="\r\n")
        writer.writerow(columns)
        for row in rows:
            writer.writerow([cell(row[name], joined) for name in columns])


class _Lines:
    """A file for `csv.writer`, which gives it a line at a time."""

    def __init__(self, file: TextIO) -> None:
        self._file = file

    def write(self, line: str) -> int:
        """Write a line that ends in CR LF with LF alone."""
        return self._file.write(line.removesuffix("\r\n") + "\n")
