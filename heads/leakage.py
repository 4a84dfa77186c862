"""Samples that a head is measured on and has seen: contents that are in train as well."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import torch
import torch.nn.functional as F
from torch import Tensor

from mmc.store.schema import TOWER_CONTENT

if TYPE_CHECKING:
    from mmc.store import EmbeddingStore
    from mmc.store.feature import Feature

Rows = npt.NDArray[np.int64]
BOTH = "image and text"
NEAR_SHARE = 0.02
"""Of the distance (1 - cosine) of two random samples: nearer than that is near-identical."""
NEAR_PAIRS = 50_000_000
"""More are not compared when a head is trained."""
NEAR_WIDTH = 32
"""Of fewer values some are near by chance."""
NEAR_BYTES = 2 << 20
"""Of vectors, as float32, that are compared at a time."""
RANDOM_PAIRS = 20_000


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


def near_in_train(
    store: "EmbeddingStore", features: Sequence[str], train: Rows, rows: Rows
) -> int | None:
    """How many of ``rows`` are almost a row of ``train``, without sharing all of their content.

    Almost: by each feature (of one vector per sample) they are at most a fiftieth as far apart
    (1 - cosine) as two random samples are. None: no feature has 32 values or more, or there are
    more than fifty million pairs, which `mmc labels` looks at with an index.
    """
    pooled = [name for name in features if is_vector(store, name)]
    if not pooled or not len(train) or not 0 < len(train) * len(rows) <= NEAR_PAIRS:
        return None
    read = {name: store[name] for name in pooled}
    most = {name: NEAR_SHARE * random_distance(read[name], train) for name in pooled}
    # Piece by piece, whatever the sets: so few pairs are read in no time.
    step = max(1, NEAR_BYTES // (4 * sum(feature.shape[1] for feature in read.values())))
    near = np.zeros(len(rows), bool)
    for i in range(0, len(train), step):
        theirs = {name: unit_rows(read[name], train[i : i + step]) for name in pooled}
        for j in range(0, len(rows), step):
            close = None
            for name, vectors in theirs.items():
                found = 1 - unit_rows(read[name], rows[j : j + step]) @ vectors.T <= most[name]
                close = found if close is None else close & found
            assert close is not None
            near[j : j + step] |= close.any(1).numpy()
    keys = [
        store.column(f"{content}_key").combine_chunks() for content in contents(store, features)
    ]
    if keys:
        key = pc.binary_join_element_wise(*keys, " ") if len(keys) == 2 else keys[0]
        same = _among(key.take(pa.array(rows)), key.take(pa.array(train)))
        near &= ~pc.fill_null(same, False).to_numpy(zero_copy_only=False)
    return int(near.sum())


def is_vector(store: "EmbeddingStore", name: str) -> bool:
    """Whether a feature is one float vector per sample, of enough values to tell samples apart."""
    stored = store[name]
    return len(stored.shape) == 2 and stored.dtype.kind == "f" and stored.shape[1] >= NEAR_WIDTH


def unit_rows(feature: "Feature", rows: Rows) -> Tensor:
    """A feature of ``rows``, float32 (n, D) of length 1."""
    values = np.ascontiguousarray(feature.take(rows), np.float32)
    return F.normalize(torch.from_numpy(values), dim=1)


def random_distance(feature: "Feature", rows: Rows) -> float:
    """Median of 1 - cosine of two random ones of ``rows``; 0 where there is only one."""
    random = np.random.default_rng(0)
    one, other = random.integers(0, len(rows), (2, RANDOM_PAIRS))
    apart = one != other
    if not apart.any():
        return 0.0
    one, other = rows[one[apart]], rows[other[apart]]
    step = max(1, NEAR_BYTES // (4 * feature.shape[1]))
    cosines = torch.empty(len(one))
    for i in range(0, len(one), step):
        ours, theirs = (unit_rows(feature, part[i : i + step]) for part in (one, other))
        torch.sum(ours.mul_(theirs), 1, out=cosines[i : i + step])
    return 1 - float(cosines.median())


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
    parts[0] = parts[0].replace(" ", " has " if parts[0].startswith("1 ") else " have ", 1)
    listed = " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)
    return f"{listed} of a training sample"
