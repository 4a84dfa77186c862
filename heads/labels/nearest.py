"""For each label the labels nearest to it: by text, by its samples, by occurring together.

Legend: C labels, n samples, D values.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from scipy import sparse
from torch import Tensor

from mmc.heads.labels.exact import ExactSearch
from mmc.heads.labels.material import Ints, Material, Progress
from mmc.heads.models.graph import conditional

VIEWS = ("text", "centroid", "cooccurrence")
COLUMNS = ("label", "view", "rank", "nearest", "value", "lift", "samples", "disagree")
MOST = 5


@dataclass(frozen=True)
class Views:
    """What is known of the labels as a whole, of the training samples where there are any."""

    counts: np.ndarray
    """int64 (C,) samples with each label."""
    together: sparse.csr_array
    """(C, C) conditional probability of column given row; see `graph.conditional`."""
    pairs: sparse.csr_array
    """(C, C) how many samples have both."""
    known: np.ndarray
    """int64 (C,) samples of which each label is known."""
    lost: sparse.csr_array
    """(C, C) how many samples with the label of the row do not know that of the column."""
    centroids: Tensor
    """float32 (C, D) on the CPU, zeros for labels without samples."""
    texts: Tensor | None
    """float32 (C, D') of the label texts, NaN where a label has none."""
    text_alias: str | None


def label_views(material: Material, progress: Progress) -> Views:
    """Counts, co-occurrence, centroids and texts of the labels."""
    places, size = material.counted, len(material.label_set)
    known = material.labels
    indptr, indices = _rows(known.indptr, known.indices, places)
    open_indptr, open_indices = _rows(known.unknown_indptr, known.unknown_indices, places)
    counts, shape = np.diff(indptr), (len(places), size)
    has = sparse.csr_array((np.ones(len(indices)), indices, indptr), shape=shape)
    lacks = sparse.csr_array((np.ones(len(open_indices)), open_indices, open_indptr), shape=shape)
    pairs = sparse.csr_array(has.T @ has)
    total = None
    for first, block in material.vectors(
        places, lambda done, of: progress("centroids of labels", done, of)
    ):
        if total is None:
            total = torch.zeros(size, block.shape[1], device=block.device)
        start, stop = indptr[first], indptr[first + len(block)]
        sample = np.repeat(np.arange(len(block)), counts[first : first + len(block)])
        rows = torch.from_numpy(sample).to(block.device)
        labels = torch.from_numpy(indices[start:stop]).to(block.device)
        total.index_add_(0, labels, block[rows])
    if total is None:
        total = torch.zeros(size, 1)
    number = pairs.diagonal().astype(np.int64)
    alias, texts = label_texts(material)
    return Views(
        counts=number,
        together=conditional(
            torch.from_numpy(indptr),
            torch.from_numpy(indices),
            size,
            (torch.from_numpy(open_indptr), torch.from_numpy(open_indices)),
        ),
        pairs=pairs,
        known=len(places) - np.bincount(open_indices, minlength=size),
        lost=sparse.csr_array(has.T @ lacks),
        centroids=total.cpu() / torch.from_numpy(np.maximum(number, 1))[:, None].float(),
        texts=texts,
        text_alias=alias,
    )


def _rows(indptr: Ints, indices: Ints, places: Ints) -> tuple[Ints, Ints]:
    """Some rows of compressed rows."""
    counts = indptr[places + 1] - indptr[places]
    found = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    return found, indices[np.repeat(indptr[places] - found[:-1], counts) + np.arange(found[-1])]


def label_texts(material: Material) -> tuple[str | None, Tensor | None]:
    """The alias with label texts (of the material's first, then of any), and they, (C, D')."""
    store = material.store
    first = [name.split("/", 1)[0] for name in material.features]
    for alias in dict.fromkeys([*first, *store.aliases]):
        found = store.label_text(alias)
        if found is None:
            continue
        place = {name: index for index, name in enumerate(found[0])}
        texts = torch.full((len(material.label_set), found[1].shape[1]), torch.nan)
        for index, label in enumerate(material.label_set):
            if label in place:
                texts[index] = torch.from_numpy(found[1][place[label]].copy())
        return alias, texts
    return None, None


def nearest_labels(material: Material, views: Views) -> list[dict[str, Any]]:
    """Rows of `nearest_labels.csv`: at most five per label and view, the nearest first.

    A label is marked where no other label is among the nearest by every view that it has (and it
    has two or more).
    """
    size = len(material.label_set)
    most = max(1, min(MOST, -(-(size - 1) // 3)))
    by_view = {
        "text": _by_cosine(views.texts, None, most),
        "centroid": _by_cosine(views.centroids, views.counts > 0, most),
        "cooccurrence": _by_cooccurrence(views, most)
        if material.store.task == "multilabel"
        else {},
    }
    rows: list[dict[str, Any]] = []
    for label in range(size):
        lists = {name: found[label] for name, found in by_view.items() if found.get(label)}
        common = (
            set.intersection(*({j for j, _ in near} for near in lists.values())) if lists else set()
        )
        rows += [
            {
                "label": label,
                "view": view,
                "rank": rank,
                "nearest": other,
                "value": value,
                "disagree": int(len(lists) > 1 and not common),
            }
            for view, near in lists.items()
            for rank, (other, value) in enumerate(near, 1)
        ]
    ours, theirs = (np.array([row[key] for row in rows], np.int64) for key in ("label", "nearest"))
    none = np.zeros(0)
    both = np.asarray(views.pairs[ours, theirs]).ravel() if rows else none
    lost = np.asarray(views.lost[ours, theirs]).ravel() if rows else none
    share = views.counts[theirs] / np.maximum(views.known[theirs], 1)
    expected = (views.counts[ours] - lost) * share
    for row, samples, chance in zip(rows, both.tolist(), expected.tolist(), strict=True):
        row["samples"] = int(samples)
        row["lift"] = samples / chance if chance else None
        row["label"] = material.label_set[row["label"]]
        row["nearest"] = material.label_set[row["nearest"]]
    return rows


def lift(views: Views, label: int, other: int) -> float | None:
    """How many times as often as by chance two labels occur together; None without samples."""
    expected = present(views, label, other) * views.counts[other] / max(views.known[other], 1)
    return float(views.pairs[label, other] / expected) if expected else None


def present(views: Views, label: int, other: int) -> int:
    """How many samples have ``label`` and know whether they have ``other``."""
    return int(views.counts[label]) - int(views.lost[label, other])


def _by_cosine(
    vectors: Tensor | None, usable: np.ndarray | None, most: int
) -> dict[int, Sequence[tuple[int, float]]]:
    """The nearest of each label by the cosine of centred vectors: what all share says nothing."""
    if vectors is None:
        return {}
    there = ~vectors[:, 0].isnan()
    if usable is not None:
        there &= torch.from_numpy(usable)
    labels = there.nonzero()[:, 0]
    if len(labels) < 2:
        return {}
    unit = F.normalize(vectors[labels], dim=1) if usable is None else vectors[labels]
    search = ExactSearch(unit - unit.mean(0))
    found, cosines = search.search(search.base, min(most + 1, len(labels)))
    result: dict[int, Sequence[tuple[int, float]]] = {}
    for own, (near, values) in enumerate(zip(found.tolist(), cosines.tolist(), strict=True)):
        pairs = [(int(labels[j]), v) for j, v in zip(near, values, strict=True) if j != own]
        result[int(labels[own])] = pairs[:most]
    return result


def _by_cooccurrence(views: Views, most: int) -> dict[int, Sequence[tuple[int, float]]]:
    """The likeliest of each label's companions that it has more often than by chance."""
    result: dict[int, Sequence[tuple[int, float]]] = {}
    counts, share = views.counts, views.counts / np.maximum(views.known, 1)
    for label in range(len(counts)):
        start, stop = views.together.indptr[label : label + 2]
        others, p = views.together.indices[start:stop], views.together.data[start:stop]
        lost = np.zeros(len(counts))
        first, last = views.lost.indptr[label : label + 2]
        lost[views.lost.indices[first:last]] = views.lost.data[first:last]
        there = counts[label] - lost[others]
        # p is a count over that of the label and one; by chance it would be the other's share.
        often = p * (there + 1) > there * share[others]
        others, p = others[often], p[often]
        order = np.lexsort((others, -p))[:most]
        result[label] = list(zip(others[order].tolist(), p[order].tolist(), strict=True))
    return result
