"""Nearest samples as records and as lines for a terminal."""

from typing import Any

import numpy as np
import numpy.typing as npt

from mmc.store.neighbors import NeighborIndex, Vectors
from mmc.store.reader import EmbeddingStore

SHOWN = 60
"""Characters of a text in a terminal."""
COLUMNS = ("id", "split", "labels", "image", "text")


def nearest_samples(
    store: EmbeddingStore, index: NeighborIndex, vector: Vectors, k: int, *, row: int | None = None
) -> list[dict[str, Any]]:
    """The nearest samples of one query, the nearest first, as plain JSON.

    Args:
        vector: (D,).
        row: the sample of the store that the query is, which is left out.

    Returns:
        rank, cosine, and what `described` says of each.
    """
    if row is None:
        rows, cosines = index.search(vector[None], k)
    else:
        rows, cosines = index.of_rows([row], k)
    there = rows[0] >= 0
    found = zip(described(store, rows[0][there]), cosines[0][there], strict=True)
    return [
        {"rank": rank, "cosine": round(float(cosine), 4), **sample}
        for rank, (sample, cosine) in enumerate(found, 1)
    ]


def described(store: EmbeddingStore, rows: npt.ArrayLike) -> list[dict[str, Any]]:
    """id, split, labels (names; None: not known), image and text of rows."""
    wanted = np.asarray(rows, np.int64)
    columns = {name: store.column(name).take(wanted).to_pylist() for name in COLUMNS}
    names = store.label_set
    columns["labels"] = [
        None if labels is None else [names[label] for label in labels]
        for labels in columns["labels"]
    ]
    return [
        dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)
    ]


def format_neighbors(found: list[dict[str, Any]], query: dict[str, Any]) -> str:
    """`nearest_samples` for a terminal, one line each, after the query.

    Args:
        query: what is known of it, of the keys that `described` gives.
    """
    asked = {"rank": "query", "cosine": None, **dict.fromkeys(COLUMNS), **query}
    lines = [("", "cosine", "id", "labels", "image", "text"), _line(asked)]
    lines += [_line(item) for item in found]
    used = [place for place in range(len(lines[0])) if any(line[place] for line in lines[1:])]
    widths = {place: max(len(line[place]) for line in lines) for place in used}
    return "\n".join(
        "  ".join(line[place].ljust(widths[place]) for place in used).rstrip() for line in lines
    )


def _line(item: dict[str, Any]) -> tuple[str, ...]:
    labels = item["labels"]
    known = "?" if labels is None and item["id"] is not None else ", ".join(labels or [])
    text = " ".join((item["text"] or "").split())
    text = text if len(text) <= SHOWN else text[: SHOWN - 1] + "…"
    cosine = "" if item["cosine"] is None else f"{item['cosine']:.4f}"
    return str(item["rank"]), cosine, item["id"] or "", known, item["image"] or "", text
