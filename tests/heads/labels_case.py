"""Stores of given vectors and labels, for the tests of `mmc.heads.labels`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from mmc.store import EmbeddingStore, FieldSpec


def quiet(*_: Any) -> None:
    """Progress that nobody looks at."""


def store_of(
    path: Path,
    vectors: npt.ArrayLike,
    labels: Sequence[Sequence[int] | None],
    names: Sequence[str],
    *,
    task: str = "multilabel",
    label_text: npt.ArrayLike | None = None,
    **columns: Any,
) -> EmbeddingStore:
    """Samples ``s0``, ``s1`` ... with one feature ``clip/image``; ``columns`` replace or add."""
    values = np.asarray(vectors, np.float32)
    n = len(values)
    data = {
        "id": [f"s{i}" for i in range(n)],
        "split": ["train"] * n,
        "labels": pa.array(labels, pa.list_(pa.int32())),
        "image_key": [f"k{i}" for i in range(n)],
        **columns,
    }
    recipe = {"spec": "made.csv", "format": "csv"}
    store = EmbeddingStore.create(path, pa.table(data), label_set=names, task=task, source=recipe)
    field = FieldSpec(name="image", shape=values.shape[1:], dtype="float32", tower="image")
    with store.writer("clip", [field], {"backbone": "made"}, {}, shard_rows=max(n, 1)) as writer:
        writer.commit(0, "image", np.arange(n), {"image": values}, failed={})
        if label_text is not None:
            writer.write_label_text(list(names), np.asarray(label_text, np.float32), "{label}")
    return EmbeddingStore.open(path)
