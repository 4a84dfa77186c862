"""Is what was prepared the same data? It is read back and compared: a loss is said, not found."""

import numpy as np
import pyarrow as pa

from mmc.extract.sources import Samples, SourceOptions, read_source
from mmc.extract.sources.base import listed
from mmc.store.errors import InputError
from mmc.store.samples import UNKNOWN


def compare(samples: Samples, rows: pa.ChunkedArray, folder: str, to: str) -> tuple[str, ...]:
    """In what a prepared folder, read without options, differs from its source; () = in nothing.

    Args:
        samples: the source.
        rows: (n,) int64; its rows that were written, in their order.
    """
    try:
        back = read_source(folder, SourceOptions(need_images=False))
    except InputError as error:
        return (f"it cannot be read without options: {error}",)
    there = samples.table.take(rows)
    if back.table["id"].to_pylist() != there["id"].to_pylist():
        return (f"reading it gives {len(back.table)} samples, not these {len(there)}, in order",)
    found = []
    for name in ("split", "text"):
        count = sum(
            a != b
            for a, b in zip(back.table[name].to_pylist(), there[name].to_pylist(), strict=True)
        )
        if count:
            found.append(f"{count} samples have another {name} when it is read")
    if back.task != samples.task:
        found.append(f"it reads as {back.task}, not {samples.task}; give --task {samples.task}")
    if back.label_set != samples.label_set:
        lost = [name for name in samples.label_set if name not in back.label_set]
        what = (
            f"labels that no sample has are lost: {listed(lost, 5)}" if lost else "order of labels"
        )
        hint = "; --to webdataset keeps them" if to == "csv" else ""
        found.append(f"the label set is another ({what}){hint}")
    found += _labels(samples, there, back, to)
    return tuple(found)


def _labels(samples: Samples, there: pa.Table, back: Samples, to: str) -> list[str]:
    before, after = named_labels(there, samples.label_set), named_labels(back.table, back.label_set)
    differ = np.flatnonzero([a != b for a, b in zip(before, after, strict=True)])
    if not len(differ):
        return []
    first = there["id"][int(differ[0])].as_py()
    unknown = all(before[at][0] is None for at in differ)
    why = ": a table cannot say that a sample is unlabelled" if unknown and to == "csv" else ""
    hint = "; --to webdataset can say it" if to == "csv" else ""
    return [f"{len(differ)} samples have other labels when it is read, first {first!r}{why}{hint}"]


Names = frozenset[str] | None


def named_labels(table: pa.Table, names: tuple[str, ...]) -> list[tuple[Names, Names]]:
    """The names of each sample's labels, and of those that are unknown; None = null."""

    def named(cells: list[list[int] | None]) -> list[Names]:
        return [None if cell is None else frozenset(names[at] for at in cell) for cell in cells]

    given = named(table["labels"].to_pylist())
    if UNKNOWN.name not in table.column_names:
        return [(labels, None) for labels in given]
    return list(zip(given, named(table[UNKNOWN.name].to_pylist()), strict=True))
