"""What ``mmc info`` shows."""

from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow.compute as pc

from mmc.store.aliases import Status, find_alias
from mmc.store.labeltext import read_label_text
from mmc.store.schema import DONE, FAILED, MISSING

if TYPE_CHECKING:
    from mmc.store.reader import EmbeddingStore


def summary(store: "EmbeddingStore") -> dict[str, Any]:
    """Rows, splits, labels, features, provenance and bytes of a store, as plain JSON.

    Counts leave out rows that are gone, except ``gone`` itself. ``unknown_labels``: in how many
    labelled rows a single label is unknown; ``partly_labelled``: rows with any.
    """
    live = store.live
    splits = pc.value_counts(store.column("split").filter(live)).to_pylist()
    labels = store.labels
    lacking = labels.unknown()
    unknown = np.bincount(lacking[1], minlength=len(store.label_set)).tolist()
    return {
        "path": store.path,
        "format": store.meta.format,
        "rows": int(live.sum()),
        "gone": int((~live).sum()),
        "task": store.task,
        "splits": {item["values"]: item["counts"] for item in splits},
        "labelled": int(labels.known.sum()),
        "partly_labelled": int((np.diff(lacking[0]) > 0).sum()),
        "label_tree": store.label_tree,
        "labels": dict(zip(store.label_set, labels.counts().tolist(), strict=True)),
        "unknown_labels": {
            name: count for name, count in zip(store.label_set, unknown, strict=True) if count
        },
        "aliases": {alias: _alias(store, alias) for alias in store.aliases},
        "bytes": store.files.tree_bytes(""),
        "sources": store.sources,
    }


def _alias(store: "EmbeddingStore", alias: str) -> dict[str, Any]:
    found = find_alias(store.files, alias, store.meta.generation)
    assert found is not None
    prefix, record = found
    texts = read_label_text(store.files, prefix)
    towers = {tower: _counts(store.status(alias, tower)[store.live]) for tower in record.towers}
    return {
        "features": {
            name: {
                "shape": [len(store), *field.shape],
                "dtype": field.dtype,
                "tower": field.tower,
                "bytes": store.files.tree_bytes(f"{prefix}/{name}"),
                **towers[field.tower],
            }
            for name, field in record.fields.items()
        },
        "towers": towers,
        "label_text": None if texts is None else {"labels": len(texts[0]), "prompt": texts[2]},
        "shard_rows": record.shard_rows,
        "compress": record.compress,
        "fingerprint": record.provenance.fingerprint,
        "identity": record.provenance.identity,
        "context": record.provenance.context,
    }


def _counts(status: Status) -> dict[str, int]:
    counts = np.bincount(status, minlength=3)
    return {
        "done": int(counts[DONE]),
        "failed": int(counts[FAILED]),
        "missing": int(counts[MISSING]),
    }
