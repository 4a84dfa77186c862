"""TEMPORARY."""

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmc.heads.runfiles import read_record, write_atomic


@dataclass(frozen=True)
class Comparison:
    rows: list[dict[str, Any]]

    def __str__(self) -> str:
        return "\n".join(str(row) for row in self.rows)


def compare(folders: Sequence[str], out: str) -> Comparison:
    rows = []
    for folder in folders:
        record = read_record(Path(folder))
        from mmc.heads.metrics import HEADLINE

        headline = HEADLINE[record["task"]]
        rows.append(
            {
                "run": folder,
                "head": record["head"],
                **{f"{s} {headline}": m[headline] for s, m in record["metrics"].items()},
            }
        )
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    write_atomic(Path(out), text.getvalue().encode())
    return Comparison(rows)
