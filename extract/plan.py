"""Which rows are computed in which batch: functions of the samples table alone.

A network's results depend, in the last bits, on the shape of the batch and on the place in it. So
batches are cut from all rows of a shard, whatever is still missing there; a run that was killed,
repeated or grown computes each row at the same place of a batch of the same shape, and gets the
same bytes. Only batches with rows to compute are run, and the places of the others stay empty.

Each content is computed once: the lowest row that holds it is its `first` row, and only first rows
have a place in a batch. Rows that repeat it get a copy.
"""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

Rows = NDArray[np.int64]


@dataclass(frozen=True)
class Batch:
    """Rows that are computed together; row ``rows[i]`` is at place i."""

    rows: Rows
    """At most the batch size; the places after them stay empty."""
    length: int = 0
    """Token positions of the batch; 0 for images."""


def first_rows(keys: pa.ChunkedArray, live: NDArray[np.bool_]) -> Rows:
    """For each row the lowest live row with the same content key.

    Args:
        keys: (N,) string; null = content that is not shared with any other row.
        live: (N,) bool; rows that are not gone from their source.

    Returns:
        (N,) rows; a row that is gone or has no key is its own first row.
    """
    rows = np.arange(len(keys), dtype=np.int64)
    codes = pc.fill_null(keys.combine_chunks().dictionary_encode().indices, -1).to_numpy()
    shared = live & (codes >= 0)
    lowest = np.full(int(codes.max(initial=-1)) + 1, len(keys), dtype=np.int64)
    np.minimum.at(lowest, codes[shared], rows[shared])
    firsts = rows.copy()
    firsts[shared] = lowest[codes[shared]]
    return firsts


def image_batches(rows: Rows, batch_size: int) -> list[Batch]:
    """Consecutive runs of ``batch_size`` rows (all first rows of one shard that have an image)."""
    return [Batch(rows[i : i + batch_size]) for i in range(0, len(rows), batch_size)]


def text_batches(rows: Rows, buckets: NDArray[np.int64], batch_size: int) -> list[Batch]:
    """Batches of texts of about the same length, so that little is spent on padding.

    Args:
        rows: first rows of one shard, ascending.
        buckets: token positions to compute for each, the same order.
        batch_size: rows in a batch.

    Rows keep their order within a bucket, so that rows appended later move none of the earlier.
    """
    batches = []
    for length in np.unique(buckets):
        members = rows[buckets == length]
        batches += [
            Batch(members[i : i + batch_size], int(length))
            for i in range(0, len(members), batch_size)
        ]
    return batches
