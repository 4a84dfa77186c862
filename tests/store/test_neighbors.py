"""Nearest samples: the truth found, indexes kept, and made anew when they are of something else."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import faiss
import google_crc32c
import numpy as np
import pytest
from sklearn.neighbors import NearestNeighbors

from mmc.store import EmbeddingStore, FieldSpec, compact
from mmc.store import neighbors as module
from mmc.store.errors import InputError, MmcError, RowsNotDoneError
from mmc.store.files import LocalFiles
from mmc.store.neighbors import open_index, vector_features
from mmc.store.testing import samples_table

WIDTH = 16
COUNT = 600


def vectors(count: int = COUNT, seed: int = 0) -> Any:
    """Clusters, as embeddings have them, of lengths from 1 to 3."""
    draw = np.random.default_rng(seed)
    centres = draw.normal(size=(20, WIDTH))
    found = centres[draw.integers(0, 20, count)] + 0.7 * draw.normal(size=(count, WIDTH))
    return (found * draw.uniform(1, 3, (count, 1))).astype(np.float16)


def fill(store: EmbeddingStore, values: Any, rows: Any, identity: str = "a") -> None:
    fields = [
        FieldSpec(name="image", shape=(WIDTH,), dtype="float16", tower="image"),
        FieldSpec(name="image_tokens", shape=(2, 2), dtype="float16", tower="image"),
    ]
    with store.writer(
        "clip", fields=fields, identity={"made": identity}, context={}, shard_rows=256
    ) as writer:
        for shard in range(writer.num_shards):
            start, stop = writer.bounds(shard)
            here = rows[(rows >= start) & (rows < stop)]
            if len(here):
                tokens = np.zeros((len(here), 2, 2), np.float16)
                writer.commit(shard, "image", here, {"image": values[here], "image_tokens": tokens})


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., EmbeddingStore]:
    """A store of vectors; every seventh sample has none."""

    def made(count: int = COUNT, values: Any = None) -> EmbeddingStore:
        path = tmp_path / f"store{count}"
        store = EmbeddingStore.create(
            path,
            samples_table(range(count)),
            label_set=("cat", "dog", "owl"),
            task="multiclass",
            source={"spec": "samples.csv"},
        )
        rows = np.array([row for row in range(count) if row % 7], np.int64)
        fill(store, vectors(count) if values is None else values, rows)
        return EmbeddingStore.open(path)

    return made


def truth(store: EmbeddingStore, queries: Any, k: int) -> tuple[Any, Any]:
    """scikit-learn's answer."""
    rows = np.flatnonzero(store["clip/image"].done & store.live)
    known = store["clip/image"].take(rows).astype(np.float32)
    search = NearestNeighbors(n_neighbors=k, metric="cosine", algorithm="brute").fit(known)
    distances, places = search.kneighbors(queries.astype(np.float32))
    return rows[places], 1 - distances


def test_a_flat_index_finds_what_scikit_learn_finds(make):
    store = make()
    queries = vectors(50, seed=5)
    rows, cosines = open_index(store, "clip/image").search(queries, 8)
    expected_rows, expected = truth(store, queries, 8)
    np.testing.assert_allclose(cosines, expected, atol=2e-6)
    # Of equal cosines either may come first.
    assert (rows == expected_rows).mean() > 0.999
    assert rows.dtype == np.int64
    assert cosines.dtype == np.float32


@pytest.mark.parametrize("kind", ["ivf", "hnsw"])
def test_an_approximate_index_finds_as_much_as_it_says(make, kind):
    store = make()
    said: list[str] = []
    index = open_index(store, "clip/image", kind=kind, report=said.append)
    queries = vectors(200, seed=5)
    rows, _ = index.search(queries, 10)
    expected, _ = truth(store, queries, 10)
    found = np.mean([len(np.intersect1d(a, b)) for a, b in zip(rows, expected, strict=True)]) / 10
    assert index.record.recall >= module.GOAL
    assert found > 0.9
    assert f"{kind} index of 514 x clip/image, recall@10" in said[-1]


def test_a_sample_is_not_its_own_neighbour_even_among_copies(make):
    values = vectors(40)
    values[20:40] = values[20]
    index = open_index(make(40, values), "clip/image")
    rows, cosines = index.of_rows([1, 22, 39], 3)
    assert rows.shape == (3, 3)
    for own, found in zip([1, 22, 39], rows, strict=True):
        assert own not in found
    np.testing.assert_allclose(cosines[1:], 1, atol=1e-3)


def test_fewer_samples_than_neighbours(make):
    rows, cosines = open_index(make(8), "clip/image").search(vectors(1), 10)
    assert (rows[0] >= 0).sum() == 6
    assert np.isnan(cosines[0][rows[0] < 0]).all()
    assert sorted(rows[0][rows[0] >= 0]) == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("kind", ["ivf", "hnsw"])
def test_many_neighbours_are_found_too(make, kind):
    store = make()
    index = open_index(store, "clip/image", kind=kind)
    rows, _ = index.search(vectors(5, seed=5), 514)
    assert all(len(set(found)) == 514 and found.min() > 0 for found in rows)
    some, _ = index.search(vectors(20, seed=5), 100)
    expected, _ = truth(store, vectors(20, seed=5), 100)
    found = [len(np.intersect1d(a, b)) / 100 for a, b in zip(some, expected, strict=True)]
    assert np.mean(found) > 0.9


def test_more_neighbours_than_a_gpu_selects_are_sought_on_the_cpu(make, monkeypatch):
    class Gpu:
        """Refuses as FAISS's GPU indexes do."""

        d, asked = WIDTH, 0

        def __init__(self, index):
            self.index = index

        def search(self, queries, k):
            assert k <= 20, "a GPU selects no more"
            Gpu.asked += 1
            return self.index.search(queries, k)

    monkeypatch.setattr(module, "MOST_ON_GPU", 20)
    monkeypatch.setattr(faiss, "get_num_gpus", lambda: 1)
    monkeypatch.setattr(faiss, "index_cpu_to_all_gpus", Gpu, raising=False)
    index = open_index(make(), "clip/image")
    queries = vectors(5, seed=5)
    few, _ = index.search(queries, 20)
    many, _ = index.search(queries, 30)
    assert Gpu.asked == 1
    np.testing.assert_array_equal(few, many[:, :20])


@pytest.mark.parametrize("kind", ["flat", "ivf", "hnsw"])
def test_an_embedding_that_is_not_finite_is_near_nothing(make, kind):
    values = vectors()
    values[9] = np.nan
    rows, cosines = open_index(make(values=values), "clip/image", kind=kind).of_rows([8, 10], 5)
    assert 9 not in rows
    assert (cosines > 0).all()


def test_an_index_is_kept_and_used_again(make, monkeypatch):
    store = make()
    first = open_index(store, "clip/image", kind="ivf")
    monkeypatch.setattr(module, "_build", None)  # would fail
    again = open_index(EmbeddingStore.open(store.path), "clip/image", kind="ivf")
    queries = vectors(20, seed=3)
    np.testing.assert_array_equal(first.search(queries, 5)[0], again.search(queries, 5)[0])
    assert again.record.recall == first.record.recall


CHANGES = ("fingerprint", "content", "rows", "gone", "damage", "record", "effort", "other faiss")


@pytest.mark.parametrize("change", CHANGES)
def test_an_index_of_something_else_is_made_anew(make, change):
    store = make()
    before = open_index(store, "clip/image", kind="ivf")
    folder = Path(store.path) / "index" / "clip"
    new = vectors(COUNT, seed=9)
    everything = np.arange(COUNT)
    if change == "fingerprint":
        with store.writer(
            "clip",
            fields=[FieldSpec(name="image", shape=(WIDTH,), dtype="float16", tower="image")],
            identity={"made": "b"},
            context={},
            shard_rows=256,
            overwrite=True,
        ) as writer:
            for shard in range(writer.num_shards):
                rows = np.arange(*writer.bounds(shard))
                writer.commit(shard, "image", rows, {"image": new[rows]})
    elif change == "content":
        table = samples_table(
            range(COUNT), image_key=[f"i{n}" + "x" * (n == 8) for n in range(COUNT)]
        )
        store.sync(
            table,
            label_set=("cat", "dog", "owl"),
            task="multiclass",
            source={"spec": "samples.csv"},
        )
        fill(store, new, np.array([8]))
    elif change == "rows":
        fill(store, new, everything[::7])
    elif change == "gone":
        store.sync(
            samples_table(range(1, COUNT)).slice(1),
            label_set=("cat", "dog", "owl"),
            task="multiclass",
            source={"spec": "samples.csv"},
        )
    elif change == "damage":
        data = bytearray((folder / "image.ivf.faiss").read_bytes())
        data[len(data) // 2] ^= 1
        (folder / "image.ivf.faiss").write_bytes(data)
    else:
        record, index = folder / "image.ivf.json", folder / "image.ivf.faiss"
        kept = json.loads(record.read_text(encoding="utf-8"))
        if change == "effort":
            kept |= {"effort": "many"}
        elif change == "other faiss":
            index.write_bytes(b"IwXX" + index.read_bytes()[4:])
            kept |= {"crc32c": google_crc32c.value(index.read_bytes())}
        else:
            kept = {}
        record.write_text(json.dumps(kept), encoding="utf-8")
    said: list[str] = []
    reopened = EmbeddingStore.open(store.path)
    after = open_index(reopened, "clip/image", kind="ivf", report=said.append)
    assert said, "an old index was used"
    if change in ("content", "rows", "gone", "fingerprint"):
        assert after.record.content != before.record.content or change == "fingerprint"
    stored = reopened["clip/image"].take(after.rows[:30])
    rows, cosines = after.search(stored, 1)
    np.testing.assert_array_equal(rows[:, 0], after.rows[:30])
    np.testing.assert_allclose(cosines[:, 0], 1, atol=2e-3)
    assert not list(folder.glob(".*"))


def test_gone_samples_are_not_found(make):
    store = make()
    row = int(open_index(store, "clip/image").rows[3])
    kept = [n for n in range(COUNT) if n != row]
    store.sync(
        samples_table(kept),
        label_set=("cat", "dog", "owl"),
        task="multiclass",
        source={"spec": "samples.csv"},
    )
    assert row not in open_index(store, "clip/image").rows
    compact(store)
    assert not (Path(store.path) / "index").exists()


def test_a_store_that_cannot_be_written_is_searched_all_the_same(make, monkeypatch):
    store = make()

    def refuse(*args: Any) -> None:
        raise MmcError("cannot write: read-only")

    monkeypatch.setattr(LocalFiles, "write_stream", refuse)
    said: list[str] = []
    index = open_index(store, "clip/image", kind="ivf", report=said.append)
    assert len(index) == 514
    assert any("not kept" in line for line in said)


def test_what_cannot_be_searched_is_said(make):
    store = make()
    assert vector_features(store) == ["clip/image"]
    with pytest.raises(InputError, match=r"not one vector per sample.*clip/image"):
        open_index(store, "clip/image_tokens")
    with pytest.raises(InputError, match="no feature"):
        open_index(store, "clip/nothing")
    with pytest.raises(InputError, match="choose from auto, flat"):
        open_index(store, "clip/image", kind="lsh")  # type: ignore[arg-type]
    index = open_index(store, "clip/image")
    with pytest.raises(InputError, match="16 values"):
        index.search(np.zeros((1, 4)), 3)
    with pytest.raises(InputError, match="not finite"):
        index.search(np.full((1, WIDTH), np.nan), 3)
    with pytest.raises(InputError, match="1 or more"):
        index.search(np.zeros((1, WIDTH)), 0)
    with pytest.raises(RowsNotDoneError):
        index.of_rows([0], 3)


def test_object_stores_keep_indexes_too(make):
    local = make(100)
    store = EmbeddingStore.create(
        "memory://neighbors/a.store",
        samples_table(range(100)),
        label_set=("cat", "dog", "owl"),
        task="multiclass",
        source={"spec": "samples.csv"},
    )
    fill(store, vectors(100), np.flatnonzero(local["clip/image"].done))
    queries = vectors(5, seed=3)
    made = open_index(store, "clip/image", kind="ivf").search(queries, 5)[0]
    said: list[str] = []
    kept = open_index(store, "clip/image", kind="ivf", report=said.append).search(queries, 5)[0]
    assert not said
    np.testing.assert_array_equal(made, kept)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["flat", "ivf"])
def test_a_gpu_finds_what_the_cpu_finds(make, monkeypatch, kind):
    store, queries = make(), vectors(50, seed=5)
    if faiss.get_num_gpus() < 1:
        pytest.skip("this FAISS sees no GPU")
    there = open_index(store, "clip/image", kind=kind)
    assert "Gpu" in type(there._index).__name__
    monkeypatch.setattr(faiss, "get_num_gpus", lambda: 0)
    here = open_index(store, "clip/image", kind=kind)
    assert "Gpu" not in type(here._index).__name__
    found, expected = there.search(queries, 10), here.search(queries, 10)
    np.testing.assert_allclose(found[1], expected[1], atol=2e-3)
    assert (found[0] == expected[0]).mean() > 0.98


def test_making_an_index_tells_how_far_it_is(make):
    told: list[tuple[str, int, int]] = []
    open_index(make(), "clip/image", kind="ivf", progress=lambda *at: told.append(at))
    assert {(stage, done) for stage, done, total in told if done == total == 514} == {
        ("index", 514),
        ("measure the index", 514),
    }


@pytest.mark.parametrize("order", ["import torch, faiss", "import faiss, torch"])
def test_torch_and_faiss_work_in_one_process_in_either_order(order):
    code = f"""
{order}
import numpy as np
a = np.random.default_rng(0).normal(size=(2000, 64)).astype("f4")
index = faiss.IndexFlatIP(64)
for _ in range(3):
    exact = torch.from_numpy(a) @ torch.from_numpy(a[:50]).T
    index.reset()
    index.add(a)
    scores, places = index.search(a[:50], 5)
    best = exact.T.topk(5)
    assert (best.indices.numpy() == places).mean() > 0.98
    assert np.allclose(best.values.numpy(), scores, atol=1e-3)
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
