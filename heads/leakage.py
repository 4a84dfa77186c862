"""Samples that a head is measured on and has seen: contents that are in train as well."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from mmc.store.schema import TOWER_CONTENT

if TYPE_CHECKING:
    from mmc.store import EmbeddingStore

Rows = npt.NDArray[np.int64]
BOTH = "image and text"


def also_in_train(
    store: "EmbeddingStore", features: Sequence[str], train: Rows, rows: Rows
) -> dict[str, int]:
    """How many of ``rows`` have a content (by its hash) that a row of ``train`` has.

    Only contents that the features are made from count: image, text, and both of them in one and
    the same training row. Ids need no comparison: a store holds each once. Nothing is known of what
    arrays in memory were made from.
    """
    shown = contents(store, features)
    keys = {content: store.column(f"{content}_key").combine_chunks() for content in shown}
    if len(shown) == 2:
        keys[BOTH] = pc.binary_join_element_wise(*keys.values(), " ")
    seen, mine = pa.array(train), pa.array(rows)
    return {
        content: int(pc.sum(_among(key.take(mine), key.take(seen))).as_py() or 0)
        for content, key in keys.items()
    }


def contents(store: "EmbeddingStore", features: Sequence[str]) -> list[str]:
    """What the features are made from: image, text or both."""
    towers = dict.fromkeys(store[name].tower for name in features)
    return [c for c in ("image", "text") if any(c in TOWER_CONTENT.get(t, ()) for t in towers)]


def _among(keys: pa.Array, seen: pa.Array) -> pa.Array:
    """Which ``keys`` are in ``seen``; a row without content is in nothing."""
    return pc.is_in(keys, value_set=seen.drop_null(), skip_nulls=True)


def described(found: Mapping[str, int]) -> str:
    """ "3 have the image, 5 the text and 1 both of a training sample"; empty when none has."""
    words = {"image": "the image", "text": "the text", BOTH: "both"}
    parts = [f"{count:,} {words[content]}" for content, count in found.items() if count]
    if not parts:
        return ""
    parts[0] = parts[0].replace(" ", " have ", 1)
    listed = " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)
    return f"{listed} of a training sample"
