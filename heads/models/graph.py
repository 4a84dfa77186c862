"""The graph of the labels: which label hears from which others, and how loudly.

Chen et al. 2019 (ML-GCN) for edges where one label makes another likely, and for the re-weighting
that leaves a label most of its own voice; here joined by edges between labels whose texts are near.

Legend: C labels, K neighbours at most, D values of a label text.
"""

from dataclasses import dataclass

import faiss
import numpy as np
import numpy.typing as npt
import scipy.sparse as sp
import torch
from torch import Tensor

Rows = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class LabelGraph:
    """Each label's neighbours, the loudest first; fixed shapes, so that a run can hold it."""

    neighbors: Tensor
    """int64 (C, K), -1 where there are fewer."""
    weights: Tensor
    """float32 (C, K), 0 there. What is missing to 1 is the label's own."""

    def edges(self) -> tuple[Tensor, Tensor]:
        """(from, to) int64 (2, E) and weights float32 (E, 1); every label to itself, too."""
        return edges(self.neighbors, self.weights)


def build(
    cooccurrence: sp.csr_array | None,
    texts: npt.NDArray[np.float32] | None,
    num_labels: int,
    *,
    neighbors: int,
    text_neighbors: int,
    threshold: float,
    share: float,
) -> LabelGraph:
    """The graph from what is known of the labels; either source may be missing.

    Args:
        cooccurrence: (C, C) conditional probabilities, as `conditional` gives them.
        texts: (C, D).
        neighbors: K.
        text_neighbors: how many of the nearest texts are joined.
        threshold: probabilities below it make no edge.
        share: how much of a label's voice its neighbours have together.
    """
    strength = sp.csr_array((num_labels, num_labels), dtype=np.float64)
    if cooccurrence is not None:
        kept = cooccurrence.copy()
        kept.data[kept.data < threshold] = 0
        strength = strength.maximum(kept)
    if texts is not None and text_neighbors and num_labels > 1:
        strength = strength.maximum(nearest(texts, text_neighbors))
    strength = sp.csr_array(strength)
    strength.setdiag(0)
    strength.eliminate_zeros()
    places = np.full((num_labels, neighbors), -1, np.int64)
    weights = np.zeros((num_labels, neighbors), np.float32)
    for label in range(num_labels):
        start, stop = strength.indptr[label : label + 2]
        values, others = strength.data[start:stop], strength.indices[start:stop]
        order = np.lexsort((others, -values))[:neighbors]
        if len(order):
            places[label, : len(order)] = others[order]
            weights[label, : len(order)] = share * values[order] / values[order].sum()
    return LabelGraph(neighbors=torch.from_numpy(places), weights=torch.from_numpy(weights))


def conditional(
    indptr: Tensor,
    indices: Tensor,
    num_labels: int,
    unknown: tuple[Tensor, Tensor] | None = None,
) -> sp.csr_array:
    """P(label j | label i) at (i, j), float64, from the rows' labels in CSR form.

    One is added to the count of i, so that what was seen once does not count as certain.

    Args:
        unknown: (indptr, indices) of single labels that are not known: only rows of i that know j
            count for j.
    """
    has = _incidence(indptr, indices, num_labels)
    together = sp.csr_array(has.T @ has)
    counts = together.diagonal()
    together.setdiag(0)
    together.eliminate_zeros()
    if unknown is None:
        return sp.csr_array(sp.diags_array(1 / (counts + 1)) @ together)
    pairs = together.tocoo()
    lost = sp.csr_array(has.T @ _incidence(*unknown, num_labels))
    there = counts[pairs.row] - lost[pairs.row, pairs.col]
    shape = (num_labels, num_labels)
    return sp.csr_array((pairs.data / (there + 1), (pairs.row, pairs.col)), shape=shape)


def _incidence(indptr: Tensor, indices: Tensor, num_labels: int) -> sp.csr_array:
    """(n, C): 1 where a row has a label."""
    ones, shape = np.ones(len(indices)), (len(indptr) - 1, num_labels)
    return sp.csr_array((ones, indices.numpy(), indptr.numpy()), shape=shape)


def nearest(texts: npt.NDArray[np.float32], count: int) -> sp.csr_array:
    """Cosine at (i, j) where text j is one of the ``count`` nearest of text i and not opposed.

    Of centred texts: prompts share most of their words, and all would be near.
    """
    num_labels = len(texts)
    unit = np.ascontiguousarray(texts - texts.mean(0), np.float32)
    unit /= np.maximum(np.linalg.norm(unit, axis=1, keepdims=True), 1e-12)
    index = faiss.IndexFlatIP(unit.shape[1])
    index.add(unit)
    cosines, places = index.search(unit, min(count + 1, num_labels))
    own = np.repeat(np.arange(num_labels), places.shape[1])
    cosines, places = cosines.ravel().astype(np.float64), places.ravel()
    kept = (places >= 0) & (places != own) & (cosines > 0)
    shape = (num_labels, num_labels)
    return sp.csr_array((cosines[kept], (own[kept], places[kept])), shape=shape)


def edges(neighbors: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """See `LabelGraph.edges`."""
    labels = torch.arange(len(neighbors), device=neighbors.device)
    there = neighbors >= 0
    targets = labels[:, None].expand_as(neighbors)[there]
    pairs = torch.stack([torch.cat([neighbors[there], labels]), torch.cat([targets, labels])])
    own = 1 - weights.sum(1)
    return pairs, torch.cat([weights[there], own])[:, None]


def text_nodes(texts: Tensor, width: int) -> Tensor:
    """Label texts (C, D) -> (C, width): their main directions, mean square 1, zeros beyond."""
    centred = texts.double() - texts.double().mean(0)
    values, directions = torch.linalg.eigh(centred.T @ centred)
    found = centred @ directions[:, values.argsort(descending=True)[:width]]
    scale = found.square().mean().sqrt().clamp(min=1e-12)
    nodes = torch.zeros(len(texts), width)
    nodes[:, : found.shape[1]] = (found / scale).float()
    return nodes
