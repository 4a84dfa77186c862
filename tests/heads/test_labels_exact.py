"""The exact search gives what FAISS's flat index gives."""

import faiss
import numpy as np
import pytest
import torch

from mmc.heads.labels import exact
from mmc.heads.labels.exact import ExactSearch


def clustered(count: int, width: int, seed: int) -> np.ndarray:
    """Vectors with a large common part, as embeddings have it, in clusters."""
    draw = np.random.default_rng(seed)
    centres = draw.normal(size=(50, width)) + 2
    found = centres[draw.integers(0, 50, count)] + 0.5 * draw.normal(size=(count, width))
    return (found * draw.uniform(0.5, 3, (count, 1))).astype(np.float32)


@pytest.mark.parametrize(("n", "k"), [(80, 10), (3000, 10), (3000, 40), (5, 5), (1, 1)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_equal_to_faiss(n, k, dtype, monkeypatch):
    monkeypatch.setattr(exact, "training_dtype", lambda *_: dtype)
    base, queries = clustered(n, 64, 0), clustered(200, 64, 1)
    flat = faiss.IndexFlatIP(64)
    unit = base.copy()
    faiss.normalize_L2(unit)
    flat.add(unit)
    faiss.normalize_L2(queries)
    expected, expected_places = flat.search(queries, k)
    places, cosines = ExactSearch(torch.from_numpy(base)).search(torch.from_numpy(queries), k)
    assert places.dtype == torch.int64
    np.testing.assert_allclose(cosines, expected, atol=2e-6)
    assert (places.numpy() == expected_places).mean() > 0.999


def test_tiles_change_nothing(monkeypatch):
    search = ExactSearch(torch.from_numpy(clustered(500, 32, 0)))
    queries = torch.from_numpy(clustered(70, 32, 1))
    whole = search.search(queries, 5)
    monkeypatch.setattr(exact, "TILE_ENTRIES", 500 * 8)
    parts = search.search(queries, 5)
    torch.testing.assert_close(whole[1], parts[1])
    assert (whole[0] == parts[0]).float().mean() > 0.99


def test_ties_in_order_and_no_queries():
    search = ExactSearch(torch.ones(40, 8))
    places = search.search(torch.ones(1, 8), 3)[0][0].tolist()
    assert places == sorted(set(places))
    assert len(places) == 3
    assert search.search(torch.ones(0, 8), 3)[0].shape == (0, 3)
    with pytest.raises(ValueError, match="k=41"):
        search.search(torch.ones(1, 8), 41)
