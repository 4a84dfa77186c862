"""Ids: from their column, else from the images, else from the rows' numbers. All different."""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mmc.extract.sources.base import Part
from mmc.extract.sources.columns import Roles
from mmc.store.errors import InputError

Where = Callable[[int], str]


def find_ids(
    parts: Sequence[Part], roles: Sequence[Roles], paths: pa.ChunkedArray, notes: list[str]
) -> pa.ChunkedArray:
    """(N,) string; ``notes`` get a line where there is no id column.

    Args:
        paths: (N,) string; each sample's image, null = none.
    """
    if all(role.id is not None for role in roles):
        return pa.chunked_array(
            [
                chunk
                for part, role in zip(parts, roles, strict=True)
                for chunk in part.column(role.id).chunks
            ],
            pa.string(),
        )
    if paths.null_count == 0 and len(paths):
        unique = pc.count_distinct(paths).as_py() == len(paths)
        notes.append(
            "ids: no id column, so an image's path is its sample's id"
            + ("" if unique else ", with #0, #1, ... as images repeat")
        )
        return paths if unique else _numbered(paths)
    notes.append(
        "ids: no id column, so a row's number is its id (it changes when rows are put in between)"
    )
    several = len(parts) > 1
    splits = Counter(part.split for part in parts)
    # Where a split has several tables, only a table's own name tells its rows apart.
    names = [
        part.split if part.split and splits[part.split] == 1 else part.records.where
        for part in parts
    ]
    return pa.chunked_array(
        [
            pa.array(
                [f"{name}-{n}" if several else str(n) for n in range(1, len(part) + 1)],
                pa.string(),
            )
            for part, name in zip(parts, names, strict=True)
        ]
    )


def _numbered(paths: pa.ChunkedArray) -> pa.ChunkedArray:
    """``path#n`` for the n-th sample of a picture: rows added at the end change no id."""
    seen: Counter[str] = Counter()
    result = []
    for path in paths.to_pylist():
        result.append(f"{path}#{seen[path]}")
        seen[path] += 1
    return pa.chunked_array([pa.array(result, pa.string())])


def check_filled(ids: pa.ChunkedArray, where: Where) -> None:
    """Refuse a sample without an id."""
    filled = pc.fill_null(pc.greater(pc.binary_length(pc.utf8_trim_whitespace(ids)), 0), False)
    row = pc.index(filled, False).as_py()
    if row >= 0:
        raise InputError(f"{where(row)} has an empty id; give it one, or remove the row")


def check_unique(core: dict[str, Any], where: Where) -> None:
    """Refuse two samples of one id."""
    ids = core["id"]
    codes = ids.combine_chunks().dictionary_encode().indices.to_numpy()
    _, first = np.unique(codes, return_index=True)
    again = np.flatnonzero(first[codes] != np.arange(len(codes)))
    if len(again):
        row, other = int(again[0]), int(first[codes[again[0]]])
        same = all(core[name][row] == core[name][other] for name in ("text", "image", "labels"))
        remedy = (
            "the rows say the same: remove one"
            if same
            else "the rows differ: correct one, or choose another --id-column"
        )
        raise InputError(
            f"{where(row)} has the id {ids[row].as_py()!r} of {where(other)}, and ids must be"
            f" unique; {remedy}"
        )
