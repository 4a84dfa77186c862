"""Two numbers per sample to draw it by: PCA in one pass over any number of rows, or t-SNE.

Legend: n rows, D values of a feature.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import numpy.typing as npt

from mmc.store.errors import InputError

if TYPE_CHECKING:
    from mmc.store.feature import Feature

Rows = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]
Method = Literal["pca", "tsne", "none"]

BLOCK_ROWS = 8192
TSNE_ROWS, TSNE_WIDTH = 5000, 50
"""t-SNE takes minutes beyond so many rows; it starts from so many principal components."""


@dataclass(frozen=True, kw_only=True)
class Projection:
    """Places in the plane of the rows it was made of."""

    method: str
    feature: str
    places: Floats
    """(n, 2) in the order of the rows; NaN where the feature is missing."""
    explained: float | None = None
    """Share of the variance that the two components of a PCA hold."""


def project(
    feature: "Feature",
    rows: Rows,
    method: Method,
    *,
    seed: int = 0,
    progress: Callable[[str, int, int], None] = lambda stage, done, total: None,
) -> Projection:
    """Two coordinates for each of ``rows`` from vectors of unit length.

    PCA reads the feature twice, block by block; its signs are fixed, so the same rows give the same
    picture. t-SNE (van der Maaten & Hinton 2008; scikit-learn) holds all rows.

    Raises:
        InputError: not pooled vectors, fewer than 3 rows, or too many for t-SNE.
    """
    if len(feature.shape) != 2 or feature.dtype.kind != "f":
        raise InputError(f"{feature.name} is not one vector per sample; project a pooled field")
    done = feature.done[rows]
    there = rows[done]
    if len(there) < 3:
        raise InputError(f"{feature.name} has {len(there)} of the samples; a projection needs 3")
    if method == "tsne" and len(there) > TSNE_ROWS:
        raise InputError(
            f"t-SNE is for up to {TSNE_ROWS:,} samples and there are {len(there):,}; take "
            "--projection pca, or one --split"
        )
    width = 2 if method == "pca" else min(TSNE_WIDTH, len(there) - 1, feature.shape[1])
    mean, axes, shares = _components(feature, there, width, progress)
    parts = [(block - mean) @ axes for block in _blocks(feature, there)]
    found = np.concatenate(parts).astype(np.float32)
    if method == "tsne":
        from sklearn.manifold import TSNE

        perplexity = min(30.0, (len(there) - 1) / 3)
        model = TSNE(perplexity=perplexity, init="pca", random_state=seed)
        found = model.fit_transform(found).astype(np.float32)
    places = np.full((len(rows), 2), np.nan, np.float32)
    places[done] = found
    return Projection(
        method=method,
        feature=feature.name,
        places=places,
        explained=float(shares[:2].sum()) if method == "pca" else None,
    )


def _components(
    feature: "Feature", rows: Rows, count: int, progress: Callable[[str, int, int], None]
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Mean (D,), axes (D, count) by falling variance, and the share of variance of each."""
    width, seen = feature.shape[1], 0
    total, products = np.zeros(width), np.zeros((width, width))
    for block in _blocks(feature, rows):
        total += block.sum(0)
        products += block.T @ block
        seen += len(block)
        progress("project", seen, len(rows))
    mean = total / len(rows)
    variances, axes = np.linalg.eigh(products / len(rows) - np.outer(mean, mean))
    axes = axes[:, ::-1][:, :count]
    largest = np.abs(axes).argmax(0)
    axes = axes * np.sign(axes[largest, np.arange(axes.shape[1])])
    variances = np.maximum(variances[::-1], 0)
    return mean, axes, variances[:count] / max(variances.sum(), 1e-300)


def _blocks(feature: "Feature", rows: Rows) -> Iterator[npt.NDArray[np.float64]]:
    """Vectors of unit length, float64, block by block."""
    for start in range(0, len(rows), BLOCK_ROWS):
        values = feature.take(rows[start : start + BLOCK_ROWS], check=True).astype(np.float64)
        norms = np.linalg.norm(values, axis=1, keepdims=True)
        yield values / np.maximum(norms, 1e-12)
