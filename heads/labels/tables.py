"""CSV files that pandas reads as they are: one header line, lists of labels joined."""

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mmc.heads.formats import SEPARATORS
from mmc.heads.runfiles import write_atomic
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
) -> int:
    """Write ``columns`` of the rows, whole or not at all; how many rows."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    count = 0
    for row in rows:
        writer.writerow([cell(row[name], joined) for name in columns])
        count += 1
    write_atomic(path, text.getvalue().encode())
    return count
