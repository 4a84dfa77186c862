"""Samples with the same image and the same text as another: said aloud, and dropped if asked.

Content is compared by its keys, so files of other names and texts in other rows count. A sample
whose image cannot be read is compared with none. Of equal samples one stays: the test copy before
the val copy, that before any other split's and train's, since a test score is honest only when
nothing in train repeats its samples, and dropping test samples would change what is measured; in
one split the copy of which more labels are known, then the first.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from mmc.extract.sources.base import Samples, shown
from mmc.store.samples import UNKNOWN

_RANKS = {"test": 0, "val": 1, "train": 3, "": 4}
_OTHER_RANK = 2

Say = Callable[[str], None]


@dataclass(frozen=True)
class Duplicates:
    """The samples that repeat another."""

    repeats: NDArray[np.int64]
    """(D,) their rows, ascending."""
    originals: NDArray[np.int64]
    """(D,) the row that each repeats: the copy that stays."""


def duplicates(table: pa.Table) -> Duplicates:
    """Rows of the same content as another.

    Args:
        table: samples with their keys.
    """
    group = _groups(table)
    rows = np.flatnonzero(group >= 0)
    names, codes = _coded(table["split"].fill_null(""))
    rank = np.array([_RANKS.get(name, _OTHER_RANK) for name in names], np.int64)[codes]
    lacking = _lacking(table)
    order = rows[np.lexsort((rows, lacking[rows], rank[rows], group[rows]))]
    first = np.ones(len(order), bool)
    first[1:] = group[order[1:]] != group[order[:-1]]
    kept = order[np.maximum.accumulate(np.where(first, np.arange(len(order)), 0))]
    repeats, originals = order[~first], kept[~first]
    by_row = np.argsort(repeats)
    return Duplicates(repeats[by_row], originals[by_row])


def settle(samples: Samples, table: pa.Table, dedupe: bool, report: Say) -> pa.Table:
    """``table`` without its duplicates where ``dedupe``; says how many there are.

    Args:
        samples: what the source gave; the counts in its recipe follow what is dropped.
        table: the same samples with their keys.
    """
    found = duplicates(table)
    if not len(found.repeats):
        return table
    for line in _lines(table, found, dedupe):
        report(line)
    if not dedupe:
        return table
    keep = np.ones(len(table), bool)
    keep[found.repeats] = False
    table = table.filter(pa.array(keep))
    samples.source["counts"] = {
        **samples.source["counts"],
        **counts(table),
        "duplicates_dropped": len(found.repeats),
    }
    return table


def counts(table: pa.Table) -> dict[str, Any]:
    """How many samples there are, and how many have what."""
    names, codes = _coded(table["split"])
    numbers = np.bincount(codes, minlength=len(names)).tolist()
    return {
        "samples": len(table),
        **{
            what: len(table) - table[column].null_count
            for what, column in (("images", "image"), ("texts", "text"), ("labelled", "labels"))
        },
        "splits": dict(sorted(zip(names, numbers, strict=True))),
    }


def _lacking(table: pa.Table) -> NDArray[np.int64]:
    """(N,) how many labels of each sample are unknown; of an unlabelled one more than of any."""
    found = np.zeros(len(table), np.int64)
    if UNKNOWN.name in table.column_names:
        found = pc.fill_null(pc.list_value_length(table[UNKNOWN.name]), 0).to_numpy().astype(int)
    unlabelled = table["labels"].is_null().to_numpy(zero_copy_only=False)
    return np.where(unlabelled, np.iinfo(np.int32).max, found)


def _groups(table: pa.Table) -> NDArray[np.int64]:
    """(N,) a number for each content; -1 = no content, or one that cannot be read."""
    image, text = (table[name].fill_null("") for name in ("image_key", "text_key"))
    _, codes = _coded(pc.binary_join_element_wise(image, text, " "))
    nothing = pc.and_(pc.equal(image, ""), pc.equal(text, ""))
    unread = pc.and_(table["image"].is_valid(), table["image_key"].is_null())
    return np.where(pc.or_(nothing, unread).to_numpy(zero_copy_only=False), -1, codes)


def _coded(column: pa.ChunkedArray) -> tuple[list[str], NDArray[np.int64]]:
    encoded = column.combine_chunks().dictionary_encode()
    return encoded.dictionary.to_pylist(), encoded.indices.to_numpy().astype(np.int64)


def _cells(table: pa.Table, rows: pa.Array) -> list[tuple[Any, Any]]:
    """Labels and unknown labels of some rows."""
    labels = table["labels"].take(rows).to_pylist()
    if UNKNOWN.name not in table.column_names:
        return [(cell, None) for cell in labels]
    return list(zip(labels, table[UNKNOWN.name].take(rows).to_pylist(), strict=True))


def _lines(table: pa.Table, found: Duplicates, dedupe: bool) -> list[str]:
    """What to say of them."""
    repeats, originals = pa.array(found.repeats), pa.array(found.originals)
    ids = [shown(table["id"][int(rows[0])].as_py()) for rows in (found.repeats, found.originals)]
    done = "dropped (--dedupe)" if dedupe else "kept; --dedupe drops them"
    lines = [
        f"duplicates: {len(found.repeats):,} samples have the image and the text of another, first"
        f" {ids[0]} those of {ids[1]}: {done}"
    ]
    splits = (table["split"].take(rows).to_pylist() for rows in (originals, repeats))
    across = Counter(pair for pair in zip(*splits, strict=True) if pair[0] != pair[1])
    if across:
        pairs = ", ".join(
            f"{one or 'no split'} and {other or 'no split'} {count:,}"
            for (one, other), count in sorted(across.items())
        )
        effect = "the copy named first stays" if dedupe else "scores there are too good"
        lines.append(
            f"warning: {across.total():,} of the duplicates lie across splits ({pairs}): {effect}"
        )
    differ = sum(
        one[0] is not None and other[0] is not None and one != other
        for one, other in zip(_cells(table, repeats), _cells(table, originals), strict=True)
    )
    if differ:
        effect = "those of the copy that stays are used" if dedupe else "both are used"
        lines.append(
            f"warning: {differ:,} of the duplicates have other labels than their copy: {effect}"
        )
    return lines
