"""The nearest samples of every sample, by each feature.

Up to 50,000 samples they are compared with all others exactly; more have a FAISS index, which is
kept in the store (`mmc.store.neighbors`).

Legend: n samples, k neighbours.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from mmc.heads.batches import raw_blocks
from mmc.heads.labels.exact import ExactSearch
from mmc.heads.labels.material import Ints, Material, Progress
from mmc.store.neighbors import FLAT_ROWS, Say, open_index

K = 20
BLOCK_ROWS = 4096
LEAST_TOLD = 1e-4
"""Less of the neighbours than this knows nothing of a label but for rounding."""


@dataclass(frozen=True)
class Around:
    """The nearest other samples by one feature: of all of a material, or of some."""

    feature: str
    places: npt.NDArray[np.int32]
    """(n, k) places of the material, nearest first; -1 where there are fewer."""
    cosines: npt.NDArray[np.float32]
    """(n, k), NaN there."""

    def of(self, places: Ints) -> "Around":
        """Those of some samples, where this is of all."""
        return Around(self.feature, self.places[places], self.cosines[places])


def around(material: Material, progress: Progress, report: Say) -> list[Around]:
    """The `K` nearest of every sample, by each feature of the material."""
    return [_of_feature(material, name, progress, report) for name in material.features]


def around_some(material: Material, places: Ints) -> list[Around]:
    """As `around`, of some samples: exact whatever the size, in one pass over each feature."""
    return [_of_some(material, name, places) for name in material.features]


def _of_some(material: Material, feature: str, places: Ints) -> Around:
    stored = torch.from_numpy(material.store[feature].take(material.rows[places]))
    queries = F.normalize(stored.to(material.device).float(), dim=1)
    own = torch.from_numpy(places).to(material.device)
    near = torch.full((len(places), K), -torch.inf, device=material.device)
    found = torch.full((len(places), K), -1, device=material.device)
    roles = {feature: feature}
    for first, batch in raw_blocks(material.store, roles, material.rows, material.device):
        cosines = queries @ F.normalize(batch[feature], dim=1).T
        numbers = torch.arange(first, first + cosines.shape[1], device=material.device)
        cosines[numbers == own[:, None]] = -torch.inf
        near, best = torch.cat([near, cosines], 1).topk(K, dim=1)
        found = torch.cat([found, numbers.expand(len(places), -1)], 1).gather(1, best)
    found[near.isinf()] = -1
    near[near.isinf()] = torch.nan
    return Around(feature, found.cpu().numpy().astype(np.int32), near.cpu().numpy())


def _of_feature(material: Material, feature: str, progress: Progress, report: Say) -> Around:
    n = len(material)
    places = np.full((n, K), -1, np.int32)
    cosines = np.full((n, K), np.nan, np.float32)
    stage = f"neighbours by {feature}"
    if n <= FLAT_ROWS:
        vectors = torch.from_numpy(material.store[feature].take(material.rows))
        vectors = vectors.to(material.device).float()
        search = ExactSearch(vectors)
        k = min(K, n - 1)
        for start in range(0, n if k else 0, BLOCK_ROWS):
            stop = min(start + BLOCK_ROWS, n)
            found, near = search.search(search.base[start:stop], k + 1)
            block = slice(start, stop)
            places[block, :k], cosines[block, :k] = _others(
                found.cpu(), near.cpu(), torch.arange(start, stop)
            )
            progress(stage, stop, n)
        return Around(feature, places, cosines)
    index = open_index(material.store, feature, report=report, progress=progress)
    for start in range(0, n, BLOCK_ROWS):
        rows, values = index.of_rows(material.rows[start : start + BLOCK_ROWS], K)
        at = np.searchsorted(material.rows, rows).clip(max=n - 1)
        there = material.rows[at] == rows  # other samples may lack another feature
        block = slice(start, start + len(rows))
        places[block] = np.where(there, at, -1)
        cosines[block] = np.where(there, values, np.nan)
        progress(stage, start + len(rows), n)
    return Around(feature, places, cosines)


def _others(found: Tensor, near: Tensor, own: Tensor) -> tuple[Ints, npt.NDArray[np.float32]]:
    """Without the sample itself; where copies of it are so many that it is not there, the last."""
    mine = found == own[:, None]
    mine[~mine.any(1), -1] = True
    shape = (len(found), found.shape[1] - 1)
    return found[~mine].reshape(shape).numpy(), near[~mine].reshape(shape).numpy()


def shares(material: Material, found: list[Around]) -> npt.NDArray[np.float32]:
    """float32 (b, C): how much of the labelled neighbours of b samples has each label.

    Neighbours count by their cosine, those by each feature alike; NaN where none is labelled, or
    none knows the label.
    """
    count = len(found[0].places)
    votes = np.zeros((count, len(material.label_set)), np.float32)
    lost = np.zeros_like(votes) if len(material.labels.unknown_indices) else None
    weight = np.zeros(count, np.float32)
    labels = material.labels
    for by in found:
        near, cosines = by.places, np.nan_to_num(by.cosines).clip(1e-6)
        usable = (near >= 0) & labels.known[near]
        cosines = np.where(usable, cosines, 0)
        # A feature whose cosines are all near 1 must not outweigh another.
        total = cosines.sum(1, keepdims=True)
        cosines = np.divide(cosines, total, out=np.zeros_like(cosines), where=total > 0)
        weight += (total[:, 0] > 0).astype(np.float32)
        sample, column = np.nonzero(usable)
        other = near[sample, column]
        own = cosines[sample, column]
        _add(votes, labels.indptr, labels.indices, sample, other, own)
        if lost is not None:
            _add(lost, labels.unknown_indptr, labels.unknown_indices, sample, other, own)
    told = weight[:, None] if lost is None else weight[:, None] - lost
    there = told > LEAST_TOLD
    out = np.full_like(votes, np.nan)
    np.divide(votes, told, out=out, where=there)
    return out


def _add(
    out: npt.NDArray[np.float32], indptr: Ints, indices: Ints, sample: Ints, other: Any, own: Any
) -> None:
    """Add what each neighbour ``other`` of a ``sample`` counts to all of its labels."""
    counts = indptr[other + 1] - indptr[other]
    starts = (
        np.repeat(indptr[other] - np.concatenate([[0], np.cumsum(counts)[:-1]]), counts)
        if len(other)
        else np.zeros(0, np.int64)
    )
    flat = indices[starts + np.arange(len(starts))]
    np.add.at(out, (np.repeat(sample, counts), flat), np.repeat(own, counts))
