"""Folds of a cross-validation: every label spread evenly, no content in two folds.

Iterative stratification (Sechidis et al. 2011): the rarest label is dealt out first, each sample to
the fold that still lacks most of it, so that labels with few samples are spread as evenly as they
can be. What is dealt are groups: samples that share a content. For one label per sample without
groups the folds are those of a stratified k-fold: class counts differ by one at most.

Legend: n rows, C labels, g groups, k folds.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from scipy.sparse import csr_array
from scipy.sparse.csgraph import connected_components

from mmc.heads.leakage import contents
from mmc.heads.splits import Rows, Splits, label_rows
from mmc.store.errors import InputError

if TYPE_CHECKING:
    from mmc.store import EmbeddingStore

Ints = npt.NDArray[np.int64]

_FOLDS, _VALIDATION = 1, 2
MOST_PARTS = 10
"""Of what a fold trains on, at least a tenth validates."""
UNEVEN = 1.5
"""A largest fold of so many times the even size is worth a line."""


def fold_splits(
    store: "EmbeddingStore", features: Sequence[str], chosen: Splits, folds: int, seed: int
) -> tuple[list[tuple[Splits, Rows]], list[str]]:
    """For each fold the rows to train and validate on, and those held out; and lines to say.

    The folds part the training and validation rows; each of these is held out once. Of the others
    as large a share validates as in ``chosen``, but for rounding. Samples that share a content stay
    together, unless it is so common (the text of a template) that no fold could hold them.

    Raises:
        InputError: fewer groups of samples than folds.
    """
    rows = np.sort(np.concatenate([chosen.train, chosen.val]))
    labels = _labels(store, rows)
    groups, common = _groups(store, features, rows, len(rows) // folds)
    count = int(groups.max()) + 1
    few = InputError(
        f"--folds {folds} is too many for {len(rows):,} labelled train and val samples"
        + f" of {store.path}"
        + (f" ({count:,} groups that share no picture or text)" if count < len(rows) else "")
        + ": each fold needs one, and two more to train and validate on"
    )
    if count < folds:
        raise few
    fold = deal(labels, groups, folds, seed=(seed, _FOLDS))
    parts = min(MOST_PARTS, max(2, round(len(rows) / max(len(chosen.val), 1))))
    found = []
    for index in range(folds):
        rest = fold != index
        held, kept = rows[~rest], rows[rest]
        inner = _renumbered(groups[rest])
        into = min(parts, int(inner.max()) + 1)
        if into < 2:
            raise few
        part = deal(labels[rest], inner, into, seed=(seed, _VALIDATION, index))
        found.append((Splits(train=kept[part != 0], val=kept[part == 0], test=held[:0]), held))
    notes = [
        f"warning: {number:,} {content}s belong to more than {len(rows) // folds:,} samples each "
        "and stand in several folds"
        for content, number in common.items()
    ]
    sizes = np.bincount(fold, minlength=folds)
    if sizes.max() > UNEVEN * len(rows) / folds:
        notes.append(
            f"warning: folds of {sizes.min():,} to {sizes.max():,} samples: samples that share a "
            "picture or a text stay together"
        )
    return found, notes


def deal(labels: csr_array, groups: Ints, k: int, *, seed: tuple[int, ...]) -> Ints:
    """The fold of each row, int64 (n,); rows of one group are in one fold, and no fold is empty.

    Args:
        labels: (n, C), 1 where a row has a label.
        groups: (n,) from 0 on without gaps; at least ``k`` of them.
        seed: decides between folds that lack as much.
    """
    count = int(groups.max()) + 1
    sizes = np.bincount(groups, minlength=count)
    member = csr_array((np.ones(len(groups), np.int64), (groups, np.arange(len(groups)))))
    units: csr_array = member @ labels.astype(np.int64)  # (g, C): how often a group has a label
    # Large groups first: the small ones then even out what they did. Ties in a random order.
    order = np.random.default_rng(seed).permutation(count)
    order = order[np.argsort(-sizes[order], kind="stable")]
    fold = _dealt(units[order], sizes[order], k)
    _fill(fold, k)
    by_group = np.empty(count, np.int64)
    by_group[order] = fold
    return by_group[groups]


def _dealt(units: csr_array, sizes: Ints, k: int) -> Ints:
    """The fold of each group; the rarest label goes first, and who lacks most of it gets it."""
    by_label = units.T.tocsr()
    indptr, columns, values = (part.tolist() for part in (units.indptr, units.indices, units.data))
    unit_sizes = sizes.tolist()
    totals = np.asarray(units.sum(0)).ravel()
    wanted = [[total / k] * k for total in totals.tolist()]
    room = [float(sizes.sum()) / k] * k
    left = np.diff(by_label.indptr).astype(np.int64)  # groups with the label that have no fold yet
    fold = np.full(units.shape[0], -1, np.int64)

    def put(unit: int, lacks: list[float]) -> None:
        best = max(range(k), key=lambda f: (lacks[f], room[f]))
        fold[unit] = best
        room[best] -= unit_sizes[unit]
        for place in range(indptr[unit], indptr[unit + 1]):
            wanted[columns[place]][best] -= values[place]

    while left.any():
        rarest = int(np.where(left > 0, left, np.iinfo(np.int64).max).argmin())
        having = by_label.indices[by_label.indptr[rarest] : by_label.indptr[rarest + 1]]
        having = np.sort(having[fold[having] < 0])
        for unit in having.tolist():
            put(unit, wanted[rarest])
        np.subtract.at(left, units[having].indices, 1)
    for unit in np.flatnonzero(fold < 0).tolist():
        put(unit, room)
    return fold


def _fill(fold: Ints, k: int) -> None:
    """Give an empty fold the last, smallest group of the fold that has most groups."""
    for empty in range(k):
        counts = np.bincount(fold, minlength=k)
        if not counts[empty]:
            fold[np.flatnonzero(fold == counts.argmax())[-1]] = empty


def _labels(store: "EmbeddingStore", rows: Rows) -> csr_array:
    """(n, C), 1 where a row has a label."""
    indptr, indices = label_rows(store, rows)
    ones = np.ones(len(indices), np.int64)
    return csr_array((ones, indices, indptr), shape=(len(rows), len(store.label_set)))


def _groups(
    store: "EmbeddingStore", features: Sequence[str], rows: Rows, most: int
) -> tuple[Ints, dict[str, int]]:
    """A number for each row, the same for rows that are linked by contents that features show.

    Contents of more than ``most`` rows link nothing; how many there are, by kind, comes second.
    """
    n, taken = len(rows), pa.array(rows)
    ends, common = [np.zeros((2, 0), np.int64)], {}
    for content in contents(store, features):
        keys = store.column(f"{content}_key").combine_chunks().take(taken)
        codes = pc.dictionary_encode(keys).indices
        known = np.flatnonzero(codes.is_valid().to_numpy(zero_copy_only=False))
        code = codes.drop_null().to_numpy(zero_copy_only=False).astype(np.int64)
        _, first, inverse, counts = np.unique(
            code, return_index=True, return_inverse=True, return_counts=True
        )
        if (counts > most).any():
            common[content] = int((counts > most).sum())
        links = np.stack([known, known[first[inverse]]])
        ends.append(links[:, counts[inverse] <= most])
    one, other = np.concatenate(ends, axis=1)
    graph = csr_array((np.ones(len(one), np.int8), (one, other)), shape=(n, n))
    _, group = connected_components(graph, directed=False)
    return group.astype(np.int64), common


def _renumbered(groups: Ints) -> Ints:
    """The same groups, numbered without gaps."""
    return np.unique(groups, return_inverse=True)[1].astype(np.int64)
