"""Nearest samples as records and as lines for a terminal."""

from typing import Any

from mmc.store.neighbors import NeighborIndex, Vectors
from mmc.store.reader import EmbeddingStore

SHOWN = 60
"""Characters of a text in a terminal."""


def nearest_samples(
    store: EmbeddingStore, index: NeighborIndex, vector: Vectors, k: int, *, row: int | None = None
) -> list[dict[str, Any]]:
    """The nearest samples of one query, the nearest first, as plain JSON.

    Args:
        vector: (D,).
        row: the sample of the store that the query is, which is left out.

    Returns:
        rank, cosine, id, split, labels (names; None: not known), image and text of each.
    """
    if row is None:
        rows, cosines = index.search(vector[None], k)
    else:
        rows, cosines = index.of_rows([row], k)
    there = rows[0] >= 0
    found, cosines = rows[0][there], cosines[0][there]
    columns = {
        name: store.column(name).take(found).to_pylist()
        for name in ("id", "split", "labels", "image", "text")
    }
    names = store.label_set
    columns["labels"] = [
        None if labels is None else [names[label] for label in labels]
        for labels in columns["labels"]
    ]
    return [
        {
            "rank": place + 1,
            "cosine": round(float(cosines[place]), 4),
            **{name: values[place] for name, values in columns.items()},
        }
        for place in range(len(found))
    ]


def format_neighbors(found: list[dict[str, Any]]) -> str:
    """`nearest_samples` for a terminal, one line each."""
    lines = [("", "cosine", "id", "labels", "image", "text")]
    for item in found:
        labels = "?" if item["labels"] is None else ", ".join(item["labels"])
        text = " ".join((item["text"] or "").split())
        text = text if len(text) <= SHOWN else text[: SHOWN - 1] + "…"
        number = f"{item['cosine']:.4f}"
        lines.append((str(item["rank"]), number, item["id"], labels, item["image"] or "", text))
    widths = [max(len(line[place]) for line in lines) for place in range(len(lines[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )
